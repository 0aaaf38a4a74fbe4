// Forward and grad_input of any kernel, stride and dilation, straight from memory: for problems so small that latency
// is most of what they take. A thread gathers the taps of one output, patch by patch of the kernel, with all loads of a
// patch in flight together; what neighbouring threads share is found in L1. Where there are threads enough and outputs
// below each other meet the same rows, a thread has two of them. A patch takes the latency of a load, a tap about 9
// instructions, and an output 140 besides.
//
// In channels_last, where each lane has a filter of its own, a block lays out its filters in shared memory first: they
// lie side by side, but what lanes want at once does not.
//
// Only taps that meet the image are multiplied: where one does not, pixel and weight both are zero; or where a thread
// has two outputs the pixel alone, and what has become NaN is computed again.
#include "gather.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <tuple>

#include "device.h"
#include "direct.cuh"
#include "launch.h"
#include "mapping.cuh"
#include "overlap.cuh"

namespace dwconv {
namespace {

// Taps of a kernel that are taken at once.
template <int rows, int columns>
struct Patch {
  static constexpr int kRows = rows, kColumns = columns, kTaps = rows * columns;

  static int64_t count(int64_t kernel_h, int64_t kernel_w) {
    return ceil_div(kernel_h, kRows) * ceil_div(kernel_w, kColumns);
  }
};

// Calls visit(Patch) with the first one of those for which cost(Patch) is least.
template <typename Patches, typename Cost, typename Visitor>
void visit_best_patch(Cost&& cost, Visitor&& visit) {
  std::apply(
      [&](auto... patch) {
        const double costs[] = {cost(patch)...};
        const auto best = std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs);
        int number = 0;
        ((number++ == best && (visit(patch), true)), ...);
      },
      Patches{});
}

// As many taps as registers hold pixels and weights of.
using Patches = std::tuple<Patch<1, 1>, Patch<2, 2>, Patch<3, 3>, Patch<1, 8>, Patch<8, 1>, Patch<5, 5>, Patch<4, 8>>;
using SmallPatches = std::tuple<Patch<1, 1>, Patch<2, 2>, Patch<3, 3>, Patch<1, 8>, Patch<8, 1>>;
template <typename T>
using PatchesOf = std::conditional_t<sizeof(T) == sizeof(double), SmallPatches, Patches>;

constexpr int kThreads = 128, kThreadsChannelsLast = 256;
constexpr uint32_t kBeside = 1u << 30;  // beyond all offsets within a plane; twice as much is as well

// Where the taps along one side lead to from an output: number n of those that reach it to `from` + n * move.
struct Side {
  int size;      // of the source
  int stride;    // of the source in memory
  int weight;    // stride of the weights in memory
  int kernel;    // taps
  int taps;      // that reach an output, at most
  int tap_step;  // from one of them to the next
  int scale, origin, move;
  // grad_input at a stride: the first tap that reaches an output, by what is left when the output's number in the
  // padded image is divided by the stride, and how far back from the quotient it leads.
  Divider by_stride;
  struct Phase {
    int first, back;
  } phase[kGatherStride];

  // From a first tap on, which leads to `from`.
  __device__ Walk walk(int first, int from) const {
    const int count = first + (taps - 1) * tap_step < kernel ? taps : first < kernel ? taps - 1 : 0;
    return {first, tap_step, count, from, move};
  }
};

struct Arguments : MappingArguments {
  Side rows, columns;
  int row_step;    // from one of a thread's outputs to the other
  int planes;      // of the target
  uint32_t units;  // outputs; where filters are laid out, pixels
  bool channels_last;
  int tile, staged;  // channels of a block, and their filters, where these are laid out
  Divider by_planes, by_rows, by_columns, by_tile, by_tiles, by_taps, by_kernel_w, by_row_step;
};

// The first tap that reaches an output along one side, and where it leads to.
template <bool kSpread>
__device__ int first_tap(const Side& side, int output, int& from) {
  from = output * side.scale + side.origin;
  if (!kSpread) return 0;
  uint32_t quotient = from;
  const Side::Phase& phase = side.phase[side.by_stride.split(quotient)];
  from = static_cast<int>(quotient) - phase.back;
  return phase.first;
}

// Lays out the filters of a block's channels, `weight` and all behind, with several loads of a thread in flight.
template <typename T>
__device__ void lay_out(const Arguments& a, const T* weight, Accumulator<T>* staged, int first_filter, int taps,
                        int pitch) {
  constexpr int kTogether = 4;
  const int count = min(a.staged, a.planes * a.fan_in - first_filter) * taps;
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kTogether * kThreadsChannelsLast) {
    Vector<T, 1> element[kTogether];
    int place[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      uint32_t filter = first + n * kThreadsChannelsLast;
      const bool exists = filter < count;
      uint32_t row = a.by_taps.split(filter);
      place[n] = exists ? filter * pitch + row : -1;
      const int column = a.by_kernel_w.split(row);
      element[n] = load<T, 1>(weight + (static_cast<int>(filter) * a.weight_filter +
                                        static_cast<int>(row) * a.rows.weight + column * a.columns.weight),
                              exists);
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n)
      if (place[n] >= 0) staged[place[n]] = element[n][0];
  }
}

