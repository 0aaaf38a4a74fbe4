// grad_weight (and the bias gradient) of large kernels at stride 1 in 16 bits on planes of few columns, or with few
// rows of the kernel, on tensor cores.
//
// Images are what is summed over: with A[w][n] = gradient[n][r][w] and B[n][u] = input[n][y][u], the product has, for
// row y + padding - r of the kernel, the sums for its columns u + padding - w on the diagonals. So a multiplication
// takes a row of the gradient and a row of the input from 16 images. A warp keeps the products of some rows of the
// kernel in registers; a row that it loads serves all of them. Blocks go from sum to sum, and load ahead across them.
// A tall kernel is a wide one of images whose rows and columns are exchanged, on their way through shared memory.
// Diagonals are summed up at the end, warps and splits of the images behind, in a fixed order.
//
// Every product that is part of a sum is one of the convolution: Inf and NaN come out where they should.
//
// Whole planes of rows that fill 56 columns, alone or together, go other ways: outer_grad_weight_pieces.cu and
// outer_grad_weight_planes.cu.
#include "outer_grad_weight.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "aligned_planes.cuh"
#include "hankel_grad_weight_groups.h"
#include "launch.h"
#include "outer_grad_weight_pieces.h"
#include "outer_grad_weight_planes.h"
#include "outer_grad_weight_tall.h"
#include "overlap.cuh"
#include "planes.cuh"
#include "stream.cuh"
#include "tensor_cores.cuh"
#include "toeplitz_grad_weight_large_channels_last.h"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kImages = 16;  // of a stage

// What a kernel is compiled for.
template <int columns, int rows, int warps, int blocks, int stages, bool exchanges = false>
struct Tile {
  static constexpr int kColumns = columns, kRows = rows;        // of a plane; of the kernel, that a warp has
  static constexpr int kWarps = warps;                          // at most
  static constexpr int kBlocks = blocks;                        // as registers have to allow, of so many warps
  static constexpr int kStages = stages;                        // in shared memory
  static constexpr bool kExchanges = exchanges;                 // rows and columns of what it loads
  static constexpr int kGrads = (columns + 15) / 16;            // 16 columns of the gradient each
  static constexpr int kSources = (columns + 7) / 8;            // 8 columns of the input each
  static constexpr int kDiagonals = kSources + 2 * kGrads - 1;  // 8 x 8 blocks of products differ in so many ways
  static constexpr int kSumPitch = (8 * kDiagonals + 31) / 32 * 32 + 8;  // floats: lanes in all banks
  static constexpr int kSumBytes = 4 * 8 * kSumPitch;                    // of a warp

  // Products that only kernels have part of which reach further than kNear columns to the left or right.
  static constexpr int kNear = 8;
  static constexpr bool is_far(int grad, int source) {
    return 8 * source - (16 * grad + 15) > kNear || 16 * grad - (8 * source + 7) > kNear;
  }
};
using Narrow = Tile<kNarrowOuter.columns, kNarrowOuter.rows, kNarrowOuter.warps, 2, 3>;
using Middle = Tile<kMiddleOuter.columns, kMiddleOuter.rows, kMiddleOuter.warps, 1, 2>;
template <bool exchanges>
using Wide = Tile<kWideOuter.columns, kWideOuter.rows, kWideOuter.warps, 1, 2, exchanges>;

// The input or the gradient, and what a stage has of it.
struct Images : ImagePlanes {
  int rows;                    // of a piece of a plane, at most
  int row_pitch, image_pitch;  // bytes in shared memory
  int at_once;                 // rows that threads load at once
  int step_images, step_rows;  // the same, in images and rows of a whole piece
  Divider by_units, by_rows;
  // Where rows and columns are exchanged: from a column to the next in memory, and in a stage, whose rows lie side by
  // side.
  int64_t column_bytes;
  int column_pitch;
};

