// What a warp of batch_grad_weight_nchw.cu multiplies and sums up: tiles of 16 images, in one of three ways.
#pragma once

#include "image_runs.cuh"
#include "stream.cuh"
#include "tensor_cores.cuh"
#include "weight_sums.cuh"

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
  WeightSums result;
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
    if (a.result.with_bias()) {
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
    if (a.result.with_bias()) {
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
    if (a.result.with_bias()) {
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

}  // namespace
}  // namespace dwconv
