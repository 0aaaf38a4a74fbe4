// grad_weight (and the bias gradient) in channels_last of any kernel, stride, dilation and dtype, straight from memory.
//
// Neighbouring threads own neighbouring channels, kVector of them each, and walk along rows of the gradient. With
// stride s, dilation d and g = gcd(s, d), gradient v + a * d / g meets with tap j + b * s / g the pixel
// s * v + d * j + (a + b) * s * d / g: where taps are walked in steps of s / g and gradients in steps of d / g, the
// pixels that a gradient meets are those that the one before met, one step further, and stay in registers. So a load
// serves all taps of such a stream, whatever stride and dilation are. A thread sums several streams, of any row of the
// kernel: they share the gradient. Loads of L1 bind, 128 bytes a clock, or where there is little to do their latency.
//
// Only taps that meet the image are multiplied. Sums are of at most 32 products, then of such sums, then of the
// threads' of a block; those of blocks are added up by a second kernel. Every sum has a fixed order.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "direct.cuh"
#include "exchange.h"
#include "grad_weight.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "partial_sums.h"

namespace dwconv {
namespace {

constexpr int kThreads = 256;          // of a block, at most
constexpr int kMaxLanes = 32;          // threads with channels side by side
constexpr int kPart = 32;              // gradients of a thread that are added up by themselves
constexpr int kMostParts = 128;        // of a thread's sums, so that none is long
constexpr int kMultiprocessors = 132;  // of a large GPU; the same on all, so that results are too

struct Walk : GradWeightArguments {
  // Of the whole kernel, and where the part of it begins that meets the image, which kernel_h and kernel_w are of.
  int whole_kernel_w, first_row, first_column;
  int tap_step, grad_step, pixel_step;  // columns
  bool exchanged;                       // rows and columns
  int tiles, streams, level_columns;    // level_columns: of the kernel, that the streams of a level have
  int lanes, block_tiles, teams;        // of a block: threads are [tile][team][lane]
  int outputs, parts;                   // sums of a block, and how many threads add up each
  int items, share;                     // pieces of rows, of all and of a block
  int steps, more_steps;                // gradients of a row that are walked at a time; one more for the first phases
  int segment;                          // steps of a piece, at most
  Divider by_lanes, by_teams, by_block_tiles, by_outputs, by_tile_groups, by_channel_groups;
  Divider by_groups, by_tap_step, by_rows, by_phases, by_segments, by_kernel_w;
};

// What is compiled: streams of a thread, taps of a stream, gradients whose loads are under way together, and the most
// bytes of channels side by side.
template <int streams, int taps, int steps, int bytes, int bytes_of_16_bits>
struct Tile {
  static constexpr int kStreams = streams, kTaps = taps, kSteps = steps;
  template <typename T>
  static constexpr int kVector = (sizeof(T) == 2 ? bytes_of_16_bits : bytes) / sizeof(T);
};
using OneTap = Tile<1, 1, 4, 16, 8>;
using FourTaps = Tile<4, 1, 2, 16, 8>;
using NineTaps = Tile<9, 1, 1, 8, 4>;
using TwoStreams = Tile<2, 4, 4, 8, 4>;
using OneStream = Tile<1, 8, 8, 8, 4>;

// Blocks that a multiprocessor has room for.
template <typename T, class Tile, int kVector>
constexpr int kResident =
    Tile::kStreams * Tile::kTaps == 1 || (kVector == 1 && sizeof(T) <= 4 && Tile::kStreams * Tile::kTaps <= 8) ? 3 : 2;

template <typename T, class Tile, int kVector>
__global__ void __launch_bounds__(kThreads, kResident<T, Tile, kVector>)
    walk_grad_weight(const __grid_constant__ Walk a) {
  using Sum = Accumulator<T>;
  using Pixel = Vector<T, kVector>;
  constexpr int kStreams = Tile::kStreams, kTaps = Tile::kTaps, kSteps = Tile::kSteps;
  constexpr int kKept = kTaps - 1, kWindow = kKept + kSteps;  // pixels of a stream
  constexpr int kSums = (kStreams * kTaps + 1) * kVector;     // the last kVector of the bias
  struct Sums {
    Sum tap[kStreams][kTaps][kVector] = {}, bias[kVector] = {};
  };
  extern __shared__ __align__(8) unsigned char shared_bytes[];  // [sum][thread]
  let_next_kernel_start();

  uint32_t slot = threadIdx.x, block = blockIdx.x;
  const int lane = a.by_lanes.split(slot), team = a.by_teams.split(slot);
  const int tile_group = a.by_tile_groups.split(block), channel_group = a.by_channel_groups.split(block);
  const int split = block, first_tile = tile_group * a.block_tiles, tile = first_tile + static_cast<int>(slot);
  const int filter = (channel_group * a.lanes + lane) * kVector;

  // Rows and columns of the image from the first tap to that of a stream. Behind the last stream comes the last one
  // once more, which is not written.
  int row_offset[kStreams], column_offset[kStreams], least_column = 0, most_column = 0;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    uint32_t row = min(tile * kStreams + k, a.streams - 1), level = a.by_groups.split(row);
    const int phase = a.by_tap_step.split(level);
    row_offset[k] = row * a.dilation_h;
    column_offset[k] = (level * a.level_columns + phase) * a.dilation_w;
    least_column = k == 0 ? column_offset[k] : min(least_column, column_offset[k]);
    most_column = max(most_column, column_offset[k]);
  }

