// grad_weight (and the bias gradient) of small kernels at stride 1 in 16 bits on channels_last arrays, on tensor cores.
//
// For a channel and row i of the kernel, with columns of the input down and columns of the gradient across, a product
// A[m][k] B[k][n] sums input[y + i][x + m] gradient[y][x + n] over 16 places k, each an image, a row y and 8 columns
// from x on; the sums for column j of the kernel are on the diagonal m - n = j. No transposition is needed: a thread
// reads 4 channels of a pixel at once, and a byte permutation of the pixels of two places makes a pair (k, k + 1) of
// each channel. Two tiles of 16 columns are such a pair, and a multiplication takes 8 tiles: of one row, or of rows of
// several images. Narrow images have 8 columns of a tile each.
//
// Rows march through a ring in shared memory: a stage takes one row of the input and one of the gradient for each of a
// block's streams, which are at different places of the images. The rows of the gradient whose windows are under way
// stay in registers. A stream goes down one image after the other, with rows of zeros between them that serve as the
// padding of both, so that nothing has to ask where it is when it multiplies; the rows of all images are cut into
// streams anywhere. All warps load and multiply. They wait for each other at the stages' barriers, a step or two late,
// so that one can multiply while another reads. The sums of all blocks are added up by a second kernel. Every sum has a
// fixed order, the same on every run.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <algorithm>
#include <cmath>

#include "clusters.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "partial_sums.h"
#include "shares.cuh"
#include "stream.cuh"
#include "toeplitz_grad_weight_channels_last.cuh"

namespace dwconv {
namespace {

constexpr int kUnits = kSlab * 2 / kUnit;         // of 16 bytes, of a block's channels of a pixel
constexpr int kRun = 8, kTileColumns = 2 * kRun;  // columns
constexpr int kTiles = 8;                         // of a stage
constexpr int kRing = StageBarriers::kBytes;      // where it begins in shared memory

// In shared memory, pixels lie apart by an odd number of units, and every 8 of them have a gap behind: so 4 pixels of 4
// tiles, of which a thread reads 8 bytes each, are spread over all banks, two to each.
constexpr int kPixelBytes = kSlab * 2 + kUnit, kRunBytes = kRun * kPixelBytes + 32;

__host__ __device__ constexpr int place_of(int pixel) {
  return pixel * kPixelBytes + pixel / kRun * (kRunBytes - kRun * kPixelBytes);
}

// What a kernel is compiled for: rows of the kernel, or more; whether both halves of a tile are of one row, or of
// different streams; bytes that are copied at once; blocks on a multiprocessor, as registers allow.
template <int rows, bool wide, int bytes, int blocks>
struct Size {
  static constexpr int kRows = rows, kBytes = bytes, kBlocks = blocks;
  static constexpr bool kWide = wide;
};

// The input or the gradient, and the rows of it that a stage takes.
struct Rows {
  const char* base;
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
  int slabs, spans, splits;  // of channels, columns, rows
  int columns;               // of a span
  int group_shift;           // tiles of a row of a span are 1 << group_shift
  int period;                // rows from an image to the next: those of the input, and zeros between
  int rows;                  // of all spans of all images, with the zeros between
  int streams;               // of a block
  Shares shares;             // of the streams of all splits
  int steps;                 // of a block: rows of the longest stream, and what is left of windows behind
  int depth, stage_bytes;    // of the ring
  int ahead;                 // stages that are loaded, or under way
  int grad_at;               // where in a stage the rows of the gradient are
  bool with_bias;
  bool cluster;  // whether the splits of a slab are one
  Divider by_slabs, by_period, by_images;

  __device__ int groups() const { return 1 << group_shift; }
};

// Begins to copy bytes, or writes zeros.
template <int kBytes>
__device__ void copy_or_clear(uint32_t to, const char* from, uint32_t copy) {
  static_assert(kBytes == 2 || kBytes == kUnit);
  if constexpr (kBytes == 2) {
    const uint16_t value = copy ? __ldg(reinterpret_cast<const uint16_t*>(from)) : uint16_t{0};
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(value));  // loads may go before
  } else {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n.reg .pred clear;\nsetp.eq.s32 clear, %2, 0;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, clear;\n}" ::"r"(to),
        "l"(from), "r"(copy)
        : "memory");
#endif
  }
}

// The same, of 16 bytes, or nothing.
__device__ inline void copy_or_clear_if(bool any, uint32_t to, const char* from, uint32_t copy) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n.reg .pred any, clear;\nsetp.ne.s32 any, %3, 0;\nsetp.eq.s32 clear, %2, 0;\n"
      "@any cp.async.cg.shared.global.L2::128B [%0], [%1], 16, clear;\n}" ::"r"(to),
      "l"(from), "r"(copy), "r"(static_cast<int>(any))
      : "memory");
#endif
}

