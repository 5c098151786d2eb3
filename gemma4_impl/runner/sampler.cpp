#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace gemma4 {

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling) {
  std::random_device device;
  generator_.seed(sampling.seed.value_or((uint64_t{device()} << 32) | device()));
}

int64_t Sampler::draw(const std::vector<float>& logits) {
  for (float logit : logits) {
    if (std::isnan(logit)) throw std::runtime_error("the logits are NaN");
  }
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (largest == logits.end() || *largest == -INFINITY) throw std::runtime_error("all logits are -inf");
  if (sampling_.temperature == 0 || *largest == INFINITY) return largest - logits.begin();

  keep_largest(logits);
  weights_.resize(ids_.size());
  for (size_t i = 0; i < ids_.size(); ++i) {
    weights_[i] = std::exp((double{logits[ids_[i]]} - *largest) / sampling_.temperature);
  }
  if (sampling_.top_p < 1) {
    // The fewest ids, from the largest on, whose probability reaches p.
    const double enough = sampling_.top_p * std::accumulate(weights_.begin(), weights_.end(), 0.0);
    size_t count = 1;
    for (double sum = weights_[0]; sum < enough && count < weights_.size(); ++count) sum += weights_[count];
    weights_.resize(count);
  }

  // The inverse of the cumulative distribution, at a uniform number of 53 bits in [0, 1).
  const double uniform = static_cast<double>(generator_() >> 11) * 0x1p-53;
  double left = uniform * std::accumulate(weights_.begin(), weights_.end(), 0.0);
  size_t last = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] == 0) continue;
    last = i;
    if ((left -= weights_[i]) < 0) break;
  }
  return ids_[last];
}

// Sets ids_ to the top_k largest logits; in descending order if a filter needs one.
void Sampler::keep_largest(const std::vector<float>& logits) {
  ids_.resize(logits.size());
  std::iota(ids_.begin(), ids_.end(), 0);
  const bool cut = sampling_.top_k > 0 && sampling_.top_k < static_cast<int64_t>(ids_.size());
  if (!cut && sampling_.top_p == 1) return;
  const auto before = [&](int64_t a, int64_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  const auto end = cut ? ids_.begin() + sampling_.top_k : ids_.end();
  std::partial_sort(ids_.begin(), end, ids_.end(), before);
  ids_.erase(end, ids_.end());
}

}  // namespace gemma4
