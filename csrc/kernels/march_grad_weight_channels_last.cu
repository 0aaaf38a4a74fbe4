// grad_weight (and the bias gradient) on channels_last arrays: a block marches down the rows of its slab of channels
// and its span of columns, and a thread keeps the sums of all taps of a filter, or of two neighbouring ones, in
// registers.
//
// Bytes bound by design: both arrays are read once. A step takes one row of the gradient, which stays in registers as
// long as its windows reach, and the rows of the input that meet it with the first rows of its window. The rows of all
// images are cut into splits; their sums are added up by a second, small kernel. Every sum has a fixed order, the same
// on every run.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <algorithm>
#include <climits>
#include <cmath>
#include <utility>

#include "launch.h"
#include "march_grad_weight_channels_last.cuh"
#include "overlap.cuh"
#include "partial_sums.h"
#include "shares.cuh"
#include "small_kernels.h"
#include "three_channels_grad_weight.h"
#include "toeplitz_grad_weight_pairs.h"

namespace dwconv {
namespace {

constexpr int kRing = StageBarriers::kBytes;  // where it begins in shared memory

struct March {
  CUtensorMap source_map, grad_map;  // if rows are boxes
  Pixels source, grad;
  float* partial;  // [split][tap, or bias behind the last tap][filter]
  void *grad_weight, *grad_bias;
  int height, width, out_height, out_width, padding_h, padding_w;
  int last_step;  // the step behind the last one of an image that brings a row of the input
  int images, filters, multiplier;
  int slabs, spans, splits;
  Shares shares;       // of splits: they are cut between images, or between any two rows
  int groups, strips;  // of a block: what threads have of filters, and strips of columns
  int loaders;         // warps that load
  int depth, stage_bytes, source_row_bytes;
  bool boxes;   // whether rows are loaded as boxes or, of joined arrays, as bulk copies
  bool joined;  // whether both arrays are: see Pixels
  bool with_bias;
  Divider by_slabs, by_spans, by_height, by_groups;
};

// The rows of a split, image by image. A step brings row `row` of the gradient, if that is before `end`; as long as
// `held` rows of the gradient have a window under way, there are further steps, up to the last row of the image.
struct Steps {
  int image, row, end, last, left;

  __device__ Steps(const March& a, int split, int held) {
    const int first = a.shares.begin(split);
    left = a.shares.begin(split + 1) - first;
    uint32_t rest = first;
    row = a.by_height.split(rest), image = rest;
    begin(a, held);
  }
  __device__ bool done() const { return end == 0; }
  // Returns whether that was the last step of an image.
  __device__ bool next(const March& a, int held) {
    if (++row < last) return false;
    next_image(a, held);
    return true;
  }
  __device__ void next_image(const March& a, int held) {
    row = 0, ++image;
    begin(a, held);
  }

 private:
  __device__ void begin(const March& a, int held) {
    end = min(a.out_height, row + left);
    left -= end - row;
    last = min(end + held - 1, a.last_step);
  }
};

// What else code is compiled for.
enum class Form {
  kPlain,
  kWide,  // a thread has 16 columns although its rows take many registers then
  // Images are padded by half a kernel and no wider than one strip, or exactly two: columns are known that meet nothing
  // but zeros. Of two strips the second goes from right to left.
  kOneStrip,
  kTwoStrips,
  kPlane,  // they are as wide and as high as one strip: rows are known, too
  kSplit,  // two filters of a thread lie in no word, and are read one by one
};

// What a kernel is compiled for, with one or two filters a thread.
template <class Kernel, int filters, Form form = Form::kPlain>
struct Window {
  static constexpr bool kMirrors = form == Form::kTwoStrips, kPlane = form == Form::kPlane;
  static constexpr bool kSplit = form == Form::kSplit;
  static constexpr bool kNarrow = form == Form::kOneStrip || kMirrors || kPlane;
  static constexpr int kTapsH = Kernel::kKernelH, kTapsW = Kernel::kKernelW, kTaps = kTapsH * kTapsW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr int kExtentH = (kTapsH - 1) * kDilation + 1, kExtentW = (kTapsW - 1) * kDilation + 1;
  static constexpr int kHeld = (kExtentH - 1) / kStride + 1;  // rows of the gradient whose window is under way
  static constexpr int kFilters = filters;
  static constexpr int kFewTaps = 9;
  static constexpr int kColumns = form == Form::kWide ? 16 : kFilters == 1 && kTaps + 14 * kHeld <= 56 ? 14 : 7;
  static constexpr int kSourceColumns = (kColumns - 1) * kStride + kExtentW;
  // Of these columns, those that can lie in the image.
  static constexpr int kBeside = kTapsW / 2, kFirstRead = kNarrow ? kBeside : 0;
  static constexpr int kLoadedW = kExtentW - 2 * kFirstRead;  // a row in shared memory has none of those beside
  static constexpr int kEndRead = kSourceColumns - (kNarrow && !kMirrors ? kBeside : 0);
  // Steps in the body of the loop. If rows of the gradient need not move in registers, all the better, but code must
  // not grow too long.
  static constexpr int kUnroll = kPlane ? kColumns + kBeside : kFilters * kHeld * kTaps * kColumns > 1000 ? 1 : kHeld;
  // Threads that compute, of a block with one warp that loads, and blocks on a multiprocessor, as the registers allow:
  // for sums, rows and some 50 more, and of warps there are a multiple of 4.
  static constexpr int kRegisters = kFilters * (kTaps + kHeld * kColumns);
  static constexpr int kMaxThreads = kFilters == 1 ? 448 : kRegisters < 40 ? 224 : 288;
  static constexpr int kBlocks = kFilters == 1 ? 1 : kRegisters < 40 ? 3 : 2;
  static_assert(kFilters == 1 ? kRegisters <= 98 : kRegisters < 64);

