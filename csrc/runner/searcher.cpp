// The driver of a Searcher: a queue of requests, and one thread that runs rounds over the archive's slots.
#include "runner/searcher.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <mutex>
#include <thread>
#include <utility>

#include "runner/archive.h"
#include "runner/blake2b.h"
#include "runner/text.h"

namespace flowfast {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

// A request, from submit to its end. All but `cancelled` and `result` is the driver's.
struct Job {
  Request request;
  OnProgress on_progress;
  int64_t key = 0;
  Clock::time_point submitted = Clock::now(), admitted = submitted;
  std::atomic<bool> cancelled = false;
  std::promise<Result> promise;
  std::shared_future<Result> result = promise.get_future().share();

  void fail(std::exception_ptr error) { promise.set_exception(std::move(error)); }
  void cancel(const std::string& why) {
    const std::string said = "the search for " + quoted(request.prompt) + " was cancelled: " + why;
    fail(std::make_exception_ptr(CancelledError(said)));
  }
};

struct Searcher::Impl {
  Impl(const std::string& path, Options options)
      : reward(std::move(options.reward)), archive(load_archive(path, options)), jobs(slots()) {
    thread = std::thread([this] { run(); });
  }

  ~Impl() { end(&Impl::stopping); }

  // ---- any thread ----

  int64_t number(const char* entry) const { return std::stoll(archive->info().at(entry)); }  // checked by load_archive
  size_t slots() const { return static_cast<size_t>(number("slots")); }

  // The request as the archive runs it.
  Request checked(Request request) const {
    const int64_t least = number("budget_min"), most = number("budget_max");
    if (request.budget < least || request.budget > most)
      throw BudgetError("this archive runs budgets of " + std::to_string(least) + " to " + std::to_string(most) +
                        " NFE, got " + std::to_string(request.budget) + ": change it or export for another range");
    const Info& info = archive->info();
    const bool unread = info.contains("reads_prompts") && info.at("reads_prompts") == "0";
    const std::string negative = request.negative_prompt.value_or("");
    for (const auto& fault : {fault_of(request.prompt, unread), fault_of(negative, true)})
      if (fault) throw PromptError("the prompt cannot be drawn: " + *fault + "; write what the picture shows");
    if (request.repeat < 0) throw OptionError("repeat must be at least 0, got " + std::to_string(request.repeat));
    if (std::isnan(request.until)) throw OptionError("until must be a number, got NaN: leave it out");
    const double guidance = request.guidance.value_or(*number_in<double>(info.at("guidance")));
    if (!(guidance >= 0 && guidance <= 1000))
      throw OptionError("guidance must be a number from 0 to 1000 (up to 1 is off), got " + text_of(guidance));
    request.guidance = std::max(guidance, 1.0);  // up to 1 is off; the ops mean the unconditional model by 0
    if (number("passes") == 1 && *request.guidance != 1.0)
      throw OptionError("this archive was exported without guidance, got guidance " + text_of(guidance) +
                        ": leave it out (up to 1 is off) or export with guidance");
    return request;
  }

  std::shared_ptr<Job> submit(Request request, OnProgress on_progress) {
    auto job = std::make_shared<Job>();
    job->request = checked(std::move(request));
    job->key = noise_key(job->request.seed, job->request.prompt, job->request.repeat);
    job->on_progress = std::move(on_progress);
    {
      const std::lock_guard lock(mutex);
      if (draining || stopping) throw CancelledError("this Searcher takes no more requests: it is being drained");
      waiting.push_back(job);
    }
    changed.notify_all();
    return job;
  }

  void end(bool Impl::* how) {
    {
      const std::lock_guard lock(mutex);
      this->*how = true;
    }
    changed.notify_all();
    const std::lock_guard lock(joining);
    if (thread.joinable()) thread.join();
  }

  // ---- the driver thread ----

  void run() {
    archive->enter_thread();
    while (wait_for_work()) {
      leave_cancelled();
      fill_slots();
      if (running == 0) continue;
      try {
        round();
      } catch (...) {
        for (size_t slot = 0; slot < jobs.size(); ++slot) leave(slot, std::current_exception());
      }
    }
    for (size_t slot = 0; slot < jobs.size(); ++slot)
      if (auto job = take(slot)) job->cancel("its Searcher ended");
    for (auto& job : waiting) job->cancel("its Searcher ended");
  }

