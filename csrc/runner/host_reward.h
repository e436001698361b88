// A round's images scored by the host, in bounded calls.
#pragma once

#include <exception>
#include <map>
#include <string>
#include <vector>

#include "runner/archive.h"

namespace flowfast {

struct Scores {
  std::vector<float> rewards;                   // one a lane; NaN where none came
  std::map<int64_t, std::exception_ptr> guilty;  // by slot: its images make the reward fail, a RewardError
};

// Asks for all lanes; where that fails, again for the lanes of one slot at a time, so that only the guilty have none. The
// reward is not shown an image that is not finite, which has none: in 8 bits NaN would be black. prompts: of each slot.
Scores ask(const HostReward& reward, const std::vector<Lane>& lanes, const std::vector<Image>& images,
           const std::vector<std::string>& prompts);

}  // namespace flowfast
