// flowfast in a C++ program: load an archive that `flowfast export` wrote, search with it. Installed as
// <flowfast/searcher.h>, target flowfast::searcher; no header of PyTorch is needed to use it.
//
//   flowfast::Searcher searcher("scenes.pt", {.threads = 2});
//   flowfast::Result result = searcher.submit({.prompt = "three red circles", .budget = 200, .seed = 0}).get();
//
// At equal threads and on one class of machine results are bit-identical to flowfast in Python with the same archive's
// model, reward, method and sizes. An archive is a program that this process will run: load only what you trust. Its
// digest tells damage, not malice.
//
// All members of Searcher and Handle may be called from any thread. A Searcher has one driver thread, which alone runs
// the model: rounds over the archive's slots, one batch of all the requests that are under way. A new request moves
// into a free slot between two rounds. There may be many Searchers in a process.
#pragma once

#include <chrono>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#define FLOWFAST_EXPORT __attribute__((visibility("default")))

namespace flowfast {

// Base of all that flowfast throws on purpose: what was expected, what came, what to do.
class FLOWFAST_EXPORT Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
class FLOWFAST_EXPORT ArchiveError : public Error {
  using Error::Error;
};    // missing, damaged, foreign, too new
class FLOWFAST_EXPORT OptionError : public Error {
  using Error::Error;
};     // an option that cannot work
class FLOWFAST_EXPORT PromptError : public Error {
  using Error::Error;
};     // the model cannot read the prompt
class FLOWFAST_EXPORT BudgetError : public Error {
  using Error::Error;
};     // outside of what the archive can run
class FLOWFAST_EXPORT ModelError : public Error {
  using Error::Error;
};      // the model failed, or only NaN came
class FLOWFAST_EXPORT RewardError : public Error {
  using Error::Error;
};     // the host's reward threw, or miscounted
class FLOWFAST_EXPORT CancelledError : public Error {
  using Error::Error;
};  // by Handle::cancel or the Searcher's end
class FLOWFAST_EXPORT QueueFullError : public Error {
  using Error::Error;
};  // Options::most_waiting wait already
class FLOWFAST_EXPORT DeadlineError : public Error {
  using Error::Error;
};   // Request::deadline cannot be met, or came while it waited

// Pixels in [0, 1], one plane after the other: value (c, y, x) is pixels[(c * height + y) * width + x].
struct FLOWFAST_EXPORT Image {
  int channels = 0, height = 0, width = 0;
  std::vector<float> pixels;

  // 8 bits a value, interleaved: (y, x, c), as PNG and most libraries want it. NaN is 0; where there are not as many
  // pixels as the sizes say: OptionError.
  std::vector<uint8_t> bytes() const;
  // The bytes of a PNG file. Throws OptionError unless there are 1 or 3 channels.
  std::string png() const;
};

// Most images of one call of a host's reward, and most values of them together (128 MiB), as in Python.
inline constexpr size_t kMostImages = 64, kMostValues = size_t{1} << 25;

// Scores of N images, higher is better: images[i] is a posterior mean of prompts[i] at linear time times[i] (0: data).
// A round may have hundreds of images; a call gets at most kMostImages and kMostValues of them, in their order.
// A NaN never wins (Result::nan_rewards counts it), and so does an image that is not finite, which is not shown to it.
using HostReward = std::function<std::vector<float>(std::span<const Image> images, std::span<const std::string> prompts,
                                                    std::span<const float> times)>;

struct Options {
  int threads = 0;  // of the model's operations; 0: as PyTorch chooses. Give all Searchers the same number
  std::string device = "cpu";  // or "cuda:0"
  // Instead of the archive's own, in the driver thread. Where it throws it is asked again a request at a time, and ends
  // those alone for which it throws once more.
  HostReward reward = {};
  // Requests beyond the archive's slots that may wait; more fail with QueueFullError. Nothing: as many as come.
  std::optional<int64_t> most_waiting = std::nullopt;
};

// Of the noise: any whole number, as in Python; every one of them is another noise.
class FLOWFAST_EXPORT Seed {
 public:
  Seed() = default;
  template <std::integral Integer>
  Seed(Integer number) : digits_(std::to_string(number)) {}
  // As Python's int() reads it: " +1_000 " is 1000. Throws OptionError where the text is no whole number.
  explicit Seed(std::string_view text);