  void round() {
    archive->propose();
    std::vector<Lane> lanes;
    std::vector<Image> images;
    const bool shown = std::any_of(jobs.begin(), jobs.end(), [](auto& job) { return job && job->on_progress; });
    if (reward || shown) lanes = archive->lanes(), images = archive->images();
    reward ? archive->score(ask(lanes, images)) : archive->score();
    const std::vector<float> rewards = shown ? archive->rewards() : std::vector<float>();
    archive->observe();
    if (shown) report(lanes, std::move(images), rewards);
    for (size_t slot = 0; slot < jobs.size(); ++slot)
      if (jobs[slot] && archive->done(slot)) finish(slot);
  }

  bool wait_for_work() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return running > 0 || !waiting.empty() || draining || stopping; });
    return !stopping && (running > 0 || !waiting.empty());
  }

  void leave_cancelled() {
    for (size_t slot = 0; slot < jobs.size(); ++slot)
      if (jobs[slot] && jobs[slot]->cancelled) take(slot)->cancel("by its caller");
    std::vector<std::shared_ptr<Job>> gone;
    {
      const std::lock_guard lock(mutex);
      const auto is_on = [](const auto& job) { return !job->cancelled; };
      const auto first = std::stable_partition(waiting.begin(), waiting.end(), is_on);
      gone.assign(first, waiting.end());
      waiting.erase(first, waiting.end());
    }
    for (auto& job : gone) job->cancel("by its caller");
  }

  void fill_slots() {
    for (size_t slot = 0; slot < jobs.size(); ++slot)
      while (!jobs[slot]) {
        {
          const std::lock_guard lock(mutex);
          if (waiting.empty()) return;
          jobs[slot] = std::move(waiting.front());
          waiting.pop_front();
          ++running;
        }
        jobs[slot]->admitted = Clock::now();
        try {
          archive->admit(slot, jobs[slot]->request, jobs[slot]->key);
        } catch (...) {
          leave(slot, std::current_exception());
        }
      }
  }

  // The host's rewards. It is not shown an image that is not finite, which has none: in 8 bits NaN would be black.
  std::vector<float> ask(const std::vector<Lane>& lanes, const std::vector<Image>& images) {
    std::vector<size_t> sound;
    std::vector<Image> finite;
    std::vector<std::string> prompts;
    std::vector<float> times, rewards(lanes.size(), std::numeric_limits<float>::quiet_NaN());
    for (size_t i = 0; i < lanes.size(); ++i) {
      if (!is_finite(images.at(i))) continue;
      sound.push_back(i);
      prompts.push_back(jobs.at(lanes[i].slot)->request.prompt);
      times.push_back(lanes[i].t);
    }
    if (sound.empty()) return rewards;
    const bool all = sound.size() == images.size();
    if (!all)
      for (const size_t i : sound) finite.push_back(images[i]);
    const std::span<const Image> shown(all ? images : finite);
    const size_t values = std::max<size_t>(1, shown[0].pixels.size());
    const size_t step = std::clamp<size_t>(kMostValues / values, 1, kMostImages);
    for (size_t start = 0; start < sound.size(); start += step) {
      const size_t count = std::min(step, sound.size() - start);
      const std::vector<float> found = scores(shown.subspan(start, count), {&prompts[start], count},
                                              {&times[start], count});
      for (size_t i = 0; i < count; ++i) rewards[sound[start + i]] = found[i];
    }
    return rewards;
  }

  // One call of the host's reward.
  std::vector<float> scores(std::span<const Image> images, std::span<const std::string> prompts,
                            std::span<const float> times) const {
    std::vector<float> found;
    try {
      found = reward(images, prompts, times);
    } catch (const std::exception& error) {
      throw RewardError(std::string("the host's reward failed: ") + error.what());
    } catch (...) {
      throw RewardError("the host's reward failed: it threw something that is no std::exception");
    }
    if (found.size() != images.size())
      throw RewardError("the host's reward must return one score an image, " + std::to_string(images.size()) +
                        ", got " + std::to_string(found.size()));
    return found;
  }

  void report(const std::vector<Lane>& lanes, std::vector<Image> images, const std::vector<float>& rewards) {
    std::vector<Progress> progress(jobs.size());
    for (size_t i = 0; i < lanes.size(); ++i)
      progress[lanes[i].slot].candidates.push_back({lanes[i].step, lanes[i].t, rewards[i], std::move(images[i])});
    for (size_t slot = 0; slot < jobs.size(); ++slot) {
      if (!jobs[slot] || !jobs[slot]->on_progress) continue;
      progress[slot].nfe = archive->nfe(slot);
      progress[slot].budget = jobs[slot]->request.budget;
      try {
        jobs[slot]->on_progress(progress[slot]);
      } catch (...) {
        leave(slot, std::current_exception());
      }
    }
  }

  void finish(size_t slot) {
    Result result = archive->release(slot);
    const std::shared_ptr<Job> job = clear(slot);
    if (result.top.empty())
      return job->fail(
          std::make_exception_ptr(ModelError("no finished sample of prompt " + quoted(job->request.prompt) +
                                             " has a finite reward: the model or the "
                                             "reward returned NaN for every particle")));
    result.key = job->key;
    result.unspent = job->request.budget - result.nfe;
    result.seconds = seconds_between(job->admitted, Clock::now());
    result.seconds_waited = seconds_between(job->submitted, job->admitted);
    job->promise.set_value(std::move(result));
  }

  std::shared_ptr<Job> clear(size_t slot) {
    const std::lock_guard lock(mutex);
    --running;
    return std::exchange(jobs[slot], nullptr);
  }

  // Frees a slot before its end; no job where it was free.
  std::shared_ptr<Job> take(size_t slot) {
    if (!jobs[slot]) return nullptr;
    try {
      archive->release(slot);
    } catch (const std::exception&) {  // a device that fails also here will fail the next round, which says so
    }
    return clear(slot);
  }

  void leave(size_t slot, const std::exception_ptr& error) {
    if (auto job = take(slot)) job->fail(error);
  }

  const HostReward reward;
  const std::unique_ptr<Archive> archive;
  std::vector<std::shared_ptr<Job>> jobs;  // of the slots
  mutable std::mutex mutex;  // of what follows; jobs are the driver thread's
  std::condition_variable changed;
  std::deque<std::shared_ptr<Job>> waiting;
  int64_t running = 0;
  bool draining = false, stopping = false;
  std::mutex joining;
  std::thread thread;
};

