// grad_weight (and the bias gradient) of small kernels in 16 bits on contiguous planes of many images, on tensor cores.
//
// Images are what is summed over (image_sums.cuh): with A[m][n] = input[n][y][x + m] and B[n][k] = gradient[n][r][x +
// padding + k], the product has, for row y + padding - r of the kernel, the sums for its columns m - k on the
// diagonals: of 16 images, of 8 columns of the gradient and the 16 columns of the input that their windows meet.
// Whichever columns these are, the diagonals are the same, so a warp keeps one product for each row of the kernel.
//
// How planes lie in memory decides what surrounds the multiplications, and that how fast they are. There are ways
//   for planes of few pixels, as they lie (flat_grad_weight_nchw.cu),
//   for 28 columns at stride 2, as they lie (stride2_grad_weight_nchw.cu),
//   for long rows of whole units of 16 bytes, in a ring (aligned_grad_weight_nchw.cu),
//   for rows of whole words, which are laid where matrices can be loaded at once (padded_grad_weight_nchw.cu),
// and here is the one that serves what they leave: it reads element by element, wherever these are.
//
// A warp works on tiles of 7 rows and 8 columns, whose gradients stay in registers while the rows of the input go by.
// At stride 2 there is a product for the even columns of the input and one for the odd ones. A block has some channels
// of whole planes, or one of bands of rows, of 16 images at a time (image_runs.cuh), and works through a part of the
// images. Diagonals are summed up at the end, in a fixed order.
#include <algorithm>
#include <cmath>

#include "aligned_grad_weight_nchw.h"
#include "flat_grad_weight_nchw.h"
#include "image_runs.cuh"
#include "image_sums.cuh"
#include "launch.h"
#include "padded_grad_weight_nchw.h"
#include "stream.cuh"
#include "stride2_grad_weight_nchw.h"

namespace dwconv {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kRows = 7, kColumns = 8;  // of a tile
constexpr int kPitch = kColumns + 1;    // of the products that a warp sums up at the end, in floats

struct Batch : BandSums {
  ImageRuns source, grad;
  int block_filters, share;  // warps that share a filter
  int groups, splits, stage_bytes;
  int strips;  // tiles side by side
  int totals;  // where the first block of a cluster of all splits has their sums in shared memory, or 0
  bool bulk;
  Divider by_strips;
};

// What a warp sums up. kKernelH: with what dilation puts between the rows.
template <typename T, int kKernelH, int kStride>
struct Products {
  static constexpr int kBytes = 4 * kKernelH * kStride * 2 * kColumns * kPitch;

  float sum[kKernelH][kStride][4] = {}, bias[4] = {};

  // Of the 16 columns of a window (at stride 2, of either parity), the thread has these two: h is 0 or 1.
  static __device__ int column(int h) { return threadIdx.x % 32 / 4 + 8 * h; }
  // Two images' elements at the same place.
  static __device__ uint32_t pair(int first, int second) {
    return __byte_perm(shared<uint16_t>(first), shared<uint16_t>(second), 0x5410);
  }

  int source_slots[4], grad_slots[4];  // of the thread's four images

