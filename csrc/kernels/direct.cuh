// What kernels share that go straight to memory: loads of one element or several, under way together.
#pragma once

#include "common.cuh"

namespace dwconv {

// An element of up to 32 bits, which are the low ones of a word.
template <typename T>
__device__ float widen_one(uint32_t word) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(word);
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  else
    return __uint_as_float(word << 16);
}

// Elements that are loaded and stored at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 4 ? 4 : kCount * sizeof(T)) Vector {
  static constexpr int kWords = (sizeof(T) * kCount + 3) / 4;
  uint32_t words[kWords];

  __device__ Accumulator<T> operator[](int i) const {
    if constexpr (sizeof(T) == 8) {
      return __hiloint2double(words[2 * i + 1], words[2 * i]);
    } else if constexpr (sizeof(T) == 4 || kCount == 1) {
      return widen_one<T>(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = *reinterpret_cast<const __half2*>(&words[i / 2]);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    } else {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  }

  __device__ static Vector of(const Accumulator<T> (&values)[kCount]) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 8)
        vector.words[i] = i % 2 == 0 ? __double2loint(values[i / 2]) : __double2hiint(values[i / 2]);
      else if constexpr (sizeof(T) == 4)
        vector.words[i] = __float_as_uint(values[i]);
      else
        *reinterpret_cast<Pair<T>*>(&vector.words[i]) = narrow_pair(values[2 * i], values[2 * i + 1], T{});
    return vector;
  }
};

// Such an element from memory, zero where not `inside`.
template <typename T>
__device__ uint32_t load_one(const T* from, bool inside) {
  uint32_t word;
  if constexpr (sizeof(T) == 4) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%1]; }"
                 : "=r"(word)
                 : "l"(from), "r"(static_cast<int>(inside)));
  } else {
    uint16_t half;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b16 %0, 0; @p ld.global.b16 %0, [%1]; }"
                 : "=h"(half)
                 : "l"(from), "r"(static_cast<int>(inside)));
    word = half;
  }
  return word;
}

// A vector from memory, zeros where not `inside`. In the order in which it is written, so that all of a thread's loads
// are in flight before the first one is waited for.
template <typename T, int kCount>
__device__ Vector<T, kCount> load(const T* from, bool inside) {
  Vector<T, kCount> to;
  if constexpr (sizeof(T) * kCount == 2)
    to.words[0] = load_one(from, inside);
  else if constexpr (to.kWords == 1)
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%1]; }"
                 : "=r"(to.words[0])
                 : "l"(from), "r"(static_cast<int>(inside)));
  else if constexpr (to.kWords == 2)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.v2.b32 {%0, %1}, [%2]; }"
        : "=r"(to.words[0]), "=r"(to.words[1])
        : "l"(from), "r"(static_cast<int>(inside)));
  else
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        " @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(to.words[0]), "=r"(to.words[1]), "=r"(to.words[2]), "=r"(to.words[3])
        : "l"(from), "r"(static_cast<int>(inside)));
  return to;
}

}  // namespace dwconv
