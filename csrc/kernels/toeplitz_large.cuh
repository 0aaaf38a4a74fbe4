// Forward and grad_input of large kernels in 16 bits, on tensor cores. Rows have to be contiguous: images in
// channels_last are copied to planes before, and from planes behind.
//
// Columns of the source and of the target go in groups of 8, counted from the image's first. The columns of a kernel
// row that lead from source group c to target group t are an 8 x 8 band matrix which depends on d = c - stride * t
// only: B_d[k][n] = weight[8 d + k - stride * n + padding]. So a row of the kernel is a few such matrices, `depth` of
// them, and all operands are aligned whatever the padding: no half block is wasted.
//
// A multiplication takes two rows i and i + 1 of the kernel at once: of source group c, A holds rows r * stride + i
// (its first 8 columns) and the rows below (its last 8) for 16 target rows r. ldmatrix takes an address per row, so
// these may be any: R rows of several images. Rows outside of the image are read from a row of zeros; where they are
// outside for all 16, kernel rows are skipped, for which few rows of many images are best.
//
// A block takes one target plane of some images, or a band of rows, or a range of columns of it. The part of the source
// that it needs lies in shared memory, rows at an odd multiple of 16 bytes, so that ldmatrix meets no bank twice.
// Weights lie there between zeros, in two copies a column apart, so that any two neighbours are one word of 32 bits.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common.cuh"
#include "copies.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"

namespace dwconv {

constexpr int kMaxLargeThreads = 256;
constexpr int kLargeGroup = 8, kLargeGroupBytes = 16;  // columns of a group

// How the threads of a block go through the pieces of rows of images.
struct LargeWalk {
  Divider side, rows;                     // threads side by side in a row, rows of an image
  int lanes = 0, step_images, step_rows;  // rows that are visited at once, and what that is in images and rows
  int64_t step_global, wrap_global;       // elements from one visit to the next, and where an image ends besides
  int step_shared, wrap_shared;           // likewise, in bytes

  LargeWalk() = default;
  LargeWalk(int64_t pieces, int64_t most_rows, int threads, int64_t image, int64_t row, int64_t plane, int64_t pitch)
      : side(std::min<int64_t>(pieces, threads)), rows(most_rows), lanes(threads / static_cast<int>(side.divisor)) {
    step_images = static_cast<int>(lanes / most_rows), step_rows = static_cast<int>(lanes % most_rows);
    step_global = step_images * image + step_rows * row, wrap_global = image - most_rows * row;
    step_shared = static_cast<int>(step_images * plane + step_rows * pitch);
    wrap_shared = static_cast<int>(plane - most_rows * pitch);
  }
};

template <typename T>
struct LargePlace {
  T* global;
  uint32_t shared;
};

template <int kBytes>
using LargeWord =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// A problem, and how it is cut.
struct Large {
  const void *source, *weight, *bias;
  void* target;
  int64_t source_image, source_channel, source_row, target_image, target_channel, target_row;  // strides in elements
  int64_t weight_filter, weight_row, weight_column, bias_stride;
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w;
  int stride, targets;

