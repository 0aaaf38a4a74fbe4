// What the ways of toeplitz_grad_weight_channels_last.cu to load have in common: how the work is described, and what
// becomes of a block's sums.
#pragma once

#include <algorithm>
#include <cmath>

#include "clusters.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "partial_sums.h"
#include "shares.cuh"
#include "stream.cuh"
#include "toeplitz_grad_weight_channels_last.cuh"
#include "toeplitz_grad_weight_channels_last.h"

namespace dwconv {
namespace {

constexpr int kRun = 8, kTileColumns = 2 * kRun;  // columns
constexpr int kTiles = 8;                         // of a stage
constexpr int kRing = StageBarriers::kBytes;      // where it begins in shared memory

// Where threads copy pixels to in shared memory, these lie apart by an odd number of units, and every 8 of them have a
// gap behind: so 4 pixels of 4 tiles, of which a thread reads 8 bytes each, are spread over all banks, two to each.
constexpr int kPixelBytes = kSlab * 2 + kUnit, kRunBytes = kRun * kPixelBytes + 32;

// The input or the gradient, and the rows of it that a stage takes.
struct Rows {
  const char* base;
  const char* units;  // where its first unit of 16 bytes begins: see Toeplitz::carried
  int64_t image_bytes, row_bytes;
  int64_t turn_bytes;  // from behind the last row of an image's period to the first one of the next image
  int pixel_bytes, width;
  int shift;  // the first pixel of a row of the ring is column -shift of the span
  int runs;   // of a row of the ring

  __host__ __device__ int ring_bytes() const { return runs * kRunBytes; }
};

struct Toeplitz {
  Rows source, grad;
  float* partial;                 // [split][tap, or bias behind the last tap][channel]
  void *grad_weight, *grad_bias;  // where there is no second kernel
  int height, out_height, kernel_h, kernel_w, padding_h, padding_w;
  int images, channels;
  // Arrays without gaps may begin between multiples of 16 bytes, both as far behind one. Then a pixel's first unit
  // begins with so many channels of the pixel before, its last ones. Channels are counted by where they are in units,
  // and these are first. What else is in the first and the last unit of an array is read, and meets nothing.
  int carried;
  int together, groups;      // images side by side, and how many times as many there are
  int slabs, spans, splits;  // of channels, columns, rows
  int columns;               // of a span
  int tile_shift;            // tiles of a row of a span are 1 << tile_shift
  int period;                // rows from a group to the next: those of the input, and zeros between
  int behind;                // rows that windows reach behind a row
  int rows;                  // of all spans of all groups, with the zeros between
  int streams;               // of a block
  Shares shares;             // of the streams of all splits
  int steps;                 // of a block: rows of the longest stream, and what is left of windows behind
  int depth, stage_bytes;    // of the ring
  int ahead;                 // stages that are loaded, or under way
  int grad_at;               // where in a stage the rows of the gradient are
  bool with_bias;
  bool cluster;  // whether the splits of a slab are one
  Divider by_slabs, by_period, by_groups;

  __host__ __device__ int tiles() const { return 1 << tile_shift; }
  // Columns of the gradient. Those of carried channels are counted from 1 on, as pixels behind their own have them.
  __host__ __device__ int counted_columns() const { return grad.width + (carried > 0); }
};

// The channel that is at a place in a pixel's units.
__device__ inline int channel_at(const Toeplitz& a, int place) {
  return place - a.carried + (place < a.carried ? a.channels : 0);
}

// Which of four places from `first` on are of carried channels, as a mask.
__device__ inline uint2 carried_at(const Toeplitz& a, int first) {
  const auto mask = [&](int place) { return place < a.carried ? 0xffffu : 0u; };
  return {mask(first) | mask(first + 1) << 16, mask(first + 2) | mask(first + 3) << 16};
}

// Makes zeros of all of a pixel but what is of its `own` row.
__device__ inline void keep_own(uint2& pixel, uint2 own) {
  pixel.x &= own.x, pixel.y &= own.y;
}

// Begins to copy 16 bytes, or writes zeros, if there is `any` to be there.
__device__ inline void copy_or_clear_if(bool any, uint32_t to, const char* from, uint32_t copy) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n.reg .pred any, clear;\nsetp.ne.s32 any, %3, 0;\nsetp.eq.s32 clear, %2, 0;\n"
      "@any cp.async.cg.shared.global.L2::128B [%0], [%1], 16, clear;\n}" ::"r"(to),
      "l"(from), "r"(copy), "r"(static_cast<int>(any))
      : "memory");
#endif
}