struct Outer {
  Images source, grad;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;  // taps from one row of the kernel to the next, and from a column to the next
  int images, filters, multiplier;
  int first_row, last_row;      // of the kernel, that meet the images: from and up to, less one
  bool far;                     // whether the kernel has part of the products that is_far() names
  int bands;                    // pieces of a plane
  int units, splits;            // pieces of 16 images, of which a split has a run
  int groups, shares;           // warps with other rows of the kernel, and with other rows of the gradient
  int stage_bytes, stage_grad;  // of what is loaded, and where the gradient is in it
  int matrices, grad_offset;    // where the matrices are, if not in the stage, and the gradient in them
};

// Where a block is: which sums it takes, and which piece of which images.
struct Walk {
  int item, unit, last;

  __device__ explicit Walk(const Outer& a) : item(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {
    next_item(a);
  }
  __device__ bool more(const Outer& a) const { return item < a.filters * a.splits; }
  __device__ bool ends() const { return unit + 1 == last; }
  __device__ void next(const Outer& a) {
    if (++unit == last) next_item(a);
  }
  __device__ int filter(const Outer& a) const { return item % a.filters; }
  __device__ int split(const Outer& a) const { return item / a.filters; }

 private:
  __device__ void next_item(const Outer& a) {
    item += gridDim.x;
    unit = static_cast<int>(int64_t{a.units} * split(a) / a.splits);
    last = static_cast<int>(int64_t{a.units} * (split(a) + 1) / a.splits);
  }
};

// The rows of a piece: of the gradient, and all those of the input that they meet.
struct Piece {
  int image, first_grad, last_grad, first_source, last_source;

  __device__ Piece(const Outer& a, int unit) {
    const int group = unit / a.bands, band = unit - group * a.bands;
    image = group * kImages;
    first_grad = band * a.grad.rows, last_grad = min(first_grad + a.grad.rows, a.grad.height);
    first_source = max(first_grad + a.first_row - a.padding_h, 0);
    last_source = min(last_grad - 1 + a.last_row - a.padding_h, a.source.height);
  }
};

// Loads rows of 16 images. Images that there are not become zeros.
class Loader {
 public:
  __device__ explicit Loader(const Images& v) {
    uint32_t rest = threadIdx.x;
    unit_ = v.by_units.split(rest);
    slot_ = static_cast<int>(rest);
  }

  __device__ void load(const Images& v, int channel, int image, int images, int first, int last, uint32_t to) const {
    if (v.unit == 16) return load<16>(v, channel, image, images, first, last, to);
    if (v.unit == 8) return load<8>(v, channel, image, images, first, last, to);
    if (v.unit == 4) return load<4>(v, channel, image, images, first, last, to);
    load<2>(v, channel, image, images, first, last, to);
  }

 private:
  int unit_, slot_;

  template <int kBytes>
  __device__ void load(const Images& v, int channel, int first_image, int images, int first, int last,
                       uint32_t to) const {
    const int rows = last - first;
    if (slot_ >= v.at_once || rows <= 0) return;
    int step_images = v.step_images, step_rows = v.step_rows, image, row;
    if (rows == v.rows) {
      uint32_t rest = slot_;
      row = v.by_rows.split(rest), image = static_cast<int>(rest);
    } else {
      image = slot_ / rows, row = slot_ - image * rows;
      step_images = v.at_once / rows, step_rows = v.at_once - step_images * rows;
    }
    const char* from = v.base + channel * v.channel_bytes + (first_image + image) * v.image_bytes +
                       (first + row) * v.row_bytes + unit_ * kBytes;
    to += image * v.image_pitch + row * v.row_pitch + unit_ * kBytes;
    const int64_t from_step = step_images * v.image_bytes + step_rows * v.row_bytes;
    const int64_t from_wrap = v.image_bytes - rows * v.row_bytes;
    const int to_step = step_images * v.image_pitch + step_rows * v.row_pitch;
    const int to_wrap = v.image_pitch - rows * v.row_pitch;
#pragma unroll 4
    while (image < kImages) {
      if (first_image + image < images)
        begin_copy<kBytes>(to, from);
      else
        clear_unit<kBytes>(to);
      image += step_images, row += step_rows, from += from_step, to += to_step;
      if (row >= rows) ++image, row -= rows, from += from_wrap, to += to_wrap;
    }
  }
};

// The same where rows and columns are exchanged: two rows, which lie side by side, are a unit, and columns go one by
// one.
class ColumnLoader {
 public:
  __device__ explicit ColumnLoader(const Images& v) {
    uint32_t rest = threadIdx.x;
    unit_ = v.by_units.split(rest);
    at_once_ = static_cast<int>(rest) < v.at_once;
    column_ = v.by_rows.split(rest), image_ = static_cast<int>(rest);
  }

