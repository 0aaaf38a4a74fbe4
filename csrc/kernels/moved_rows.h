// Rows that begin anywhere within 16 bytes, moved to where 16 bytes begin when they are in shared memory: what claims
// ask before, and the launchers after.
#pragma once

#include <algorithm>

#include "stream.h"

namespace dwconv {

// What a row takes up there.
inline int64_t moved_row_bytes(int64_t row_bytes) {
  return round_up(row_bytes + kUnit - 1, kUnit);
}

constexpr int kMovedDepth = 3;  // chunks under way: one is read while the next one is moved, and another arrives

// Rows of a ring for chunks of `step` rows each, that meet extent - 1 more, of `bands` a plane with `padding`: all rows
// from the first one of a chunk to the last one of the chunk kMovedDepth - 1 further on, and one for each gap between
// planes.
inline int64_t rows_to_move(int64_t bands, int64_t step, int64_t extent, int64_t padding) {
  const int64_t gaps = (kMovedDepth - 2 + bands) / bands;
  return kMovedDepth * step + extent - 1 + gaps * (1 + std::max<int64_t>(extent - 1 - 2 * padding, 0));
}

}  // namespace dwconv
