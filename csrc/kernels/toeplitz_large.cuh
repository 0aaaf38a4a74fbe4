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
// Tall kernels go across: rows of the problem are columns in memory. A warp exchanges 8 x 8 of the source on their way
// to shared memory, and of the target on their way back.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common.cuh"
#include "copies.cuh"
#include "device.h"
#include "mapping.h"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "toeplitz_large.h"

namespace dwconv {

constexpr int kMaxLargeThreads = 256;
constexpr int kLargeGroup = 8, kLargeGroupBytes = 16;  // columns of a group

// How the threads of a block go through the pieces of rows of images: each stays at its place in an image, or at a few
// of them, so that an addition leads to the next image.
struct LargeWalk {
  Divider places, side;  // pieces of an image, and of a row
  int at_once = 1;       // images
  int step_shared = 0;   // bytes from one visit to the next
  int64_t step_global = 0;

  LargeWalk() = default;
  LargeWalk(int64_t pieces, int64_t rows, int threads, int64_t image, int64_t plane)
      : places(pieces * rows), side(pieces), at_once(std::max(threads / static_cast<int>(pieces * rows), 1)) {
    step_shared = static_cast<int>(at_once * plane), step_global = 2 * at_once * image;
  }
};

template <int kBytes>
using LargeWord =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// A problem, and how it is cut.
struct Large {
  const void *source, *weight, *bias;
  void* target;
  // Strides in elements; those of rows are of rows in memory.
  int64_t source_image, source_channel, source_row, target_image, target_channel, target_row;
  int64_t weight_filter, weight_row, weight_column, bias_stride;
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w;
  int stride, targets;
  int columns;  // of the source's width, its own

