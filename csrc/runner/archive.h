// An archive as the driver sees it: slots that take requests, and rounds over them. No header of PyTorch here:
// archive.cpp is the one file that includes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runner/searcher.h"

namespace flowfast {

// Entries of a manifest.
using Info = std::map<std::string, std::string>;

// A lane of the round that is under way: a child that was evaluated, and whose it is.
struct Lane {
  int64_t slot = 0;
  Step step;
  float t = 0;
};

// What is before a slot's request, at most.
struct Still {
  int64_t rounds = 0, nfe = 0;
};

inline bool is_finite(const Image& image) {
  return std::all_of(image.pixels.begin(), image.pixels.end(), [](float value) { return std::isfinite(value); });
}

// All of it for one thread, the driver's; but for info().
class Archive {
 public:
  virtual ~Archive() = default;

  virtual const Info& info() const = 0;
  // Settings of the calling thread: number of threads, no gradients.
  virtual void enter_thread() = 0;

  // Puts a request into a free slot. Throws PromptError where the model cannot read it.
  virtual void admit(int64_t slot, const Request& request, int64_t key) = 0;
  // Takes it out, also before its end: what it got so far. `top` holds finished samples with finite rewards only.
  virtual Result release(int64_t slot) = 0;

  // A round: propose, read what is wanted, score, observe.
  virtual void propose() = 0;
  virtual std::vector<Lane> lanes() = 0;    // the live ones whose score decides anything; in many rounds none
  virtual std::vector<Image> images() = 0;  // theirs, posterior means
  virtual void score() = 0;                 // by the archive's own reward
  virtual void score(const std::vector<float>& rewards) = 0;  // of these lanes
  virtual std::vector<float> rewards() = 0;                   // of these lanes, once scored
  virtual void observe() = 0;

  virtual bool done(int64_t slot) = 0;
  virtual int64_t nfe(int64_t slot) = 0;

  virtual Still still(int64_t slot) = 0;
  // From the next round on it spends at most so much, or what one chain needs to finish.
  virtual void limit(int64_t slot, int64_t nfe) = 0;
  // Rounds of a budget, at most. Throws BudgetError.
  virtual int64_t rounds_of(int64_t budget) = 0;
  // The largest budget up to this one that takes at most so many rounds, or else the smallest. Throws BudgetError.
  virtual int64_t budget_within(int64_t budget, int64_t rounds) = 0;
};

// Throws ArchiveError, OptionError. options.reward is the driver's.
std::unique_ptr<Archive> load_archive(const std::string& path, const Options& options);

}  // namespace flowfast
