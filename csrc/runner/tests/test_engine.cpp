// The engine on the fake archive: deadlines and what they cut, the pace, what is lost at the end. The order of events is
// the traces' (test_trace.cpp).
#include <map>
#include <memory>
#include <string>

#include "runner/engine.h"
#include "runner/tests/fake_archive.h"
#include "runner/tests/tests.h"
#include "tests/check.h"

namespace flowfast {
namespace {

using Cuts = std::vector<std::pair<int64_t, int64_t>>;

// An engine whose rounds take `seconds` on a clock of its own.
struct Bench {
  explicit Bench(const std::string& name, int64_t slots = 1) : fake_(fake(name)) {
    fake_.slots = slots;
    fake_.in_round = [this] { now += seconds; };
    archive = load_archive(name, {});
    core = std::make_unique<EngineCore>(*archive, EngineSettings{.clock = [this] { return now; }});
  }

  int64_t add(int64_t budget, std::optional<double> deadline = std::nullopt) {
    return core->add_request({.prompt = "a", .budget = budget, .guidance = 1, .deadline = deadline});
  }

  void step(int count = 1) {
    for (int i = 0; i < count; ++i)
      for (Event& event : core->step()) {
        if (auto* result = std::get_if<Result>(&event.what)) results[event.id] = *result, ended[event.id] = now;
        if (auto* failure = std::get_if<Failure>(&event.what)) failures[event.id] = failure->reason;
        if (auto* progress = std::get_if<Progress>(&event.what)) CHECK(progress->candidates.empty());
      }
  }

  Fake& fake_;
  double now = 100, seconds = 1;
  std::unique_ptr<Archive> archive;
  std::unique_ptr<EngineCore> core;
  std::map<int64_t, Result> results;
  std::map<int64_t, double> ended;
  std::map<int64_t, std::string> failures;
};

void a_budget_is_cut_to_the_time_left() {
  Bench bench("a budget is cut");
  bench.add(2);
  bench.step(2);
  const int64_t cut = bench.add(10, 4.5), whole = bench.add(10);
  bench.step(14);
  CHECK(bench.fake_.budgets == std::vector<int64_t>({2, 4, 10}));
  CHECK(bench.results[cut].cuts == Cuts({{0, 4}}) && bench.results[cut].nfe == 4 && bench.results[cut].unspent == 6);
  CHECK(bench.results[whole].cuts.empty() && bench.results[whole].nfe == 10);
  CHECK(bench.results[cut].seconds == 4 && bench.results[whole].seconds_waited == 4);
}

void a_budget_is_never_cut_below_the_least() {
  Bench bench("the least");
  bench.add(2);
  bench.step();
  const int64_t late = bench.add(10, 2.2);  // 1.2 s are left when its turn comes, and 0.2 when it ends
  bench.step(2);
  CHECK(bench.results[late].cuts == Cuts({{0, 1}}) && bench.results[late].nfe == 1 && bench.core->idle());
}

// Rounds of a second become such of three.
void a_running_request_is_cut_when_rounds_slow_down() {
  Bench bench("slow", 2);
  bench.add(8);
  bench.step(8);
  const double begin = bench.now;
  const int64_t hurried = bench.add(20, 20.5), calm = bench.add(20);
  bench.step(2);
  bench.seconds = 3;
  bench.step(18);
  const Result& result = bench.results[hurried];
  CHECK(bench.ended[hurried] - begin <= 20.5 + 3, "%g s", bench.ended[hurried] - begin);
  CHECK(bench.ended[hurried] - begin >= 20.5 - 3, "%g s", bench.ended[hurried] - begin);  // and not cut too far
  CHECK(result.nfe < 20 && result.nfe + result.unspent == 20);
  CHECK(!result.cuts.empty() && result.cuts[0].first >= 3 && result.cuts[0].second < 17);
  for (size_t i = 1; i < result.cuts.size(); ++i)
    CHECK(result.cuts[i].first > result.cuts[i - 1].first && result.cuts[i].second < result.cuts[i - 1].second);
  CHECK(bench.results[calm].nfe == 20 && bench.results[calm].cuts.empty());
}

void it_is_cut_only_where_it_would_be_more_than_a_round_late() {
  Bench bench("a round late");
  const int64_t one = bench.add(5, 4);  // before any pace is known
  bench.step(5);
  const int64_t other = bench.add(5, 10);
  bench.step();
  bench.now += 6;  // 3 s are left for 4 rounds, and then 1.5 s for 3
  bench.step();
  bench.now += 0.5;
  bench.step(3);
  CHECK(bench.results[one].nfe == 5 && bench.results[one].cuts.empty());
  CHECK(bench.results[other].cuts.size() == 1 && bench.results[other].cuts[0].first == 2);
  CHECK(bench.results[other].nfe == 3);
}

void the_pace_is_that_of_the_last_8_rounds() {
  Bench bench("pace", 2);
  bench.add(40);
  bench.step(20);
  bench.seconds = 3;
  bench.step(8);
  const int64_t refused = bench.add(1, 2.9), taken = bench.add(1, 3.1);
  bench.step();
  CHECK(bench.failures[refused] == "deadline" && bench.results.contains(taken));
}

void what_runs_keeps_its_slot() {
  Bench bench("keeps");
  bench.add(10);
  bench.step();
  const int64_t refused = bench.add(1, 9.9), taken = bench.add(1, 10.1);
  bench.step(11);
  CHECK(bench.failures[refused] == "deadline" && bench.results.contains(taken));

  bench.add(10, 100);  // one that can be cut, to a round
  bench.step();
  const int64_t late = bench.add(1, 1.9), behind = bench.add(1, 2.1);
  bench.step();
  CHECK(bench.failures[late] == "deadline" && !bench.failures.contains(behind));
  bench.core->abort(behind);
  bench.step();
  CHECK(bench.failures[behind] == "aborted");
}

void a_request_that_is_lost_at_its_end_fails_alone() {
  Bench bench("lost", 2);
  bench.fake_.lost = {"b"};
  const int64_t lost = bench.core->add_request({.prompt = "b", .budget = 1, .guidance = 1});
  const int64_t other = bench.add(2), next = bench.add(1);
  bench.step(2);
  CHECK(bench.failures[lost] == "model" && bench.failures.size() == 1);
  CHECK(bench.results.contains(other) && bench.results.contains(next));
}

}  // namespace

void test_engine() {
  a_budget_is_cut_to_the_time_left();
  a_budget_is_never_cut_below_the_least();
  a_running_request_is_cut_when_rounds_slow_down();
  it_is_cut_only_where_it_would_be_more_than_a_round_late();
  the_pace_is_that_of_the_last_8_rounds();
  what_runs_keeps_its_slot();
  a_request_that_is_lost_at_its_end_fails_alone();
}

}  // namespace flowfast
