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

int64_t draw(const Next& next, Sampler& sampler, int64_t position) {
  try {
    return next.token ? *next.token : sampler.draw(next.logits);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("no token can be drawn for position " + std::to_string(position) + ": " + error.what());
  }
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
      throw Refused("token id " + std::to_string(id) + " is outside the program's vocabulary of " + std::to_string(metadata.vocab_size));
    }
  }
}

Generation generate(Program& program, const std::vector<int64_t>& prompt, int64_t max_new_tokens, Sampler& sampler,
                    const std::function<void(int64_t)>& on_token) {
  const Metadata& metadata = program.metadata();
  const auto begin = Clock::now();
  Next next;
  int64_t position = 0;
  for (const int64_t length = static_cast<int64_t>(prompt.size()); position < length;) {
    const int64_t end = std::min(position + metadata.max_prefill_chunk, length);
    next = program.run({prompt.begin() + position, prompt.begin() + end}, position);
    position = end;
  }

  Generation generation;
  const auto take = [&](int64_t token) {
    generation.tokens.push_back(token);
    generation.ended = std::count(metadata.eos_ids.begin(), metadata.eos_ids.end(), token) > 0;
    on_token(token);
  };
  int64_t token = draw(next, sampler, position);
  const auto first = Clock::now();
  take(token);
  // The last token is not fed back, so it needs no room.
  while (!generation.ended && static_cast<int64_t>(generation.tokens.size()) < max_new_tokens && position < metadata.max_seq_len) {
    next = program.run({token}, position++);
    token = draw(next, sampler, position);
    take(token);
  }
  generation.prefill_seconds = seconds(begin, first);
  generation.decode_seconds = seconds(first, Clock::now());
  return generation;
}

}  // namespace gemma4
