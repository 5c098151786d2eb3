#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <iterator>

#include "refused.h"

namespace gemma4 {

const char* const kUsage =
    R"(Usage: gemma4-runner DIR --tokens 2,105,... [options]

Continues the tokens with the exported program in the folder DIR. The new ids go to stdout as they come, with commas
between them; the speed goes to stderr. Exit code 2: the program or the command line was refused; 1: it failed.

  --tokens IDS          The prompt's ids, with commas between them; '-' reads stdin.
  --max-new-tokens N    [default: 256]
  --temperature T       0 is greedy.  [default: 1.0]
  --top-k K             0 turns it off.  [default: 64]
  --top-p P             1 turns it off.  [default: 0.95]
  --seed N              Same seed, same tokens.  [default: a new one each time]
  --bos MODE            A prompt without the beginning-of-sequence token: 'require' refuses it, 'add' adds the
                        token, 'any' takes it as it is.  [default: require]
  --mlock               Keep the weights in memory; without the permission, a note says so.
  --json                After the line of ids a line of JSON on stdout, instead of the speed on stderr.
  --version, --help
)";

namespace {

template <typename T>
std::optional<T> parse_int(const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

template <typename T>
T integer(const std::string& option, const std::string& text, T least) {
  const auto value = parse_int<T>(text);
  if (!value || *value < least) {
    throw Refused(option + " = '" + text + "': must be an integer >= " + std::to_string(least));
  }
  return *value;
}

// strtod, because not every standard library has from_chars for it.
double number(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  return text.empty() || *end != '\0' ? NAN : value;
}

std::vector<int64_t> parse_tokens(std::string text) {
  if (text == "-") text.assign(std::istreambuf_iterator<char>(std::cin), {});
  text.erase(text.find_last_not_of(" \n\r\t") + 1);
  std::vector<int64_t> tokens;
  if (text.empty()) return tokens;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    const auto id = parse_int<int64_t>(item);
    if (!id) throw Refused("--tokens: '" + item.substr(0, 40) + "' is no token id; give ids such as 2,105,9259");
    tokens.push_back(*id);
    begin = end + 1;
  }
  return tokens;
}

Bos parse_bos(const std::string& text) {
  if (text == "require") return Bos::kRequire;
  if (text == "add") return Bos::kAdd;
  if (text == "any") return Bos::kAny;
  throw Refused("--bos = '" + text + "': must be require, add or any");
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options options;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  std::optional<std::string> tokens;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == arguments.size()) throw Refused(name + ": needs a value");
      return arguments[++i];
    };
    if (name == "--help" || name == "-h") {
      options.help = true;
    } else if (name == "--version") {
      options.version = true;
    } else if (name == "--mlock") {
      options.lock = true;
    } else if (name == "--json") {
      options.json = true;
    } else if (name == "--tokens") {
      tokens = value();
    } else if (name == "--max-new-tokens") {
      options.max_new_tokens = integer<int64_t>(name, value(), 1);
    } else if (name == "--temperature") {
      options.temperature = number(value());
      if (!(options.temperature >= 0 && std::isfinite(options.temperature))) {
        throw Refused("--temperature = '" + arguments[i] + "': must be a number >= 0 (0 is greedy)");
      }
    } else if (name == "--top-k") {
      options.top_k = integer<int64_t>(name, value(), 0);
    } else if (name == "--top-p") {
      options.top_p = number(value());
      if (!(*options.top_p > 0 && *options.top_p <= 1)) {
        throw Refused("--top-p = '" + arguments[i] + "': must be in (0, 1] (1 turns it off)");
      }
    } else if (name == "--seed") {
      options.seed = integer<uint64_t>(name, value(), 0);
    } else if (name == "--bos") {
      options.bos = parse_bos(value());
    } else if (name.size() > 1 && name[0] == '-') {
      throw Refused(name + ": no such option; see gemma4-runner --help");
    } else if (options.folder.empty()) {
      options.folder = name;
    } else {
      throw Refused("'" + name + "': there is one folder already, '" + options.folder + "'");
    }
  }
  if (options.help || options.version) return options;
  if (options.folder.empty()) throw Refused("no folder given; see gemma4-runner --help");
  if (!tokens) throw Refused("no --tokens given; see gemma4-runner --help");
  options.tokens = parse_tokens(*tokens);
  return options;
}

}  // namespace gemma4