  const T* const input = static_cast<const T*>(a.input) + a.channel_of(filter) * a.input_stride[1];
  const T* const grad = static_cast<const T*>(a.grad) + filter * a.grad_stride[1];
  const int input_step = a.pixel_step * a.input_stride[3], gradient_step = a.grad_step * a.grad_stride[3];
  const bool adds_bias = a.grad_bias != nullptr && tile == 0;
  wait_for_kernel_before();

  Sums total;
  const int last = min((split + 1) * a.share, a.items);
  for (int item = tile < a.tiles && filter < a.filters ? split * a.share + team : last; item < last; item += a.teams) {
    uint32_t image = item;
    const int row = a.by_rows.split(image), phase = a.by_phases.split(image);
    const int begin = static_cast<int>(a.by_segments.split(image)) * a.segment;
    const int column = phase + begin * a.grad_step;
    const int count = min(a.segment, a.steps + (phase < a.more_steps) - begin);
    if (count <= 0) continue;
    const int y0 = row * a.stride_h - a.padding_h, x0 = column * a.stride_w - a.padding_w;
    int from[kStreams],
        grad_from = static_cast<int>(image) * a.grad_stride[0] + row * a.grad_stride[2] + column * a.grad_stride[3];
    bool rows_inside = true, any_inside = false;
    const auto row_inside = [&](int k) {
      return static_cast<uint32_t>(y0 + row_offset[k]) < static_cast<uint32_t>(a.height);
    };
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      rows_inside &= row_inside(k), any_inside |= row_inside(k);
      from[k] = static_cast<int>(image) * a.input_stride[0] + (y0 + row_offset[k]) * a.input_stride[2] +
                (x0 + column_offset[k]) * a.input_stride[3];
    }

    if (!any_inside && !adds_bias) continue;

