// grad_weight (and the bias gradient) of any kernel, stride and dilation in any dtype, straight from memory: for what
// nothing else is compiled for, and where there is little to do.
//
// A lane walks down a column of the gradient and keeps the sums of a tile of taps. The rows of a tile lie `tap_step`
// rows of the kernel apart, and the gradients `grad_step` rows: then the pixels that a gradient meets are those that
// the one above met, one row further down, and stay in registers. So a gradient and one new row of pixels are all that
// is loaded for a whole tile, five loads and 45 instructions for the 16 products of 4 x 4 taps, and loads of several
// rows are under way together. A team of lanes has a filter and a tile; where there are few of these, several blocks
// share them, and a second kernel adds up their sums.
//
// Only taps that meet the image are multiplied. Every sum has a fixed order, and none is long: a lane adds up a strip
// of rows, then its strips, then lanes are added up pairwise.
#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "direct.cuh"
#include "grad_weight.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "partial_sums.h"

namespace dwconv {
namespace {

constexpr int kMostThreads = 256, kFewThreads = 128;  // of a block
constexpr int kFewLanes = 4;                          // of a team, at least
constexpr int kStripRows = 32;                        // gradients of a strip, at most

// Taps of a lane, gradients whose loads are under way together, and blocks of a multiprocessor. Where a tile keeps no
// pixels, each gradient meets others: so it is where the stride is as large as the kernel.
struct Tile {
  int rows, columns, steps;
  bool keeps;
  int blocks;

  constexpr int taps() const { return rows * columns; }
};
constexpr std::array<Tile, 9> kTiles{{{1, 1, 8, false, 4},
                                      {1, 4, 4, false, 3},
                                      {3, 3, 2, false, 3},
                                      {2, 4, 4, true, 2},
                                      {3, 3, 4, true, 3},
                                      {3, 5, 3, true, 2},
                                      {4, 4, 4, true, 2},
                                      {4, 1, 8, true, 3},
                                      {8, 1, 8, true, 2}}};
template <typename T>
constexpr int blocks_of(const Tile& tile) {
  return sizeof(T) == sizeof(double) ? 2 : tile.blocks;
}

struct Columns : GradWeightArguments {
  int64_t input_image, input_channel, grad_image, grad_filter;  // strides of arrays whose images may be far
  int64_t input_move, grad_move;                                // from a gradient of a lane to the next, elements
  int teams;
  int tap_step, grad_step, strip_rows;
  int lanes, lanes_log2;  // of a team, and the power of two that has room for them
  int splits;             // blocks that share a filter and a tile
  Divider by_tiles, by_tile_columns, by_phases, by_splits, by_stride_h, by_stride_w, by_grad_step, by_strip_rows;
};

__device__ inline bool is_number(float value) {
  return is_finite(value);
}
__device__ inline bool is_number(double value) {
  return fabs(value) <= std::numeric_limits<double>::max();
}

// Which sums a team has.
struct Share {
  int filter, split, first_row, first_column;  // of the tile
  bool has_bias;