  __device__ void load(const Images& v, int channel, int first_image, int images, int first, int last,
                       uint32_t to) const {
    const int row = first + 2 * unit_;
    if (!at_once_ || row >= last) return;
    const bool aligned = v.unit >= 4 && first % 2 == 0 && row + 1 < last;
    int image = image_, column = column_;
    const char* from =
        v.base + channel * v.channel_bytes + (first_image + image) * v.image_bytes + column * v.column_bytes + 2 * row;
    to += (image * v.width + column) * v.column_pitch + 4 * unit_;
    const int64_t from_step = v.step_images * v.image_bytes + v.step_rows * v.column_bytes;
    const int64_t from_wrap = v.image_bytes - v.width * v.column_bytes;
    const int to_step = (v.step_images * v.width + v.step_rows) * v.column_pitch;
#pragma unroll 4
    while (image < kImages) {
      if (first_image + image >= images) {
        clear_unit<4>(to);
      } else if (aligned) {
        begin_copy<4>(to, from);
      } else {
        begin_copy<2>(to, from);
        if (row + 1 < last) begin_copy<2>(to + 2, from + 2);
      }
      image += v.step_images, column += v.step_rows, from += from_step, to += to_step;
      if (column >= v.width) ++image, column -= v.width, from += from_wrap;
    }
  }

 private:
  int unit_, image_, column_;
  bool at_once_;
};

// Exchanges rows and columns of what ColumnLoader has loaded: two of either at once.
__device__ inline void exchange_pairs(const Images& v, int rows, int from, int to) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, pairs = (rows + 1) / 2;
  if (2 * lane >= v.width || pairs <= 0) return;
  const int step_images = warps / pairs, step_pairs = warps - step_images * pairs;
  int image = warp / pairs, pair = warp - image * pairs;
#pragma unroll 4
  while (image < kImages) {
    const int at = from + (image * v.width + 2 * lane) * v.column_pitch + 4 * pair;
    const uint32_t first = shared<uint32_t>(at);
    const uint32_t second = 2 * lane + 1 < v.width ? shared<uint32_t>(at + v.column_pitch) : 0;
    const int row = to + image * v.image_pitch + 2 * pair * v.row_pitch + 4 * lane;
    shared<uint32_t>(row) = __byte_perm(first, second, 0x5410);
    if (2 * pair + 1 < rows) shared<uint32_t>(row + v.row_pitch) = __byte_perm(first, second, 0x7632);
    image += step_images, pair += step_pairs;
    if (pair >= pairs) ++image, pair -= pairs;
  }
}

// A warp's products.
template <typename T, class Tile>
struct Products {
  static constexpr int kRows = Tile::kRows, kGrads = Tile::kGrads, kSources = Tile::kSources;

  // [row of the kernel]: columns g and g + 8 of 16 of the gradient by 2 t and 2 t + 1 of 8 of the input
  float sum[kRows][kGrads][kSources][4];