    // Pixel i of a stream, from those of the step at column x on: zeros where it is not inside the image.
    const auto inside = [&](int x, int k, int i) {
      return row_inside(k) &&
             static_cast<uint32_t>(x + column_offset[k] + i * a.pixel_step) < static_cast<uint32_t>(a.width);
    };
    Pixel pixels[kStreams][kWindow], gradients[kSteps];
    const auto load_steps = [&](auto interior, int x, int left) {
      constexpr bool kInterior = decltype(interior)::value;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        gradients[s] = load<T, kVector>(grad + (grad_from + s * gradient_step), kInterior || s < left);
#pragma unroll
      for (int k = 0; k < kStreams; ++k)
#pragma unroll
        for (int i = kKept; i < kWindow; ++i)
          pixels[k][i] = load<T, kVector>(input + (from[k] + i * input_step), kInterior || inside(x, k, i));
    };
    // `whole`: there are all gradients. `plain`: zeros add nothing to the sums, as no gradient is Inf or NaN.
    const auto multiply = [&](Sums& sums, auto whole, auto plain, int x, int left) {
      constexpr bool kWhole = decltype(whole)::value, kPlain = decltype(plain)::value;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (!kWhole && s >= left) break;
#pragma unroll
        for (int k = 0; k < kStreams; ++k)
#pragma unroll
          for (int b = 0; b < kTaps; ++b)
            if (kPlain || inside(x, k, s + b))
#pragma unroll
              for (int c = 0; c < kVector; ++c)
                sums.tap[k][b][c] = fma(Sum{gradients[s][c]}, Sum{pixels[k][s + b][c]}, sums.tap[k][b][c]);
      }
    };
    const auto add_steps = [&](Sums& sums, bool interior, int x, int left) {
      bool finite = true;
      if (interior) {
        load_steps(std::true_type{}, x, left);
      } else {
        load_steps(std::false_type{}, x, left);
        Sum zero = 0;
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int c = 0; c < kVector; ++c) zero = fma(Sum{gradients[s][c]}, Sum{0}, zero);
        finite = zero == 0;
      }
      if (adds_bias)
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int c = 0; c < kVector; ++c) sums.bias[c] += gradients[s][c];
      if (finite && left >= kSteps)
        multiply(sums, std::true_type{}, std::true_type{}, x, left);
      else if (finite)
        multiply(sums, std::false_type{}, std::true_type{}, x, left);
      else
        multiply(sums, std::false_type{}, std::false_type{}, x, left);
#pragma unroll
      for (int k = 0; k < kStreams; ++k)