// kShift: if not zero, a thread has two outputs, and what row r of the taps of one meets is what row r - kShift of the
// other's meets. kSpread: the taps that reach an output, or weights, lie apart. kStaged: in channels_last, with filters
// in shared memory.
template <typename T, class Patch, int kShift, bool kSpread, bool kStaged>
__global__ void __launch_bounds__(kStaged ? kThreadsChannelsLast : kThreads, Patch::kTaps <= 9 ? 4 : 2)
    gather(const __grid_constant__ Arguments a) {
  using Number = Accumulator<T>;
  static_assert(kShift == 0 || sizeof(T) <= 4);
  constexpr int kOutputs = kShift > 0 ? 2 : 1;
  constexpr int kRows = Patch::kRows, kColumns = Patch::kColumns, kSourceRows = kRows + kShift;
  extern __shared__ char shared[];
  Number* const staged = reinterpret_cast<Number*>(shared);
  uint32_t unit, plane;
  int first_plane = 0;
  bool exists;
  if constexpr (kStaged) {
    uint32_t group = blockIdx.x, pixel = threadIdx.x;
    const uint32_t pixels = kThreadsChannelsLast / a.tile;
    first_plane = static_cast<int>(a.by_tiles.split(group)) * a.tile;
    plane = first_plane + a.by_tile.split(pixel);
    unit = group * pixels + pixel;
    exists = pixel < pixels && unit < a.units && plane < a.planes;
  } else {
    unit = blockIdx.x * kThreads + threadIdx.x;
    exists = unit < a.units;
    plane = a.channels_last ? a.by_planes.split(unit) : 0;
  }
  const int column = a.by_columns.split(unit), strip = a.by_rows.split(unit);
  if (!kStaged && !a.channels_last) plane = a.by_planes.split(unit);
  const int image = unit;

  // The output whose first tap is the first one of both, and how far from it the other one is.
  int row = strip, step = 0;
  if constexpr (kOutputs > 1) {
    uint32_t pair = strip;
    const int phase = a.by_row_step.split(pair);
    step = a.rows.move > 0 ? a.row_step : -a.row_step;
    row = (2 * pair + (a.rows.move > 0 ? 0 : 1)) * a.row_step + phase;
  }
  int y, x;
  const int tap_row = first_tap<kSpread>(a.rows, row, y), tap_column = first_tap<kSpread>(a.columns, column, x);
  const int filter = static_cast<int>(plane) * a.fan_in, first_filter = first_plane * a.fan_in;
  const T* const first_source = a.source_of<T>(image, plane);
  const T* source = first_source;
  const T* weight = static_cast<const T*>(a.weight);
  weight += kStaged ? first_filter * a.weight_filter
                    : filter * a.weight_filter + tap_row * a.rows.weight + tap_column * a.columns.weight;
  // Filters that are laid out are an odd number of elements apart: lanes want as many banks.
  const int filter_taps = a.rows.kernel * a.columns.kernel, pitch = filter_taps | 1;
  const Number* staged_weight = staged + ((filter - first_filter) * pitch + tap_row * a.columns.kernel + tap_column);
  const int weight_row = (kSpread ? a.rows.tap_step : 1) * (kStaged ? a.columns.kernel : a.rows.weight);
  const int weight_column = kSpread ? a.columns.tap_step * (kStaged ? 1 : a.columns.weight) : 1;
  wait_for_kernel_before();
  let_next_kernel_start();

  Vector<T, 1> bias{};
  if (a.bias) bias = load<T, 1>(static_cast<const T*>(a.bias) + static_cast<int>(plane) * a.bias_stride, exists);
  Number sum[kOutputs] = {};
  for (int q = 0; q < a.fan_in; ++q) {
#pragma unroll 1
    for (int i = 0; i < a.rows.taps; i += kRows)
#pragma unroll 1
      for (int j = 0; j < a.columns.taps; j += kColumns) {
        // Where no tap meets the image, an offset beyond all others.
        uint32_t down[kSourceRows], across[kColumns];
        const auto offset = [&](const Side& side, int from, int first, int n, int taps) -> uint32_t {
          const int at = from + n * side.move;
          const bool is_there = n < taps && (!kSpread || kOutputs > 1 || first + n * side.tap_step < side.kernel);
          return is_there && static_cast<uint32_t>(at) < static_cast<uint32_t>(side.size) ? at * side.stride : kBeside;
        };
#pragma unroll
        for (int r = 0; r < kSourceRows; ++r)
          down[r] = exists ? offset(a.rows, y, tap_row, i + r, a.rows.taps + kShift) : kBeside;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) across[c] = offset(a.columns, x, tap_column, j + c, a.columns.taps);
        // Whether to multiply: of a thread with two outputs only what both know, which is whether the tap exists.
        const auto exists_on = [](const Side& side, int first, int n) {
          return kSpread ? first + n * side.tap_step < side.kernel : n < side.taps;
        };
        const auto counts = [&](int r, int c) {
          return kOutputs == 1 ? down[r] + across[c] < kBeside
                               : exists_on(a.rows, tap_row, i + r) && exists_on(a.columns, tap_column, j + c);
        };
        Vector<T, 1> pixel[kSourceRows][kColumns], factor[kStaged ? 1 : kRows][kColumns];
#pragma unroll
        for (int r = 0; r < kSourceRows; ++r) {
          const T* const weights = weight + ((i + r) * weight_row + j * weight_column);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            pixel[r][c] = load<T, 1>(source + (down[r] + across[c]), down[r] + across[c] < kBeside);
            if constexpr (!kStaged)
              if (r < kRows) factor[r][c] = load<T, 1>(weights + c * weight_column, exists && counts(r, c));
          }
        }
        if (kStaged && q + i + j == 0) {
          lay_out<T>(a, weight, staged, first_filter, filter_taps, pitch);
          __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Number* const weights = staged_weight + ((i + r) * weight_row + j * weight_column);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            Number w = 0;
            if constexpr (!kStaged)
              w = factor[r][c][0];
            else if (exists && counts(r, c))
              w = weights[c * weight_column];
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) sum[o] = fma(pixel[r + o * kShift][c][0], w, sum[o]);
          }
        }
      }
    source += a.source_stride[1], weight += kStaged ? 0 : a.weight_filter, staged_weight += pitch;
  }
  if (!exists) return;
  T* const target = a.target_of<T>(image, plane, column);
  uint32_t again = 0;  // outputs whose sums are not finite, as bits
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int at = row + o * step;
    if (kOutputs > 1 && at >= a.out_height) continue;
    if (kOutputs > 1 && !(sum[o] * 0 == 0))
      again |= 1u << o;
    else
      target[at * a.target_stride[2]] = narrow<T>(sum[o] + bias[0]);
  }
  for (; kOutputs > 1 && again != 0; again &= again - 1) {
    const int o = __ffs(again) - 1;
    const Number exact = tap_by_tap(a, first_source, a.weight_of<T>(plane),
                                    a.rows.walk(tap_row, y + o * kShift * a.rows.move), a.columns.walk(tap_column, x));
    target[(row + o * step) * a.target_stride[2]] = narrow<T>(exact + bias[0]);
  }
}