  int first, depth;                              // the band matrices: `depth` of them from d = `first` on
  int first_tap;                                 // column of the kernel at the beginning of a row of weights
  int images, rows, tiles, rows_log;             // of a block; of a warp
  int source_rows, source_pitch, source_plane;   // as they lie in shared memory, in bytes
  int out_plane, out_pitch, weight_pitch, copy;  // likewise
  int tasks, weight_lanes;
  int tasks_at, weights_at, source_at, out_at;         // offsets in shared memory
  int load_unit, store_unit;                           // bytes that are copied at once
  bool pairs;                                          // whether outputs can be written in pairs
  bool joined;                                         // whether a band of a target plane has no gaps
  bool across;                                         // whether rows are columns in memory
  Divider by_images, by_fan_out, by_bands, by_ranges;  // tasks
  Divider by_weight_side;                              // threads side by side in a row of weights
  LargeWalk load, store;
  Divider by_image_tiles, by_column_tiles;  // tiles of warps
  int bands, ranges, row_tiles, column_tiles, image_tiles;
};

// `across`: rows of the problem are columns in memory.
inline Large arguments_of(const LargeProblem& p, bool across = false) {
  const Mapping map(p);
  Large a{};
  a.source = map.source.data, a.weight = map.weight.data, a.bias = map.bias, a.target = map.target.data;
  a.across = across;
  const int row = across ? 3 : 2;
  a.source_image = map.source.stride[0], a.source_channel = map.source.stride[1], a.source_row = map.source.stride[row];
  a.target_image = map.target.stride[0], a.target_channel = map.target.stride[1], a.target_row = map.target.stride[row];
  a.weight_filter = map.weight.stride[0], a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.bias_stride = map.bias_stride;
  a.batch = static_cast<int>(p.batch), a.targets = map.targets;
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.stride = static_cast<int>(p.stride_h), a.columns = static_cast<int>(p.columns);
  a.by_fan_out = Divider(map.fan_out);
  return a;
}

// What a block does between two barriers.
struct alignas(16) LargeTask {
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

// Calls visit(piece, row, image) for each place of a thread, or of a warp, with the first of its images.
template <typename Visit>
__device__ void walk(const LargeWalk& w, uint32_t number, int step, int pieces, int rows, Visit&& visit) {
  uint32_t image = number;
  uint32_t place = w.places.split(image);
  if (static_cast<int>(image) >= w.at_once) return;
#pragma unroll 1
  for (; place < w.places.divisor; place += step) {
    uint32_t row = place;
    const int piece = w.side.split(row);
    if (piece < pieces && static_cast<int>(row) < rows) visit(piece, static_cast<int>(row), static_cast<int>(image));
  }
}

// Calls visit(count) with a constant count for images `step` apart: for 4 at a time, then for one at a time.
template <typename Visit>
__device__ void visit_images(int image, int step, int images, Visit&& visit) {
#pragma unroll 1
  for (; image + 3 * step < images; image += 4 * step) visit(std::integral_constant<int, 4>{});
#pragma unroll 1
  for (; image < images; image += step) visit(std::integral_constant<int, 1>{});
}

template <typename T, int kBytes>
__device__ void load_rows(const Large& a, const LargeTask& t) {
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
  using Word = LargeWord<kBytes>;
  const int pieces = t.groups * (kLargeGroupBytes / kBytes);
  walk(a.load, threadIdx.x, blockDim.x, pieces, t.source_rows, [&](int piece, int row, int image) {
    auto from = reinterpret_cast<const char*>(source + image * a.source_image + row * a.source_row) + piece * kBytes;
    int to = a.source_at + image * a.source_plane + row * a.source_pitch + piece * kBytes;
    const bool inside = piece * (kBytes / 2) < width;  // zeros behind the image
    if (kAsync && inside) {
      uint32_t address = shared_address(to);
      visit_images(image, a.load.at_once, t.images, [&](auto count) {
#pragma unroll
        for (int k = 0; k < count; ++k, from += a.load.step_global, address += a.load.step_shared)
          copy_unit<kBytes>(address, from);
      });
    } else {
      visit_images(image, a.load.at_once, t.images, [&](auto count) {
        Word words[count];
#pragma unroll
        for (int k = 0; k < count; ++k, from += a.load.step_global)
          words[k] = inside ? __ldg(reinterpret_cast<const Word*>(from)) : Word{};
#pragma unroll
        for (int k = 0; k < count; ++k, to += a.load.step_shared) shared<Word>(to) = words[k];
      });
    }
  });
}

// A lane has two neighbours of a row of an 8 x 8 matrix, then two of a column.
__device__ inline uint32_t exchange_matrix(uint32_t rows) {
  uint32_t columns = 0;
#if __CUDA_ARCH__ >= 750
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
#endif
  return columns;
}

// The same across: a warp takes 8 rows in memory, which are a group of columns, of kBytes / 2 matrices of 8 columns. A
// lane has kBytes of a row; what it has of one matrix is not side by side then, which matters to where it is written.
template <typename T, int kBytes>
__device__ void load_across(const Large& a, const LargeTask& t) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel +
                    t.group * kLargeGroup * a.source_row + t.source_row;
  constexpr int kWords = std::max(kBytes / 4, 1);
  const int lane = threadIdx.x % 32, quad = lane / 4, width = a.width - t.group * kLargeGroup;
  const int pieces = (t.source_rows + 8 * kWords - 1) / (8 * kWords);
  walk(a.load, threadIdx.x / 32, blockDim.x / 32, pieces, t.groups, [&](int piece, int group, int image) {
    const int x = group * kLargeGroup + quad, y = (piece * 4 + lane % 4) * 2 * kWords;
    auto from = reinterpret_cast<const char*>(source + image * a.source_image + x * a.source_row + y);
    const bool inside = x < width && y < t.source_rows;
    // Of the matrix of the first words: two rows of each lane's 2 * kWords.
    const int row = piece * 8 * kWords + quad / 2 * 2 * kWords + quad % 2;
    int to = a.source_at + image * a.source_plane + row * a.source_pitch + group * kLargeGroupBytes + lane % 4 * 4;
    visit_images(image, a.load.at_once, t.images, [&](auto count) {
      uint32_t words[count][kWords];
#pragma unroll
      for (int k = 0; k < count; ++k, from += a.load.step_global) {
        if constexpr (kBytes == 8) {
          const uint2 both = inside ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{};
          words[k][0] = both.x, words[k][1] = both.y;
        } else {
          const auto* half = reinterpret_cast<const unsigned short*>(from);
          words[k][0] = inside ? __ldg(half) : 0;
          if (inside && y + 1 < t.source_rows) words[k][0] |= static_cast<uint32_t>(__ldg(half + 1)) << 16;
        }
      }
#pragma unroll
      for (int k = 0; k < count; ++k, to += a.load.step_shared)
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const uint32_t columns = exchange_matrix(words[k][w]);
          if (row + 2 * w < t.source_rows) shared<uint32_t>(to + 2 * w * a.source_pitch) = columns;
        }
    });
  });
}

