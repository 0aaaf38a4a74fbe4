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
// There are other ways for rows that do not begin with 16 bytes (padded_grad_weight_nchw.cu), and on sm_90 for planes
// of few pixels (flat_grad_weight_nchw.cu).
#include <algorithm>
#include <cmath>

#include "clusters.cuh"
#include "flat_grad_weight_nchw.h"
#include "image_runs.cuh"
#include "launch.h"
#include "padded_grad_weight_nchw.h"
#include "partial_sums.h"
#include "stream.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

constexpr int kImages = 16;  // that are multiplied together
constexpr int kMaxWarps = 8;
constexpr int kRows = 7, kColumns = 8;  // of a tile
constexpr int kPitch = kColumns + 1;    // of the products that a warp sums up at the end, in floats

struct Batch {
  ImageRuns source, grad;
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w, stride;
  int images, filters, multiplier;
  int block_filters, share;  // warps that share a filter
  int chunk_rows, bands;     // of the gradient; bands of whole planes: 1
  int groups, splits, stage_bytes;
  int strips;  // tiles side by side
  int totals;  // where the first block of a cluster of all splits has their sums in shared memory, or 0
  bool bulk;
  int shift;  // windows begin so many columns earlier, so that pairs of columns are words
  Divider by_bands, by_strips;
  float* partial;  // [part][tap, or bias behind the last tap][filter], or null
  void *grad_weight, *grad_bias;
};

// The rows that a step of a block works on, of 16 images.
struct Step {
  int image, images;
  int row, rows;                 // of the gradient
  int source_begin, source_end;  // of the input
};

__device__ inline Step step_of(const Batch& a, int number) {
  uint32_t images = number;
  Step s;
  s.row = static_cast<int>(a.by_bands.split(images)) * a.chunk_rows;
  s.rows = min(a.chunk_rows, a.out_height - s.row);
  s.image = static_cast<int>(images) * kImages;
  s.images = min(kImages, a.images - s.image);
  s.source_begin = 0, s.source_end = a.height;
  if (a.bands > 1) {
    const int begin = s.row * a.stride - a.padding_h;
    s.source_begin = min(max(begin, 0), a.height);
    s.source_end =
        max(min(begin + (s.rows - 1) * a.stride + (a.kernel_h - 1) * a.dilation_h + 1, a.height), s.source_begin);
  }
  return s;
}

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

template <typename T>
__device__ void store(const Batch& a, int filter, int split, int tap, float total) {
  const int taps = a.kernel_h * a.kernel_w;
  if (a.partial != nullptr)
    a.partial[(int64_t{split} * (taps + (a.grad_bias != nullptr)) + tap) * a.filters + filter] = total;
  else if (tap < taps)
    static_cast<T*>(a.grad_weight)[int64_t{filter} * taps + tap] = narrow<T>(total);
  else
    static_cast<T*>(a.grad_bias)[filter] = narrow<T>(total);
}

// The sum of products that are on a diagonal, from place `first` on.
__device__ inline float sum_of_diagonal(int first) {
  float total = 0;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) total += shared<float>(first + 4 * k * (kPitch + 1));
  return total;
}

// What a warp sums up. kKernelH: with what dilation puts between the rows. kPairs: whether pairs of columns are words.
template <typename T, int kKernelH, int kStride, bool kPairs>
struct Products {
  static constexpr bool kPlanes = false;
  static constexpr int kWarps = kMaxWarps;  // of a block, at most
  static constexpr int kScratch = 0;
  static constexpr int kBytes = 4 * kKernelH * kStride * 2 * kColumns * kPitch;

  float sum[kKernelH][kStride][4] = {}, bias[4] = {};

