#include "log.h"

#include <executorch/runtime/platform/platform.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace gemma4 {
namespace {

// Worker threads log too.
std::mutex mutex;
std::string kept;

void take(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line, const char* message,
          size_t length) {
  if (std::getenv("GEMMA4_DEBUG")) std::fprintf(stderr, "%c %s:%zu %s\n", level, file, line, message);
  std::lock_guard<std::mutex> guard(mutex);
  if ((level == kError || level == kFatal) && kept.empty()) {
    for (char c : std::string(message, length)) kept += c == '\n' ? ' ' : c;
  }
}

// The runtime aborts on a broken invariant; the user gets a line all the same.
void give_up() {
  std::fprintf(stderr, "gemma4-runner: error: ExecuTorch gave up: %s\n", first_error().c_str());
  std::_Exit(1);
}

}  // namespace

void capture_log() {
  executorch::runtime::pal_init();
  executorch::runtime::PalImpl pal = executorch::runtime::PalImpl::create(take, __FILE__);
  pal.abort = give_up;
  executorch::runtime::register_pal(pal);
}

void clear_log() {
  std::lock_guard<std::mutex> guard(mutex);
  kept.clear();
}

std::string first_error() {
  std::lock_guard<std::mutex> guard(mutex);
  return kept;
}

}  // namespace gemma4
