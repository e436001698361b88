// assign_lanes and decide as the threads of a GPU run them (csrc/cuda), block by block in a scrambled order, against
// core/round.h from end to end: every array to the last bit.
#include "cuda/decide.h"
#include "tests/check.h"
#include "tests/serial_block.h"

namespace flowfast {
namespace {

struct Shape {
  int64_t slots, chains, lanes, transitions, top, widest, bytes;
};

// A state in the middle of a search, with ties among the rewards; chains may be dead, over, or out of quota.
class State {
 public:
  State(uint64_t seed, const Shape& sizes) : random_(seed), sizes_(sizes) {
    const auto& [S, C, K, T, top, N, bytes] = sizes;
    const int64_t B = S * C;
    Round& r = decision_.round;
    static_cast<Sizes&>(r) = {S, C, K, T, N, top};
    const Extents extents = lay_out(r, nullptr, nullptr, nullptr, r);
    Exact<int64_t>& ints = ints_.emplace_back(extents.ints);
    Exact<float>& floats = floats_.emplace_back(extents.floats);
    Exact<bool>& flags = flags_.emplace_back(extents.flags);
    for (int64_t i = 0; i < ints.size(); ++i) ints[i] = below(5);
    for (int64_t i = 0; i < floats.size(); ++i) floats[i] = static_cast<float>(below(7)) / 2;
    for (int64_t i = 0; i < flags.size(); ++i) flags[i] = random_.unit() < 0.7;
    lay_out(r, ints.get(), floats.get(), flags.get(), r);
    r.margin = static_cast<float>(below(2)) / 2;
    r.carry = below(2);
    r.temperature = 0.5f;
    r.seen = N;
    for (int64_t t = 0; t < T; ++t) {
      writable(r.passes)[t] = 1 + below(2);
      writable(r.centre)[t] = below(2) ? 0.0f : static_cast<float>(below(3)) / 2;
      writable(r.scored)[t] = random_.unit() < 0.8;
    }
    writable(r.to_end)[T] = 0;
    for (int64_t t = T - 1; t >= 0; --t) writable(r.to_end)[t] = r.to_end[t + 1] + r.passes[t];
    for (int64_t i = 0; i < B * T; ++i) r.path_chain[i] = below(C), r.path_candidate[i] = below(9);
    for (int64_t i = 0; i < S * top; ++i) r.top_transition[i] = below(T);
    for (int64_t i = 0; i < S * top * T; ++i) r.top_chain[i] = below(C), r.top_candidate[i] = below(9);
    for (int64_t b = 0; b < B; ++b) r.alive[b] = random_.unit() < 0.8;
    *r.ticket = 0;
    rewards_ = floats_.emplace_back(N).get();
    r.rewards = rewards_;
    for (int64_t b = 0; b < B; ++b) {
      r.of_chain(kActive, b) = below(2);
      r.of_chain(kChainTransition, b) = r.alive[b] ? below(T) : below(T + 1);
      r.of_chain(kLeft, b) = below(16);
    }
    if (below(2)) {
      Exact<float>& bias = floats_.emplace_back(N);
      for (int64_t i = 0; i < N; ++i) bias[i] = static_cast<float>(below(5)) / 2;
      r.bias = bias.get();
    }
    for (int64_t i = 0; i < S * top; ++i)  // best first, -inf: none yet
      r.top_reward[i] = i % top == 0 ? r.top_reward[i] : r.top_reward[i - 1] - static_cast<float>(below(3)) / 2;
    for (int64_t s = 0; s < S; ++s) {
      if (below(3) == 0) r.top_reward[s * top + top - 1] = -kInfinity;
      writable(r.slot_real)[kUntil * S + s] = below(3) == 0 ? kInfinity : static_cast<float>(below(12)) / 2;
    }
    decision_.bytes = bytes;
    decision_.next_width = below(N + 2) - 1;
    decision_.x_lane = latents(N);
    decision_.u_lane = latents(N);
    decision_.x0_lane = latents(N);
    decision_.x = latents(2 * B);
    decision_.u = latents(2 * B);
    decision_.top_x = latents(S * top);
    decision_.top_x0 = latents(S * top);
    draw_rewards();
  }

  // What came back of the lanes: ties, NaN, infinities, and means that broke.
  void draw_rewards() {
    const float odd[] = {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity};
    for (int64_t i = 0; i < sizes_.widest; ++i) {
      rewards_[i] = below(8) == 0 ? odd[below(3)] : static_cast<float>(below(7)) / 2;
      decision_.round.broken[i] = below(10) == 0;
      writable(decision_.round.image_sum)[i] = below(10) == 0 ? odd[below(3)] : 1.0f;
    }
  }

  const Decision& decision() const { return decision_; }

  bool same_bits(const State& other) const {
    return same(ints_, other.ints_) && same(floats_, other.floats_) && same(flags_, other.flags_) &&
           same(latents_, other.latents_);
  }

  int64_t below(int64_t limit) { return static_cast<int64_t>(random_.bits() % static_cast<uint64_t>(limit)); }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // What a round only reads, to set it up.
  template <class T>
  static T* writable(const T* field) {
    return const_cast<T*>(field);
  }
  char* latents(int64_t rows) {
    Exact<char>& values = latents_.emplace_back(rows * sizes_.bytes);
    for (int64_t i = 0; i < values.size(); ++i) values[i] = static_cast<char>(random_.bits());
    return values.get();
  }
  template <class T>
  static bool same(const std::vector<Exact<T>>& left, const std::vector<Exact<T>>& right) {
    for (size_t i = 0; i < left.size(); ++i)
      if (!left[i].same_bits(right[i])) return false;
    return true;
  }

