// Forward and grad_input in channels_last, of any kernel size, stride, dilation and dtype.
//
// A thread owns a few neighbouring channels of some rows of a column of the target. Whatever stride and dilation are,
// taps some rows apart and target rows some rows apart meet the same source rows, as at stride 1: of these a window
// stays in registers, and one more load and one more weight serve as many products as there are rows: loads bind, at
// eight bytes over the rows for a product in float32. Where rows and columns are better exchanged, they are.
//
// The weights of a block's channels lie in shared memory, the same tap of all channels side by side; those of large
// kernels are laid so in memory before, and where there is too little to do for either, threads read them where they
// are. Where there are few outputs, slices of a block's threads share the taps, and their sums are added up in shared
// memory. Which of all that it is, an estimate of each way's time says.
//
// Zeros stand for the rows beside the image. Where one meets a weight that is Inf or NaN a sum is NaN: what is not
// finite is computed again, by the taps that meet the image.
#include <algorithm>

#include "cast.h"
#include "common.cuh"
#include "device.h"
#include "direct.cuh"
#include "exchange.h"
#include "few_taps.h"
#include "launch.h"
#include "overlap.cuh"
#include "window_sides.cuh"
#include "windows_nchw.h"

namespace dwconv {
namespace {

constexpr int kThreads = 256;
constexpr int kMostSlices = kThreads / 32;
constexpr int kLine = 128;                          // bytes that a pixel's lanes load together
constexpr int kSharedBytes = 40 << 10;              // of weights at a time
constexpr int kFewTogether = 2, kManyTogether = 8;  // weights that a thread loads together
constexpr int kTapsAtOnce = 4, kPlanesAtOnce = 8;   // whose weights 32 lanes load

// One side, cut into taps `tap_step` apart and source indices `source_step` apart, as dividers.
struct Side : WindowSide {
  int source_step;
  Divider by_tap_step, by_source_step;

  // Of rows, where taps are as far apart as target rows that share what they read.
  static Side of_rows(const WindowSide& side) { return {side, side.source_step(), side.tap_step}; }
  // Of columns, which share nothing: in forward taps are next to each other.
  static Side of_columns(WindowSide side) {
    if (!side.spread) side.tap_step = 1;
    return {side, side.spread ? side.source_step() : side.dilation, side.tap_step};
  }
  Side() = default;

  // Sorts of taps that meet a target index.
  int phases() const { return spread ? 1 : sets(); }

