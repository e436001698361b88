// A Searcher: one thread around the engine (engine.h), and a box where requests wait to be taken into it.
#include "runner/searcher.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <future>
#include <mutex>
#include <thread>
#include <utility>

#include "runner/archive.h"
#include "runner/engine.h"
#include "runner/request.h"
#include "runner/text.h"

namespace flowfast {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

// A request, from submit to its end. All but `cancelled` and `result` is the driver's.
struct Job {
  Request request;
  OnProgress on_progress;
  double submitted = now();
  std::atomic<bool> cancelled = false;
  std::promise<Result> promise;
  std::shared_future<Result> result = promise.get_future().share();

  void fail(std::exception_ptr error) { promise.set_exception(std::move(error)); }
};

struct Searcher::Impl {
  Impl(const std::string& path, Options options)
      : archive(load_archive(path, options)),
        slots(number(archive->info(), "slots")),
        settings{.reward = std::move(options.reward), .most_waiting = options.most_waiting, .clock = now},
        core(*archive, settings) {
    const int64_t most = settings.most_waiting.value_or(0);
    if (most < 0 || most > kMostWaiting)
      throw OptionError("most_waiting must be from 0 to " + std::to_string(kMostWaiting) + ", got " +
                        std::to_string(most));
    thread = std::thread([this] { run(); });
  }

  ~Impl() { end(&Impl::stopping); }

  // ---- any thread ----

  std::shared_ptr<Job> submit(Request request, OnProgress on_progress) {
    auto job = std::make_shared<Job>();
    job->request = checked(std::move(request), archive->info());
    job->on_progress = std::move(on_progress);
    {
      const std::lock_guard lock(mutex);
      if (draining || stopping) throw CancelledError("this Searcher takes no more requests: it is being drained");
      if (settings.full(running + waiting, slots)) {
        job->fail(settings.refusal(job->request).error);
        return job;
      }
      box.push_back(job);
      ++waiting;
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
      take_in();
      tell(core.schedule());
      tell(core.round());
    }
    take_in();
    for (auto& [id, job] : jobs)
      job->fail(std::make_exception_ptr(
          CancelledError("the search for " + quoted(job->request.prompt) + " was cancelled: its Searcher ended")));
  }

  bool wait_for_work() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !core.idle() || !box.empty() || draining || stopping; });
    return !stopping && (!core.idle() || !box.empty());
  }

  void take_in() {
    std::vector<std::shared_ptr<Job>> taken;
    {
      const std::lock_guard lock(mutex);
      taken.swap(box);
    }
    for (auto& job : taken) {
      const bool watched = static_cast<bool>(job->on_progress);
      jobs.emplace(core.add_request(job->request, job->submitted, watched), std::move(job));
    }
    for (const auto& [id, job] : jobs)
      if (job->cancelled) core.abort(id);
  }

  void tell(std::vector<Event> events) {
    {
      const std::lock_guard lock(mutex);
      running = core.running();
      waiting = core.waiting() + static_cast<int64_t>(box.size());
    }
    for (Event& event : events) {
      const auto found = jobs.find(event.id);
      if (found == jobs.end()) continue;  // its callback has ended it
      const std::shared_ptr<Job> job = found->second;
      if (const auto* progress = std::get_if<Progress>(&event.what)) {
        try {
          if (job->on_progress) job->on_progress(*progress);
          continue;
        } catch (...) {
          core.abort(event.id);
          job->fail(std::current_exception());
        }
      } else if (auto* failure = std::get_if<Failure>(&event.what)) {
        job->fail(failure->error);
      } else {
        job->promise.set_value(std::get<Result>(std::move(event.what)));
      }
      jobs.erase(found);
    }
  }

  const std::unique_ptr<Archive> archive;
  const int64_t slots;
  const EngineSettings settings;
  EngineCore core;  // the driver thread's, as are the jobs that are in it
  std::map<int64_t, std::shared_ptr<Job>> jobs;
  mutable std::mutex mutex;  // of what follows
  std::condition_variable changed;
  std::vector<std::shared_ptr<Job>> box;  // submitted, and not yet in the engine
  int64_t running = 0, waiting = 0;       // the engine's when it last told, and the box's
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
  return impl_->waiting;
}

void Searcher::drain() { impl_->end(&Impl::draining); }

}  // namespace flowfast
