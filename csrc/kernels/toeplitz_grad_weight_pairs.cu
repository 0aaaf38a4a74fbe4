// grad_weight (and the bias gradient) at stride 2 of two filters a channel, of kernels of 4 to 7 rows and up to 8
// columns, in 16 bits on channels_last arrays, on tensor cores, from sm_90 on.
//
// A tile is 4 columns of the gradient of both filters, across, and the 16 columns of the input that they meet, down:
// first every other one from the first tap on, then those between. For a channel, a row i of the kernel, and filter f,
// a product A[m][k] B[k][n] sums input[2 y + i][2 x + m] gradient[f][y][x + n] over 16 places k, each an image, a row y
// and 4 columns from x on; the sums for column 2 j of the kernel are on the diagonal m - n = j of the first half, those
// for column 2 j + 1 on the same one of the second half. No transposition is needed (see
// toeplitz_grad_weight_channels_last.cu).
//
// Rows march through a ring in shared memory: a step brings a row of the gradient and the two rows of the input that
// meet it with the first two rows of its window, of a few images side by side, as boxes: one has every other column of
// the input, another one those between. Warps take turns to begin the copies. The rows of the gradient whose windows
// are under way stay in registers. The rows of all images are cut into splits anywhere, whose sums are added up by a
// second kernel. Every sum has a fixed order, the same on every run.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <algorithm>

#include "overlap.cuh"
#include "partial_sums.h"
#include "shares.cuh"
#include "stream.cuh"
#include "toeplitz_grad_weight_channels_last.cuh"
#include "toeplitz_grad_weight_pairs.h"