 private:
  Side(const WindowSide& side, int source_step, int tap_step)
      : WindowSide(side), source_step(source_step), by_tap_step(tap_step), by_source_step(source_step) {}
};

// The taps of one sort that meet a target index, from the first source index on. Spread: the stride is that of the
// target, and there is one sort at most.
__device__ Walk taps_of(const Side& side, bool spread, int index, int phase) {
  int origin = index * side.stride - side.padding + phase * side.dilation;
  if (spread) {
    const int padded = index + side.padding, limit = min(side.tap_step, side.kernel);
    phase = 0;
    while (phase < limit && (padded - phase * side.dilation) % side.stride != 0) ++phase;
    if (phase == limit) return {0, 0, 0, 0, 0};
    origin = (padded - phase * side.dilation) / side.stride;
  }
  uint32_t count = side.kernel - phase + side.tap_step - 1;
  side.by_tap_step.split(count);
  const int last = static_cast<int>(count) - 1;
  if (!spread) return {phase, side.tap_step, last + 1, origin, side.source_step};
  return {phase + last * side.tap_step, -side.tap_step, last + 1, origin - last * side.source_step, side.source_step};
}

// How many steps lead from `origin` to `bound` or beyond.
__device__ int steps_to(int bound, int origin, const Side& side) {
  if (origin >= bound) return 0;
  uint32_t steps = bound - origin + side.source_step - 1;
  side.by_source_step.split(steps);
  return steps;
}

struct Arguments : MappingArguments {
  int64_t source_image, target_image;  // from one to the next, which may be far
  Side rows, columns;
  int planes;            // that threads have one or a vector of: targets, or filters that share them
  int rounds;            // in which they are, one by one
  bool spread;           // whether the stride is that of the target
  int phases;            // sorts of taps along a column
  int row_step;          // from one of a thread's rows to the next
  int lanes, positions;  // of a slice: vectors of channels, and places in the target
  int slice_bits;        // threads of a slice, as a power of two
  int piece_columns;     // of the kernel, whose weights are in shared memory at a time
  int tap_bytes;         // from a tap to the next one there
  int staged;            // weights of a piece, with gaps
  uint32_t units;        // places in the target
  Divider by_chunks, by_lanes, by_columns, by_strips, by_residues, by_piece_columns, by_plane_groups;
};

template <typename T, int kVector>
__device__ void widen_all(Accumulator<T> (&to)[kVector], const Vector<T, kVector>& from) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = from[v];
}

// What lies side by side in shared memory.
template <typename T, int kVector>
__device__ void read(Accumulator<T> (&to)[kVector], const unsigned char* from) {
  if constexpr (kVector == 1) {
    to[0] = widen(*reinterpret_cast<const T*>(from));
  } else {
    using Words = std::conditional_t<kVector * sizeof(T) == 16, uint4,
                                     std::conditional_t<kVector * sizeof(T) == 8, uint2, uint32_t>>;
    const Words words = *reinterpret_cast<const Words*>(from);
    widen_all<T, kVector>(to, reinterpret_cast<const Vector<T, kVector>&>(words));
  }
}

// One element of the target, by the taps that meet the image.
template <typename T>
__device__ __noinline__ Accumulator<T> exact(const Arguments& a, int image, int plane, int row, int column) {
  const T* const source = a.source_of<T>(0, plane) + image * a.source_image;
  const Walk columns = taps_of(a.columns, a.spread, column, 0);
  Accumulator<T> sum = a.bias_of<T>(plane);
  for (int phase = 0; phase < a.phases; ++phase)
    sum += tap_by_tap(a, source, a.weight_of<T>(plane), taps_of(a.rows, a.spread, row, phase), columns);
  return sum;
}

// Weights of `planes` filters from the first one on, and of the kernel's columns from `first_column` on.
template <typename T, int kTogether>
__device__ void stage(const Arguments& a, unsigned char* shared, int first_plane, int planes, int q, int first_column) {
  const T* const weight = static_cast<const T*>(a.weight) +
                          ((first_plane * a.rounds + q) * a.weight_filter + first_column * a.weight_column);
  for (int begin = threadIdx.x; begin < a.staged; begin += kTogether * kThreads) {
    T value[kTogether];
    int to[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const uint32_t number = begin + n * kThreads;
      uint32_t tap = number / (kTapsAtOnce * kPlanesAtOnce);
      const int plane = number / kTapsAtOnce % kPlanesAtOnce + kPlanesAtOnce * a.by_plane_groups.split(tap);
      tap = tap * kTapsAtOnce + number % kTapsAtOnce;
      uint32_t row = tap;
      const int column = a.by_piece_columns.split(row);
      const bool exists =
          plane < planes && static_cast<int>(row) < a.rows.kernel && first_column + column < a.columns.kernel;
      value[n] = exists ? weight[plane * a.rounds * a.weight_filter + static_cast<int>(row) * a.weight_row +
                                 column * a.weight_column]
                        : T{};
      to[n] = exists ? static_cast<int>(tap) * a.tap_bytes + plane * static_cast<int>(sizeof(T)) : -1;
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n)
      if (to[n] >= 0) *reinterpret_cast<T*>(shared + to[n]) = value[n];
  }
}

// Whether two filters that a thread has side by side share the channel that they read, or the one that they add up to.
enum class Share { kNothing, kSource, kTarget };

// Rows of pixels that are under way together, as registers allow: `bytes` are those of a thread's sums.
constexpr int ahead_of(int rows, int bytes, bool staged) {
  return std::min(rows, !staged && bytes >= 128 ? 2 : 4);
}

// Adds what the taps of one column of the kernel find in a column of the source. `from`: what the first of `taps` taps
// reads for the first of the thread's rows; loads number `begin` to `end` lie inside the image. kStaged: the weights
// lie in shared memory.
template <typename T, int kVector, int kRows, bool kStaged, int kSource>
__device__ void add_taps(Accumulator<T> (&sum)[kRows][kVector], const T* from, int step, int begin, int end,
                         const unsigned char* tap, int tap_step, int taps) {
  constexpr int kAhead = ahead_of(kRows, kRows * kVector * sizeof(Accumulator<T>), kStaged);
  Accumulator<T> window[kRows][kSource];
  Vector<T, kSource> pixel[kRows - 1];
#pragma unroll
  for (int n = 0; n < kRows - 1; ++n, from += step) pixel[n] = load<T, kSource>(from, n >= begin && n < end);
#pragma unroll
  for (int n = 0; n < kRows - 1; ++n) widen_all<T, kSource>(window[n], pixel[n]);
  for (int t = 0; t < taps; t += kRows)
#pragma unroll
    for (int first = 0; first < kRows; first += kAhead) {
      Vector<T, kSource> next[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k, from += step) next[k] = load<T, kSource>(from, t + first + k + kRows - 1 < end);
      Vector<T, kVector> weights[kStaged ? 1 : kAhead];
      if constexpr (!kStaged)
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          weights[k] = load<T, kVector>(reinterpret_cast<const T*>(tap + k * tap_step), t + first + k < taps);
      const auto multiply = [&](int k) {
        widen_all<T, kSource>(window[(first + k + kRows - 1) % kRows], next[k]);
        Accumulator<T> weight[kVector];
        if constexpr (kStaged)
          read<T, kVector>(weight, tap + k * tap_step);
        else
          widen_all<T, kVector>(weight, weights[k]);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            sum[r][v] = fma(window[(first + k + r) % kRows][v * kSource / kVector], weight[v], sum[r][v]);
      };
      if (t + first + kAhead <= taps) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) multiply(k);
      } else {
#pragma unroll
        for (int k = 0; k + 1 < kAhead; ++k)
          if (t + first + k < taps) multiply(k);
      }
      tap += kAhead * tap_step;
    }
}

