// How the warps that march down planes are laid over them: what claims ask before, and the launchers after.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dwconv {

constexpr int kMarchKernel = 7;  // the side of the kernels that are compiled
constexpr int kStrip = 7;        // columns of a lane: odd, against bank conflicts in shared memory

// A warp takes some planes side by side, and of each some strips, as many as it has lanes; more strips make spans.
struct MarchLanes {
  int64_t spans, strips, planes;
  double busy;  // the part of all lanes' columns that are the image's

  MarchLanes(int64_t width, int64_t channels) : spans(1), strips(1), planes(1), busy(0) {
    const int64_t all = (width + kStrip - 1) / kStrip;
    double most = 0;
    const int64_t least = (all + 31) / 32;
    for (int64_t cuts = least; cuts <= std::min(all, least + 7); ++cuts) {
      const int64_t side = (all + cuts - 1) / cuts, side_by_side = std::min(32 / side, channels);
      const int64_t groups = (channels + side_by_side - 1) / side_by_side;
      const double now = static_cast<double>(width) * channels / (32 * kStrip * cuts * groups);
      // Narrow spans read many columns twice, and pieces of what is loaded at once.
      const double score = cuts > 1 ? now * (kStrip * side) / (kStrip * side + 16) : now;
      if (score <= most * 1.001) continue;
      most = score, busy = now, spans = cuts, strips = side, planes = (channels + groups - 1) / groups;
    }
  }
};

}  // namespace dwconv
