// flowfast-server: images from an archive, over HTTP. README.md beside this file says how to ask it.
#include <charconv>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iostream>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <flowfast/searcher.h>

#include "server.h"

namespace {

constexpr char kUsage[] = R"(usage: flowfast-server ARCHIVE [options]

  --host ADDRESS      an IP address to listen at (127.0.0.1: nobody but this machine)
  --port N            0: one that is free (8080)
  --queue N           searches that may wait for a slot; more are answered 429 (64)
  --quality BUDGETS   NFE of each quality (low=50,medium=200,high=500), as far as the archive goes
  --budget NFE        of requests that name none, nor a quality (as medium)
  --client-seconds N  that a client may take to send a request, or to take an answer (10)
  --threads N         of the model's operations (PyTorch's own number)
  --device NAME       cpu or cuda:0 (cpu)

SIGTERM and SIGINT: answer what was asked, then exit 0
)";

struct Arguments {
  std::string archive;
  std::map<std::string, std::string> given = {{"--host", "127.0.0.1"}, {"--port", "8080"},
                                              {"--queue", "64"},       {"--quality", "low=50,medium=200,high=500"},
                                              {"--budget", "0"},       {"--client-seconds", "10"},
                                              {"--threads", "0"},      {"--device", "cpu"}};

  Arguments(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i];
      if (given.contains(name)) {
        if (i + 1 == argc) throw flowfast::OptionError(name + " needs a value");
        given[name] = argv[++i];
      } else if (name.starts_with("--")) {
        throw flowfast::OptionError("unknown option " + name + "\n" + kUsage);
      } else if (!archive.empty()) {
        throw flowfast::OptionError("expected one archive, got also '" + name + "'");
      } else {
        archive = name;
      }
    }
    if (archive.empty()) throw flowfast::OptionError(std::string("expected an archive\n") + kUsage);
  }

  int number(const std::string& name, int least, int most) const { return number(name, given.at(name), least, most); }

  // low=50,medium=200,high=500
  std::vector<std::pair<std::string, int64_t>> quality() const {
    std::vector<std::pair<std::string, int64_t>> found;
    std::istringstream parts(given.at("--quality"));
    for (std::string part; std::getline(parts, part, ',');) {
      const std::string name = part.substr(0, part.find('='));
      if (part == name || (name != "low" && name != "medium" && name != "high"))
        throw flowfast::OptionError("--quality must name budgets of low, medium, high: low=50,medium=200, got '" +
                                    part + "'");
      found.emplace_back(name, number("--quality", part.substr(name.size() + 1), 1, std::numeric_limits<int>::max()));
    }
    if (found.empty()) throw flowfast::OptionError("--quality must name a budget, low=50, got none");
    return found;
  }

 private:
  static int number(const std::string& name, const std::string& text, int least, int most) {
    int value = -1;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
      throw flowfast::OptionError(name + " must be a whole number from " + std::to_string(least) + " to " +
                                  std::to_string(most) + ", got '" + text + "'");
    return value;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--help") {
    std::cout << kUsage;
    return 0;
  }
  try {
    const Arguments arguments(argc, argv);
    const Settings settings{
        .host = arguments.given.at("--host"),
        .port = static_cast<uint16_t>(arguments.number("--port", 0, 65535)),
        .queue = arguments.number("--queue", 0, 1000),
        .quality = arguments.quality(),
        .budget = arguments.number("--budget", 0, std::numeric_limits<int>::max()),
        .client_seconds = std::chrono::seconds(arguments.number("--client-seconds", 1, 3600)),
    };
    flowfast::Searcher searcher(arguments.archive, {.threads = arguments.number("--threads", 0, 4096),
                                                    .device = arguments.given.at("--device")});
    Server server(searcher, settings);
    std::cout << arguments.archive << " at " << server.address() << std::endl;
    server.run();
    return 0;
  } catch (const flowfast::Error& error) {
    std::cerr << "flowfast-server: " << error.what() << std::endl;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "flowfast-server: " << error.what() << std::endl;
    return 1;
  }
}