  __device__ Share(const Columns& a, uint32_t team, int tile_rows, int tile_columns) {
    uint32_t tile = a.by_tiles.split(team);
    has_bias = tile == 0 && a.grad_bias != nullptr;
    split = a.by_splits.split(team);
    filter = team;
    first_column = a.by_tile_columns.split(tile) * tile_columns;
    first_row = a.by_phases.split(tile);
    first_row += tile * tile_rows * a.tap_step;
  }
};

// How many steps of `stride` from `first` on lie below `end`.
__device__ inline int steps_below(int end, int first, const Divider& stride) {
  uint32_t room = max(end - first + static_cast<int>(stride.divisor) - 1, 0);
  stride.split(room);
  return room;
}

// kDense: whether the columns of a tile lie side by side in memory.
template <typename T, int kTile, bool kDense>
__global__ void __launch_bounds__(kMostThreads, blocks_of<T>(kTiles[kTile]))
    columns_grad_weight(const __grid_constant__ Columns a) {
  using Number = Accumulator<T>;
  constexpr Tile kShape = kTiles[kTile];
  constexpr int kRows = kShape.rows, kColumns = kShape.columns, kTaps = kShape.taps(), kSteps = kShape.steps;
  constexpr int kKept = kShape.keeps ? kRows - 1 : 0, kNew = kShape.keeps ? 1 : kRows;  // rows of pixels, of a step
  constexpr bool kIsDouble = std::is_same_v<Number, double>;
  struct Sums {
    Number of[kTaps + 1] = {};  // the last one is the bias
  };
  __shared__ Number sums[kMostThreads / kFewLanes][kTaps + 1];
  let_next_kernel_start();
  const int teams_of_block = max(blockDim.x >> a.lanes_log2, 1), first_team = blockIdx.x * teams_of_block;
  const int team = first_team + (threadIdx.x >> a.lanes_log2);
  const Share share(a, team, kRows, kColumns);

  // Gradients that meet the image: taps of a tile see row y + n * stride_h for gradient n, and those further down.
  const int y = share.first_row * a.dilation_h - a.padding_h, x = share.first_column * a.dilation_w - a.padding_w;
  const int row_step = a.stride_h * a.grad_step, tap_rows = a.tap_step * a.dilation_h;
  const int above = steps_below(0, y + (kRows - 1) * tap_rows, a.by_stride_h);
  const int left = steps_below(0, x + (kColumns - 1) * a.dilation_w, a.by_stride_w);
  const int first_row = share.has_bias ? 0 : above, first_column = share.has_bias ? 0 : left;
  const int end_row = share.has_bias ? a.out_height : min(steps_below(a.height, y, a.by_stride_h), a.out_height);
  const int end_column = share.has_bias ? a.out_width : min(steps_below(a.width, x, a.by_stride_w), a.out_width);
  const int rows = max(end_row - first_row, 0), phases = min(rows, a.grad_step);
  const uint32_t columns = max(end_column - first_column, 0);
  const uint32_t strips = steps_below(steps_below(rows, 0, a.by_grad_step), 0, a.by_strip_rows);
  const int items = team < a.teams ? a.batch * phases * strips * columns : 0;

  const T* const input = static_cast<const T*>(a.input) + a.channel_of(share.filter) * a.input_channel;
  const T* const gradient = static_cast<const T*>(a.grad) + share.filter * a.grad_filter;
  const int64_t tap_move = int64_t{tap_rows} * a.input_stride[2];
  const int column_move = a.dilation_w * a.input_stride[3];
  wait_for_kernel_before();

  Sums total;
  const int lane = threadIdx.x & ((1 << a.lanes_log2) - 1);
  for (int item = share.split * a.lanes + lane; item < items; item += a.splits * a.lanes) {
    uint32_t image = item / columns;
    const int column = first_column + (item - image * columns);
    const int strip = image % strips;
    image /= strips;
    const int phase = image % phases;
    image /= phases;
    const int row = first_row + phase + strip * a.strip_rows * a.grad_step;
    const int count = min(steps_below(end_row, row, a.by_grad_step), a.strip_rows);

    const int x0 = column * a.stride_w + x, y0 = row * a.stride_h + y;
    const T* pixel = input + image * a.input_image + int64_t{y0} * a.input_stride[2] + int64_t{x0} * a.input_stride[3];
    const T* grad =
        gradient + image * a.grad_image + int64_t{row} * a.grad_stride[2] + int64_t{column} * a.grad_stride[3];
    uint32_t limit[kColumns];  // rows of each column, none where it is beside the image
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const bool is_inside = share.first_column + j < a.kernel_w &&
                             static_cast<uint32_t>(x0 + j * a.dilation_w) < static_cast<uint32_t>(a.width);
      limit[j] = is_inside ? a.height : 0;
    }

    Number window[kKept + kNew * kSteps][kColumns];
    int next = y0;  // row to load
    const auto load_row = [&](int n, int row, const T* from) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        window[n][j] = load<T, 1>(from + (kDense ? j : j * column_move), static_cast<uint32_t>(row) < limit[j])[0];
    };
    const auto move_on = [&] { pixel += a.input_move, next += row_step; };
#pragma unroll
    for (int n = 0; n < kKept; ++n) load_row(n, next, pixel), move_on();

    Sums part;
    Sums& to = kIsDouble ? total : part;  // in float32, short sums of short sums: the rounding error grows slowly
    for (int k = 0; k < count; k += kSteps) {
      Number g[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        g[s] = load<T, 1>(grad, k + s < count)[0];
        grad += a.grad_move;
#pragma unroll
        for (int i = 0; i < kNew; ++i) load_row(kKept + s * kNew + i, next + i * tap_rows, pixel + i * tap_move);
        move_on();
      }
      bool finite = true;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        finite = finite && is_number(g[s]);
        to.of[kTaps] += g[s];
      }
      const auto multiply = [&](auto&& meets) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          if (s > 0 && k + s >= count) break;
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            const int i = t / kColumns, j = t % kColumns;
            if (meets(s, i, j)) to.of[t] = fma(g[s], window[s * kNew + i][j], to.of[t]);
          }
        }
      };
      if (finite) {  // zeros beside the image add nothing
        multiply([](int, int, int) { return true; });
      } else {
        int first = next - (kKept + kSteps) * row_step;
        asm volatile("" : "+r"(first));  // worked out here alone
        multiply(
            [&](int s, int i, int j) { return static_cast<uint32_t>(first + s * row_step + i * tap_rows) < limit[j]; });
      }