template <typename T, bool kAcross>
__device__ void load_source(const Large& a, const LargeTask& t) {
  if constexpr (kAcross) {
    if (a.load_unit == 8)
      load_across<T, 8>(a, t);
    else
      load_across<T, 2>(a, t);
  } else {
    switch (a.load_unit) {
      case 16: load_rows<T, 16>(a, t); break;
      case 8: load_rows<T, 8>(a, t); break;
      case 4: load_rows<T, 4>(a, t); break;
      default: load_rows<T, 2>(a, t); break;
    }
  }
}

// The weights of a filter on their way to where zeros surround them. A thread stays with a column of the kernel, and
// has kBatch loads under way.
template <typename T, int kBatch = 4>
class LargeWeights {
 public:
  // Begins to load them, by threads as they are side by side in `lanes` rows.
  __device__ void begin(const Large& a, int filter, int thread, int lanes) {
    uint32_t row = thread;
    tap_ = a.by_weight_side.split(row), row_ = static_cast<int>(row), lanes_ = lanes;
    from_ = static_cast<const T*>(a.weight) + filter * a.weight_filter;
    if (row_ < lanes_) load(a, tap_, row_);
  }
  __device__ void begin(const Large& a, int filter, int thread) { begin(a, filter, thread, a.weight_lanes); }

  __device__ void write(const Large& a, int weights_at) {
    const int step = lanes_;
    if (row_ >= step) return;
    for (int tap = tap_; tap < a.kernel_w; tap += a.by_weight_side.divisor) {
      const int column = tap - a.first_tap;
      if (column < 0 || 2 * column >= a.weight_pitch) continue;  // it only ever meets what is outside of the image
      for (int row = row_; row < a.kernel_h; row += kBatch * step) {
        if (tap != tap_ || row != row_) load(a, tap, row);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (row + k * step >= a.kernel_h) continue;
          const int to = weights_at + (row + k * step) * a.weight_pitch + 2 * column;
          shared<T>(to) = values_[k];
          if (column > 0) shared<T>(to + a.copy - 2) = values_[k];
        }
      }
    }
  }

 private:
  T values_[kBatch];
  const T* from_;
  int tap_, row_, lanes_;

  __device__ void load(const Large& a, int tap, int row) {
    const T* from = from_ + tap * a.weight_column + row * a.weight_row;
#pragma unroll
    for (int k = 0; k < kBatch; ++k, from += lanes_ * a.weight_row)
      if (row + k * lanes_ < a.kernel_h) values_[k] = __ldg(from);
  }
};

// What a block asks for in L2 while the kernel before still runs, which is no harm: nothing is read yet. These are the
// planes of its first tasks, and the first filter.
struct EarlyPlanes {
  int tasks;      // 0 where rows have gaps
  Divider lines;  // of 128 bytes, of a plane
};

inline EarlyPlanes early_planes_of(const Large& a, int64_t tasks) {
  return {a.source_row == a.width ? static_cast<int>(tasks) : 0,
          Divider(ceil_div(2 * int64_t{a.height} * a.width, 128))};
}

template <typename T>
__device__ void ask_for_planes(const Large& a, const EarlyPlanes& early, int first, int count, int images) {
  const auto ask = [](const T* place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); };
  const int end = min(early.tasks, count) * images * static_cast<int>(early.lines.divisor);
#pragma unroll 1
  for (int i = threadIdx.x; i < end; i += blockDim.x) {
    uint32_t number = i;
    const int line = early.lines.split(number);
    int image = static_cast<int>(number) % images;
    number = first + number / images;
    image += a.by_images.split(number) * images;
    a.by_fan_out.split(number);
    if (image < a.batch)
      ask(static_cast<const T*>(a.source) + image * a.source_image + number * a.source_channel + 64 * line);
  }
  uint32_t filter = first;
  a.by_images.split(filter);
  if (early.tasks > 0 && static_cast<int>(threadIdx.x) < a.kernel_h)
    ask(static_cast<const T*>(a.weight) + filter * a.weight_filter + threadIdx.x * a.weight_row);
}

