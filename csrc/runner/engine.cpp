#include "runner/engine.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "runner/blake2b.h"
#include "runner/host_reward.h"
#include "runner/request.h"
#include "runner/text.h"

namespace flowfast {
namespace {

constexpr size_t kPaceRounds = 8;

template <class E>
Failure failure(const std::string& reason, const Request& request, const std::string& why) {
  return {reason, std::make_exception_ptr(E("the search for " + quoted(request.prompt) + " " + why))};
}

// So many rounds of `pace` seconds fit.
int64_t rounds_within(double seconds, double pace) {
  constexpr double kMost = 1e15;
  return seconds > 0 ? static_cast<int64_t>(std::min(kMost, seconds / std::max(pace, 1 / kMost))) : 0;
}

}  // namespace

Failure EngineSettings::refusal(const Request& request) const {
  return failure<QueueFullError>("full", request,
                                 "was refused: the queue is full, " + std::to_string(*most_waiting) +
                                     " may wait; come back later or raise Options::most_waiting");
}

EngineCore::EngineCore(Archive& archive, EngineSettings settings)
    : archive_(archive), settings_(std::move(settings)), slots_(static_cast<size_t>(number(archive.info(), "slots"))) {}

int64_t EngineCore::add_request(Request request, std::optional<double> arrived, bool watched) {
  Entry entry{.id = numbers_++, .request = std::move(request), .arrived = arrived.value_or(settings_.clock())};
  entry.watched = watched, entry.asked = entry.request.budget;
  const int64_t id = entry.id;
  if (std::optional<Failure> why = refusal(entry))
    refused_.push_back({id, std::move(*why)});
  else
    waiting_.push_back(std::move(entry));
  return id;
}

std::optional<Failure> EngineCore::refusal(const Entry& newcomer) const {
  const Request& request = newcomer.request;
  int64_t under_way = std::count_if(waiting_.begin(), waiting_.end(), [](const Entry& e) { return !e.aborted; });
  for (const auto& running : slots_) under_way += running && !running->aborted;
  if (settings_.full(under_way, std::ssize(slots_))) return settings_.refusal(request);
  try {
    if (!request.deadline || ends_in_time(newcomer)) return std::nullopt;
  } catch (...) {
    return Failure{"model", std::current_exception()};
  }
  return failure<DeadlineError>("deadline", request,
                                "was refused: with what is before it, at " + text_of(*pace()) +
                                    " s a round, it cannot end within its deadline of " + text_of(*request.deadline) +
                                    " s; give it longer or come back later");
}

void EngineCore::abort(int64_t id) {
  for (Entry& entry : waiting_)
    if (entry.id == id) entry.aborted = true;
  for (auto& entry : slots_)
    if (entry && entry->id == id) entry->aborted = true;
}

std::vector<Event> EngineCore::step() {
  std::vector<Event> events = schedule();
  for (Event& event : round()) events.push_back(std::move(event));
  return events;
}

std::vector<Event> EngineCore::schedule() {
  events_ = std::exchange(refused_, {});
  leave_aborted();
  leave_late();
  fill_slots();
  cut_late();
  return std::exchange(events_, {});
}

std::vector<Event> EngineCore::round() {
  if (running() > 0) run_round();
  return std::exchange(events_, {});
}

int64_t EngineCore::running() const {
  return std::count_if(slots_.begin(), slots_.end(), [](const auto& entry) { return entry.has_value(); });
}

std::optional<double> EngineCore::pace() const {
  if (seconds_.empty()) return std::nullopt;
  double sum = 0;
  for (const double seconds : seconds_) sum += seconds;
  return sum / static_cast<double>(seconds_.size());
}

// ---- before the model is called ----

int64_t EngineCore::late(const Entry* newcomer, double pace) const {
  const int64_t least = archive_.rounds_of(number(archive_.info(), "budget_min"));
  std::vector<double> free(slots_.size(), settings_.clock());  // when each slot is
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!slots_[slot] || slots_[slot]->aborted) continue;
    const int64_t planned = archive_.still(slot).rounds, needed = std::max<int64_t>(1, least - slots_[slot]->rounds);
    free[slot] += pace * static_cast<double>(slots_[slot]->request.deadline ? std::min(planned, needed) : planned);
  }
  std::vector<const Entry*> order;
  for (const Entry& entry : waiting_)
    if (!entry.aborted) order.push_back(&entry);
  if (newcomer) order.push_back(newcomer);
  std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) { return moves_in_before(*a, *b); });
  return std::count_if(order.begin(), order.end(), [&](const Entry* entry) {
    double& end = *std::min_element(free.begin(), free.end());
    end += pace * static_cast<double>(entry->request.deadline ? least : archive_.rounds_of(entry->request.budget));
    return entry->request.deadline && end > entry->end();
  });
}

bool EngineCore::ends_in_time(const Entry& newcomer) const {
  const std::optional<double> pace = this->pace();
  return !pace || late(&newcomer, *pace) == late(nullptr, *pace);
}

void EngineCore::leave_aborted() {
  std::vector<std::pair<int64_t, Failure>> gone;
  const auto of = [](const Entry& entry) {
    return std::pair(entry.id, failure<CancelledError>("aborted", entry.request, "was cancelled: by its caller"));
  };
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!slots_[slot] || !slots_[slot]->aborted) continue;
    gone.push_back(of(*slots_[slot]));
    release(slot);
  }
  for (const Entry& entry : waiting_)
    if (entry.aborted) gone.push_back(of(entry));
  std::erase_if(waiting_, [](const Entry& entry) { return entry.aborted; });
  std::sort(gone.begin(), gone.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [id, why] : gone) tell(id, std::move(why));
}

