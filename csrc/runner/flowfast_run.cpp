// flowfast-run: searches with an archive, from the command line.
#include <algorithm>
#include <chrono>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "runner/blake2b.h"
#include "runner/prompts.h"
#include "runner/searcher.h"
#include "runner/text.h"

namespace flowfast {
namespace {

constexpr char kUsage[] = R"(usage: flowfast-run ARCHIVE --prompt TEXT --budget NFE [options]

  --prompt TEXT           may be given several times
  --prompts LIST          .txt, .jsonl, .ndjson, .json, .csv, .tsv, a folder of .txt, or - for standard input; may be
                          given several times. A prompt's own seed takes the place of --seed
  --prompt-column NAME    of tables and objects (prompt, else caption, text, or the only one)
  --budget NFE            rows through the model, for each prompt
  --seed N                of the noise (0): any whole number
  --repeat N              another noise for the same seed and prompt (0)
  --guidance X            classifier-free guidance (the archive's); up to 1 is off
  --negative-prompt TEXT  (the archive's)
  --until REWARD          stop a search early at this reward
  --threads N             of the model's operations (PyTorch's own number)
  --device NAME           cpu or cuda:0 (cpu)
  --png FILE              the best image; FILE-0, FILE-1, ... for several prompts
  --json                  a line of JSON for each prompt on stdout
  --progress              a line for each round on stderr
  --info                  the archive's manifest as JSON, and nothing else

exit code: 0, 2 where flowfast refuses (archive, option, prompt, budget, reward, model), 1 for anything else
)";

const std::set<std::string> kFlags = {"--json", "--progress", "--info"};
const std::set<std::string> kValues = {"--prompt", "--prompts", "--prompt-column", "--budget",
                                       "--seed",   "--repeat",  "--guidance",      "--negative-prompt",
                                       "--until",  "--threads", "--device",        "--png"};

struct Arguments {
  std::string archive;
  std::vector<Listed> prompts;
  std::vector<std::string> lists;
  std::map<std::string, std::string> given;  // every other option

  bool has(const std::string& name) const { return given.contains(name); }

  template <class Number>
  Number number(const std::string& name, Number otherwise) const {
    if (!has(name)) return otherwise;
    const std::optional<Number> value = number_in<Number>(given.at(name));
    if (!value) throw OptionError(name + " must be a number, got '" + given.at(name) + "'");
    return *value;
  }
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (!name.starts_with("--")) {
      if (!arguments.archive.empty()) throw OptionError("expected one archive, got also '" + name + "'");
      arguments.archive = name;
    } else if (kFlags.contains(name)) {
      arguments.given[name] = "";
    } else if (kValues.contains(name)) {
      if (i + 1 == argc) throw OptionError(name + " needs a value");
      const std::string value = argv[++i];
      if (name == "--prompt")
        arguments.prompts.push_back({value});
      else if (name == "--prompts")
        arguments.lists.push_back(value);
      else
        arguments.given[name] = value;
    } else {
      std::string valid;
      for (const auto& names : {kValues, kFlags})
        for (const std::string& each : names) valid += (valid.empty() ? "" : ", ") + each;
      throw OptionError("unknown option " + name + ": choose of " + valid);
    }
  }
  if (arguments.archive.empty())
    throw OptionError("expected an archive: flowfast-run ARCHIVE --prompt TEXT --budget NFE");
  return arguments;
}

void complete(Arguments& arguments) {
  std::optional<std::string> column;
  if (arguments.has("--prompt-column")) column = arguments.given["--prompt-column"];
  for (const std::string& list : arguments.lists)
    for (Listed& listed : read_prompts(list, column)) arguments.prompts.push_back(std::move(listed));
  if (arguments.prompts.empty()) throw OptionError("expected a prompt: give --prompt TEXT or --prompts LIST");
  if (!arguments.has("--budget")) throw OptionError("expected --budget NFE");
  if (!arguments.has("--png")) return;
  const std::filesystem::path folder = std::filesystem::path(arguments.given["--png"]).parent_path();
  std::error_code no_matter;
  if (!folder.empty() && !std::filesystem::is_directory(folder, no_matter))
    throw OptionError("--png: there is no folder " + folder.string());
}

std::string json(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    char code[8];
    std::snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned char>(c));
    if (c == '"' || c == '\\')
      out += std::string("\\") + c;
    else
      out += static_cast<unsigned char>(c) < 0x20 ? code : std::string(1, c);
  }
  return out + '"';
}

std::string json(double number) {  // which knows no infinity and no NaN: as flowfast/files.py writes them
  return std::isnan(number) ? "null" : std::isinf(number) ? json(text_of(number)) : text_of(number);
}