  // Of the 16 columns of a window (at stride 2, of either parity), the thread has these two: h is 0 or 1.
  static __device__ int column(int h) {
    const int g = threadIdx.x % 32 / 4;
    return kPairs && kStride == 1 ? 2 * g + h : g + 8 * h;
  }
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
                        2 * (column(0) * kStride - a.padding_w - a.shift);
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
        const int x = (v0 + column(h)) * kStride + c - a.padding_w - a.shift;
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
    if (a.grad_bias != nullptr) {
      constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (kFull || r < rows) multiply(bias, bias, {kOnes, kOnes, kOnes, kOnes}, g[r], T{});
    }
#pragma unroll
    for (int s = 0; s < (kRows - 1) * kStride + kKernelH; ++s) {
      if (!(inside >> s & 1)) continue;
      uint32_t x[kStride][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int first = from[2 * k] + s * source_row, second = from[2 * k + 1] + s * source_row;
        if constexpr (kPairs) {
#pragma unroll
          for (int w = 0; w < kStride; ++w) {
            const uint32_t low = shared<uint32_t>(first + 32 * w), high = shared<uint32_t>(second + 32 * w);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int c = kStride == 1 ? 0 : e, h = kStride == 1 ? e : w;
              x[c][2 * k + h] = __byte_perm(low, high, e == 0 ? 0x5410 : 0x7632) & source_mask[c][h];
            }
          }
        } else {
#pragma unroll
          for (int c = 0; c < kStride; ++c)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int at = 2 * (8 * kStride * h + c);
              x[c][2 * k + h] = pair(first + at, second + at) & source_mask[c][h];
            }
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
  __device__ void put(const Batch& a, int place) const {
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
  // The sum of a tap's products.
  static __device__ float tap(const Batch& a, int place, int i, int j) {
    j += a.shift;
    return sum_of_diagonal(place_of(place, i * kStride + j % kStride, j / kStride, 0));
  }
};

// The same at stride 1 where rows begin with 16 bytes in both arrays: matrices of 8 images and 8 columns are loaded at
// once. A product is of 8 columns of the gradient and 24 of the input: the same ones, and 8 on either side of them. For
// kernels of many rows those on the right are multiplied for two rows at once: the lower one and the upper one.
template <typename T, int kKernelH>
struct AlignedProducts {
  static constexpr bool kPlanes = false;
  static constexpr int kWarps = kKernelH < 7 ? kMaxWarps : 7;  // of a block, at most
  // Whether the columns on the right are multiplied for two rows at once.
  static constexpr bool kPairs = kKernelH >= 7;
  static constexpr int kScratch = 0;
  static constexpr int kWindow = 3 * kColumns;
  static constexpr int kBytes = 4 * kKernelH * kWindow * kPitch;

  float sum[kKernelH][kPairs ? 1 : 2][4] = {}, bias[4] = {};
  float pairs[kPairs ? kKernelH + 1 : 1][4] = {};  // of rows i - 1 and i of the kernel

  // Where the lane's rows of matrices begin, for a tile at the image's first pixel: of the columns to the left and of
  // the tile's own ones, of those to the right, and of two rows of the gradient.
  uint32_t source_slot, right_slot, grad_slot;

  __device__ void place(const Batch& a, const Step& s, int stage, int64_t source_offset, int64_t grad_offset,
                        int channel, int filter) {
    const int lane = threadIdx.x % 32;
    const auto slot = [&](const ImageRuns& v, int n, int64_t offset) {
      return shared_address(v.slot(stage, n, s.image + n, offset));
    };
    const int source = channel * a.height * 2 * a.width, grad = filter * a.out_height * 2 * a.out_width;
    const int half = lane / 8 % 2;
    const uint32_t image = slot(a.source, lane % 8 + lane / 16 * 8, source_offset) + source;
    source_slot = image + (half - 1) * kUnit;
    right_slot = kUnit + (kPairs ? image + half * 2 * a.width : slot(a.source, lane % 16, source_offset) + source);
    grad_slot = slot(a.grad, lane % 16, grad_offset) + grad + lane / 16 * 2 * a.out_width;
  }

  __device__ void add(const Batch& a, const Step& s, int v0, int r0, uint32_t inside) {
    const int lane = threadIdx.x % 32;
    const int y0 = s.row + r0 - a.padding_h, rows = s.rows - r0;
    const uint32_t zeros = shared_address(kZeros), source_row = 2 * a.width, grad_row = 2 * a.out_width;
    const uint32_t top = (y0 - s.source_begin) * source_row + 2 * v0;
    // What is beside the image is read from zeros.
    const int x = v0 + (lane / 8 % 2 - 1) * kColumns;
    const uint32_t mine = x >= 0 && x < a.width ? inside : 0,
                   right = v0 + kColumns < a.width ? inside >> (kPairs ? lane / 8 % 2 : 0) : 0;
    const uint32_t from = source_slot + top, from_right = right_slot + top, grad = grad_slot + r0 * grad_row + 2 * v0;
    uint32_t g[kRows + 1][2];
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
      uint32_t both[4];
      load_matrices_transposed(both, r + lane / 16 < min(rows, kRows) ? grad + r * grad_row : zeros);
#pragma unroll
      for (int e = 0; e < 4; ++e) g[r + e / 2][e % 2] = both[e];
    }
    if (a.grad_bias != nullptr) {
      constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
      for (int r = 0; r < kRows; ++r) multiply(bias, bias, {kOnes, kOnes, kOnes, kOnes}, g[r], T{});
    }
#pragma unroll
    for (int y = 0; y < kRows - 1 + kKernelH; ++y) {
      uint32_t above[4], beside[4] = {};
      load_matrices_transposed(above, mine >> y & 1 ? from + y * source_row : zeros);
      const uint32_t on_the_right = right >> y & 1 ? from_right + y * source_row : zeros;
      if constexpr (!kPairs) load_two_transposed(beside[0], beside[2], on_the_right);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        if (y < i || y - i >= kRows) continue;
        multiply(sum[i][0], sum[i][0], above, g[y - i], T{});
        if constexpr (!kPairs) multiply(sum[i][1], sum[i][1], beside, g[y - i], T{});
      }
      if constexpr (kPairs) {
        if (y % 2 != 0) continue;
        load_matrices_transposed(beside, on_the_right);
#pragma unroll
        for (int i = 0; i <= kKernelH; ++i)
          if (y + 1 >= i && y + 1 - i < kRows) multiply(pairs[i], pairs[i], beside, g[y + 1 - i], T{});
      }
    }
  }

