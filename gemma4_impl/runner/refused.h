// What the user gave cannot be run: a line that says why, and exit code 2.
#pragma once

#include <stdexcept>

namespace gemma4 {

class Refused : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace gemma4