  // Where in registers the row is that came `age` steps before step `u`, and, where rows are known, whether one did.
  static constexpr bool kTurns = kUnroll == kHeld;
  static constexpr int kRows = kPlane ? kColumns : kTurns ? kHeld : kHeld - 1 + kUnroll;
  static constexpr int row_of(int u, int age) {
    return kPlane ? u - age : kTurns ? (u - age + kHeld) % kHeld : kHeld - 1 + u - age;
  }
  static constexpr bool has_row(int u, int age) { return !kPlane || (u >= age && u - age < kRows); }

  // What a block should have of a pixel, in bytes, and code knows then, also with a unit more; 0 if it does not matter.
  static constexpr int kKnownPitch = form == Form::kWide ? 128 : 0;

  // Whether a row of the source is in the image and meets the gradient up to row `end`.
  static __device__ bool meets(const March& a, int end, int source_row) {
    if (kStride == 1) return source_row >= 0;  // or the step before were the last one
    return source_row >= 0 && source_row < min(a.height, (end - 1) * kStride - a.padding_h + kExtentH);
  }
};

// What a block works on.
struct Part {
  int slab, span, split;
  int column, filter;  // the first ones

  template <class W>
  static __device__ Part of(const March& a, W) {
    Part p;
    uint32_t rest;  // what follows from it is worked out again in the end, and takes no registers until then
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(rest));
    p.slab = a.by_slabs.split(rest), p.span = a.by_spans.split(rest), p.split = rest;
    p.column = p.span * a.strips * W::kColumns, p.filter = p.slab * a.groups * W::kFilters;
    return p;
  }
};

// What a thread works on, and who adds up sums: its number, divided by the number of groups.
struct Place {
  int strip, group;

  static __device__ Place of(const March& a) {
    uint32_t number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    Place p;
    p.group = a.by_groups.split(number), p.strip = number;
    return p;
  }
};

// What a thread has for each of its filters.
template <int kFilters>
struct alignas(4 * kFilters) Sums {
  float of[kFilters];
};

// Where in shared memory a thread leaves the sums of a tap, or the bias behind the last one, for its filters.
template <int kFilters>
__device__ Sums<kFilters>& sums_at(int tap, int thread) {
  constexpr int kBytes = sizeof(Sums<kFilters>);
  return shared<Sums<kFilters>>(kRing + kBytes * (tap * static_cast<int>(blockDim.x) + thread));
}

// The sum of one tap over a thread's part, of products inside the image only.
template <typename T, class W>
__device__ float sum_by_products(const March& a, int split, int filter, int column, int tap) {
  const int i = tap / W::kTapsW * W::kDilation - a.padding_h, j = tap % W::kTapsW * W::kDilation - a.padding_w;
  const char* x = a.source.begin + filter / a.multiplier * sizeof(T);
  const char* g = a.grad.begin + filter * sizeof(T);
  const int end = min(column + W::kColumns, a.out_width);
  float sum = 0;
  for (Steps at(a, split, 1); !at.done(); at.next(a, 1)) {
    const int y = at.row * W::kStride + i;
    if (y < 0 || y >= a.height) continue;
    const char* row_x = x + at.image * a.source.image_bytes + y * a.source.row_bytes;
    const char* row_g = g + at.image * a.grad.image_bytes + at.row * a.grad.row_bytes;
    for (int v = column; v < end; ++v) {
      const int k = v * W::kStride + j;
      if (k >= 0 && k < a.width)
        sum = fmaf(widen(*reinterpret_cast<const T*>(row_x + static_cast<int64_t>(k) * a.source.pixel_bytes)),
                   widen(*reinterpret_cast<const T*>(row_g + static_cast<int64_t>(v) * a.grad.pixel_bytes)), sum);
    }
  }
  return sum;
}

// Takes those of a thread's sums in shared memory again that are not finite.
template <typename T, class W>
__device__ __noinline__ void sum_again(const March& a, int split, int filter, int column) {
  constexpr int kFilters = W::kFilters;
  for (int i = 0; i < kFilters * W::kTaps; ++i) {
    float& sum = sums_at<kFilters>(i / kFilters, threadIdx.x).of[i % kFilters];
    if (!is_finite(sum) && filter + i % kFilters < a.filters)
      sum = sum_by_products<T, W>(a, split, filter + i % kFilters, column, i / kFilters);
  }
}

// Whether sums are parts of others, and where those of a block's filters lie.
__device__ inline bool are_parts(const March& a) {
  return a.splits * a.spans > 1;
}
template <class W>
__device__ float* partial_of(const March& a, const Part& part) {
  const int taps = W::kTaps + a.with_bias;
  return a.partial + static_cast<int64_t>(part.split * a.spans + part.span) * taps * a.filters;
}

// Adds up the sums of a block's strips, which lie as [tap][strip][group].
template <typename T, class W>
__device__ void finish(const March& a, const Part& part, const Place& place) {
  constexpr int kFilters = W::kFilters, kBytes = sizeof(Sums<kFilters>);
  using Sums = Sums<kFilters>;
  const int taps = W::kTaps + a.with_bias;
  const bool many = are_parts(a), whole = kFilters == 1 || a.filters % kFilters == 0;
  float* partial = partial_of<W>(a, part);
  const auto add = [&](Sums& total, const Sums& sum) {
#pragma unroll
    for (int h = 0; h < kFilters; ++h) total.of[h] += sum.of[h];
  };
  const auto store = [&](int tap, int filter, const Sums& total) {
#pragma unroll
    for (int h = 0; h < kFilters; ++h) {
      const float value = total.of[h];
      if (filter + h >= a.filters) continue;
      if (many)
        partial[tap * a.filters + filter + h] = value;
      else if (tap < W::kTaps)
        static_cast<T*>(a.grad_weight)[static_cast<int64_t>(filter + h) * W::kTaps + tap] = narrow<T>(value);
      else
        static_cast<T*>(a.grad_bias)[filter + h] = narrow<T>(value);
    }
  };
  // A thread keeps its filters and takes every so-manieth tap, some at a time.
  const auto take_taps = [&](auto at_once, const auto& store) {
    constexpr int kAtOnce = decltype(at_once)::value;
    if (place.strip >= a.strips) return;
    const int tap_bytes = kBytes * static_cast<int>(blockDim.x), step = a.strips * tap_bytes;
    const int first = kRing + kBytes * place.group, last = first + (taps - 1) * tap_bytes;
    int next = first + place.strip * tap_bytes;
#pragma unroll 1
    for (int tap = place.strip; tap < taps;) {
      Sums total[kAtOnce]{};
      int at[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) at[k] = min(next, last), next += step;
      int strips = a.strips;
#pragma unroll 1
      do {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) add(total[k], shared<Sums>(at[k])), at[k] += a.groups * kBytes;
      } while (--strips > 0);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k, tap += a.strips) store(tap, total[k]);
    }
  };
  if (a.strips >= 32) {  // a warp takes one after the other
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int i = threadIdx.x / 32; i < taps * a.groups; i += warps) {
      uint32_t tap = i;
      const int group = a.by_groups.split(tap);
      Sums total{};
#pragma unroll 1
      for (int s = lane; s < a.strips; s += 32) add(total, sums_at<kFilters>(tap, s * a.groups + group));
#pragma unroll
      for (int h = 0; h < kFilters; ++h)
        for (int offset = 16; offset > 0; offset /= 2) total.of[h] += __shfl_xor_sync(~0u, total.of[h], offset);
      if (lane == 0) store(tap, part.filter + group * kFilters, total);
    }
  } else if (const int filter = part.filter + place.group * kFilters; filter < a.filters && many && whole) {
    float* to = partial + place.strip * a.filters + filter;
    const int step = a.strips * a.filters;
    take_taps(std::integral_constant<int, 4>{}, [&](int tap, const Sums& total) {
      if (tap < taps) *reinterpret_cast<Sums*>(to) = total;
      to += step;
    });
  } else {
    take_taps(std::integral_constant<int, 1>{}, [&](int tap, const Sums& total) { store(tap, filter, total); });
  }
}

