// Replays tests/engine/traces.json, the traces that the engines in C++ and in Python share, on the fake archive:
//
//   [{"name", "slots", "most_waiting" (null: any), "seconds": what a round takes on the clock, which starts at 0,
//     "do": [{"add": {"id", "rounds", "priority", "deadline" (null: none),
//                     "fails": null, "admit", {"model": r} or {"reward": r}, r its own round, from 1 on}},
//            {"step": how many}, {"abort": id}, {"wait": seconds}],
//     "events": [[id, "progress"], [id, "finished"], [id, "failed", reason], ...]}]: of all steps, in their order
//
// A request takes its rounds, one lane each, and is never cut; the smallest budget is one round. Which one fails in a
// round is said to the host's reward by the image, which is as bright as its request has rounds behind it.
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "runner/engine.h"
#include "runner/json.h"
#include "runner/text.h"
#include "runner/tests/fake_archive.h"
#include "runner/tests/tests.h"
#include "tests/check.h"

namespace flowfast {
namespace {

const Json& of(const Json& object, std::string_view name) {
  const Json* found = object.find(name);
  if (!found) throw std::runtime_error("a trace has no " + std::string(name));
  return *found;
}

double number_of(const Json& value) { return number_in<double>(value.text).value(); }
int64_t whole_of(const Json& value) { return number_in<int64_t>(value.text).value(); }

template <class Number>
std::optional<Number> maybe(const Json& value) {
  return value.kind == Json::kNull ? std::nullopt : number_in<Number>(value.text);
}

class Replay {
 public:
  explicit Replay(const Json& trace) : trace_(trace), name_("trace: " + of(trace, "name").text), fake_(fake(name_)) {
    fake_.slots = whole_of(of(trace, "slots"));
    fake_.cuts = false;
    fake_.in_round = [this] { now_ += number_of(of(trace_, "seconds")); };
  }

  std::string events() {
    for (const Json& each : of(trace_, "do").entries)
      if (const Json* wanted = each.find("add")) read(*wanted);
    const std::unique_ptr<Archive> archive = load_archive(name_, {});
    EngineCore core(*archive, {.reward = guilty_.empty() ? HostReward() : reward(),
                               .most_waiting = maybe<int64_t>(of(trace_, "most_waiting")),
                               .clock = [this] { return now_; }});
    for (const Json& each : of(trace_, "do").entries) {
      const auto& [what, value] = each.members.at(0);
      if (what == "add")
        add(core, value);
      else if (what == "abort")
        core.abort(numbers_.at(value.text));
      else if (what == "wait")
        now_ += number_of(value);
      else
        for (int64_t i = 0; i < whole_of(value); ++i) tell(core.step());
    }
    return told_;
  }

 private:
  void read(const Json& wanted) {
    const Json& fails = of(wanted, "fails");
    if (fails.kind == Json::kText) fake_.unreadable.insert(of(wanted, "id").text);
    if (const Json* at = fails.find("model")) fake_.failing[of(wanted, "id").text] = whole_of(*at);
    if (const Json* at = fails.find("reward")) guilty_[of(wanted, "id").text] = whole_of(*at);
  }

  void add(EngineCore& core, const Json& wanted) {
    const std::string& id = of(wanted, "id").text;
    numbers_[id] = core.add_request({.prompt = id,
                                     .budget = whole_of(of(wanted, "rounds")),
                                     .guidance = 1,
                                     .priority = static_cast<int>(whole_of(of(wanted, "priority"))),
                                     .deadline = maybe<double>(of(wanted, "deadline"))});
    ids_[numbers_[id]] = id;
  }

  HostReward reward() const {
    return [this](auto images, auto prompts, auto) {
      for (size_t i = 0; i < images.size(); ++i)
        if (const auto at = guilty_.find(prompts[i]); at != guilty_.end())
          if (images[i].pixels[0] + 1 == static_cast<float>(at->second)) throw std::runtime_error("guilty");
      return std::vector<float>(images.size(), 1.0f);
    };
  }

  void tell(const std::vector<Event>& events) {
    for (const Event& event : events) {
      told_ += ids_.at(event.id) + " ";
      if (const auto* failure = std::get_if<Failure>(&event.what))
        told_ += "failed " + failure->reason + "\n";
      else
        told_ += std::holds_alternative<Progress>(event.what) ? "progress\n" : "finished\n";
    }
  }

  const Json& trace_;
  const std::string name_;
  Fake& fake_;
  double now_ = 0;
  std::map<std::string, int64_t> guilty_, numbers_;
  std::map<int64_t, std::string> ids_;
  std::string told_;
};

std::string expected(const Json& trace) {
  std::string lines;
  for (const Json& event : of(trace, "events").entries) {
    for (const Json& word : event.entries) lines += (&word == &event.entries[0] ? "" : " ") + word.text;
    lines += '\n';
  }
  return lines;
}

}  // namespace

void test_trace(const char* file) {
  std::ifstream in(file);
  std::ostringstream text;
  text << in.rdbuf();
  CHECK(in, "cannot read %s", file);
  const Json traces = parse_json(text.str());
  CHECK(traces.entries.size() >= 15);
  for (const Json& trace : traces.entries) {
    const std::string told = Replay(trace).events(), wanted = expected(trace);
    CHECK(told == wanted, "%s: expected\n%sgot\n%s", of(trace, "name").text.c_str(), wanted.c_str(), told.c_str());
  }
}

}  // namespace flowfast
