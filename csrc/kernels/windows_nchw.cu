// Forward and grad_input of any kernel, stride and dilation, on planes of any layout: what nothing is compiled for.
//
// A block has a tile of some planes of the target: what its windows reach of the source, and their weights, lie in
// shared memory. Rows of the target, taps and rows of the source that lie the right distances apart make a convolution
// without stride or dilation. A thread owns kRows such rows of a column and walks down each column of the source that
// they meet, once for every such set of taps: each pixel is read once, and multiplied with the weight of every one of
// the rows. Where planes have fewer rows than the kernel, pixels are passed by taps instead. Neighbouring lanes own
// neighbouring columns. Where outputs are few, some threads share the columns of the kernel, and their sums are added
// up in turn. Two loads from shared memory serve kRows products; instructions and these loads bind, not products.
//
// Few taps go straight to memory, and so do what shares next to nothing along a column (few_taps.cu) and grad_input at
// a stride, where few taps reach an output (spread.cu).
//
// Zeros stand for the rows beside the source, or the kernel. Where one meets Inf or NaN a sum is NaN: what is not
// finite is computed again, by the taps that meet the source.
#include "windows_nchw.h"

#include "device.h"
#include "few_taps.h"
#include "launch.h"
#include "overlap.cuh"
#include "spread.h"
#include "stream.cuh"
#include "window_sides.cuh"

namespace dwconv {
namespace {

constexpr int kMostThreads = 256;
constexpr int kTaps = 4;  // of a column that are multiplied together

struct Arguments : MappingArguments {
  const char* source_end;  // behind the last element
  int target_planes;
  WindowSide rows, columns;
  Reach reach_rows, reach_columns;
  int row_step;  // from one of a thread's rows to the next

  // The tile of a block, and its threads.
  int planes, tile_rows, tile_columns, units, parts, lanes;  // lanes: units that are under way together
  bool joined;                     // whether rows follow each other without gaps, and are copied 16 bytes at a time
  int pitch;                       // from row to row, in elements
  int row_bits;                    // the binary logarithm of the threads that copy a row
  int plane_pitch;                 // from source plane to source plane, in bytes
  int sets, set_pitch, long_sets;  // sets of a column's taps, the most that one has, and how many have these
  int filter_pitch, filter_column, filters_at, biases_at, sums_at;
  Divider by_slices, by_bands, by_sources, by_targets, by_filters;
  Divider by_copies, by_source_rows, by_taps, by_kernel_w, by_tap_step;
  Divider by_lanes, by_columns, by_strips, by_phases, by_source_step;
};

// Blocks that are to find registers on a multiprocessor.
template <typename T, int kRows>
constexpr int least_blocks() {
  return sizeof(T) < sizeof(double) || kRows < 4 ? 4 : kRows == 4 ? 3 : 2;
}

// Indices of one side that a tile has.
struct Span {
  int first, count;
};

// The source indices that the windows of some targets reach.
__device__ Span source_of(const WindowSide& side, Span targets) {
  const int extent = (side.kernel - 1) * side.dilation, last = targets.first + targets.count - 1;
  int begin, end;
  if (side.spread) {
    const int before = targets.first + side.padding - extent;
    begin = before > 0 ? (before + side.stride - 1) / side.stride : 0;
    end = (last + side.padding) / side.stride + 1;
  } else {
    begin = max(targets.first * side.stride - side.padding, 0);
    end = last * side.stride - side.padding + extent + 1;
  }
  return {begin, max(min(end, side.size) - begin, 0)};
}

// Where in shared memory an element goes, in bytes, and where it comes from; to nowhere, if there is none.
struct Place {
  int to;
  const void* from;
};

// Copies elements, by all threads: several are under way together. `where` says the place of a number.
template <typename To, typename From, typename Where>
__device__ void copy_elements(uint32_t count, const Where& where) {
  constexpr int kTogether = 4;
  for (uint32_t first = threadIdx.x; first < count; first += kTogether * blockDim.x) {
    From value[kTogether];
    int to[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const uint32_t number = first + n * blockDim.x;
      const Place place = number < count ? where(number) : Place{-1, nullptr};
      to[n] = place.to;
      if (place.to >= 0) value[n] = *static_cast<const From*>(place.from);
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n)
      if (to[n] >= 0) {
        if constexpr (std::is_same_v<To, From>)
          shared<To>(to[n]) = value[n];
        else
          shared<To>(to[n]) = widen(value[n]);
      }
  }
}

// sum[r] += window[first + r] * factor, or sum[kRows - 1 - r], in a window that turns.
template <bool kReversed, int kRows, int kWindow, typename Acc>
__device__ __forceinline__ void multiply(Acc (&sum)[kRows], const Acc (&window)[kWindow], int first, Acc factor) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Acc& its = sum[kReversed ? kRows - 1 - r : r];
    its = fma(window[(first + r) % kWindow], factor, its);
  }
}