// What loads the rows of a split, step by step.
template <class W>
class Loader {
 public:
  __device__ Loader(const March& a, const Part& part, int rank, int threads)
      : steps_(a, part.split, W::kHeld),
        source_(a.source, part.slab, part.column * W::kStride - a.padding_w + W::kFirstRead, a.width, rank, threads),
        grad_(a.grad, part.slab, part.column, a.out_width, rank, threads) {
    seek(a);
  }
  __device__ bool done() const { return steps_.done(); }

  // Begins to load the rows of a step, if there is one.
  __device__ void load(const March& a, int stage) {
    if (done()) return;
    int to = kRing + stage * a.stage_bytes;
#pragma unroll
    for (int e = 0; e < W::kStride; ++e) {
      if (W::meets(a, steps_.end, steps_.row * W::kStride - a.padding_h + e)) source_.load(a.source, to);
      source_.next(a.source), to += a.source_row_bytes;
    }
    if (steps_.row < steps_.end) grad_.load(a.grad, to);
    grad_.next(a.grad);
    if (steps_.next(a, W::kHeld)) seek(a);
  }

 private:
  Steps steps_;
  RowLoader source_, grad_;

  __device__ void seek(const March& a) {
    source_.seek(a.source, steps_.image, steps_.row * W::kStride - a.padding_h);
    grad_.seek(a.grad, steps_.image, steps_.row);
  }
};

// The same by one warp that loads boxes, or rows of joined arrays.
template <class W, bool kJoined>
class BoxLoader {
 public:
  __device__ BoxLoader(const March& a, const Part& part)
      : steps_(a, part.split, W::kHeld),
        source_column_(part.column * W::kStride - a.padding_w + W::kFirstRead + a.source.columns_before),
        grad_column_(part.column),
        filter_(part.filter),
        channel_(a.multiplier == 2 ? part.filter / 2 : part.filter) {}
  __device__ bool done() const { return steps_.done(); }

  __device__ void load(const March& a, int stage) {
    if (threadIdx.x % 32 == 0) {
      if (kJoined) before_bulk_copies();  // zeros were stored beside what was there
      const int barrier = StageBarriers::full(stage), first = steps_.row * W::kStride - a.padding_h;
      const auto copy = [&](int to, const Pixels& p, const CUtensorMap& map, int channel, int column, int row) {
        if (kJoined)
          return load_run(p, to, steps_.image * p.image_bytes + row * p.row_bytes + column * p.pitch, barrier);
        expect_bytes(barrier, p.box_bytes);
        copy_box(to + p.box_at, map, channel, column, row, steps_.image, barrier);
      };
      int to = kRing + stage * a.stage_bytes;
#pragma unroll
      for (int e = 0; e < W::kStride; ++e) {
        if (W::meets(a, steps_.end, first + e)) copy(to, a.source, a.source_map, channel_, source_column_, first + e);
        to += a.source_row_bytes;
      }
      if (steps_.row < steps_.end) copy(to, a.grad, a.grad_map, filter_, grad_column_, steps_.row);
    }
    steps_.next(a, W::kHeld);
  }

 private:
  Steps steps_;
  int source_column_, grad_column_, filter_, channel_;
};