  const std::string& digits() const { return digits_; }  // "-7"
  bool operator==(const Seed&) const = default;

 private:
  std::string digits_ = "0";
};

struct Request {
  std::string prompt = "";
  int64_t budget = 0;  // NFE: rows through the model; never exceeded
  Seed seed = 0;
  int64_t repeat = 0;  // another noise for the same seed and prompt; from 0 on
  // Classifier-free guidance (as the archive says), from 0 to 1000; up to 1 is off. An archive that was exported with
  // guidance has two passes and counts both in any case: export with guidance 1 where none is wanted.
  std::optional<double> guidance = std::nullopt;
  double until = std::numeric_limits<double>::infinity();  // stop early at this reward
  std::optional<std::string> negative_prompt = std::nullopt;  // as the archive says
  int priority = 0;  // from -1000 to 1000, lower is earlier; a level is worth 10 s of waiting, so everyone's turn comes
  // Seconds from submit in which it should end: what waits longer fails with DeadlineError, and so does at once what
  // cannot end in time at the pace of the last rounds. What runs never does: where it is late it is cut to what fits,
  // at the least to what finishes a sample (Result::cuts). Such a request's bits depend on the machine's speed.
  std::optional<double> deadline = std::nullopt;
};

// One step of a path.
struct Step {
  int64_t chain = 0, transition = 0, candidate = 0;
  bool operator==(const Step&) const = default;
};

// A finished sample.
struct Sample {
  float reward = 0;
  Image image;
  std::vector<float> latent;  // x0_hat
  std::vector<Step> path;  // from the initial noise on; with the key it is the sample's address (flowfast.replay)
};

struct Result {
  std::vector<Sample> top;  // best first, at least one
  int64_t key = 0;  // of the noise: a function of seed, prompt and repeat
  int64_t nfe = 0, nfe_speculative = 0, reward_calls = 0, nan_rewards = 0;
  int64_t unspent = 0;
  // What its deadline took away: (round, NFE left from there on); at round 0: of the budget it then had.
  std::vector<std::pair<int64_t, int64_t>> cuts;
  double seconds = 0;  // from its slot to its end
  double seconds_waited = 0;  // before that

  float reward() const { return top.front().reward; }
  const Image& image() const { return top.front().image; }
  const std::vector<Step>& path() const { return top.front().path; }
};

// A child that a round evaluated, with its posterior mean: what the sample would look like.
struct Candidate {
  Step step;
  float t = 0;  // linear time, 0: data
  float reward = 0;
  Image image;
};

struct Progress {
  int64_t nfe = 0, budget = 0;
  std::vector<Candidate> candidates;  // of this round
};

// Called in the driver thread, which waits; what it throws ends the request and comes out of Handle::get.
using OnProgress = std::function<void(const Progress&)>;

struct Job;

// A request that was submitted. Copies mean the same request; dropping them does not cancel it.
class FLOWFAST_EXPORT Handle {
 public:
  Result get() const;  // waits; throws what went wrong
  bool wait_for(std::chrono::milliseconds time) const;  // is it over?
  void cancel() const;  // its slot is free before the next call of the model; get() throws CancelledError

 private:
  friend class Searcher;
  explicit Handle(std::shared_ptr<Job> job);
  std::shared_ptr<Job> job_;
};

class FLOWFAST_EXPORT Searcher {
 public:
  // Throws ArchiveError, OptionError.
  explicit Searcher(const std::string& archive, Options options = {});
  // Cancels what waits or runs, and returns after the model call that is under way. To finish first: drain().
  ~Searcher();
  Searcher(Searcher&&) noexcept;
  Searcher& operator=(Searcher&&) noexcept;

  // The manifest: format, versions, model, reward, method, shape, slots, budgets, content hash, ...
  const std::map<std::string, std::string>& info() const;

  // Throws OptionError, BudgetError and CancelledError at once; what else goes wrong comes out of the handle.
  Handle submit(Request request, OnProgress on_progress = {});
  // All of them, in their order. Throws the first error in that order, and then cancels the others.
  std::vector<Result> search(const std::vector<Request>& requests);

  // How many requests hold a slot, or wait for one. A server that bounds its queue asks here, or has most_waiting.
  int64_t running() const;
  int64_t waiting() const;
  // Takes no more requests (submit throws CancelledError) and returns when those it has are over. Neither this nor the
  // destructor may be called from a callback: they wait for the driver thread.
  void drain();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flowfast