// Numbers some elements apart, of which [begin, end) are there; zeros stand for the rest.
template <typename Element>
struct Run {
  const Element* from;
  int step, begin, end;

  // Those from number `first` on, to a window of numbers that turns.
  template <int kAt, int kCount, int kWindow, typename Acc>
  __device__ __forceinline__ void load(Acc (&window)[kWindow], int first) const {
    const Element* const at = from + first * step;
    if (first >= begin && first + kCount <= end) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) window[(kAt + k) % kWindow] = widen(at[k * step]);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        window[(kAt + k) % kWindow] = first + k >= begin && first + k < end ? widen(at[k * step]) : Acc(0);
    }
  }
};

// sum[r] += moving[r + v] * passing[v] for all v below `count`, which is positive. kReversed: sum[kRows - 1 - r]. What
// moves passes a window in registers, which turns: kAt is where number v lies.
template <bool kReversed, int kAt, int kRows, int kWindow, typename Acc, typename Moving, typename Passing>
__device__ __forceinline__ void correlate(Acc (&sum)[kRows], Acc (&window)[kWindow], const Run<Moving>& moving,
                                          const Passing* passing, int step, int count, int v) {
  moving.template load<kAt + kRows - 1, kTaps>(window, v + kRows - 1);
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    if (k > 0 && v + k >= count) return;
    multiply<kReversed>(sum, window, kAt + k, widen(passing[k * step]));
  }
  if (v + kTaps >= count) return;
  passing += kTaps * step, v += kTaps;
  if constexpr (kAt + kTaps < kWindow) correlate<kReversed, kAt + kTaps>(sum, window, moving, passing, step, count, v);
}

template <bool kReversed, int kRows, typename Acc, typename Moving, typename Passing>
__device__ __forceinline__ void correlate(Acc (&sum)[kRows], const Run<Moving>& moving, const Passing* passing,
                                          int step, int count) {
  constexpr int kWindow = (kRows - 1 + 2 * kTaps - 1) / kTaps * kTaps;
  Acc window[kWindow];
  moving.template load<0, kRows - 1>(window, 0);
  for (int v = 0; v < count; v += kWindow)
    correlate<kReversed, 0>(sum, window, moving, passing + v * step, step, count, v);
}

