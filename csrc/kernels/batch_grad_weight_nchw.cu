// grad_weight (and the bias gradient) of small kernels in 16 bits on contiguous planes of many images, on tensor cores.
//
// Images are what is summed over: with A[m][n] = input[n][y][x + m] and B[n][k] = gradient[n][r][x + padding + k], the
// product has, for row y + padding - r of the kernel, the sums for its columns m - k on the diagonals: of 16 images, of
// 8 columns of the gradient and the 16 columns of the input that their windows meet. Whichever columns these are, the
// diagonals are the same, so a warp keeps one product for each row of the kernel. It works on tiles of 7 rows and 8
// columns, whose gradients stay in registers while the rows of the input go by. At stride 2 there is a product for the
// even columns of the input and one for the odd ones.
//
// A block has some channels of whole planes, or one of bands of rows, of 16 images at a time (image_runs.cuh), and
// works through a part of the images. Diagonals are summed up at the end, in a fixed order: parts by the first one of a
// cluster of two blocks, or by a second kernel.
//
// What lies beside the image is made zero, which is exact unless the other factor is Inf or NaN. So sums that are
// finite are right, and the others are taken again, product by product.
//
// There are other ways for planes of few pixels (flat_grad_weight_nchw.cu), for longer rows of whole units of 16 bytes
// (aligned_grad_weight_nchw.cu), and for rows of whole words (padded_grad_weight_nchw.cu).
#include <algorithm>
#include <cmath>

#include "aligned_grad_weight_nchw.h"
#include "batch_grad_weight_nchw.cuh"
#include "cluster_sums.cuh"
#include "flat_grad_weight_nchw.h"
#include "launch.h"
#include "padded_grad_weight_nchw.h"

