// Images of three channels that lie as they are in memory, channels_last, under 3x3: a row is a line of neighbouring
// elements whose channels take turns. A thread owns four pixels, 12 elements, and reads four elements at a time.
#pragma once

#include "stream.cuh"

namespace dwconv {
namespace {

constexpr int kChannels = 3, kKernel = 3, kTaps = kKernel * kKernel;
constexpr int kPixels = 4, kElements = kPixels * kChannels;  // of a thread

// By their address in shared memory.
template <typename T>
__device__ void read_four(uint32_t at, float* x) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = shared_at<float4>(at);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    const uint2 four = shared_at<uint2>(at);
    widen_pair(four.x, x[0], x[1], T{}), widen_pair(four.y, x[2], x[3], T{});
  }
}

// Whether that is what a problem has: padded so that gradients are as many as pixels, and with pixels for all threads.
inline bool has_three_channels(const Problem& p) {
  return p.channels == kChannels && p.multiplier == 1 && p.kernel_h == kKernel && p.kernel_w == kKernel &&
         p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 && p.padding_h == 1 &&
         p.padding_w == 1 && p.width % kPixels == 0;
}

// Whether an array has its rows and images one behind the other, whole units of 16 bytes each.
inline bool has_dense_rows(const View& view, const Problem& p, int64_t element) {
  const int64_t row = p.width * kChannels;
  return row * element % kUnit == 0 && view.stride[3] == kChannels && (p.height == 1 || view.stride[2] == row) &&
         (p.batch == 1 || view.stride[0] == p.height * row);
}

// The same of one that begins with a unit.
inline bool is_dense(const View& view, const Problem& p, int64_t element) {
  return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 && has_dense_rows(view, p, element);
}

}  // namespace
}  // namespace dwconv