template <typename T, int kRows, bool kReversed>
__global__ void __launch_bounds__(kMostThreads, least_blocks<T, kRows>())
    windows_nchw(const __grid_constant__ Arguments a) {
  using Acc = Accumulator<T>;
  uint32_t block = blockIdx.x;
  Span columns, rows;
  columns.first = a.by_slices.split(block) * a.tile_columns;
  columns.count = min(a.tile_columns, a.columns.out_size - columns.first);
  rows.first = a.by_bands.split(block) * a.tile_rows;
  rows.count = min(a.tile_rows, a.rows.out_size - rows.first);
  const int first_plane = block * a.planes, planes = min(a.planes, a.target_planes - first_plane);
  const Span source_rows = source_of(a.rows, rows);
  const Span source_columns = a.joined ? Span{0, a.columns.size} : source_of(a.columns, columns);
  const int first_source = a.source_plane(first_plane);
  const int sources = a.source_plane(first_plane + planes - 1) + a.fan_in - first_source;
  // What lies there of source plane number s of the tile.
  const auto source_of_plane = [&](int s) {
    uint32_t image = first_source + s;
    const int plane = a.by_sources.split(image);
    return static_cast<const T*>(a.source) +
           (static_cast<int>(image) * a.source_stride[0] + plane * a.source_stride[1] +
            source_rows.first * a.source_stride[2] + source_columns.first * a.source_stride[3]);
  };
  wait_for_kernel_before();
  let_next_kernel_start();

  if (a.joined) {
    const int size = source_rows.count * a.pitch * static_cast<int>(sizeof(T));
    const uint32_t copies = sources * a.by_copies.divisor;
    for (uint32_t n = threadIdx.x; n < copies; n += blockDim.x) {
      uint32_t s = n;
      const int at = a.by_copies.split(s) * kUnit, to = s * a.plane_pitch + at;
      const char* const begin = reinterpret_cast<const char*>(source_of_plane(s));
      const char* const from = begin - reinterpret_cast<uintptr_t>(begin) % kUnit + at;
      if (from >= begin + size) continue;
      if (from >= a.source && from + kUnit <= a.source_end)
        copy_unit<kUnit>(shared_address(to), from);
      else
        for (int i = 0; i < kUnit; i += sizeof(T))
          if (from + i >= begin && from + i < begin + size) shared<T>(to + i) = *reinterpret_cast<const T*>(from + i);
    }
    commit_copies();
  } else {
    // Some neighbouring threads have a row.
    const uint32_t source_total = sources * a.by_source_rows.divisor;
    const int threads = 1 << a.row_bits, first = threadIdx.x & (threads - 1);
    for (uint32_t row = threadIdx.x >> a.row_bits; row < source_total; row += blockDim.x >> a.row_bits) {
      uint32_t s = row;
      const int y = a.by_source_rows.split(s), to = s * a.plane_pitch + y * a.pitch * static_cast<int>(sizeof(T));
      if (y >= source_rows.count) continue;
      const T* const from = source_of_plane(s) + y * a.source_stride[2];
#pragma unroll 4
      for (int x = first; x < source_columns.count; x += threads)
        copy_unit<sizeof(T)>(shared_address(to) + x * static_cast<int>(sizeof(T)), from + x * a.source_stride[3]);
    }
    commit_copies();
  }
  // Filters column by column, in each of them set by set: taps that a thread walks down lie side by side.
  constexpr int kNumber = sizeof(Acc);
  const auto filter_of = [&](uint32_t n) {  // of number n of the tile
    n += first_plane * a.fan_in;
    return static_cast<int>(a.by_filters.split(n));
  };
  copy_elements<Acc, T>(planes * a.fan_in * a.by_taps.divisor, [&](uint32_t n) {
    uint32_t row = a.by_taps.split(n);
    const int j = a.by_kernel_w.split(row), i = row, set = a.by_tap_step.split(row);
    const int at = a.rows.spread ? a.set_pitch - 1 - row : row;  // backwards, as they meet rows of the source
    return Place{
        a.filters_at + kNumber * static_cast<int>(n * a.filter_pitch + (j * a.sets + set) * a.set_pitch + at),
        static_cast<const T*>(a.weight) + (filter_of(n) * a.weight_filter + i * a.weight_row + j * a.weight_column)};
  });
  if (a.bias)
    copy_elements<Acc, T>(planes, [&](uint32_t n) {
      return Place{a.biases_at + kNumber * static_cast<int>(n),
                   static_cast<const T*>(a.bias) + filter_of(n) * a.bias_stride};
    });
  wait_copies<0>();
  __syncthreads();

  uint32_t part = threadIdx.x;
  const uint32_t lane = a.by_lanes.split(part);
  const int sets = a.rows.spread ? 1 : a.sets;
  for (int first = 0; first < a.units; first += a.lanes) {
    uint32_t plane = first + lane;
    const int column = a.by_columns.split(plane);
    uint32_t strip = a.by_strips.split(plane);
    const int phase = a.by_phases.split(strip), row = strip * (kRows * a.row_step) + phase;
    const bool valid = static_cast<int>(plane) < planes && column < columns.count && row < rows.count &&
                       static_cast<int>(part) < a.parts;
    Acc sum[kRows] = {};
    if (valid) {
      const int s = a.source_plane(first_plane + plane) - first_source;
      const int to = columns.first + column;
      const Walk across = taps_of(a.columns, a.reach_columns, to);
      for (int q = 0; q < a.fan_in; ++q) {
        const int shift = a.joined ? reinterpret_cast<uintptr_t>(source_of_plane(s + q)) % kUnit : 0;
        const T* const source = &shared<T>((s + q) * a.plane_pitch + shift);
        const Acc* const filter = &shared<Acc>(a.filters_at) + (plane * a.fan_in + q) * a.filter_pitch;
        for (int set = 0; set < sets; ++set) {
          // Taps from the one on that reads the first source row, and where they lie in a column of the filter.
          int count = a.set_pitch, move = a.by_source_step.divisor, at = set * a.set_pitch;
          int origin = (rows.first + row) * a.rows.stride - a.rows.padding + set * a.rows.dilation - source_rows.first;
          if (a.rows.spread) {
            const Walk up = taps_reaching(a.rows, a.reach_rows, rows.first + row);
            count = up.count, at = (up.first + 1) * a.set_pitch - count;
            origin = up.origin + (count - 1) * up.move - source_rows.first;
          } else if (set >= a.long_sets) {
            --count;
          }
          // The thread's rows meet source row number n, n * move from the first on; it is there for n in [begin, end).
          uint32_t begin = max(-origin + move - 1, 0), end = max(source_rows.count - origin + move - 1, 0);
          a.by_source_step.split(begin), a.by_source_step.split(end);
          if (begin >= end || static_cast<int>(begin) >= count + kRows - 1) continue;
          // What passes is the taps from the first to the last one that a row there meets, or the rows that meet a tap.
          const int first_row = begin, first_tap = max(first_row - (kRows - 1), 0), step = move * a.pitch;
          const int taps = min(count, static_cast<int>(end)) - first_tap;
          const int met = min(count + kRows - 1, static_cast<int>(end)) - first_row, ahead = first_row - (kRows - 1);
          const T* pixels = source + (origin + (kReversed ? first_row : first_tap) * move) * a.pitch;
          const Acc* weights = filter + (at + (kReversed ? ahead : first_tap) +
                                         (across.first + static_cast<int>(part) * across.step) * a.filter_column);
          int x = across.origin - source_columns.first + static_cast<int>(part) * across.move;
          for (int v = part; v < across.count; v += a.parts) {
            if (static_cast<uint32_t>(x) < static_cast<uint32_t>(source_columns.count)) {
              if constexpr (kRows == 1) {
#pragma unroll 4
                for (int t = 0; t < taps; ++t) sum[0] = fma(widen(pixels[x + t * step]), weights[t], sum[0]);
              } else if constexpr (kReversed) {
                correlate<true>(sum, Run<Acc>{weights, 1, -ahead, count - ahead}, pixels + x, step, met);
              } else {
                correlate<false>(sum,
                                 Run<T>{pixels + x, step, first_row - first_tap, static_cast<int>(end) - first_tap},
                                 weights, 1, taps);
              }
            }
            x += a.parts * across.move, weights += a.parts * across.step * a.filter_column;
          }
        }
      }
    }
    if (a.parts > 1) {
      Acc* const sums =
          &shared<Acc>(a.sums_at);  // of part p, row r and lane l: number ((p - 1) * kRows + r) * lanes + l
      if (valid && part > 0)
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[((part - 1) * kRows + r) * a.lanes + lane] = sum[r];
      __syncthreads();
      if (valid && part == 0)
        for (int p = 0; p < a.parts - 1; ++p)
#pragma unroll
          for (int r = 0; r < kRows; ++r) sum[r] += sums[(p * kRows + r) * a.lanes + lane];
      __syncthreads();
    }
    if (!valid || part > 0) continue;
    uint32_t image = first_plane + plane;
    const int channel = a.by_targets.split(image), y0 = rows.first + row, x = columns.first + column;
    T* const target = a.target_of<T>(image, channel, x);
    const Acc bias = a.bias ? (&shared<Acc>(a.biases_at))[plane] : Acc(0);
    Acc zero = 0;  // or NaN
#pragma unroll
    for (int r = 0; r < kRows; ++r) zero = fma(sum[r], Acc(0), zero);
    if (row + (kRows - 1) * a.row_step < rows.count && (kRows == 1 || zero == 0)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) target[(y0 + r * a.row_step) * a.target_stride[2]] = narrow<T>(sum[r] + bias);
      continue;
    }
    uint32_t again = 0;  // rows whose sums are not finite, as bits
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * a.row_step >= rows.count) break;
      if (kRows > 1 && !(sum[r] * 0 == 0))
        again |= 1u << r;
      else
        target[(y0 + r * a.row_step) * a.target_stride[2]] = narrow<T>(sum[r] + bias);
    }
    for (; again != 0; again &= again - 1) {
      const int y = y0 + (__ffs(again) - 1) * a.row_step;
      const Acc sum = tap_by_tap(a, a.source_of<T>(image, channel), a.weight_of<T>(channel),
                                 taps_of(a.rows, a.reach_rows, y), taps_of(a.columns, a.reach_columns, x));
      target[y * a.target_stride[2]] = narrow<T>(sum + bias);
    }
  }
}