  __device__ void clear() {
#pragma unroll
    for (int k = 0; k < kRows; ++k)
#pragma unroll
      for (int m = 0; m < kGrads; ++m)
#pragma unroll
        for (int n = 0; n < kSources; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[k][m][n][e] = 0;
  }

  // Adds those of rows [begin, end) of the gradient with the rows of the input from y on, so that rows
  // [first_y, last_y) are there. `source` and `grad` are the lane's addresses of rows y and `begin`.
  __device__ void add(uint32_t grad, int grad_pitch, uint32_t source, int source_pitch, int begin, int end, int y,
                      int first_y, int last_y, bool far) {
    uint32_t x[kRows][2 * kSources];
    const auto load_source = [&](uint32_t (&to)[2 * kSources], uint32_t from) {
#pragma unroll
      for (int n = 0; n + 1 < kSources; n += 2) {
        uint32_t four[4];
        load_matrices_transposed(four, from + 16 * n);
#pragma unroll
        for (int e = 0; e < 4; ++e) to[2 * n + e] = four[e];
      }
      if constexpr (kSources % 2 > 0)
        load_two_transposed(to[2 * kSources - 2], to[2 * kSources - 1], from + 16 * (kSources - 1));
    };
#pragma unroll
    for (int k = 0; k + 1 < kRows; ++k) {
      if (y + k >= first_y && y + k < last_y) load_source(x[k], source);
      source += source_pitch;
    }
    int r = begin;
    while (true) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (r >= end) return;
        uint32_t g[kGrads][4];
#pragma unroll
        for (int m = 0; m < kGrads; ++m) load_matrices_transposed(g[m], grad + 32 * m);
        const bool is_there = y + kRows - 1 < last_y;
        if (is_there) load_source(x[(u + kRows - 1) % kRows], source);
        const auto multiply_row = [&](int k, bool of_far) {
          const uint32_t (&b)[2 * kSources] = x[(u + k) % kRows];
#pragma unroll
          for (int m = 0; m < kGrads; ++m)
#pragma unroll
            for (int n = 0; n < kSources; ++n)
              if (Tile::is_far(m, n) == of_far)
                multiply(sum[k][m][n], sum[k][m][n], g[m], {b[2 * n], b[2 * n + 1]}, T{});
        };
        if (is_there && y >= first_y) {
#pragma unroll
          for (int k = 0; k < kRows; ++k) multiply_row(k, false);
          if (far) {
#pragma unroll
            for (int k = 0; k < kRows; ++k) multiply_row(k, true);
          }
        } else {
#pragma unroll
          for (int k = 0; k < kRows; ++k)
            if (y + k >= first_y && y + k < last_y) multiply_row(k, false), multiply_row(k, true);
        }
        ++r, ++y, grad += grad_pitch, source += source_pitch;
      }
    }
  }

  // Sums over those products on the same diagonal that a thread has, to shared memory: row g, and the diagonal
  // u - w + 8 (2 kGrads - 1) with g added, so that column. What lies outside of the images is left out.
  __device__ void store_diagonals(int k, int to, int grad_width, int source_width) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < Tile::kDiagonals; ++q) {
      float2 total{};
#pragma unroll
      for (int m = 0; m < kGrads; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int n = q - (2 * kGrads - 1) + 2 * m + h;
          if (n < 0 || n >= kSources || 16 * m + 8 * h + g >= grad_width) continue;
          if (8 * n + 2 * t < source_width) total.x += at(k, m, n, 2 * h);
          if (8 * n + 2 * t + 1 < source_width) total.y += at(k, m, n, 2 * h + 1);
        }
      shared<float2>(to + 4 * (g * Tile::kSumPitch + 8 * q + 2 * t)) = total;
    }
  }

 private:
  // All indices are known when all loops are unrolled.
  __device__ float at(int k, int m, int n, int e) const { return sum[k][m][n < 0 ? 0 : n % kSources][e]; }
};

