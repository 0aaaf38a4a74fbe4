// grad_weight of any depthwise convolution, in two stages: the first sums over runs of the output rows, the second adds
// up the runs. Every sum has a fixed order: the result is the same bit for bit, always. Only taps that meet the image
// are multiplied. A thread has ten loads for nine products: others are faster wherever they claim a problem.
#include <algorithm>

#include "generic.cuh"
#include "launch.h"
#include "partial_sums.h"

namespace dwconv {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 9;   // taps that a thread accumulates in registers: a tile of 3x3 or 1x9
constexpr int kPart = 32;  // columns that it adds up in float32 before it adds them to its sum

// The N * H_out output rows are cut into `splits` runs; a block sums a tile of taps (and the bias) over one run, for
// one filter (NCHW: lanes are columns) or `lanes` filters (channels_last: lanes are filters).
struct Runs {
  bool channels_last;
  int lanes;     // threads side by side, a power of two; kThreads / lanes rows are in work at a time
  int tap_rows;  // of a tile: what covers the kernel with fewer tiles
  int64_t tile_columns, tiles, filter_groups, splits;

  explicit Runs(const Problem& p) {
    channels_last = is_channels_last(p.output, p.filters()) || is_channels_last(p.input, p.channels);
    const int64_t side_by_side = channels_last ? p.filters() : p.out_width;
    for (lanes = 1; lanes < 32 && lanes < side_by_side;) lanes *= 2;
    filter_groups = channels_last ? ceil_div(p.filters(), lanes) : p.filters();
    const auto tiles_of = [&](int rows) { return ceil_div(p.kernel_h, rows) * ceil_div(p.kernel_w, kTaps / rows); };
    tap_rows = tiles_of(3) <= tiles_of(1) ? 3 : 1;
    tiles = tiles_of(tap_rows);
    tile_columns = ceil_div(p.kernel_w, kTaps / tap_rows);
    constexpr int64_t kBlocks = 2048;  // fills any GPU a few times over; the same on all, so that results are too
    const int64_t rows = p.batch * p.out_height;
    const int64_t useful = ceil_div(rows, kThreads / lanes);
    splits = std::max<int64_t>(1, std::min(useful, ceil_div(kBlocks, filter_groups * tiles)));
  }