// How a block's tile is cut, and how many rows are a thread's.
struct Cut {
  int rows, parts, planes, tile_rows, tile_columns, threads;
  bool joined;  // whether whole rows of the source are copied
};

int step_of(const Arguments& a, int rows) {
  return rows == 1 ? 1 : a.rows.target_step();
}

// Strips of some rows of the target.
int64_t strips_of(const Arguments& a, int rows, int64_t target_rows) {
  const int step = step_of(a, rows);
  return ceil_div(target_rows, int64_t{rows} * step) * std::min<int64_t>(step, target_rows);
}

// The times that shared memory takes to deliver pixels that lie so many bytes apart.
int conflicts(int64_t bytes) {
  const int words = static_cast<int>(std::max<int64_t>(bytes / 4, 1));
  return std::min(words & -words, 32);
}

// Says where everything lies in shared memory. Returns the bytes of it.
int64_t place(Arguments& a, const Cut& cut, int64_t element, int fan_out) {
  const int64_t number = std::max<int64_t>(element, 4);
  a.planes = cut.planes, a.tile_rows = cut.tile_rows, a.tile_columns = cut.tile_columns, a.parts = cut.parts;
  a.row_step = step_of(a, cut.rows);
  a.joined = cut.joined;
  const int64_t source_rows = a.rows.reach(cut.tile_rows);
  const int64_t source_columns = a.joined ? a.columns.size : a.columns.reach(cut.tile_columns);
  const int64_t sources =
      fan_out == 1 ? int64_t{cut.planes} * a.fan_in : std::min(cut.planes, (cut.planes - 1) / fan_out + 2);
  a.pitch = static_cast<int>(source_columns);
  for (a.row_bits = 0; a.row_bits < 5 && 1 << a.row_bits < source_columns;) ++a.row_bits;
  const int64_t plane_pitch = round_up(source_rows * a.pitch * element, kUnit) + (a.joined ? kUnit : 0);
  a.plane_pitch = static_cast<int>(plane_pitch);
  a.filter_column = a.sets * a.set_pitch, a.filter_pitch = a.columns.kernel * a.filter_column | 1;
  const int64_t strips = strips_of(a, cut.rows, cut.tile_rows);
  const int64_t units = cut.planes * strips * cut.tile_columns;
  a.units = static_cast<int>(units), a.lanes = static_cast<int>(std::min<int64_t>(cut.threads / cut.parts, units));
  const int64_t filters_at = sources * plane_pitch;
  const int64_t biases_at = filters_at + number * cut.planes * a.fan_in * a.filter_pitch;
  const int64_t sums_at = biases_at + number * cut.planes;
  a.filters_at = static_cast<int>(filters_at), a.biases_at = static_cast<int>(biases_at);
  a.sums_at = static_cast<int>(sums_at);
  a.by_copies = Divider(plane_pitch / kUnit);
  a.by_source_rows = Divider(std::max<int64_t>(source_rows, 1));
  a.by_lanes = Divider(a.lanes), a.by_columns = Divider(cut.tile_columns), a.by_strips = Divider(strips);
  a.by_phases = Divider(std::min(a.row_step, cut.tile_rows));
  return sums_at + number * (cut.parts - 1) * cut.rows * a.lanes;
}