// A thread's part in loading the streams of a block: 16 bytes of a few pixels of one of them, row by row. It writes
// zeros for what is outside of the image.
template <class Size>
class StreamLoader {
 public:
  __device__ StreamLoader(const Toeplitz& a, int slab, int split) {
    const int unit = threadIdx.x % kUnits, place = threadIdx.x % 32 / kUnits, warp = threadIdx.x / 32;
    const int stream = Size::kWide ? place >> a.group_shift : place + warp % 2 * kTiles;
    pixel_ = Size::kWide ? warp * a.groups() + (place & (a.groups() - 1)) : warp / 2;
    byte_ = slab * kSlab * 2 + unit * kUnit;
    const int to = shared_address(kRing) + place_of(pixel_) + unit * kUnit;
    source_to_ = kept(to + stream * a.source.ring_bytes());
    grad_to_ = kept(to + a.grad_at + stream * a.grad.ring_bytes());
    third_ = kept(pixel_ < kRun);
    to_step_ = kRunBytes << a.group_shift;
    source_step_ = step(a) * a.source.pixel_bytes, grad_step_ = step(a) * a.grad.pixel_bytes;
    if (Size::kRows < 9) {  // there are registers
      to_step_ = kept_by_all(to_step_);
      source_step_ = kept_by_all(source_step_), grad_step_ = kept_by_all(grad_step_);
    }

    const int number = split * a.streams + stream, first = a.shares.begin(number);
    left_ = byte_ < a.channels * 2 ? a.shares.begin(number + 1) - first : 0;
    ends_ = left_ == 0;
    uint32_t rest = first;
    row_ = a.by_period.split(rest);
    image_ = a.by_images.split(rest);
    span_ = rest;
    seek(a);
  }

  // Begins to load the next row of each stream to a stage, and arrives at its barrier when that is there.
  __device__ void load(const Toeplitz& a, int stage, uint32_t barrier) {
    const uint32_t to = stage * a.stage_bytes;
    load_row<kSourcePixels>(a, source_, source_step_, row_ >= a.padding_h && !ends_ ? source_inside_ : 0,
                            to + source_to_);
    load_row<kGradPixels>(a, grad_, grad_step_, row_ < a.out_height && left_ > 0 ? grad_inside_ : 0, to + grad_to_);
    if (Size::kBytes == kUnit)
      arrive_after_copies_at(barrier);
    else
      arrive_at(barrier);
    source_ += a.source.row_bytes, grad_ += a.grad.row_bytes;
    --left_;
    if (++row_ < a.period) return;
    row_ = 0, ends_ |= left_ <= 0;
    source_ += a.source.turn_bytes, grad_ += a.grad.turn_bytes;
    if (++image_ < a.images) return;
    image_ = 0, ++span_;
    seek(a);
  }

 private:
  static constexpr int kSourcePixels = Size::kWide ? 3 : 4, kGradPixels = 2;  // of a row

  int pixel_, byte_;              // the first one, and what of it
  uint32_t source_to_, grad_to_;  // where that goes in the first stage
  uint32_t to_step_;              // from one pixel to the next
  int source_step_, grad_step_;
  int third_;  // whether there is a third one: 8 pixels of the input are beyond the columns of the span
  int row_, image_, span_;
  int left_;                              // rows of the gradient
  bool ends_;                             // no row of the input has any of them to meet
  const char *source_, *grad_;            // the first pixel
  uint32_t source_inside_, grad_inside_;  // a bit for each of the thread's pixels that is in the image

  __device__ void seek(const Toeplitz& a) {
    const auto seek = [&](const Rows& v, int row, const char*& from, uint32_t& inside) {
      const int column = span_ * a.columns - v.shift + pixel_;
      from = v.base + image_ * v.image_bytes + row * v.row_bytes + int64_t{column} * v.pixel_bytes + byte_;
      inside = 0;
      for (int k = 0; k < kSourcePixels; ++k)
        inside |= (static_cast<uint32_t>(column + k * step(a)) < static_cast<uint32_t>(v.width)) << k;
    };
    seek(a.source, row_ - a.padding_h, source_, source_inside_), seek(a.grad, row_, grad_, grad_inside_);
  }

  // From one of a thread's pixels to the next.
  static __device__ int step(const Toeplitz& a) { return Size::kWide ? kRun << a.group_shift : kRun / 2; }

  template <int kPixels>
  __device__ void load_row(const Toeplitz& a, const char* from, int step, uint32_t inside, uint32_t to) const {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      if (Size::kWide && k == 2 && !third_) break;
      const uint32_t target = to + (Size::kWide ? k * to_step_ : place_of(k * kRun / 2));
#pragma unroll
      for (int part = 0; part < kUnit; part += Size::kBytes)
        copy_or_clear<Size::kBytes>(target + part, from + part,
                                    Size::kBytes == kUnit || byte_ + part < a.channels * 2 ? inside & 1 << k : 0);
      from += step;
    }
  }
};

// Sums of a block in shared memory: [tap, or bias behind the last tap][channel], and behind them one for each warp.
__host__ __device__ constexpr int block_sums(int taps) {
  return (taps + 1) * kSlab;
}

// The sum of one tap, or of the bias behind the last one, over a split, of what is inside the image only: a thread's
// part.
template <typename T>
__device__ float sum_by_products(const Toeplitz& a, int split, int channel, int slot) {
  const bool is_bias = slot == a.kernel_h * a.kernel_w;
  const int i = is_bias ? 0 : slot / a.kernel_w - a.padding_h, j = is_bias ? 0 : slot % a.kernel_w - a.padding_w;
  const int last = min(a.shares.begin((split + 1) * a.streams), a.rows);
  float sum = 0;
  for (int at = a.shares.begin(split * a.streams) + threadIdx.x / 32; at < last; at += kWarps) {
    const int row = at % a.period, image = at / a.period % a.images;
    const int column = at / a.period / a.images * a.columns, y = row + i;
    if (row >= a.out_height || (!is_bias && (y < 0 || y >= a.height))) continue;
    const char* g = a.grad.base + image * a.grad.image_bytes + row * a.grad.row_bytes + channel * sizeof(T);
    const char* x = a.source.base + image * a.source.image_bytes + y * a.source.row_bytes + channel * sizeof(T);
    const int end = min(column + a.columns, a.grad.width);
    for (int v = column + threadIdx.x % 32; v < end; v += 32) {
      const float gradient = widen(*reinterpret_cast<const T*>(g + int64_t{v} * a.grad.pixel_bytes));
      if (is_bias)
        sum += gradient;
      else if (v + j >= 0 && v + j < a.source.width)
        sum = fmaf(widen(*reinterpret_cast<const T*>(x + int64_t{v + j} * a.source.pixel_bytes)), gradient, sum);
    }
  }
  return sum;
}

