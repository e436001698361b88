// An archive without PyTorch, for tests of the driver: every request takes as many rounds as its budget says, one lane
// each, and a test can hold a round, look at who is in it, and let it go.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace flowfast {

struct Fake {
  std::mutex mutex;
  std::condition_variable changed;
  bool held = false;                                // rounds wait in propose()
  bool inside = false;                              // one waits now
  std::map<std::string, int64_t> failing;  // prompts whose rounds throw, and at which one of their own, from 1
  std::set<std::string> unreadable = {"unreadable"};
  std::set<std::string> lost;  // prompts whose release throws
  std::function<void()> in_round;  // called in propose()
  std::vector<std::vector<std::string>> rounds;  // prompts of each round
  std::vector<int64_t> budgets;  // of each request that got a slot
  int64_t hole = -1;  // the round whose images are NaN
  int64_t slots = 2;
  bool cuts = true;  // does it take smaller budgets and limits?
  int64_t lanes = 1, side = 1;  // of each slot, and of its images
  int passes = 1;  // of the manifest, and
  double guidance = 1;
  std::vector<double> guided;  // guidance of each request that got a slot

  void hold();  // from the next round on
  std::vector<std::string> wait_for_round();  // until one waits: its prompts
  void next_round();  // lets the one that waits go; the next one waits
  void let_go();
};

// Of the archive that is loaded by this name.
Fake& fake(const std::string& name);

}  // namespace flowfast
