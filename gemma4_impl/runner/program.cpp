#include "program.h"

#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/backend/interface.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "log.h"
#include "refused.h"

namespace gemma4 {
namespace {

namespace fs = std::filesystem;
using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::MethodMeta;
using executorch::runtime::Result;
using executorch::runtime::Tag;

constexpr char kCuda[] = "CudaBackend";
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// ExecuTorch's error and the first line that it logged about it.
std::string reason(Error error) {
  const std::string logged = first_error();
  const std::string name = to_string(error);
  return logged.empty() ? name : name + ": " + logged;
}

std::vector<std::string> data_files(const fs::path& folder) {
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".ptd") files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string program_file(const fs::path& folder) {
  const fs::path file = folder / "model.pte";
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) throw Refused(folder.string() + ": no such folder");
  if (!fs::is_regular_file(file, ignored)) {
    throw Refused(folder.string() + ": has no model.pte; is it an exported program?");
  }
  return file.string();
}

std::string join(const std::vector<std::string>& items) {
  std::string joined;
  for (const auto& item : items) joined += (joined.empty() ? "" : ", ") + item;
  return joined;
}

std::string describe(ScalarType type, const std::vector<int32_t>& sizes) {
  std::vector<std::string> numbers;
  for (int32_t size : sizes) numbers.push_back(std::to_string(size));
  return std::string(executorch::runtime::toString(type)) + " [" + join(numbers) + "]";
}

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

template <typename T>
std::vector<float> floats(const executorch::aten::Tensor& tensor) {
  const T* data = tensor.const_data_ptr<T>();
  return std::vector<float>(data, data + tensor.numel());
}

std::vector<float> to_floats(const executorch::aten::Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::BFloat16) return floats<executorch::aten::BFloat16>(tensor);
  if (tensor.scalar_type() == ScalarType::Half) return floats<executorch::aten::Half>(tensor);
  return floats<float>(tensor);
}

}  // namespace

std::unique_ptr<Program> Program::open(const fs::path& folder, bool lock) {
  if (lock) {
    try {
      return std::unique_ptr<Program>(new Program(folder, true));
    } catch (const Refused&) {
      // Either memory cannot be locked, or the next attempt says what is wrong.
    }
  }
  return std::unique_ptr<Program>(new Program(folder, false));
}

// Arenas are shared because prefill and decode have their caches there: with an arena each, decode would see none.
Program::Program(const fs::path& folder, bool lock)
    : path_(program_file(folder)),
      locked_(lock),
      module_(path_, data_files(folder), lock ? Module::LoadMode::MmapUseMlock : Module::LoadMode::Mmap, nullptr,
              nullptr, nullptr, /*share_memory_arenas=*/true) {
  clear_log();
  const Error error = module_.load(executorch::runtime::Program::Verification::InternalConsistency);
  if (error != Error::Ok) refuse("is no ExecuTorch program that this runner can read (" + reason(error) + ")");
  check_methods();
}

void Program::refuse(const std::string& why) const { throw Refused(path_ + ": " + why); }

void Program::check_methods() {
  const auto found = module_.method_names();
  if (!found.ok()) refuse("does not list its methods (" + reason(found.error()) + ")");
  single_method_ = found->count("forward") > 0 && found->count("decode") == 0;
  read_metadata();
  const std::string decode = single_method_ ? "forward" : "decode";
  std::vector<std::string> needed = {decode};
  if (!single_method_ && metadata_.max_prefill_chunk > 1) needed.push_back("prefill");
  for (const auto& method : needed) {
    if (found->count(method) == 0) {
      std::vector<std::string> names(found->begin(), found->end());
      std::sort(names.begin(), names.end());
      refuse("has no method " + method + "; it has " + join(names));
    }
    check_backends(method);
  }
  draws_ = check_output(decode);
  check_inputs(decode, single_method_ ? metadata_.max_prefill_chunk : 1, draws_);
  if (draws_ && found->count("get_top_k") > 0) top_k_ = constant("get_top_k", 0, metadata_.vocab_size);
  if (needed.size() == 2) {
    check_output("prefill");
    check_inputs("prefill", metadata_.max_prefill_chunk, false);
    check_caches();
  }
  share_state_of_backends(needed[0]);
  for (const auto& method : needed) {
    clear_log();
    const Error error = module_.load_method(method);
    if (error != Error::Ok) refuse(method + " cannot be loaded (" + reason(error) + ")");
  }
}