// The same by all threads of a block; the first one has it.
template <typename T>
__device__ float block_sum_by_products(const Toeplitz& a, int split, int channel, int slot) {
  const int scratch = kRing + block_sums(a.kernel_h * a.kernel_w) * 4;
  float sum = sum_by_products<T>(a, split, channel, slot);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) shared<float>(scratch + threadIdx.x / 32 * 4) = sum;
  __syncthreads();
  for (int warp = 1; warp < kWarps; ++warp) sum += shared<float>(scratch + warp * 4);
  __syncthreads();
  return sum;
}

// Takes those of the block's sums again that are not finite.
template <typename T>
__device__ __noinline__ void sum_again(const Toeplitz& a, int slab, int split, float* partial) {
  const int taps = a.kernel_h * a.kernel_w;
  for (int at = 0; at < (taps + a.with_bias) * kSlab; ++at) {
    const int slot = at / kSlab, channel = slab * kSlab + at % kSlab;
    if (is_finite(shared<float>(kRing + 4 * at)) || channel >= a.channels) continue;
    const float sum = block_sum_by_products<T>(a, split, channel, slot);
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

// Takes the sums of the bias to the others in shared memory: channel c's are in row c.
__device__ inline void store_bias(const Toeplitz& a, const float (&bias)[4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total = bias[0] + bias[1];
  for (const int offset : {1, 2}) total += __shfl_xor_sync(~0u, total, offset);
  if (lane % 4 == 0 && lane < 4 * kQuad) sum_at(a.kernel_h * a.kernel_w * kSlab + warp * kQuad + lane / 4) = total;
}

// Stores a block's sums, which are in shared memory but for those of the bias.
template <typename T>
__device__ void store_sums(const Toeplitz& a, int slab, int split, const float (&bias)[4]) {
  store_bias(a, bias);
  __syncthreads();
  const int slots = a.kernel_h * a.kernel_w + a.with_bias;
  float* partial = a.partial + static_cast<int64_t>(split) * slots * a.channels;
  bool again = false;
  for (int i = threadIdx.x; i < slots * kSlab; i += kThreads) {
    const int slot = i / kSlab, channel = slab * kSlab + i % kSlab;
    if (channel >= a.channels) continue;
    const float total = sum_at(i);
    partial[static_cast<int64_t>(slot) * a.channels + channel] = total;
    again |= !is_finite(total);
  }
  if (__syncthreads_or(again)) sum_again<T>(a, slab, split, partial);
}

// Adds up the sums of all splits, which are the blocks of a cluster: each does a part of it.
template <typename T>
__device__ void add_up_splits(const Toeplitz& a, int slab, int split, const float (&bias)[4]) {
  const int taps = a.kernel_h * a.kernel_w, count = (taps + a.with_bias) * kSlab;
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
    const int tap = number / kSlab;
    const int64_t channel = slab * kSlab + number % kSlab;
    if (tap < taps)
      static_cast<T*>(a.grad_weight)[channel * taps + tap] = narrow<T>(total);
    else
      static_cast<T*>(a.grad_bias)[channel] = narrow<T>(total);
  };
  store_bias(a, bias);
  meet_in_cluster();
  bool again = false;
  for (int i = split * kThreads + threadIdx.x; i < count; i += a.splits * kThreads) {
    if (slab * kSlab + i % kSlab >= a.channels) continue;
    const float total = add(i);
    store(i, total);
    again |= !is_finite(total);
  }
  if (__syncthreads_or(again))
    for (int i = 0; i < count; ++i) {
      const int channel = slab * kSlab + i % kSlab;
      if (i / kThreads % a.splits != split || channel >= a.channels || is_finite(add(i))) continue;
      float total = 0;
      for (int block = 0; block < a.splits; ++block) total += block_sum_by_products<T>(a, block, channel, i / kSlab);
      if (threadIdx.x == 0) store(i, total);
    }
  meet_in_cluster();  // others read what is here
}

template <typename T, class Size>
__global__ void __launch_bounds__(kThreads, Size::kBlocks)
    toeplitz_grad_weight_channels_last(const __grid_constant__ Toeplitz a) {
  constexpr int kRows = Size::kRows;
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  const int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kMaxStages)
    init_barrier(StageBarriers::full(threadIdx.x), kThreads), init_barrier(StageBarriers::done(threadIdx.x), kWarps);
  StreamLoader<Size> loader(a, slab, split);
  __syncthreads();
  settle_and_wait_for_kernel_before(a.depth);
  const StageAddresses barriers{kept(shared_address(0))};
#pragma unroll 1
  for (int step = 0; step < min(a.ahead, a.steps); ++step) loader.load(a, step, barriers.full(step));

  // Sums of rows m and m + 8 by columns n and n + 1, where m = lane / 4 and n = lane % 4 * 2.
  float sum[kQuad][kRows][4] = {}, bias[4] = {};
  uint32_t g[kRows][kQuad][2] = {};
  // The thread's pixels: of tiles lane % 4 and lane % 4 + 4.
  uint32_t source_at[2], grad_at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int tile = lane % 4 + 4 * h, stream = tile >> a.group_shift, group = tile & (a.groups() - 1);
    const uint32_t at = shared_address(kRing) + group * 2 * kRunBytes + lane / 4 * kPixelBytes + warp * kQuad * 2;
    source_at[h] = kept(stream * a.source.ring_bytes() + at);
    grad_at[h] = kept(a.grad_at + stream * a.grad.ring_bytes() + at);
  }
  int stage = 0, free_stage = a.ahead;
  uint32_t parity = 0, free_parity = 1;
  for (int step = 0; step < a.steps;) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {  // the row of the gradient that came `age` steps before is g[(u - age) mod kRows]
      if (step == a.steps) break;
      wait_at(barriers.full(stage), parity);
      const uint32_t at = stage * a.stage_bytes;
      uint32_t x[kQuad][4];  // of a half of the tiles, and of the 8 columns behind
      uint2 low, high;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pair[kQuad];
        const uint32_t g_at = at + half * (Size::kWide ? kRunBytes : kTiles * a.grad.ring_bytes());
        pair_up(load_at(grad_at[0] + g_at), load_at(grad_at[1] + g_at), pair);
#pragma unroll
        for (int c = 0; c < kQuad; ++c) g[u][c][half] = pair[c];
#pragma unroll
        for (int behind = 0; behind < 2; ++behind) {
          if (!Size::kWide || half == 0 || behind == 1) {
            const uint32_t x_at =
                at + half * (Size::kWide ? kRunBytes : kTiles * a.source.ring_bytes()) + behind * kRunBytes;
            low = load_at(source_at[0] + x_at), high = load_at(source_at[1] + x_at);
            pair_up(low, high, pair);
          } else {
            pair_up_again(low, high, pair);
          }
#pragma unroll
          for (int c = 0; c < kQuad; ++c) x[c][2 * half + behind] = pair[c];
        }
      }
      __syncwarp();
      if (lane == 0) arrive_at(barriers.done(stage));
      if (step + a.ahead < a.steps) {
        wait_at(barriers.done(free_stage), free_parity);
        loader.load(a, free_stage, barriers.full(free_stage));
        if (++free_stage == a.depth) free_stage = 0, free_parity ^= 1;
      }
      if (++stage == a.depth) stage = 0, parity ^= 1;
      ++step;
#pragma unroll
      for (int c = 0; c < kQuad; ++c)
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float (&to)[4] = sum[c][i];
          multiply(to, to, x[c], g[(u - i + kRows) % kRows][c], T{});
        }
      if (a.with_bias)  // channel c in row c
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t one = lane / 4 == c ? ones(T{}) : 0;
          multiply(bias, bias, {one, 0, one, 0}, g[u][c], T{});
        }
    }
  }
  __syncthreads();

  // The ring has served: its memory takes the sums.
  const int row = lane / 4, place = lane % 4;
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
    if (row < a.kernel_w && i < a.kernel_h) sum_at((i * a.kernel_w + row) * kSlab + warp * kQuad + place) = total;
    if (a.kernel_w > kRun) {  // one more, m = n + 8
#pragma unroll
      for (int c = 0; c < kQuad; ++c) diagonal[c] = row / 2 != place ? 0 : row % 2 ? sum[c][i][3] : sum[c][i][2];
      float last = add_up(diagonal, place);
      for (int offset = 4; offset < 32; offset *= 2) last += __shfl_xor_sync(~0u, last, offset);
      if (row == 0 && i < a.kernel_h) sum_at((i * a.kernel_w + kRun) * kSlab + warp * kQuad + place) = last;
    }
  }
  store_sums<T>(a, slab, split, bias);
}