template <typename T, int kVector, int kRows, bool kStaged, Share kShare>
__global__ void __launch_bounds__(kThreads, 2) windows(const __grid_constant__ Arguments a) {
  using Acc = Accumulator<T>;
  constexpr int kSource = kShare == Share::kSource ? kVector / 2 : kVector;
  constexpr int kTarget = kShare == Share::kTarget ? kVector / 2 : kVector;
  extern __shared__ __align__(16) unsigned char shared[];
  uint32_t unit = blockIdx.x;
  const int first_plane = a.by_chunks.split(unit) * a.lanes * kVector;
  const int slices = kThreads >> a.slice_bits, slice = threadIdx.x >> a.slice_bits;
  uint32_t place = threadIdx.x & ((1 << a.slice_bits) - 1);
  const int thread = place, lane = a.by_lanes.split(place), plane = first_plane + lane * kVector;
  unit = unit * a.positions + place;
  const bool exists = static_cast<int>(place) < a.positions && plane < a.planes && unit < a.units;
  const int column = a.by_columns.split(unit);
  uint32_t strip = a.by_strips.split(unit);
  const int image = unit;
  const int residue = a.by_residues.split(strip);
  const int row = static_cast<int>(strip) * (kRows * a.row_step) + residue;

  uint32_t channel = plane * a.rounds;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + (image * a.source_image + static_cast<int>(channel));
  const Walk columns = taps_of(a.columns, a.spread, column, 0);
  const int first = exists ? steps_to(0, columns.origin, a.columns) : 0;
  const int last = exists ? min(steps_to(a.columns.size, columns.origin, a.columns), columns.count) : 0;
  wait_for_kernel_before();
  let_next_kernel_start();

  Acc sum[kRows][kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const bool begins = exists && slice == 0 && a.bias;
    sum[0][v] = begins ? widen(static_cast<const T*>(a.bias)[(plane + v) * a.bias_stride]) : Acc(0);
#pragma unroll
    for (int r = 1; r < kRows; ++r) sum[r][v] = sum[0][v];
  }
  for (int q = 0; q < a.rounds; ++q, ++source)
    for (int piece = 0; piece < a.columns.kernel; piece += a.piece_columns) {
      const unsigned char* weights = shared + lane * kVector * sizeof(T);
      int row_bytes = a.piece_columns * a.tap_bytes, column_bytes = a.tap_bytes;
      if constexpr (kStaged) {
        if (q + piece > 0) __syncthreads();
        const int planes = min(a.lanes * kVector, a.planes - first_plane);
        if (a.staged <= kFewTogether * kThreads)
          stage<T, kFewTogether>(a, shared, first_plane, planes, q, piece);
        else
          stage<T, kManyTogether>(a, shared, first_plane, planes, q, piece);
        __syncthreads();
      } else {
        weights = reinterpret_cast<const unsigned char*>(static_cast<const T*>(a.weight) +
                                                         (plane * a.rounds + q) * a.weight_filter);
        row_bytes = a.weight_row * int(sizeof(T)), column_bytes = a.weight_column * int(sizeof(T));
      }
      for (int phase = 0, u = first + slice; phase < a.phases; ++phase, u -= last - first) {
        const Walk rows = taps_of(a.rows, a.spread, row, phase);
        int begin = steps_to(0, rows.origin, a.rows);
        int end = min(steps_to(a.rows.size, rows.origin, a.rows), rows.count + kRows - 1);
        const int skipped = max(begin - (kRows - 1), 0), taps = min(end, rows.count) - skipped;
        begin -= skipped, end -= skipped;
        const int y = rows.origin + skipped * a.rows.source_step;
        const unsigned char* const tap = weights + (rows.first + skipped * rows.step) * row_bytes;
        for (; u < last; u += slices) {
          const int j = columns.first + u * columns.step - piece;
          if (taps <= 0 || static_cast<uint32_t>(j) >= static_cast<uint32_t>(a.piece_columns)) continue;
          const int x = columns.origin + u * a.columns.source_step;
          add_taps<T, kVector, kRows, kStaged, kSource>(sum, source + (y * a.source_stride[2] + x * a.source_stride[3]),
                                                        a.rows.source_step * a.source_stride[2], begin, end,
                                                        tap + j * column_bytes, rows.step * row_bytes, taps);
        }
      }
    }

  Acc total[kRows][kTarget] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int v = 0; v < kVector; ++v) total[r][v * kTarget / kVector] += sum[r][v];

  const int first_target = plane * kTarget / kVector, down = a.row_step * a.target_stride[2];
  const int existing = exists ? a.rows.out_size - row + a.row_step - 1 : 0;  // from here on, over row_step
  T* const target = static_cast<T*>(a.target) +
                    (image * a.target_image + row * a.target_stride[2] + column * a.target_stride[3] + first_target);
  const auto has_row = [&](int r) { return (r + 1) * a.row_step <= existing; };
  const auto store = [&](int r, const Acc(&value)[kTarget]) {
    T* const to = target + r * down;
    if constexpr (kTarget == 1)
      *to = narrow<T>(value[0]);
    else
      *reinterpret_cast<Vector<T, kTarget>*>(to) = Vector<T, kTarget>::of(value);
  };
  const auto store_exact = [&](int r) {
#pragma unroll 1
    for (int v = 0; v < kTarget; ++v)
      target[r * down + v] = narrow<T>(exact<T>(a, image, first_target + v, row + r * a.row_step, column));
  };
  if (slices == 1) {
    Acc zeros = 0;  // or NaN
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kTarget; ++v) zeros = fma(total[r][v], Acc(0), zeros);
    if (zeros == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (has_row(r)) store(r, total[r]);
    } else {
#pragma unroll 1
      for (int r = 0; r < kRows; ++r)
        if (has_row(r)) store_exact(r);
    }
    return;
  }
  // Sums of slice s lie behind those of slice s - 1, row by row.
  struct alignas(sizeof(Acc) * kTarget < 16 ? sizeof(Acc) * kTarget : 16) Sums {
    Acc value[kTarget];
  };
  Sums* const sums = reinterpret_cast<Sums*>(shared);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int v = 0; v < kTarget; ++v) sums[r * kThreads + threadIdx.x].value[v] = total[r][v];
  __syncthreads();
