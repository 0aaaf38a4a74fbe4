// grad_weight (and the bias gradient) of 1x1 on channels_last arrays without gaps, whose pixels need not be whole units
// of 16 bytes: every element of the input meets the one of the gradient at the same place, whatever pixel it is of. As
// many units as there are channels are a period: behind it channels lie at the same places within units. So a thread
// that goes from period to period has the same channels all along, and adds up each place of its units by itself, in
// the time that it takes to read both arrays.
#include "flat_grad_weight_channels_last.h"

#include <algorithm>

#include "copies.cuh"
#include "device.h"
#include "launch.h"
#include "overlap.cuh"
#include "stream.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

struct Flat {
  const char *input, *grad;  // where the units begin that the arrays begin in
  int64_t begin, end;        // bytes of the arrays behind that
  int64_t units;
  int channels;
  int first_channel;  // at the first place of the first unit, may that be before the arrays
  int periods;        // that a block takes at once
  int share;          // turns of a block
  WeightSums sums;
  Divider by_channels;
};

// What is not of the array is zero.
template <typename T>
__device__ uint4 load_unit(const Flat& a, const char* array, int64_t unit) {
  const int64_t at = unit * kUnit;
  if (at >= a.begin && at + kUnit <= a.end) return __ldg(reinterpret_cast<const uint4*>(array + at));
  uint4 value{};
  for (int i = 0; i < kUnit; i += static_cast<int>(sizeof(T)))
    if (at + i >= a.begin && at + i < a.end) memcpy(reinterpret_cast<char*>(&value) + i, array + at + i, sizeof(T));
  return value;
}

template <typename T>
__device__ void widen_unit(const uint4& unit, float (&values)[kUnit / sizeof(T)]) {
  const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4)
      values[i] = __uint_as_float(words[i]);
    else
      widen_pair(words[i], values[2 * i], values[2 * i + 1], T{});
}

template <typename T>
__global__ void __launch_bounds__(1024) flat_grad_weight_channels_last(const __grid_constant__ Flat a) {
  constexpr int kPlaces = kUnit / sizeof(T), kTogether = 4;
  let_next_kernel_start();
  const int threads = a.periods * a.channels, thread = threadIdx.x;
  const bool with_bias = a.sums.with_bias();
  const int64_t step = threads;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * a.share * step + thread;
  float sum[kPlaces] = {}, bias[kPlaces] = {};
  wait_for_kernel_before();
  if (thread < threads)
#pragma unroll 1
    for (int left = a.share; left > 0; left -= kTogether) {
      uint4 x[kTogether], g[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k, unit += step) {
        x[k] = g[k] = uint4{};
        if (k < left && unit < a.units) x[k] = load_unit<T>(a, a.input, unit), g[k] = load_unit<T>(a, a.grad, unit);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        float wide_x[kPlaces], wide_g[kPlaces];
        widen_unit<T>(x[k], wide_x), widen_unit<T>(g[k], wide_g);
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
          sum[i] = fmaf(wide_x[i], wide_g[i], sum[i]);
          if (with_bias) bias[i] += wide_g[i];
        }
      }
    }

  // The places of all units of a period, one behind the other: a channel is at every so-manieth of them.
  const auto finish = [&](int slot, const float (&values)[kPlaces]) {
    __syncthreads();
    if (thread < threads)
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) shared<float>(4 * (thread * kPlaces + i)) = values[i];
    __syncthreads();
    for (int place = thread; place < a.channels; place += blockDim.x) {
      float total = 0;
      for (int i = place; i < threads * kPlaces; i += a.channels) total += shared<float>(4 * i);
      uint32_t period = place + a.first_channel;
      a.sums.template put<T>(a.by_channels.split(period), blockIdx.x, slot, total);
    }
  };
  finish(0, sum);
  if (with_bias) finish(1, bias);
}

}  // namespace

void launch_flat_grad_weight_channels_last(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const int64_t element = size_of(p.dtype), pixels = p.batch * p.height * p.width;
  Flat a{};
  const int64_t before = reinterpret_cast<uintptr_t>(p.input.data) % kUnit;
  a.input = static_cast<const char*>(p.input.data) - before, a.grad = static_cast<const char*>(p.output.data) - before;
  a.begin = before, a.end = before + pixels * p.channels * element;
  a.units = ceil_div(a.end, kUnit);
  a.channels = static_cast<int>(p.channels);
  a.first_channel = static_cast<int>((p.channels - before / element % p.channels) % p.channels);
  a.by_channels = Divider(p.channels);
  constexpr int64_t kThreads = 512, kLongest = 512, kLeast = 2;  // turns of a block: longer sums lose digits
  a.periods = static_cast<int>(std::max<int64_t>(kThreads / p.channels, 1));
  const int64_t threads = a.periods * p.channels, turns = ceil_div(a.units, threads);
  const int64_t places = device.multiprocessors * std::max<int64_t>(1024 / round_up(threads, 32), 1);
  a.share = static_cast<int>(std::clamp(ceil_div(turns, places), std::min(turns, kLeast), kLongest));
  const int64_t blocks = ceil_div(turns, a.share);
  a.sums = weight_sums(p, blocks, allocate);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      launch_early(flat_grad_weight_channels_last<T>, a, blocks, static_cast<int>(round_up(threads, 32)), stream,
                   {.shared_bytes = threads * kUnit / element * 4});
  });
  check_launch("flat_grad_weight_channels_last");
  launch_add_partial_sums(p, a.sums, blocks, stream);
}

}  // namespace dwconv
