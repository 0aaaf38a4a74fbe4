// How gather_grad_weight.cu shares a problem among its blocks: what claims and the launcher know.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>

#include "../problem.h"

namespace dwconv {

// Patches of taps that are compiled, and the gradients of a thread whose loads are in flight together.
struct GatherPatch {
  int rows, columns, together;
};
inline constexpr GatherPatch kGatherPatches[] = {{3, 3, 1}, {1, 8, 1}, {8, 1, 1}, {2, 2, 2}, {1, 1, 4}};

inline constexpr int kGatherThreads = 512, kGatherBlocks = 2;  // of a block, at most, and blocks of a multiprocessor

// A block sums a patch over 2^lane_bits filters that lie side by side; 2^split_bits blocks, a cluster, share the
// gradients.
struct GatherShape {
  int patch = 0, lane_bits = 0, split_bits = 0;
  int64_t blocks = 0;
  double cycles = std::numeric_limits<double>::infinity();  // that it is thought to take

  // The best one, on so many multiprocessors.
  static GatherShape best(const Problem& p, bool clusters, int multiprocessors) {
    GatherShape best;
    const bool channels_last = p.filters() > 1 && p.input.stride[1] == 1 && p.output.stride[1] == 1;
    int most = 0;
    while (channels_last && most < 5 && (2 << most) * 2 <= 3 * p.filters()) ++most;
    for (int patch = 0; patch < static_cast<int>(std::size(kGatherPatches)); ++patch)
      for (int lane_bits = std::min(most, 3);; lane_bits = most) {
        for (int split_bits = 0; split_bits <= (clusters ? 3 : 0); ++split_bits) {
          GatherShape shape{patch, lane_bits, split_bits};
          const bool one_turn = shape.estimate(p, multiprocessors) == 1;
          if (shape.cycles < best.cycles) best = shape;
          if (one_turn) break;
        }
        if (lane_bits == most) break;
      }
    return best;
  }

 private:
  // Blocks that are beside each other on a multiprocessor take turns: one is as long as loads take, or as it takes to
  // issue it. Returns the turns of a thread.
  double estimate(const Problem& p, int multiprocessors) {
    constexpr double kOfBlock = 2000, kOfCluster = 1000, kLatency = 700, kOfPlace = 10, kOfTap = 2.25, kOfSum = 40;
    const auto [rows, columns, together] = kGatherPatches[patch];
    const int taps = rows * columns, lanes = 1 << lane_bits;
    const int64_t patches = (p.kernel_h + rows - 1) / rows * ((p.kernel_w + columns - 1) / columns);
    blocks = ((p.filters() + lanes - 1) / lanes * patches) << split_bits;
    const auto gradients = static_cast<double>(p.batch * p.out_height * p.out_width);
    const double slots = static_cast<double>(kGatherThreads >> lane_bits << split_bits) * together;
    const double turns = std::ceil(gradients / slots);
    const double warps = std::min(std::ceil(gradients / slots * kGatherThreads / 32), kGatherThreads / 32.);
    const double share = static_cast<double>(blocks) / multiprocessors;
    const double room = std::min(std::floor(kGatherBlocks * kGatherThreads / 32 / warps), 32.);
    // Lanes beside each other read one line, others each their own.
    const double lines = lane_bits == 0 ? 1.5 : 32 >> lane_bits;
    const double issue = warps * together * std::max(kOfPlace + kOfTap * taps, lines * (taps + 1));
    const double turn = std::max(kLatency, std::min(std::ceil(share), room) * issue);
    cycles = std::ceil(share / room) * (kOfBlock + turns * turn + kOfSum * taps + (split_bits > 0 ? kOfCluster : 0));
    constexpr double kLongSum = 64;  // loses digits in float32
    if (turns * together > kLongSum) cycles *= 2;
    return turns;
  }
};

}  // namespace dwconv