// `kJoined`: whether both arrays are. What lies beside the image is no zeros then. `kPitch`: that of both, if it is
// known: then no address has to be worked out.
template <typename T, class W, bool kJoined, int kPitch>
__global__ void __launch_bounds__(W::kMaxThreads + 32, W::kBlocks)
    march_grad_weight_channels_last(const __grid_constant__ March a) {
  constexpr int kSize = sizeof(T), kFilters = W::kFilters;
  static_assert(kFilters == 1 || W::kSplit || !kJoined);
  let_next_kernel_start();
  const Part part = Part::of(a, W{});
  const int workers = blockDim.x - (kLoaderWarps ? 32 * a.loaders : 0);
  const bool is_worker = static_cast<int>(threadIdx.x) < workers, boxes = kBoxes && a.boxes;
  // What nothing brings is zero.
  constexpr int kRowsOfStage = W::kStride + 1;
  for (int row = threadIdx.x / 32; row < a.depth * kRowsOfStage; row += blockDim.x / 32) {
    const int e = row % kRowsOfStage, to = kRing + row / kRowsOfStage * a.stage_bytes + e * a.source_row_bytes;
    const Pixels& p = e < W::kStride ? a.source : a.grad;
    for (int i = threadIdx.x % 32 * kUnit; i < p.beside_bytes; i += 32 * kUnit)
      shared<uint4>(to + (i < p.box_at ? i : i + p.box_bytes)) = uint4{};
  }
  StageBarriers::init(32 * a.loaders, workers / 32, boxes);
  if (boxes) {
    if (threadIdx.x == 0 && !kJoined) prefetch(a.source_map), prefetch(a.grad_map);
    before_bulk_copies();
  }
  __syncthreads();

  const auto load_all = [&](auto loader) {
    settle_and_wait_for_kernel_before(a.depth);
    int stage = 0;
    uint32_t parity = 1;
    while (!loader.done()) {
      wait(StageBarriers::done(stage), parity);
      loader.load(a, stage);
      StageBarriers::arrive_full(stage, boxes);
      if (++stage == a.depth) stage = 0, parity ^= 1;
    }
  };
  if (kLoaderWarps && !is_worker) {
    if (boxes)
      load_all(BoxLoader<W, kJoined>(a, part));
    else
      load_all(Loader<W>(a, part, threadIdx.x - workers, blockDim.x - workers));
  }
  wait_for_kernel_before();
  Loader<W> loader(a, part, threadIdx.x, blockDim.x);  // if all threads load
  if (!kLoaderWarps)
    for (int d = 0; d < a.depth - 1; ++d) loader.load(a, d);

  const auto is_active = [&] { return static_cast<int>(threadIdx.x) < a.groups * a.strips; };
  const auto [strip, group] = is_active() ? Place::of(a) : Place{0, 0};
  int source_at = kRing + (strip * W::kColumns * W::kStride - W::kFirstRead) * a.source.pitch +
                  group * kFilters / a.multiplier * kSize;
  int grad_at = kRing + W::kStride * a.source_row_bytes + strip * W::kColumns * a.grad.pitch + group * kFilters * kSize;
  if constexpr (!kJoined) source_at += a.source.first_at + a.source.shift, grad_at += a.grad.shift;
  const int column_g = part.column + strip * W::kColumns, column_x = column_g * W::kStride - a.padding_w;
  const bool mirrors = W::kMirrors && column_g > 0;
  const int source_pitch = kPitch > 0 ? kPitch : a.source.pitch, grad_pitch = kPitch > 0 ? kPitch : a.grad.pitch;
  const int source_step = mirrors ? -source_pitch : source_pitch, grad_step = mirrors ? -grad_pitch : grad_pitch;

  if (mirrors) source_at += (W::kSourceColumns - 1) * a.source.pitch, grad_at += (W::kColumns - 1) * a.grad.pitch;

  // Reads what the thread's filters do at a column.
  const auto read = [&](int at, float (&values)[kFilters]) {
    if constexpr (kFilters == 2 && !W::kSplit)
      read_pair(at, values, T{});
    else
#pragma unroll
      for (int h = 0; h < kFilters; ++h) values[h] = widen(shared<T>(at + h * kSize));
  };
  // Makes zeros beside a row of a joined array, where gradients meet them. Others may do the same for themselves.
  const int beside = a.width - column_x;  // the first column behind the image
  const auto clear_beside = [&](int at) {
    const auto clear = [&](int column, int end) {
#pragma unroll 1
      for (; column < end; ++column)
#pragma unroll
        for (int h = 0; h < kFilters; ++h) shared<T>(at + column * a.source.pitch + h * kSize) = T{};
    };
    clear(0, -column_x), clear(max(beside, 0), min(beside + a.padding_w, W::kSourceColumns));
  };
  // Where a row of a joined array begins within 16 bytes.
  const auto phase = [&](const Pixels& p, int image, int row, int column) {
    return !kJoined
               ? 0
               : phase_of(p, image * static_cast<uint32_t>(p.image_bytes) + row * static_cast<uint32_t>(p.row_bytes) +
                                 static_cast<uint32_t>(column * p.pixel_bytes + p.shift));
  };

  float sum[W::kTapsH][W::kTapsW][kFilters] = {}, g[W::kRows][W::kColumns][kFilters];
  float bias[kFilters] = {};  // of a few rows; the others are in shared memory
  const auto biases = [&](int h) -> double& {
    return shared<double>(kRing + a.depth * a.stage_bytes + 8 * static_cast<int>(threadIdx.x * kFilters + h));
  };
#pragma unroll
  for (int h = 0; h < kFilters; ++h) biases(h) = 0;
  int stage = 0;
  uint32_t parity = 0;
  for (Steps at(a, part.split, W::kHeld); is_worker && !at.done();) {
    if constexpr (!W::kPlane)
#pragma unroll
      for (int r = 0; r < W::kRows; ++r)
#pragma unroll
        for (int v = 0; v < W::kColumns; ++v)
#pragma unroll
          for (int h = 0; h < kFilters; ++h) g[r][v][h] = 0;
    for (bool more = true; more;) {
#pragma unroll
      for (int u = 0; u < W::kUnroll; ++u) {
        if (!more) break;
        if (kLoaderWarps) {
          wait(StageBarriers::full(stage), parity);
        } else {
          __syncthreads();
          loader.load(a, stage == 0 ? a.depth - 1 : stage - 1);
        }
        const int from = stage * a.stage_bytes;
        constexpr bool kPlane = W::kPlane;
        const bool brings_grad = kPlane ? W::has_row(u, 0) : at.row < at.end;
        float (&row)[W::kColumns][kFilters] = g[W::has_row(u, 0) ? W::row_of(u, 0) : 0];
        if (brings_grad) {
          const int g_at = from + grad_at + phase(a.grad, at.image, at.row, part.column);
#pragma unroll
          for (int v = 0; v < W::kColumns; ++v) read(g_at + v * grad_step, row[v]);
          if (kJoined && column_g + W::kColumns > a.out_width)
#pragma unroll
            for (int v = 0; v < W::kColumns; ++v)
#pragma unroll
              for (int h = 0; h < kFilters; ++h) row[v][h] = column_g + v < a.out_width ? row[v][h] : 0;
        } else if (!kPlane) {
#pragma unroll
          for (int v = 0; v < W::kColumns; ++v)
#pragma unroll
            for (int h = 0; h < kFilters; ++h) row[v][h] = 0;
        }
#pragma unroll
        for (int e = 0; e < W::kStride; ++e) {
          const int source_row = at.row * W::kStride - a.padding_h + e;
          if (kPlane ? u < W::kBeside : !W::meets(a, at.end, source_row)) continue;
          const int x_at = from + source_at + e * a.source_row_bytes +
                           phase(a.source, at.image, source_row, part.column * W::kStride - a.padding_w);
          if (kJoined && (column_x < 0 || beside < W::kSourceColumns)) clear_beside(x_at);
#pragma unroll
          for (int column = W::kFirstRead; column < W::kEndRead; ++column) {
            float x[kFilters];
            read(x_at + column * source_step, x);
#pragma unroll
            for (int i = 0; i < W::kTapsH; ++i) {
              const int reach = i * W::kDilation - e, age = reach / W::kStride;
              if (reach < 0 || reach % W::kStride != 0 || !W::has_row(u, age)) continue;
#pragma unroll
              for (int j = 0; j < W::kTapsW; ++j) {
                const int offset = column - j * W::kDilation, v = offset / W::kStride;
                if (offset < 0 || offset % W::kStride != 0 || v >= W::kColumns) continue;
#pragma unroll
                for (int h = 0; h < kFilters; ++h) sum[i][j][h] = fmaf(x[h], g[W::row_of(u, age)][v][h], sum[i][j][h]);
              }
            }
          }
        }
        if (kLoaderWarps) {
          arrive_together(StageBarriers::done(stage), threadIdx.x % 32 == 0);
        }
        if (++stage == a.depth) stage = 0, parity ^= 1;
        more = kPlane ? u + 1 < W::kUnroll : !at.next(a, W::kHeld);
        if (a.with_bias) {
          if (W::has_row(u, 0))
#pragma unroll
            for (int v = 0; v < W::kColumns; ++v)
#pragma unroll
              for (int h = 0; h < kFilters; ++h) bias[h] += row[v][h];
          if (!more || (!kPlane && at.row % 4 == 0))  // long sums lose digits
#pragma unroll
            for (int h = 0; h < kFilters; ++h) biases(h) += bias[h], bias[h] = 0;
        }
      }
      if constexpr (!W::kTurns && !W::kPlane)
#pragma unroll
        for (int r = 0; r < W::kHeld - 1; ++r)
#pragma unroll
          for (int v = 0; v < W::kColumns; ++v)
#pragma unroll
            for (int h = 0; h < kFilters; ++h) g[r][v][h] = g[r + W::kUnroll][v][h];
    }
    if constexpr (W::kPlane) at.next_image(a, W::kHeld);
  }
  Sums<kFilters> bias_total;
#pragma unroll
  for (int h = 0; h < kFilters; ++h) bias_total.of[h] = static_cast<float>(biases(h));
  float check = 0;
#pragma unroll
  for (int tap = 0; tap < W::kTaps; ++tap)
#pragma unroll
    for (int h = 0; h < kFilters; ++h) check = fmaf(sum[tap / W::kTapsW][tap % W::kTapsW][h], 0.f, check);
  const bool spoilt = __syncthreads_or(is_active() && check != 0);
  const Part mine = Part::of(a, W{});
  const Place place = Place::of(a);

  // If a block has one strip, there is nothing to add up.
  if constexpr (kFilters == 1 && W::kTaps > W::kFewTaps)
    if (!W::kMirrors && a.strips == 1 && are_parts(a) && !spoilt) {
      const int filter = mine.filter + place.group;
      if (place.strip > 0 || filter >= a.filters) return;
      float* to = partial_of<W>(a, mine) + filter;
#pragma unroll
      for (int tap = 0; tap < W::kTaps; ++tap, to += a.filters) *to = sum[tap / W::kTapsW][tap % W::kTapsW][0];
      if (a.with_bias) *to = bias_total.of[0];
      return;
    }

  // The ring has served: its memory takes the sums of all threads, tap by tap, those of two filters together.
  const int tap_bytes = static_cast<int>(sizeof(Sums<kFilters>) * blockDim.x), step = mirrors ? -tap_bytes : tap_bytes;
  int to = kRing + static_cast<int>(sizeof(Sums<kFilters>) * threadIdx.x);
  if (mirrors) to += (W::kTapsW - 1) * tap_bytes;
#pragma unroll
  for (int i = 0; i < W::kTapsH; ++i) {
#pragma unroll
    for (int j = 0; j < W::kTapsW; ++j) {
      Sums<kFilters> all;
#pragma unroll
      for (int h = 0; h < kFilters; ++h) all.of[h] = sum[i][j][h];
      shared<Sums<kFilters>>(to) = all;
      to += step;
      asm volatile("" : "+r"(to));  // or it were multiplied out for each tap
    }
    if (mirrors) to += 2 * W::kTapsW * tap_bytes;
  }
  if (mirrors) to -= (W::kTapsW - 1) * tap_bytes;
  shared<Sums<kFilters>>(to) = bias_total;
  if (is_active() && check != 0)
    sum_again<T, W>(a, mine.split, mine.filter + place.group * kFilters, mine.column + place.strip * W::kColumns);
  __syncthreads();
  finish<T, W>(a, mine, place);
}