// Images of at most 8 x 8 are loaded 8 at once, and then multiplied without a wait. The places of a multiplication are
// the images in two rows y and y + 1 of the gradient; the 16 rows of A are the 8 columns of a row of the input and
// those of the next one, which makes the sums of two rows of the kernel. Copies of the images to come are begun between
// multiplications: what they take is time of the way to shared memory.
constexpr int kImages = 8, kImageRows = 8, kRowBytes = kRun * kPixelBytes;
constexpr int kMaxGroups = 256;  // of a block: longer sums lose digits

// In shared memory, from one image to the next: for 4 columns of 4 of them half of a bank's accesses are of one.
__host__ __device__ constexpr int image_bytes_of(int rows) {
  return rows * kRowBytes + 64;
}

// Takes the sums of images that were worked on together to shared memory.
template <int kRows, int kPairs>
__device__ void store_image_sums(const Toeplitz& a, const float (&sum)[kPairs][kQuad][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4;
  // The sums for column j of the kernel are on the diagonal row - column = j - padding.
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float upper[kQuad] = {}, lower[kQuad] = {};  // of diagonals `row` and `row` - 8: the thread's part, of two columns
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = 2 * place + e;
        const float value = __shfl_sync(~0u, sum[i / 2][c][i % 2 * 2 + e], (row + n) % kRun * 4 + place);
        (row + n < kRun ? upper[c] : lower[c]) += value;
      }
    const float totals[2] = {add_up(upper, place), add_up(lower, place)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = row - h * kRun + a.padding_w;
      if (i < a.kernel_h && j >= 0 && j < a.kernel_w)
        shared<float>(kRing + 4 * ((i * a.kernel_w + j) * kSlab + warp * kQuad + place)) = totals[h];
    }
  }
}

