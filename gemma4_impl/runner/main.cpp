// gemma4-runner: continues token ids with an exported Gemma 4 program. See options.cpp for its command line.
#include <executorch/runtime/backend/interface.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <stdexcept>

#include "generate.h"
#include "log.h"
#include "options.h"
#include "refused.h"

namespace {

using gemma4::Bos;
using gemma4::Generation;
using gemma4::Options;
using gemma4::Program;
using gemma4::Refused;
using gemma4::Sampling;

void print_version() {
  std::printf("gemma4-runner for ExecuTorch %s; backends:", GEMMA4_EXECUTORCH_VERSION);
  for (size_t i = 0; i < executorch::runtime::get_num_registered_backends(); ++i) {
    const auto name = executorch::runtime::get_backend_name(i);
    if (name.ok()) std::printf(" %s", *name);
  }
  std::printf("\n");
}

std::vector<int64_t> with_bos(std::vector<int64_t> tokens, int64_t bos_id, Bos bos) {
  const bool absent = tokens.empty() || tokens[0] != bos_id;
  if (bos == Bos::kAny || !absent) return tokens;
  if (bos == Bos::kRequire) {
    throw Refused("the prompt does not begin with the beginning-of-sequence token " + std::to_string(bos_id) +
                  "; give --bos add, or --bos any to do without");
  }
  tokens.insert(tokens.begin(), bos_id);
  return tokens;
}

Sampling sampling_for(const Program& program, const Options& options) {
  if (!program.draws())
    return {options.temperature, options.top_k.value_or(64), options.top_p.value_or(0.95), options.seed};
  // Prefill returns logits, so the first token is drawn here, with what the program has built in.
  if (options.top_k.value_or(program.top_k()) != program.top_k() || options.top_p.value_or(1) != 1 || options.seed) {
    throw Refused("the program draws its tokens by itself, with top-k " + std::to_string(program.top_k()) +
                  " (0 is off): it takes no other --top-k, no --top-p and no --seed");
  }
  return {options.temperature, program.top_k(), 1.0, std::nullopt};
}

double rate(double amount, double seconds) { return seconds > 0 ? amount / seconds : 0; }

void print_speed(size_t prompt, const Generation& generation, double load_seconds) {
  const size_t decoded = generation.tokens.size() - 1;
  std::fprintf(
      stderr,
      "loaded in %.2f s; first token after %.3f s (%zu tokens, %.1f tokens/s); then %zu tokens, %.1f tokens/s\n",
      load_seconds, generation.prefill_seconds, prompt, rate(prompt, generation.prefill_seconds), decoded,
      rate(decoded, generation.decode_seconds));
}

void print_json(size_t prompt, const Generation& generation, double load_seconds, bool locked) {
  std::printf(
      "{\"prompt_tokens\": %zu, \"new_tokens\": %zu, \"stop_reason\": \"%s\", \"load_seconds\": %.9g, "
      "\"prefill_seconds\": %.9g, \"decode_seconds\": %.9g, \"locked\": %s}\n",
      prompt, generation.tokens.size(), generation.ended ? "eos" : "length", load_seconds, generation.prefill_seconds,
      generation.decode_seconds, locked ? "true" : "false");
}

void run(const Options& options) {
  const auto begin = std::chrono::steady_clock::now();
  const auto program = Program::open(options.folder, options.lock);
  const double load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (options.lock && !program->locked()) {
    std::fprintf(stderr,
                 "gemma4-runner: note: the system does not let the weights be locked in memory (see ulimit -l)\n");
  }
  const Sampling sampling = sampling_for(*program, options);
  const auto prompt = with_bos(options.tokens, program->metadata().bos_id, options.bos);
  gemma4::check_prompt(program->metadata(), prompt);

  const char* separator = "";
  Generation generation;
  try {
    generation = gemma4::generate(*program, prompt, options.max_new_tokens, sampling, [&](int64_t token) {
      std::cout << separator << token << std::flush;
      separator = ",";
    });
  } catch (...) {
    if (*separator) std::cout << std::endl;
    throw;
  }
  std::cout << std::endl;
  if (options.json) {
    print_json(prompt.size(), generation, load_seconds, program->locked());
  } else {
    print_speed(prompt.size(), generation, load_seconds);
  }
}

int fail(const std::exception& error, int code) {
  std::fprintf(stderr, "gemma4-runner: error: %s\n", error.what());
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  gemma4::capture_log();
  try {
    const Options options = gemma4::parse_options(argc, argv);
    if (options.help) {
      std::cout << gemma4::kUsage;
    } else if (options.version) {
      print_version();
    } else {
      run(options);
    }
  } catch (const Refused& error) {
    return fail(error, 2);
  } catch (const std::bad_alloc&) {
    return fail(std::runtime_error("not enough memory for the program"), 1);
  } catch (const std::exception& error) {
    return fail(error, 1);
  }
  return 0;
}
