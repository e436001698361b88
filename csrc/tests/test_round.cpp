// The rules of core/round.h on states small enough to work out by hand. Where they meet each other, the PyTorch
// reference and this agree on random states (tests/ops/test_decide.py).
#include "core/round.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "tests/check.h"

namespace flowfast {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

// One slot at its start: chains want two lanes each, every transition is scored, costs one NFE and takes no first child.
// Guidance is 3.
struct Small {
  explicit Small(int64_t chains) : Small(Sizes{1, chains, 2, 4, 2 * chains, 1}) {}
  explicit Small(const Sizes& sizes) : Small(sizes, extents_of(sizes)) {}
  Small(const Sizes& sizes, const Extents& extents)
      : ints(extents.ints), floats(extents.floats), flags(extents.flags), rewards(sizes.widest) {
    static_cast<Sizes&>(round) = sizes;
    lay_out(sizes, ints.get(), floats.get(), flags.get(), round);
    round.seen = sizes.widest;
    round.rewards = rewards.get();
    round.temperature = 1.0f;
    for (int64_t b = 0; b < sizes.chains; ++b) {
      round.alive[b] = true;
      round.of_chain(kQuota, b) = 2;
      round.of_chain(kLeft, b) = 9;
      for (ScoreRow what : {kThreshold, kBestChild, kChildReward, kReward}) round.of_score(what, b) = kNone;
    }
    for (int64_t t = 0; t < sizes.transitions; ++t) set(round.scored, t, true);
    cost({1, 1, 1, 1});
    round.top_reward[0] = kNone;
    set(round.slot_real, kGuidance, 3.0f);
    set(round.slot_real, kUntil, kInf);
  }

  // NFE of an evaluation at each transition.
  void cost(std::initializer_list<int64_t> passes) {
    std::copy(passes.begin(), passes.end(), const_cast<int64_t*>(round.passes));
    for (int64_t t = round.transitions - 1; t >= 0; --t) set(round.to_end, t, round.to_end[t + 1] + round.passes[t]);
  }

  static Extents extents_of(const Sizes& sizes) {
    Fields fields;
    return lay_out(sizes, nullptr, nullptr, nullptr, fields);
  }

  // What a round only reads.
  template <class T>
  static void set(const T* field, int64_t i, T value) {
    const_cast<T*>(field)[i] = value;
  }

  // All chains at transition `at`; what comes back of the lanes; the decision.
  void run(int64_t at, std::initializer_list<float> back) {
    for (int64_t b = 0; b < round.chains; ++b) round.of_chain(kChainTransition, b) = at;
    assign_lanes(round, round.widest);
    std::copy(back.begin(), back.end(), rewards.get());
    decide_round(round);
  }