// How the work is cut; the rest follows from it.
struct Cut {
  int groups, strips, loaders, depth, splits;
  bool boxes;
  bool whole_images;
  int threads;
  int64_t shared_bytes;
};

// What there is to know of a kernel, at run time.
struct WindowSize {
  int taps, extent_w, stride, held, filters, columns, source_columns;
  int max_threads, blocks;  // of a block, and blocks of that size on a multiprocessor, as the registers allow
  bool whole_images;        // whether splits have to be cut between images
  bool whole_rows;          // whether a block has all columns
  int first_read;           // of the columns of a strip
};

// Fills in what follows from a cut.
void apply(March& a, Cut& cut, const WindowSize& w, int element) {
  a.groups = cut.groups, a.strips = cut.strips, a.loaders = cut.loaders, a.boxes = cut.boxes, a.depth = cut.depth,
  a.splits = cut.splits;
  a.shares = Shares(int64_t{a.images} * a.out_height, a.splits, a.images, cut.whole_images ? a.out_height : 1);
  a.slabs = static_cast<int>(ceil_div(a.filters, w.filters * cut.groups));
  a.spans = static_cast<int>(ceil_div(a.out_width, cut.strips * w.columns));
  a.by_slabs = Divider(a.slabs), a.by_spans = Divider(a.spans), a.by_height = Divider(a.out_height);
  a.by_groups = Divider(a.groups);
  const int columns = cut.strips * w.columns;
  // A block with all columns knows which lie beside the image.
  const bool whole = a.spans == 1;
  cut_pixels(a.source, ceil_div(cut.groups * w.filters, a.multiplier) * element, (columns - 1) * w.stride + w.extent_w,
             whole ? std::max(a.padding_w - w.first_read, 0) : 0, whole ? a.width : INT_MAX, w.columns * w.stride,
             cut.boxes);
  cut_pixels(a.grad, cut.groups * w.filters * element, columns, 0, whole ? a.out_width : INT_MAX, w.columns, cut.boxes);
  a.source_row_bytes = a.source.ring_row_bytes(cut.boxes);
  a.stage_bytes = w.stride * a.source_row_bytes + a.grad.ring_row_bytes(cut.boxes);
  cut.threads = static_cast<int>(round_up(int64_t{cut.groups} * cut.strips, 32)) + 32 * cut.loaders;
  cut.shared_bytes =
      kRing + std::max<int64_t>(int64_t{cut.depth} * a.stage_bytes + int64_t{cut.threads} * w.filters * 8,
                                int64_t{w.taps + 1} * w.filters * cut.threads * 4);
}

