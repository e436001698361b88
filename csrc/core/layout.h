// Written by csrc/write_layout.py; flowfast/ops/layout.py says what each field is. Do not edit.
#pragma once

#include <cstdint>

namespace flowfast {

enum ChainRow { kActive, kChainTransition, kQuota, kLeft, kTried, kChild, kChainRows };
enum SlotRow { kKey, kFirstChain, kNfe, kNfeSpeculative, kRewardCalls, kNanRewards, kEvaluations, kSlotRows };
enum LaneRow { kCell, kLaneSlot, kLaneTransition, kCandidate, kLaneChain, kLaneKey, kTableRow, kParent, kLaneRows };
enum ScoreRow { kThreshold, kBestChild, kChildReward, kReward, kScoreRows };
enum SlotRealRow { kGuidance, kUntil, kSlotRealRows };
enum LaneRealRow { kTime, kLinearTime, kLaneGuidance, kLaneRealRows };

struct Sizes {
  int64_t slots, chains, lanes, transitions, widest, top;
};

// Elements of the buffers.
struct Extents {
  int64_t ints, floats, flags;
};

struct Fields {
  int64_t* chain;                   // (kChainRows, B)
  int64_t* slot;                    // (kSlotRows, S)
  const int64_t* quota_table;       // (B, T)
  int64_t* path_chain;              // (B, T)
  int64_t* path_candidate;          // (B, T)
  int64_t* top_transition;          // (S, top)
  int64_t* top_chain;               // (S, top, T)
  int64_t* top_candidate;           // (S, top, T)
  const int64_t* passes;            // (T)
  const int64_t* to_end;            // (T+1)
  int64_t* lane;                    // (kLaneRows, N)
  int64_t* null_lane;               // (N)
  int64_t* position;                // (B, K)
  int64_t* status;                  // (B, K)
  int64_t* advance;                 // (B)
  int64_t* store_source;            // (2B)
  int64_t* top_source;              // (S, top)
  int64_t* ticket;                  // (1)
  float* score;                     // (kScoreRows, B)
  const float* slot_real;           // (kSlotRealRows, S)
  float* top_reward;                // (S, top)
  const float* time;                // (T+1)
  const float* linear_time;         // (T+1)
  const float* centre;              // (T)
  float* lane_real;                 // (kLaneRealRows, N)
  const float* image_sum;           // (N)
  float* dense;                     // (B, K)
  bool* alive;                      // (B)
  const bool* given;                // (S)
  const bool* accept;               // (T)
  const bool* finished;             // (T)
  const bool* scored;               // (T)
  bool* lane_live;                  // (N)
  bool* live;                       // (B, K)
  bool* broken;                     // (N)
};

// Points at the fields of packed buffers, which may be null where only the extents matter.
inline Extents lay_out(const Sizes& sizes, int64_t* ints, float* floats, bool* flags, Fields& fields) {
  const int64_t S = sizes.slots, B = S * sizes.chains, K = sizes.lanes, T = sizes.transitions;
  const int64_t N = sizes.widest, top = sizes.top;
  Extents end{0, 0, 0};
  const auto from = [](auto* buffer, int64_t at) { return buffer ? buffer + at : nullptr; };
  fields.chain = from(ints, end.ints);
  end.ints += (kChainRows * B + 1) / 2 * 2;
  fields.slot = from(ints, end.ints);
  end.ints += (kSlotRows * S + 1) / 2 * 2;
  fields.quota_table = from(ints, end.ints);
  end.ints += (B * T + 1) / 2 * 2;
  fields.path_chain = from(ints, end.ints);
  end.ints += (B * T + 1) / 2 * 2;
  fields.path_candidate = from(ints, end.ints);
  end.ints += (B * T + 1) / 2 * 2;
  fields.top_transition = from(ints, end.ints);
  end.ints += (S * top + 1) / 2 * 2;
  fields.top_chain = from(ints, end.ints);
  end.ints += (S * top * T + 1) / 2 * 2;
  fields.top_candidate = from(ints, end.ints);
  end.ints += (S * top * T + 1) / 2 * 2;
  fields.passes = from(ints, end.ints);
  end.ints += (T + 1) / 2 * 2;
  fields.to_end = from(ints, end.ints);
  end.ints += (T + 1 + 1) / 2 * 2;
  fields.lane = from(ints, end.ints);
  end.ints += (kLaneRows * N + 1) / 2 * 2;
  fields.null_lane = from(ints, end.ints);
  end.ints += (N + 1) / 2 * 2;
  fields.position = from(ints, end.ints);
  end.ints += (B * K + 1) / 2 * 2;
  fields.status = from(ints, end.ints);
  end.ints += (B * K + 1) / 2 * 2;
  fields.advance = from(ints, end.ints);
  end.ints += (B + 1) / 2 * 2;
  fields.store_source = from(ints, end.ints);
  end.ints += (2 * B + 1) / 2 * 2;
  fields.top_source = from(ints, end.ints);
  end.ints += (S * top + 1) / 2 * 2;
  fields.ticket = from(ints, end.ints);
  end.ints += (1 + 1) / 2 * 2;
  fields.score = from(floats, end.floats);
  end.floats += (kScoreRows * B + 3) / 4 * 4;
  fields.slot_real = from(floats, end.floats);
  end.floats += (kSlotRealRows * S + 3) / 4 * 4;
  fields.top_reward = from(floats, end.floats);
  end.floats += (S * top + 3) / 4 * 4;
  fields.time = from(floats, end.floats);
  end.floats += (T + 1 + 3) / 4 * 4;
  fields.linear_time = from(floats, end.floats);
  end.floats += (T + 1 + 3) / 4 * 4;
  fields.centre = from(floats, end.floats);
  end.floats += (T + 3) / 4 * 4;
  fields.lane_real = from(floats, end.floats);
  end.floats += (kLaneRealRows * N + 3) / 4 * 4;
  fields.image_sum = from(floats, end.floats);
  end.floats += (N + 3) / 4 * 4;
  fields.dense = from(floats, end.floats);
  end.floats += (B * K + 3) / 4 * 4;
  fields.alive = from(flags, end.flags);
  end.flags += (B + 15) / 16 * 16;
  fields.given = from(flags, end.flags);
  end.flags += (S + 15) / 16 * 16;
  fields.accept = from(flags, end.flags);
  end.flags += (T + 15) / 16 * 16;
  fields.finished = from(flags, end.flags);
  end.flags += (T + 15) / 16 * 16;
  fields.scored = from(flags, end.flags);
  end.flags += (T + 15) / 16 * 16;
  fields.lane_live = from(flags, end.flags);
  end.flags += (N + 15) / 16 * 16;
  fields.live = from(flags, end.flags);
  end.flags += (B * K + 15) / 16 * 16;
  fields.broken = from(flags, end.flags);
  end.flags += (N + 15) / 16 * 16;
  return end;
}

}  // namespace flowfast