#pragma unroll
        for (int i = 0; i < kKept; ++i) pixels[k][i] = pixels[k][i + kSteps];
    };
    const auto add_segment = [&](Sums& sums) {
#pragma unroll
      for (int k = 0; k < kStreams; ++k)
#pragma unroll
        for (int i = 0; i < kKept; ++i)
          pixels[k][i] = load<T, kVector>(input + (from[k] + i * input_step), inside(x0, k, i));
      int x = x0;
#pragma unroll 1
      for (int left = count; left > 0; left -= kSteps) {
        const int first_x = x + least_column, last_x = x + most_column + (kWindow - 1) * a.pixel_step;
        if (adds_bias || (any_inside && first_x < a.width && last_x >= 0)) {
          add_steps(sums, rows_inside && left >= kSteps && first_x >= 0 && last_x < a.width, x, left);
        } else {
#pragma unroll
          for (int k = 0; k < kStreams; ++k)
#pragma unroll
            for (int i = 0; i < kKept; ++i) pixels[k][i] = {};
        }
        x += kSteps * a.pixel_step, grad_from += kSteps * gradient_step;
#pragma unroll
        for (int k = 0; k < kStreams; ++k) from[k] += kSteps * input_step;
      }
    };
    if constexpr (std::is_same_v<Sum, double>) {
      add_segment(total);
    } else {
      Sums part;  // short sums of short sums: the rounding error grows slowly
      add_segment(part);
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        total.bias[c] += part.bias[c];
#pragma unroll
        for (int k = 0; k < kStreams; ++k)
#pragma unroll
          for (int b = 0; b < kTaps; ++b) total.tap[k][b][c] += part.tap[k][b][c];
      }
    }
  }

  // Sums of a block, each over its teams: first by as many threads as there are for a sum.
  Sum* const shared = reinterpret_cast<Sum*>(shared_bytes);
  const int pitch = blockDim.x + 32 / kVector;  // channels of a thread lie in different banks
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int c = i % kVector, tap = i / kVector;
    shared[i * pitch + threadIdx.x] =
        tap == kStreams * kTaps ? total.bias[c] : total.tap[tap / kTaps % kStreams][tap % kTaps][c];
  }
  __syncthreads();
  const auto sum_of = [&](uint32_t output, int first, int step) {
    const int c = output % kVector;
    uint32_t rest = output / kVector;
    const int lane = a.by_lanes.split(rest), tile = a.by_block_tiles.split(rest);
    const Sum* from = shared + (static_cast<int>(rest) * kVector + c) * pitch + tile * a.teams * a.lanes + lane;
    Sum sum = 0;
#pragma unroll 4
    for (int team = first; team < a.teams; team += step) sum += from[team * a.lanes];
    return sum;
  };
  Sum* const halves = shared + kSums * pitch;
  if (a.parts > 1) {
    uint32_t part = threadIdx.x;
    const int output = a.by_outputs.split(part);
    if (static_cast<int>(part) < a.parts) halves[threadIdx.x] = sum_of(output, part, a.parts);
    __syncthreads();
  }
  for (int output = threadIdx.x; output < a.outputs; output += blockDim.x) {
    const int c = output % kVector;
    uint32_t rest = output / kVector;
    const int filter = (channel_group * a.lanes + static_cast<int>(a.by_lanes.split(rest))) * kVector + c;
    const int tile = first_tile + static_cast<int>(a.by_block_tiles.split(rest)), tap = rest;
    uint32_t row = tile * kStreams + tap / kTaps;
    if (filter >= a.filters || tile >= a.tiles) continue;
    int to = a.taps;
    if (tap < kStreams * kTaps) {
      if (static_cast<int>(row) >= a.streams) continue;
      uint32_t level = a.by_groups.split(row);
      const int phase = a.by_tap_step.split(level);
      const int column = static_cast<int>(level) * a.level_columns + phase + tap % kTaps * a.tap_step;
      if (column >= a.kernel_w) continue;
      to = (a.first_row + (a.exchanged ? column : row)) * a.whole_kernel_w + a.first_column +
           (a.exchanged ? row : column);
    } else if (a.grad_bias == nullptr || tile > 0) {
      continue;
    }
    Sum sum = 0;
    if (a.parts > 1)
      for (int part = 0; part < a.parts; ++part) sum += halves[part * a.outputs + output];
    else
      sum = sum_of(output, 0, 1);
    a.template put<T>(split, to, filter, sum);
  }

  // Taps that meet no pixel.
  if (a.kernel_h * a.kernel_w == a.taps || tile_group > 0) return;
  const int rows = a.exchanged ? a.kernel_w : a.kernel_h, columns = a.exchanged ? a.kernel_h : a.kernel_w;
  for (int at = threadIdx.x; at < a.taps * a.lanes * kVector; at += blockDim.x) {
    const int c = at % kVector;
    uint32_t tap = at / kVector;
    const int filter = (channel_group * a.lanes + static_cast<int>(a.by_lanes.split(tap))) * kVector + c;
    uint32_t row = tap;
    const uint32_t column = a.by_kernel_w.split(row);
    if (filter < a.filters &&
        (row - a.first_row >= static_cast<uint32_t>(rows) || column - a.first_column >= static_cast<uint32_t>(columns)))
      a.template put<T>(split, static_cast<int>(tap), filter, Sum{0});
  }
}

// A tile's sizes for the host: what is above, channels side by side, and the blocks that a GPU has room for.
struct Sizes {
  int64_t streams, taps, steps, vector, blocks;
};

// The streams that a kernel has, and how gradients are walked.
struct Streams {
  int64_t tap_step, grad_step, pixel_step, phases, steps, groups, streams, tiles;