  __device__ void put(const Batch& a, int place) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int e = 0; e < 6; ++e) {
        float value;
        if constexpr (kPairs)
          value = e < 4 ? sum[i][0][e] : pairs[i + 1][e % 2] + pairs[i][2 + e % 2];
        else
          value = sum[i][e / 4][e % 4];
        shared<float>(place_of(place, i, lane / 4 + e / 2 * kColumns, lane % 4 * 2 + e % 2)) = value;
      }
  }
  static __device__ int place_of(int place, int product, int m, int k) {
    return place + 4 * ((product * kWindow + m) * kPitch + k);
  }
  static __device__ float tap(const Batch& a, int place, int i, int j) {
    return sum_of_diagonal(place_of(place, i, kColumns + j - a.padding_w, 0));
  }
};

// The same at stride 1 for planes of at most 8 rows and 8 columns. A warp lays its rows anew, each in 16 bytes of their
// own with zeros behind it, so that matrices of 8 images and a row are loaded at once. A product is of two rows of the
// input, the upper one in front, and a row of the gradient; those of rows as far from each other are one sum: of upper
// rows that are `kFirst` to `kFirst + kSums - 1` rows below the gradient's.
template <typename T, int kFirst, int kSums>
struct SmallPlanes {
  static constexpr bool kPlanes = true;
  static constexpr int kWarps = kMaxWarps;
  static constexpr int kSide = 8;
  static constexpr int kImagePitch = (kSide + 1) * kUnit, kArray = kImages * kImagePitch;
  static constexpr int kScratch = 2 * kArray;  // bytes that a warp lays its rows in
  static constexpr int kBytes = 4 * kSums * 2 * kColumns * kPitch;

  float sum[kSums][4] = {}, bias[4] = {};

  // Lays the rows of one array, for a lane's image: every other one.
  static __device__ void lay(int from, int rows, int columns, int to) {
    const int lane = threadIdx.x % 32, half = lane / kImages;
    uint32_t mask[4];  // of the row's words
#pragma unroll
    for (int w = 0; w < 4; ++w) mask[w] = (2 * w < columns ? 0xffffu : 0) | (2 * w + 1 < columns ? 0xffff0000u : 0);
    to += lane % kImages * kImagePitch;
#pragma unroll
    for (int k = 0; k < kSide / 2; ++k) {
      const int r = 2 * k + half, at = from + r * 2 * columns, first = at & ~3, shift = (at & 2) * 8;
      if (r >= rows) continue;
      uint32_t word[5], row[4];
#pragma unroll
      for (int w = 0; w < 5; ++w) word[w] = shared<uint32_t>(first + 4 * w);
#pragma unroll
      for (int w = 0; w < 4; ++w) row[w] = __funnelshift_r(word[w], word[w + 1], shift) & mask[w];
      shared<uint4>(to + r * kUnit) = uint4{row[0], row[1], row[2], row[3]};
    }
  }