Handle::Handle(std::shared_ptr<Job> job) : job_(std::move(job)) {}
Result Handle::get() const { return job_->result.get(); }
bool Handle::wait_for(std::chrono::milliseconds time) const {
  return job_->result.wait_for(time) == std::future_status::ready;
}
void Handle::cancel() const { job_->cancelled = true; }

Searcher::Searcher(const std::string& archive, Options options)
    : impl_(std::make_unique<Impl>(archive, std::move(options))) {}
Searcher::~Searcher() = default;
Searcher::Searcher(Searcher&&) noexcept = default;
Searcher& Searcher::operator=(Searcher&&) noexcept = default;

const Info& Searcher::info() const { return impl_->archive->info(); }

Handle Searcher::submit(Request request, OnProgress on_progress) {
  return Handle(impl_->submit(std::move(request), std::move(on_progress)));
}

std::vector<Result> Searcher::search(const std::vector<Request>& requests) {
  std::vector<Handle> handles;
  std::vector<Result> results;
  try {
    for (const Request& request : requests) handles.push_back(submit(request));
    for (const Handle& handle : handles) results.push_back(handle.get());
  } catch (...) {
    for (const Handle& handle : handles) handle.cancel();
    throw;
  }
  return results;
}

int64_t Searcher::running() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->running;
}

int64_t Searcher::waiting() const {
  const std::lock_guard lock(impl_->mutex);
  return static_cast<int64_t>(impl_->waiting.size());
}

void Searcher::drain() { impl_->end(&Impl::draining); }

}  // namespace flowfast