std::string json(const std::string& prompt, const Result& result, double load_seconds) {
  std::string path;
  for (const Step& step : result.path())
    path += (path.empty() ? "[" : ", [") + std::to_string(step.chain) + ", " + std::to_string(step.transition) + ", " +
            std::to_string(step.candidate) + "]";
  const Image& image = result.image();
  Blake2b hash(32);
  hash.update({reinterpret_cast<const char*>(image.pixels.data()), image.pixels.size() * sizeof(float)});
  std::string line = "{\"prompt\": " + json(prompt) + ", \"reward\": " + json(result.reward());
  for (const auto& [name, value] : {std::pair("nfe", result.nfe),
                                    {"nfe_speculative", result.nfe_speculative},
                                    {"reward_calls", result.reward_calls},
                                    {"nan_rewards", result.nan_rewards},
                                    {"unspent", result.unspent},
                                    {"key", result.key}})
    line += std::string(", \"") + name + "\": " + std::to_string(value);
  return line + ", \"path\": [" + path + "], \"image\": {\"height\": " + std::to_string(image.height) +
         ", \"width\": " + std::to_string(image.width) + ", \"blake2b\": \"" + hexadecimal(hash.digest()) +
         "\"}, \"seconds\": {\"load\": " + json(load_seconds) + ", \"waited\": " + json(result.seconds_waited) +
         ", \"search\": " + json(result.seconds) + "}}";
}

void write_png(const Image& image, std::string file, size_t number, size_t count) {
  if (count > 1) {
    const size_t dot = file.rfind(".png");
    file.insert(dot == std::string::npos ? file.size() : dot, std::to_string(number).insert(0, 1, '-'));
  }
  const std::string part = file + ".part";  // nothing half-written stays under the name
  std::ofstream out(part, std::ios::binary);
  out << image.png();
  out.close();
  if (!out || std::rename(part.c_str(), file.c_str()) != 0) {
    std::remove(part.c_str());
    throw OptionError("cannot write " + file + ": " + std::strerror(errno));
  }
}

OnProgress printer(const std::string& prompt) {
  return [prompt, best = -INFINITY](const Progress& progress) mutable {
    for (const Candidate& candidate : progress.candidates) best = std::max(best, candidate.reward);
    std::fprintf(stderr, "%s: %lld of %lld NFE, best reward so far %.4f\n", prompt.c_str(),
                 static_cast<long long>(progress.nfe), static_cast<long long>(progress.budget), best);
  };
}

int run(Arguments arguments) {
  const auto start = std::chrono::steady_clock::now();
  if (!arguments.has("--info")) complete(arguments);
  Searcher searcher(arguments.archive, {.threads = arguments.number("--threads", 0),
                                        .device = arguments.has("--device") ? arguments.given["--device"] : "cpu"});
  const double load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (arguments.has("--info")) {
    std::string entries;
    for (const auto& [name, value] : searcher.info())
      entries += (entries.empty() ? "" : ", ") + json(name) + ": " + json(value);
    std::cout << "{" << entries << "}\n";
    return 0;
  }
  Request request{.budget = arguments.number<int64_t>("--budget", 0),
                  .seed = arguments.has("--seed") ? Seed(arguments.given["--seed"]) : Seed(),
                  .repeat = arguments.number<int64_t>("--repeat", 0)};
  if (arguments.has("--guidance")) request.guidance = arguments.number("--guidance", 1.0);
  if (arguments.has("--negative-prompt")) request.negative_prompt = arguments.given["--negative-prompt"];
  request.until = arguments.number("--until", request.until);

  std::vector<std::optional<Handle>> handles;
  const Seed seed = request.seed;
  for (const auto& [prompt, own] : arguments.prompts) {
    request.prompt = prompt, request.seed = own.value_or(seed);
    handles.push_back(searcher.submit(request, arguments.has("--progress") ? printer(prompt) : OnProgress()));
  }
  for (size_t i = 0; i < handles.size(); ++i) {
    const std::string& prompt = arguments.prompts[i].prompt;
    const Result result = std::exchange(handles[i], std::nullopt)->get();  // and lets go of it
    if (arguments.has("--json"))
      std::cout << json(prompt, result, load_seconds) << std::endl;
    else
      std::printf("%s: reward %.4f after %lld NFE in %.2f s\n", prompt.c_str(), result.reward(),
                  static_cast<long long>(result.nfe), result.seconds);
    if (arguments.has("--png")) write_png(result.image(), arguments.given["--png"], i, handles.size());
  }
  return 0;
}

}  // namespace
}  // namespace flowfast

int main(int argc, char** argv) {
  if (argc == 2 && (std::string(argv[1]) == "--help" || std::string(argv[1]) == "-h")) {
    std::fputs(flowfast::kUsage, stdout);
    return 0;
  }
  try {
    return flowfast::run(flowfast::parse(argc, argv));
  } catch (const flowfast::Error& error) {
    std::string said = error.what();
    std::replace(said.begin(), said.end(), '\n', ' ');  // of a prompt
    std::fprintf(stderr, "flowfast-run: %s\n", said.c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "flowfast-run: unexpected: %s\n", error.what());
    return 1;
  }
}