  Round round{};
  Exact<int64_t> ints;
  Exact<float> floats;
  Exact<bool> flags;
  Exact<float> rewards;
};

void lanes_that_are_scored_come_first() {
  Small small(3);
  Small::set(small.round.scored, 0, false);
  small.round.of_chain(kChainTransition, 1) = 1;
  assign_lanes(small.round, 6);
  const int64_t cells[] = {2, 3, 0, 1, 4, 5};
  for (int64_t i = 0; i < 6; ++i) CHECK(small.round.of_lane(kCell, i) == cells[i], "lane %ld", i);
}

void a_centre_is_taken_off() {
  for (const float centre : {0.0f, 1.5f}) {
    Small greedy(1), spent(1);
    for (Small* small : {&greedy, &spent}) Small::set(small->round.centre, 1, centre);
    Small::set(greedy.round.accept, 1, true);
    greedy.round.of_score(kThreshold, 0) = 1.0f;
    greedy.run(1, {2.0f, 0.5f});
    CHECK(greedy.round.advance[0] == (centre == 0.0f ? kAccepted : kSpent), "first child, centre %g", centre);
    spent.run(1, {2.0f, 0.5f});
    CHECK(spent.round.of_score(kThreshold, 0) == 2.0f - centre, "threshold, centre %g", centre);
    CHECK(spent.round.of_score(kReward, 0) == 2.0f, "reward, centre %g", centre);
  }
}

void a_picture_that_is_not_finite_never_wins() {
  for (const float sum : {kInf, -kInf, kNan}) {
    Small small(1);
    Small::set(small.round.image_sum, 0, sum);
    small.run(1, {5.0f, 1.0f});
    CHECK(small.round.status[0] == kSeen && small.round.status[1] == kBest, "sum %g", sum);
    CHECK(small.round.dense[0] == kNone && small.round.of_slot(kNanRewards, 0) == 1, "sum %g", sum);
  }
}

void evaluations_cost_what_their_transition_says() {
  Small small(1);
  small.cost({10, 11, 12, 13});
  small.round.of_chain(kLeft, 0) = 40;
  Small::set(small.round.accept, 2, true);
  small.run(2, {1.0f, 0.0f});
  CHECK(small.round.advance[0] == kAccepted && small.round.of_slot(kRewardCalls, 0) == 2);
  CHECK(small.round.of_slot(kNfe, 0) == 24 && small.round.of_slot(kNfeSpeculative, 0) == 12);
  CHECK(small.round.of_slot(kEvaluations, 0) == 2);
  CHECK(small.round.of_chain(kLeft, 0) == 16, "%ld left", small.round.of_chain(kLeft, 0));
}

// Chain b at transition b; what it has left, and what of that it may try there.
void a_quota_leaves_what_the_later_transitions_cost() {
  const int64_t left[][4] = {{0, 0, 0, 0}, {5, 3, 1, 0}, {6, 5, 2, 1}, {7, 6, 4, 1}, {9, 7, 5, 2}, {99, 99, 99, 99}};
  const int64_t quota[][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {1, 1, 0, 1}, {2, 1, 1, 1}, {4, 2, 2, 2}, {9, 9, 9, 9}};
  for (int64_t i = 0; i < 6; ++i) {
    Small small(4);
    small.cost({1, 2, 2, 1});
    for (int64_t b = 0; b < 4; ++b) {
      small.round.of_chain(kChainTransition, b) = b;
      small.round.of_chain(kQuota, b) = 9;
      small.round.of_chain(kLeft, b) = left[i][b];
    }
    assign_lanes(small.round, 8);
    for (int64_t b = 0; b < 4; ++b)
      CHECK(small.round.of_chain(kQuota, b) == quota[i][b], "quota %ld of %ld left at %ld",
            small.round.of_chain(kQuota, b), left[i][b], b);
  }
}

// Chains 0 and 3 take the null pass, chain 1 has one pass, chain 2 is over; the last lane is cut off.
void lanes_of_the_null_pass_are_named() {
  Small small(4);
  Round& r = small.round;
  small.cost({2, 1, 2, 2});
  for (int64_t b = 0; b < 4; ++b) r.of_chain(kChainTransition, b) = b;
  r.alive[2] = false;
  assign_lanes(r, 5);
  const int64_t named[] = {0, 1, 4, -1, -1, -1, -1, -1};
  const float guidance[] = {3.0f, 3.0f, 1.0f, 1.0f, 3.0f, 1.0f, 1.0f, 1.0f};
  for (int64_t i = 0; i < 8; ++i) {
    CHECK(r.null_lane[i] == named[i], "null lane %ld is %ld", i, r.null_lane[i]);
    CHECK(r.lane_real[kLaneGuidance * 8 + i] == guidance[i], "guidance of lane %ld", i);
  }
}

// Chain 1 has a model that broke; nobody reads a score.
void a_step_without_scores_leaves_what_scores_decide() {
  Small small(2);
  Round& r = small.round;
  Small::set(r.scored, 1, false), Small::set(r.accept, 1, true), Small::set(r.finished, 1, true);
  for (int64_t b = 0; b < 2; ++b) {
    r.of_score(kThreshold, b) = -1.0f;
    r.of_score(kChildReward, b) = 3.0f;
    r.of_score(kReward, b) = 0.25f;
  }
  r.broken[2] = r.broken[3] = true;
  small.run(1, {9.0f, 9.0f, 9.0f, 9.0f});
  CHECK(r.advance[0] == kSpent && r.advance[1] == kDead && r.alive[0] && !r.alive[1]);
  CHECK(r.of_chain(kChainTransition, 0) == 2 && r.status[0] == kBest && r.dense[0] != r.dense[0]);
  for (int64_t b = 0; b < 2; ++b)
    CHECK(r.of_score(kThreshold, b) == -1.0f && r.of_score(kChildReward, b) == 3.0f && r.of_score(kReward, b) == 0.25f);
  CHECK(r.top_reward[0] == kNone, "a finished sample of %g", r.top_reward[0]);
  CHECK(r.of_slot(kNfe, 0) == 4 && r.of_slot(kRewardCalls, 0) == 0 && r.of_slot(kNanRewards, 0) == 0);
}

}  // namespace

void test_round() {
  lanes_that_are_scored_come_first();
  a_centre_is_taken_off();
  a_picture_that_is_not_finite_never_wins();
  evaluations_cost_what_their_transition_says();
  a_quota_leaves_what_the_later_transitions_cost();
  lanes_of_the_null_pass_are_named();
  a_step_without_scores_leaves_what_scores_decide();
}

}  // namespace flowfast
