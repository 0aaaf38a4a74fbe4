// How much shared memory rows take that stream through it: what claims ask before, and the kernels' launchers after.
#pragma once

#include <cstdint>

namespace dwconv {

constexpr int kUnit = 16;      // bytes that are copied at once
constexpr int kZeros = 64;     // offset of 128 bytes of zeros: what a row outside the image is read from
constexpr int kHead = 256;     // offset of the first ring: room for a read before a row's beginning
constexpr int kTail = 128;     // bytes behind a ring: room for its last 16 bytes and a read behind a row's end
constexpr int kDepth = 2;      // chunks under way: one is read while the next one arrives
constexpr int kLeastRows = 4;  // of a chunk that is a band

// Kernels whose rows become band matrices: how many columns these have, and what they are made from for a row. Wide are
// those of one row.
constexpr int kMaxBandColumns = 9, kMaxWideColumns = 17;
constexpr int kBandRowBytes = 96, kWideRowBytes = 128, kSpreadRowBytes = 96;
constexpr int kChunkBytes = 128;    // what is known of the chunks under way
constexpr int kBandHeadBytes = 16;  // before the first row: the bias

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The fewest rows that are a multiple of 16 bytes.
inline int64_t period_of(int64_t row_bytes) {
  int64_t period = 1;
  while (period * row_bytes % kUnit != 0) period *= 2;
  return period;
}

// Rows of a ring for chunks of some planes each, of `rows` rows together.
inline int64_t rows_for_planes(int64_t rows, int64_t row_bytes) {
  const int64_t period = period_of(row_bytes);
  return round_up(kDepth * (rows + period) + 1, period);
}

// The same where a chunk is a band of a plane, `step` rows below the one before: all rows from the first one of a chunk
// to the last one of the chunk kDepth further on.
inline int64_t rows_for_bands(int64_t bands, int64_t step, int64_t extent, int64_t row_bytes) {
  const int64_t period = period_of(row_bytes), planes = 1 + (kDepth + bands - 1) / bands;
  return round_up(kDepth * step + planes * (extent + period) + 1, period);
}

// What the rows of a chunk take up where each chunk has a place of its own: a multiple of 128 bytes.
inline int64_t stage_bytes(int64_t rows, int64_t row_bytes) {
  return round_up(rows * row_bytes + kUnit, 128);
}

// What a ring takes up: a multiple of 128 bytes.
inline int64_t ring_bytes(int64_t rows, int64_t row_bytes) {
  return round_up(rows * row_bytes + kUnit + kTail, 128);
}

}  // namespace dwconv