  // Before the tiles of a step: where the images lie. `channel`: of the block's.
  __device__ void place(const Batch& a, const Step& s, int stage, int64_t source_offset, int64_t grad_offset,
                        int channel, int filter) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int n = lane % 4 * 2 + k % 2 + k / 2 * 8;
      source_slots[k] = a.source.slot(stage, n, s.image + n, source_offset) + channel * a.height * 2 * a.width +
                        2 * (column(0) * kStride - a.padding_w);
      grad_slots[k] =
          a.grad.slot(stage, n, s.image + n, grad_offset) + filter * a.out_height * 2 * a.out_width + lane / 4 * 2;
    }
  }

  __device__ void add(const Batch& a, const Step& s, int v0, int r0, uint32_t inside) {
    uint32_t source_mask[kStride][2];
#pragma unroll
    for (int c = 0; c < kStride; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int x = (v0 + column(h)) * kStride + c - a.padding_w;
        source_mask[c][h] = static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width) ? ~0u : 0;
      }
    const uint32_t grad_mask = v0 + static_cast<int>(threadIdx.x % 32 / 4) < a.out_width ? ~0u : 0;
    const int y0 = (s.row + r0) * kStride - a.padding_h, rows = s.rows - r0;
    int from[4], grad[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      from[k] = source_slots[k] + (y0 - s.source_begin) * 2 * a.width + 2 * kStride * v0;
      grad[k] = grad_slots[k] + r0 * 2 * a.out_width + 2 * v0;
    }
    if (rows >= kRows)
      add<true>(a, from, grad, inside, rows, source_mask, grad_mask);
    else
      add<false>(a, from, grad, inside, rows, source_mask, grad_mask);
  }

  // Adds a tile of 16 images. `from` and `grad`: where the thread's four images have, or would have, the first row and
  // the thread's first column, of the window and of the tile. `inside`: a bit for every source row that is inside the
  // image. kFull: all rows of the tile are there.
  template <bool kFull>
  __device__ void add(const Batch& a, const int (&from)[4], const int (&grad)[4], uint32_t inside, int rows,
                      const uint32_t (&source_mask)[kStride][2], uint32_t grad_mask) {
    const int source_row = 2 * a.width, grad_row = 2 * a.out_width;
    uint32_t g[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!kFull && r >= rows) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k)
        g[r][k] = pair(grad[2 * k] + r * grad_row, grad[2 * k + 1] + r * grad_row) & grad_mask;
    }
    if (a.result.with_bias()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (kFull || r < rows) add_to_bias(bias, g[r], T{});
    }
#pragma unroll
    for (int s = 0; s < (kRows - 1) * kStride + kKernelH; ++s) {
      if (!(inside >> s & 1)) continue;
      uint32_t x[kStride][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int first = from[2 * k] + s * source_row, second = from[2 * k + 1] + s * source_row;
#pragma unroll
        for (int c = 0; c < kStride; ++c)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int at = 2 * (8 * kStride * h + c);
            x[c][2 * k + h] = pair(first + at, second + at) & source_mask[c][h];
          }
      }
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int r = (s - i) / kStride;
        if (s < i || (s - i) % kStride != 0 || r >= kRows || (!kFull && r >= rows)) continue;
#pragma unroll
        for (int c = 0; c < kStride; ++c) multiply(sum[i][c], sum[i][c], x[c], g[r], T{});
      }
    }
  }

  // Puts the products to shared memory from `place` on.
  __device__ void put(int place) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int c = 0; c < kStride; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          shared<float>(place_of(place, i * kStride + c, column(e / 2), lane % 4 * 2 + e % 2)) = sum[i][c][e];
  }
  static __device__ int place_of(int place, int product, int m, int k) {
    return place + 4 * ((product * 2 * kColumns + m) * kPitch + k);
  }
  // The sum of a tap's products, which are on a diagonal.
  static __device__ float tap(int place, int i, int j) {
    const int first = place_of(place, i * kStride + j % kStride, j / kStride, 0);
    float total = 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) total += shared<float>(first + 4 * k * (kPitch + 1));
    return total;
  }
};

// The sum of one tap over a warp's tiles of some steps, again.
template <typename T>
__device__ __noinline__ float sum_by_products(const Batch& a, int filter, Steps steps, int first_tile, int tap) {
  float sum = 0;
  for (int number = steps.first; number < steps.last; ++number) {
    const Step s = step_of(a, number);
    const auto is_mine = [&](int r, int v) {
      return ((r - s.row) / kRows * a.strips + v / kColumns) % a.share == first_tile;
    };
    sum += sum_inside<T>(a, a.source, a.grad, filter, tap, s.image, s.images, s.row, s.rows, is_mine);
  }
  return sum_of_lanes(sum);
}

