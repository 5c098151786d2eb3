#include "generate.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "refused.h"

namespace gemma4 {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

}  // namespace

void check_prompt(const Metadata& metadata, const std::vector<int64_t>& prompt) {
  if (prompt.empty()) throw Refused("the prompt is empty");
  const int64_t length = static_cast<int64_t>(prompt.size());
  if (length > metadata.max_seq_len) {
    throw Refused("the prompt has " + std::to_string(length) + " tokens but the program's context holds " +
                  std::to_string(metadata.max_seq_len) + "; shorten it, or export with a larger --max-seq-len");
  }
  for (int64_t id : prompt) {
    if (id < 0 || id >= metadata.vocab_size) {
      throw Refused("token id " + std::to_string(id) + " is outside the program's vocabulary of " +
                    std::to_string(metadata.vocab_size));
    }
  }
}

Generation generate(Program& program, const std::vector<int64_t>& prompt, int64_t max_new_tokens,
                    const Sampling& sampling, const std::function<void(int64_t)>& on_token) {
  const Metadata& metadata = program.metadata();
  Sampler sampler(sampling);
  Generation generation;
  int64_t position = 0;
  const auto step = [&](const std::vector<int64_t>& tokens) {
    Next next = program.run(tokens, position, sampling.temperature);
    position += static_cast<int64_t>(tokens.size());
    return next;
  };
  const auto take = [&](const Next& next) {
    const int64_t token = next.token ? *next.token : sampler.draw(next.logits);
    generation.tokens.push_back(token);
    generation.ended = std::count(metadata.eos_ids.begin(), metadata.eos_ids.end(), token) > 0;
    on_token(token);
  };
  try {
    const auto begin = Clock::now();
    Next next;
    for (const int64_t length = static_cast<int64_t>(prompt.size()); position < length;) {
      const int64_t end = std::min(position + metadata.max_prefill_chunk, length);
      next = step({prompt.begin() + position, prompt.begin() + end});
    }
    take(next);
    const auto first = Clock::now();
    // The last token is not fed back, so it needs no room.
    while (!generation.ended && static_cast<int64_t>(generation.tokens.size()) < max_new_tokens &&
           position < metadata.max_seq_len) {
      take(step({generation.tokens.back()}));
    }
    generation.prefill_seconds = seconds(begin, first);
    generation.decode_seconds = seconds(first, Clock::now());
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("no next token after " + std::to_string(generation.tokens.size()) +
                             " new ones: " + error.what());
  }
  return generation;
}

}  // namespace gemma4