  int first, depth;                              // the band matrices: `depth` of them from d = `first` on
  int first_tap;                                 // column of the kernel at the beginning of a row of weights
  int images, rows, tiles, rows_log;             // of a block; of a warp
  int source_rows, source_pitch, source_plane;   // as they lie in shared memory, in bytes
  int out_plane, out_pitch, weight_pitch, copy;  // likewise
  int tasks, weight_lanes;
  int counter_at, weights_at, source_at, out_at;       // offsets in shared memory
  int load_unit, store_unit;                           // bytes that are copied at once
  bool pairs;                                          // whether outputs can be written in pairs
  bool joined;                                         // whether a band of a target plane has no gaps
  Divider by_images, by_fan_out, by_bands, by_ranges;  // tasks
  Divider by_weight_side;                              // threads side by side in a row of weights
  LargeWalk load, store;
  Divider by_image_tiles, by_column_tiles;  // tiles of warps
  int bands, ranges, row_tiles, column_tiles, image_tiles;
};

// What a block does between two barriers.
struct LargeTask {
  int target, image, images, row, rows, tile, columns;  // columns of the target, from its group `tile` on
  int source_row, source_rows, group, groups;           // of the source, as far as they are inside the image
};

__device__ inline LargeTask task_of(const Large& a, uint32_t number, int stride) {
  LargeTask t;
  t.image = a.by_images.split(number) * a.images;
  t.tile = a.by_ranges.split(number) * a.tiles;
  t.row = a.by_bands.split(number) * a.rows;
  t.target = number;
  t.images = min(a.images, a.batch - t.image);
  t.rows = min(a.rows, a.out_height - t.row);
  t.columns = min(a.tiles * kLargeGroup, a.out_width - t.tile * kLargeGroup);
  t.source_row = max(t.row * stride - a.padding_h, 0);
  t.source_rows = min((t.row + t.rows - 1) * stride - a.padding_h + a.kernel_h, a.height) - t.source_row;
  t.group = max(t.tile * stride + a.first, 0);
  t.groups =
      min((t.tile + a.tiles - 1) * stride + a.first + a.depth, (a.width + kLargeGroup - 1) / kLargeGroup) - t.group;
  return t;
}

// Visits the rows of some images, piece by piece, kBatch pieces at a time: visit(places, there) with where they lie in
// two arrays. A thread stays with a piece of a row, for which begin(piece, image, row) is the first place, as long as
// it can, so that little is left to compute.
template <int kBatch, typename Begin, typename Visit>
__device__ void walk(const LargeWalk& w, int pieces, int rows, int images, Begin&& begin, Visit&& visit) {
  uint32_t first_image = threadIdx.x;
  const int first_piece = w.side.split(first_image), first_row = w.rows.split(first_image), most = w.rows.divisor;
  if (first_image * most + first_row >= w.lanes) return;
  for (int piece = first_piece; piece < pieces; piece += w.side.divisor) {
    auto place = begin(piece, static_cast<int>(first_image), first_row);
    for (int image = first_image, row = first_row; image < images;) {
      decltype(place) places[kBatch];
      bool there[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        places[k] = place, there[k] = row < rows && image < images;
        row += w.step_rows, image += w.step_images;
        place.global += w.step_global, place.shared += w.step_shared;
        if (row >= most) row -= most, ++image, place.global += w.wrap_global, place.shared += w.wrap_shared;
      }
      visit(piece, places, there);
    }
  }
}

template <typename T, int kBytes>
__device__ void load_source(const Large& a, const LargeTask& t) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel +
                    t.source_row * a.source_row + t.group * kLargeGroup;
  const int width = a.width - t.group * kLargeGroup;
#if __CUDA_ARCH__ >= 800
  constexpr bool kAsync = kBytes >= 4;
#else
  constexpr bool kAsync = false;
#endif
  constexpr int kBatch = kAsync ? 4 : 8;
  using Word = LargeWord<kBytes>;
  const uint32_t base = shared_address(a.source_at);
  walk<kBatch>(
      a.load, t.groups * (kLargeGroupBytes / kBytes), t.source_rows, t.images,
      [&](int piece, int image, int row) {
        return LargePlace<const T>{source + image * a.source_image + row * a.source_row + piece * (kBytes / 2),
                                   base + image * a.source_plane + row * a.source_pitch + piece * kBytes};
      },
      [&](int piece, const auto& places, const auto& there) {
        const bool inside = piece * (kBytes / 2) < width;  // zeros behind the image
        Word words[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          words[k] = Word{};
          if (!there[k] || !inside) continue;
          if constexpr (kAsync)
            copy_unit<kBytes>(places[k].shared, places[k].global);
          else
            words[k] = __ldg(reinterpret_cast<const Word*>(places[k].global));
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (there[k] && !(kAsync && inside)) shared<Word>(places[k].shared - base + a.source_at) = words[k];
      });
}

template <typename T>
__device__ void load_source(const Large& a, const LargeTask& t) {
  switch (a.load_unit) {
    case 16: load_source<T, 16>(a, t); break;
    case 8: load_source<T, 8>(a, t); break;
    case 4: load_source<T, 4>(a, t); break;
    default: load_source<T, 2>(a, t); break;
  }
}

// Writes the weights of a filter between the zeros that are there already. A thread stays with a column of the kernel.
template <typename T>
__device__ void load_weights(const Large& a, int filter) {
  constexpr int kBatch = 8;  // loads under way
  const int side = a.by_weight_side.divisor, step = a.weight_lanes, pitch = a.weight_pitch;
  uint32_t first = threadIdx.x;
  const int first_tap = a.by_weight_side.split(first);
  if (static_cast<int>(first) >= step) return;
  for (int tap = first_tap; tap < a.kernel_w; tap += side) {
    const int column = tap - a.first_tap;
    if (column < 0 || 2 * column >= pitch) continue;  // it only ever meets what is outside of the image
    const T* from = static_cast<const T*>(a.weight) + filter * a.weight_filter + tap * a.weight_column;
    for (int row = first; row < a.kernel_h; row += kBatch * step) {
      T value[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (row + k * step < a.kernel_h) value[k] = __ldg(from + (row + k * step) * a.weight_row);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (row + k * step >= a.kernel_h) continue;
        const int to = a.weights_at + (row + k * step) * pitch + 2 * column;
        shared<T>(to) = value[k];
        if (column > 0) shared<T>(to + a.copy - 2) = value[k];
      }
    }
  }
}

// An output by its definition, only from taps inside the image.
template <typename T>
__device__ __noinline__ float sum_of_taps(const Large& a, int target, int image, int row, int column, int stride) {
  uint32_t channel = target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + image * a.source_image + channel * a.source_channel;
  const T* weight = static_cast<const T*>(a.weight) + target * a.weight_filter;
  float sum = a.bias ? widen(static_cast<const T*>(a.bias)[target * a.bias_stride]) : 0.f;
  for (int i = 0; i < a.kernel_h; ++i) {
    const int y = row * stride + i - a.padding_h;
    if (y < 0 || y >= a.height) continue;
    for (int j = 0; j < a.kernel_w; ++j) {
      const int x = column * stride + j - a.padding_w;
      if (x >= 0 && x < a.width)
        sum = fmaf(widen(source[y * a.source_row + x]), widen(weight[i * a.weight_row + j * a.weight_column]), sum);
    }
  }
  return sum;
}

template <typename T, int kBytes>
__device__ void store_target(const Large& a, const LargeTask& t) {
  using Word = LargeWord<kBytes>;
  const int run = a.joined ? t.rows * t.columns : t.columns, runs = a.joined ? 1 : t.rows;
  T* target = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel +
              t.row * a.target_row + t.tile * kLargeGroup;
  walk<4>(
      a.store, run * 2 / kBytes, runs, t.images,
      [&](int piece, int image, int row) {
        return LargePlace<T>{
            target + image * a.target_image + row * a.target_row + piece * (kBytes / 2),
            static_cast<uint32_t>(a.out_at + image * a.out_plane + row * a.out_pitch + piece * kBytes)};
      },
      [&](int, const auto& places, const auto& there) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (there[k]) *reinterpret_cast<Word*>(places[k].global) = shared<Word>(places[k].shared);
      });
}

