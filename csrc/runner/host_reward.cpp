#include "runner/host_reward.h"

#include <algorithm>
#include <limits>
#include <set>
#include <span>

namespace flowfast {
namespace {

// One call of the host's reward.
std::vector<float> call(const HostReward& reward, std::span<const Image> images, std::span<const std::string> prompts,
                        std::span<const float> times) {
  std::vector<float> found;
  try {
    found = reward(images, prompts, times);
  } catch (const std::exception& error) {
    throw RewardError(std::string("the host's reward failed: ") + error.what());
  } catch (...) {
    throw RewardError("the host's reward failed: it threw something that is no std::exception");
  }
  if (found.size() != images.size())
    throw RewardError("the host's reward must return one score an image, " + std::to_string(images.size()) + ", got " +
                      std::to_string(found.size()));
  return found;
}

// Writes the rewards of these lanes. Throws RewardError.
void ask_for(const std::vector<size_t>& some, const HostReward& reward, const std::vector<Lane>& lanes,
             const std::vector<Image>& images, const std::vector<std::string>& prompts, std::vector<float>& rewards) {
  if (some.empty()) return;
  std::vector<Image> copied;
  std::vector<std::string> said;
  std::vector<float> times;
  const bool all = some.size() == images.size();
  for (const size_t i : some) {
    if (!all) copied.push_back(images[i]);
    said.push_back(prompts.at(lanes[i].slot));
    times.push_back(lanes[i].t);
  }
  const std::span<const Image> shown(all ? images : copied);
  const size_t values = std::max<size_t>(1, shown[0].pixels.size());
  const size_t step = std::clamp<size_t>(kMostValues / values, 1, kMostImages);
  for (size_t start = 0; start < some.size(); start += step) {
    const size_t count = std::min(step, some.size() - start);
    const std::vector<float> found = call(reward, shown.subspan(start, count), {&said[start], count},
                                          {&times[start], count});
    for (size_t i = 0; i < count; ++i) rewards[some[start + i]] = found[i];
  }
}

}  // namespace

Scores ask(const HostReward& reward, const std::vector<Lane>& lanes, const std::vector<Image>& images,
           const std::vector<std::string>& prompts) {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  Scores scores{std::vector<float>(lanes.size(), kNone), {}};
  std::vector<size_t> sound;
  std::set<int64_t> slots;
  for (size_t i = 0; i < lanes.size(); ++i)
    if (is_finite(images.at(i))) sound.push_back(i), slots.insert(lanes[i].slot);
  try {
    ask_for(sound, reward, lanes, images, prompts, scores.rewards);
    return scores;
  } catch (const RewardError&) {
    if (slots.size() == 1) scores.guilty[*slots.begin()] = std::current_exception();
  }
  scores.rewards.assign(lanes.size(), kNone);
  for (const int64_t slot : slots) {
    if (scores.guilty.contains(slot)) break;  // it is the only one
    std::vector<size_t> own;
    std::copy_if(sound.begin(), sound.end(), std::back_inserter(own), [&](size_t i) { return lanes[i].slot == slot; });
    try {
      ask_for(own, reward, lanes, images, prompts, scores.rewards);
    } catch (const RewardError&) {
      scores.guilty[slot] = std::current_exception();
    }
  }
  return scores;
}

}  // namespace flowfast