// Launches a kernel whose blocks have `each` of the tasks, and one more for the first `more`.
template <typename Arguments>
void launch_shares(void (*kernel)(Arguments), Arguments& a, int64_t tasks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const char* name) {
  const int64_t blocks = std::min<int64_t>(tasks, current_device().multiprocessors);
  a.each = static_cast<int>(tasks / blocks), a.more = static_cast<int>(tasks % blocks);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = shared_bytes});
  check_launch(name);
}

// An output by its definition, only from taps inside the image.
template <typename T>
__device__ __noinline__ float sum_of_taps(const Large& a, int target, int image, int row, int column, int stride,
                                          bool across) {
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
      if (x >= 0 && x < a.columns)
        sum = fmaf(widen(source[across ? x * a.source_row + y : y * a.source_row + x]),
                   widen(weight[i * a.weight_row + j * a.weight_column]), sum);
    }
  }
  return sum;
}

template <typename T, int kBytes, bool kAcross>
__device__ void store_rows(const Large& a, const LargeTask t) {
  using Word = LargeWord<kBytes>;
  const int columns = kAcross ? t.rows : t.columns, rows = kAcross ? t.columns : t.rows;  // in memory
  const int first_row = kAcross ? t.tile * kLargeGroup : t.row, first_column = kAcross ? t.row : t.tile * kLargeGroup;
  T* target = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel +
              first_row * a.target_row + first_column;
  const int pieces = (a.joined ? rows * columns : columns) * 2 / kBytes;
  walk(a.store, threadIdx.x, blockDim.x, pieces, a.joined ? 1 : rows, [&](int piece, int row, int image) {
    auto to = reinterpret_cast<char*>(target + image * a.target_image + row * a.target_row) + piece * kBytes;
    int from = a.out_at + image * a.out_plane + row * a.out_pitch + piece * kBytes;
    visit_images(image, a.store.at_once, t.images, [&](auto count) {
      Word words[count];
#pragma unroll
      for (int k = 0; k < count; ++k, from += a.store.step_shared) words[k] = shared<Word>(from);
#pragma unroll
      for (int k = 0; k < count; ++k, to += a.store.step_global) *reinterpret_cast<Word*>(to) = words[k];
    });
  });
}

template <typename T, bool kAcross>
__device__ void store_target(const Large& a, const LargeTask& t) {
  switch (a.store_unit) {
    case 16: return store_rows<T, 16, kAcross>(a, t);
    case 8: return store_rows<T, 8, kAcross>(a, t);
    case 4: return store_rows<T, 4, kAcross>(a, t);
    default: return store_rows<T, 2, kAcross>(a, t);
  }
}