// Sums up the diagonals, in shared memory from `place` on. `deliver`: takes the sum of each tap, or the bias.
template <typename T, class Sums, typename Deliver>
__device__ void finish(const Sums& sums, const Batch& a, int place, int filter, Steps steps, int first_tile,
                       Deliver deliver) {
  const int lane = threadIdx.x % 32, taps = a.taps();
  sums.put(place);
  __syncwarp();
  for (int begin = 0; begin < taps; begin += 32) {
    const int tap = begin + lane;
    float total = 0;
    if (tap < taps) total = Sums::tap(place, tap / a.kernel_w * a.dilation_h, tap % a.kernel_w * a.dilation_w);
    uint32_t again = __ballot_sync(~0u, !is_finite(total));
    for (; again; again &= again - 1) {
      const int which = begin + __ffs(again) - 1;
      const float exact = sum_by_products<T>(a, filter, steps, first_tile, which);
      if (tap == which) total = exact;
    }
    if (tap < taps) deliver(tap, total);
  }
  if (!a.result.with_bias()) return;
  const float total = total_of_bias(sums.bias[0], sums.bias[1]);
  if (lane == 0) deliver(taps, total);
}

template <typename T, int kKernelH, int kStride, int kBlocks>
__global__ void __launch_bounds__(32 * kMaxWarps + 32, kBlocks)
    batch_grad_weight_nchw(const __grid_constant__ Batch a) {
  const bool cluster = a.totals > 0;
  const int group = cluster ? blockIdx.x / a.splits : blockIdx.x % a.groups;
  const int split = cluster ? blockIdx.x % a.splits : blockIdx.x / a.groups;
  const int first_filter = group * a.block_filters, filters = min(a.block_filters, a.filters - first_filter);
  const Totals totals{a.totals, filters, a.slots()};
  if (cluster) enter_cluster(split == 0, kTotalsBarrier, 4 * a.splits * filters * totals.slots);
  const Copier copier(a.bulk, true);
  copier.init();
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  let_next_kernel_start();
  wait_for_kernel_before();
  __syncthreads();
  const int first_channel = first_filter / a.multiplier;
  const int channels = (first_filter + filters - 1) / a.multiplier - first_channel + 1;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int filter = warp / a.share, first_tile = warp % a.share;
  const Steps steps((a.images + kImages - 1) / kImages * a.bands, a.splits, split);
  const auto [first, last] = steps;
  const int source_row = 2 * a.width, grad_row = 2 * a.out_width;
  const int source_plane = a.height * source_row, grad_plane = a.out_height * grad_row;
  // Where the block's part of an image begins. Whole planes follow each other, and bands are of one plane.
  const auto source_offset = [&](const Step& s) {
    return first_channel * int64_t{source_plane} + s.source_begin * source_row;
  };
  const auto grad_offset = [&](const Step& s) { return first_filter * int64_t{grad_plane} + s.row * grad_row; };
  const auto load = [&](int number, int stage) {
    const Step s = step_of(a, number);
    const int source_bytes = (channels - 1) * source_plane + (s.source_end - s.source_begin) * source_row;
    const int grad_bytes = (filters - 1) * grad_plane + s.rows * grad_row, place = stage * a.stage_bytes;
    if (copier.bulk) {
      const auto& v = lane < kImages ? a.source : a.grad;
      load_run(v, place, lane % kImages, s.image, s.images, lane < kImages ? source_offset(s) : grad_offset(s),
               lane < kImages ? source_bytes : grad_bytes, Barriers::full(stage));
      __syncwarp();
      if (lane == 0) arrive(Barriers::full(stage));
    } else {
      load_runs(a.source, place, s.image, s.images, source_offset(s), source_bytes);
      load_runs(a.grad, place, s.image, s.images, grad_offset(s), grad_bytes);
      commit_copies();
    }
  };

  Products<T, kKernelH, kStride> sums;
  if (!copier.is_worker()) {
    for (int number = first; number < last; ++number) {
      const int turn = (number - first) / 2, stage = (number - first) % 2;
      if (turn > 0) wait(Barriers::done(stage), (turn - 1) & 1);
      load(number, stage);
    }
  } else {
    if (!copier.bulk && first < last) load(first, 0);
    for (int number = first; number < last; ++number) {
      const int turn = (number - first) / 2, stage = (number - first) % 2;
      if (copier.bulk) {
        wait(Barriers::full(stage), turn & 1);
      } else {
        wait_copies<0>();
        __syncthreads();
        if (number + 1 < last) load(number + 1, 1 - stage);
      }
      const Step s = step_of(a, number);
      const int tiles = filter < filters ? (s.rows + kRows - 1) / kRows * a.strips : 0;
      const int channel = (first_filter + filter) / a.multiplier - first_channel;
      sums.place(a, s, stage * a.stage_bytes, source_offset(s), grad_offset(s), channel, filter);
      for (int tile = first_tile; tile < tiles; tile += a.share) {
        uint32_t segment = tile;
        const int v0 = static_cast<int>(a.by_strips.split(segment)) * kColumns, r0 = static_cast<int>(segment) * kRows;
        const int y0 = (s.row + r0) * kStride - a.padding_h;
        const int begin = max(-y0, 0), end = min(s.source_end - y0, 32);
        sums.add(a, s, v0, r0, end > begin ? ~0u >> (32 - end) & ~0u << begin : 0);
      }
      if (copier.bulk) copier.finish(stage);
    }
  }
  __syncthreads();
  if (cluster) meet_cluster();
  // Sums of warps that share a filter are added before they are sent.
  const auto place_of_warp = [&](int warp, int slot) {
    return totals.of(a.splits, 0, 0) + 4 * (warp * totals.slots + slot);
  };
  if (copier.is_worker() && filter < filters)
    finish<T>(sums, a, kHead + warp * sums.kBytes, first_filter + filter, steps, first_tile,
              [&](int slot, float total) {
                if (!cluster)
                  a.result.put<T>(first_filter + filter, split * a.share + first_tile, slot, total);
                else if (a.share == 1)
                  totals.send(split, filter, slot, total);
                else
                  shared<float>(place_of_warp(warp, slot)) = total;
              });
  if (!cluster) return;
  if (a.share > 1) {
    __syncthreads();
    for (int at = threadIdx.x; at < filters * totals.slots; at += blockDim.x) {
      const int filter = at / totals.slots, slot = at % totals.slots;
      float total = 0;
      for (int w = 0; w < a.share; ++w) total += shared<float>(place_of_warp(filter * a.share + w, slot));
      totals.send(split, filter, slot, total);
    }
  }
  if (split == 0) totals.put<T>(a.result, a.splits, first_filter);
}