template <typename T, class Tile>
__global__ void __launch_bounds__(32 * Tile::kWarps, Tile::kBlocks) outer_grad_weight(const __grid_constant__ Outer a) {
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warps = a.groups * a.shares;
  const int group = warp % a.groups, share = warp / a.groups;
  const int i = a.first_row + group * Tile::kRows;  // the warp's first row of the kernel
  // Matrices of 8 images by 8 columns, transposed: the first two of A have the same images, those of B the same
  // columns.
  const int half = lane / 8 % 2, other = lane / 16;
  const int source_at = (lane % 8 + 8 * half) * a.source.image_pitch + 16 * other;
  const int grad_at = a.grad_offset + (lane % 8 + 8 * other) * a.grad.image_pitch + 16 * half;

  using LoaderOfTile = std::conditional_t<Tile::kExchanges, ColumnLoader, Loader>;
  const LoaderOfTile source_loader(a.source), grad_loader(a.grad);
  Walk ahead(a), here = ahead;
  int next_stage = 0;
  const auto load_next = [&] {
    if (ahead.more(a)) {
      const Piece piece(a, ahead.unit);
      const int filter = ahead.filter(a);
      source_loader.load(a.source, filter / a.multiplier, piece.image, a.images, piece.first_source, piece.last_source,
                         shared_address(next_stage));
      grad_loader.load(a.grad, filter, piece.image, a.images, piece.first_grad, piece.last_grad,
                       shared_address(next_stage + a.stage_grad));
      ahead.next(a);
    }
    commit_copies();
    next_stage = next_stage + a.stage_bytes < Tile::kStages * a.stage_bytes ? next_stage + a.stage_bytes : 0;
  };
  settle_and_wait_for_kernel_before(a.images);
#pragma unroll 1
  for (int s = 0; s + 1 < Tile::kStages; ++s) load_next();

  Products<T, Tile> products;
  products.clear();
  float bias[4] = {};
  int stage = 0;
#pragma unroll 1
  for (; here.more(a); here.next(a)) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();
    load_next();
    const Piece piece(a, here.unit);
    const int matrices = Tile::kExchanges ? a.matrices : stage;
    if constexpr (Tile::kExchanges) {
      exchange_pairs(a.source, piece.last_source - piece.first_source, stage, matrices);
      exchange_pairs(a.grad, piece.last_grad - piece.first_grad, stage + a.stage_grad, matrices + a.grad_offset);
      __syncthreads();
    }
    const int source = matrices + source_at, grad = matrices + grad_at;
    {
      // The rows of the gradient that meet any of the warp's rows, of which it has a share.
      const int from = max(piece.first_grad, piece.first_source + a.padding_h - (i + Tile::kRows - 1));
      const int count = max(min(piece.last_grad, piece.last_source + a.padding_h - i) - from, 0);
      const int begin = from + count * share / a.shares, end = from + count * (share + 1) / a.shares;
      const int y = begin + i - a.padding_h;
      products.add(shared_address(grad + (begin - piece.first_grad) * a.grad.row_pitch), a.grad.row_pitch,
                   shared_address(source + (y - piece.first_source) * a.source.row_pitch), a.source.row_pitch, begin,
                   end, y, piece.first_source, piece.last_source, a.far);
    }
    if (a.result.with_bias())
      for (int r = piece.first_grad + warp; r < piece.last_grad; r += warps)
#pragma unroll
        for (int m = 0; m < Tile::kGrads; ++m) {
          uint32_t g[4];
          load_matrices_transposed(g, shared_address(grad + (r - piece.first_grad) * a.grad.row_pitch + 32 * m));
          // What lies beyond a row is anything.
          if (16 * m + lane / 4 >= a.grad.width) g[0] = g[2] = 0;
          if (16 * m + 8 + lane / 4 >= a.grad.width) g[1] = g[3] = 0;
          multiply(bias, bias, g, {kOnes, kOnes}, T{});
        }

    if (here.ends()) {  // sums take the place of the matrices
      const int bias_at = matrices + warps * Tile::kSumBytes;
      float total = lane % 4 == 0 ? bias[0] + bias[2] : 0;
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
#pragma unroll
      for (int k = 0; k < Tile::kRows; ++k) {
        __syncthreads();
        products.store_diagonals(k, matrices + warp * Tile::kSumBytes, a.grad.width, a.source.width);
        if (k == 0 && lane == 0) shared<float>(bias_at + 4 * warp) = total;
        __syncthreads();
        if (share > 0 || i + k >= a.last_row) continue;
        for (int j = lane; j < a.kernel_w; j += 32) {
          const int first = j - a.padding_w + 8 * (2 * Tile::kGrads - 1);
          float sum = 0;
          for (int s = 0; s < a.shares; ++s)
#pragma unroll
            for (int g = 0; g < 8; ++g)
              if (first + g >= 0 && first + g < 8 * Tile::kDiagonals)
                sum += shared<float>(matrices + (warp + s * a.groups) * Tile::kSumBytes +
                                     4 * (g * Tile::kSumPitch + first + g));
          a.result.put<T>(here.filter(a), here.split(a), (i + k) * a.tap_row + j * a.tap_column, sum);
        }
      }
      // Rows of the kernel that never meet the images.
      for (int row = warp; row < a.kernel_h; row += warps)
        if (row < a.first_row || row >= a.last_row)
          for (int j = lane; j < a.kernel_w; j += 32)
            a.result.put<T>(here.filter(a), here.split(a), row * a.tap_row + j * a.tap_column, 0);
      if (a.result.with_bias() && threadIdx.x == 0) {
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += shared<float>(bias_at + 4 * w);
        a.result.put<T>(here.filter(a), here.split(a), a.kernel_h * a.kernel_w, sum);
      }
      products.clear();
#pragma unroll
      for (float& b : bias) b = 0;
    }
    stage = stage + a.stage_bytes < Tile::kStages * a.stage_bytes ? stage + a.stage_bytes : 0;
  }
}

