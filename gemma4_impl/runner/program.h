// An exported program: what it says of itself, checked against its methods, and one step of it.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace gemma4 {

// The program's own constants.
struct Metadata {
  int64_t max_seq_len;
  int64_t max_prefill_chunk;
  int64_t vocab_size;
  int64_t bos_id;
  std::vector<int64_t> eos_ids;
};

// What a step says about the next token: the token itself, if the program draws it, or else its logits.
struct Next {
  std::optional<int64_t> token;
  std::vector<float> logits;
};

// Holds the caches: run() must get every token once, in order. A new Program starts from nothing.
class Program {
 public:
  // Maps `folder`/model.pte and any .ptd files beside it; `lock` keeps them in memory, where the system allows it.
  // Throws Refused, in one line, for what is no program, or none that this runner can run.
  static std::unique_ptr<Program> open(const std::filesystem::path& folder, bool lock);

  const Metadata& metadata() const { return metadata_; }
  // Whether decode draws the token, from the `top_k` largest ones unless that is 0. Prefill always returns logits.
  bool draws() const { return draws_; }
  int64_t top_k() const { return top_k_; }
  // Whether the weights are kept in memory.
  bool locked() const { return locked_; }

  // Takes 1 to max_prefill_chunk tokens, the first of them at `position`. A program that draws does so at
  // `temperature`. Throws std::runtime_error if ExecuTorch fails, or there is no token to draw.
  Next run(const std::vector<int64_t>& tokens, int64_t position, double temperature);

 private:
  Program(const std::filesystem::path& folder, bool lock);

  void read_metadata();
  void check_methods();
  void check_inputs(const std::string& method, int64_t tokens, bool draws);
  // Whether the method returns a token, not logits.
  bool check_output(const std::string& method);
  void check_backends(const std::string& method);
  void check_caches();
  void share_state_of_backends(const std::string& method);
  bool uses(const char* backend, const std::string& method);
  std::vector<int64_t> constants(const std::string& name);
  int64_t constant(const std::string& name, int64_t least, int64_t most);
  [[noreturn]] void refuse(const std::string& why) const;

  std::string path_;
  bool locked_;
  bool single_method_ = false;  // forward(tokens, input_pos), not prefill and decode
  bool draws_ = false;
  int64_t top_k_ = 0;
  Metadata metadata_{};
  executorch::extension::Module module_;
};

}  // namespace gemma4