  Streams(const Problem& p, const Sizes& t) {
    const int64_t common = std::gcd(p.stride_w, p.dilation_w);
    tap_step = std::min(p.stride_w / common, p.kernel_w), grad_step = p.dilation_w / common;
    pixel_step = p.stride_w / common * p.dilation_w;
    phases = std::min(grad_step, p.out_width), steps = ceil_div(p.out_width, phases);
    const int64_t before = (ceil_div(p.kernel_w, tap_step * t.taps) - 1) * tap_step;  // of all levels but the last one
    groups = before + std::min(tap_step, p.kernel_w - before * t.taps);
    streams = p.kernel_h * groups, tiles = ceil_div(streams, t.streams);
  }

  // Issue slots of a multiprocessor, for an image and a channel.
  double cost(const Problem& p, const Sizes& t, bool exchanged) const {
    // A multiprocessor loads 128 bytes of a line in the time of four instructions; what is loaded together is waited
    // for, and counted, together.
    constexpr double kWait = 40;
    const int64_t all = ceil_div(steps, t.steps) * t.steps, loads = all + ceil_div(steps, kPart) * (t.taps - 1);
    const double teams = 32 / std::min<double>(kMaxLanes, ceil_div(p.filters(), t.vector));
    const int64_t bytes = size_of(p.dtype);
    const double lines = exchanged ? teams * static_cast<double>(p.channels * bytes * p.stride_h) / 128 : teams;
    const double load = 4 * std::max({static_cast<double>(t.vector * bytes) / 4, lines, 1.0});
    return static_cast<double>(tiles * phases * p.out_height) *
           (load * static_cast<double>(t.streams * loads + all) +
            static_cast<double>(t.streams * t.taps * all * t.vector) + kWait * static_cast<double>(all / t.steps)) /
           static_cast<double>(t.vector);
  }
};

// How blocks share the work.
struct Blocks {
  int64_t lanes, channel_groups, block_tiles, tile_groups, teams;
  int64_t segment, segments, items, share, splits;
};
struct Work {
  int64_t tiles, vectors, rows, steps, steps_at_once;
  int64_t image_bytes, sum_bytes, vector_bytes, blocks;
};

// The more threads of a block have the same taps and channels, the fewer sums are left to be added up, but the more
// blocks load the same pixels: blocks have all taps and many channels where images are large, and few where they are
// not.
inline Blocks arrange(const Work& w) {
  constexpr int64_t kLeastBytes = 64;                              // of channels side by side
  constexpr int64_t kFewBytes = 4 << 20;                           // are loaded in no time
  constexpr int64_t kFewRounds = 2, kBusy = kMultiprocessors / 2;  // that another kernel would take as long as
  constexpr int64_t kManyRounds = 8, kMostWaves = 4;  // large problems go in waves of blocks, which share them evenly
  const auto at = [&](int64_t most_lanes, int64_t most_tiles) {
    Blocks b{};
    b.channel_groups = ceil_div(w.vectors, most_lanes), b.lanes = ceil_div(w.vectors, b.channel_groups);
    const int64_t slots = kThreads / b.lanes;
    b.tile_groups = ceil_div(w.tiles, std::min(slots, most_tiles)), b.block_tiles = ceil_div(w.tiles, b.tile_groups);
    b.teams = slots / b.block_tiles;
    const int64_t groups = b.tile_groups * b.channel_groups, most = ceil_div(w.steps, w.steps_at_once);
    const int64_t wanted = ceil_div(w.blocks, groups);
    const int64_t pieces = std::clamp(ceil_div(wanted * b.teams, w.rows), ceil_div(w.steps, kPart), most);
    b.segment = ceil_div(most, pieces) * w.steps_at_once, b.segments = ceil_div(w.steps, b.segment);
    b.items = w.rows * b.segments;
    const int64_t all = ceil_div(b.items, b.teams);  // pieces of a thread, if there were one split
    int64_t rounds = ceil_div(all, wanted);
    if (rounds > kManyRounds) rounds = std::max(kManyRounds, ceil_div(rounds, kMostWaves));
    rounds = std::min<int64_t>(rounds, kMostParts);
    if (groups >= kBusy && all - rounds <= kFewRounds) rounds = all;
    b.share = b.teams * rounds, b.splits = ceil_div(b.items, b.share);
    return b;
  };
  int64_t most_lanes = kMaxLanes, most_tiles = kThreads;
  for (Blocks b = at(most_lanes, most_tiles);; b = at(most_lanes, most_tiles)) {
    const int64_t partial_bytes = 2 * b.splits * w.sum_bytes;
    if (b.splits == 1 || 4 * partial_bytes <= w.image_bytes) return b;
    if (b.block_tiles > 1 && 2 * b.tile_groups * w.image_bytes <= std::max(partial_bytes, kFewBytes))
      most_tiles = b.block_tiles / 2;
    else if (b.lanes > 1 && b.lanes * w.vector_bytes >= 2 * kLeastBytes)
      most_lanes = ceil_div(b.lanes, 2);
    else
      return b;
  }
}

