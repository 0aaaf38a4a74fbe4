// Forward and grad_input at stride 1 in float64, of kernels of many rows and any layout.
//
// A thread owns some rows of a column of the target, and walks down each column of the source that they meet. A pixel
// is multiplied by as many weights as there are rows; the next one meets the same weights, each for the row below, so
// these stay in registers: two loads serve as many products as there are rows. Neighbouring threads own neighbouring
// columns, or in channels_last channels.
//
// Zeros stand for the rows beside the kernel and those beside the image. Where one meets Inf or NaN a sum is NaN: what
// is not finite is computed again, by the taps that meet the image.
#include "columns.h"

#include <algorithm>
#include <limits>

#include "common.cuh"
#include "direct.h"
#include "generic.cuh"
#include "mapping.h"

namespace dwconv {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 7;     // of a thread
constexpr int kFewRows = 5;  // of a kernel: with less, most products would be by the zeros beside it

struct Columns {
  const double *source, *weight, *bias;
  double* target;
  int source_stride[4], target_stride[4];  // in elements
  int weight_filter, weight_row, weight_column, bias_stride;
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int fan_in;  // source planes that a target plane is summed over
  bool channels_last;
  uint32_t units;
  Divider by_planes, by_columns, by_strips, by_phases, by_fan_out;
};

// One element of the target, by the taps that meet the image. `source` and `weight`: its first plane and filter.
__device__ __noinline__ double exact(const Columns& a, const double* source, const double* weight, double sum, int row,
                                     int column) {
  for (int q = 0; q < a.fan_in; ++q, source += a.source_stride[1], weight += a.weight_filter)
    for (int i = 0; i < a.kernel_h; ++i) {
      const int y = row - a.padding_h + i * a.dilation_h;
      if (y < 0 || y >= a.height) continue;
      for (int j = 0; j < a.kernel_w; ++j) {
        const int x = column - a.padding_w + j * a.dilation_w;
        if (x >= 0 && x < a.width)
          sum = fma(source[y * a.source_stride[2] + x * a.source_stride[3]],
                    weight[i * a.weight_row + j * a.weight_column], sum);
      }
    }
  return sum;
}

// What lies there, or zero. Loads written so stay together, ahead of what they are for.
__device__ inline double load_if(const double* from, bool inside) {
  double value = 0;
  asm volatile("{\n.reg .pred inside;\nsetp.ne.s32 inside, %2, 0;\n@inside ld.global.nc.f64 %0, [%1];\n}"
               : "+d"(value)
               : "l"(from), "r"(static_cast<int>(inside)));
  return value;
}

// kTogether: whether the loads of kRows steps are under way together; else ptxas saves registers, for more warps.
template <bool kTogether>
__global__ void __launch_bounds__(kThreads) columns(const __grid_constant__ Columns a) {
  uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= a.units) return;
  uint32_t plane = a.channels_last ? a.by_planes.split(unit) : 0;
  const int column = a.by_columns.split(unit);
  uint32_t strip = a.by_strips.split(unit);
  if (!a.channels_last) plane = a.by_planes.split(unit);
  const int image = unit;
  // Rows of a thread lie as far apart as those of the kernel.
  const int phase = a.by_phases.split(strip);
  const int row = static_cast<int>(strip) * (kRows * a.dilation_h) + phase;
  const int rows = min((a.out_height - row + a.dilation_h - 1) / a.dilation_h, kRows);
  uint32_t source_plane = plane * a.fan_in;
  a.by_fan_out.split(source_plane);
  const double* const source =
      a.source + (image * a.source_stride[0] + static_cast<int>(source_plane) * a.source_stride[1]);
  const double* const weight = a.weight + static_cast<int>(plane) * a.fan_in * a.weight_filter;

  // The thread's rows meet source row number n, n * dilation from the first on; it lies inside for n in [begin, end).
  const int y0 = row - a.padding_h;
  const int begin = y0 < 0 ? (-y0 + a.dilation_h - 1) / a.dilation_h : 0;
  const int end = y0 < a.height ? min((a.height - 1 - y0) / a.dilation_h + 1, rows + a.kernel_h - 1) : 0;
  const int first = (y0 + begin * a.dilation_h) * a.source_stride[2], step = a.dilation_h * a.source_stride[2];