#pragma unroll 1
  for (int r = slice; r < kRows; r += slices) {
    Sums all = sums[r * kThreads + thread];
#pragma unroll 1
    for (int s = 1; s < slices; ++s) {
      const Sums more = sums[r * kThreads + (s << a.slice_bits) + thread];
#pragma unroll
      for (int v = 0; v < kTarget; ++v) all.value[v] += more.value[v];
    }
    if (!has_row(r)) continue;
    Acc zeros = 0;
#pragma unroll
    for (int v = 0; v < kTarget; ++v) zeros = fma(all.value[v], Acc(0), zeros);
    if (zeros == 0)
      store(r, all.value);
    else
      store_exact(r);
  }
}

// Where the weights are read: from shared memory; from memory, where those of neighbouring filters lie side by side, if
// need be after a kernel that lays them so; or from memory as they lie.
enum Way { kStagedWay, kLaidWay, kGatheredWay };

// How a problem is cut.
struct Cut {
  bool exchanged = false;  // rows and columns
  int vector = 1, rows = 1, slices = 1;
  Way way = kStagedWay;
  double cycles = 0;  // that it is thought to take
};

// Rows of a thread, as registers allow. `vector` sums of so many bytes are a row's.
constexpr int kLeastRows = 2, kMostRows = 16;