// The taps of one side that meet the image for some output: from `first` on, at least one.
void leave_out(int64_t size, int64_t out, int64_t stride, int64_t dilation, int64_t& kernel, int64_t& padding,
               int64_t& first) {
  const int64_t end = std::min(kernel, (size - 1 + padding) / dilation + 1);
  first = std::clamp<int64_t>(ceil_div(padding - (out - 1) * stride, dilation), 0, end - 1);
  kernel = end - first, padding -= first * dilation;
}

// Of `whole`, the taps that meet the image, where that is less than to write zeros for the others.
Problem without_idle_taps(const Problem& whole, int64_t& first_row, int64_t& first_column) {
  Problem p = whole;
  constexpr int64_t kManyGradients = 1024;
  if (p.batch * p.out_height * p.out_width < kManyGradients) return p;
  leave_out(p.height, p.out_height, p.stride_h, p.dilation_h, p.kernel_h, p.padding_h, first_row);
  leave_out(p.width, p.out_width, p.stride_w, p.dilation_w, p.kernel_w, p.padding_w, first_column);
  return p;
}

// What to do, and how: `p` is what is left of a problem, exchanged or not.
struct Launch {
  Walk walk;
  int64_t blocks, threads, splits, bytes;

  Launch(const Problem& p, const Sizes& t, int64_t taps, bool exchanged) : walk{p} {
    const Streams s(p, t);
    Walk& a = walk;
    a.taps = static_cast<int>(taps), a.exchanged = exchanged;
    a.tap_step = static_cast<int>(s.tap_step), a.grad_step = static_cast<int>(s.grad_step);
    a.pixel_step = static_cast<int>(s.pixel_step), a.level_columns = static_cast<int>(s.tap_step * t.taps);
    a.streams = static_cast<int>(s.streams), a.tiles = static_cast<int>(s.tiles);
    a.steps = static_cast<int>(p.out_width / s.phases), a.more_steps = static_cast<int>(p.out_width % s.phases);

    const int64_t sum_bytes = (taps + (p.bias != nullptr)) * p.filters() * std::max<int64_t>(size_of(p.dtype), 4);
    const int64_t image_bytes =
        p.batch * (p.channels * p.height * p.width + p.filters() * p.out_height * p.out_width) * size_of(p.dtype);
    const Blocks b = arrange({s.tiles, ceil_div(p.filters(), t.vector), p.batch * p.out_height * s.phases, s.steps,
                              t.steps, image_bytes, sum_bytes, t.vector * size_of(p.dtype), t.blocks});
    threads = b.lanes * b.block_tiles * b.teams, blocks = b.tile_groups * b.channel_groups * b.splits;
    splits = b.splits;
    const int64_t sums = (t.streams * t.taps + 1) * t.vector, outputs = sums * b.lanes * b.block_tiles;
    bytes = (sums * (threads + 32 / t.vector) + threads) * std::max<int64_t>(size_of(p.dtype), 4);
    a.lanes = static_cast<int>(b.lanes), a.block_tiles = static_cast<int>(b.block_tiles);
    a.teams = static_cast<int>(b.teams), a.segment = static_cast<int>(b.segment);
    a.items = static_cast<int>(b.items), a.share = static_cast<int>(b.share);
    a.outputs = static_cast<int>(outputs), a.parts = static_cast<int>(std::min(b.teams, threads / outputs));
    a.by_lanes = Divider(b.lanes), a.by_teams = Divider(b.teams), a.by_block_tiles = Divider(b.block_tiles);
    a.by_outputs = Divider(outputs), a.by_tile_groups = Divider(b.tile_groups);
    a.by_channel_groups = Divider(b.channel_groups);
    a.by_groups = Divider(s.groups), a.by_tap_step = Divider(s.tap_step), a.by_rows = Divider(p.out_height);
    a.by_phases = Divider(s.phases), a.by_segments = Divider(b.segments);
  }
};

