// Forward and grad_input of small kernels, straight from memory: for problems so small that latency is all that counts,
// and for layouts that nothing streams. All loads of a thread are independent of each other and in flight together;
// what neighbouring threads share is found in L1.
//
// Only taps that meet the image are multiplied: a weight that is Inf or NaN does not meet the padding.
#include "common.cuh"
#include "device.h"
#include "launch.h"
#include "mapping.h"
#include "small_kernels.h"

namespace dwconv {
namespace {

constexpr int kThreads = 128;

// Rows that a thread computes where there is work for enough threads, as registers allow.
template <class Kernel>
constexpr int kManyRows = Kernel::kKernelH * Kernel::kKernelW < 25 ? 4 : 2;

// A pass as a map from source planes to target planes.
struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* target;
  int source_stride[4], target_stride[4];  // in elements
  int weight_filter, weight_row, weight_column, bias_stride;
  int height, width, out_height, out_width;  // of a source plane and of a target plane
  int padding_h, padding_w;
  int fan_in;  // source planes that a target plane is summed over
  bool channels_last;
  uint32_t units;
  Divider by_planes, by_strips, by_columns, by_fan_out;
};

// Where along one side step `k` from `first` on leads to in the source; negative where it leads nowhere. Spread: the
// stride is that of the target.
template <class Kernel, bool kSpread>
__device__ int source_index(int first, int k) {
  if (!kSpread) return first + k;
  const int padded = first - k * Kernel::kDilation;
  return padded % Kernel::kStride == 0 ? padded / Kernel::kStride : -1;
}

template <typename T, class Kernel, bool kSpread, int kRows>
__global__ void __launch_bounds__(kThreads) direct(const __grid_constant__ Arguments a) {
  static_assert(!kSpread || kRows == 1);
  constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  constexpr int kStep = kSpread ? 1 : Kernel::kDilation;  // from one tap to the next
  constexpr int kSourceRows = (kRows - 1) * Kernel::kStride + (kKernelH - 1) * kStep + 1;
  uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= a.units) return;
  uint32_t plane = a.channels_last ? a.by_planes.split(unit) : 0;
  const int column = a.by_columns.split(unit), row = a.by_strips.split(unit) * kRows;
  if (!a.channels_last) plane = a.by_planes.split(unit);
  const int image = unit;

  // Forward reads plane / multiplier, where fan_in is 1; grad_input reads the filters of the channel.
  uint32_t source_plane = plane * a.fan_in;
  a.by_fan_out.split(source_plane);
  const int y0 = kSpread ? row + a.padding_h : row * Kernel::kStride - a.padding_h;
  const int x0 = kSpread ? column + a.padding_w : column * Kernel::kStride - a.padding_w;
  const T* source = static_cast<const T*>(a.source) + image * a.source_stride[0] + source_plane * a.source_stride[1];
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int>(plane) * a.fan_in * a.weight_filter;

  float sum[kRows];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
    sum[o] = a.bias ? widen(static_cast<const T*>(a.bias)[static_cast<int>(plane) * a.bias_stride]) : 0.f;
  for (int q = 0; q < a.fan_in; ++q, source += a.source_stride[1], weight += a.weight_filter) {
    T w[kKernelH][kKernelW];
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) w[i][j] = weight[i * a.weight_row + j * a.weight_column];
#pragma unroll
    for (int r = 0; r < kSourceRows; ++r) {
      const int y = source_index<Kernel, kSpread>(y0, r);
      bool inside[kKernelW];
      T x[kKernelW];
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) {
        const int column_of_tap = source_index<Kernel, kSpread>(x0, j * kStep);
        inside[j] = static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height) &&
                    static_cast<uint32_t>(column_of_tap) < static_cast<uint32_t>(a.width);
        x[j] = inside[j] ? source[y * a.source_stride[2] + column_of_tap * a.source_stride[3]] : T{};
      }
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int reach = r - o * Kernel::kStride, i = reach / kStep;
        if (reach < 0 || reach % kStep != 0 || i >= kKernelH) continue;
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
          if (inside[j]) sum[o] = fmaf(widen(x[j]), widen(w[i][j]), sum[o]);
      }
    }
  }

  T* target = static_cast<T*>(a.target) + image * a.target_stride[0] + static_cast<int>(plane) * a.target_stride[1] +
              column * a.target_stride[3];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
    if (row + o < a.out_height) target[(row + o) * a.target_stride[2]] = narrow<T>(sum[o]);
}

template <typename T, class Kernel, bool kSpread, int kRows>
void launch(Arguments a, int64_t images, int64_t planes, cudaStream_t stream) {
  const int64_t strips = ceil_div(a.out_height, kRows);
  a.by_planes = Divider(planes), a.by_strips = Divider(strips), a.by_columns = Divider(a.out_width);
  a.units = static_cast<uint32_t>(images * planes * strips * a.out_width);
  direct<T, Kernel, kSpread, kRows><<<static_cast<unsigned>(ceil_div(a.units, kThreads)), kThreads, 0, stream>>>(a);
  check_launch("direct");
}

}  // namespace

void launch_direct(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Arguments a{};
  a.source = map.source.data, a.weight = map.weight.data, a.target = map.target.data;
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = static_cast<int>(map.source.stride[d]);
    a.target_stride[d] = static_cast<int>(map.target.stride[d]);
  }
  a.weight_filter = static_cast<int>(map.weight.stride[0]);
  a.weight_row = static_cast<int>(map.weight.stride[2]), a.weight_column = static_cast<int>(map.weight.stride[3]);
  a.bias = map.bias, a.bias_stride = static_cast<int>(map.bias_stride);
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  a.padding_h = map.padding_h, a.padding_w = map.padding_w, a.fan_in = map.fan_in;
  a.by_fan_out = Divider(map.fan_out);
  a.channels_last = map.targets > 1 && map.target.stride[1] == 1;
  const int64_t outputs = p.batch * map.targets * a.out_height * a.out_width;
  const int64_t threads = int64_t{512} * current_device().multiprocessors;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel(p, [&](auto kernel) {
        using Kernel = decltype(kernel);
        if constexpr (Kernel::kStride > 1)
          if (map.spread) return launch<T, Kernel, true, 1>(a, p.batch, map.targets, stream);
        if (outputs > threads * kManyRows<Kernel>)
          launch<T, Kernel, false, kManyRows<Kernel>>(a, p.batch, map.targets, stream);
        else
          launch<T, Kernel, false, 1>(a, p.batch, map.targets, stream);
      });
  });
}

}  // namespace dwconv