#pragma unroll
      for (int n = 0; n < kKept; ++n)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) window[n][j] = window[n + kSteps][j];
    }
    if constexpr (!kIsDouble)
#pragma unroll
      for (int t = 0; t <= kTaps; ++t) total.of[t] += part.of[t];
  }

  const int group_log2 = min(a.lanes_log2, 5);  // lanes of a warp that belong together
  for (int offset = 1 << group_log2 >> 1; offset > 0; offset /= 2)
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) total.of[t] += __shfl_xor_sync(~0u, total.of[t], offset);
  if ((threadIdx.x & ((1 << group_log2) - 1)) == 0)
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) sums[threadIdx.x >> group_log2][t] = total.of[t];
  __syncthreads();

  const int groups = a.lanes >> group_log2;  // of a team
  for (int at = threadIdx.x; at < teams_of_block * (kTaps + 1); at += blockDim.x) {
    const int own = at / (kTaps + 1), t = at % (kTaps + 1);
    if (first_team + own >= a.teams) continue;
    const Share put(a, first_team + own, kRows, kColumns);
    const int row = put.first_row + t / kColumns * a.tap_step, column = put.first_column + t % kColumns;
    const bool is_bias = t == kTaps;
    if (is_bias ? !put.has_bias : row >= a.kernel_h || column >= a.kernel_w) continue;
    Number sum = 0;
#pragma unroll
    for (int group = 0; group < kMostThreads / 32; ++group)
      if (group < groups) sum += sums[own * groups + group][t];
    a.template put<T>(put.split, is_bias ? a.taps : row * a.kernel_w + column, put.filter, sum);
  }
}

// How a kernel is cut into tiles. Rows of the kernel that see the same rows of pixels are `tap_step` apart, and see
// them for gradients that are `grad_step` apart.
struct Cut {
  int64_t tap_step, grad_step, phases, tiles, tile_columns;

  Cut(const Problem& p, const Tile& tile) : tap_step(1), grad_step(1) {
    if (tile.keeps) {
      const int64_t common = std::gcd(p.stride_h, p.dilation_h);
      tap_step = p.stride_h / common, grad_step = p.dilation_h / common;
    }
    phases = std::min(tap_step, p.kernel_h);
    tile_columns = ceil_div(p.kernel_w, tile.columns);
    tiles = phases * ceil_div(ceil_div(p.kernel_h, tap_step), tile.rows) * tile_columns;
  }

  // Instructions for a gradient: those of the rows that are there before the first one belong to a strip, of which
  // there are more the fewer gradients there are.
  double cost(const Problem& p, const Tile& tile) const {
    constexpr double kLoad = 4.5, kStep = 3;
    constexpr int64_t kLanes = 1 << 16;  // about as many as are under way together
    const int64_t rows = ceil_div(p.out_height, grad_step);
    const int64_t gradients = p.batch * p.filters() * p.out_height * p.out_width * tiles;
    const int64_t longest = std::clamp<int64_t>(gradients / kLanes, tile.steps, kStripRows);
    const double strip = static_cast<double>(std::min(rows, longest));
    const double loads = tile.columns * (tile.keeps ? 1 + (tile.rows - 1) / strip : tile.rows) + 1;
    return static_cast<double>(tiles) * (loads * kLoad + kStep + tile.taps());
  }
};

// How gradients are shared: strips of so many rows, lanes of a team, and blocks that share what a team has. Of those
// thought of, what takes the fewest turns, a turn being the time of loads that are under way together.
struct Sharing {
  int strip_rows = 1, lanes = 1, splits = 1;

