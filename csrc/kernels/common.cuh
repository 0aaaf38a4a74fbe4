// What every kernel shares: element types, 32-bit division, launch checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../problem.h"

namespace dwconv {

// The type that sums are kept in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(float value) {
  return value;
}
__device__ inline double widen(double value) {
  return value;
}
__device__ inline float widen(__half value) {
  return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <typename T>
__device__ inline T narrow(Accumulator<T> value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ inline bool is_finite(float value) {
  return fabsf(value) <= 3.402823466e38f;
}

// Two elements of 16 bits in one word.
template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

__device__ inline __half2 narrow_pair(float low, float high, __half) {
  return __floats2half2_rn(low, high);
}
__device__ inline __nv_bfloat162 narrow_pair(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Division by a number known at launch, as a multiplication: exact for dividends below 2^31.
struct Divider {
  uint32_t divisor = 1, magic = 0, shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  // Returns the remainder and leaves the quotient in `value`.
  __device__ uint32_t split(uint32_t& value) const {
    const uint32_t quotient = (__umulhi(value, magic) + value) >> shift;
    const uint32_t remainder = value - quotient * divisor;
    value = quotient;
    return remainder;
  }
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("dwconv: kernel ") + kernel +
                             " failed to launch: " + cudaGetErrorString(error));
}

// Calls visit(T{}) with the element type.
template <typename Visitor>
void visit_dtype(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(float{});
    case DType::kFloat64: return visit(double{});
    case DType::kFloat16: return visit(__half{});
    case DType::kBFloat16: return visit(__nv_bfloat16{});
  }
}

}  // namespace dwconv