// An estimate, in cycles, of how long a cut takes, with `resident` blocks on a multiprocessor. Only comparisons matter;
// the constants are fitted to measurements on an H100, most of them with boxes.
double cycles_of(const March& a, const Cut& cut, const WindowSize& w, const Device& device, int64_t resident) {
  const int64_t blocks = int64_t{a.slabs} * a.spans * cut.splits, slots = resident * device.multiprocessors;
  const double share = static_cast<double>(blocks) / static_cast<double>(slots);
  const double waves = share <= 1 ? 1 : share + 0.8 * (std::ceil(share) - share);
  const double side_by_side = static_cast<double>(std::min(resident, ceil_div(blocks, device.multiprocessors)));
  const int64_t longest = cut.whole_images ? ceil_div(a.images, cut.splits) * a.out_height
                                           : ceil_div(int64_t{a.images} * a.out_height, cut.splits);
  const int64_t images = cut.whole_images ? longest / a.out_height : (longest + a.out_height - 2) / a.out_height + 1;
  const int64_t steps = longest + std::min(w.held - 1, a.last_step - a.out_height) * images;
  const int64_t full_steps = std::min(steps, longest + (cut.whole_images ? 0 : w.held - 1));  // others lack a row

  // Of a step: instructions of a warp, bytes, units that are copied.
  const double columns = std::min(a.out_width, cut.strips * w.columns);
  const double source_columns = std::min<double>((columns - 1) * w.stride + w.extent_w, a.width);
  const int element = a.grad.slab_bytes / (w.filters * cut.groups);
  const double reads = (element == 4 ? 1 : 2) * (a.joined ? 2.0 : a.multiplier == 2 ? 1.5 : 1.0);
  const double instructions =
      w.filters * (1.2 * w.taps * w.columns + 3.05 * reads * (w.stride * w.source_columns + w.columns)) + 10;
  double bytes = 0, copies = 0, loading = 140;
  bool aligned = true;  // whether slabs are lines of 128 bytes
  const auto load = [&](const Pixels& p, double pixels) {
    const bool whole = p.slab_bytes >= p.bytes;
    aligned = aligned && (whole || p.slab_bytes % 128 == 0);
    const int pixel = std::min(p.slab_bytes, p.bytes) + (p.shift > 0 && !p.joined ? kUnit : 0);
    bytes += pixels * pixel;
    if (cut.boxes) return;
    const double units = pixels * pixel / (p.joined ? kUnit : p.unit) / 32;
    loading += units / cut.loaders * 48;
    copies += units;
  };
  load(a.source, w.stride * source_columns), load(a.grad, columns);
  const double warps = cut.threads / 32 - cut.loaders;
  const double issue = side_by_side * (warps * instructions + 6 * copies + 40 * cut.loaders) / 4 * 0.9;
  // Memory likes to be read in few places at a time.
  const double memory = side_by_side * bytes / 14.5 * (1 + 0.08 * std::log2(side_by_side));
  // One warp of a scheduler waits for each of its results.
  const double alone = (side_by_side * warps <= 4 ? 3 : 2.05) * instructions, arrival = 3000.0 / (cut.depth - 1);
  double step = 0;
  for (const double term : {issue, memory, alone, arrival, loading}) step += term * term * term * term;
  step = std::sqrt(std::sqrt(step)) * (aligned ? 1 : 1.1);

  const int64_t parts = int64_t{cut.splits} * a.spans;
  const double sums = static_cast<double>(w.taps + 1) * a.filters;
  const double total = parts > 1 ? 6600 + 8 * static_cast<double>(parts) * sums / device.multiprocessors / 17 : 0;
  const double zeros = cut.boxes ? 0 : 0.3 * static_cast<double>(cut.shared_bytes) / cut.threads;
  const double finish = 8 * w.filters * w.taps * (2 + cut.strips / std::max(1.0, cut.threads / (2.0 * cut.groups)));
  return waves * (3900 + zeros + static_cast<double>(full_steps) * step +
                  565 * static_cast<double>(steps - full_steps) + finish) +
         total;
}