constexpr bool is_compiled(int vector, int rows, int sum_bytes, int64_t multiplier) {
  const int bytes = vector * sum_bytes;
  const bool shares = multiplier == 2 && vector > 1;
  return (rows > 2 || bytes >= 16) && rows * bytes <= 128 && (!shares || (rows > 2 && rows < 16));
}

// Whether vectors of channels lie in memory as such.
bool have_vectors(const Problem& p, int vector) {
  const auto lie = [&](const View& view, int64_t height, int64_t width, int vector) {
    return reinterpret_cast<uintptr_t>(view.data) % (vector * size_of(p.dtype)) == 0 &&
           (p.batch == 1 || view.stride[0] % vector == 0) && (height == 1 || view.stride[2] % vector == 0) &&
           (width == 1 || view.stride[3] % vector == 0);
  };
  if (vector == 1) return true;
  return p.multiplier <= 2 && p.filters() % vector == 0 &&
         lie(p.input, p.height, p.width, vector / static_cast<int>(p.multiplier)) &&
         lie(p.output, p.out_height, p.out_width, vector);
}

// The planes that threads have vectors of.
int64_t planes_of(const Problem& p, const Mapping& map, int vector) {
  return vector > 1 ? p.filters() : map.targets;
}

// Whether weights of neighbouring filters lie side by side as such vectors.
bool are_laid(const Problem& p, int vector) {
  const auto& stride = p.weight.stride;
  return stride[0] == 1 && reinterpret_cast<uintptr_t>(p.weight.data) % (vector * size_of(p.dtype)) == 0 &&
         (p.kernel_h == 1 || stride[2] % vector == 0) && (p.kernel_w == 1 || stride[3] % vector == 0);
}