// Whole planes of as many channels as leave room for another block, or bands of rows of one channel. Returns the bytes
// of shared memory.
int64_t lay_out(Batch& a, int64_t shared_per_multiprocessor) {
  const int64_t source_row = 2 * a.width, grad_row = 2 * a.out_width;
  const int extent = (a.kernel_h - 1) * a.dilation_h + 1;
  const auto stage = [&](int filters, int64_t source_rows, int64_t rows) {
    const int64_t channels = a.multiplier == 1 || filters == 1 ? filters : (filters - 1) / a.multiplier + 2;
    a.source.pitch = slot_pitch(channels * source_rows * source_row),
    a.grad.pitch = slot_pitch(filters * rows * grad_row);
    a.source.memory = kHead, a.grad.memory = kHead + kImages * a.source.pitch;
    return int64_t{kImages} * (a.source.pitch + a.grad.pitch);
  };
  const int64_t room = shared_per_multiprocessor / 4 - 1024;  // two stages of two blocks
  a.strips = static_cast<int>(ceil_div(a.out_width, kColumns));
  a.block_filters = 1, a.chunk_rows = a.out_height;
  const int64_t plane_tiles = ceil_div(a.out_height, kRows) * a.strips;
  while (2 * a.block_filters <= kMaxWarps && a.block_filters < a.filters &&
         stage(2 * a.block_filters, a.height, a.out_height) <= room)
    a.block_filters *= 2;
  int64_t bytes = stage(a.block_filters, a.height, a.out_height);
  for (int64_t rows = ceil_div(a.out_height, kRows) * kRows; bytes > room && a.chunk_rows > kRows;) {
    rows -= kRows;
    a.chunk_rows = static_cast<int>(rows);
    bytes = stage(1, std::min<int64_t>((rows - 1) * a.stride + extent, a.height), rows);
  }
  a.bands = static_cast<int>(ceil_div(a.out_height, a.chunk_rows));
  // As many warps for a filter as keep all of them busy.
  const int64_t tiles = a.bands > 1 ? a.chunk_rows / kRows * a.strips : plane_tiles;
  a.share = 1;
  double busy = 0;
  for (int share = 1; share <= kMaxWarps / a.block_filters; ++share) {
    const double now = static_cast<double>(tiles) / ceil_div(tiles, share);
    if (now > busy * 1.1) busy = now, a.share = share;
  }
  a.stage_bytes = static_cast<int>(bytes);
  a.groups = static_cast<int>(ceil_div(a.filters, a.block_filters));
  a.by_bands = Divider(a.bands), a.by_strips = Divider(a.strips);
  return kHead + 2 * bytes + kTail;
}

