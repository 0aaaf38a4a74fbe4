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
#include <cmath>
#include <limits>

#include "copies.cuh"
#include "launch.h"
#include "mapping.h"
#include "relayout.cuh"
#include "stream.cuh"
#include "tensor_cores.cuh"
#include "toeplitz_large.h"

namespace dwconv {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kMostTasks = std::numeric_limits<int32_t>::max() - 1;
constexpr int kGroup = 8, kGroupBytes = 16;  // columns of a group

// How a problem is cut.
struct Cut {
  int tiles = 0;                          // column groups of a target that a warp computes at once
  int depth = 0;                          // band matrices that it has at once
  int blocks_m = 0;                       // 16 rows each
  int rows_log = 0;                       // these are 1 << rows_log rows of an image
  int images = 0, rows = 0, columns = 0;  // of a block; `columns` counts tiles of a warp side by side
  int threads = 0;
};

// How the threads of a block go through the pieces of rows of images.
struct Walk {
  Divider side, rows;                     // threads side by side in a row, rows of an image
  int lanes = 0, step_images, step_rows;  // rows that are visited at once, and what that is in images and rows
  int64_t step_global, wrap_global;       // elements from one visit to the next, and where an image ends besides
  int step_shared, wrap_shared;           // likewise, in bytes

  Walk() = default;
  Walk(int64_t pieces, int64_t most_rows, int threads, int64_t image, int64_t row, int64_t plane, int64_t pitch)
      : side(std::min<int64_t>(pieces, threads)), rows(most_rows), lanes(threads / static_cast<int>(side.divisor)) {
    step_images = static_cast<int>(lanes / most_rows), step_rows = static_cast<int>(lanes % most_rows);
    step_global = step_images * image + step_rows * row, wrap_global = image - most_rows * row;
    step_shared = static_cast<int>(step_images * plane + step_rows * pitch);
    wrap_shared = static_cast<int>(plane - most_rows * pitch);
  }
};

template <typename T>
struct Place {
  T* global;
  uint32_t shared;
};

template <int kBytes>
using WordOf =
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
  Walk load, store;
  Divider by_image_tiles, by_column_tiles;  // tiles of warps
  int bands, ranges, row_tiles, column_tiles, image_tiles;
};

// What a block does between two barriers.
struct Task {
  int target, image, images, row, rows, tile, columns;  // columns of the target, from its group `tile` on
  int source_row, source_rows, group, groups;           // of the source, as far as they are inside the image
};

__device__ inline Task task_of(const Large& a, uint32_t number, int stride) {
  Task t;
  t.image = a.by_images.split(number) * a.images;
  t.tile = a.by_ranges.split(number) * a.tiles;
  t.row = a.by_bands.split(number) * a.rows;
  t.target = number;
  t.images = min(a.images, a.batch - t.image);
  t.rows = min(a.rows, a.out_height - t.row);
  t.columns = min(a.tiles * kGroup, a.out_width - t.tile * kGroup);
  t.source_row = max(t.row * stride - a.padding_h, 0);
  t.source_rows = min((t.row + t.rows - 1) * stride - a.padding_h + a.kernel_h, a.height) - t.source_row;
  t.group = max(t.tile * stride + a.first, 0);
  t.groups = min((t.tile + a.tiles - 1) * stride + a.first + a.depth, (a.width + kGroup - 1) / kGroup) - t.group;
  return t;
}