Side side_of(Pass pass, int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding,
             int64_t dilation, int64_t source_stride, int64_t weight_stride) {
  Side side{};
  side.stride = static_cast<int>(source_stride), side.weight = static_cast<int>(weight_stride);
  side.kernel = side.taps = static_cast<int>(kernel), side.tap_step = 1;
  if (pass == Pass::kForward) {
    side.size = static_cast<int>(size), side.scale = static_cast<int>(stride);
    side.origin = static_cast<int>(-padding), side.move = static_cast<int>(dilation);
    return side;
  }
  side.size = static_cast<int>(out_size), side.scale = 1;
  side.origin = static_cast<int>(padding), side.move = static_cast<int>(-dilation);
  if (stride == 1) return side;
  while (side.tap_step * dilation % stride != 0) ++side.tap_step;
  side.taps = static_cast<int>(ceil_div(kernel, side.tap_step));
  side.move = static_cast<int>(-side.tap_step * dilation / stride);
  side.by_stride = Divider(stride);
  for (int64_t left = 0; left < stride; ++left) {
    int64_t tap = 0;
    while (tap < side.tap_step && (tap * dilation - left) % stride != 0) ++tap;
    const bool reaches = tap < side.tap_step;
    side.phase[left] = {static_cast<int>(reaches ? tap : kernel),
                        static_cast<int>(reaches ? (tap * dilation - left) / stride : 0)};
  }
  return side;
}

}  // namespace