  // `walks` down columns of `rows` gradients for each of so many teams; `capacity`: lanes of a GPU, the same on all, so
  // that results are too.
  Sharing(int64_t walks, int64_t rows, int64_t teams, const Tile& tile, int64_t capacity) {
    constexpr double kTeam = 0.5, kSecondKernel = 3;  // turns that these take
    const int steps = tile.steps, kept = tile.keeps ? tile.rows - 1 : 0;
    const double begin = 0.4 + static_cast<double>(kept * tile.columns) / (steps * (tile.columns + 1));  // of a strip
    constexpr double kLatency = 0.33;  // of a turn on a full GPU, which an empty one takes
    constexpr int kWarp = 32;
    const int64_t most_splits = std::max<int64_t>(capacity / (teams * kMostThreads), 1);
    int fewest = kFewLanes;
    while (fewest < kWarp && fewest < walks * ceil_div(rows, steps)) fewest *= 2;
    double least = std::numeric_limits<double>::max();
    for (int strip = steps; strip <= kStripRows; strip += steps) {
      const int64_t items = walks * ceil_div(rows, strip);
      const double of_strip = begin + static_cast<double>(ceil_div(std::min<int64_t>(strip, rows), steps));
      const auto consider = [&](int team, int64_t shared_by) {
        const double turns = static_cast<double>(ceil_div(items, team * shared_by)) * of_strip + kTeam;
        const int64_t all = teams * team * shared_by, rest = all % capacity;
        const double waves = static_cast<double>(all / capacity) +
                             (rest > 0 ? kLatency + (1 - kLatency) * static_cast<double>(rest) / capacity : 0);
        const double cost = waves * turns + (shared_by > 1 ? kSecondKernel : 0);
        if (cost < least) least = cost, strip_rows = strip, lanes = team, splits = static_cast<int>(shared_by);
      };
      for (int team = fewest; team <= kMostThreads; team += team < kFewThreads ? team : kWarp) consider(team, 1);
      if (most_splits > 1) consider(kMostThreads, std::min(most_splits, ceil_div(items, kMostThreads)));
      if (strip >= rows) break;
    }
  }
};

template <typename T, int kTile>
void launch(const Problem& p, Columns a, const Allocate& allocate, cudaStream_t stream) {
  constexpr Tile kShape = kTiles[kTile];
  const Cut cut(p, kShape);
  const int64_t rows = ceil_div(p.out_height, cut.grad_step);
  const int64_t walks = p.batch * std::min(p.out_height, cut.grad_step) * p.out_width;
  constexpr int64_t kMultiprocessors = 132;
  const Sharing sharing(walks, rows, p.filters() * cut.tiles, kShape,
                        kMultiprocessors * blocks_of<T>(kShape) * kMostThreads);
  const int64_t splits = sharing.splits, teams = p.filters() * cut.tiles;
  a.strip_rows = sharing.strip_rows, a.lanes = sharing.lanes;
  while (1 << a.lanes_log2 < a.lanes) ++a.lanes_log2;
  const int threads = std::max(a.lanes, kFewThreads);

  a.splits = static_cast<int>(splits), a.teams = static_cast<int>(teams * splits);
  a.tap_step = static_cast<int>(cut.tap_step), a.grad_step = static_cast<int>(cut.grad_step);
  a.input_move = p.stride_h * cut.grad_step * p.input.stride[2], a.grad_move = cut.grad_step * p.output.stride[2];
  a.by_tiles = Divider(cut.tiles), a.by_tile_columns = Divider(cut.tile_columns), a.by_phases = Divider(cut.phases);
  a.by_splits = Divider(splits), a.by_grad_step = Divider(cut.grad_step), a.by_strip_rows = Divider(a.strip_rows);
  a.share_sums(p, splits, allocate);
  constexpr bool kNarrow = kShape.columns == 1;
  const bool is_dense = kNarrow || (a.input_stride[3] == 1 && p.dilation_w == 1);
  const auto kernel = is_dense ? columns_grad_weight<T, kTile, true> : columns_grad_weight<T, kTile, kNarrow>;
  launch_early(kernel, a, ceil_div(teams * splits, threads / a.lanes), threads, stream);
  check_launch("columns_grad_weight");
  if (splits > 1) launch_add_partial_sums(p, a.partial, splits, stream);
}

}  // namespace

void launch_columns_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  Columns a{p};
  a.input_image = p.input.stride[0], a.input_channel = p.input.stride[1];
  a.grad_image = p.output.stride[0], a.grad_filter = p.output.stride[1];
  a.by_stride_h = Divider(p.stride_h), a.by_stride_w = Divider(p.stride_w);

  std::array<double, kTiles.size()> costs;
  for (size_t i = 0; i < kTiles.size(); ++i) costs[i] = Cut(p, kTiles[i]).cost(p, kTiles[i]);
  const auto best = std::min_element(costs.begin(), costs.end()) - costs.begin();
  visit_dtype(p.dtype, [&](auto zero) {
    const auto launch_if = [&]<size_t kTile>(std::integral_constant<size_t, kTile>) {
      if (best == kTile) launch<decltype(zero), kTile>(p, a, allocate, stream);
    };
    [&]<size_t... kTile>(std::index_sequence<kTile...>) {
      (launch_if(std::integral_constant<size_t, kTile>{}), ...);
    }(std::make_index_sequence<kTiles.size()>{});
  });
}

}  // namespace dwconv