// Visits the rows of some images, piece by piece, kBatch pieces at a time: visit(places, there) with where they lie in
// two arrays. A thread stays with a piece of a row, for which begin(piece, image, row) is the first place, as long as
// it can, so that little is left to compute.
template <int kBatch, typename Begin, typename Visit>
__device__ void walk(const Walk& w, int pieces, int rows, int images, Begin&& begin, Visit&& visit) {
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
__device__ void load_source(const Large& a, const Task& t) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel +
                    t.source_row * a.source_row + t.group * kGroup;
  const int width = a.width - t.group * kGroup;
#if __CUDA_ARCH__ >= 800
  constexpr bool kAsync = kBytes >= 4;
#else
  constexpr bool kAsync = false;
#endif
  constexpr int kBatch = kAsync ? 4 : 8;
  using Word = WordOf<kBytes>;
  const uint32_t base = shared_address(a.source_at);
  walk<kBatch>(
      a.load, t.groups * (kGroupBytes / kBytes), t.source_rows, t.images,
      [&](int piece, int image, int row) {
        return Place<const T>{source + image * a.source_image + row * a.source_row + piece * (kBytes / 2),
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
__device__ void load_source(const Large& a, const Task& t) {
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
__device__ void store_target(const Large& a, const Task& t) {
  using Word = WordOf<kBytes>;
  const int run = a.joined ? t.rows * t.columns : t.columns, runs = a.joined ? 1 : t.rows;
  T* target = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel +
              t.row * a.target_row + t.tile * kGroup;
  walk<4>(
      a.store, run * 2 / kBytes, runs, t.images,
      [&](int piece, int image, int row) {
        return Place<T>{target + image * a.target_image + row * a.target_row + piece * (kBytes / 2),
                        static_cast<uint32_t>(a.out_at + image * a.out_plane + row * a.out_pitch + piece * kBytes)};
      },
      [&](int, const auto& places, const auto& there) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (there[k]) *reinterpret_cast<Word*>(places[k].global) = shared<Word>(places[k].shared);
      });
}

template <typename T>
__device__ void store_target(const Large& a, const Task& t) {
  switch (a.store_unit) {
    case 16: return store_target<T, 16>(a, t);
    case 8: return store_target<T, 8>(a, t);
    case 4: return store_target<T, 4>(a, t);
    default: return store_target<T, 2>(a, t);
  }
}

template <typename T, int kStride, int kTiles, int kDepth, int kBlocksM>
__device__ void compute(const Large& a, const Task& t, float bias) {
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
        source[m] = a.source_at + n * a.source_plane + y[m] * a.source_pitch + group * kGroupBytes;
        if (n >= t.images || r >= t.rows) y[m] = -(1 << 30);
      }
      int band = weights + begin * a.weight_pitch + d * kGroupBytes;
      const auto multiply_rows = [&](auto is_inside) {
#pragma unroll 1
        for (int i = begin; i < end; i += 2) {
          uint32_t b[kDepth][2];
#pragma unroll
          for (int k = 0; k < kDepth; ++k)
            b[k][0] = shared<uint32_t>(band + k * kGroupBytes),
            b[k][1] = shared<uint32_t>(band + a.weight_pitch + k * kGroupBytes);
          band += 2 * a.weight_pitch;
          uint32_t from[kBlocksM];
#pragma unroll
          for (int m = 0; m < kBlocksM; ++m) {
            const bool there = static_cast<uint32_t>(y[m]) < static_cast<uint32_t>(t.source_rows);
            from[m] = shared_address(there ? source[m] : group * kGroupBytes);
            source[m] += 2 * a.source_pitch, y[m] += 2;
          }
          uint32_t x[2][kBlocksM][4];
          const auto load = [&](int c) {
            if (c >= kGroups || !is_inside(c)) return;
#pragma unroll
            for (int m = 0; m < kBlocksM; ++m) load_matrices(x[c % 2][m], from[m] + c * kGroupBytes);
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
          const int column = tile * kGroup + pair, columns = (r < t.rows && n < t.images ? t.columns : 0) - column;
          const int to = a.out_at + n * a.out_plane + r * a.out_pitch + 2 * column;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const auto values = narrow_pair(sum[m][j][2 * h], sum[m][j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
            zero = __hfma2(values, none, zero);
#endif
            if (pairs) {
              if (j * kGroup < columns) shared<Pair<T>>(to + j * kGroupBytes) = values;
            } else {
              if (j * kGroup < columns) shared<T>(to + j * kGroupBytes) = values.x;
              if (j * kGroup + 1 < columns) shared<T>(to + j * kGroupBytes + 2) = values.y;
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
        const int column = (tile + v / 2 % kTiles) * kGroup + pair + v % 2;
        if (r >= t.rows || n >= t.images || column >= t.columns) continue;
        T& to = shared<T>(a.out_at + n * a.out_plane + r * a.out_pitch + 2 * column);
        if (is_finite(widen(to))) continue;
        to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, t.row + r, t.tile * kGroup + column, kStride));
      }
    }
  }
}

// A block takes a run of tasks, which share a filter most of the time. While it stores the targets of one, the sources
// of the next arrive; the blocks beside it compute.
template <typename T, int kStride, int kTiles, int kDepth, int kBlocksM>
__global__ void __launch_bounds__(kMaxThreads, 2) toeplitz_large(const __grid_constant__ Large a) {
  const int first = static_cast<int>(static_cast<int64_t>(a.tasks) * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(static_cast<int64_t>(a.tasks) * (blockIdx.x + 1) / gridDim.x);
  for (int i = 4 * threadIdx.x; i < a.source_at; i += 4 * blockDim.x) shared<uint32_t>(i) = 0;
  float bias = 0;
  Task t{};
  for (int number = first, filter = -1; number <= last; ++number) {
    const Task before = t;
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

// ---------------------------------------------------------------------------- how to cut a problem

Large arguments_of(const Problem& p) {
  const Mapping map(p);
  Large a{};
  a.source = map.source.data, a.weight = map.weight.data, a.bias = map.bias, a.target = map.target.data;
  a.source_image = map.source.stride[0], a.source_channel = map.source.stride[1], a.source_row = map.source.stride[2];
  a.target_image = map.target.stride[0], a.target_channel = map.target.stride[1], a.target_row = map.target.stride[2];
  a.weight_filter = map.weight.stride[0], a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.bias_stride = map.bias_stride;
  a.batch = static_cast<int>(p.batch), a.targets = map.targets;
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.stride = static_cast<int>(p.stride_h);
  a.by_fan_out = Divider(map.fan_out);
  return a;
}

// Lays a block's shared memory out. Returns how much of it there is: the other numbers mean nothing if it is too much.
int64_t apply(Large& a, const Cut& cut) {
  const Bands bands(a.kernel_w, a.stride, a.padding_w, a.width, a.out_width);
  const int tile_rows = 1 << cut.rows_log;
  a.first = static_cast<int>(bands.first), a.depth = static_cast<int>(bands.count);
  a.first_tap = kGroup * a.first - 7 * a.stride + a.padding_w;
  a.images = cut.images, a.rows = cut.rows, a.rows_log = cut.rows_log, a.tiles = cut.columns * cut.tiles;
  a.bands = static_cast<int>(ceil_div(a.out_height, a.rows));
  a.ranges = static_cast<int>(ceil_div(ceil_div(a.out_width, kGroup), a.tiles));
  a.row_tiles = static_cast<int>(ceil_div(a.rows, tile_rows)), a.column_tiles = cut.columns;
  a.image_tiles = static_cast<int>(ceil_div(a.images, std::max(16 * cut.blocks_m >> cut.rows_log, 1)));

  const int64_t groups = std::min<int64_t>(ceil_div(a.width, kGroup), int64_t{a.tiles - 1} * a.stride + a.depth);
  const int64_t source_rows = std::min<int64_t>(a.height, int64_t{a.rows - 1} * a.stride + a.kernel_h);
  const int64_t source_pitch = kGroupBytes * (groups | 1);
  int64_t source_plane = source_rows * source_pitch;
  // Rows of several images meet no bank of shared memory twice, either.
  if (tile_rows < 8)
    while (source_plane / kGroupBytes % (2 * tile_rows) != tile_rows) source_plane += kGroupBytes;
  const int64_t columns = std::min(a.tiles * kGroup, a.out_width), out_plane = round_up(2 * a.rows * columns, 16);
  const int64_t weight_pitch = 2 * round_up(kGroup * round_up(a.depth, cut.depth) + 7 * a.stride, 2);
  int64_t copy = (a.kernel_h + 1) * weight_pitch;
  copy += (64 - copy % 128 + 128) % 128;  // so that the copies do not meet in a bank
  const int64_t counter_at = round_up(groups * kGroupBytes, 128), weights_at = counter_at + 128;
  const int64_t source_at = weights_at + round_up(2 * copy, 128);
  const int64_t out_at = source_at + round_up(a.images * source_plane, 128), bytes = out_at + a.images * out_plane;
  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  set(a.source_rows, source_rows), set(a.source_pitch, source_pitch), set(a.source_plane, source_plane);
  set(a.out_pitch, 2 * columns), set(a.out_plane, out_plane), set(a.weight_pitch, weight_pitch), set(a.copy, copy);
  set(a.counter_at, counter_at), set(a.weights_at, weights_at), set(a.source_at, source_at), set(a.out_at, out_at);

  const auto unit_of = [](std::initializer_list<int64_t> places) {
    int64_t all = 16;
    for (const int64_t place : places) all |= place;
    return static_cast<int>(all & -all);
  };
  a.load_unit = unit_of({reinterpret_cast<intptr_t>(a.source), a.batch > 1 ? 2 * a.source_image : 0,
                         a.targets > 1 ? 2 * a.source_channel : 0, a.height > 1 ? 2 * a.source_row : 0, 2 * a.width});
  const int last = a.out_width - (a.ranges - 1) * a.tiles * kGroup;
  a.joined = a.ranges == 1 && (a.target_row == a.out_width || a.out_height == 1);
  const int64_t band = 2 * int64_t{a.rows} * a.out_width,
                last_band = 2 * int64_t{a.out_height} * a.out_width - (a.bands - 1) * band;
  a.store_unit = unit_of({reinterpret_cast<intptr_t>(a.target), a.batch > 1 ? 2 * a.target_image : 0,
                          a.targets > 1 ? 2 * a.target_channel : 0});
  if (a.joined)
    a.store_unit = unit_of({a.store_unit, a.bands > 1 ? band : 0, last_band});
  else
    a.store_unit = unit_of({a.store_unit, a.out_height > 1 ? 2 * a.target_row : 0, 2 * last});
  a.pairs = last % 2 == 0;
  a.by_weight_side = Divider(std::min(a.kernel_w, cut.threads));
  a.weight_lanes = cut.threads / std::min(a.kernel_w, cut.threads);
  a.load = Walk(groups * (kGroupBytes / a.load_unit), source_rows, cut.threads, a.source_image, a.source_row,
                source_plane, source_pitch);
  const int64_t run = 2 * columns * (a.joined ? a.rows : 1);
  a.store = Walk(std::max<int64_t>(run / a.store_unit, 1), a.joined ? 1 : a.rows, cut.threads, a.target_image,
                 a.target_row, out_plane, 2 * columns);
  const int64_t image_groups = ceil_div(a.batch, a.images);
  a.tasks = static_cast<int>(std::min<int64_t>(image_groups * a.bands * a.ranges * a.targets, kMostTasks + 1));
  a.by_images = Divider(image_groups), a.by_bands = Divider(a.bands), a.by_ranges = Divider(a.ranges);
  a.by_image_tiles = Divider(a.image_tiles), a.by_column_tiles = Divider(a.column_tiles);
  return bytes;
}

template <int value>
using Constant = std::integral_constant<int, value>;

// The cuts that are compiled. Calls visit(stride, tiles, depth, blocks_m) with one after the other until it returns
// true.
template <typename Visitor>
bool visit_variants(Visitor&& visit) {
  const auto visit_depths = [&](auto tiles, auto blocks_m) {
    return visit(Constant<1>{}, tiles, Constant<3>{}, blocks_m) || visit(Constant<1>{}, tiles, Constant<5>{}, blocks_m);
  };
  const auto visit_tiles = [&](auto tiles) {
    return visit_depths(tiles, Constant<1>{}) || visit_depths(tiles, Constant<2>{});
  };
  const auto visit_deep = [&](auto depth, auto blocks_m) {
    return visit(Constant<1>{}, Constant<7>{}, depth, blocks_m);
  };
  return visit_tiles(Constant<2>{}) || visit_tiles(Constant<4>{}) || visit_tiles(Constant<7>{}) ||
         visit_depths(Constant<2>{}, Constant<4>{}) || visit_deep(Constant<9>{}, Constant<1>{}) ||
         visit_deep(Constant<9>{}, Constant<2>{}) ||
         visit(Constant<2>{}, Constant<2>{}, Constant<3>{}, Constant<1>{}) ||
         visit(Constant<2>{}, Constant<4>{}, Constant<3>{}, Constant<1>{});
}

// What the tiles side by side in a row of a plane take for 16 rows of it and two rows of the kernel.
struct Effort {
  int64_t multiplies = 0;             // of 16 x 16 by 16 x 8
  int64_t loads = 0, band_loads = 0;  // of A, and of half a band matrix

  Effort(const Large& a, const Bands& bands, const Cut& cut) {
    const int64_t tiles = ceil_div(a.out_width, kGroup), groups = ceil_div(a.width, kGroup);
    const int64_t width = (cut.tiles - 1) * a.stride + cut.depth;
    for (int64_t tile = 0; tile < tiles; tile += cut.tiles)
      for (int64_t d = 0; d < bands.count; d += cut.depth) {
        const int64_t group = tile * a.stride + bands.first + d;
        const int64_t low = std::max<int64_t>(-group, 0), high = std::min(groups - group, width);
        if (low >= high) continue;
        band_loads += 2 * cut.depth, loads += high - low;
        for (int64_t c = low; c < high; ++c)
          for (int64_t k = 0; k < cut.depth; ++k)
            multiplies += c >= k && (c - k) % a.stride == 0 && (c - k) / a.stride < cut.tiles;
      }
  }
};

// Pairs of kernel rows that all tiles of `rows` rows of a plane take together; of many tiles, some stand for all.
int64_t pairs_of(const Large& a, int64_t rows) {
  const int64_t each = std::max<int64_t>(ceil_div(a.out_height, rows) / 64, 1);
  int64_t pairs = 0;
  for (int64_t row = 0; row < a.out_height; row += each * rows) {
    const int64_t last = std::min<int64_t>(row + rows, a.out_height) - 1;
    const int64_t begin = std::max<int64_t>(a.padding_h - last * a.stride, 0);
    const int64_t end = std::min<int64_t>(a.height + a.padding_h - row * a.stride, a.kernel_h);
    pairs += each * std::max<int64_t>(ceil_div(end - begin, 2), 0);
  }
  return pairs;
}

// The expected time of a cut that is applied, in cycles. The constants were fitted to some 3000 timings of cuts; most
// are instructions, with what they wait for.
double time_of(const Large& a, const Cut& cut, const Effort& effort, int64_t row_pairs, int64_t bytes,
               int multiprocessors) {
  const double tile_images = std::max(16 * cut.blocks_m >> cut.rows_log, 1), threads = cut.threads;
  const double planes = std::ceil(a.batch / tile_images) * a.targets, pairs = row_pairs * planes;
  const double row_tiles = std::ceil(a.out_height / static_cast<double>(1 << cut.rows_log));
  const double units = row_tiles * a.column_tiles * a.ranges * planes;
  const double chunks = ceil_div(a.depth, cut.depth), columns = a.column_tiles * a.ranges;
  const double multiply =
      pairs * std::max(1.67 * effort.multiplies * cut.blocks_m, 4. * effort.loads * cut.blocks_m + effort.band_loads);
  const double load = static_cast<double>(a.images) * a.source_plane / a.load_unit;
  const double store = static_cast<double>(a.images) * a.out_plane / a.store_unit;
  const double issue =
      pairs * ((effort.multiplies + effort.loads) * cut.blocks_m + effort.band_loads + 15 * chunks * columns) +
      units * (20 + 85 * cut.blocks_m * cut.tiles + 110 * chunks) + a.tasks * (1.3 * load + 10 * store + 5 * threads);
  const int registers = std::min(50 + (4 * cut.tiles + 8) * cut.blocks_m + 2 * cut.depth, 128);
  const double resident =
      std::max(std::min({(228 << 10) / static_cast<int>(bytes + 1024), 65536 / (registers * cut.threads),
                         2048 / cut.threads, static_cast<int>(ceil_div(a.tasks, multiprocessors))}),
               1);
  const double tasks = ceil_div(a.tasks, multiprocessors);  // of a multiprocessor
  const double work = std::hypot(multiply, 0.18 * issue) / a.tasks * (1 + 140 / (resident * threads));
  return tasks * (work + 500 / resident);
}

// The cut that is expected to take the least time.
Cut choose_cut(Large a, int64_t shared_bytes, int multiprocessors) {
  const Bands bands(a.kernel_w, a.stride, a.padding_w, a.width, a.out_width);
  const int64_t tiles = ceil_div(a.out_width, kGroup);
  Cut best;
  double least = std::numeric_limits<double>::infinity();
  const auto next = [](int64_t parts, int64_t most) { return parts == most ? most + 1 : std::min(2 * parts, most); };
  visit_variants([&](int stride, int cut_tiles, int depth, int blocks_m) {
    if (stride != a.stride) return false;
    Cut cut;
    cut.tiles = cut_tiles, cut.depth = depth, cut.blocks_m = blocks_m;
    const Effort effort(a, bands, cut);
    const int64_t columns = ceil_div(tiles, cut.tiles);
    for (cut.rows_log = 0; 1 << cut.rows_log <= 16 * blocks_m; ++cut.rows_log) {
      const int tile_images = 16 * blocks_m >> cut.rows_log, tile_rows = 1 << cut.rows_log;
      const int64_t row_tiles = ceil_div(a.out_height, tile_rows), pairs = pairs_of(a, tile_rows);
      for (int64_t parts = 1; parts <= row_tiles; parts = next(parts, row_tiles))
        for (int64_t ranges = 1; ranges <= columns; ranges = next(ranges, columns)) {
          cut.rows = static_cast<int>(ceil_div(row_tiles, parts) * tile_rows);
          cut.columns = static_cast<int>(ceil_div(columns, ranges));
          for (cut.images = tile_images; cut.images < 2 * std::max(a.batch, tile_images); cut.images *= 2) {
            cut.threads = kMaxThreads;
            const int64_t bytes = apply(a, cut);
            if (bytes > shared_bytes || a.tasks > kMostTasks) break;
            const int units = a.row_tiles * a.column_tiles * a.image_tiles;
            for (; cut.threads >= 32; cut.threads /= 2) {
              if (cut.threads > 32 * units && cut.threads > 32) continue;  // a warp would have nothing to do
              const double time = time_of(a, cut, effort, pairs, bytes, multiprocessors);
              if (time < least) least = time, best = cut;
            }
          }
        }
    }
    return false;
  });
  return best;
}

// Calls visit(kernel) with the kernel of a cut.
template <typename T, typename Visitor>
void visit_kernel(const Large& a, const Cut& cut, Visitor&& visit) {
  const bool found = visit_variants([&](auto stride, auto tiles, auto depth, auto blocks_m) {
    if (a.stride != stride || cut.tiles != tiles || cut.depth != depth || cut.blocks_m != blocks_m) return false;
    visit(toeplitz_large<T, stride, tiles, depth, blocks_m>);
    return true;
  });
  if (!found) throw std::runtime_error("dwconv: toeplitz_large finds no cut for this problem");
}

struct Decision {
  Cut cut;
  int blocks;  // that a device has at once
};

template <typename T>
Decision decide(Large a, const Cut& cut, const Device& device) {
  int resident = 0;
  const auto bytes = static_cast<size_t>(apply(a, cut));
  visit_kernel<T>(a, cut, [&](auto kernel) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, cut.threads, bytes);
  });
  return {cut, std::max(resident, 1) * device.multiprocessors};
}

template <typename T>
void launch(Large a, const Decision& decision, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(apply(a, decision.cut));
  visit_kernel<T>(a, decision.cut, [&](auto kernel) {
    kernel<<<std::min(a.tasks, decision.blocks), decision.cut.threads, bytes, stream>>>(a);
  });
  check_launch("toeplitz_large");
}

template <typename T>
void launch(const Problem& p, cudaStream_t stream) {
  const Device& device = current_device();
  static thread_local Decisions<16, Decision> decisions;
  const Large a = arguments_of(p);
  launch<T>(a,
            decisions({device.id, p.shared_memory, a.batch, a.targets, a.height, a.width, a.out_height, a.out_width,
                       a.kernel_h, a.kernel_w, a.padding_h, a.padding_w, a.stride, a.source_row, a.target_row},
                      [&] {
                        const Cut cut = choose_cut(a, p.shared_memory, device.multiprocessors);
                        return decide<T>(a, cut, device);
                      }),
            stream);
}

View planes_of(void* data, int64_t planes, int64_t height, int64_t width) {
  return {data, {planes * height * width, height * width, width, 1}};
}

}  // namespace

void launch_toeplitz_large(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  Problem p = problem;
  const int64_t input_bytes = has_rows(p.input, p.width) ? 0 : 2 * p.batch * p.channels * p.height * p.width;
  const int64_t output_bytes =
      has_rows(p.output, p.out_width) ? 0 : 2 * p.batch * p.filters() * p.out_height * p.out_width;
  char* workspace = nullptr;
  if (input_bytes + output_bytes > 0)
    workspace = static_cast<char*>(allocate(round_up(input_bytes, 16) + output_bytes));
  if (input_bytes > 0) p.input = planes_of(workspace, p.channels, p.height, p.width);
  if (output_bytes > 0)
    p.output = planes_of(workspace + round_up(input_bytes, 16), p.filters(), p.out_height, p.out_width);

  const bool forward = p.pass == Pass::kForward;
  if (forward && input_bytes > 0)
    launch_relayout<true>(problem.input, p.input.data, p.batch, p.channels, p.height, p.width, stream);
  if (!forward && output_bytes > 0)
    launch_relayout<true>(problem.output, p.output.data, p.batch, p.filters(), p.out_height, p.out_width, stream);
  if (p.dtype == DType::kFloat16)
    launch<__half>(p, stream);
  else
    launch<__nv_bfloat16>(p, stream);
  if (!forward && input_bytes > 0)
    launch_relayout<false>(problem.input, p.input.data, p.batch, p.channels, p.height, p.width, stream);
  if (forward && output_bytes > 0)
    launch_relayout<false>(problem.output, p.output.data, p.batch, p.filters(), p.out_height, p.out_width, stream);
}

}  // namespace dwconv