namespace dwconv {
namespace {

constexpr int kStride = 2, kFilters = 2;        // of a channel
constexpr int kMostRows = 7, kMostColumns = 8;  // of the kernel
constexpr int kPlaces = 16, kTile = 4;          // columns of the gradient
constexpr int kFirst = 1024;                    // where the ring begins in shared memory

// A stage of the ring, whose rows have 1 << shift tiles. `narrow`: what the gradient meets of every other column of the
// input are no more columns than its own tiles have.
template <int shift, bool narrow>
struct Stage {
  static constexpr int kTiles = 1 << shift, kImages = kPlaces / kTiles, kColumns = kTile * kTiles;
  static constexpr int kSourceColumns = narrow ? kColumns : (kColumns + kTile + 7) / 8 * 8;  // in a box
  static constexpr int kPixel = 2 * kSlab, kGradPixel = kFilters * kPixel;
  static constexpr int kSourceRow = kSourceColumns * kPixel, kSource = kImages * kStride * kSourceRow;  // bytes
  static constexpr int kGrad = kImages * kColumns * kGradPixel, kBytes = 2 * kSource + kGrad;
  static_assert(kSource % kFirst == 0 && kGrad % kFirst == 0);
};

struct Pairs {
  CUtensorMap even, odd, grad;  // of the columns that even columns of the kernel meet with, and odd ones
  const char *source_base, *grad_base;
  int64_t source_image, source_row, source_pixel, grad_image, grad_row, grad_pixel;  // bytes from one to the next
  float* partial;  // [split][tap, or bias behind the last tap][filter]
  int height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w;
  int images, channels;
  int even_column, odd_column;  // of the maps, the first ones that are met
  int groups;                   // of images side by side
  int period, behind;           // steps from one group to the next, and those that windows reach behind the last one
  int rows;                     // steps of all groups in all spans
  int splits, depth;
  Shares shares;
  bool with_bias;
  Divider by_slabs, by_period, by_groups;
};

using Steps = RowSteps<Pairs>;

// The sum of one tap, or of the bias behind the last one, over a split, of what is inside the image only.
template <typename T, class Stage>
__device__ __noinline__ float sum_by_products(const Pairs& a, int split, int filter, int slot) {
  const bool is_bias = slot == a.kernel_h * a.kernel_w;
  const int i = is_bias ? 0 : slot / a.kernel_w - a.padding_h, j = is_bias ? 0 : slot % a.kernel_w - a.padding_w;
  float sum = 0;
  for (Steps at(a, split); at.left > 0; at.next(a)) {
    const int y = at.row * kStride + i, first = at.group * Stage::kImages, column = at.span * Stage::kColumns;
    if (at.row >= a.out_height || (!is_bias && (y < 0 || y >= a.height))) continue;
    for (int image = first; image < min(first + Stage::kImages, a.images); ++image) {
      const char* g = a.grad_base + image * a.grad_image + at.row * a.grad_row + filter * sizeof(T);
      const char* x = a.source_base + image * a.source_image + y * a.source_row + filter / kFilters * sizeof(T);
      for (int v = column; v < min(column + Stage::kColumns, a.out_width); ++v) {
        const float gradient = widen(*reinterpret_cast<const T*>(g + v * a.grad_pixel));
        const int k = v * kStride + j;
        if (is_bias)
          sum += gradient;
        else if (k >= 0 && k < a.width)
          sum = fmaf(widen(*reinterpret_cast<const T*>(x + k * a.source_pixel)), gradient, sum);
      }
    }
  }
  return sum;
}

template <typename T, class Stage>
__global__ void __launch_bounds__(kThreads, 1) toeplitz_grad_weight_pairs(const __grid_constant__ Pairs a) {
#if __CUDA_ARCH__ >= 900
  constexpr int kHeld = (kMostRows - 1) / kStride + 1;  // rows of the gradient whose windows are under way
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  const int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4;
  StageBarriers::init(1, kWarps, true);
  if (threadIdx.x == 0) prefetch(a.even), prefetch(a.odd), prefetch(a.grad);
  before_bulk_copies();
  Steps at(a, split), next(a, split);
  __syncthreads();
  // The first of the two rows of the input that a step brings, and whether one of them at least is in the image.
  const auto source_row = [&](const Steps& step) { return step.row * kStride - a.padding_h; };
  const auto has_source = [&](const Steps& step) {
    return source_row(step) + kStride > 0 && source_row(step) < a.height;
  };
  const auto load = [&](int stage) {
    const int to = kFirst + stage * Stage::kBytes, barrier = StageBarriers::full(stage);
    const int image = next.group * Stage::kImages, column = next.span * Stage::kColumns;
    if (has_source(next)) {
      expect_bytes(barrier, 2 * Stage::kSource);
      copy_box(to, a.even, slab * kSlab, a.even_column + column, source_row(next), image, barrier);
      copy_box(to + Stage::kSource, a.odd, slab * kSlab, a.odd_column + column, source_row(next), image, barrier);
    }
    if (next.has_grad(a)) {
      expect_bytes(barrier, Stage::kGrad);
      copy_box(to + 2 * Stage::kSource, a.grad, slab * kSlab * kFilters, column, next.row, image, barrier);
    }
    arrive(barrier);
  };
  settle_and_wait_for_kernel_before(a.depth);
  const int ahead = a.depth - 2;
#pragma unroll 1
  for (int step = 0; step < ahead && next.count > 0; ++step, next.next(a))
    if (threadIdx.x == 0) load(step);

  // Sums of columns m = lane / 4 of each half of the input by columns n = lane % 4 * 2 and n + 1 of both filters.
  float sum[kMostRows][kQuad][4] = {}, bias[4] = {};
  uint32_t g[kHeld][kQuad][2] = {};
  uint32_t source_at[4], grad_at[4];  // the thread's pixels, of four places
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int number = place + 4 * k, tile = number % Stage::kTiles, image = number / Stage::kTiles;
    const int x = min(tile * kTile + row, Stage::kSourceColumns - 1);  // beyond meet no gradients
    const int v = image * Stage::kColumns + tile * kTile + row % kTile;
    source_at[k] = kept(shared_address(kFirst) + image * kStride * Stage::kSourceRow + x * Stage::kPixel +
                        (warp / 2 ^ x / 2 % 4) * kUnit + warp % 2 * kQuad * 2);
    grad_at[k] = kept(shared_address(kFirst) + 2 * Stage::kSource + v * Stage::kGradPixel + (warp ^ v % 8) * kUnit);
  }
  const auto load_four = [](uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
  };
  const uint32_t of_filter = kept(row < kTile ? 0x5410 : 0x7632);
  const StageAddresses barriers{kept(shared_address(0))};
  int stage = 0, free_stage = ahead, turn = warp;  // of the warps to load
  uint32_t parity = 0, free_parity = 1;
  while (at.count > 0) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {  // the row of the gradient that came `age` steps before is g[(u - age) mod kHeld]
      if (at.count == 0) break;
      wait_at(barriers.full(stage), parity);
      const uint32_t begin = stage * Stage::kBytes;
      if (at.row == 0)
#pragma unroll
        for (int r = 0; r < kHeld; ++r)
#pragma unroll
          for (int c = 0; c < kQuad; ++c) g[r][c][0] = g[r][c][1] = 0;
      if (at.has_grad(a)) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 low = load_four(grad_at[2 * h] + begin), high = load_four(grad_at[2 * h + 1] + begin);
          g[u][0][h] = __byte_perm(low.x, high.x, of_filter), g[u][1][h] = __byte_perm(low.y, high.y, of_filter);
          g[u][2][h] = __byte_perm(low.z, high.z, of_filter), g[u][3][h] = __byte_perm(low.w, high.w, of_filter);
        }
      } else {
#pragma unroll
        for (int c = 0; c < kQuad; ++c) g[u][c][0] = g[u][c][1] = 0;
      }
      uint32_t x[kStride][4][kQuad];
      const bool multiplies = has_source(at);
      if (multiplies)
#pragma unroll
        for (int e = 0; e < kStride; ++e)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
              const uint32_t from = begin + e * Stage::kSourceRow + odd * Stage::kSource;
              pair_up(load_at(source_at[2 * h] + from), load_at(source_at[2 * h + 1] + from), x[e][2 * h + odd]);
            }
      arrive_together_at(barriers.done(stage), lane == 0);
      if (next.count > 0) {
        if (turn == 0 && lane == 0) {
          wait_at(barriers.done(free_stage), free_parity);
          load(free_stage);
        }
        next.next(a);
        if (++free_stage == a.depth) free_stage = 0, free_parity ^= 1;
      }
      turn = (turn - 1) & (kWarps - 1);
      if (++stage == a.depth) stage = 0, parity ^= 1;
      at.next(a);
      if (multiplies)