// Sums of a block in shared memory: [tap, or bias behind the last tap][channel], and behind them one for each warp.
template <class B = Usual>
__host__ __device__ constexpr int block_sums(int taps) {
  return (taps + 1) * B::kSlab;
}

// The sum of one tap, or of the bias behind the last one, over a split, of what is inside the image only: a thread's
// part.
template <typename T, class B>
__device__ float sum_by_products(const Toeplitz& a, int split, int channel, int slot) {
  const bool is_bias = slot == a.kernel_h * a.kernel_w;
  const int i = is_bias ? 0 : slot / a.kernel_w - a.padding_h, j = is_bias ? 0 : slot % a.kernel_w - a.padding_w;
  const int last = min(a.shares.begin((split + 1) * a.streams), a.rows);
  float sum = 0;
  for (int at = a.shares.begin(split * a.streams) + threadIdx.x / 32; at < last; at += B::kWarps) {
    const int row = at % a.period, first = at / a.period % a.groups * a.together;
    // Where columns of carried channels are counted from 1 on, a span has the one before its first.
    const int column = at / a.period / a.groups * a.columns - (channel >= a.channels - a.carried), y = row + i;
    if (row >= a.out_height || (!is_bias && (y < 0 || y >= a.height))) continue;
    const int end = min(column + a.columns, a.grad.width);
    for (int image = first; image < min(first + a.together, a.images); ++image) {
      const char* g = a.grad.base + image * a.grad.image_bytes + row * a.grad.row_bytes + channel * sizeof(T);
      const char* x = a.source.base + image * a.source.image_bytes + y * a.source.row_bytes + channel * sizeof(T);
      for (int v = max(column, 0) + threadIdx.x % 32; v < end; v += 32) {
        const float gradient = widen(*reinterpret_cast<const T*>(g + int64_t{v} * a.grad.pixel_bytes));
        if (is_bias)
          sum += gradient;
        else if (v + j >= 0 && v + j < a.source.width)
          sum = fmaf(widen(*reinterpret_cast<const T*>(x + int64_t{v + j} * a.source.pixel_bytes)), gradient, sum);
      }
    }
  }
  return sum;
}

// The same by all threads of a block; the first one has it.
template <typename T, class B>
__device__ float block_sum_by_products(const Toeplitz& a, int split, int channel, int slot) {
  const int scratch = kRing + block_sums<B>(a.kernel_h * a.kernel_w) * 4;
  float sum = sum_by_products<T, B>(a, split, channel, slot);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) shared<float>(scratch + threadIdx.x / 32 * 4) = sum;
  __syncthreads();
  for (int warp = 1; warp < B::kWarps; ++warp) sum += shared<float>(scratch + warp * 4);
  __syncthreads();
  return sum;
}

// Takes those of the block's sums again that are not finite.
template <typename T, class B>
__device__ __noinline__ void sum_again(const Toeplitz& a, int slab, int split, float* partial) {
  const int taps = a.kernel_h * a.kernel_w;
  for (int at = 0; at < (taps + a.with_bias) * B::kSlab; ++at) {
    const int slot = at / B::kSlab, place = slab * B::kSlab + at % B::kSlab, channel = channel_at(a, place);
    if (is_finite(shared<float>(kRing + 4 * at)) || place >= a.channels) continue;
    const float sum = block_sum_by_products<T, B>(a, split, channel, slot);
    if (threadIdx.x == 0) partial[static_cast<int64_t>(slot) * a.channels + channel] = sum;
  }
}