template <typename T, int kPairs>  // of rows of the kernel
__global__ void __launch_bounds__(kThreads, 1) toeplitz_grad_weight_of_images(const __grid_constant__ Toeplitz a) {
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  const int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4;
  uint32_t image = a.shares.begin(split), last = a.shares.begin(split + 1);
  a.by_period.split(image), a.by_period.split(last);

  // A warp loads an image, a thread 16 bytes of a pixel of each row.
  const int byte = slab * kSlab * 2 + place * kUnit, ahead = a.depth - 1;
  int next = static_cast<int>(image) + warp;
  const uint32_t nothing = shared_address(kRing), ring = nothing + kRowBytes;
  const uint32_t copies_to = ring + row * kPixelBytes + place * kUnit;
  struct Copies {
    const char* from;
    uint32_t to;
    int rows;
    bool inside;
  };
  // What there is to copy of the next images.
  const auto next_images = [&](const Rows& v, int height, uint32_t to) {
    return Copies{v.base + (next * v.image_bytes + int64_t{row} * v.pixel_bytes + byte),
                  to + warp * image_bytes_of(height), next - warp < static_cast<int>(last) ? height : 0,
                  next < static_cast<int>(last) && row < v.width && byte < a.channels * 2};
  };
  const auto copy_row = [&](Copies& copies, const Rows& v, int y) {
    copy_or_clear_if(y < copies.rows, copies.to + y * kRowBytes, copies.from, copies.inside);
    copies.from += v.row_bytes;
  };
  for (int i = threadIdx.x * kUnit; i < kRowBytes; i += kThreads * kUnit) shared<uint4>(kRing + i) = {};
  settle_and_wait_for_kernel_before(a.depth);
#pragma unroll 1
  for (int stage = 0; stage < ahead; ++stage, next += kImages) {
    Copies source = next_images(a.source, a.height, copies_to + stage * a.stage_bytes);
    Copies grad = next_images(a.grad, a.out_height, copies_to + stage * a.stage_bytes + a.grad_at);
#pragma unroll 1
    for (int y = 0; y < kImageRows; ++y) copy_row(source, a.source, y), copy_row(grad, a.grad, y);
    commit_copies();
  }

  // Sums of rows 2 p and 2 p + 1 of the kernel, of column `row` of the input by columns 2 place and 2 place + 1.
  float sum[kPairs][kQuad][4] = {}, bias[4] = {};
  int stage = 0, free_stage = ahead;
#pragma unroll 1
  for (; image < last; image += kImages, next += kImages) {
    if (ahead > 1)
      wait_copies<1>();
    else
      wait_copies<0>();
    __syncthreads();
    // A thread's pixels are of images `place` and `place` + 4, or of a row of zeros.
    const uint32_t offset = row * kPixelBytes + warp * kQuad * 2, at = ring + stage * a.stage_bytes + offset;
    const auto load_row = [&](uint32_t images, int height, int y, uint2& low, uint2& high) {
      const bool there = static_cast<uint32_t>(y) < static_cast<uint32_t>(height);
      const uint32_t from = images + place * image_bytes_of(height) + y * kRowBytes;
      low = load_at(there ? from : nothing + offset);
      high = load_at(there ? from + 4 * image_bytes_of(height) : nothing + offset);
    };
    Copies source = next_images(a.source, a.height, copies_to + free_stage * a.stage_bytes);
    Copies grad = next_images(a.grad, a.out_height, copies_to + free_stage * a.stage_bytes + a.grad_at);
    uint2 low, high;
    uint32_t g[kImageRows / 2][kQuad][2];
#pragma unroll
    for (int y = 0; y < kImageRows; ++y) {
      uint32_t pair[kQuad];
      load_row(at + a.grad_at, a.out_height, y, low, high);
      pair_up(low, high, pair);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) g[y / 2][c][y % 2] = pair[c];
    }
    // Rows 2 p of the kernel and 2 q of the gradient meet row 2 t of the input, where p + q = t, and two more.
    constexpr int kTurns = kPairs + kImageRows / 2 - 1;
    uint2 rows[2 * kTurns + 1][2];
#pragma unroll
    for (int r = 0; r < 2 * kTurns + 1; ++r) load_row(at, a.height, r - a.padding_h, rows[r][0], rows[r][1]);
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
#pragma unroll
      for (int y = t * kImageRows / kTurns; y < (t + 1) * kImageRows / kTurns; ++y)
        copy_row(source, a.source, y), copy_row(grad, a.grad, y);
      if (2 * t + 2 < a.padding_h || 2 * t >= a.padding_h + a.height) continue;
      uint32_t x[4][kQuad];
      pair_up(rows[2 * t][0], rows[2 * t][1], x[0]), pair_up(rows[2 * t + 1][0], rows[2 * t + 1][1], x[1]);
      pair_up_again(rows[2 * t + 1][0], rows[2 * t + 1][1], x[2]);
      pair_up(rows[2 * t + 2][0], rows[2 * t + 2][1], x[3]);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int q = t - p;
        if (q < 0 || q >= kImageRows / 2) continue;
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          float (&to)[4] = sum[p][c];
          multiply(to, to, {x[0][c], x[1][c], x[2][c], x[3][c]}, g[q][c], T{});
        }
      }
    }
    commit_copies();
    if (a.with_bias)  // channel c in row c
#pragma unroll
      for (int q = 0; q < kImageRows / 2; ++q)
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t one = row == c ? ones(T{}) : 0;
          multiply(bias, bias, {one, 0, one, 0}, g[q][c], T{});
        }
    if (++stage == a.depth) stage = 0;
    if (++free_stage == a.depth) free_stage = 0;
  }
  __syncthreads();

  store_image_sums<2 * kPairs>(a, sum);
  store_sums<T>(a, slab, split, bias);
}

// The same of images of at most 7 rows whose padding is kPairs - 1: a box has 8 columns of 7 rows of 8 images, with
// zeros for what is outside of an image, and all that a thread reads is at offsets that are known at compile time.
// Boxes are swizzled: within 64 bytes, units are exchanged by the column.
constexpr int kBoxRows = 7, kBoxRowBytes = kRun * kSlab * 2, kBoxImageBytes = kBoxRows * kBoxRowBytes;
constexpr int kBoxBytes = kImages * kBoxImageBytes, kBoxesAt = 512;  // where the first one begins in shared memory