  // Filters of a block, each with sums of its own.
  int width() const { return channels_last ? lanes : 1; }
};

// Partial sums lie as [split][tap, or bias behind the last tap][filter].
template <typename T, typename Index, int kTapRows>
__global__ void __launch_bounds__(kThreads, sizeof(Index) == 4 ? 3 : 1)
    generic_grad_weight_runs(const T* __restrict__ grad_output, const T* __restrict__ input,
                             Accumulator<T>* __restrict__ partial, const Sizes<Index> s, bool with_bias,
                             bool channels_last, int lanes, Index tile_columns, Index tiles, Index filter_groups,
                             Index splits) {
  using Acc = Accumulator<T>;
  constexpr int kTapColumns = kTaps / kTapRows, kWarps = kThreads / 32;
  struct Sums {
    Acc tap[kTapRows][kTapColumns] = {}, bias = 0;
  };
  extern __shared__ unsigned char shared_bytes[];  // [tap of the tile, or bias][warp][filter]
  Acc* const shared = reinterpret_cast<Acc*>(shared_bytes);
  const int lane = threadIdx.x % lanes;
  const Index rows = s.batch * s.out_height;

  Index group = blockIdx.x;
  Index tile = split(group, tiles);
  const bool is_first_tile = tile == 0;
  const Index first_tap_column = split(tile, tile_columns) * kTapColumns;
  const Index first_tap_row = tile * kTapRows;
  const Index filter_group = split(group, filter_groups);
  const Index run = group;
  const Index begin = static_cast<Index>(static_cast<int64_t>(rows) * run / splits);
  const Index end = static_cast<Index>(static_cast<int64_t>(rows) * (run + 1) / splits);

  const Index filter = channels_last ? filter_group * lanes + lane : filter_group;
  const Index first_column = channels_last ? 0 : lane;
  const Index column_step = channels_last ? 1 : lanes;
  const int tap_columns = static_cast<int>(min(Index(kTapColumns), s.kernel_w - first_tap_column));

  Sums sums;
  if (filter < s.filters) {
    const T* channel = input + filter / s.multiplier * s.input[1];
    const T* grad = grad_output + filter * s.output[1];
    for (Index r = begin + threadIdx.x / lanes; r < end; r += kThreads / lanes) {
      Index image = r;
      const Index out_row = split(image, s.out_height);
      const T* image_input = channel + image * s.input[0];
      const T* row_grad = grad + image * s.output[0] + out_row * s.output[2];
      bool row_inside[kTapRows], any = with_bias && is_first_tile;
      Index offset[kTapRows];
#pragma unroll
      for (int i = 0; i < kTapRows; ++i) {
        const Index y = out_row * s.stride_h - s.padding_h + (first_tap_row + i) * s.dilation_h;
        row_inside[i] = first_tap_row + i < s.kernel_h && y >= 0 && y < s.height;
        offset[i] = row_inside[i] ? y * s.input[2] : 0;
        any |= row_inside[i];
      }
      if (!any) continue;

      // All loads before the first product, so that they are under way together.
      const auto add_column = [&](Sums& to, Index column) {
        const Index first_x = column * s.stride_w - s.padding_w + first_tap_column * s.dilation_w;
        const Acc g = widen(row_grad[column * s.output[3]]);
        Acc found[kTapRows][kTapColumns];
        bool inside[kTapColumns];
#pragma unroll
        for (int j = 0; j < kTapColumns; ++j) {
          const Index x = first_x + j * s.dilation_w;
          inside[j] = j < tap_columns && x >= 0 && x < s.width;
#pragma unroll
          for (int i = 0; i < kTapRows; ++i)
            if (row_inside[i] && inside[j]) found[i][j] = widen(image_input[offset[i] + x * s.input[3]]);
        }
        to.bias += g;
#pragma unroll
        for (int i = 0; i < kTapRows; ++i)
#pragma unroll
          for (int j = 0; j < kTapColumns; ++j)
            if (row_inside[i] && inside[j]) to.tap[i][j] += g * found[i][j];
      };
      if constexpr (std::is_same_v<Acc, double>) {
        for (Index column = first_column; column < s.out_width; column += column_step) add_column(sums, column);
      } else {
        for (Index column = first_column; column < s.out_width;) {
          Sums part;  // short sums of short sums: the rounding error grows slowly
          for (int n = 0; n < kPart && column < s.out_width; ++n, column += column_step) add_column(part, column);
#pragma unroll
          for (int i = 0; i < kTapRows; ++i)
#pragma unroll
            for (int j = 0; j < kTapColumns; ++j) sums.tap[i][j] += part.tap[i][j];
          sums.bias += part.bias;
        }
      }
    }
  }

  // Down to one thread of a warp, or to one row of lanes where each lane has a filter of its own; then over the warps.
  const int width = channels_last ? lanes : 1;
  const int lane_of_warp = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto add_lanes = [&](Acc value, int slot) {
    for (int offset = 16; offset >= width; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
    if (lane_of_warp < width) shared[(slot * kWarps + warp) * width + lane_of_warp] = value;
  };
#pragma unroll
  for (int t = 0; t < kTaps; ++t) add_lanes(sums.tap[t / kTapColumns][t % kTapColumns], t);
  if (with_bias && is_first_tile) add_lanes(sums.bias, kTaps);
  __syncthreads();
  const int slots = kTaps + (with_bias && is_first_tile);
  for (int k = threadIdx.x; k < slots * width; k += kThreads) {
    const int slot = k / width;
    const Index tap_row = first_tap_row + slot / kTapColumns, tap_column = first_tap_column + slot % kTapColumns;
    const Index to_filter = channels_last ? filter_group * lanes + k % width : filter_group;
    const bool is_bias = slot == kTaps;
    if (to_filter >= s.filters || (!is_bias && (tap_row >= s.kernel_h || tap_column >= s.kernel_w))) continue;
    Acc sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[(slot * kWarps + w) * width + k % width];
    const Index taps = s.kernel_h * s.kernel_w;
    partial[(run * (taps + with_bias) + (is_bias ? taps : tap_row * s.kernel_w + tap_column)) * s.filters + to_filter] =
        sum;
  }
}

template <typename T, typename Index>
void launch_runs(const Problem& p, const Runs& shape, const Allocate& allocate, cudaStream_t stream) {
  const int64_t sums = (p.taps() + (p.bias != nullptr)) * p.filters();
  auto* partial = static_cast<Accumulator<T>*>(allocate(shape.splits * sums * sizeof(Accumulator<T>)));
  const int64_t blocks = shape.filter_groups * shape.tiles * shape.splits;
  const size_t shared = (kTaps + 1) * (kThreads / 32) * shape.width() * sizeof(Accumulator<T>);
  const auto kernel =
      shape.tap_rows == 3 ? generic_grad_weight_runs<T, Index, 3> : generic_grad_weight_runs<T, Index, 1>;
  kernel<<<blocks_for(blocks * kThreads, kThreads), kThreads, shared, stream>>>(
      static_cast<const T*>(p.output.data), static_cast<const T*>(p.input.data), partial, Sizes<Index>(p),
      p.bias != nullptr, shape.channels_last, shape.lanes, shape.tile_columns, shape.tiles, shape.filter_groups,
      shape.splits);
  check_launch("generic_grad_weight_runs");
  launch_add_partial_sums(p, partial, shape.splits, stream);
}

}  // namespace

void launch_generic_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const Runs runs(p);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (fits_32_bits(p, 1, (p.taps() + 1) * p.filters() * runs.splits))
      launch_runs<T, int32_t>(p, runs, allocate, stream);
    else
      launch_runs<T, int64_t>(p, runs, allocate, stream);
  });
}

}  // namespace dwconv