void Program::read_metadata() {
  metadata_.max_seq_len = constant("get_max_seq_len", 1, kMost);
  metadata_.max_prefill_chunk = constant("get_max_prefill_chunk", 1, metadata_.max_seq_len);
  metadata_.vocab_size = constant("get_vocab_size", 1, kMost);
  metadata_.bos_id = constant("get_bos_id", 0, metadata_.vocab_size - 1);
  metadata_.eos_ids = constants("get_eos_ids");
  if (metadata_.eos_ids.empty()) refuse("get_eos_ids is empty: generation would never end");
  for (int64_t id : metadata_.eos_ids) {
    if (id < 0 || id >= metadata_.vocab_size) {
      refuse("get_eos_ids has " + std::to_string(id) + ", outside the vocabulary of " +
             std::to_string(metadata_.vocab_size));
    }
  }
  if (constant("use_kv_cache", 0, 1) == 0) refuse("use_kv_cache is 0: only programs with caches can be run");
}

std::vector<int64_t> Program::constants(const std::string& name) {
  clear_log();
  const Result<MethodMeta> meta = module_.method_meta(name);
  if (!meta.ok()) refuse("has no constant " + name);
  if (meta->num_inputs() > 0) refuse(name + " is no constant: it takes inputs");
  const auto values = module_.execute(name);
  if (!values.ok()) refuse(name + " cannot be read (" + reason(values.error()) + ")");
  std::vector<int64_t> integers;
  for (const EValue& value : *values) {
    if (!value.isInt() && !value.isBool()) refuse(name + " is no integer");
    integers.push_back(value.isInt() ? value.toInt() : int64_t{value.toBool()});
  }
  return integers;
}

int64_t Program::constant(const std::string& name, int64_t least, int64_t most) {
  const std::vector<int64_t> values = constants(name);
  if (values.size() != 1) refuse(name + " has " + std::to_string(values.size()) + " values, not one");
  if (values[0] < least || values[0] > most) {
    refuse(name + " is " + std::to_string(values[0]) + ", but must be from " + std::to_string(least) + " to " +
           std::to_string(most));
  }
  return values[0];
}

// Shapes are those of the largest inputs.
void Program::check_inputs(const std::string& method, int64_t tokens, bool draws) {
  struct Input {
    const char* name;
    ScalarType type;
    std::vector<int32_t> sizes;
  };
  const int32_t length = static_cast<int32_t>(tokens);
  std::vector<Input> inputs = {{"tokens", ScalarType::Long, {1, length}}};
  if (single_method_) {
    inputs.push_back({"input_pos", ScalarType::Long, {1}});
  } else {
    inputs.push_back({"positions", ScalarType::Long, {1, length}});
  }
  if (draws) inputs.push_back({"temperature", ScalarType::Float, {1}});

  const auto meta = module_.method_meta(method);
  if (!meta.ok()) refuse(method + " cannot be read (" + reason(meta.error()) + ")");
  if (meta->num_inputs() != inputs.size()) {
    std::vector<std::string> names;
    for (const auto& input : inputs) names.push_back(input.name);
    refuse(method + " takes " + std::to_string(meta->num_inputs()) + " inputs, not " + join(names));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = method + ": " + inputs[i].name;
    const auto tag = meta->input_tag(i);
    if (!tag.ok() || *tag != Tag::Tensor) refuse(name + " is no tensor");
    const auto info = meta->input_tensor_meta(i);
    if (!info.ok()) refuse(name + " cannot be read (" + reason(info.error()) + ")");
    const auto sizes = info->sizes();
    const std::vector<int32_t>& wanted = inputs[i].sizes;
    if (info->scalar_type() != inputs[i].type ||
        !std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end())) {
      refuse(name + " is " + describe(info->scalar_type(), {sizes.begin(), sizes.end()}) + ", not " +
             describe(inputs[i].type, wanted) + " (get_max_prefill_chunk is " +
             std::to_string(metadata_.max_prefill_chunk) + ")");
    }
  }
}