struct Boxes {
  CUtensorMap source, grad;
  Toeplitz images;
};

template <typename T, int kPairs>
__global__ void __launch_bounds__(kThreads, 1) toeplitz_grad_weight_of_boxes(const __grid_constant__ Boxes boxes) {
#if __CUDA_ARCH__ >= 900
  const Toeplitz& a = boxes.images;
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  if (a.cluster) slab = cluster_number(), split = rank_in_cluster();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane / 4, place = lane % 4;
  uint32_t image = a.shares.begin(split), last = a.shares.begin(split + 1);
  a.by_period.split(image), a.by_period.split(last);
  StageBarriers::init(1, kWarps, true);
  if (threadIdx.x == 0) prefetch(boxes.source), prefetch(boxes.grad);
  before_bulk_copies();
  __syncthreads();
  const auto load = [&](uint32_t image, int stage) {
    const int to = kBoxesAt + stage * a.stage_bytes, barrier = StageBarriers::full(stage);
    expect_bytes(barrier, 2 * kBoxBytes);
    copy_box(to, boxes.source, slab * kSlab, 0, 0, image, barrier);
    copy_box(to + kBoxBytes, boxes.grad, slab * kSlab, 0, 0, image, barrier);
    arrive(barrier);
  };
  settle_and_wait_for_kernel_before(a.depth);
  uint32_t next = image + a.depth * kImages;
  if (threadIdx.x == 0)
    for (int stage = 0; stage < a.depth && image + stage * kImages < last; ++stage)
      load(image + stage * kImages, stage);

  // Sums of rows 2 p and 2 p + 1 of the kernel, of column `column` of the input by columns 2 place and 2 place + 1.
  float sum[kPairs][kQuad][4] = {}, bias[4] = {};
  const uint32_t unit = warp / 2 ^ (column / 2 % kUnits);
  const uint32_t first =
      shared_address(kBoxesAt) + place * kBoxImageBytes + column * kSlab * 2 + unit * kUnit + warp % 2 * kQuad * 2;
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (; image < last; image += kImages, next += kImages) {
    wait(StageBarriers::full(stage), parity);
    const uint32_t source_at = first + stage * a.stage_bytes, grad_at = source_at + kBoxBytes;
    // A thread's pixels are of images `place` and `place` + 4.
    const auto load_row = [](uint32_t box, int y, uint2& low, uint2& high) {
      const bool there = y >= 0 && y < kBoxRows;
      low = there ? load_at(box + y * kBoxRowBytes) : uint2{};
      high = there ? load_at(box + y * kBoxRowBytes + 4 * kBoxImageBytes) : uint2{};
    };
    uint32_t g[kImageRows / 2][kQuad][2];
#pragma unroll
    for (int y = 0; y < kImageRows; ++y) {
      uint2 low, high;
      uint32_t pair[kQuad];
      load_row(grad_at, y, low, high);
      pair_up(low, high, pair);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) g[y / 2][c][y % 2] = pair[c];
    }
    // Rows 2 p of the kernel and 2 q of the gradient meet row 2 t of the input, where p + q = t, and two more.
    constexpr int kTurns = kPairs + kImageRows / 2 - 1, kPadding = kPairs - 1;
    uint2 rows[2 * kTurns + 1][2];
#pragma unroll
    for (int r = 0; r < 2 * kTurns + 1; ++r) load_row(source_at, r - kPadding, rows[r][0], rows[r][1]);
    if (next < last) {  // into the stage that all warps have read
      __syncwarp();
      if (lane == 0) arrive(StageBarriers::done(stage));
      if (threadIdx.x == 0) wait(StageBarriers::done(stage), parity), load(next, stage);
    }
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      if (2 * t + 2 < kPadding || 2 * t >= kPadding + kBoxRows) continue;
      uint32_t x[4][kQuad];
      pair_up(rows[2 * t][0], rows[2 * t][1], x[0]), pair_up(rows[2 * t + 1][0], rows[2 * t + 1][1], x[1]);
      pair_up_again(rows[2 * t + 1][0], rows[2 * t + 1][1], x[2]);
      pair_up(rows[2 * t + 2][0], rows[2 * t + 2][1], x[3]);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int q = t - p;
        if (q < 0 || q >= kImageRows / 2) continue;
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          float (&to)[4] = sum[p][c];
          multiply(to, to, {x[0][c], x[1][c], x[2][c], x[3][c]}, g[q][c], T{});
        }
      }
    }
    if (a.with_bias)  // channel c in row c
#pragma unroll
      for (int q = 0; q < kImageRows / 2; ++q)
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t one = column == c ? ones(T{}) : 0;
          multiply(bias, bias, {one, 0, one, 0}, g[q][c], T{});
        }
    if (++stage == a.depth) stage = 0, parity ^= 1;
  }
  __syncthreads();
  store_image_sums<2 * kPairs - 1>(a, sum);
  if (a.cluster)
    add_up_splits<T>(a, slab, split, bias);
  else
    store_sums<T>(a, slab, split, bias);
#endif
}

// How the work is cut.
struct Cut {
  int group_shift, depth, splits;
  int64_t shared_bytes;
};