// How the work is cut.
struct Cut {
  int rows, shares, splits, blocks;
};

// Fills in what follows from the rows of a piece and the shares of them; returns the shared memory that it takes.
template <class Tile>
int64_t apply(Outer& a, int rows, int shares) {
  const int kernel_rows = a.last_row - a.first_row;
  a.groups = static_cast<int>(ceil_div(kernel_rows, Tile::kRows)), a.shares = shares;
  a.grad.rows = rows, a.source.rows = std::min(rows + kernel_rows - 1, a.source.height);
  a.bands = static_cast<int>(ceil_div(a.grad.height, rows));
  a.units = static_cast<int>(ceil_div(a.images, kImages)) * a.bands;
  // 8 images in all banks; what is read beyond a row is still the image's.
  const int threads = 32 * a.groups * a.shares;
  const auto arrange = [&](Images& v, int read) {
    v.row_pitch = static_cast<int>(round_up(2 * v.width, 16));
    v.image_pitch = (v.rows * v.row_pitch + std::max(read - v.row_pitch, 0)) | 16;
    const int units = Tile::kExchanges ? (v.rows + 1) / 2 : 2 * v.width / v.unit;
    const int lines = Tile::kExchanges ? v.width : v.rows;
    v.at_once = threads / units;
    v.step_images = v.at_once / lines, v.step_rows = v.at_once % lines;
    v.by_units = Divider(units), v.by_rows = Divider(lines);
    v.column_pitch = static_cast<int>(round_up(2 * v.rows, 4)) | 4;
  };
  arrange(a.source, 16 * Tile::kSources), arrange(a.grad, 32 * Tile::kGrads);
  a.grad_offset = kImages * a.source.image_pitch;
  const int64_t matrix_bytes = std::max<int64_t>(int64_t{kImages} * (a.source.image_pitch + a.grad.image_pitch),
                                                 int64_t{a.groups} * a.shares * (Tile::kSumBytes + 16));
  a.stage_grad = a.grad_offset, a.stage_bytes = static_cast<int>(matrix_bytes), a.matrices = 0;
  if (!Tile::kExchanges) return Tile::kStages * matrix_bytes;
  a.stage_grad = kImages * a.source.width * a.source.column_pitch;
  a.stage_bytes = a.stage_grad + kImages * a.grad.width * a.grad.column_pitch;
  a.matrices = Tile::kStages * a.stage_bytes;
  return a.matrices + matrix_bytes;
}

// Cycles that a piece takes: of a multiprocessor's memory, of that and its tensor cores, and of a block that has it to
// itself.
struct Cycles {
  double memory, throughput, latency;