namespace dwconv {
namespace {

// The sum of one tap over a warp's tiles of the block's part of the images, of products inside the image only.
template <typename T>
__device__ __noinline__ float sum_by_products(const Batch& a, int filter, int first, int last, int first_tile,
                                              int tap) {
  const int i = tap / a.kernel_w * a.dilation_h - a.padding_h, j = tap % a.kernel_w * a.dilation_w - a.padding_w;
  float sum = 0;
  for (int number = first; number < last; ++number) {
    const Step s = step_of(a, number);
    const int tiles = (s.rows + kRows - 1) / kRows * a.strips;
    for (int tile = first_tile; tile < tiles; tile += a.share)
      for (int at = threadIdx.x % 32; at < kImages * kRows * kColumns; at += 32) {
        const int n = at / (kRows * kColumns), r = tile / a.strips * kRows + at / kColumns % kRows;
        const int v = tile % a.strips * kColumns + at % kColumns, y = (s.row + r) * a.stride + i, x = v * a.stride + j;
        if (n >= s.images || r >= s.rows || v >= a.out_width || y < 0 || y >= a.height || x < 0 || x >= a.width)
          continue;
        const auto* from = reinterpret_cast<const T*>(a.source.base + (s.image + n) * a.source.image_bytes);
        const auto* grad = reinterpret_cast<const T*>(a.grad.base + (s.image + n) * a.grad.image_bytes);
        sum = fmaf(widen(from[(filter / a.multiplier * a.height + y) * a.width + x]),
                   widen(grad[(filter * a.out_height + s.row + r) * a.out_width + v]), sum);
      }
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// Sums up the diagonals, in shared memory from `place` on. `deliver`: takes the sum of each tap, or the bias.
template <typename T, class Sums, typename Deliver>
__device__ void finish(const Sums& sums, const Batch& a, int place, int filter, int first, int last, int first_tile,
                       Deliver deliver) {
  const int lane = threadIdx.x % 32, taps = a.kernel_h * a.kernel_w;
  sums.put(a, place);
  __syncwarp();
  for (int begin = 0; begin < taps; begin += 32) {
    const int tap = begin + lane;
    float total = 0;
    if (tap < taps) total = Sums::tap(a, place, tap / a.kernel_w * a.dilation_h, tap % a.kernel_w * a.dilation_w);
    uint32_t again = __ballot_sync(~0u, !is_finite(total));
    for (; again; again &= again - 1) {
      const int which = begin + __ffs(again) - 1;
      const float exact = sum_by_products<T>(a, filter, first, last, first_tile, which);
      if (tap == which) total = exact;
    }
    if (tap < taps) deliver(tap, total);
  }
  if (!a.result.with_bias()) return;
  float total = sums.bias[0] + sums.bias[1];  // every row of the product is the same
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  if (lane == 0) deliver(taps, total);
}

template <typename T, class Sums, int kStride, int kBlocks>
__global__ void __launch_bounds__(32 * Sums::kWarps + 32, kBlocks)
    batch_grad_weight_nchw(const __grid_constant__ Batch a) {
  const bool cluster = a.totals > 0;
  const int group = cluster ? blockIdx.x / a.splits : blockIdx.x % a.groups;
  const int split = cluster ? blockIdx.x % a.splits : blockIdx.x / a.groups;
  const int first_filter = group * a.block_filters, filters = min(a.block_filters, a.filters - first_filter);
  const int slots = a.kernel_h * a.kernel_w + a.result.with_bias();
  if (cluster) enter_cluster(split == 0, kTotalsBarrier, 4 * a.splits * filters * slots);
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
  const int steps = (a.images + kImages - 1) / kImages * a.bands;
  const int whole = steps / a.splits, more = steps % a.splits;
  const int first = split * whole + min(split, more), last = first + whole + (split < more);
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

  Sums sums;
  const int scratch = kHead + 2 * a.stage_bytes + kTail + warp * Sums::kScratch;
  if constexpr (Sums::kPlanes)
    if (copier.is_worker()) Sums::clear(scratch);
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
      if constexpr (Sums::kPlanes) {
        if (tiles > 0)
          sums.place(a, s, stage * a.stage_bytes, source_offset(s), grad_offset(s), channel, filter, scratch);
        __syncwarp();
        if (copier.bulk) copier.finish(stage);
        if (tiles > 0) sums.add(a, scratch);
        continue;
      } else {
        sums.place(a, s, stage * a.stage_bytes, source_offset(s), grad_offset(s), channel, filter);
        for (int tile = first_tile; tile < tiles; tile += a.share) {
          uint32_t segment = tile;
          const int v0 = static_cast<int>(a.by_strips.split(segment)) * kColumns,
                    r0 = static_cast<int>(segment) * kRows;
          const int y0 = (s.row + r0) * kStride - a.padding_h;
          const int begin = max(-y0, 0), end = min(s.source_end - y0, 32);
          sums.add(a, s, v0, r0, end > begin ? ~0u >> (32 - end) & ~0u << begin : 0);
        }
        if (copier.bulk) copier.finish(stage);
      }
    }
  }
  __syncthreads();
  if (cluster) meet_cluster();
  // Where sums are sent, and before that those of warps that share a filter.
  const auto place_of = [&](int split, int filter, int slot) {
    return a.totals + 4 * ((split * filters + filter) * slots + slot);
  };
  const auto place_of_warp = [&](int warp, int slot) { return place_of(a.splits, 0, 0) + 4 * (warp * slots + slot); };
  if (copier.is_worker() && filter < filters)
    finish<T>(sums, a, kHead + warp * Sums::kBytes, first_filter + filter, first, last, first_tile,
              [&](int slot, float total) {
                if (!cluster)
                  a.result.put<T>(first_filter + filter, split * a.share + first_tile, slot, total);
                else if (a.share == 1)
                  send_to_first(place_of(split, filter, slot), total, kTotalsBarrier);
                else
                  shared<float>(place_of_warp(warp, slot)) = total;
              });
  if (!cluster) return;
  if (a.share > 1) {
    __syncthreads();
    for (int at = threadIdx.x; at < filters * slots; at += blockDim.x) {
      const int filter = at / slots, slot = at % slots;
      float total = 0;
      for (int w = 0; w < a.share; ++w) total += shared<float>(place_of_warp(filter * a.share + w, slot));
      send_to_first(place_of(split, filter, slot), total, kTotalsBarrier);
    }
  }
  if (split > 0) return;
  wait(kTotalsBarrier, 0);
  for (int at = threadIdx.x; at < filters * slots; at += blockDim.x) {
    const int filter = at / slots, slot = at % slots;
    float total = 0;
    for (int part = 0; part < a.splits; ++part) total += shared<float>(place_of(part, filter, slot));
    a.result.put<T>(first_filter + filter, 0, slot, total);
  }
}

// Whole planes of as many channels as leave room for another block, or bands of rows of one channel. Returns the bytes
// of shared memory.
int64_t lay_out(Batch& a, int max_warps, int64_t shared_per_multiprocessor) {
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
  while (2 * a.block_filters <= max_warps && a.block_filters < a.filters &&
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
  for (int share = 1; share <= max_warps / a.block_filters; ++share) {
    const double now = static_cast<double>(tiles) / ceil_div(tiles, share);
    if (now > busy * 1.1) busy = now, a.share = share;
  }
  a.stage_bytes = static_cast<int>(bytes);
  a.groups = static_cast<int>(ceil_div(a.filters, a.block_filters));
  a.by_bands = Divider(a.bands), a.by_strips = Divider(a.strips);
  return kHead + 2 * bytes + kTail;
}

template <typename T, class Sums, int kStride, int kBlocks>
void launch_kernel(const Problem& p, Batch a, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = batch_grad_weight_nchw<T, Sums, kStride, kBlocks>;
  const Device& device = current_device();
  a.bulk = a.bulk && device.capability >= 90;
  int64_t room = lay_out(a, Sums::kWarps, device.shared_per_multiprocessor);
  if (Sums::kPlanes) a.share = 1;  // a warp works for all of a plane
  room += a.share * a.block_filters * Sums::kScratch;
  const int threads = 32 * a.share * a.block_filters + (a.bulk ? 32 : 0);
  const int64_t bytes = std::max<int64_t>(room, kHead + a.share * a.block_filters * Sums::kBytes);
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
  Batch a{};
  a.source.base = static_cast<char*>(p.input.data), a.source.image_bytes = 2 * p.input.stride[0];
  a.grad.base = static_cast<char*>(p.output.data), a.grad.image_bytes = 2 * p.output.stride[0];
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier), a.stride = static_cast<int>(p.stride_h);
  a.bulk = bulk;
  const int rows = (a.kernel_h - 1) * a.dilation_h + 1, columns = (a.kernel_w - 1) * a.dilation_w + 1;
  // All rows of the input begin at an even place, or all at an odd one.
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(p.input.data) / 2 + p.padding_w) & 1;
  const bool pairs =
      a.width % 2 == 0 && (p.input.stride[0] % 2 == 0 || p.batch == 1) && (columns - 1 + shift) / a.stride <= kColumns;
  a.shift = pairs ? shift : 0;
  // Whether all rows begin with 16 bytes, and windows reach no further than 8 columns beside a tile.
  const auto begins_with_units = [&](const View& view, int width) {
    return 2 * width % kUnit == 0 && reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 &&
           (p.batch == 1 || 2 * view.stride[0] % kUnit == 0);
  };
  const bool units = begins_with_units(p.input, a.width) && begins_with_units(p.output, a.out_width);
  const bool aligned = units && a.stride == 1 && a.padding_w <= kColumns && columns - 1 - a.padding_w <= kColumns;
  constexpr int kSide = 8;
  const bool small = a.stride == 1 && std::max({a.height, a.width, a.out_height, a.out_width}) <= kSide;
  const bool column = a.kernel_w == 1 && a.stride == 1;
  if (small && launch_flat_grad_weight_nchw(p, bulk, allocate, stream)) return;
  if (!small && launch_aligned_grad_weight_nchw(p, bulk, allocate, stream)) return;
  if ((!units || column) && !small && launch_padded_grad_weight_nchw(p, bulk, allocate, stream)) return;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (small) {
        // How far rows that are multiplied are from each other.
        constexpr int kNear = 3;
        if (a.padding_h <= kNear && rows - 1 - a.padding_h <= kNear)
          return launch_kernel<T, SmallPlanes<T, -kNear - 1, 2 * kNear + 2>, 1, 2>(p, a, allocate, stream);
        return launch_kernel<T, SmallPlanes<T, 1 - kSide, 2 * kSide - 2>, 1, 1>(p, a, allocate, stream);
      }
      const auto go = [&](auto kernel_h) {
        constexpr int kKernelH = decltype(kernel_h)::value;
        if (aligned) return launch_kernel<T, AlignedProducts<T, kKernelH>, 1, 2>(p, a, allocate, stream);
        if (a.stride == 1)
          return pairs ? launch_kernel<T, Products<T, kKernelH, 1, true>, 1, 3>(p, a, allocate, stream)
                       : launch_kernel<T, Products<T, kKernelH, 1, false>, 1, 3>(p, a, allocate, stream);
        return pairs ? launch_kernel<T, Products<T, kKernelH, 2, true>, 2, 1>(p, a, allocate, stream)
                     : launch_kernel<T, Products<T, kKernelH, 2, false>, 2, 1>(p, a, allocate, stream);
      };
      if (aligned && rows == 1) return launch_kernel<T, AlignedProducts<T, 1>, 1, 2>(p, a, allocate, stream);
      if (rows <= 3) return go(std::integral_constant<int, 3>{});
      if (rows <= 5) return go(std::integral_constant<int, 5>{});
      if (rows <= 7) return go(std::integral_constant<int, 7>{});
      return pairs ? launch_kernel<T, Products<T, 9, 1, true>, 1, 2>(p, a, allocate, stream)
                   : launch_kernel<T, Products<T, 9, 1, false>, 1, 2>(p, a, allocate, stream);
    }
  });
}

}  // namespace dwconv