void EngineCore::leave_late() {
  const double now = settings_.clock();
  const auto late = [now](const Entry& entry) { return entry.request.deadline && entry.end() <= now; };
  for (const Entry& entry : waiting_)
    if (late(entry))
      tell(entry.id, failure<DeadlineError>("deadline", entry.request,
                                            "was given up: its deadline of " + text_of(*entry.request.deadline) +
                                                " s came while it waited for a slot"));
  std::erase_if(waiting_, late);
}

void EngineCore::fill_slots() {
  for (size_t slot = 0; slot < slots_.size(); ++slot)
    while (!slots_[slot] && !waiting_.empty()) {
      const auto next = std::min_element(waiting_.begin(), waiting_.end(), moves_in_before);
      Entry entry = std::move(*next);
      waiting_.erase(next);
      admit(slot, std::move(entry));
    }
}

void EngineCore::admit(size_t slot, Entry entry) {
  slots_[slot] = std::move(entry);
  Entry& here = *slots_[slot];
  Request& request = here.request;
  here.admitted = settings_.clock();
  try {
    const std::optional<double> pace = this->pace();
    if (request.deadline && pace) {
      request.budget = archive_.budget_within(here.asked, rounds_within(here.end() - here.admitted, *pace));
      if (request.budget < here.asked) here.cuts.emplace_back(0, request.budget);
    }
    archive_.admit(slot, request, noise_key(request.seed, request.prompt, request.repeat));
  } catch (...) {
    fail(slot, "prompt", std::current_exception());
  }
}

void EngineCore::cut_late() {
  const std::optional<double> pace = this->pace();
  if (!pace) return;
  const double now = settings_.clock();
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!slots_[slot] || !slots_[slot]->request.deadline) continue;
    try {
      const auto [rounds, nfe] = archive_.still(slot);
      const double planned = static_cast<double>(rounds) * *pace, over = planned - (slots_[slot]->end() - now);
      if (over <= *pace) continue;
      const auto kept = static_cast<int64_t>(std::max(0.0, 1 - over / planned) * static_cast<double>(nfe));
      archive_.limit(slot, kept);
      if (archive_.still(slot).nfe < nfe) slots_[slot]->cuts.emplace_back(slots_[slot]->rounds, kept);
    } catch (...) {
      fail(slot, "model", std::current_exception());
    }
  }
}

// ---- the round ----

void EngineCore::run_round() {
  const double begin = settings_.clock();
  std::vector<Progress> progress(slots_.size());
  std::vector<bool> done(slots_.size());
  Scores scores;
  try {
    archive_.propose();
    std::vector<Lane> lanes;
    std::vector<Image> images;
    const bool shown = std::any_of(slots_.begin(), slots_.end(), [](const auto& e) { return e && e->watched; });
    if (settings_.reward || shown) lanes = archive_.lanes(), images = archive_.images();
    if (settings_.reward) {
      std::vector<std::string> prompts;
      for (const auto& entry : slots_) prompts.push_back(entry ? entry->request.prompt : "");
      scores = ask(settings_.reward, lanes, images, prompts);
      archive_.score(scores.rewards);
    } else {
      archive_.score();
    }
    const std::vector<float> rewards = shown ? archive_.rewards() : std::vector<float>();
    archive_.observe();
    for (size_t i = 0; shown && i < lanes.size(); ++i)
      if (slots_[lanes[i].slot]->watched)
        progress[lanes[i].slot].candidates.push_back({lanes[i].step, lanes[i].t, rewards[i], std::move(images[i])});
    for (size_t slot = 0; slot < slots_.size(); ++slot)
      if (slots_[slot]) done[slot] = archive_.done(slot), progress[slot].nfe = archive_.nfe(slot);
  } catch (...) {
    for (size_t slot = 0; slot < slots_.size(); ++slot)
      if (slots_[slot]) fail(slot, "model", std::current_exception());
    return;
  }
  seconds_.push_back(settings_.clock() - begin);
  if (seconds_.size() > kPaceRounds) seconds_.pop_front();
  for (const auto& [slot, error] : scores.guilty) fail(slot, "reward", error);
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!slots_[slot]) continue;
    ++slots_[slot]->rounds;
    progress[slot].budget = slots_[slot]->request.budget;
    tell(slots_[slot]->id, std::move(progress[slot]));
    if (done[slot]) finish(slot);
  }
}

void EngineCore::finish(size_t slot) {
  Result result;
  try {
    result = archive_.release(slot);
  } catch (...) {
    return tell(clear(slot).id, Failure{"model", std::current_exception()});
  }
  const Entry entry = clear(slot);
  const Request& request = entry.request;
  if (result.top.empty())
    return tell(
        entry.id,
        Failure{"model", std::make_exception_ptr(ModelError(
                             "no finished sample of prompt " + quoted(request.prompt) +
                             " has a finite reward: the model or the reward returned NaN for every particle"))});
  result.key = noise_key(request.seed, request.prompt, request.repeat);
  result.unspent = entry.asked - result.nfe;
  result.cuts = entry.cuts;
  result.seconds = settings_.clock() - entry.admitted;
  result.seconds_waited = entry.admitted - entry.arrived;
  tell(entry.id, std::move(result));
}

void EngineCore::release(size_t slot) {
  try {
    archive_.release(slot);
  } catch (const std::exception&) {  // a device that fails also here will fail the next round, which says so
  }
  clear(slot);
}

void EngineCore::fail(size_t slot, const std::string& reason, const std::exception_ptr& error) {
  const int64_t id = slots_[slot]->id;
  release(slot);
  tell(id, Failure{reason, error});
}

}  // namespace flowfast
