// The command line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace gemma4 {

// What to do about the beginning-of-sequence token, without which the model says nothing sensible.
enum class Bos { kRequire, kAdd, kAny };

struct Options {
  std::string folder;
  std::vector<int64_t> tokens;
  int64_t max_new_tokens = 256;
  double temperature = 1.0;
  // Unset: 64 and 0.95, or what a program that draws has built in.
  std::optional<int64_t> top_k;
  std::optional<double> top_p;
  std::optional<uint64_t> seed;
  Bos bos = Bos::kRequire;
  bool lock = false;
  bool json = false;
  bool help = false;
  bool version = false;
};

extern const char* const kUsage;

// Throws Refused, naming the option.
Options parse_options(int argc, char** argv);

}  // namespace gemma4
