// ExecuTorch's log, of which only the first error since the last call is kept: it is the reason of a failure.
#pragma once

#include <string>

namespace gemma4 {

// Takes the log over, and prints all of it to stderr if GEMMA4_DEBUG is set.
void capture_log();

// Forgets what was kept.
void clear_log();

// The first error since `clear_log`, on one line; empty if there was none.
std::string first_error();

}  // namespace gemma4