// Of a block, for vectors of channels: as many as load a line together, and all of its blocks alike.
int lanes_of(int64_t planes, int vector, int64_t element) {
  const int64_t vectors = planes / vector, most = std::min<int64_t>(kLine / (vector * element), 32);
  return static_cast<int>(ceil_div(vectors, ceil_div(vectors, most)));
}

Side rows_of(const Problem& p, const Mapping& map) {
  return Side::of_rows(window_rows(p, map));
}

Side columns_of(const Problem& p, const Mapping& map) {
  return Side::of_columns(window_columns(p, map));
}

// The time that a cut is thought to take, in cycles of a multiprocessor: by what it issues and loads, or by what its
// threads wait for. Instructions and latencies are fitted to measurements on an H200.
double cycles_of(const Cut& cut, const Problem& p, const Mapping& map, const Side& rows, const Side& columns,
                 int multiprocessors) {
  const int element = static_cast<int>(size_of(p.dtype)), sum = element == 8 ? 8 : 4;
  const double vector = cut.vector;
  const int64_t planes = planes_of(p, map, cut.vector), rounds = cut.vector > 1 ? 1 : map.fan_in;
  const int64_t strips = std::min(rows.target_step(), rows.out_size) *
                         ceil_div(rows.out_size, static_cast<int64_t>(rows.target_step()) * cut.rows);
  const int64_t source_rows = ceil_div(rows.size, rows.source_step);
  const int64_t taps = std::min(ceil_div(rows.kernel, rows.tap_step), source_rows + cut.rows - 1);
  const int64_t tasks =
      rows.phases() * rounds *
      std::min(ceil_div(columns.kernel, columns.tap_step), ceil_div(columns.size, columns.source_step));
  const int lanes = lanes_of(planes, cut.vector, element), positions = kThreads / cut.slices / lanes;
  const double blocks = static_cast<double>(ceil_div(planes, lanes * cut.vector)) *
                        ceil_div(p.batch * strips * columns.out_size, positions) / multiprocessors;

  // Of a task, and of the lines of memory that a warp's loads of a pixel touch.
  const double apart = static_cast<double>(map.source.stride[3]) * (map.spread ? 1 : columns.stride) * element;
  const double lines = std::max(vector * element / 4, std::max(32.0 / lanes, 1.0) * std::min(1.0, apart / kLine));
  const double products = cut.rows * vector * sum / 4 + (element == 2 ? 2 * vector : 0) + 5;
  const double issued = (5 + 37 * (cut.rows - 1) + taps * products) / 4;
  const double weight_lines = cut.way == kGatheredWay
                                  ? 0.25 * lanes * std::min(1.0, static_cast<double>(p.taps() * element) / kLine)
                                  : vector * element / 4;
  const double loaded = (cut.rows - 1 + taps) * lines + taps * weight_lines;
  const double task = std::max(issued, loaded) + 0.3 * std::min(issued, loaded);
  // Of a block.
  const double turns = static_cast<double>(ceil_div(tasks, cut.slices));
  const int64_t waits = ceil_div(taps, ahead_of(cut.rows, cut.rows * cut.vector * sum, cut.way == kStagedWay));
  const double ends = cut.slices > 1 ? 60 * ceil_div(cut.rows, cut.slices) + 4 * cut.rows * vector : 15.0 * cut.rows;
  double work = kThreads / 32 * (turns * task + (150 + ends) / 4);
  double wait = 1400 + turns * (830 + 230.0 * (waits - 1)) + (cut.slices > 1 ? 250 : 0) + 12 * cut.rows;
  double resident = cut.rows * vector * sum > 32 ? 2 : 3, before = 0;
  if (cut.way == kStagedWay) {
    const double bytes = vector * lanes * element * static_cast<double>(p.taps());
    const double weights = bytes / element * rounds / kThreads, pieces = std::ceil(bytes / kSharedBytes);
    const bool few = weights <= kFewTogether;
    work += few ? 200 : 750 * std::ceil(weights / kManyTogether);
    wait += few ? 1000 : 1700 * std::ceil(weights / kManyTogether) + 200 * rounds * pieces;
    resident = std::min(resident, std::max(std::floor((227 << 10) * pieces / bytes), 1.0));
  } else if (cut.way == kLaidWay && !are_laid(p, cut.vector)) {
    before = 3700;  // the kernel that lays them so
  }
  const double waves = blocks / resident, busy = 1.1 * blocks * work;
  const double waiting = wait * (waves > 4 ? waves : std::ceil(waves));
  return std::max(busy, waiting) + 0.35 * std::min(busy, waiting) + before;
}