// Adds up what the 4 threads of a row have for 4 channels; each returns the sum of channel `place`.
__device__ inline float add_up(const float (&part)[kQuad], int place) {
  const bool odd = place % 2 != 0, high = place / 2 != 0;
  float half[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float kept = odd ? part[2 * h + 1] : part[2 * h], sent = odd ? part[2 * h] : part[2 * h + 1];
    half[h] = kept + __shfl_xor_sync(~0u, sent, 1);
  }
  return (high ? half[1] : half[0]) + __shfl_xor_sync(~0u, high ? half[0] : half[1], 2);
}

__device__ inline float& sum_at(int number) {
  return shared<float>(kRing + 4 * number);
}

// Where in a block's slab the channels of a warp begin, or those of one of its quads.
template <class B>
__device__ int first_channel(int quad = 0) {
  return (static_cast<int>(threadIdx.x) / 32 * B::kQuads + quad) * kQuad;
}

// Takes the sums of the bias to the others in shared memory: channel c's are in row c.
template <class B = Usual>
__device__ void store_bias(const Toeplitz& a, const float (&bias)[4], int quad = 0) {
  const int lane = threadIdx.x % 32;
  float total = bias[0] + bias[1];
  for (const int offset : {1, 2}) total += __shfl_xor_sync(~0u, total, offset);
  if (lane % 4 == 0 && lane < 4 * kQuad)
    sum_at(a.kernel_h * a.kernel_w * B::kSlab + first_channel<B>(quad) + lane / 4) = total;
}

// Stores a block's sums, which are in shared memory.
template <typename T, class B = Usual>
__device__ void store_sums(const Toeplitz& a, int slab, int split) {
  __syncthreads();
  const int slots = a.kernel_h * a.kernel_w + a.with_bias;
  float* partial = a.partial + static_cast<int64_t>(split) * slots * a.channels;
  bool again = false;
  for (int i = threadIdx.x; i < slots * B::kSlab; i += B::kThreads) {
    const int slot = i / B::kSlab, place = slab * B::kSlab + i % B::kSlab;
    if (place >= a.channels) continue;
    const float total = sum_at(i);
    partial[static_cast<int64_t>(slot) * a.channels + channel_at(a, place)] = total;
    again |= !is_finite(total);
  }
  if (__syncthreads_or(again)) sum_again<T, B>(a, slab, split, partial);
}

// Adds up the sums of all splits, which are the blocks of a cluster: each does a part of it.
template <typename T, class B>
__device__ void add_up_splits(const Toeplitz& a, int slab, int split) {
  const int taps = a.kernel_h * a.kernel_w, count = (taps + a.with_bias) * B::kSlab;
  const auto add = [&](int number) {
    float values[kPortableCluster], total = 0;
#pragma unroll
    for (int block = 0; block < kPortableCluster; ++block)  // the last one again: no branch between the loads
      values[block] = read_in_cluster(min(block, a.splits - 1), kRing + 4 * number);
#pragma unroll
    for (int block = 0; block < kPortableCluster; ++block) total += block < a.splits ? values[block] : 0;
    return total;
  };
  const auto store = [&](int number, float total) {
    const int tap = number / B::kSlab;
    const int64_t channel = channel_at(a, slab * B::kSlab + number % B::kSlab);
    if (tap < taps)
      static_cast<T*>(a.grad_weight)[channel * taps + tap] = narrow<T>(total);
    else
      static_cast<T*>(a.grad_bias)[channel] = narrow<T>(total);
  };
  meet_in_cluster();
  bool again = false;
  for (int i = split * B::kThreads + threadIdx.x; i < count; i += a.splits * B::kThreads) {
    if (slab * B::kSlab + i % B::kSlab >= a.channels) continue;
    const float total = add(i);
    store(i, total);
    again |= !is_finite(total);
  }
  if (__syncthreads_or(again))
    for (int i = 0; i < count; ++i) {
      const int place = slab * B::kSlab + i % B::kSlab, channel = channel_at(a, place);
      if (i / B::kThreads % a.splits != split || place >= a.channels || is_finite(add(i))) continue;
      float total = 0;
      for (int block = 0; block < a.splits; ++block)
        total += block_sum_by_products<T, B>(a, block, channel, i / B::kSlab);
      if (threadIdx.x == 0) store(i, total);
    }
  meet_in_cluster();  // others read what is here
}