// Fills in what follows from a cut.
template <class Size>
void apply(Toeplitz& a, Cut& cut) {
  a.group_shift = cut.group_shift, a.depth = cut.depth, a.splits = cut.splits;
  a.ahead = a.depth > 3 ? a.depth - 2 : 2;
  a.streams = Size::kWide ? kTiles >> a.group_shift : 2 * kTiles;
  a.columns = Size::kWide ? kTileColumns << a.group_shift : kRun;
  a.grad.runs = a.columns / kRun, a.source.runs = a.grad.runs + 1;
  a.spans = static_cast<int>(ceil_div(a.grad.width, a.columns));
  a.rows = a.spans * a.images * a.period;
  const int64_t streams = int64_t{a.splits} * a.streams;  // of all blocks
  a.shares = Shares(a.rows, streams);
  a.steps = static_cast<int>(ceil_div(a.rows, streams)) + a.kernel_h - 1;
  a.grad_at = a.streams * a.source.ring_bytes();
  a.stage_bytes = a.grad_at + a.streams * a.grad.ring_bytes();
  cut.shared_bytes = kRing + std::max(int64_t{cut.depth} * a.stage_bytes,
                                      int64_t{block_sums(a.kernel_h * a.kernel_w) + kWarps} * int64_t{sizeof(float)});
}

template <class Size>
Cut cut_for(Toeplitz a, const Device& device) {
  Cut cut{0, 3, 1, 0};
  // Few columns beyond the last one, and few that two spans load.
  int64_t least = INT64_MAX;
  for (int shift = 0; Size::kWide && shift <= 3; ++shift) {
    const int columns = kTileColumns << shift;
    const int64_t loaded = ceil_div(a.grad.width, columns) * (columns + 24);
    if (loaded < least) least = loaded, cut.group_shift = shift;
  }
  apply<Size>(a, cut);
  const int64_t room =
      std::min<int64_t>(device.shared_per_block, device.shared_per_multiprocessor / Size::kBlocks - 1024);
  for (const int depth : {3, 4, 6, 8})
    if (kRing + int64_t{depth} * a.stage_bytes <= room) cut.depth = depth;

  // Splits: estimated steps, of which only comparisons matter, and some for what a block does before and behind.
  constexpr int64_t kLongest = 1 << 10;  // steps, of 16 products each: longer sums lose digits
  const int64_t slots = int64_t{Size::kBlocks} * device.multiprocessors, rows = ceil_div(a.rows, a.streams);
  double least_cost = INFINITY;
  Cut best = cut;
  for (int waves = 1; waves <= 4; ++waves) {
    cut.splits = static_cast<int>(std::clamp<int64_t>(slots * waves / a.slabs, ceil_div(rows, kLongest), rows));
    apply<Size>(a, cut);
    const double cost = static_cast<double>(ceil_div(int64_t{a.slabs} * cut.splits, slots)) * (a.steps + 12);
    if (cost < least_cost * 0.97) least_cost = cost, best = cut;
  }
  return best;
}

template <typename T, class Size>
void launch(const Problem& p, Toeplitz a, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const auto kernel = toeplitz_grad_weight_channels_last<T, Size>;
  static thread_local Decisions<9, Cut> decisions;
  const auto decide = [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    return cut_for<Size>(a, device);
  };
  Cut cut = decisions(
      {device.id, a.images, a.channels, a.height, a.source.width, a.padding_h, a.padding_w, a.kernel_h, a.kernel_w},
      decide);
  apply<Size>(a, cut);
  a.partial = static_cast<float*>(
      allocate(a.splits * (p.taps() + a.with_bias) * a.channels * static_cast<int64_t>(sizeof(float))));
  launch_early(kernel, a, int64_t{a.slabs} * a.splits, kThreads, stream, {.shared_bytes = cut.shared_bytes});
  check_launch("toeplitz_grad_weight_channels_last");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
}

// Fills in how many images of at most 8 x 8 are worked on together, and returns whether they are that small. Their sums
// are of no column of the kernel beyond the 16 diagonals.
bool has_small_images(Toeplitz& a) {
  a.grad_at = kImages * image_bytes_of(a.height);
  a.stage_bytes = a.grad_at + kImages * image_bytes_of(a.out_height);
  a.depth =
      static_cast<int>(std::min<int64_t>((current_device().shared_per_block - kRing - kRowBytes) / a.stage_bytes, 3));
  const int most = std::max({a.height, a.out_height, a.source.width, a.grad.width, a.kernel_h, a.padding_w});
  return most <= kImageRows && a.depth > 1;
}

// Describes boxes of images, and returns whether CUDA can.
bool describe_images(CUtensorMap& map, const View& view, const Problem& p, int64_t height, int64_t width) {
  return describe_boxes(map, view.data, 2, {p.channels, width, height, p.batch},
                        {view.stride[3] * 2, view.stride[2] * 2, view.stride[0] * 2}, {kSlab, kRun, kBoxRows, kImages},
                        CU_TENSOR_MAP_SWIZZLE_64B);
}

