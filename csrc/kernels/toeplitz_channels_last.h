// What claims_channels_last.cpp and the launcher of kernels/toeplitz_channels_last.cu have to know of it.
#pragma once

#include <algorithm>

#include "exchange.h"
#include "mapping.h"
#include "stream.h"

namespace dwconv {

// What a kernel of it is compiled for: kernels of at most 9 x 9; of 13 rows; of 5 rows that are wide; and any kernel on
// images so small that the sums of all their rows are in registers.
enum class BandShape { kNone, kSmall, kTall, kWide, kWhole };

constexpr int kMaxSmallRows = 9, kMaxTallRows = 13, kMaxWideRows = 5;
constexpr int kTallBlocks = 3, kWideBlocks = 8;           // of 8 columns, see BandWindow
constexpr int kMaxWholeRows = 14, kMaxWholeColumns = 16;  // of an image, whose columns are two blocks:
constexpr int kWholeBlocks = 3, kWholeLead = 8;           // the first one before, or the last one behind, is outside
// What the smallest block takes of shared memory, or a little more.
constexpr int64_t kWholeBytes = 136 << 10, kMoreBytes = 64 << 10;
constexpr int64_t kStridedBytes = 112 << 10;  // what a block takes at stride 2, at most

// The columns of the source that 8 columns of the target read, in blocks of 8, but for those outside of the image
// whichever 8 columns these are. The first block begins `lead` columns before the 8.
struct BandWindow {
  int lead, blocks;

  BandWindow(const Mapping& map, int kernel_w) {
    lead = std::min(map.padding_w, (map.out_width - 1) / 8 * 8);
    blocks = (lead + std::min(map.width, 7 + kernel_w - map.padding_w) + 7) / 8;
  }
};

inline BandShape band_shape_of(const Problem& p) {
  const Mapping map(p);
  if (p.kernel_h <= kMaxSmallRows && p.kernel_w <= kMaxBandColumns) return BandShape::kSmall;
  const int blocks = BandWindow(map, static_cast<int>(p.kernel_w)).blocks;
  if (p.shared_memory < kMoreBytes) return BandShape::kNone;
  if (p.kernel_h <= kMaxWideRows && blocks <= kWideBlocks) return BandShape::kWide;
  if (p.kernel_h <= kMaxTallRows && blocks <= kTallBlocks) return BandShape::kTall;
  const bool whole =
      std::max(map.height, map.out_height) <= kMaxWholeRows && std::max(map.width, map.out_width) <= kMaxWholeColumns;
  return whole && p.shared_memory >= kWholeBytes ? BandShape::kWhole : BandShape::kNone;
}

}  // namespace dwconv