  template <class Tile>
  static Cycles of(const Outer& a, Tile) {
    int of_row = 0;
    for (int m = 0; m < Tile::kGrads; ++m)
      for (int n = 0; n < Tile::kSources; ++n) of_row += a.far || !Tile::is_far(m, n);
    int64_t rows = 0;  // of the gradient that meet a row of the kernel, for all of them
    for (int i = a.first_row; i < a.last_row; ++i)
      rows += std::min(a.grad.height, a.source.height + a.padding_h - i) - std::max(a.padding_h - i, 0);
    const double multiplications = static_cast<double>(rows) * of_row / a.bands;
    const double source_bytes = 2.0 * kImages * a.source.rows * a.source.width;
    const double grad_bytes = 2.0 * kImages * a.grad.rows * a.grad.width;
    const auto unit = [](const Images& v) { return Tile::kExchanges ? std::min(v.unit, 4) : v.unit; };
    const double copies = (source_bytes / unit(a.source) + grad_bytes / unit(a.grad)) / (32 * a.groups * a.shares);
    const double memory = (source_bytes + grad_bytes) / 13;
    const double exchanged = Tile::kExchanges ? 3.0 * kImages * (a.source.rows + a.grad.rows) : 0;
    return {
        memory, std::max(1.5 * multiplications + exchanged, memory) + 300,
        static_cast<double>(a.grad.rows) / a.shares * (50 + 8 * of_row * Tile::kRows) + 12 * copies + exchanged + 600};
  }
};

template <typename T, class Tile>
Cut cut_for(Outer a, const Device& device) {
  const auto kernel = outer_grad_weight<T, Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  const double sums = static_cast<double>(a.kernel_h) * a.kernel_w * a.filters;
  const int groups = static_cast<int>(ceil_div(a.last_row - a.first_row, Tile::kRows));
  Cut best{1, 1, 1, device.multiprocessors};
  double least = INFINITY;
  for (int shares = 1; shares * groups <= Tile::kWarps; ++shares) {
    constexpr int kCuts = 6;
    for (int bands = 1, cuts = 0, last_rows = 0; bands <= a.grad.height && cuts < kCuts; ++bands) {
      const int rows = static_cast<int>(ceil_div(a.grad.height, bands));
      if (rows == std::exchange(last_rows, rows)) continue;
      const int64_t bytes = apply<Tile>(a, rows, shares);
      if (bytes > device.shared_per_block || std::min(a.source.at_once, a.grad.at_once) == 0) continue;
      int resident = 0;
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * groups * shares, bytes);
      if (resident == 0) continue;
      ++cuts;
      const Cycles cycles = Cycles::of(a, Tile{});
      constexpr double kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
      const double products = static_cast<double>(kImages) * rows / shares;
      const int64_t fewest = std::clamp<int64_t>(static_cast<int64_t>(a.units * products / kLongest) + 1, 1, a.units);
      for (int beside = 1; beside <= resident; ++beside) {
        const int64_t slots = int64_t{beside} * device.multiprocessors;
        for (int64_t splits = fewest; splits <= a.units; ++splits) {
          const int64_t items = a.filters * splits, rounds = ceil_div(items, slots);
          if (splits > fewest && (rounds > 8 || items > (1 << 30))) break;
          // A block waits for its first load, and adds up its sums.
          const double pieces = static_cast<double>(ceil_div(a.units, splits));
          const double piece = std::max(beside * cycles.throughput, cycles.latency) + 0.2 * cycles.latency;
          const double item = pieces * piece + 1500;
          const double cost = static_cast<double>(rounds) * item + beside * cycles.memory + 1000 +
                              (splits > 1 ? 4000 + static_cast<double>(splits) * sums / 200 : 0);
          if (cost >= least) continue;
          least = cost, best.rows = rows, best.shares = shares, best.splits = static_cast<int>(splits);
          best.blocks = static_cast<int>(std::min(items, slots));
        }
      }
    }
  }
  return best;
}

