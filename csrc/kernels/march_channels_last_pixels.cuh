// How threads of march_channels_last.cuh read pixels from shared memory, and how outputs go from there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "march_channels_last_tile.cuh"

namespace dwconv {
namespace {

// A value that ptxas is to keep in a register: addresses in shared memory begin with a special register, which it would
// otherwise read anew, and wait for, wherever one is used.
__device__ inline uint32_t kept(uint32_t value) {
  return __shfl_sync(__activemask(), value, threadIdx.x % 32);
}

// Neighbouring channels of a pixel in shared memory.
template <typename T, int kChannels>
__device__ void read_elements(uint32_t at, float (&x)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) x[c] = widen(shared_at<T>(at + c * static_cast<int>(sizeof(T))));
}
template <typename T, int kChannels>
__device__ void read_pixel(uint32_t at, float (&x)[kChannels]) {
  if constexpr (kChannels == 1 || kChannels == 3) {
    read_elements<T>(at, x);
  } else if constexpr (sizeof(T) == 4) {
    const float2 both = shared_at<float2>(at);
    x[0] = both.x, x[1] = both.y;
  } else {
    widen_pair(shared_at<uint32_t>(at), x[0], x[1], T{});
  }
}

template <typename T, int kChannels>
__device__ void write_elements(char* to, const float (&x)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) reinterpret_cast<T*>(to)[c] = narrow<T>(x[c]);
}
template <typename T, int kChannels>
__device__ void write_pixel(char* to, const float (&x)[kChannels]) {
  if constexpr (kChannels == 1 || kChannels == 3)
    write_elements<T>(to, x);
  else if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  else
    *reinterpret_cast<Pair<T>*>(to) = narrow_pair(x[0], x[1], T{});
}

// Four neighbouring elements.
template <typename T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

template <typename T>
__device__ Four<T> narrow_four(float a, float b, float c, float d) {
  if constexpr (sizeof(T) == 4) {
    return make_float4(a, b, c, d);
  } else {
    const Pair<T> low = narrow_pair(a, b, T{}), high = narrow_pair(c, d, T{});
    return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }
}

// Pixels of three channels in shared memory, the first of which is the second one of four neighbouring elements.
template <typename T, int kPixels>
__device__ void read_fours(uint32_t at, float (&x)[kPixels][3]) {
#pragma unroll
  for (int i = 0; i < 3 * kPixels + 1; i += 4) {
    const Four<T> word = shared_at<Four<T>>(at + (i - 1) * static_cast<int>(sizeof(T)));
    float four[4];
    if constexpr (sizeof(T) == 4)
      four[0] = word.x, four[1] = word.y, four[2] = word.z, four[3] = word.w;
    else
      widen_pair(word.x, four[0], four[1], T{}), widen_pair(word.y, four[2], four[3], T{});
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (const int k = i + j - 1; k >= 0 && k < 3 * kPixels) x[k / 3][k % 3] = four[j];
  }
}

// How a warp has a row of its strips in shared memory, side by side.
struct Stage {
  uint32_t strip, first;  // where the thread's strip lies, and the first element
  int before;             // outputs of the warp before that strip
  int begin, end;         // of the elements, those inside the image
};

// `x`: column of the target where the thread's strip begins; `live`: whether it has one.
template <typename T, class Tile>
__device__ Stage stage_of(const March& a, uint32_t thread, int x, bool live) {
  constexpr int kWidth = Tile::kStrip * Tile::kPair, kChannels = Tile::kChannels, kSize = sizeof(T);
  uint32_t strip = thread % 32;
  const int warp = static_cast<int>(thread / 32), lane = a.by_lanes.split(strip);
  const int pixel = kChannels == 3 ? 3 : a.lanes * kChannels;  // elements
  Stage s;
  s.before = live ? static_cast<int>(strip) * kWidth : 0;
  s.first = shared_address(kRing + a.ring_bytes + warp * a.stage_bytes);
  s.strip = s.first + (s.before * pixel + lane * kChannels) * kSize;
  x -= s.before;
  s.begin = max(-x, 0) * pixel;
  s.end = min(min(a.warp_strips, a.strips - warp * a.warp_strips) * kWidth, a.target_width - x) * pixel;
  return s;
}

// Stores a row of a warp's strips. Pixels of less than a sector of 32 bytes, written one by one, would write every
// sector several times. `pixels`: where the first strip begins in the target.
template <typename T, class Tile>
__device__ void store_staged(const March& a, const Stage& s, char* pixels, bool live,
                             const float (&values)[Tile::kStrip * Tile::kPair][Tile::kChannels]) {
  constexpr int kWidth = Tile::kStrip * Tile::kPair, kChannels = Tile::kChannels, kSize = sizeof(T);
  constexpr int kWord = kChannels == 3 ? 1 : kChannels, kWords = kWidth * kChannels / kWord;  // elements of a word
  using Word =
      std::conditional_t<kWord * kSize == 8, float2, std::conditional_t<kWord * kSize == 4, uint32_t, uint16_t>>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  __syncwarp();
  if constexpr (kChannels == 3) {
    if (live)
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        shared_at<Four<T>>(s.strip + i * kSize) =
            narrow_four<T>(values[i / 3][i % 3], values[(i + 1) / 3][(i + 1) % 3], values[(i + 2) / 3][(i + 2) % 3],
                           values[(i + 3) / 3][(i + 3) % 3]);
  } else if (live) {
#pragma unroll
    for (int v = 0; v < kWidth; ++v)
      write_pixel<T>(&shared_at<char>(s.strip + v * a.lanes * kChannels * kSize), values[v]);
  }
  __syncwarp();
  if (kChannels == 3 && a.fours) {
#pragma unroll
    for (int v = 0; v < kWords; v += 4)
      if (const int at = 32 * v + 4 * lane; at < s.end)
        *reinterpret_cast<Four<T>*>(pixels + at * kSize) = shared_at<Four<T>>(s.first + at * kSize);
    return;
  }
#pragma unroll
  for (int v = 0; v < kWords; ++v)
    if (const int at = (32 * v + lane) * kWord; at >= s.begin && at < s.end)
      *reinterpret_cast<Word*>(pixels + at * kSize) = shared_at<Word>(s.first + at * kSize);
}

// A warp begins to store a row of so many pixels, `part` bytes of each, by bulk copies.
__device__ inline void store_row(const March& a, char* to, int from, int pitch, int columns, int part) {
  const int lane = threadIdx.x % 32;
  if (part == a.target_pixel_bytes) part *= columns, columns = 1;
#pragma unroll 1
  for (int i = lane; i < columns; i += 32)
    store_bulk(to + static_cast<int64_t>(i) * a.target_pixel_bytes, shared_address(from + i * pitch), part);
  commit_stores();
}

}  // namespace
}  // namespace dwconv