template <typename T, int kKernelH, int kStride, int kBlocks>
void launch_kernel(const Problem& p, Batch a, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = batch_grad_weight_nchw<T, kKernelH, kStride, kBlocks>;
  const Device& device = current_device();
  a.bulk = a.bulk && device.capability >= 90;
  const int64_t room = lay_out(a, device.shared_per_multiprocessor);
  const int threads = 32 * a.share * a.block_filters + (a.bulk ? 32 : 0);
  const int64_t bytes =
      std::max<int64_t>(room, kHead + a.share * a.block_filters * Products<T, kKernelH, kStride>::kBytes);
  const int64_t steps = ceil_div(a.images, kImages) * a.bands;
  const int64_t slots = p.taps() + (p.bias != nullptr);
  const int64_t totals = 4 * (2 + (a.share > 1 ? a.share : 0)) * a.block_filters * slots;
  static thread_local Decisions<7, Splits> decisions;
  const auto [splits, cluster] = decisions({device.id, steps, a.groups, threads, bytes, a.bulk, totals}, [&] {
    return split_steps(kernel, device, steps, a.groups, threads, bytes, a.bulk ? totals : 0);
  });
  a.splits = splits;
  const int64_t parts = int64_t{a.splits} * a.share;
  if (cluster) a.totals = static_cast<int>(bytes);
  a.result = weight_sums(p, cluster ? 1 : parts, allocate);
  launch_early(kernel, a, int64_t{a.groups} * a.splits, threads, stream,
               {.cluster = cluster ? a.splits : 1, .shared_bytes = bytes + (cluster ? totals : 0)});
  check_launch("batch_grad_weight_nchw");
  launch_add_partial_sums(p, a.result, parts, stream);
}

}  // namespace

void launch_batch_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  if (launch_flat_grad_weight_nchw(p, bulk, allocate, stream) ||
      launch_stride2_grad_weight_nchw(p, bulk, allocate, stream) ||
      launch_aligned_grad_weight_nchw(p, bulk, allocate, stream) ||
      launch_padded_grad_weight_nchw(p, bulk, allocate, stream))
    return;
  Batch a{};
  a.take(p);
  a.source.base = static_cast<char*>(p.input.data), a.source.image_bytes = 2 * p.input.stride[0];
  a.grad.base = static_cast<char*>(p.output.data), a.grad.image_bytes = 2 * p.output.stride[0];
  a.bulk = bulk;
  const int rows = (a.kernel_h - 1) * a.dilation_h + 1;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (a.stride == 2) return launch_kernel<T, 7, 2, 1>(p, a, allocate, stream);
      if (rows <= 5) return launch_kernel<T, 5, 1, 3>(p, a, allocate, stream);
      if (rows <= 7) return launch_kernel<T, 7, 1, 3>(p, a, allocate, stream);
      launch_kernel<T, 9, 1, 2>(p, a, allocate, stream);
    }
  });
}

}  // namespace dwconv
