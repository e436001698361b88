#include "runner/request.h"

#include <algorithm>
#include <cmath>

#include "runner/text.h"

namespace flowfast {

int64_t number(const Info& info, const char* entry) { return std::stoll(info.at(entry)); }

Request checked(Request request, const Info& info) {
  const int64_t least = number(info, "budget_min"), most = number(info, "budget_max");
  if (request.budget < least || request.budget > most)
    throw BudgetError("this archive runs budgets of " + std::to_string(least) + " to " + std::to_string(most) +
                      " NFE, got " + std::to_string(request.budget) + ": change it or export for another range");
  const bool unread = info.contains("reads_prompts") && info.at("reads_prompts") == "0";
  const std::string negative = request.negative_prompt.value_or("");
  for (const auto& fault : {fault_of(request.prompt, unread), fault_of(negative, true)})
    if (fault) throw PromptError("the prompt cannot be drawn: " + *fault + "; write what the picture shows");
  if (request.repeat < 0) throw OptionError("repeat must be at least 0, got " + std::to_string(request.repeat));
  if (std::isnan(request.until)) throw OptionError("until must be a number, got NaN: leave it out");
  if (std::abs(int64_t{request.priority}) > kMostPriority)
    throw OptionError("priority must be from -" + std::to_string(kMostPriority) + " to " +
                      std::to_string(kMostPriority) + " (lower is earlier), got " + std::to_string(request.priority));
  if (request.deadline && !(*request.deadline > 0 && *request.deadline <= kMostSeconds))
    throw OptionError("deadline must be above 0 and at most " + std::to_string(kMostSeconds) + " seconds, got " +
                      text_of(*request.deadline) + ": leave it out where there is none");
  const double guidance = request.guidance.value_or(*number_in<double>(info.at("guidance")));
  if (!(guidance >= 0 && guidance <= 1000))
    throw OptionError("guidance must be a number from 0 to 1000 (up to 1 is off), got " + text_of(guidance));
  request.guidance = std::max(guidance, 1.0);  // up to 1 is off; the ops mean the unconditional model by 0
  if (number(info, "passes") == 1 && *request.guidance != 1.0)
    throw OptionError("this archive was exported without guidance, got guidance " + text_of(guidance) +
                      ": leave it out (up to 1 is off) or export with guidance");
  return request;
}

}  // namespace flowfast