// `boxes`: whether rows can be boxes.
Cut cut_for(March a, const WindowSize& w, int element, bool boxes, const Device& device) {
  // A slab begins at a multiple of the unit that is copied at once.
  const int element_group = w.filters * element;  // what the filters of a thread have of a pixel
  const int all_groups = static_cast<int>(ceil_div(a.filters, w.filters));
  const int least =
      a.joined ? all_groups : std::max({1, a.multiplier * a.source.unit / element_group, a.grad.unit / element_group});
  const int all_strips = static_cast<int>(ceil_div(a.out_width, w.columns));
  const int64_t rows = int64_t{a.images} * a.out_height;
  constexpr int64_t kLongest = 512;  // rows of a split: longer sums lose digits
  const int64_t fewest = std::min<int64_t>(w.max_threads, int64_t{all_groups} * all_strips) / 20;
  Cut best{};
  double best_cycles = INFINITY;
  const auto consider = [&](int groups, int strips, int loaders, bool boxes, int depth) {
    Cut cut{groups, strips, loaders, depth, 1, boxes, false, 0, 0};
    apply(a, cut, w, element);
    if (boxes && !(fits_box(a.source, w.columns * w.stride, element) && fits_box(a.grad, w.columns, element))) return;
    if (cut.shared_bytes > device.shared_per_block || cut.threads > w.max_threads + 32) return;
    const int64_t resident =
        std::clamp<int64_t>(std::min<int64_t>(device.shared_per_multiprocessor / (cut.shared_bytes + 1024),
                                              (w.max_threads + 32) * w.blocks / cut.threads),
                            1, 32);
    const int64_t places = int64_t{a.slabs} * a.spans, slots = resident * device.multiprocessors;
    const auto split = [&](int64_t splits) {
      for (const bool whole_images : {false, true}) {
        if (w.whole_images && !whole_images) continue;
        cut.splits = static_cast<int>(std::clamp<int64_t>(splits, 1, whole_images ? a.images : rows));
        cut.whole_images = whole_images;
        double cycles = cycles_of(a, cut, w, device, resident);
        if (ceil_div(rows, cut.splits) > kLongest) cycles *= 1.2;
        if (cycles < best_cycles) best_cycles = cycles, best = cut;
      }
    };
    for (int64_t splits = 1; splits * places < slots; splits *= 2) split(splits);
    for (int waves = 1; waves <= 4; ++waves) split(slots * waves / places);
  };
  int last_groups = 0;
  for (int most_groups = std::min(all_groups, w.max_threads); most_groups > 0; --most_groups) {
    const int64_t even = ceil_div(all_groups, ceil_div(all_groups, most_groups));  // all slabs of about the same size
    const int groups = static_cast<int>(std::min<int64_t>(round_up(even, least), all_groups));
    if (groups > w.max_threads || groups == last_groups) continue;
    last_groups = groups;
    int last_strips = 0;
    for (int most_strips = std::min(all_strips, w.max_threads / groups); most_strips > 0; --most_strips) {
      const int strips = static_cast<int>(ceil_div(all_strips, ceil_div(all_strips, most_strips)));
      if (groups * strips < fewest || strips == last_strips || (w.whole_rows && strips < all_strips)) continue;
      last_strips = strips;
      const int whole_warps = std::min(static_cast<int>(round_up(groups, 32)), all_groups);
      for (const int depth : {2, 3, 4, 6, 8})
        if (boxes)
          for (const int some_groups : {groups, whole_warps}) consider(some_groups, strips, 1, true, depth);
        else
          for (const int loaders : {1, 2, 4}) consider(groups, strips, loaders, false, depth);
    }
  }
  return boxes && best_cycles == INFINITY ? cut_for(a, w, element, false, device) : best;
}