// Cycles that it takes if a thread has so many rows, and so many threads share the columns of a kernel: what the
// schedulers issue, what shared memory delivers, or what a thread waits for one after the other, whichever is most.
double cost_of(const Arguments& a, int64_t element, int rows, int parts) {
  // Threads that are under way on a multiprocessor: where planes are small their filters leave room for fewer.
  constexpr double kMostResident = 1024, kRoom = 200 << 10;
  const double multiprocessors = current_device().multiprocessors;
  const WindowSide &down = a.rows, &across = a.columns;
  const double units = static_cast<double>(a.target_planes) * strips_of(a, rows, down.out_size) * across.out_size;
  const int column_taps =
      across.spread ? across.set_pitch() : std::min(across.kernel, across.size / across.dilation + 1);
  const double taps = std::min(down.set_pitch(), down.size / down.source_step() + 1);
  const double walks = static_cast<double>(a.fan_in) * (down.spread ? 1 : down.sets()) * ceil_div(column_taps, parts);
  const double pixels = rows - 1 + taps;
  const int64_t apart = element * (across.spread ? 1 : across.stride);
  const double issued = walks * (taps * (rows + 3) + (rows > 1 ? 2 * pixels : pixels) + 25) + 250;
  const double delivered = walks * (pixels * conflicts(apart) + taps);
  const double waited = walks * (rows > 1 ? 30 * taps + 90 : 12 * taps + 60) + 600;
  const double threads = units * parts / multiprocessors, warps = threads / 32;
  const double filter = static_cast<double>(a.fan_in * std::max<int64_t>(element, 4) * across.kernel * down.kernel);
  const double of_plane = std::min<double>(units * parts / a.target_planes, kMostThreads);
  const double resident = std::min(kMostResident, kRoom * of_plane / filter);
  return std::max({warps * issued / 4, warps * delivered, std::max(threads / resident, 1.0) * waited}) +
         (parts > 1 ? 60 + 4 * parts * rows : 0);
}