  Random random_;
  Shape sizes_;
  Decision decision_{};
  float* rewards_;
  std::vector<Exact<int64_t>> ints_;
  std::vector<Exact<float>> floats_;
  std::vector<Exact<bool>> flags_;
  std::vector<Exact<char>> latents_;
};

// How often something happened, so that agreement is worth something.
struct Seen {
  int64_t children, samples, moves, discarded, stopped, null_lanes, plain_lanes;
};

// decide from end to end, with a copy of the latents that are moved in place.
void decide_serial(const Decision& task, Seen& seen) {
  const Round& r = task.round;
  const int64_t samples = r.slots * r.top, bytes = task.bytes;
  std::vector<bool> was_alive(r.alive, r.alive + r.batch());
  decide_round(r);
  for (const auto& [to, lanes] : {std::pair{task.x, task.x_lane}, {task.u, task.u_lane}})
    for (int64_t i = 0; i < 2 * r.batch(); ++i)
      if (r.store_source[i] >= 0)
        std::memcpy(static_cast<char*>(to) + i * bytes, static_cast<const char*>(lanes) + r.store_source[i] * bytes,
                    bytes);
  for (const auto& [to, lanes] : {std::pair{task.top_x, task.x_lane}, {task.top_x0, task.x0_lane}}) {
    std::vector<char> before(samples * bytes + 1);
    std::memcpy(before.data(), to, samples * bytes);
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t source = r.top_source[i];
      const char* from = source >= 0 ? static_cast<const char*>(lanes) + source * bytes
                                     : before.data() + (i - i % r.top - 1 - source) * bytes;
      std::memcpy(static_cast<char*>(to) + i * bytes, from, bytes);
    }
  }
  for (int64_t i = 0; i < 2 * r.batch(); ++i) seen.children += r.store_source[i] >= 0;
  for (int64_t i = 0; i < samples; ++i) {
    seen.samples += r.top_source[i] >= 0;
    seen.moves += r.top_source[i] < 0 && r.top_source[i] != -1 - i % r.top;
  }
  for (int64_t i = 0; i < r.batch() * r.lanes; ++i) seen.discarded += r.status[i] == kDiscarded;
  for (int64_t b = 0; b < r.batch(); ++b) seen.stopped += was_alive[b] && !r.alive[b];
  if (task.next_width >= 0) assign_lanes(r, task.next_width);
  for (int64_t i = 0; i < r.widest; ++i) {
    seen.null_lanes += r.null_lane[i] >= 0;
    seen.plain_lanes += r.lane_live[i] && !is_guided(r, r.of_lane(kLaneTransition, i));
  }
}

// All blocks of the launch, two rows too many, as a grid may have.
template <int kBytes>
void decide_by_blocks(const Decision& task, const Tile& tile) {
  const int64_t rows = task.round.batch() + task.round.slots + 2;
  const int64_t chunks = decide_chunks<kBytes>(task), blocks = rows * chunks;
  SerialBlock block;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t i = SerialBlock::scrambled(k, blocks);
    decide_block<kBytes>(block, task, i / chunks, i % chunks, blocks, tile);
  }
}

template <int kBytes>
void compare(uint64_t seed, const Shape& sizes, Seen& seen) {
  State serial(seed, sizes), threads(seed, sizes);
  SerialBlock block;
  Exact<int64_t> counts(1 + serial.below(6));
  threads.below(6);
  const Tile tile{counts.get(), counts.size()};  // of 1 to 6 chains
  const int64_t width = serial.below(sizes.widest + 1);
  threads.below(sizes.widest + 1);
  assign_lanes(serial.decision().round, width);
  assign_lanes_block(block, threads.decision().round, width, tile);
  CHECK(threads.same_bits(serial), "lanes, seed %lu", seed);
  for (int round = 0; round < 3; ++round) {
    decide_serial(serial.decision(), seen);
    decide_by_blocks<kBytes>(threads.decision(), tile);
    CHECK(threads.same_bits(serial), "the books of round %d, seed %lu, %ld chains, %ld lanes, top %ld", round, seed,
          sizes.slots * sizes.chains, sizes.lanes, sizes.top);
    serial.draw_rewards();
    threads.draw_rewards();
  }
}

template <int kBytes>
void states(uint64_t count, Seen& seen) {
  for (uint64_t seed = 0; seed < count; ++seed) {
    Random random(1000 * kBytes + seed);
    const auto up_to = [&](int64_t limit) { return 1 + static_cast<int64_t>(random.bits() % limit); };
    // A row of one block of threads, of a few accesses, or of nothing.
    const int64_t bytes = kBytes * (seed % 3 == 0 ? kBlockThreads * kCopies + 1 : seed % 3 == 1 ? 3 : seed % 2);
    compare<kBytes>(seed, {up_to(3), up_to(4), up_to(4), up_to(6), up_to(4), up_to(40), bytes}, seen);
  }
}

}  // namespace

void test_cuda_rounds() {
  Seen seen{};
  states<16>(100, seen);
  states<4>(200, seen);
  states<2>(200, seen);
  CHECK(seen.children > 500 && seen.samples > 500 && seen.moves > 200 && seen.discarded > 200 && seen.stopped > 100,
        "%ld children, %ld samples, %ld moves, %ld discarded, %ld stopped", seen.children, seen.samples, seen.moves,
        seen.discarded, seen.stopped);
  CHECK(seen.null_lanes > 500 && seen.plain_lanes > 500, "%ld and %ld lanes", seen.null_lanes, seen.plain_lanes);
  for (uint64_t seed = 0; seed < 4; ++seed)  // more chains than a block has threads, more samples than a round
    compare<16>(seed, {2, 150, 3, 5, 70, 500, 16}, seen);
}

}  // namespace flowfast