void launch_gather(const Problem& p, cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  const Mapping map(p);
  Arguments a{map};
  // Filters as they lie, also where grad_input is forward with the kernel flipped: taps lead backwards instead.
  a.weight = p.weight.data;
  a.weight_row = static_cast<int>(p.weight.stride[2]), a.weight_column = static_cast<int>(p.weight.stride[3]);
  a.rows = side_of(p.pass, p.height, p.out_height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h,
                   map.source.stride[2], a.weight_row);
  a.columns = side_of(p.pass, p.width, p.out_width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w,
                      map.source.stride[3], a.weight_column);
  const int64_t planes = map.targets, rows = map.out_height, columns = map.out_width;
  a.planes = map.targets, a.channels_last = planes > 1 && map.target.stride[1] == 1;
  a.by_planes = Divider(planes), a.by_columns = Divider(columns);
  const GatherTile tile(p);
  const bool staged = tile.channels > 0,
             spread = (!forward && (p.stride_h > 1 || p.stride_w > 1)) || !has_rows(p.weight, p.kernel_w);
  const int multiprocessors = current_device().multiprocessors;
  constexpr int64_t kManyThreads = 512;  // of a multiprocessor
  // Outputs as far from each other as the stride of grad_input have the same taps.
  a.row_step = static_cast<int>(forward ? 1 : p.stride_h), a.by_row_step = Divider(a.row_step);
  const int next = forward ? a.rows.scale : 1;  // rows of the source from one output of a thread to the other
  const int shift = next % a.rows.move == 0 ? std::abs(next / a.rows.move) : 0;
  const bool twice = p.dtype != DType::kFloat64 && rows > a.row_step && (shift == 1 || (shift == 2 && !spread)) &&
                     p.batch * rows * columns * planes > kManyThreads * multiprocessors;
  const int64_t strips = twice ? ceil_div(rows, 2 * a.row_step) * a.row_step : rows;
  const int64_t pixels = p.batch * strips * columns;
  a.by_rows = Divider(strips);
  int64_t blocks = ceil_div(pixels * planes, kThreads);
  a.units = static_cast<uint32_t>(pixels * planes);
  if (staged) {
    const int64_t tiles = ceil_div(planes, tile.channels);
    a.tile = static_cast<int>(tile.channels), a.staged = static_cast<int>(tile.filters);
    a.by_tile = Divider(tile.channels), a.by_tiles = Divider(tiles);
    a.by_taps = Divider(p.taps()), a.by_kernel_w = Divider(p.kernel_w);
    blocks = tiles * ceil_div(pixels, kThreadsChannelsLast / tile.channels);
    a.units = static_cast<uint32_t>(pixels);
  }
  // Cycles: a patch waits for its loads once, and the warps of a scheduler take turns to issue it, tap by tap.
  constexpr double kLatency = 600, kOfTap = 9;
  const double warps = static_cast<double>(pixels * planes) / (32 * 4 * multiprocessors);
  const auto cost = [&](auto patch) {
    return patch.count(a.rows.taps, a.columns.taps) * (kLatency + kOfTap * patch.kTaps * warps);
  };
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_best_patch<PatchesOf<T>>(cost, [&](auto patch) {
      using Patch = decltype(patch);
      const auto with = [&](auto shift, auto spread) {
        constexpr int kShift = decltype(shift)::value;
        constexpr bool kSpread = decltype(spread)::value;
        return staged ? gather<T, Patch, kShift, kSpread, true> : gather<T, Patch, kShift, kSpread, false>;
      };
      constexpr bool kCanBeTwo = sizeof(T) <= 4;
      constexpr std::integral_constant<int, 0> kOne;
      constexpr std::integral_constant<int, kCanBeTwo ? 1 : 0> kNext;
      constexpr std::integral_constant<int, kCanBeTwo ? 2 : 0> kNextButOne;
      const auto kernel = spread       ? twice ? with(kNext, std::true_type{}) : with(kOne, std::true_type{})
                          : !twice     ? with(kOne, std::false_type{})
                          : shift == 1 ? with(kNext, std::false_type{})
                                       : with(kNextButOne, std::false_type{});
      launch_early(kernel, a, blocks, staged ? kThreadsChannelsLast : kThreads, stream, {.shared_bytes = tile.bytes});
    });
  });
  check_launch("gather");
}

}  // namespace dwconv