// What is thought to be the fastest, in tiles of which several find room on a multiprocessor.
Cut choose_cut(Arguments& a, int64_t element, bool has_runs, int fan_out, int64_t shared_memory) {
  const int64_t multiprocessors = current_device().multiprocessors;
  const int64_t height = a.rows.out_size, width = a.columns.out_size;
  Cut cut{1, 1, 1, a.rows.out_size, a.columns.out_size, kMostThreads, has_runs};
  double least = 0;
  for (const int rows : {1, 2, 4, 8})
    for (const int parts : {1, 2, 3, 4, 6, 8, 12, 16}) {
      if (parts > 1 && parts > a.columns.kernel) break;
      const double cost = cost_of(a, element, rows, parts);
      if (least == 0 || cost < least) least = cost, cut.rows = rows, cut.parts = parts;
    }

  // Tiles that give all multiprocessors something to do, and as many threads as they have units; or some times as many
  // units, which copy a tile and its weights once, where there are tiles enough all the same.
  constexpr int64_t kFewTiles = 4, kManyTiles = 8, kMostUnits = 4;
  const int64_t of_plane = strips_of(a, cut.rows, height) * width * cut.parts;
  const int64_t of_multiprocessor = of_plane * a.target_planes / multiprocessors;
  const int64_t units = std::clamp<int64_t>(of_multiprocessor / (kManyTiles * kMostThreads), 1, kMostUnits);
  const int64_t most = std::clamp<int64_t>(of_multiprocessor / kFewTiles, 64, units * kMostThreads);
  const int rows_at_once = cut.rows * step_of(a, cut.rows);
  const auto cut_rows = [&](int64_t bands) {
    return static_cast<int>(std::min(round_up(ceil_div(height, bands), rows_at_once), height));
  };
  cut.planes = static_cast<int>(std::clamp<int64_t>(most / of_plane, 1, a.target_planes));
  if (cut.planes == 1) {
    cut.tile_rows = cut_rows(ceil_div(of_plane, most));
    const int64_t of_column = strips_of(a, cut.rows, cut.tile_rows) * cut.parts;
    const int64_t slices = ceil_div(width, std::max<int64_t>(most / of_column, kLeastWindowColumns));
    cut.tile_columns = static_cast<int>(ceil_div(width, slices));
  }
  const Cut whole = cut;
  for (const int64_t room : {int64_t{56} << 10, int64_t{112} << 10, shared_memory}) {
    const bool last = room >= shared_memory;
    cut = whole;
    for (;;) {
      const int64_t units = cut.planes * strips_of(a, cut.rows, cut.tile_rows) * cut.tile_columns;
      cut.threads = static_cast<int>(std::min<int64_t>(round_up(units * cut.parts, 32), kMostThreads));
      if (place(a, cut, element, fan_out) + 128 <= std::min(room, shared_memory)) return cut;
      if (cut.planes > 1)
        cut.planes /= 2;
      else if (cut.tile_rows > rows_at_once)
        cut.tile_rows = cut_rows(2 * ceil_div(height, cut.tile_rows));
      else if (cut.joined && cut.tile_columns < width)
        cut.joined = false;
      else if (cut.tile_columns > kLeastWindowColumns)
        cut.tile_columns = std::max((cut.tile_columns + 1) / 2, kLeastWindowColumns), cut.joined = false;
      else if (last && (cut.tile_rows > 1 || cut.parts > 1))
        cut.rows = 1, cut.tile_rows = 1, cut.parts = 1;
      else
        break;
    }
  }
  return cut;
}