  static __device__ void clear(int scratch) {
    for (int at = threadIdx.x % 32 * kUnit; at < kScratch; at += 32 * kUnit) shared<uint4>(scratch + at) = uint4{};
    __syncwarp();
  }

  // Before a step's products.
  __device__ void place(const Batch& a, const Step& s, int stage, int64_t source_offset, int64_t grad_offset,
                        int channel, int filter, int scratch) {
    const int n = threadIdx.x % kImages;
    lay(a.source.slot(stage, n, s.image + n, source_offset) + channel * a.height * 2 * a.width, a.height, a.width,
        scratch);
    lay(a.grad.slot(stage, n, s.image + n, grad_offset) + filter * a.out_height * 2 * a.out_width, a.out_height,
        a.out_width, scratch + kArray);
  }

  __device__ void add(const Batch& a, int scratch) {
    const int lane = threadIdx.x % 32;
    const uint32_t source = shared_address(scratch) + (lane % 8 + lane / 16 * 8) * kImagePitch + lane / 8 % 2 * kUnit;
    const uint32_t grad = shared_address(scratch + kArray) + lane % 16 * kImagePitch + lane / 16 * kUnit;
    uint32_t x[kSide / 2][4], g[kSide][2];
#pragma unroll
    for (int y = 0; y < kSide / 2; ++y) {
      uint32_t both[4];
      load_matrices_transposed(x[y], source + 2 * y * kUnit);
      load_matrices_transposed(both, grad + 2 * y * kUnit);
#pragma unroll
      for (int e = 0; e < 4; ++e) g[2 * y + e / 2][e % 2] = both[e];
    }
    if (a.grad_bias != nullptr) {
      constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
      for (int r = 0; r < kSide; ++r) multiply(bias, bias, {kOnes, kOnes, kOnes, kOnes}, g[r], T{});
    }
#pragma unroll
    for (int y = 0; y < kSide; y += 2)
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        const int which = y - r - kFirst;
        if (which >= 0 && which < kSums) multiply(sum[which], sum[which], x[y / 2], g[r], T{});
      }
    __syncwarp();
  }

  __device__ void put(const Batch&, int place) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared<float>(place_of(place, i, lane / 4 + e / 2 * kColumns, lane % 4 * 2 + e % 2)) = sum[i][e];
  }
  static __device__ int place_of(int place, int product, int m, int k) {
    return place + 4 * ((product * 2 * kColumns + m) * kPitch + k);
  }
  static __device__ float tap(const Batch& a, int place, int i, int j) {
    float total = 0;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int which = i - a.padding_h - lower - kFirst;
      if (which < 0 || which >= kSums) continue;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int x = k + j - a.padding_w;
        if (x >= 0 && x < kColumns) total += shared<float>(place_of(place, which, lower * kColumns + x, k));
      }
    }
    return total;
  }
};

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
  if (a.grad_bias == nullptr) return;
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
  const int slots = a.kernel_h * a.kernel_w + (a.grad_bias != nullptr);
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
                  store<T>(a, first_filter + filter, split * a.share + first_tile, slot, total);
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
    store<T>(a, first_filter + filter, 0, slot, total);
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
  if (cluster)
    a.totals = static_cast<int>(bytes);
  else if (parts > 1)
    a.partial = static_cast<float*>(allocate(parts * slots * p.filters() * int64_t{sizeof(float)}));
  launch_early(kernel, a, int64_t{a.groups} * a.splits, threads, stream,
               {.cluster = cluster ? a.splits : 1, .shared_bytes = bytes + (cluster ? totals : 0)});
  check_launch("batch_grad_weight_nchw");
  if (a.partial != nullptr) launch_add_partial_sums(p, a.partial, parts, stream);
}

}  // namespace

void launch_batch_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  Batch a{};
  a.source.base = static_cast<char*>(p.input.data), a.source.image_bytes = 2 * p.input.stride[0];
  a.grad.base = static_cast<char*>(p.output.data), a.grad.image_bytes = 2 * p.output.stride[0];
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.grad_weight = p.weight.data, a.grad_bias = p.bias;
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
  if (bulk && small && launch_flat_grad_weight_nchw(p, allocate, stream)) return;
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