// Whether channels lie side by side in vectors of `count` elements.
bool has_vectors(const Problem& p, int64_t count) {
  const auto lies = [&](const View& view, int64_t height, int64_t width) {
    return reinterpret_cast<uintptr_t>(view.data) % (count * size_of(p.dtype)) == 0 &&
           ((p.batch > 1 ? view.stride[0] : 0) | (height > 1 ? view.stride[2] : 0) | (width > 1 ? view.stride[3] : 0)) %
                   count ==
               0;
  };
  return p.multiplier == 1 && p.channels % count == 0 && lies(p.input, p.height, p.width) &&
         lies(p.output, p.out_height, p.out_width);
}

}  // namespace

void launch_walk_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  int64_t first_row = 0, first_column = 0;
  const Problem straight = without_idle_taps(problem, first_row, first_column), turned = exchange(straight);
  visit_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto visit = [&](auto&& with) {
      const auto with_vectors = [&](auto tile) {
        constexpr int kVector = decltype(tile)::template kVector<T>;
        if (has_vectors(problem, kVector))
          with(tile, std::integral_constant<int, kVector>{});
        else
          with(tile, std::integral_constant<int, 1>{});
      };
      with_vectors(OneTap{}), with_vectors(FourTaps{}), with_vectors(NineTaps{}), with_vectors(TwoStreams{});
      with_vectors(OneStream{});
    };
    const auto sizes_of = [](auto tile, auto vector) {
      using Tile = decltype(tile);
      return Sizes{Tile::kStreams, Tile::kTaps, Tile::kSteps, vector, kMultiprocessors * kResident<T, Tile, vector>};
    };
    double least = INFINITY;
    int number = 0, best = 0;  // of ways: a tile, exchanged or not
    visit([&](auto tile, auto vector) {
      for (const Problem* p : {&straight, &turned}) {
        const Sizes sizes = sizes_of(tile, vector);
        const double cost = Streams(*p, sizes).cost(*p, sizes, p == &turned);
        if (cost < least) least = cost, best = number;
        ++number;
      }
    });
    number = 0;
    visit([&](auto tile, auto vector) {
      const bool exchanged = best % 2 == 1;
      if (number++ != best / 2) return;
      Launch launch(exchanged ? turned : straight, sizes_of(tile, vector), problem.taps(), exchanged);
      Walk& a = launch.walk;
      a.whole_kernel_w = static_cast<int>(problem.kernel_w), a.by_kernel_w = Divider(problem.kernel_w);
      a.first_row = static_cast<int>(first_row), a.first_column = static_cast<int>(first_column);
      a.share_sums(problem, launch.splits, allocate);
      launch_early(walk_grad_weight<T, decltype(tile), vector>, a, launch.blocks, static_cast<int>(launch.threads),
                   stream, {.shared_bytes = launch.bytes});
      check_launch("walk_grad_weight_channels_last");
      if (launch.splits > 1) launch_add_partial_sums(problem, a.partial, launch.splits, stream);
    });
  });
}

}  // namespace dwconv