#pragma unroll
        for (int i = 0; i < kMostRows; ++i)
#pragma unroll
          for (int c = 0; c < kQuad; ++c) {
            const int e = i % kStride;
            float (&to)[4] = sum[i][c];
            multiply(to, to, {x[e][0][c], x[e][1][c], x[e][2][c], x[e][3][c]}, g[(u - i / kStride + kHeld) % kHeld][c],
                     T{});
          }
      if (a.with_bias)  // channel c in row c
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t one = row == c ? ones(T{}) : 0;
          multiply(bias, bias, {one, 0, one, 0}, g[u][c], T{});
        }
    }
  }
  __syncthreads();

  // The ring has served: its memory takes the products of all warps, and each adds up its diagonals.
  constexpr int kProduct = 16 * 8 + 8;  // floats, and a gap: so channels are in different banks
  const int mine = kFirst + warp * (kMostRows * kQuad + 1) * kProduct * 4, taps = a.kernel_h * a.kernel_w;
  const auto product = [&](int number, int m, int n) { return mine + (number * kProduct + m * 8 + n) * 4; };
#pragma unroll
  for (int i = 0; i < kMostRows; ++i)
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      const float (&of)[4] = sum[i][c];
      shared<float2>(product(i * kQuad + c, row, 2 * place)) = {of[0], of[1]};
      shared<float2>(product(i * kQuad + c, row + 8, 2 * place)) = {of[2], of[3]};
    }
  shared<float2>(product(kMostRows * kQuad, row, 2 * place)) = {bias[0], bias[1]};
  __syncwarp();
  const int in_warp = lane % 8, c = in_warp / kFilters, n = in_warp % kFilters * kTile;
  const int filters = a.channels * kFilters, filter = (slab * kSlab + warp * kQuad) * kFilters + in_warp;
  if (filter >= filters) return;
  float* partial = a.partial + static_cast<int64_t>(split) * (taps + a.with_bias) * filters + filter;
  int i = 0, j = lane / 8;
#pragma unroll 1
  for (int tap = lane / 8; tap < taps + a.with_bias; tap += 4, j += 4) {
    for (; j >= a.kernel_w; j -= a.kernel_w) ++i;
    float total = 0;
#pragma unroll
    for (int v = 0; v < kTile; ++v)
      total += shared<float>(tap < taps ? product(i * kQuad + c, j % 2 * 8 + j / 2 + v, n + v)
                                        : product(kMostRows * kQuad, c, n + v));
    if (!is_finite(total)) total = sum_by_products<T, Stage>(a, split, filter, tap);
    partial[static_cast<int64_t>(tap) * filters] = total;
  }
#endif
}