// The cut that is thought to take least.
Cut choose_cut(const Problem& problem, int multiprocessors) {
  Cut best;
  const int most = static_cast<int>(16 / size_of(problem.dtype)), sum = problem.dtype == DType::kFloat64 ? 8 : 4;
  for (const bool exchanged : {false, true}) {
    const Problem p = exchanged ? exchange(problem) : problem;
    const Mapping map(p);
    const Side rows_side = rows_of(p, map), columns = columns_of(p, map);
    int largest = most;
    while (!have_vectors(p, largest)) largest = largest == 8 ? 2 : largest / 2;
    for (int vector = largest; vector > 0; vector = vector > 1 ? 1 : 0)
      for (int rows = kLeastRows; rows <= kMostRows; rows *= 2) {
        if (!is_compiled(vector, rows, sum, p.multiplier)) continue;
        for (const Way way : {kStagedWay, kLaidWay, kGatheredWay}) {
          if (way == kGatheredWay && (vector > 1 || are_laid(p, vector))) continue;
          double least = 0;
          for (int slices = 1; slices <= kMostSlices; slices *= 2) {
            Cut cut{exchanged, vector, rows, slices, way};
            cut.cycles = cycles_of(cut, p, map, rows_side, columns, multiprocessors);
            if (best.cycles == 0 || cut.cycles < best.cycles) best = cut;
            if (least > 0 && cut.cycles > 1.25 * least) break;
            least = cut.cycles;
          }
        }
      }
  }
  return best;
}

template <typename T, int kVector, int kRows, bool kStaged, Share kShare>
void launch(const Problem& p, const Cut& cut, cudaStream_t stream) {
  const Mapping map(p);
  Arguments a{map};
  a.source_image = map.source.stride[0], a.target_image = map.target.stride[0];
  a.rows = rows_of(p, map), a.columns = columns_of(p, map);
  const int64_t planes_of_all = planes_of(p, map, kVector);
  a.planes = static_cast<int>(planes_of_all), a.spread = map.spread;
  a.rounds = kVector > 1 ? 1 : map.fan_in;
  a.phases = a.rows.phases(), a.row_step = a.rows.target_step();

  constexpr int64_t kElement = sizeof(T);
  a.lanes = lanes_of(planes_of_all, kVector, kElement);
  while ((kThreads >> a.slice_bits) > cut.slices) ++a.slice_bits;
  a.positions = (1 << a.slice_bits) / a.lanes;
  const int planes = a.lanes * kVector;
  // An odd number of 32 bytes: lanes write planes of as many taps to banks of their own.
  a.tap_bytes = static_cast<int>(32 * (ceil_div(planes * kElement, 32) | 1));
  const int column_bytes = a.rows.kernel * a.tap_bytes;
  const int64_t pieces = kStaged ? ceil_div(a.columns.kernel, std::max(kSharedBytes / column_bytes, 1)) : 1;
  a.piece_columns = static_cast<int>(ceil_div(a.columns.kernel, pieces));
  const int64_t taps = a.rows.kernel * a.piece_columns, plane_groups = ceil_div(planes, kPlanesAtOnce);
  a.staged = static_cast<int>(ceil_div(taps, kTapsAtOnce) * plane_groups * (kTapsAtOnce * kPlanesAtOnce));
  a.by_piece_columns = Divider(a.piece_columns), a.by_plane_groups = Divider(plane_groups);

  const int residues = std::min(a.row_step, a.rows.out_size);
  const int64_t strips = residues * ceil_div(a.rows.out_size, static_cast<int64_t>(a.row_step) * kRows);
  a.units = static_cast<uint32_t>(p.batch * strips * a.columns.out_size);
  const int64_t chunks = ceil_div(planes_of_all, planes);
  a.by_chunks = Divider(chunks), a.by_lanes = Divider(a.lanes), a.by_columns = Divider(a.columns.out_size);
  a.by_strips = Divider(strips), a.by_residues = Divider(residues);
  const int64_t sums = cut.slices > 1 ? int64_t{kThreads} * kRows * kVector * sizeof(Accumulator<T>) : 0;
  launch_early(windows<T, kVector, kRows, kStaged, kShare>, a, chunks * ceil_div(a.units, a.positions), kThreads,
               stream, {1, std::max<int64_t>(kStaged ? taps * a.tap_bytes : 0, sums)});
}