// Takes the sums of a row of the kernel by columns of a tile to shared memory. Those for column j of the kernel are on
// the diagonal m - n = j.
template <class B = Usual, int kRows>
__device__ void store_diagonals(const Toeplitz& a, const float (&sum)[kQuad][kRows][4]) {
  const int lane = threadIdx.x % 32, row = lane / 4, place = lane % 4, first = first_channel<B>() + place;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float diagonal[kQuad];  // of column `row` of the kernel: the thread's part, of two columns n
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      diagonal[c] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // the thread has row m = row + n, or m - 8, of column n for another one
        const int n = 2 * place + e;
        const float sent = row >= n ? sum[c][i][e] : sum[c][i][2 + e];
        diagonal[c] += __shfl_sync(~0u, sent, (row + n) % kRun * 4 + place);
      }
    }
    const float total = add_up(diagonal, place);
    if (row < a.kernel_w && i < a.kernel_h) sum_at((i * a.kernel_w + row) * B::kSlab + first) = total;
    if (a.kernel_w > kRun) {  // one more, m = n + 8
#pragma unroll
      for (int c = 0; c < kQuad; ++c) diagonal[c] = row / 2 != place ? 0 : row % 2 ? sum[c][i][3] : sum[c][i][2];
      float last = add_up(diagonal, place);
      for (int offset = 4; offset < 32; offset *= 2) last += __shfl_xor_sync(~0u, last, offset);
      if (row == 0 && i < a.kernel_h) sum_at((i * a.kernel_w + kRun) * B::kSlab + first) = last;
    }
  }
}

// How many channels a pixel's first unit carries; none also where that is not what keeps pixels from whole units.
inline int64_t carried_channels(const Problem& p) {
  const auto behind = [](const View& view) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data)) % kUnit;
  };
  const auto is_dense = [&](const View& view, int64_t height, int64_t width) {
    const int64_t row = width * p.channels;
    return view.stride[3] == p.channels && view.stride[2] == row && view.stride[0] == height * row;
  };
  const bool alike = behind(p.input) == behind(p.output) && behind(p.input) % 2 == 0 && p.channels * 2 % kUnit == 0;
  if (p.padding_w >= kRun) return 0;
  return alike && is_dense(p.input, p.height, p.width) && is_dense(p.output, p.out_height, p.out_width)
             ? behind(p.input) / 2
             : 0;
}