template <typename T, class Tile>
void launch(const Problem& p, Outer a, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  static thread_local Decisions<13, Cut> decisions;
  const Cut cut =
      decisions({device.id, a.images, a.filters, a.source.height, a.source.width, a.source.unit, a.grad.height,
                 a.grad.width, a.grad.unit, a.kernel_h, a.kernel_w, a.padding_h, a.padding_w},
                [&] { return cut_for<T, Tile>(a, device); });
  const int64_t shared_bytes = apply<Tile>(a, cut.rows, cut.shares);
  a.splits = cut.splits;
  a.result = weight_sums(p, a.splits, allocate);
  launch_early(outer_grad_weight<T, Tile>, a, cut.blocks, 32 * a.groups * a.shares, stream,
               {.shared_bytes = shared_bytes});
  check_launch("outer_grad_weight");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

}  // namespace

void launch_outer_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  if (launch_toeplitz_grad_weight_large_channels_last(problem, allocate, stream)) return;
  const bool exchanged = is_outer_exchanged(problem), by_kernel = is_outer_exchanged_in_kernel(problem);
  Problem p = exchanged ? exchange(problem) : problem;
  if (!by_kernel) both_to_planes(p, allocate, stream);
  const OuterSizes sizes = OuterSizes::of(problem, exchanged);
  if (!by_kernel) {
    p.input = to_planes(p.input, p.batch, p.channels, p.height, p.width, allocate, stream);
    p.output = to_planes(p.output, p.batch, p.filters(), p.out_height, p.out_width, allocate, stream);
  }
  // Planes wherever they begin, as long as a kernel takes them. One piece of a Hankel matrix takes less than 7 rows.
  // So do rows of an odd length, which would come element by element, unless they are short.
  constexpr int64_t kFewOddColumns = 20;
  const Problem& upright = by_kernel ? problem : p;
  const bool is_odd = upright.width % 2 > 0;
  ImagePlanes source, grad;
  for (const bool aligned : {false, true}) {
    const auto planes = [&](View view, int64_t channels, int64_t height, int64_t width) {
      if (by_kernel) std::swap(view.stride[2], view.stride[3]), std::swap(height, width);
      return aligned ? aligned_planes_of(view, p.batch, channels, height, width, allocate, stream)
                     : planes_of(view, p.batch, channels, height, width, allocate, stream);
    };
    source = planes(p.input, p.channels, p.height, p.width);
    grad = planes(p.output, p.filters(), p.out_height, p.out_width);
    if (by_kernel ? launch_outer_grad_weight_tall(p, source, grad, allocate, stream)
                  : launch_outer_grad_weight_pieces(p, exchanged, source, grad, allocate, stream))
      return;
    if ((is_odd || is_hankel_piece(upright)) &&
        launch_hankel_grad_weight_groups(upright, exchanged && !by_kernel, source, grad,
                                         is_odd ? kFewOddColumns : kFewHankelColumns, allocate, stream))
      return;
    if (launch_outer_grad_weight_planes(p, exchanged, by_kernel, source, grad, allocate, stream)) return;
  }

  Outer a{};
  const auto arrange = [&](Images& v, const ImagePlanes& from) {
    static_cast<ImagePlanes&>(v) = from;
    if (by_kernel)
      std::swap(v.height, v.width), v.column_bytes = v.row_bytes;
    else
      v.unit = std::min(v.unit, (2 * v.width) & -(2 * v.width));
  };
  arrange(a.source, source), arrange(a.grad, grad);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = static_cast<int>(exchanged ? 1 : problem.kernel_w);
  a.tap_column = static_cast<int>(exchanged ? problem.kernel_w : 1);
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier);
  a.first_row = static_cast<int>(sizes.first_row()), a.last_row = static_cast<int>(sizes.last_row());
  a.far = a.padding_w > Middle::kNear || a.kernel_w - 1 - a.padding_w > Middle::kNear;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const int64_t columns = sizes.tile().columns;
      if (columns == Narrow::kColumns) return launch<T, Narrow>(p, a, allocate, stream);
      if (columns == Middle::kColumns) return launch<T, Middle>(p, a, allocate, stream);
      if (by_kernel) return launch<T, Wide<true>>(p, a, allocate, stream);
      launch<T, Wide<false>>(p, a, allocate, stream);
    }
  });
}

}  // namespace dwconv