bool Program::check_output(const std::string& method) {
  const auto meta = module_.method_meta(method);
  if (!meta.ok()) refuse(method + " cannot be read (" + reason(meta.error()) + ")");
  if (meta->num_outputs() != 1) refuse(method + " returns " + std::to_string(meta->num_outputs()) + " values, not one");
  const auto tag = meta->output_tag(0);
  if (!tag.ok() || *tag != Tag::Tensor) refuse(method + " returns no tensor");
  const auto info = meta->output_tensor_meta(0);
  if (!info.ok()) refuse(method + ": its output cannot be read (" + reason(info.error()) + ")");
  const auto sizes = info->sizes();
  const int64_t elements = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
  if (method == "decode" && info->scalar_type() == ScalarType::Long && elements == 1) return true;
  if (!is_float(info->scalar_type()) || elements != metadata_.vocab_size) {
    refuse(method + " returns " + describe(info->scalar_type(), {sizes.begin(), sizes.end()}) +
           ", not the logits of get_vocab_size = " + std::to_string(metadata_.vocab_size) + " ids");
  }
  return false;
}

void Program::check_backends(const std::string& method) {
  const auto meta = module_.method_meta(method);
  if (!meta.ok()) refuse(method + " cannot be read (" + reason(meta.error()) + ")");
  for (size_t i = 0; i < meta->num_backends(); ++i) {
    const auto name = meta->get_backend_name(i);
    if (!name.ok()) refuse(method + ": a backend has no name");
    const auto* backend = executorch::runtime::get_backend_class(*name);
    if (backend == nullptr) refuse(method + " needs the backend " + *name + ", which this runner does not have");
    if (!backend->is_available()) {
      refuse(method + " needs the backend " + *name + ", which does not work on this machine");
    }
  }
}

// Caches that the runtime plans are in the arenas after the first, and the methods must agree about them.
void Program::check_caches() {
  const auto arenas = [&](const std::string& method) {
    const auto meta = module_.method_meta(method);
    std::vector<int64_t> sizes;
    for (size_t i = 1; meta.ok() && i < meta->num_memory_planned_buffers(); ++i) {
      const auto size = meta->memory_planned_buffer_size(i);
      sizes.push_back(size.ok() ? *size : -1);
    }
    return sizes;
  };
  const auto sizes = arenas("prefill");
  if (!uses(kCuda, "prefill") && (sizes.empty() || sizes != arenas("decode"))) {
    refuse("prefill and decode do not share their caches; export it with share_mutable_buffers");
  }
}

// The CUDA backend keeps the caches itself, for each method its own unless it is told before the methods are loaded.
void Program::share_state_of_backends(const std::string& method) {
  if (!uses(kCuda, method)) return;
  executorch::runtime::BackendOptions<1> options;
  Error error = options.set_option("weight_sharing_across_methods", true);
  if (error == Error::Ok) error = executorch::runtime::set_option(kCuda, options.view());
  if (error != Error::Ok) refuse("the CUDA backend does not share caches between methods (" + reason(error) + ")");
}

bool Program::uses(const char* backend, const std::string& method) {
  const auto meta = module_.method_meta(method);
  return meta.ok() && meta->uses_backend(backend);
}

Next Program::run(const std::vector<int64_t>& tokens, int64_t position, double temperature) {
  const int32_t count = static_cast<int32_t>(tokens.size());
  const std::string method = single_method_ ? "forward" : count == 1 ? "decode" : "prefill";
  const std::string where = method + " at position " + std::to_string(position);
  // Tensors that only point at these.
  std::vector<int64_t> ids = tokens;
  std::vector<int64_t> positions(single_method_ ? 1 : ids.size());
  std::iota(positions.begin(), positions.end(), position);
  float heat = static_cast<float>(temperature);
  std::vector<TensorPtr> inputs = {from_blob(ids.data(), {1, count}, ScalarType::Long)};
  if (single_method_) {
    inputs.push_back(from_blob(positions.data(), {1}, ScalarType::Long));
  } else {
    inputs.push_back(from_blob(positions.data(), {1, count}, ScalarType::Long));
  }
  if (draws_ && method == "decode") inputs.push_back(from_blob(&heat, {1}, ScalarType::Float));

  clear_log();
  const auto outputs = module_.execute(method, std::vector<EValue>(inputs.begin(), inputs.end()));
  if (!outputs.ok()) throw std::runtime_error(where + " failed (" + reason(outputs.error()) + ")");
  const auto& tensor = outputs->at(0).toTensor();
  if (tensor.scalar_type() != ScalarType::Long) return {std::nullopt, to_floats(tensor)};
  const int64_t token = tensor.const_data_ptr<int64_t>()[0];
  if (token < 0) throw std::runtime_error("the logits are NaN");
  if (token >= metadata_.vocab_size) {
    throw std::runtime_error(where + " drew " + std::to_string(token) + ", which is no token");
  }
  return {token, {}};
}

}  // namespace gemma4
