#include "runner/tests/fake_archive.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "runner/archive.h"

namespace flowfast {
namespace {

class FakeArchive final : public Archive {
 public:
  explicit FakeArchive(Fake& fake)
      : fake_(fake),
        slots_(fake.slots),
        info_({{"slots", std::to_string(fake.slots)},
               {"budget_min", "1"},
               {"budget_max", "1000000000"},
               {"passes", std::to_string(fake.passes)},
               {"guidance", std::to_string(fake.guidance)}}) {}

  const Info& info() const override { return info_; }
  void enter_thread() override {}

  void admit(int64_t slot, const Request& request, int64_t key) override {
    if (fake_.unreadable.contains(request.prompt)) throw PromptError("the fake cannot read it");
    slots_.at(slot) = {request, key, 0, true};
    const std::lock_guard lock(fake_.mutex);
    fake_.guided.push_back(request.guidance.value());
    fake_.budgets.push_back(request.budget);
  }

  Result release(int64_t slot) override {
    Slot& s = slots_.at(slot);
    s.on = false;
    if (fake_.lost.contains(s.request.prompt)) throw ModelError("the fake lost it");
    Result result;
    result.nfe = s.round;
    if (s.round > 0 && s.request.prompt != "only NaN") {
      Sample& sample = result.top.emplace_back();
      sample.reward = s.reward;
      sample.image = {1, 1, 1, {static_cast<float>(s.round)}};
      sample.path.push_back({0, s.round - 1, 0});
    }
    return result;
  }

  void propose() override {
    std::unique_lock lock(fake_.mutex);
    std::vector<std::string> prompts;
    for (const Slot& s : slots_)
      if (s.on) prompts.push_back(s.request.prompt);
    fake_.rounds.push_back(prompts);
    fake_.inside = true;
    fake_.changed.notify_all();
    fake_.changed.wait(lock, [&] { return !fake_.held || !fake_.inside; });
    fake_.inside = false;
    if (fake_.in_round) fake_.in_round();
    for (const Slot& s : slots_)
      if (const auto at = fake_.failing.find(s.request.prompt); s.on && at != fake_.failing.end())
        if (at->second == s.round + 1) throw ModelError("the fake failed");
  }

  std::vector<Lane> lanes() override {
    std::vector<Lane> lanes;
    for (int64_t slot = 0; slot < fake_.slots; ++slot)
      for (int64_t lane = 0; slots_[slot].on && lane < fake_.lanes; ++lane)
        lanes.push_back({slot, {0, slots_[slot].round, lane}, 0.5f});
    return lanes;
  }

  std::vector<Image> images() override {
    std::vector<Image> images;
    const int side = static_cast<int>(fake_.side);
    for (const Slot& s : slots_)
      for (int64_t lane = 0; s.on && lane < fake_.lanes; ++lane) {
        const float pixel = s.round == fake_.hole ? NAN : static_cast<float>(s.round * fake_.lanes + lane);
        images.push_back({1, side, side, std::vector<float>(side * side, pixel)});
      }
    return images;
  }

  void score() override { score(std::vector<float>(lanes().size(), 7.0f)); }
  void score(const std::vector<float>& rewards) override {
    rewards_ = rewards;
    size_t i = 0;
    for (Slot& s : slots_)
      if (s.on) s.reward = rewards.at(i), i += fake_.lanes;
  }
  std::vector<float> rewards() override { return rewards_; }

  void observe() override {
    for (Slot& s : slots_) s.round += s.on;
  }
  bool done(int64_t slot) override { return slots_.at(slot).round >= slots_.at(slot).request.budget; }
  int64_t nfe(int64_t slot) override { return slots_.at(slot).round; }

  Still still(int64_t slot) override {
    const int64_t left = slots_.at(slot).request.budget - slots_.at(slot).round;
    return {left, left};
  }
  void limit(int64_t slot, int64_t nfe) override {
    Slot& s = slots_.at(slot);
    if (fake_.cuts) s.request.budget = std::min(s.request.budget, s.round + std::max<int64_t>(1, nfe));
  }
  int64_t rounds_of(int64_t budget) override { return budget; }
  int64_t budget_within(int64_t budget, int64_t rounds) override {
    return fake_.cuts ? std::clamp<int64_t>(rounds, 1, budget) : budget;
  }

 private:
  struct Slot {
    Request request;
    int64_t key = 0, round = 0;
    bool on = false;
    float reward = 0;
  };

  Fake& fake_;
  std::vector<Slot> slots_;
  std::vector<float> rewards_;
  const Info info_;
};

}  // namespace

void Fake::hold() {
  const std::lock_guard lock(mutex);
  held = true;
}

std::vector<std::string> Fake::wait_for_round() {
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return inside; });
  return rounds.back();
}

void Fake::next_round() {
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return inside; });
  inside = false;
  changed.notify_all();
}

void Fake::let_go() {
  const std::lock_guard lock(mutex);
  held = false;
  changed.notify_all();
}

Fake& fake(const std::string& name) {
  static std::mutex mutex;
  static std::map<std::string, Fake> fakes;
  const std::lock_guard lock(mutex);
  return fakes[name];
}

std::unique_ptr<Archive> load_archive(const std::string& path, const Options&) {
  if (path.empty()) throw ArchiveError("no such archive");
  return std::make_unique<FakeArchive>(fake(path));
}

}  // namespace flowfast
