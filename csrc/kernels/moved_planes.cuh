// Planes that begin anywhere: they come to shared memory as the units of 16 bytes that they lie in, whose bytes are
// moved there. From sm_90 on.
#pragma once

#include <type_traits>

#include "copies.cuh"

namespace dwconv {

// Bytes of a plane's first unit that are not the plane's.
__device__ inline int bytes_before(const char* plane) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(plane) % kUnit);
}

// A thread begins to load the units that a plane of some lies in: up to two more than it would fill. Those that an
// array's first plane and its last one share with what is outside of it come element by element.
__device__ inline void load_units(uint32_t to, const char* plane, int bytes, bool is_first, bool is_last, int barrier) {
  const int before = bytes_before(plane), last = before + bytes;  // where it ends, of what is loaded
  const char* const from = plane - before;
  const int begin = is_first ? (before + kUnit - 1) / kUnit * kUnit : 0;
  const int end = (is_last ? last : last + kUnit - 1) / kUnit * kUnit;
  const auto copy = [&](int begin, int end) {
    for (int at = begin; at < end; at += 2)
      shared_at<uint16_t>(to + at) = __ldg(reinterpret_cast<const uint16_t*>(from + at));
  };
  if (before < begin) copy(before, begin);
  if (end < last) copy(end, last);
  if (before < begin || end < last) before_bulk_copies();  // to the same place, later
  expect_bytes(barrier, end - begin);
  copy_bulk(to + begin, from + begin, end - begin, barrier);
}

constexpr int kMovedUnits = 7;  // that a lane moves at once: an odd number, so that lanes' are in different banks

// Units that a lane moves, and one more: it reads all of them before it, or another lane, writes any.
class MovedUnits {
 public:
  // From a multiple of 16 on.
  __device__ explicit MovedUnits(uint32_t from) {
#pragma unroll
    for (int k = 0; k < kWords; k += 4) {
      const uint4 unit = shared_at<uint4>(from + 4 * k);
      words_[k] = unit.x, words_[k + 1] = unit.y, words_[k + 2] = unit.z, words_[k + 3] = unit.w;
    }
  }

  // Puts so many of them, put(number, unit), without the bytes `before`. `same`: all lanes have as many.
  template <typename Put>
  __device__ void put(int before, bool same, int units, Put&& put) {
    const uint32_t bits = before % 4 * 8;
    const auto put_from = [&](auto first) {
#pragma unroll
      for (int u = 0; u < kMovedUnits; ++u) {
        const auto word = [&](int k) {
          const int at = decltype(first)::value + 4 * u + k;
          return __funnelshift_r(words_[at], words_[at + 1], bits);
        };
        if (u < units) put(u, uint4{word(0), word(1), word(2), word(3)});
      }
    };
    if (!same) {
#pragma unroll
      for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int k = 0; k + step < kWords; ++k) words_[k] = before / 4 & step ? words_[k + step] : words_[k];
      return put_from(std::integral_constant<int, 0>{});
    }
    switch (before / 4) {
      case 0: return put_from(std::integral_constant<int, 0>{});
      case 1: return put_from(std::integral_constant<int, 1>{});
      case 2: return put_from(std::integral_constant<int, 2>{});
      default: put_from(std::integral_constant<int, 3>{});
    }
  }

 private:
  static constexpr int kWords = kUnit / 4 * (kMovedUnits + 1);
  uint32_t words_[kWords];
};

// Whether of so many images and channels only the first plane has a unit with what is before the array, and only the
// last one with what is behind.
inline bool has_ends(int64_t images, int64_t image_bytes, int64_t channels, int64_t channel_bytes) {
  return (images == 1 || image_bytes >= kUnit) && (channels == 1 || channel_bytes >= kUnit);
}

}  // namespace dwconv