template <typename T, int kRows>
void launch(const Arguments& a, int64_t blocks, int threads, int64_t bytes, cudaStream_t stream) {
  // Where planes have fewer rows than the kernel, these pass the taps instead of being passed.
  const bool reversed = kRows > 1 && a.rows.size / a.rows.source_step() + 1 < a.set_pitch;
  const auto kernel = reversed ? windows_nchw<T, kRows, (kRows > 1)> : windows_nchw<T, kRows, false>;
  constexpr int64_t kAlways = 48 << 10;  // what a block may have without asking
  if (bytes > kAlways)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  launch_early<Arguments>(kernel, a, blocks, threads, stream, {.shared_bytes = bytes});
}

}  // namespace

void launch_windows_nchw(const Problem& p, cudaStream_t stream) {
  if (fits_spread(p)) return launch_spread(p, stream);
  const Mapping map(p);
  const int64_t element = size_of(p.dtype);
  Arguments a{map};
  a.source_end = static_cast<const char*>(map.source.data) +
                 element * ((p.batch - 1) * map.source.stride[0] + (map.sources - 1) * map.source.stride[1] +
                            (map.height - 1) * map.source.stride[2] + (map.width - 1) * map.source.stride[3] + 1);
  a.target_planes = static_cast<int>(p.batch * map.targets);
  a.rows = window_rows(p, map), a.columns = window_columns(p, map);
  a.by_sources = Divider(map.sources), a.by_filters = Divider(p.filters());
  a.by_targets = Divider(map.targets), a.by_taps = Divider(p.taps()), a.by_kernel_w = Divider(p.kernel_w);
  a.by_source_step = Divider(a.rows.source_step()), a.by_tap_step = Divider(a.rows.tap_step);
  a.reach_rows = Reach(a.rows), a.reach_columns = Reach(a.columns);
  a.sets = a.rows.sets(), a.set_pitch = a.rows.set_pitch(), a.long_sets = a.rows.kernel - (a.set_pitch - 1) * a.sets;
  // Straight from memory go few taps an output, little to do, and what shares next to nothing along a column.
  const auto taps_of = [](const WindowSide& side) { return int64_t{side.spread ? side.set_pitch() : side.kernel}; };
  const int64_t taps = taps_of(a.rows) * taps_of(a.columns) * map.fan_in;
  const int64_t outputs = int64_t{a.target_planes} * map.out_height * map.out_width;
  constexpr int64_t kFewTaps = 2, kSomeTaps = 16, kManyTaps = 32, kFewProducts = 3 << 20;
  const bool shares = a.rows.set_pitch() > (map.spread ? 1 : 2);
  if (taps <= kFewTaps || (taps <= kSomeTaps && outputs * taps <= kFewProducts) || (taps <= kManyTaps && !shares))
    return launch_few_taps(p, stream);
  const bool has_runs = has_rows(map.source, map.width) && (map.source.stride[2] == map.width || map.height == 1);
  static thread_local Decisions<20, Cut> decisions;
  const Cut cut = decisions(
      {current_device().id, p.shared_memory, element,       has_runs,       map.spread,    map.fan_in,  map.fan_out,
       a.target_planes,     map.height,      map.width,     map.out_height, map.out_width, p.kernel_h,  p.kernel_w,
       p.stride_h,          p.stride_w,      map.padding_h, map.padding_w,  p.dilation_h,  p.dilation_w},
      [&] { return choose_cut(a, element, has_runs, map.fan_out, p.shared_memory); });
  const int64_t bytes = place(a, cut, element, map.fan_out);
  const int64_t slices = ceil_div(map.out_width, cut.tile_columns), bands = ceil_div(map.out_height, cut.tile_rows);
  a.by_slices = Divider(slices), a.by_bands = Divider(bands);
  const int64_t blocks = slices * bands * ceil_div(a.target_planes, cut.planes);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (cut.rows) {
      case 1: return launch<T, 1>(a, blocks, cut.threads, bytes, stream);
      case 2: return launch<T, 2>(a, blocks, cut.threads, bytes, stream);
      case 4: return launch<T, 4>(a, blocks, cut.threads, bytes, stream);
      default: return launch<T, 8>(a, blocks, cut.threads, bytes, stream);
    }
  });
  check_launch("windows_nchw");
}

}  // namespace dwconv
