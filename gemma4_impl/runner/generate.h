// Generation: the prompt in chunks, then one token after another.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "program.h"
#include "sampler.h"

namespace gemma4 {

struct Generation {
  std::vector<int64_t> tokens;  // the new ones; the last is an end token if there was one
  bool ended = false;           // by an end token
  double prefill_seconds = 0;   // until the first new token was known
  double decode_seconds = 0;    // for all tokens after the first
};

// Throws Refused for a prompt that is empty, longer than the program's context, or has an id outside its vocabulary.
void check_prompt(const Metadata& metadata, const std::vector<int64_t>& prompt);

// At most `max_new_tokens`, which are handed to `on_token` as they come; the context may end it before.
// Throws std::runtime_error as Program::run and Sampler::draw do.
Generation generate(Program& program, const std::vector<int64_t>& prompt, int64_t max_new_tokens,
                    const Sampling& sampling, const std::function<void(int64_t)>& on_token);

}  // namespace gemma4