// How a problem is described, but for how its work is cut. `bytes`: a multiple of what can be copied at once.
inline Toeplitz toeplitz_of(const Problem& p, int64_t& bytes) {
  Toeplitz a{};
  bytes = 2 * p.channels, a.carried = static_cast<int>(carried_channels(p));
  const auto arrange = [&](const View& view, int64_t height, int64_t width, int64_t shift, Rows& v) {
    v.base = static_cast<const char*>(view.data), v.units = v.base - 2 * a.carried;
    v.image_bytes = p.batch == 1 ? 0 : 2 * view.stride[0], v.row_bytes = height == 1 ? 0 : 2 * view.stride[2];
    v.pixel_bytes = static_cast<int>(width == 1 ? 0 : 2 * view.stride[3]);
    v.width = static_cast<int>(width), v.shift = static_cast<int>(shift);
    bytes |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.units)) | v.image_bytes | v.row_bytes | v.pixel_bytes;
  };
  arrange(p.input, p.height, p.width, p.padding_w, a.source);
  arrange(p.output, p.out_height, p.out_width, 0, a.grad);
  a.height = static_cast<int>(p.height), a.out_height = static_cast<int>(p.out_height);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.together = 1, a.groups = a.images;
  a.period = a.height + a.padding_h, a.behind = a.kernel_h - 1;
  for (Rows* rows : {&a.source, &a.grad}) rows->turn_bytes = rows->image_bytes - a.period * rows->row_bytes;
  a.slabs = static_cast<int>(ceil_div(a.channels, kSlab));
  a.by_slabs = Divider(a.slabs), a.by_period = Divider(a.period), a.by_groups = Divider(a.groups);
  a.with_bias = p.bias != nullptr, a.grad_weight = p.weight.data, a.grad_bias = p.bias;
  return a;
}

// Describes boxes of a slab's channels, of so many columns, rows and images, and returns whether there can be any.
// Within their 64 or 128 bytes of a pixel, units are exchanged by the 128 bytes that they are in.
template <class B = Usual>
bool describe_slabs(CUtensorMap& map, const Rows& v, const View& view, const Problem& p, int64_t height,
                    const std::array<int, 3>& box) {
  return has_boxes(view, 2, kUnit) &&
         describe_boxes(map, const_cast<char*>(v.units), 2, {p.channels, v.width, height, p.batch},
                        {view.stride[3] * 2, view.stride[2] * 2, view.stride[0] * 2},
                        {B::kSlab, box[0], box[1], box[2]},
                        B::kPixel == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

// Describes the units behind all rows, or all images, of which there are carried channels alone: those of the input,
// and those of the gradient.
inline bool describe_carried(std::array<CUtensorMap, 2>& maps, const Toeplitz& a, const Problem& p, bool of_rows,
                             int images) {
  const auto describe = [&](CUtensorMap& map, const Rows& v, const View& view, int64_t height) {
    const int64_t row = 2 * view.stride[2];
    return describe_boxes(map, const_cast<char*>(v.units) + (of_rows ? row : height * row), 2,
                          {a.carried, 1, of_rows ? height : 1, p.batch}, {row, row, 2 * view.stride[0]},
                          {kUnit / 2, 1, 1, images});
  };
  return describe(maps[0], a.source, p.input, p.height) && describe(maps[1], a.grad, p.output, p.out_height);
}

// Memory for the sums of all splits.
inline float* allocate_partial(const Toeplitz& a, const Allocate& allocate) {
  const int64_t slots = int64_t{a.kernel_h} * a.kernel_w + a.with_bias;
  return static_cast<float*>(allocate(a.splits * slots * a.channels * static_cast<int64_t>(sizeof(float))));
}

// How many splits of so many rows: by estimated steps, of which only comparisons matter, and some for what a block does
// before and behind. `slots`: blocks that run at once.
inline int splits_of(const Toeplitz& a, int64_t rows, int64_t slots) {
  constexpr int64_t kLongest = 1 << 10;  // steps, of 16 products each: longer sums lose digits
  constexpr int kMostWaves = 4;
  double least = INFINITY;
  int best = 1;
  for (int waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t splits = std::clamp<int64_t>(slots * waves / a.slabs, ceil_div(rows, kLongest), rows);
    const int64_t steps = ceil_div(rows, splits) + a.behind;
    const double cost = static_cast<double>(ceil_div(a.slabs * splits, slots)) * static_cast<double>(steps + 12);
    if (cost < least * 0.97) least = cost, best = static_cast<int>(splits);
  }
  return best;
}

}  // namespace
}  // namespace dwconv
