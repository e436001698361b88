// What a request may ask of an archive.
#pragma once

#include "runner/archive.h"

namespace flowfast {

inline constexpr int kMostSeconds = 1'000'000;  // of a deadline, as in Python
inline constexpr int kMostPriority = 1000;
inline constexpr int64_t kMostWaiting = 1'000'000'000;

// A number of the manifest, which load_archive has checked.
int64_t number(const Info& info, const char* entry);

// The request as the archive runs it. Throws BudgetError, PromptError, OptionError.
Request checked(Request request, const Info& info);

}  // namespace flowfast