// Returns false, and launches nothing, where boxes cannot be described.
template <typename T, class Stage>
bool launch(const Problem& p, Pairs a, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_pairs<T, Stage>;
  if (!can_overlap(kernel)) return false;
  const Device& device = current_device();
  const int64_t spans = ceil_div(a.out_width, Stage::kColumns), slabs = ceil_div(a.channels, kSlab);
  a.groups = static_cast<int>(ceil_div(a.images, Stage::kImages));
  a.rows = static_cast<int>(spans * a.groups * a.period);
  constexpr int64_t kLongest = 1 << 10;  // steps, of 16 products each: longer sums lose digits
  const int64_t most = std::clamp<int64_t>(device.multiprocessors / slabs, ceil_div(a.rows, kLongest), a.rows);
  a.splits = static_cast<int>(ceil_div(a.rows, ceil_div(a.rows, most)));  // no more than make the longest one shorter
  a.shares = Shares(a.rows, a.splits);
  a.by_slabs = Divider(slabs), a.by_groups = Divider(a.groups);
  a.depth = static_cast<int>(std::min<int64_t>((device.shared_per_block - kFirst) / Stage::kBytes, kMaxStages));
  if (a.depth < 3) return false;
  const auto describe = [&](CUtensorMap& map, const View& view, int64_t first, int64_t step, int64_t channels,
                            int64_t height, int64_t width, const std::array<int, 4>& box, CUtensorMapSwizzle swizzle) {
    return describe_boxes(map, static_cast<char*>(view.data) + 2 * first * view.stride[3], 2,
                          {channels, ceil_div(width - first, step), height, p.batch},
                          {2 * step * view.stride[3], 2 * view.stride[2], 2 * view.stride[0]}, box, swizzle);
  };
  // A column k of the image is column k / 2 of one of two maps.
  const int first = a.padding_w % 2;
  a.even_column = -(a.padding_w + first) / 2, a.odd_column = a.even_column + first;
  const std::array<int, 4> source_box{kSlab, Stage::kSourceColumns, kStride, Stage::kImages};
  if (!describe(a.even, p.input, first, kStride, a.channels, a.height, a.width, source_box,
                CU_TENSOR_MAP_SWIZZLE_64B) ||
      !describe(a.odd, p.input, 1 - first, kStride, a.channels, a.height, a.width, source_box,
                CU_TENSOR_MAP_SWIZZLE_64B) ||
      !describe(a.grad, p.output, 0, 1, p.filters(), a.out_height, a.out_width,
                {kSlab * kFilters, Stage::kColumns, 1, Stage::kImages}, CU_TENSOR_MAP_SWIZZLE_128B))
    return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  a.partial = static_cast<float*>(
      allocate(a.splits * (p.taps() + a.with_bias) * p.filters() * static_cast<int64_t>(sizeof(float))));
  launch_early(kernel, a, slabs * a.splits, kThreads, stream,
               {.shared_bytes = kFirst + int64_t{a.depth} * Stage::kBytes});
  check_launch("toeplitz_grad_weight_pairs");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
  return true;
}

}  // namespace

bool launch_toeplitz_grad_weight_pairs(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.capability < 90 || size_of(p.dtype) != 2 || p.stride_h != kStride || p.stride_w != kStride ||
      p.dilation_h != 1 || p.dilation_w != 1)
    return false;
  constexpr int64_t kFewRows = 3;  // for which CUDA cores are as fast
  if (p.multiplier != kFilters || p.kernel_h <= kFewRows || p.kernel_h > kMostRows || p.kernel_w > kMostColumns ||
      p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w || p.width < 2)
    return false;
  // As many tiles of a row as leave the fewest without a pixel: no more than a third.
  const auto waste = [&](int tiles) {
    const int64_t columns = round_up(p.out_width, kTile * tiles), images = round_up(p.batch, kPlaces / tiles);
    return static_cast<double>(columns * images) / static_cast<double>(p.out_width * p.batch);
  };
  const int tiles = waste(8) <= waste(4) && waste(8) <= waste(2) ? 8 : waste(4) <= waste(2) ? 4 : 2;
  if (waste(tiles) > 1.5) return false;

  const auto alignment = [&](const View& view) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data)) | 2 * view.stride[0] | 2 * view.stride[2] |
           2 * view.stride[3] | kUnit;
  };
  // Arrays that begin elsewhere would have to be copied first, which takes longer than products one by one.
  if (!has_boxes(p.input, 2, alignment(p.input)) || !has_boxes(p.output, 2, alignment(p.output))) return false;
  Pairs a{};
  a.source_base = static_cast<const char*>(p.input.data), a.grad_base = static_cast<const char*>(p.output.data);
  a.source_image = 2 * p.input.stride[0], a.source_row = 2 * p.input.stride[2], a.source_pixel = 2 * p.input.stride[3];
  a.grad_image = 2 * p.output.stride[0], a.grad_row = 2 * p.output.stride[2], a.grad_pixel = 2 * p.output.stride[3];
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.period = static_cast<int>(std::max(p.out_height, ceil_div(p.height + p.padding_h, kStride)));
  a.behind = (a.kernel_h - 1) / kStride, a.by_period = Divider(a.period), a.with_bias = p.bias != nullptr;

  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launch_tiles = [&](auto shift) {
      constexpr int kReach = kTile - 1;  // columns behind the last one of the gradient
      if (p.out_width + kReach <= kTile << shift) return launch<T, Stage<shift, true>>(p, a, allocate, stream);
      return launch<T, Stage<shift, false>>(p, a, allocate, stream);
    };
    using std::integral_constant;
    if constexpr (sizeof(T) == 2)
      launched = tiles == 8   ? launch_tiles(integral_constant<int, 3>{})
                 : tiles == 4 ? launch_tiles(integral_constant<int, 2>{})
                              : launch_tiles(integral_constant<int, 1>{});
  });
  return launched;
}

}  // namespace dwconv