template <typename T>
__device__ void store_target(const Large& a, const LargeTask& t) {
  switch (a.store_unit) {
    case 16: return store_target<T, 16>(a, t);
    case 8: return store_target<T, 8>(a, t);
    case 4: return store_target<T, 4>(a, t);
    default: return store_target<T, 2>(a, t);
  }
}

template <typename T, int kStride, int kTiles, int kDepth, int kBlocksM>
__device__ void compute(const Large& a, const LargeTask& t, float bias) {
  constexpr int kGroups = (kTiles - 1) * kStride + kDepth;  // of the source that a warp's tiles meet
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2;
  const int entry = pair - quad * kStride + 7 * kStride;  // of the lane's first pair in a row of weights
  const int weights = a.weights_at + (entry & 1) * a.copy + 2 * (entry & ~1);
  const int units = a.image_tiles * a.column_tiles * a.row_tiles;
  const int tile_rows = 1 << a.rows_log, tile_images = 16 * kBlocksM >> a.rows_log;
  while (true) {
    // Warps take what is next. Rows in the middle, which meet the most rows of the kernel, come first.
    uint32_t rest = lane == 0 ? atomicAdd(&shared<int>(a.counter_at), 1) : 0;
    rest = __shfl_sync(~0u, rest, 0);
    if (static_cast<int>(rest) >= units) break;
    const int tile = a.by_column_tiles.split(rest) * kTiles, image = a.by_image_tiles.split(rest) * tile_images;
    const int step = (static_cast<int>(rest) + 1) / 2, middle = (a.row_tiles - 1) / 2;
    const int row = (middle + (rest % 2 == 1 ? step : -step)) * tile_rows;
    if (row >= t.rows || image >= t.images) continue;

    float sum[kBlocksM][kTiles][4];
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[m][j][v] = bias;

    // Kernel rows that meet the image for any of the warp's rows.
    const int first_row = t.row + row, last_row = min(first_row + tile_rows, t.row + t.rows) - 1;
    const int begin = max(a.padding_h - last_row * kStride, 0);
    const int end = min(a.height + a.padding_h - first_row * kStride, a.kernel_h);
    int d = 0;
    do {                                                                    // mostly once
      const int group = (t.tile + tile) * kStride + a.first + d - t.group;  // of the first, among those that are there
      const int low = max(-group, 0), high = min(t.groups - group, kGroups);
      const uint32_t inside = low < high ? (1u << high) - (1u << low) : 0;
      int source[kBlocksM], y[kBlocksM];
#pragma unroll
      for (int m = 0; m < kBlocksM; ++m) {
        const int slot = 16 * m + lane % 16, r = row + (slot & (tile_rows - 1)), n = image + (slot >> a.rows_log);
        y[m] = (t.row + r) * kStride + begin + lane / 16 - a.padding_h - t.source_row;
        source[m] = a.source_at + n * a.source_plane + y[m] * a.source_pitch + group * kLargeGroupBytes;
        if (n >= t.images || r >= t.rows) y[m] = -(1 << 30);
      }
      int band = weights + begin * a.weight_pitch + d * kLargeGroupBytes;
      const auto multiply_rows = [&](auto is_inside) {
#pragma unroll 1
        for (int i = begin; i < end; i += 2) {
          uint32_t b[kDepth][2];
#pragma unroll
          for (int k = 0; k < kDepth; ++k)
            b[k][0] = shared<uint32_t>(band + k * kLargeGroupBytes),
            b[k][1] = shared<uint32_t>(band + a.weight_pitch + k * kLargeGroupBytes);
          band += 2 * a.weight_pitch;
          uint32_t from[kBlocksM];
#pragma unroll
          for (int m = 0; m < kBlocksM; ++m) {
            const bool there = static_cast<uint32_t>(y[m]) < static_cast<uint32_t>(t.source_rows);
            from[m] = shared_address(there ? source[m] : group * kLargeGroupBytes);
            source[m] += 2 * a.source_pitch, y[m] += 2;
          }
          uint32_t x[2][kBlocksM][4];
          const auto load = [&](int c) {
            if (c >= kGroups || !is_inside(c)) return;
#pragma unroll
            for (int m = 0; m < kBlocksM; ++m) load_matrices(x[c % 2][m], from[m] + c * kLargeGroupBytes);
          };
          load(0);
#pragma unroll
          for (int c = 0; c < kGroups; ++c) {
            load(c + 1);
            if (!is_inside(c)) continue;
#pragma unroll
            for (int k = 0; k < kDepth; ++k) {
              const int j = (c - k) / kStride;
              if (c < k || (c - k) % kStride != 0 || j >= kTiles) continue;
#pragma unroll
              for (int m = 0; m < kBlocksM; ++m) multiply(sum[m][j], std::as_const(sum[m][j]), x[c % 2][m], b[k], T{});
            }
          }
        }
      };
      // Where groups are known when it is compiled, nothing has to be asked in the loop.
      constexpr int kEdge = kDepth / 2;
      const bool left = low == kEdge, right = high == kGroups - kEdge;
      if (kStride > 1)
        multiply_rows([&](int c) { return (inside >> c & 1) != 0; });
      else if (low == 0 && high == kGroups)
        multiply_rows([](int) { return true; });
      else if (left && right)
        multiply_rows([](int c) { return c >= kEdge && c < kGroups - kEdge; });
      else if (left && high == kGroups)
        multiply_rows([](int c) { return c >= kEdge; });
      else if (low == 0 && right)
        multiply_rows([](int c) { return c < kGroups - kEdge; });
      else if (low < high)
        multiply_rows([&](int c) { return (inside >> c & 1) != 0; });
      d += kDepth;
    } while (d < a.depth);

    // Sums go to shared memory, from where they are stored as they lie side by side.
    const auto none = narrow_pair(0.f, 0.f, T{});
    auto zero = none;
    const auto stage = [&](auto pairs) {
#pragma unroll
      for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int slot = 16 * m + 8 * h + quad, r = row + (slot & (tile_rows - 1)), n = image + (slot >> a.rows_log);
          const int column = tile * kLargeGroup + pair, columns = (r < t.rows && n < t.images ? t.columns : 0) - column;
          const int to = a.out_at + n * a.out_plane + r * a.out_pitch + 2 * column;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const auto values = narrow_pair(sum[m][j][2 * h], sum[m][j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
            zero = __hfma2(values, none, zero);
#endif
            if (pairs) {
              if (j * kLargeGroup < columns) shared<Pair<T>>(to + j * kLargeGroupBytes) = values;
            } else {
              if (j * kLargeGroup < columns) shared<T>(to + j * kLargeGroupBytes) = values.x;
              if (j * kLargeGroup + 1 < columns) shared<T>(to + j * kLargeGroupBytes + 2) = values.y;
            }
          }
        }
    };
    if (a.pairs)
      stage(std::true_type{});
    else
      stage(std::false_type{});
    if (!(__low2float(zero) == 0 && __high2float(zero) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
      for (int v = 0; v < kBlocksM * 2 * kTiles * 2; ++v) {
        const int slot = v / (2 * kTiles) * 8 + quad, r = row + (slot & (tile_rows - 1)),
                  n = image + (slot >> a.rows_log);
        const int column = (tile + v / 2 % kTiles) * kLargeGroup + pair + v % 2;
        if (r >= t.rows || n >= t.images || column >= t.columns) continue;
        T& to = shared<T>(a.out_at + n * a.out_plane + r * a.out_pitch + 2 * column);
        if (is_finite(widen(to))) continue;
        to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, t.row + r, t.tile * kLargeGroup + column, kStride));
      }
    }
  }
}