template <typename T, int kStride, int kTiles, int kDepth, int kBlocksM, bool kAcross>
__device__ void compute(const Large& a, const LargeTask& task, float bias) {
  constexpr int kGroups = (kTiles - 1) * kStride + kDepth;  // of the source that a warp's tiles meet
  const int units = a.image_tiles * a.column_tiles * a.row_tiles;
  const int tile_rows = 1 << a.rows_log, tile_images = 16 * kBlocksM >> a.rows_log;
  // Rows in the middle, which meet the most rows of the kernel, come first.
#pragma unroll 1
  for (int unit = threadIdx.x / 32; unit < units; unit += blockDim.x / 32) {
    const LargeTask t = task;
    uint32_t rest = unit;
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));  // or else the compiler keeps what follows from it
    const int quad = lane / 4, pair = lane % 4 * 2;
    const int entry = pair - quad * kStride + 7 * kStride;  // of the lane's first pair in a row of weights
    const int weights = a.weights_at + (entry & 1) * a.copy + 2 * (entry & ~1);
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
        if (n >= t.images) y[m] = -(1 << 30);
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

    // Sums go to shared memory, from where they are stored as they lie side by side. There is room for those of rows
    // and images that are not there, too. Across, a word has two rows, of which there is an even number.
    const auto none = narrow_pair(0.f, 0.f, T{});
    Pair<T> zero[] = {none, none};
    const int first_slot = kAcross ? pair : quad, first_column = tile * kLargeGroup + (kAcross ? quad : pair);
    const int columns = t.columns - first_column, tile_step = kLargeGroup * (kAcross ? a.out_pitch : 2);
    const auto stage = [&](auto pairs) {
#pragma unroll
      for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int slot = 16 * m + 8 * h + first_slot, n = image + (slot >> a.rows_log);
          const int r = row + (slot & (tile_rows - 1));
          const int to = a.out_at + n * a.out_plane +
                         (kAcross ? first_column * a.out_pitch + 2 * r : r * a.out_pitch + 2 * first_column);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            auto values = narrow_pair(sum[m][j][2 * h], sum[m][j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
            zero[h] = __hfma2(values, none, zero[h]);
#endif
            if constexpr (kAcross) {
              auto& word = reinterpret_cast<uint32_t&>(values);
              word = exchange_matrix(word);
            }
            if (pairs) {
              if (j * kLargeGroup < columns) shared<Pair<T>>(to + j * tile_step) = values;
            } else {
              if (j * kLargeGroup < columns) shared<T>(to + j * tile_step) = values.x;
              if (j * kLargeGroup + 1 < columns) shared<T>(to + j * tile_step + 2) = values.y;
            }
          }
        }
    };
    if (kAcross || a.pairs)
      stage(std::true_type{});
    else
      stage(std::false_type{});
    if constexpr (kAcross) __syncwarp();
    zero[0] = __hadd2(zero[0], zero[1]);
    if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
      for (int v = 0; v < kBlocksM * 2 * kTiles * 2; ++v) {
        const int slot = v / (2 * kTiles) * 8 + quad, r = row + (slot & (tile_rows - 1)),
                  n = image + (slot >> a.rows_log);
        const int column = (tile + v / 2 % kTiles) * kLargeGroup + pair + v % 2;
        if (r >= t.rows || n >= t.images || column >= t.columns) continue;
        T& to =
            shared<T>(a.out_at + n * a.out_plane + (kAcross ? column : r) * a.out_pitch + 2 * (kAcross ? r : column));
        if (is_finite(widen(to))) continue;
        to = narrow<T>(
            sum_of_taps<T>(a, t.target, t.image + n, t.row + r, t.tile * kLargeGroup + column, kStride, kAcross));
      }
    }
  }
}

// A block takes a run of tasks, which share a filter most of the time. While it stores the targets of one, the sources
// of the next arrive; the blocks beside it compute. What the next one is a thread works out for all.
template <typename T, int kStride, int kTiles, int kDepth, int kBlocksM, bool kAcross>
__global__ void __launch_bounds__(kMaxLargeThreads, 2) toeplitz_large(const __grid_constant__ Large a) {
  int number = static_cast<int>(static_cast<int64_t>(a.tasks) * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(static_cast<int64_t>(a.tasks) * (blockIdx.x + 1) / gridDim.x);
  const auto task = [&](int slot) -> LargeTask& {
    return shared<LargeTask>(a.tasks_at + slot % 2 * static_cast<int>(sizeof(LargeTask)));
  };
  let_next_kernel_start();
  for (int i = 4 * threadIdx.x; i < a.source_at; i += 4 * blockDim.x) shared<uint32_t>(i) = 0;
  wait_for_kernel_before();
  __syncthreads();
  if (threadIdx.x == 0) task(0) = task_of(a, number, kStride);
  float bias = 0;
  for (int slot = 0, filter = -1;; ++number, ++slot) {
    __syncthreads();
    LargeWeights<T> weights;
    bool changes = false;
    if (number < last) {
      const LargeTask t = task(slot);
      load_source<T, kAcross>(a, t);
      changes = t.target != filter;
      filter = t.target;
      if (changes) {
        weights.begin(a, filter, threadIdx.x);
        bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
      }
    }
    if (slot > 0) store_target<T, kAcross>(a, task(slot + 1));
    if (number == last) break;
    if (changes) weights.write(a, a.weights_at);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    if (threadIdx.x == 0 && number + 1 < last) task(slot + 1) = task_of(a, number + 1, kStride);
    compute<T, kStride, kTiles, kDepth, kBlocksM, kAcross>(a, task(slot), bias);
  }
}

}  // namespace dwconv