template <typename T, int kVector, int kRows, Share kShare>
void launch_way(const Problem& p, const Cut& cut, cudaStream_t stream) {
  if (cut.way == kStagedWay)
    launch<T, kVector, kRows, true, kShare>(p, cut, stream);
  else
    launch<T, kVector, kRows, false, kShare>(p, cut, stream);
}

template <typename T, int kVector, int kRows>
void launch_rows(const Problem& p, const Cut& cut, cudaStream_t stream) {
  if (cut.rows > kRows) {
    if constexpr (kRows < kMostRows) launch_rows<T, kVector, 2 * kRows>(p, cut, stream);
    return;
  }
  constexpr int kSum = sizeof(Accumulator<T>);
  if constexpr (kVector > 1 && is_compiled(kVector, kRows, kSum, 2))
    if (p.multiplier == 2) {
      if (p.pass == Pass::kForward) return launch_way<T, kVector, kRows, Share::kSource>(p, cut, stream);
      return launch_way<T, kVector, kRows, Share::kTarget>(p, cut, stream);
    }
  if constexpr (is_compiled(kVector, kRows, kSum, 1)) launch_way<T, kVector, kRows, Share::kNothing>(p, cut, stream);
}

}  // namespace

void launch_windows_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  const Cut cut = choose_cut(problem, current_device().multiprocessors);
  // Straight from memory go few taps, of single channels or with little to do.
  constexpr int64_t kFewTaps = 4, kFewProducts = 3 << 20;
  const int64_t products = problem.batch * problem.filters() * problem.out_height * problem.out_width * problem.taps();
  if (problem.pass == Pass::kForward && problem.taps() <= kFewTaps && fits_windows_nchw(problem) &&
      (cut.vector == 1 || products <= kFewProducts))
    return launch_few_taps(problem, stream);
  Problem p = cut.exchanged ? exchange(problem) : problem;
  if (cut.way == kLaidWay && !are_laid(p, cut.vector)) {
    const View to{allocate(p.filters() * p.taps() * size_of(p.dtype)), {1, 1, p.kernel_w * p.filters(), p.filters()}};
    launch_cast({p.dtype, p.dtype, p.weight, to, {p.filters(), 1, p.kernel_h, p.kernel_w}}, stream);
    p.weight = to;
  }
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2)
      if (cut.vector == 8) return launch_rows<T, 8, kLeastRows>(p, cut, stream);
    if constexpr (sizeof(T) == 4)
      if (cut.vector == 4) return launch_rows<T, 4, kLeastRows>(p, cut, stream);
    if (cut.vector == 2) return launch_rows<T, 2, kLeastRows>(p, cut, stream);
    launch_rows<T, 1, kLeastRows>(p, cut, stream);
  });
  check_launch("windows_channels_last");
}

}  // namespace dwconv
