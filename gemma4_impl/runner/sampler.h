// Drawing the next token from logits, as gemma4_impl/model/sampler.py defines it.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

namespace gemma4 {

struct Sampling {
  double temperature = 1.0;  // 0 is greedy
  int64_t top_k = 0;         // 0 turns it off
  double top_p = 1.0;        // 1 turns it off
  std::optional<uint64_t> seed;
};

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);

  // Temperature first, then top-k, then top-p; among equal logits the lower ids stay. -inf is never drawn, +inf always.
  // Throws std::runtime_error for logits with a NaN, or with -inf only: they are no distribution.
  int64_t draw(const std::vector<float>& logits);

 private:
  void keep_largest(const std::vector<float>& logits);

  Sampling sampling_;
  std::mt19937_64 generator_;
  std::vector<int64_t> ids_;     // what the filters left
  std::vector<double> weights_;  // of ids_, not normalized
};

}  // namespace gemma4