// Returns false, and launches nothing, where images do not come as boxes.
template <typename T, int kPairs>
bool launch_boxes(const Problem& p, const Toeplitz& images, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_of_boxes<T, kPairs>;
  Boxes boxes{{}, {}, images};
  Toeplitz& a = boxes.images;
  if (std::max(a.height, a.out_height) > kBoxRows || a.padding_h != kPairs - 1 || a.kernel_h >= 2 * kPairs)
    return false;
  if (!can_overlap(kernel) || !has_boxes(p.input, 2, kUnit) || !has_boxes(p.output, 2, kUnit) ||
      !describe_images(boxes.source, p.input, p, p.height, p.width) ||
      !describe_images(boxes.grad, p.output, p, p.out_height, p.out_width))
    return false;
  const Device& device = current_device();
  const int64_t groups = ceil_div(a.images, kImages);
  a.splits =
      static_cast<int>(std::clamp<int64_t>(device.multiprocessors / a.slabs, ceil_div(groups, kMaxGroups), groups));
  a.stage_bytes = 2 * kBoxBytes;
  a.depth = static_cast<int>(
      std::min((device.shared_per_block - kBoxesAt) / int64_t{a.stage_bytes}, ceil_div(groups, a.splits)));
  if (a.depth < 1) return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  a.shares = Shares(groups * kImages * a.period, a.splits, 1, kImages * a.period);
  const int64_t sums = kRing + (block_sums(a.kernel_h * a.kernel_w) + kWarps) * int64_t{sizeof(float)};
  const int64_t shared_bytes = std::max(sums, kBoxesAt + int64_t{a.depth} * a.stage_bytes);
  static thread_local Decisions<4, bool> decisions;
  a.cluster = decisions({device.id, a.slabs, a.splits, shared_bytes}, [&] {
    return a.splits <= kPortableCluster && fits_clusters(kernel, a.slabs, a.splits, kThreads, shared_bytes);
  });
  if (!a.cluster)
    a.partial = static_cast<float*>(
        allocate(a.splits * (p.taps() + a.with_bias) * a.channels * static_cast<int64_t>(sizeof(float))));
  launch_early(kernel, boxes, int64_t{a.slabs} * a.splits, kThreads, stream,
               {.cluster = a.cluster ? a.splits : 1, .shared_bytes = shared_bytes});
  check_launch("toeplitz_grad_weight_of_boxes");
  if (!a.cluster) launch_add_partial_sums(p, a.partial, a.splits, stream);
  return true;
}

template <typename T, int kPairs>
void launch_images(const Problem& p, Toeplitz a, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const auto kernel = toeplitz_grad_weight_of_images<T, kPairs>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  const int64_t groups = ceil_div(a.images, kImages);
  a.splits =
      static_cast<int>(std::clamp<int64_t>(device.multiprocessors / a.slabs, ceil_div(groups, kMaxGroups), groups));
  a.streams = 1, a.columns = kRun, a.period = a.out_height, a.by_period = Divider(a.period);
  a.rows = a.images * a.period;
  if (launch_boxes<T, kPairs>(p, a, allocate, stream)) return;
  a.shares = Shares(int64_t{a.images} * a.period, a.splits, 1, a.period);
  a.partial = static_cast<float*>(
      allocate(a.splits * (p.taps() + a.with_bias) * a.channels * static_cast<int64_t>(sizeof(float))));
  const int64_t sums = (block_sums(a.kernel_h * a.kernel_w) + kWarps) * int64_t{sizeof(float)};
  launch_early(kernel, a, int64_t{a.slabs} * a.splits, kThreads, stream,
               {.shared_bytes = kRing + std::max(sums, kRowBytes + int64_t{a.depth} * a.stage_bytes)});
  check_launch("toeplitz_grad_weight_of_images");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
}

}  // namespace

void launch_toeplitz_grad_weight_channels_last(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  Toeplitz a{};
  int64_t bytes = 2 * p.channels;  // a multiple of what can be copied at once
  const auto arrange = [&](const View& view, int64_t height, int64_t width, int64_t shift, Rows& v) {
    v.base = static_cast<const char*>(view.data);
    v.image_bytes = p.batch == 1 ? 0 : 2 * view.stride[0], v.row_bytes = height == 1 ? 0 : 2 * view.stride[2];
    v.pixel_bytes = static_cast<int>(width == 1 ? 0 : 2 * view.stride[3]);
    v.width = static_cast<int>(width), v.shift = static_cast<int>(shift);
    bytes |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data)) | v.image_bytes | v.row_bytes | v.pixel_bytes;
  };
  arrange(p.input, p.height, p.width, p.padding_w, a.source);
  arrange(p.output, p.out_height, p.out_width, 0, a.grad);
  a.height = static_cast<int>(p.height), a.out_height = static_cast<int>(p.out_height);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.period = a.height + a.padding_h;
  for (Rows* rows : {&a.source, &a.grad}) rows->turn_bytes = rows->image_bytes - a.period * rows->row_bytes;
  a.slabs = static_cast<int>(ceil_div(a.channels, kSlab));
  a.by_slabs = Divider(a.slabs), a.by_period = Divider(a.period), a.by_images = Divider(a.images);
  a.with_bias = p.bias != nullptr, a.grad_weight = p.weight.data, a.grad_bias = p.bias;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launch_rows = [&](auto rows, auto blocks) {
      if (bytes % kUnit != 0) return launch<T, Size<rows, true, 2, blocks>>(p, a, allocate, stream);
      if (p.out_width <= kRun) return launch<T, Size<rows, false, kUnit, blocks>>(p, a, allocate, stream);
      launch<T, Size<rows, true, kUnit, blocks>>(p, a, allocate, stream);
    };
    using std::integral_constant;
    if constexpr (sizeof(T) == 2) {
      if (bytes % kUnit == 0 && has_small_images(a))
        return a.kernel_h <= 4 ? launch_images<T, 2>(p, a, allocate, stream)
                               : launch_images<T, 4>(p, a, allocate, stream);
      if (a.kernel_h <= 3) return launch_rows(integral_constant<int, 3>{}, integral_constant<int, 2>{});
      if (a.kernel_h <= 5) return launch_rows(integral_constant<int, 5>{}, integral_constant<int, 1>{});
      if (a.kernel_h <= 7) return launch_rows(integral_constant<int, 7>{}, integral_constant<int, 1>{});
      launch_rows(integral_constant<int, 9>{}, integral_constant<int, 1>{});
    }
  });
}

}  // namespace dwconv
