// The engine: requests on the slots of an archive, a step at a time. No thread is in it: searcher.cpp has one.
//
// A step, whose rules the engine in Python keeps, too (tests/engine/traces.json holds both to them):
//
//   Refused requests come first, in their order. add_request refuses
//     - "full": slots + most_waiting requests run or wait already, those that were aborted left out;
//     - "deadline": it, or one that was taken before, would end late because of it even if from now on all with a
//       deadline took their least work. That is, at the pace of the last 8 rounds that did not fail: a running request
//       keeps its slot for the rounds it needs at least (its plan's, where it has no deadline), then the waiting ones
//       and the newcomer, in the order of c, take the slot that is free first for the rounds of the smallest budget (of
//       their own, where they have no deadline). Before the first round the pace is unknown and nothing is refused.
//   a. Aborted requests leave, running or waiting, in the order of their numbers: failed, "aborted".
//   b. Waiting requests whose deadline has come leave in the same order: failed, "deadline".
//   c. Waiting requests move into free slots, the lowest slot first, the request with the smallest
//      arrived + kAgeing * priority - 0.05 * (budget / 50) first (long ones do not run alone at the end, in half-empty
//      model calls), of equal ones the lower number; so everyone's turn comes. Where admit throws:
//      failed, "prompt", and the slot is free for the next one. One with a deadline gets the largest budget up to the
//      one it asks for whose rounds fit the time it has left at this pace, or else the archive's smallest. Then running
//      ones with a deadline are cut that would be more than one round late.
//   d. One round of all that run: propose, score, observe. Where the host's reward fails it is asked again, a request at
//      a time; the guilty alone fail, "reward", by slot. Where the archive fails all that run do, "model", by slot; the
//      engine goes on with those that wait.
//   e. By slot: progress, and if it is done finished, or failed, "model", where no sample has a finite reward.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "runner/archive.h"

namespace flowfast {

inline constexpr double kAgeing = 10;  // seconds of waiting that make up for a level of priority

struct Failure {
  std::string reason;  // "aborted", "deadline", "full", "model", "prompt" or "reward"
  std::exception_ptr error;
};

struct Event {
  int64_t id = 0;
  std::variant<Progress, Result, Failure> what;
};

struct EngineSettings {
  HostReward reward = {};
  std::optional<int64_t> most_waiting = std::nullopt;
  std::function<double()> clock;  // seconds

  // Is there no place for one more than these?
  bool full(int64_t under_way, int64_t slots) const { return most_waiting && under_way - slots >= *most_waiting; }
  Failure refusal(const Request& request) const;
};

class EngineCore {
 public:
  EngineCore(Archive& archive, EngineSettings settings);

  // A request as `checked` leaves it. arrived: on the clock; nothing: now. watched: its progress has candidates.
  int64_t add_request(Request request, std::optional<double> arrived = std::nullopt, bool watched = false);
  void abort(int64_t id);  // at the next step; too late is no harm
  std::vector<Event> step();

  // The halves of a step, before the model is called and after, for who tells the first before the second begins.
  std::vector<Event> schedule();
  std::vector<Event> round();

  int64_t running() const;
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  bool idle() const { return running() == 0 && waiting_.empty() && refused_.empty(); }

 private:
  struct Entry {
    int64_t id = 0;
    Request request;
    double arrived = 0, admitted = 0;
    bool watched = false, aborted = false;
    int64_t asked = 0, rounds = 0;  // its budget before any cut, and rounds it has run
    std::vector<std::pair<int64_t, int64_t>> cuts = {};

    double end() const { return arrived + *request.deadline; }
    double turn() const { return arrived + kAgeing * request.priority - 0.05 * static_cast<double>(asked / 50); }
  };
  static bool moves_in_before(const Entry& a, const Entry& b) {
    return std::pair(a.turn(), a.id) < std::pair(b.turn(), b.id);
  }
  using Slots = std::vector<std::optional<Entry>>;

  std::optional<Failure> refusal(const Entry& newcomer) const;
  bool ends_in_time(const Entry& newcomer) const;
  int64_t late(const Entry* newcomer, double pace) const;  // how many of those that wait would end late, with it
  std::optional<double> pace() const;  // seconds a round
  void leave_aborted();
  void leave_late();
  void fill_slots();
  void admit(size_t slot, Entry entry);
  void cut_late();
  void run_round();
  void finish(size_t slot);
  void tell(int64_t id, decltype(Event::what) what) { events_.push_back({id, std::move(what)}); }
  void fail(size_t slot, const std::string& reason, const std::exception_ptr& error);
  void release(size_t slot);  // before its end
  Entry clear(size_t slot) { return *std::exchange(slots_[slot], std::nullopt); }

  Archive& archive_;
  const EngineSettings settings_;
  Slots slots_;
  std::vector<Entry> waiting_;  // in the order of their numbers
  std::vector<Event> refused_, events_;  // of the step that is under way
  std::deque<double> seconds_;  // of the last rounds
  int64_t numbers_ = 0;
};

}  // namespace flowfast
