// Runs of bytes of several images, such as some of their rows, that begin anywhere within 16 bytes: copied to shared
// memory with what is around them within these, and there moved to where 16 bytes begin.
#pragma once

#include "copies.cuh"

namespace dwconv {

constexpr int kRunImages = 16;  // at most

constexpr int kMostLoaders = 4;  // warps that load runs together

// Warps load bytes [begin, end) behind `from`, which is a multiple of 16, of some images, to a multiple of 16 in shared
// memory; no other byte is touched. Units of 16 bytes are under way on return, by bulk copies that a barrier expects
// and the first warp begins, or else by cp.async, by all of them. The last warp copies what is beside units, and waits
// for it.
__device__ inline void load_images(const char* from, int64_t image_bytes, int images, int place, int pitch, int begin,
                                   int end, int barrier, bool bulk, int loader = 0, int loaders = 1) {
  const int first = (begin + kUnit - 1) / kUnit * kUnit, last = end / kUnit * kUnit, lane = threadIdx.x % 32;
  if (bulk) {
    if (loader == 0 && first < last && is_elected()) {
      expect_bytes(barrier, images * (last - first));
      const char* run = from + first;
      uint32_t slot = shared_address(place + first);
      const auto copy = [&] {
        copy_bulk(slot, run, last - first, barrier);
        run += image_bytes, slot += pitch;
      };
      if (images == kRunImages) {
#pragma unroll  // addresses in uniform registers, as copies take them
        for (int n = 0; n < kRunImages; ++n) copy();
      } else {
#pragma unroll 1
        for (int n = 0; n < images; ++n) copy();
      }
    }
  } else {
    constexpr int kManyUnits = 64;
    if (loaders == 1 || last - first <= kManyUnits * kUnit) {
      // Of a warp, without a division, which would take as long as many copies.
      const int most = loaders == 1 ? kRunImages : loaders == 2 ? kRunImages / 2 : loaders == 3 ? 6 : kRunImages / 4;
      const int first_image = loader * most, last_image = min(first_image + most, images);
#pragma unroll 1
      for (int at = first + lane * kUnit; at < last; at += 32 * kUnit) {
        const char* unit = from + first_image * image_bytes + at;
        uint32_t slot = shared_address(place + first_image * pitch + at);
#pragma unroll 4
        for (int n = first_image; n < last_image; ++n, unit += image_bytes, slot += pitch) copy_unit<kUnit>(slot, unit);
      }
    } else {
      // Several have 128 bytes of 4 images of long runs at a time: addresses of those behind are known at compile time.
      constexpr int kLanes = 8, kTogether = 32 / kLanes, kStep = kLanes * kUnit, kAtOnce = 4;
      const int own = lane % kLanes * kUnit;
#pragma unroll 1
      for (int n = loader * kTogether + lane / kLanes; n < images; n += loaders * kTogether) {
        const char* unit = from + n * image_bytes + first + own;
        uint32_t slot = shared_address(place + n * pitch + first + own);
        int left = last - first;
#pragma unroll 1
        for (; left >= kAtOnce * kStep; left -= kAtOnce * kStep, unit += kAtOnce * kStep, slot += kAtOnce * kStep)
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) copy_unit<kUnit>(slot + k * kStep, unit + k * kStep);
#pragma unroll 1
        for (left -= own; left > 0; left -= kStep, unit += kStep, slot += kStep) copy_unit<kUnit>(slot, unit);
      }
    }
  }
  if (loader + 1 < loaders || (first == begin && last == end)) return;
  constexpr int kLanes = 2;  // of an image
  const auto copy = [&](int begin, int end) {
    for (int n = lane / kLanes; n < images; n += 32 / kLanes)
      for (int at = begin + lane % kLanes * 2; at < end; at += kLanes * 2)
        shared<uint16_t>(place + n * pitch + at) = *reinterpret_cast<const uint16_t*>(from + n * image_bytes + at);
  };
  copy(begin, min(first, end));
  copy(max(last, first), end);
  before_bulk_copies();  // to the same place
}

// Makes zero all but the first so many of 16 bytes, pixels of 2 bytes, or all but the others.
__device__ inline void keep_part(int place, int bytes, bool first) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t mask = 4 * w + 4 <= bytes ? ~0u : 4 * w < bytes ? 0xffffu : 0;
    shared<uint32_t>(place + 4 * w) &= first ? mask : ~mask;
  }
}

// Runs of `size` bytes, a multiple of 16, of 16 images, that begin `shift` bytes behind where they are to begin, a
// multiple of 16. `zero_behind`: the 16 bytes behind them are to become zeros.
struct ShiftedRuns {
  int place, pitch, size, shift;
  bool zero_behind;
};