// A block takes a run of tasks, which share a filter most of the time. While it stores the targets of one, the sources
// of the next arrive; the blocks beside it compute.
template <typename T, int kStride, int kTiles, int kDepth, int kBlocksM>
__global__ void __launch_bounds__(kMaxLargeThreads, 2) toeplitz_large(const __grid_constant__ Large a) {
  const int first = static_cast<int>(static_cast<int64_t>(a.tasks) * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(static_cast<int64_t>(a.tasks) * (blockIdx.x + 1) / gridDim.x);
  let_next_kernel_start();
  for (int i = 4 * threadIdx.x; i < a.source_at; i += 4 * blockDim.x) shared<uint32_t>(i) = 0;
  wait_for_kernel_before();
  float bias = 0;
  LargeTask t{};
  for (int number = first, filter = -1; number <= last; ++number) {
    const LargeTask before = t;
    __syncthreads();
    if (number < last) {
      t = task_of(a, number, kStride);
      load_source<T>(a, t);
    }
    if (number > first) store_target<T>(a, before);
    if (number == last) break;
    if (t.target != filter) {
      filter = t.target;
      load_weights<T>(a, filter);
      bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
    }
    if (threadIdx.x == 0) shared<int>(a.counter_at) = 0;
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    compute<T, kStride, kTiles, kDepth, kBlocksM>(a, t, bias);
  }
}

}  // namespace dwconv