template <typename T, class W, bool kJoined>
void launch(const Problem& p, March a, bool boxes, const Allocate& allocate, cudaStream_t stream) {
  constexpr WindowSize kWindow{W::kTaps,          W::kLoadedW,    W::kStride, W::kHeld,  W::kFilters, W::kColumns,
                               W::kSourceColumns, W::kMaxThreads, W::kBlocks, W::kPlane, W::kNarrow,  W::kFirstRead};
  constexpr int kElement = sizeof(T);
  const Device& device = current_device();
  const auto any_pitch = march_grad_weight_channels_last<T, W, kJoined, 0>;
  constexpr int kPitch = kJoined ? 0 : W::kKnownPitch, kShiftedPitch = kPitch > 0 ? kPitch + kUnit : 0;
  const auto known_pitch = march_grad_weight_channels_last<T, W, kJoined, kPitch>;
  const auto shifted_pitch = march_grad_weight_channels_last<T, W, kJoined, kShiftedPitch>;
  static thread_local Decisions<11, Cut> decisions;
  Cut cut = decisions(
      {device.id, a.images, a.filters, a.multiplier, a.height, a.width, a.out_height, a.out_width,
       (a.source.unit + (a.source.shift > 0)) * 2 * kUnit + a.grad.unit + (a.grad.shift > 0), boxes, a.joined},
      [&] {
        for (const auto kernel : {any_pitch, known_pitch, shifted_pitch}) {
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
          // With shared memory left, blocks of the second kernel wait beside those of this one.
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        }
        return cut_for(a, kWindow, kElement, boxes, device);
      });
  apply(a, cut, kWindow, kElement);
  if (cut.boxes && !a.joined &&
      !(describe_rows(a.source_map, a.source, p.batch, p.height, p.width, kElement) &&
        describe_rows(a.grad_map, a.grad, p.batch, p.out_height, p.out_width, kElement)))
    return launch<T, W, kJoined>(p, a, false, allocate, stream);
  const int64_t blocks = int64_t{a.slabs} * a.spans * a.splits, parts = int64_t{a.spans} * a.splits;
  if (parts > 1)
    a.partial = static_cast<float*>(
        allocate(parts * (W::kTaps + a.with_bias) * a.filters * static_cast<int64_t>(sizeof(float))));
  const auto has_pitch = [&](int pitch) { return a.source.pitch == pitch && a.grad.pitch == pitch; };
  const auto kernel = has_pitch(kPitch) ? known_pitch : has_pitch(kShiftedPitch) ? shifted_pitch : any_pitch;
  launch_early(kernel, a, blocks, cut.threads, stream, {.shared_bytes = cut.shared_bytes});
  check_launch("march_grad_weight_channels_last");
  if (parts > 1) launch_add_partial_sums(p, a.partial, parts, stream);
}

}  // namespace

void launch_march_grad_weight_channels_last(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (launch_three_channels_grad_weight(p, allocate, stream)) return;
  if (launch_toeplitz_grad_weight_pairs(p, allocate, stream)) return;
  March a{};
  const int64_t element = size_of(p.dtype);
  a.source = pixels_of(p.input, p.batch, p.channels, p.height, p.width, element);
  a.grad = pixels_of(p.output, p.batch, p.filters(), p.out_height, p.out_width, element);
  a.grad_weight = p.weight.data, a.grad_bias = p.bias, a.with_bias = p.bias != nullptr;
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.last_step = static_cast<int>(ceil_div(p.height + p.padding_h, p.stride_h));
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier);
  const bool bulk = current_device().capability >= 90;
  const bool boxes = bulk && has_boxes(p.input, element, a.source.unit) && has_boxes(p.output, element, a.grad.unit);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel(p, [&](auto kernel) {
        using Kernel = decltype(kernel);
        // The more columns, the fewer lie beside them; images are seldom narrow where the kernel is dilated. In float32
        // bytes bound it.
        constexpr Form kForm = Kernel::kDilation > 1 && sizeof(T) == 2 ? Form::kWide : Form::kPlain;
        using One = Window<Kernel, 1, kForm>;
        // Two filters a thread where there are registers for them and few columns beside those of a strip.
        using Two = Window<Kernel, (One::kTaps <= One::kFewTaps && Kernel::kDilation == 1 ? 2 : 1), kForm>;
        // Rows that are copied as a run have all channels, and so has a block; two stages of one strip have to fit.
        const int64_t stage = int64_t{One::kStride} * One::kSourceColumns * a.source.pixel_bytes +
                              int64_t{One::kColumns} * a.grad.pixel_bytes + (One::kStride + 1) * 2 * kUnit;
        const int64_t room = current_device().shared_per_block - kRing - 8 * One::kMaxThreads;
        a.joined = a.source.joined && a.grad.joined && a.filters <= One::kMaxThreads && 2 * stage <= room;
        for (Pixels* pixels : {&a.source, &a.grad}) pixels->set_joined(a.joined);
        if constexpr (Kernel::kKernelH == 7 && Kernel::kStride == 1 && sizeof(T) == 4) {
          const bool beside = !a.joined && a.padding_w == One::kBeside;
          const bool is_high = a.height == One::kColumns && a.padding_h == One::kBeside;
          if (beside && is_high && a.width == One::kColumns)
            return launch<T, Window<Kernel, 1, Form::kPlane>, false>(p, a, boxes, allocate, stream);
          if (beside && a.width <= One::kColumns)
            return launch<T, Window<Kernel, 1, Form::kOneStrip>, false>(p, a, boxes, allocate, stream);
          if (beside && a.width == 2 * One::kColumns)
            return launch<T, Window<Kernel, 1, Form::kTwoStrips>, false>(p, a, boxes, allocate, stream);
        }
        if constexpr (Two::kFilters == 2 && (sizeof(T) == 4 || Kernel::kStride == 1)) {
          using Split = Window<Kernel, 2, Form::kSplit>;
          const bool shifted =
              bulk && a.multiplier == 1 && a.source.unit == kUnit && a.source.shift > 0 && a.grad.shift > 0;
          // Of small pixels that begin between units a box has so much more that rows as they lie take less, above all
          // where there is nothing to clear beside them.
          constexpr int kMost = sizeof(T) == 4 ? 384 : Two::kTaps == 1 ? 256 : 64;  // bytes
          if (shifted && a.source.bytes <= kMost) {
            a.joined = a.source.joined = a.grad.joined = true;
            return launch<T, std::conditional_t<sizeof(T) == 4, One, Split>, true>(p, a, bulk, allocate, stream);
          }
          // Strips of one filter have columns that images as narrow have not.
          if constexpr (sizeof(T) == 4 && Kernel::kStride == 1)
            if (shifted && a.out_width <= Split::kColumns)
              return launch<T, Split, false>(p, a, boxes, allocate, stream);
        }
        if (a.joined)
          launch<T, One, true>(p, a, bulk, allocate, stream);
        else if (a.multiplier == 2 || (a.source.shift | a.grad.shift) % (2 * sizeof(T)) != 0)  // in no word
          launch<T, One, false>(p, a, boxes, allocate, stream);
        else
          launch<T, Two, false>(p, a, boxes, allocate, stream);
      });
  });
}

}  // namespace dwconv