// Moves runs to where they are to begin, by `warps` warps of which this is number `warp`. kWords: words in `shift`. A
// warp moves those of 4 images, a lane 7 units of one: an odd number, so that they are in different banks.
template <int kWords>
__device__ void move_runs(const ShiftedRuns& runs, int warp, int warps) {
  constexpr int kUnits = 7, kLanes = 8, kAtOnce = 4;
  const int lane = threadIdx.x % 32, bits = runs.shift % 4 * 8;
  const auto moved = [&](const uint4& low, const uint4& high) {
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const auto word = [&](int i) { return __funnelshift_r(words[i + kWords], words[(i + kWords + 1) % 8], bits); };
    return uint4{word(0), word(1), word(2), word(3)};
  };
#pragma unroll 1
  for (int begin = 0; begin < runs.size; begin += kLanes * kUnits * kUnit)
#pragma unroll 1
    for (int four = warp; four < kRunImages * kLanes / 32; four += warps) {
      const int from = begin + lane % kLanes * kUnits * kUnit, units = min((runs.size - from) / kUnit, kUnits);
      const int at = runs.place + (four * (32 / kLanes) + lane / kLanes) * runs.pitch + from;
      const auto read = [&](int u) { return u <= units ? shared<uint4>(at + u * kUnit) : uint4{}; };
      const auto write = [&](int u, const uint4& low, const uint4& high) {
        if (u < units) shared<uint4>(at + u * kUnit) = moved(low, high);
      };
      const uint4 next = read(kUnits);  // which another lane is to write
      uint4 unit[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) unit[u] = read(u);
      __syncwarp();
#pragma unroll
      for (int u = 0; u < kAtOnce - 1; ++u) write(u, unit[u], unit[u + 1]);
      unit[0] = unit[kAtOnce - 1];
#pragma unroll
      for (int u = 1; u < kAtOnce; ++u) unit[u] = u + kAtOnce - 1 < kUnits ? read(u + kAtOnce - 1) : next;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) write(u + kAtOnce - 1, unit[u], u + 1 < kAtOnce ? unit[u + 1] : next);
      if (runs.zero_behind && units > 0 && from + units * kUnit == runs.size)
        shared<uint4>(at + units * kUnit) = uint4{};
    }
  before_bulk_copies();  // to the same place
}
__device__ inline void move_runs(const ShiftedRuns& runs, int warp, int warps) {
  if (runs.size == 0) return;
  if (runs.shift / 4 == 0) return move_runs<0>(runs, warp, warps);
  if (runs.shift / 4 == 1) return move_runs<1>(runs, warp, warps);
  if (runs.shift / 4 == 2) return move_runs<2>(runs, warp, warps);
  move_runs<3>(runs, warp, warps);
}

// Rows of 16 images that follow each other, `lead` bytes behind where the first is to begin, which are to begin with 16
// bytes each, every `row_bytes`, with zeros behind their `bytes`: 7 or 8 units.
struct TightRows {
  int place, pitch, rows, row_bytes, bytes, lead;
  bool zero_behind;
};

// Moves rows to where they are to begin, by threads that meet, as above. A thread moves a row. There have to be as many
// threads as rows of all images of one array.
template <typename Meet>
__device__ void spread_rows(const TightRows& first, const TightRows& second, int thread, int threads, Meet&& meet) {
  constexpr int kLeast = 7, kMost = 8;  // units of a row
  const bool together = kRunImages * (first.rows + second.rows) <= threads;
#pragma unroll 1
  for (int turn = 0; turn < (together ? 1 : 2); ++turn) {
    const bool is_first = together ? thread < kRunImages * first.rows : turn == 0;
    const auto either = [&](auto TightRows::* member) { return is_first ? first.*member : second.*member; };
    const int index = together && !is_first ? thread - kRunImages * first.rows : thread;
    const int row = index / kRunImages, rows = either(&TightRows::rows), bytes = either(&TightRows::bytes);
    const int row_bytes = either(&TightRows::row_bytes), units = row < rows ? row_bytes / kUnit : 0;
    const int image = either(&TightRows::place) + index % kRunImages * either(&TightRows::pitch);
    const int offset = either(&TightRows::lead) + row * bytes, from = image + offset / kUnit * kUnit;
    const int shift = offset % kUnit;
    uint4 unit[kMost];
    uint4 low = units > 0 ? shared<uint4>(from) : uint4{};
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      const uint4 high = u < units ? shared<uint4>(from + (u + 1) * kUnit) : uint4{};
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      uint32_t moved[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto word = [&](int i) {
          const uint32_t near = shift & 4 ? words[i + 1] : words[i],
                         far = shift & 4 ? words[(i + 3) % 8] : words[i + 2];
          return shift & 8 ? far : near;
        };
        moved[w] = __funnelshift_r(word(w), word(w + 1), shift % 4 * 8);
        const int left = bytes - u * kUnit - 4 * w;  // of the row
        if (u >= kLeast - 1) moved[w] &= left >= 4 ? ~0u : left > 0 ? 0xffffu : 0;
      }
      unit[u] = uint4{moved[0], moved[1], moved[2], moved[3]};
      low = high;
    }
    meet();
#pragma unroll
    for (int u = 0; u < kMost; ++u)
      if (u < units) shared<uint4>(image + row * row_bytes + u * kUnit) = unit[u];
    if (either(&TightRows::zero_behind) && row == rows - 1) shared<uint4>(image + rows * row_bytes) = uint4{};
  }
  before_bulk_copies();  // to the same place
}

}  // namespace dwconv
