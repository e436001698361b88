// The driver on the fake archive: who gets a slot when, cancelling, errors, callbacks, ends, many threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <thread>

#include "runner/searcher.h"
#include "runner/tests/fake_archive.h"
#include "runner/tests/tests.h"
#include "tests/check.h"

namespace flowfast {
namespace {

constexpr int64_t kForever = 1'000'000'000;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

using Prompts = std::vector<std::string>;

// What get() throws, by its type's place in this list; "" where it returns.
std::string error_of(const Handle& handle) {
  try {
    handle.get();
    return "";
  } catch (const CancelledError&) {
    return "cancelled";
  } catch (const PromptError&) {
    return "prompt";
  } catch (const ModelError&) {
    return "model";
  } catch (const RewardError&) {
    return "reward";
  } catch (const QueueFullError&) {
    return "full";
  } catch (const DeadlineError&) {
    return "deadline";
  }
}

template <class E>
bool refused(Searcher& searcher, const Request& request) {
  try {
    searcher.submit(request);
    return false;
  } catch (const E&) {
    return true;
  }
}

void more_requests_than_slots() {
  Fake& archive = fake("more requests than slots");
  archive.hold();
  Searcher searcher("more requests than slots");
  std::vector<Handle> handles;
  std::vector<Result> results;
  for (int i = 0; i < 7; ++i) {
    handles.push_back(searcher.submit({.prompt = std::to_string(i), .budget = i + 1, .seed = i}));
    archive.wait_for_round();  // the first round has one request
  }
  archive.let_go();
  for (const Handle& handle : handles) results.push_back(handle.get());
  for (int i = 0; i < 7; ++i) {
    CHECK(results[i].nfe == i + 1 && results[i].unspent == 0, "request %d", i);
    CHECK(results[i].path() == std::vector<Step>({{0, i, 0}}), "request %d", i);
    CHECK(results[i].image().pixels == std::vector<float>({i + 1.0f}), "request %d", i);
    CHECK(results[i].reward() == 7.0f && results[i].seconds >= 0 && results[i].seconds_waited >= 0);
  }
  CHECK(results[0].key != results[1].key);
  // A slot is empty only in the first round and at the end, when none waits.
  const Prompts alone({"6"});
  const std::vector<Prompts> expected = {{"0"},      {"1", "2"}, {"1", "2"}, {"3", "2"}, {"3", "4"}, {"3", "4"},
                                         {"3", "4"}, {"5", "4"}, {"5", "4"}, {"5", "6"}, {"5", "6"}, {"5", "6"},
                                         {"5", "6"}, alone,      alone,      alone};
  CHECK(archive.rounds == expected);
  CHECK(searcher.running() == 0 && searcher.waiting() == 0);
}

void a_request_moves_into_a_free_slot() {
  Fake& archive = fake("a free slot");
  archive.hold();
  Searcher searcher("a free slot");
  const Handle a = searcher.submit({.prompt = "a", .budget = 2});
  CHECK(archive.wait_for_round() == Prompts({"a"}));
  const Handle b = searcher.submit({.prompt = "b", .budget = 3});
  const Handle c = searcher.submit({.prompt = "c", .budget = 1});
  CHECK(searcher.running() == 1 && searcher.waiting() == 2);
  archive.next_round();
  CHECK(archive.wait_for_round() == Prompts({"a", "b"}));  // the last round of a
  archive.next_round();
  CHECK(archive.wait_for_round() == Prompts({"c", "b"}));
  CHECK(a.wait_for(std::chrono::milliseconds(0)) && !b.wait_for(std::chrono::milliseconds(0)));
  archive.let_go();
  CHECK(error_of(a).empty() && error_of(b).empty() && error_of(c).empty());
}

void a_cancelled_request_is_out_before_the_next_call() {
  Fake& archive = fake("cancel");
  archive.hold();
  Searcher searcher("cancel");
  const Handle a = searcher.submit({.prompt = "a", .budget = kForever});
  archive.wait_for_round();
  const Handle b = searcher.submit({.prompt = "b", .budget = 2});
  const Handle c = searcher.submit({.prompt = "c", .budget = 2});
  const Handle d = searcher.submit({.prompt = "d", .budget = 2});
  a.cancel();
  c.cancel();
  archive.next_round();
  CHECK(archive.wait_for_round() == Prompts({"b", "d"}));
  archive.let_go();
  CHECK(error_of(a) == "cancelled" && error_of(c) == "cancelled");
  CHECK(error_of(b).empty() && error_of(d).empty());
  a.cancel();  // too late, and no harm
  CHECK(error_of(a) == "cancelled");
}

// 66 characters of two bytes after one of one byte: the 100th byte is the first half of a character.
void a_long_prompt_is_cut_between_characters() {
  std::string prompt = "a", cut = "\"a";
  for (int i = 0; i < 66; ++i) prompt += "\u00e4";
  for (int i = 0; i < 49; ++i) cut += "\u00e4";
  fake("long").hold();
  Searcher searcher("long");
  const Handle handle = searcher.submit({.prompt = prompt, .budget = kForever});
  handle.cancel();
  fake("long").let_go();
  try {
    handle.get();
  } catch (const CancelledError& error) {
    CHECK(std::string(error.what()).find(cut + "...\"") != std::string::npos, "%s", error.what());
    return;
  }
  CHECK(false, "it was not cancelled");
}

void an_error_is_of_its_request() {
  fake("errors").failing = {{"fails", 1}};
  Searcher searcher("errors");
  const Handle unreadable = searcher.submit({.prompt = "unreadable", .budget = 1});
  CHECK(error_of(unreadable) == "prompt");
  CHECK(error_of(searcher.submit({.prompt = "only NaN", .budget = 1})) == "model");
  CHECK(error_of(searcher.submit({.prompt = "fails", .budget = 1})) == "model");
  CHECK(error_of(searcher.submit({.prompt = "good", .budget = 1})).empty());
  try {
    searcher.search({{.prompt = "unreadable", .budget = 1}, {.prompt = "good", .budget = kForever}});
    CHECK(false, "search returned though a prompt cannot be read");
  } catch (const PromptError&) {
  }
  CHECK(searcher.search({{.prompt = "good", .budget = 1}, {.prompt = "good", .budget = 2}})[1].nfe == 2);
  CHECK(refused<BudgetError>(searcher, {.prompt = "a", .budget = 0}));
  CHECK(refused<BudgetError>(searcher, {.prompt = "a", .budget = kForever + 1}));
  CHECK(refused<OptionError>(searcher, {.prompt = "a", .budget = 1, .until = kNaN}));
  CHECK(refused<OptionError>(searcher, {.prompt = "a", .budget = 1, .repeat = -1}));
  for (const std::string& prompt : Prompts{"", " \u3000\n", "caf\xe9", std::string("a\0b", 3)})
    CHECK(refused<PromptError>(searcher, {.prompt = prompt, .budget = 1}));
  CHECK(refused<PromptError>(searcher, {.prompt = "a", .budget = 1, .negative_prompt = "\xff"}));
  try {
    Searcher missing("");
    CHECK(false, "a missing archive was loaded");
  } catch (const Error&) {
  }
}

void the_queue_is_bounded() {
  Fake& archive = fake("bounded");
  archive.hold();
  Searcher searcher("bounded", {.most_waiting = 1});
  std::vector<Handle> handles;
  for (int i = 0; i < 3; ++i) handles.push_back(searcher.submit({.prompt = "a", .budget = 2}));
  archive.wait_for_round();
  const Handle full = searcher.submit({.prompt = "b", .budget = 1});
  CHECK(full.wait_for(std::chrono::milliseconds(0)) && error_of(full) == "full");  // while the round still runs
  CHECK(searcher.running() + searcher.waiting() == 3);
  archive.let_go();
  for (const Handle& handle : handles) CHECK(error_of(handle).empty());
  CHECK(error_of(searcher.submit({.prompt = "c", .budget = 1})).empty());
  try {
    Searcher unbounded("unbounded", {.most_waiting = -1});
    CHECK(false, "most_waiting may be -1");
  } catch (const OptionError&) {
  }
}

void a_lower_priority_is_earlier_and_a_deadline_ends_the_waiting() {
  Fake& archive = fake("priorities");
  archive.slots = 1;
  archive.hold();
  Searcher searcher("priorities");
  const Handle a = searcher.submit({.prompt = "a", .budget = 1});
  archive.wait_for_round();
  const Handle late = searcher.submit({.prompt = "late", .budget = 1, .deadline = 1e-3});
  const Handle b = searcher.submit({.prompt = "b", .budget = 1, .priority = 1});
  const Handle c = searcher.submit({.prompt = "c", .budget = 1, .priority = -1, .deadline = 600});
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  archive.next_round();
  CHECK(archive.wait_for_round() == Prompts({"c"}));
  CHECK(error_of(late) == "deadline");  // while the round still runs
  archive.let_go();
  CHECK(error_of(a).empty() && error_of(b).empty() && error_of(c).empty() && archive.rounds.back() == Prompts({"b"}));
  for (const int priority : {-1001, 1001, std::numeric_limits<int>::min()})
    CHECK(refused<OptionError>(searcher, {.prompt = "a", .budget = 1, .priority = priority}));
  for (const double deadline : {0.0, -1.0, 1e6 + 1, kNaN})
    CHECK(refused<OptionError>(searcher, {.prompt = "a", .budget = 1, .deadline = deadline}));
}

void guidance_up_to_1_is_off() {
  fake("guided").passes = 2, fake("guided").guidance = 4.5, fake("exported with 0").guidance = 0;
  Searcher guided("guided"), unguided("unguided"), old("exported with 0");
  const auto run = [](Searcher& searcher, std::optional<double> guidance) {
    searcher.submit({.prompt = "a", .budget = 1, .guidance = guidance}).get();
  };
  for (const auto guidance : {std::optional<double>(), std::optional(0.0), std::optional(0.5), std::optional(1.0)})
    run(guided, guidance), run(unguided, guidance), run(old, guidance);
  run(guided, 1.5), run(guided, 1000);
  CHECK(fake("guided").guided == std::vector<double>({4.5, 1, 1, 1, 1.5, 1000}));
  const std::vector<double> off(4, 1);
  CHECK(fake("unguided").guided == off && fake("exported with 0").guided == off);
  CHECK(refused<OptionError>(unguided, {.prompt = "a", .budget = 1, .guidance = 1.5}));
  for (const double guidance : {-1.0, -1e-9, 1000.5, kNaN, std::numeric_limits<double>::infinity()})
    CHECK(refused<OptionError>(guided, {.prompt = "a", .budget = 1, .guidance = guidance}), "%g", guidance);
}

void the_host_scores() {
  fake("host").hold();
  Searcher searcher("host", {.reward = [](auto images, auto prompts, auto times) {
                      std::vector<float> scores;
                      for (size_t i = 0; i < images.size(); ++i) {
                        CHECK(times[i] == 0.5f);
                        if (prompts[i] == "throws") throw std::runtime_error("no scores today");
                        if (prompts[i] == "throws a number") throw 7;
                        if (prompts[i] != "one too few") scores.push_back(prompts[i].size() * 10 + images[i].pixels[0]);
                      }
                      return scores;
                    }});
  const Handle a = searcher.submit({.prompt = "a", .budget = 3});
  fake("host").wait_for_round();
  const Handle b = searcher.submit({.prompt = "bb", .budget = 2});
  fake("host").let_go();
  CHECK(a.get().reward() == 12.0f && b.get().reward() == 21.0f);
  CHECK(error_of(searcher.submit({.prompt = "throws", .budget = 1})) == "reward");
  CHECK(error_of(searcher.submit({.prompt = "throws a number", .budget = 1})) == "reward");
  CHECK(error_of(searcher.submit({.prompt = "one too few", .budget = 1})) == "reward");
  fake("host").hold();
  const Handle innocent = searcher.submit({.prompt = "a", .budget = 3});
  fake("host").wait_for_round();
  const Handle guilty = searcher.submit({.prompt = "throws", .budget = 3});
  fake("host").let_go();
  CHECK(error_of(guilty) == "reward" && innocent.get().reward() == 12.0f);
}

void the_host_gets_a_bounded_call() {
  fake("many lanes").lanes = 70, fake("large images").lanes = 40, fake("large images").side = 1024;
  const auto sizes_of_calls = [](const std::string& name) {
    std::vector<size_t> sizes;
    std::vector<float> told;
    Searcher searcher(name, {.reward = [&](auto images, auto prompts, auto times) {
                        sizes.push_back(images.size());
                        CHECK(prompts.size() == images.size() && times.size() == images.size());
                        std::vector<float> scores;
                        for (const Image& image : images) scores.push_back(image.pixels[0]);
                        return scores;
                      }});
    searcher
        .submit({.prompt = "a", .budget = 1},
                [&](const Progress& progress) {
                  for (const Candidate& candidate : progress.candidates) told.push_back(candidate.reward);
                })
        .get();
    for (size_t i = 0; i < told.size(); ++i) CHECK(told[i] == static_cast<float>(i));  // each image has its own score
    CHECK(told.size() == static_cast<size_t>(fake(name).lanes));
    return sizes;
  };
  CHECK(sizes_of_calls("many lanes") == std::vector<size_t>({64, 6}));
  CHECK(sizes_of_calls("large images") == std::vector<size_t>({32, 8}));
}

// The fake's image k shows k: k = 1 is NaN here, which the reward is not asked about.
void an_image_that_is_not_finite_has_no_reward() {
  fake("holes").hole = 1;
  std::vector<float> seen;
  Searcher searcher("holes", {.reward = [&](auto images, auto, auto) {
                      for (const Image& image : images) seen.push_back(image.pixels[0]);
                      return std::vector<float>(images.size(), 5.0f);
                    }});
  std::vector<float> told;
  searcher
      .submit({.prompt = "a", .budget = 3},
              [&](const Progress& progress) { told.push_back(progress.candidates[0].reward); })
      .get();
  CHECK(seen == std::vector<float>({0, 2}));
  CHECK(told.size() == 3 && told[0] == 5 && std::isnan(told[1]) && told[2] == 5);
}

void progress_is_told() {
  Searcher searcher("progress");
  std::vector<Progress> told;
  searcher.submit({.prompt = "a", .budget = 3}, [&](const Progress& progress) { told.push_back(progress); }).get();
  CHECK(told.size() == 3);
  for (size_t i = 0; i < told.size(); ++i) {
    CHECK(told[i].nfe == static_cast<int64_t>(i) + 1 && told[i].budget == 3);
    CHECK(told[i].candidates.size() == 1 && told[i].candidates[0].step.transition == static_cast<int64_t>(i));
    CHECK(told[i].candidates[0].reward == 7.0f && told[i].candidates[0].image.pixels[0] == static_cast<float>(i));
  }
  const Handle bad = searcher.submit({.prompt = "b", .budget = kForever},
                                     [](const Progress&) { throw PromptError("mine"); });
  CHECK(error_of(bad) == "prompt");  // what the callback throws comes out, and its slot is free
  CHECK(error_of(searcher.submit({.prompt = "a", .budget = 1})).empty() && searcher.running() == 0);
}

void ends() {
  fake("ends").hold();
  std::optional<Handle> a, b;
  {
    Searcher searcher("ends");
    a = searcher.submit({.prompt = "a", .budget = kForever});
    fake("ends").wait_for_round();
    for (int i = 0; i < 3; ++i) b = searcher.submit({.prompt = "b", .budget = kForever});
    fake("ends").let_go();
  }
  CHECK(error_of(*a) == "cancelled" && error_of(*b) == "cancelled");

  Searcher searcher("drains");
  std::vector<Handle> handles;
  for (int i = 0; i < 5; ++i) handles.push_back(searcher.submit({.prompt = "a", .budget = 10}));
  searcher.drain();
  for (const Handle& handle : handles) CHECK(error_of(handle).empty());
  CHECK(refused<CancelledError>(searcher, {.prompt = "late", .budget = 1}));
  searcher.drain();
  Searcher other(std::move(searcher));
  CHECK(other.running() == 0);
}

// Two Searchers, four threads each, some of which lose patience: every request has exactly one answer.
void many_threads() {
  std::vector<std::unique_ptr<Searcher>> searchers;
  for (const char* name : {"many threads, one", "many threads, other"})
    searchers.push_back(std::make_unique<Searcher>(name, Options{.most_waiting = 1}));
  std::atomic<int> answers = 0, cancelled = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      Random random(t);
      for (int i = 0; i < 100; ++i) {
        const int64_t budget = 1 + static_cast<int64_t>(random.bits() % 9);
        OnProgress on_progress;
        if (i % 5 == 0) on_progress = [](const Progress&) {};
        Request request{.prompt = "a", .budget = budget, .seed = i, .priority = i % 3 - 1};
        if (i % 7 == 0) request.deadline = 1e-3;
        const Handle handle = searchers[t % 2]->submit(request, on_progress);
        if (i % 3 == 0) handle.cancel();
        try {
          const int64_t nfe = handle.get().nfe;
          if (nfe == budget || (request.deadline && nfe < budget)) ++answers;
        } catch (const CancelledError&) {
          ++answers, ++cancelled;
        } catch (const QueueFullError&) {
          ++answers;
        } catch (const DeadlineError&) {
          answers += request.deadline.has_value();
        }
        (void)searchers[t % 2]->running();
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(answers == 800, "%d answers", answers.load());
  CHECK(cancelled > 0 && cancelled <= 8 * 34, "%d cancelled", cancelled.load());
}

}  // namespace

void test_driver() {
  more_requests_than_slots();
  a_request_moves_into_a_free_slot();
  a_cancelled_request_is_out_before_the_next_call();
  a_long_prompt_is_cut_between_characters();
  an_error_is_of_its_request();
  the_queue_is_bounded();
  a_lower_priority_is_earlier_and_a_deadline_ends_the_waiting();
  guidance_up_to_1_is_off();
  the_host_scores();
  the_host_gets_a_bounded_call();
  an_image_that_is_not_finite_has_no_reward();
  progress_is_told();
  ends();
  many_threads();
}

}  // namespace flowfast
