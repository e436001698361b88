// The runner on a real archive of `scenes`: flowfast_archive_tests ARCHIVE. Equal requests give equal bits, alone,
// among others, and while another Searcher of the process is at work.
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <clocale>
#include <cmath>
#include <cstdlib>
#include <locale>
#include <numeric>
#include <thread>

#include "runner/searcher.h"
#include "tests/check.h"

namespace flowfast {
namespace {

const std::string kPrompts[] = {"three red circles and one blue square", "two yellow crosses and a green triangle",
                                "a red circle left of a green triangle", "four blue squares", "one green cross"};

std::vector<Request> requests() {
  std::vector<Request> some;
  for (const std::string& prompt : kPrompts) some.push_back({.prompt = prompt, .budget = 24, .seed = 7});
  return some;
}

bool same(const Result& a, const Result& b) {
  return a.reward() == b.reward() && a.path() == b.path() && a.image().pixels == b.image().pixels && a.key == b.key;
}

template <class E>
bool throws(const Handle& handle) {
  try {
    handle.get();
    return false;
  } catch (const E&) {
    return true;
  }
}

void equal_requests_give_equal_bits(const std::string& archive) {
  Searcher one(archive, {.threads = 1}), other(archive, {.threads = 1});
  const std::vector<Request> wanted = requests();  // more than there are slots
  CHECK(static_cast<int64_t>(wanted.size()) > std::stoll(one.info().at("slots")));
  std::vector<Result> alone, together[2];
  for (const Request& request : wanted) alone.push_back(one.submit(request).get());
  std::thread thread([&] { together[0] = other.search({wanted.rbegin(), wanted.rend()}); });
  together[1] = one.search(wanted);
  thread.join();
  std::reverse(together[0].begin(), together[0].end());
  for (size_t i = 0; i < wanted.size(); ++i) {
    CHECK(same(alone[i], together[0][i]) && same(alone[i], together[1][i]), "request %zu", i);
    CHECK(alone[i].nfe + alone[i].unspent == 24 && alone[i].nfe <= 24 && alone[i].reward_calls > 0);
    CHECK(alone[i].image().channels == 3 && alone[i].image().pixels.size() == 3 * 32 * 32);
    CHECK(alone[i].top[0].latent.size() == 3 * 32 * 32);
  }
  CHECK(!same(alone[0], alone[1]));
  Request again = wanted[0];
  again.repeat = 1;
  CHECK(one.submit(again).get().key != alone[0].key);
}

void a_request_ends_before_its_time(const std::string& archive) {
  Searcher searcher(archive, {.threads = 1});
  const Request request = requests()[0];
  const Result whole = searcher.submit(request).get();
  int rounds = 0;
  std::atomic<const Handle*> self = nullptr;
  Request longer = request;
  longer.budget = 100;
  const Handle cancelled = searcher.submit(longer, [&](const Progress& progress) {
    CHECK(progress.budget == 100 && progress.nfe > 0 && !progress.candidates.empty());
    CHECK(progress.candidates[0].image.pixels.size() == 3 * 32 * 32 && progress.candidates[0].t > 0);
    if (++rounds < 3) return;
    self.wait(nullptr);
    self.load()->cancel();
  });
  self = &cancelled;
  self.notify_all();
  CHECK(throws<CancelledError>(cancelled));
  CHECK(rounds == 3, "%d rounds", rounds);
  const Handle thrown = searcher.submit(longer, [](const Progress&) { throw ModelError("enough"); });
  CHECK(throws<ModelError>(thrown));
  CHECK(throws<PromptError>(searcher.submit({.prompt = "nothing it knows", .budget = 24})));
  CHECK(same(searcher.submit(request).get(), whole));  // what left its slot early left nothing there

  std::vector<Handle> left;
  {
    Searcher gone(archive, {.threads = 1});
    for (int i = 0; i < 6; ++i) left.push_back(gone.submit({.prompt = kPrompts[0], .budget = 100, .seed = i}));
  }
  for (const Handle& handle : left) CHECK(throws<CancelledError>(handle));
}

// By its budget where the pace is known as it gets its slot, else on the way; other requests keep their bits.
void a_deadline_cuts(const std::string& archive) {
  Searcher searcher(archive, {.threads = 1});
  const Request calm = requests()[0];
  Request hurried = {.prompt = kPrompts[1], .budget = 200, .deadline = 0.05};
  const Handle first = searcher.submit(hurried);
  const Result whole = searcher.submit(calm).get(), late = first.get();
  CHECK(!late.cuts.empty() && late.cuts[0].first > 0 && late.nfe < 200 && late.nfe + late.unspent == 200);
  CHECK(late.image().pixels.size() == 3 * 32 * 32 && late.path().size() > 1);
  CHECK(same(searcher.submit(calm).get(), whole) && whole.cuts.empty());

  hurried.deadline = std::nullopt;
  const Result slow = searcher.submit(hurried).get();
  hurried.deadline = 0.6 * slow.seconds;
  const Result quick = searcher.submit(hurried).get();
  CHECK(quick.cuts[0].first == 0 && quick.nfe < 200 && quick.nfe + quick.unspent == 200 && slow.cuts.empty());
  hurried.deadline = 1e-6;
  CHECK(throws<DeadlineError>(searcher.submit(hurried)));
}

void guidance_up_to_1_is_off(const std::string& archive) {
  Searcher searcher(archive, {.threads = 1});
  std::vector<Result> off;
  for (const std::string& prompt : {kPrompts[0], kPrompts[1]})
    for (const double guidance : {1.0, 0.0, 0.7}) {
      off.push_back(searcher.submit({.prompt = prompt, .budget = 24, .seed = 7, .guidance = guidance}).get());
      CHECK(same(off.back(), off[off.size() > 3 ? 3 : 0]) && off.back().nfe == off[0].nfe, "guidance %g", guidance);
    }
  CHECK(!same(off[0], off[3]));  // the prompt matters
}

// Another default dtype, inference mode, a locale with decimal commas, ...: a search has the same bits.
void the_host_program_may_be_in_any_state(const std::string& archive) {
  struct Commas : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\1"; }
  };
  Request request = requests()[0];
  const Result wanted = Searcher(archive, {.threads = 1}).submit(request).get();
  const auto check = [&](const char* state) {
    try {
      CHECK(same(Searcher(archive, {.threads = 1}).submit(request).get(), wanted), "%s", state);
    } catch (const std::exception& error) {
      CHECK(false, "%s: %s", state, error.what());
    }
  };
  for (const at::ScalarType dtype : {at::kDouble, at::kHalf, at::kBFloat16}) {
    c10::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
    check(c10::toString(dtype));
  }
  c10::set_default_dtype(c10::scalarTypeToTypeMeta(at::kFloat));
  {
    const c10::InferenceMode inference;
    check("inference mode");
  }
  {
    const at::AutoGradMode gradients(true);
    check("gradients");
  }
  std::locale::global(std::locale(std::locale(), new Commas));
  check("the C++ locale");
  std::locale::global(std::locale::classic());
  if (std::getenv("LOCPATH")) {  // tests/runner made one
    CHECK(std::setlocale(LC_ALL, "de_DE.UTF-8") && std::string(std::localeconv()->decimal_point) == ",");
    check("the C locale");
    std::setlocale(LC_ALL, "C");
  }
  for (const int rounding : {FE_UPWARD, FE_TOWARDZERO}) {
    std::fesetround(rounding);
    at::globalContext().setFlushDenormal(true);
    check("rounding and denormals");
  }
  at::globalContext().setFlushDenormal(false);
  std::fesetround(FE_TONEAREST);
}

void the_host_scores(const std::string& archive) {
  const auto mean = [](const Image& image) {
    return std::accumulate(image.pixels.begin(), image.pixels.end(), 0.0f) / static_cast<float>(image.pixels.size());
  };
  Searcher searcher(archive, {.threads = 1, .reward = [&](auto images, auto prompts, auto times) {
                                std::vector<float> scores;
                                for (size_t i = 0; i < images.size(); ++i) {
                                  CHECK(prompts[i] == kPrompts[0] || prompts[i] == kPrompts[1]);
                                  CHECK(times[i] >= 0 && times[i] <= 1);
                                  scores.push_back(prompts[i] == kPrompts[0] ? mean(images[i]) : -mean(images[i]));
                                }
                                return scores;
                              }});
  const std::vector<Result> found = searcher.search(
      {{.prompt = kPrompts[0], .budget = 60}, {.prompt = kPrompts[1], .budget = 60}});
  CHECK(std::abs(found[0].reward() - mean(found[0].image())) < 1e-5);
  CHECK(std::abs(found[1].reward() + mean(found[1].image())) < 1e-5);
}

}  // namespace
}  // namespace flowfast

int main(int argc, char** argv) {
  if (argc != 2) return std::printf("usage: flowfast_archive_tests ARCHIVE\n"), 2;
  flowfast::equal_requests_give_equal_bits(argv[1]);
  flowfast::a_request_ends_before_its_time(argv[1]);
  flowfast::a_deadline_cuts(argv[1]);
  flowfast::guidance_up_to_1_is_off(argv[1]);
  flowfast::the_host_program_may_be_in_any_state(argv[1]);
  flowfast::the_host_scores(argv[1]);
  if (flowfast::failures > 0) return std::printf("%d checks failed\n", flowfast::failures), 1;
  std::printf("runner on %s: all checks passed\n", argv[1]);
  return 0;
}