  const double bias = a.bias ? a.bias[static_cast<int>(plane) * a.bias_stride] : 0;
  double sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = bias;
  for (int q = 0; q < a.fan_in; ++q)
    for (int j = 0; j < a.kernel_w; ++j) {
      const int x = column - a.padding_w + j * a.dilation_w;
      if (x < 0 || x >= a.width) continue;
      const double* from = source + (q * a.source_stride[1] + first + x * a.source_stride[3]);
      const double* tap = weight + (q * a.weight_filter + begin * a.weight_row + j * a.weight_column);
      double taps[kRows];  // the one of row number i of the kernel in place i - begin, modulo their number
#pragma unroll
      for (int r = 1; r < kRows; ++r)
        taps[kRows - r] = begin >= r && begin - r < a.kernel_h ? tap[-r * a.weight_row] : 0;
      for (int n = begin; n < end; n += kRows) {
        double pixel[kRows], next[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k, from += step, tap += a.weight_row) {
          if constexpr (kTogether) {
            pixel[k] = load_if(from, n + k < end);
            next[k] = load_if(tap, n + k < a.kernel_h);
          } else {
            pixel[k] = n + k < end ? *from : 0;
            next[k] = n + k < a.kernel_h ? *tap : 0;
          }
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          taps[k] = next[k];
#pragma unroll
          for (int r = 0; r < kRows; ++r) sum[r] = fma(pixel[k], taps[(k - r + kRows) % kRows], sum[r]);
        }
      }
    }

  double* const target = a.target + (image * a.target_stride[0] + static_cast<int>(plane) * a.target_stride[1] +
                                     column * a.target_stride[3]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const int at = row + r * a.dilation_h;
    const bool finite = sum[r] * 0 == 0;
    target[at * a.target_stride[2]] = finite ? sum[r] : exact(a, source, weight, bias, at, column);
  }
}

}  // namespace

bool launch_columns(const Problem& p, cudaStream_t stream) {
  if (p.dtype != DType::kFloat64 || p.pass == Pass::kGradWeight || p.stride_h != 1 || p.stride_w != 1 ||
      p.kernel_h < kFewRows || p.taps() <= kDirectFloat64Taps || !fits_32_bits(p, kRows + p.kernel_h, 0))
    return false;
  const Mapping map(p);
  Columns a{};
  a.source = static_cast<const double*>(map.source.data), a.target = static_cast<double*>(map.target.data);
  a.weight = static_cast<const double*>(map.weight.data), a.bias = static_cast<const double*>(map.bias);
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = static_cast<int>(map.source.stride[d]);
    a.target_stride[d] = static_cast<int>(map.target.stride[d]);
  }
  a.weight_filter = static_cast<int>(map.weight.stride[0]), a.bias_stride = static_cast<int>(map.bias_stride);
  a.weight_row = static_cast<int>(map.weight.stride[2]), a.weight_column = static_cast<int>(map.weight.stride[3]);
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w, a.fan_in = map.fan_in;
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.channels_last = is_channels_last(map.target, map.targets);
  const int64_t phases = std::min<int64_t>(a.dilation_h, a.out_height);
  const int64_t strips = ceil_div(a.out_height, kRows * p.dilation_h) * phases;
  const int64_t units = p.batch * map.targets * strips * a.out_width;
  if (units > std::numeric_limits<int32_t>::max() / 2) return false;
  a.units = static_cast<uint32_t>(units);
  a.by_planes = Divider(map.targets), a.by_columns = Divider(a.out_width), a.by_strips = Divider(strips);
  a.by_phases = Divider(phases), a.by_fan_out = Divider(map.fan_out);
  // In channels_last each lane has weights of its own to wait for.
  const auto kernel = a.channels_last ? columns<true> : columns<false>;
  kernel<<<blocks_for(units, kThreads), kThreads, 0, stream>>>(a);
  check_launch("columns");
  return true;
}

}  // namespace dwconv
