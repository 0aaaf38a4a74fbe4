// What claims_little.cpp and gather.cu know.
#pragma once

#include <algorithm>

#include "../problem.h"

namespace dwconv {

inline constexpr int64_t kGatherStride = 8;  // of grad_input, at most

// In channels_last a block has some channels, whose filters it has in shared memory, each an odd number of elements
// behind the one before.
struct GatherTile {
  static constexpr int64_t kMostBytes = 48 << 10;
  int64_t channels = 0, filters = 0, bytes = 0;

  explicit GatherTile(const Problem& p) {
    const bool forward = p.pass == Pass::kForward;
    const int64_t all = forward ? p.filters() : p.channels, fan_in = forward ? 1 : p.multiplier;
    if (all == 1 || (forward ? p.output : p.input).stride[1] != 1 || p.taps() == 1) return;
    constexpr int64_t kLeastChannels = 8, kMostChannels = 32, kMostElements = 2048;  // so that few loads are waited for
    const int64_t each = fan_in * (p.taps() | 1) * std::max<int64_t>(size_of(p.dtype), 4);
    const int64_t few = std::clamp<int64_t>(kMostElements / (fan_in * p.taps()), kLeastChannels, kMostChannels);
    const int64_t most = std::clamp<int64_t>(kMostBytes / each, 1, few);
    const int64_t tiles = (all + most - 1) / most;
    channels = (all + tiles - 1) / tiles, filters = channels * fan_in, bytes = channels * each;
  }

  bool fits() const { return bytes <= kMostBytes; }
};

}  // namespace dwconv
