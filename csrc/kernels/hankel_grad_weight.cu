// grad_weight (and the bias gradient) of large kernels at stride 1 in 16 bits, in NCHW, on tensor cores.
//
// For a row y of the input, row r of the gradient meets row i = y + padding - r of the kernel. A multiplication takes
// 16 columns j of the kernel, a Hankel matrix A[j][c] = input[y][c + j - padding], 8 rows i of the kernel, 8 rows of
// the gradient B[c][i] = gradient[y + padding - i][c], and sums over 16 columns c. A thread's part of any such A are
// three pairs of pixels, at columns 2 t + g + 8 m of the row; rows lie in shared memory twice, the second time a column
// earlier, so that each pair is one word. The warps of a block take rows y that are 8 apart: then the next row meets
// the same rows of the gradient one tile of 8 kernel rows further on, where they stay in registers. The sums of a tile
// of the kernel stay in registers, too; warps are added up at the end, blocks by a second kernel, in a fixed order.
//
// What lies beside the images is multiplied as zeros, which is exact unless the other factor is Inf or NaN. So sums
// that are finite are right, and the others are taken again, product by product.
//
// Rows of an odd length would be loaded element by element: where there are many they are copied to where they begin
// with 16 bytes.
//
// Whole planes go other ways: hankel_grad_weight_groups.cu and outer_grad_weight_planes.cu.
#include <algorithm>
#include <cmath>

#include "aligned_planes.cuh"
#include "hankel_grad_weight_groups.h"
#include "launch.h"
#include "outer_grad_weight_planes.h"
#include "overlap.cuh"
#include "planes.cuh"
#include "stream.cuh"
#include "tensor_cores.cuh"
#include "toeplitz_grad_weight_large_channels_last.h"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// The same value, but so that ptxas has to keep it in a register: it would compute it again wherever it is needed.
template <typename Value>
__device__ Value keep(Value value) {
  return __shfl_sync(~0u, value, threadIdx.x % 32);
}

// What a kernel is compiled for. Narrow images lie side by side, so that a multiplication of 16 columns has an image.
template <int row_tiles, int column_tiles, int images_beside, int blocks>
struct Tile {
  static constexpr int kRowTiles = row_tiles, kRows = 8 * row_tiles;               // of the kernel
  static constexpr int kColumnTiles = column_tiles, kColumns = 16 * column_tiles;  // of the kernel
  static constexpr int kBeside = images_beside;
  static constexpr int kBlocks = blocks;  // on a multiprocessor, as registers allow
  static constexpr int kSteps = 2;        // multiplications along a row of the gradient that share loads
  static constexpr int kStepColumns = 16 * kSteps / kBeside;

  // The words of a row of the input that a thread multiplies: 8 columns apart, image by image.
  static constexpr int kWordsOfImage = kBeside > 1 ? 2 * kColumnTiles + 1 : 2 * (kSteps + kColumnTiles) - 1;
  static constexpr int kWords = kBeside * kWordsOfImage;
  static constexpr int word_of(int step, int column_tile) {
    return kBeside > 1 ? step * kWordsOfImage + 2 * column_tile : 2 * (step + column_tile);
  }

  static constexpr int kSumPitch = kColumns + 4;                    // of a warp's sums in shared memory
  static constexpr int kBiasSums = kWarps * kRows * kSumPitch * 4;  // where they are, behind the others
  static constexpr int kSumBytes = kBiasSums + 4 * kWarps;
};

// The input or the gradient, and the piece of it that a block has in shared memory.
struct Images : ImagePlanes {
  int loaded;         // columns of a row that are loaded: behind those of the image zeros
  int rows, columns;  // of a piece of an image
  int pitch;          // bytes from a row of a piece to the next
  int units;          // that are copied, of a row of an image
  int rows_at_once;   // that a warp has lanes for, with the images beside
  Divider by_units;   // of all images beside
};

struct Hankel {
  Images source, grad;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;  // taps from one row of the kernel to the next, and from a column to the next
  int images, filters, multiplier;
  int tiles_h, tiles_w, splits;
  int units;          // of which a split has a run: images that are loaded together, or a piece of one
  int grad_rows;      // in shared memory, a multiple of 8
  int together;       // images of a unit, or pairs of images that lie side by side
  int bands, chunks;  // pieces of an image, across and along
  int first_stage, stage_bytes, grad_offset;  // places in shared memory
};

// What a block works on.
struct Part {
  int filter, split;
  int i, j;         // the first row and column of its tile of the kernel
  int first, last;  // units

  template <class Tile>
  static __device__ Part of(const Hankel& a, Tile) {
    const int tiles = a.tiles_h * a.tiles_w, tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
    Part p;
    p.filter = rest % a.filters, p.split = rest / a.filters;
    p.i = tile / a.tiles_w * Tile::kRows, p.j = tile % a.tiles_w * Tile::kColumns;
    p.first = static_cast<int>(int64_t{a.units} * p.split / a.splits);
    p.last = static_cast<int>(int64_t{a.units} * (p.split + 1) / a.splits);
    return p;
  }
};

// Where a unit begins: its first image, row of the input and column of the gradient.
struct Place {
  int image, row, column;

  template <class Tile>
  static __device__ Place of(const Hankel& a, int unit, Tile) {
    Place p;
    p.column = unit % a.chunks * a.grad.columns, unit /= a.chunks;
    p.row = unit % a.bands * a.source.rows, unit /= a.bands;
    p.image = unit * a.together * Tile::kBeside;
    return p;
  }
  // The one behind it.
  template <class Tile>
  __device__ Place next(const Hankel& a, Tile) const {
    Place p = *this;
    p.column += a.grad.columns;
    if (p.column < a.chunks * a.grad.columns) return p;
    p.column = 0, p.row += a.source.rows;
    if (p.row < a.bands * a.source.rows) return p;
    p.row = 0, p.image += a.together * Tile::kBeside;
    return p;
  }
};

__device__ inline bool has_whole_planes(const Hankel& a) {
  return a.bands == 1 && a.chunks == 1;
}

// Copies `bytes` of a unit, and zeros behind.
template <int kBytes>
__device__ void copy_part(uint32_t to, const char* from, int bytes) {
#pragma unroll 1
  for (int i = 0; i < kBytes; i += 2) {
    const uint16_t value = i < bytes ? __ldg(reinterpret_cast<const uint16_t*>(from + i)) : 0;
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + i), "h"(value));
  }
}

// Loads pieces of planes. What is outside becomes zeros; if pieces are whole planes, rows and columns are left alone
// that are always outside.
template <int kBeside>
class Loader {
 public:
  // `row` and `column`, the latter a multiple of 8: where a piece begins whose place is 0.
  __device__ Loader(const Hankel& a, const Images& v, int channel, int row, int column) : row_(row), column_(column) {
    uint32_t lane_row = threadIdx.x % 32;
    unit_ = v.by_units.split(lane_row);
    first_ = static_cast<int>(threadIdx.x / 32 * v.rows_at_once + lane_row) + (has_whole_planes(a) ? max(-row, 0) : 0);
    from_ = v.base + channel * v.channel_bytes + (row + first_) * v.row_bytes + 2 * column;
    from_ = reinterpret_cast<const char*>(keep(reinterpret_cast<unsigned long long>(from_)));
    first_ = keep(static_cast<int>(lane_row) < v.rows_at_once ? first_ : kNone), unit_ = keep(unit_);
  }

  // Begins to load a piece.
  __device__ void load(const Hankel& a, const Images& v, const Place& place, uint32_t to) const {
    if (v.unit == 16) return load<16>(a, v, place, to);
    if (v.unit == 8) return load<8>(a, v, place, to);
    if (v.unit == 4) return load<4>(a, v, place, to);
    load<2>(a, v, place, to);
  }

 private:
  static constexpr int kNone = 1 << 30;
  int row_, column_;
  int unit_, first_;  // the thread's first unit of a row, and its first row
  const char* from_;  // where that row begins in the first image

  template <int kBytes>
  __device__ void load(const Hankel& a, const Images& v, const Place& place, uint32_t to) const {
    const bool whole = has_whole_planes(a);
    const int row = row_ + place.row, column = column_ + place.column, step = kWarps * v.rows_at_once;
    const int begin = whole ? max(-column, 0) : 0, last = whole ? min(v.rows, v.height - row) : v.rows;
    if (first_ >= last) return;
    const bool is_inside = whole || (row >= 0 && row + last <= v.height);  // all rows
    const char* from = from_ + place.image * v.image_bytes + place.row * v.row_bytes + 2 * place.column;
    to += first_ * v.pitch;
    for (int unit = unit_; unit < v.units * kBeside; unit += 32) {
      const int beside = kBeside > 1 && unit >= v.units;
      const int at = begin + (unit - beside * v.units) * (kBytes / 2), x = column + at;
      if (at >= v.columns) continue;
      const int bytes = x < 0 ? 0 : max(min(kBytes, 2 * (v.loaded - x)), 0);
      const char* image_from = from + beside * v.image_bytes + 2 * at;
      uint32_t image_to = to + 2 * (beside * v.columns + at);
      if (bytes == kBytes && is_inside && first_ + step >= last && place.image + a.together * kBeside <= a.images) {
#pragma unroll 4
        for (int k = 0; k < a.together; ++k) {  // the most frequent case: a unit of each image
          begin_copy<kBytes>(image_to, image_from);
          image_from += kBeside * v.image_bytes, image_to += v.rows * v.pitch;
        }
        continue;
      }
      for (int k = 0; k < a.together; ++k) {
        const int image_bytes = place.image + beside + k * kBeside < a.images ? bytes : 0;
        const char* row_from = image_from;
        uint32_t row_to = image_to;
        if (image_bytes == kBytes && is_inside) {
#pragma unroll(kBytes == 2 ? 8 : 1)
          for (int r = first_; r < last; r += step) {
            begin_copy<kBytes>(row_to, row_from);
            row_from += step * v.row_bytes, row_to += step * v.pitch;
          }
        } else {
          for (int r = first_; r < last; r += step) {
            const bool inside = static_cast<unsigned>(row + r) < static_cast<unsigned>(v.height);
            if (!inside || image_bytes == 0)
              clear_unit<kBytes>(row_to);
            else if (image_bytes == kBytes)
              begin_copy<kBytes>(row_to, row_from);
            else
              copy_part<kBytes>(row_to, row_from, image_bytes);
            row_from += step * v.row_bytes, row_to += step * v.pitch;
          }
        }
        image_from += kBeside * v.image_bytes, image_to += v.rows * v.pitch;
      }
    }
  }
};

// The first row of the gradient of a piece that begins at `row` of the input: all rows that its rows meet are there.
template <class Tile>
__device__ int first_grad_row(const Hankel& a, const Part& part, int row, Tile) {
  return row + a.padding_h - part.i - (Tile::kRows - 1);
}

// Adds the products of every eighth row of an image's piece with 32 columns of the gradient.
template <typename T, class Tile>
struct Marcher {
  static constexpr int kRowTiles = Tile::kRowTiles, kColumnTiles = Tile::kColumnTiles, kSteps = Tile::kSteps;
  static constexpr int kUnroll = kRowTiles > 1 ? kRowTiles : 2;

  float sum[kRowTiles][kColumnTiles][4] = {};  // columns g and g + 8 of a tile by rows 2 t and 2 t + 1

  // `source` and `grad` are the thread's addresses in the first row, and in the row of the gradient that meets it
  // first. Tile i has something to add in row n if n * 8 + `begin` - 8 * i is in [0, `end`); `tiles` is how many there
  // are.
  __device__ void add(uint32_t source, int source_step, int beside_bytes, uint32_t grad, int grad_step, int rows,
                      int begin, int end, int tiles) {
    uint32_t x[2][Tile::kWords], g[kRowTiles][4];
    const auto load_source = [&](uint32_t (&to)[Tile::kWords]) {
#pragma unroll
      for (int w = 0; w < Tile::kWords; ++w) {
        const uint32_t from = source + w / Tile::kWordsOfImage * beside_bytes + w % Tile::kWordsOfImage * 16;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(to[w]) : "r"(from));
      }
    };
    const bool most = 8 * (kRowTiles - tiles) <= kRowTiles;
    const int full = most ? max(end - 8 * (kRowTiles - 1), 0) : 0;
    load_source(x[0]);
#pragma unroll
    for (int i = 1; i < kRowTiles; ++i) load_matrices(g[i - 1], grad - i * grad_step);
    while (true) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // The rows of the gradient that tile i meets are where those of tile i - 1 were before.
        const auto slot = [&](int i) { return (i - u - 1 + 2 * kUnroll) % kRowTiles; };
        const auto multiply_tile = [&](int i, int step) {
          const uint32_t (&b)[4] = g[slot(i)], (&a)[Tile::kWords] = x[u % 2];
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) {
            const int w = Tile::word_of(step, j);
            multiply(sum[i][j], sum[i][j], {a[w], a[w + 1], a[w + 1], a[w + 2]}, {b[2 * step], b[2 * step + 1]}, T{});
          }
        };
        load_matrices(g[slot(0)], grad);
        source += rows > 8 ? source_step : 0, grad += grad_step;  // behind the last row another unit may be arriving
        load_source(x[(u + 1) % 2]);
        if (static_cast<unsigned>(begin - 8 * (kRowTiles - 1)) < static_cast<unsigned>(full)) {
#pragma unroll
          for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int i = kRowTiles - 1; i >= 0; --i) multiply_tile(i, step);
        } else {
#pragma unroll
          for (int i = kRowTiles - 1; i >= 0; --i)
            if (i < tiles && static_cast<unsigned>(begin - 8 * i) < static_cast<unsigned>(end)) {
#pragma unroll
              for (int step = 0; step < kSteps; ++step) multiply_tile(i, step);
            }
        }
        begin += 8, rows -= 8;
        if (rows <= 0) return;
      }
    }
  }
};

// The sum of one tap over a split, of products inside the image only.
template <typename T, class Tile>
__device__ __noinline__ float sum_by_products(const Hankel& a, const Part& part, int i, int j) {
  double total = 0;
  for (int unit = part.first; unit < part.last; ++unit) {
    const Place place = Place::of(a, unit, Tile{});
    const int last_image = min(a.images, place.image + a.together * Tile::kBeside);
    const int begin = max(place.column, a.padding_w - j);
    const int end = min(min(place.column + a.grad.columns, a.grad.width), a.source.width + a.padding_w - j);
    for (int n = place.image; n < last_image; ++n)
      for (int y = place.row; y < min(place.row + a.source.rows, a.source.height); ++y) {
        const int r = y + a.padding_h - i;
        if (r < 0 || r >= a.grad.height) continue;
        const T* x = reinterpret_cast<const T*>(a.source.base + part.filter / a.multiplier * a.source.channel_bytes +
                                                n * a.source.image_bytes + y * a.source.row_bytes);
        const T* g = reinterpret_cast<const T*>(a.grad.base + part.filter * a.grad.channel_bytes +
                                                n * a.grad.image_bytes + r * a.grad.row_bytes);
        float sum = 0;
        for (int c = begin; c < end; ++c) sum = fmaf(widen(x[c + j - a.padding_w]), widen(g[c]), sum);
        total += sum;
      }
  }
  return static_cast<float>(total);
}

// A thread's part of the sum over a unit's gradients. Whole planes are in shared memory and go to tensor cores.
template <typename T, class Tile>
__device__ float sum_of_gradients(const Hankel& a, const Part& part, const Place& place, int grad) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (has_whole_planes(a) && first_grad_row(a, part, 0, Tile{}) <= 0) {
    constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
    float sum[4] = {};  // the same in all rows: the first is that of lanes 0 to 3
    for (int row = 8 * warp; row < a.grad_rows; row += 8 * kWarps) {
      uint32_t from = shared_address(grad + (row + lane % 8) * a.grad.pitch + lane / 8 * 16);
      for (int c = 0; c < a.grad.columns * Tile::kBeside; c += 32, from += 64) {
        uint32_t g[4];
        load_matrices(g, from);
        multiply(sum, sum, {kOnes, kOnes, kOnes, kOnes}, {g[0], g[1]}, T{});
        multiply(sum, sum, {kOnes, kOnes, kOnes, kOnes}, {g[2], g[3]}, T{});
      }
    }
    return lane < 4 ? sum[0] + sum[1] : 0;
  }
  float sum = 0;
  const int band = place.row / a.source.rows;
  const int begin = static_cast<int>(int64_t{a.grad.height} * band / a.bands);
  const int end = static_cast<int>(int64_t{a.grad.height} * (band + 1) / a.bands);
  const int last_image = min(a.images, place.image + a.together * Tile::kBeside);
  for (int n = place.image; n < last_image; ++n)
    for (int row = begin + warp; row < end; row += kWarps) {
      const T* g = reinterpret_cast<const T*>(a.grad.base + part.filter * a.grad.channel_bytes +
                                              n * a.grad.image_bytes + row * a.grad.row_bytes);
      for (int c = place.column + lane; c < min(place.column + a.grad.columns, a.grad.width); c += 32)
        sum += widen(g[c]);
    }
  return sum;
}

template <typename T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks) hankel_grad_weight(const __grid_constant__ Hankel a) {
  let_next_kernel_start();
  const Part part = Part::of(a, Tile{});
  for (int i = threadIdx.x * kUnit; i < a.first_stage + 2 * a.stage_bytes; i += kThreads * kUnit)
    shared<uint4>(i) = uint4{};
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int source_bytes = a.together * a.source.rows * a.source.pitch;
  // The thread's words of a row: in the stage, or a column earlier in the copy, which stays where it is.
  const int shift = (part.j - a.padding_w) & 7, column = 2 * (lane % 4) + lane / 4 + shift;
  const uint32_t moves = keep(column % 2 ? 0 : ~0u);
  const uint32_t first_source = keep(shared_address((column % 2 ? 0 : a.first_stage) + (column & ~1) * 2));
  const uint32_t first_grad =
      keep(shared_address(a.first_stage + a.grad_offset + (Tile::kRows - 1 - lane % 8) * a.grad.pitch + lane / 8 * 16));
  const int row_tiles = min(Tile::kRowTiles, (a.kernel_h - part.i + 7) / 8);
  const bool with_bias = a.result.with_bias() && part.i == 0 && part.j == 0;
  float bias = 0;
  Marcher<T, Tile> marcher;
  const Loader<Tile::kBeside> source_loader(a, a.source, part.filter / a.multiplier, 0, (part.j - a.padding_w) & ~7);
  const Loader<Tile::kBeside> grad_loader(a, a.grad, part.filter, first_grad_row(a, part, 0, Tile{}), 0);
  Place this_place{}, next_place = Place::of(a, part.first, Tile{});
  int stage = a.first_stage, turn = warp;
  settle_and_wait_for_kernel_before(a.images);
  for (int unit = part.first - 1; unit < part.last; ++unit) {  // the first round only loads
    wait_copies<0>();
    __syncthreads();
    const int next_stage = 2 * a.first_stage + a.stage_bytes - stage;
    if (unit >= part.first)
      for (int i = threadIdx.x * kUnit; i < source_bytes; i += kThreads * kUnit) {
        const uint4 x = shared<uint4>(stage + i);
        const uint32_t next = shared<uint32_t>(stage + i + kUnit);
        shared<uint4>(i) = {__funnelshift_r(x.x, x.y, 16), __funnelshift_r(x.y, x.z, 16), __funnelshift_r(x.z, x.w, 16),
                            __funnelshift_r(x.w, next, 16)};
      }
    __syncthreads();
    if (unit + 1 < part.last) {
      source_loader.load(a, a.source, next_place, shared_address(next_stage));
      grad_loader.load(a, a.grad, next_place, shared_address(next_stage + a.grad_offset));
    }
    commit_copies();
    const Place place = this_place;
    this_place = next_place, next_place = next_place.next(a, Tile{});
    if (unit < part.first) {
      stage = next_stage;
      continue;
    }

    const int grad_row = first_grad_row(a, part, place.row, Tile{});
    // The rows of the gradient that are inside the image.
    const int lo = max(0, -grad_row), inside = min(a.grad.rows, a.grad.height - grad_row) - lo;
    const int rows = min(a.source.rows, a.source.height - place.row);
    const uint32_t offset = stage - a.first_stage;
    uint32_t source = first_source + (offset & moves), grad = first_grad + offset;
    for (int k = 0; k < a.together; ++k, turn += 3) {
      if (place.image + k * Tile::kBeside >= a.images) break;
      const int y = turn & 7;  // all warps have their share of a rest of rows
      if (y < rows)
        for (int c = 0; c < a.grad.columns; c += Tile::kStepColumns)
          marcher.add(source + y * a.source.pitch + 2 * c, 8 * a.source.pitch, 2 * a.source.columns,
                      grad + y * a.grad.pitch + 2 * c, 8 * a.grad.pitch, rows - y, y + Tile::kRows - 1 - lo,
                      inside > 0 ? inside + 7 : 0, row_tiles);
      source += a.source.rows * a.source.pitch, grad += a.grad.rows * a.grad.pitch;
    }
    if (with_bias) bias += sum_of_gradients<T, Tile>(a, part, place, stage + a.grad_offset);
    stage = next_stage;
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp * Tile::kRows + 8 * i + lane % 4 * 2 + e % 2;
        shared<float>(4 * (row * Tile::kSumPitch + 16 * j + lane / 4 + e / 2 * 8)) = marcher.sum[i][j][e];
      }
  for (int offset = 16; offset > 0; offset /= 2) bias += __shfl_xor_sync(~0u, bias, offset);
  if (lane == 0) shared<float>(Tile::kBiasSums + 4 * warp) = bias;
  __syncthreads();
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kColumns; index += kThreads) {
    const int row = index / Tile::kColumns, i = part.i + row, j = part.j + index % Tile::kColumns;
    if (i >= a.kernel_h || j >= a.kernel_w) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      total += shared<float>(4 * ((w * Tile::kRows + row) * Tile::kSumPitch + index % Tile::kColumns));
    if (!is_finite(total)) total = sum_by_products<T, Tile>(a, part, i, j);
    a.result.put<T>(part.filter, part.split, i * a.tap_row + j * a.tap_column, total);
  }
  if (with_bias && threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared<float>(Tile::kBiasSums + 4 * w);
    a.result.put<T>(part.filter, part.split, a.kernel_h * a.kernel_w, total);
  }
}

// How the work is cut.
struct Cut {
  int together, bands, chunks, rows, columns, splits;
  int64_t shared_bytes;
};

// Fills in what follows from a cut, and the shared memory that it takes.
template <class Tile>
void apply(Hankel& a, Cut& cut) {
  const bool whole = cut.bands * cut.chunks == 1;
  a.together = cut.together, a.bands = cut.bands, a.chunks = cut.chunks, a.splits = cut.splits;
  a.units = static_cast<int>(ceil_div(a.images, a.together * Tile::kBeside)) * a.bands * a.chunks;
  a.source.rows = cut.rows;
  a.source.columns = static_cast<int>(round_up(cut.columns + Tile::kColumns - 1 + (-a.padding_w & 7), 8));
  // Rows of zeros between two images stand for those below the one and above the other.
  const int most_rows = cut.rows + Tile::kRows - 1, above = Tile::kRows - 1 - a.padding_h;
  a.grad.rows = whole && a.tiles_h == 1 && above >= 0 ? std::max(most_rows - above, above + a.grad.height) : most_rows;
  a.grad.columns = cut.columns;
  a.source.pitch = 2 * Tile::kBeside * a.source.columns;
  a.grad.pitch = (2 * Tile::kBeside * a.grad.columns + 16) | 16;  // 8 rows in all banks
  for (Images* v : {&a.source, &a.grad}) {
    v->units = static_cast<int>(ceil_div(2 * (whole ? std::min(v->width, v->columns) : v->columns), v->unit));
    v->rows_at_once = std::max(32 / (v->units * Tile::kBeside), 1);
    v->by_units = Divider(int64_t{v->units} * Tile::kBeside);
  }
  // A row and the same row a column earlier begin 16 banks apart.
  const int64_t source_bytes = int64_t{a.together} * a.source.rows * a.source.pitch;
  a.grad_rows = static_cast<int>(round_up((a.together - 1) * a.grad.rows + most_rows, 8));
  const int64_t grad_bytes = int64_t{a.grad_rows} * a.grad.pitch;
  const int64_t first_stage = round_up(source_bytes, 128) + 64, stage_bytes = round_up(source_bytes + grad_bytes, 128);
  cut.shared_bytes = std::max<int64_t>(first_stage + 2 * stage_bytes, Tile::kSumBytes);
  a.first_stage = static_cast<int>(first_stage), a.stage_bytes = static_cast<int>(stage_bytes);
  a.grad_offset = static_cast<int>(source_bytes);
}

template <typename T, class Tile>
Cut cut_for(Hankel a, const Device& device) {
  const auto kernel = hankel_grad_weight<T, Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  const int64_t room =
      std::min<int64_t>(device.shared_per_block, device.shared_per_multiprocessor / Tile::kBlocks - 1024);
  const int height = a.source.height, width = a.grad.width;
  const auto fits = [&](Cut& cut) {
    apply<Tile>(a, cut);
    return cut.shared_bytes <= room;
  };
  Cut best{1, 1, 1, height, static_cast<int>(round_up(width, Tile::kStepColumns)), 1, 0};
  if (fits(best)) {  // whole planes, as many as make up for the latency of a load
    constexpr int kMost = 8, kPixels = 8192;
    for (int together = 2; together <= kMost; ++together) {
      Cut cut = best;
      cut.together = together;
      if (int64_t{together} * Tile::kBeside > a.images ||
          int64_t{together} * Tile::kBeside * height * width > kPixels || !fits(cut))
        break;
      best = cut;
    }
  } else {
    double least = INFINITY;
    for (int64_t chunks = 1, last = 0; last != Tile::kStepColumns; ++chunks) {
      const int64_t columns = round_up(ceil_div(width, chunks), Tile::kStepColumns);
      if (columns == last) continue;
      last = columns;
      for (int64_t bands = 1, rows = 0; rows != 8; ++bands) {
        rows = round_up(ceil_div(height, bands), 8);
        Cut cut{1,
                static_cast<int>(ceil_div(height, rows)),
                static_cast<int>(ceil_div(width, columns)),
                static_cast<int>(rows),
                static_cast<int>(columns),
                1,
                0};
        if (cut.bands * cut.chunks == 1 || !fits(cut)) continue;
        const double loaded = static_cast<double>(rows) * (columns + Tile::kColumns) +
                              static_cast<double>(rows + Tile::kRows) * columns + 2048;
        const double cost = loaded * cut.bands * cut.chunks;
        if (cost < least) least = cost, best = cut;
        break;
      }
    }
  }

  // Splits: estimated cycles, of which only comparisons matter.
  apply<Tile>(a, best);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, best.shared_bytes);
  resident = std::max(resident, 1);
  const int64_t groups = int64_t{a.tiles_h} * a.tiles_w * a.filters, slots = int64_t{resident} * device.multiprocessors;
  const double steps = static_cast<double>(best.together) * best.rows * (Tile::kBeside * best.columns / 16);
  const double unit_cycles = 1.5 * steps * Tile::kRowTiles * Tile::kColumnTiles + 500;
  const double sums = static_cast<double>(a.kernel_h) * a.kernel_w * a.filters;
  constexpr double kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const double products = static_cast<double>(best.together) * best.rows * best.columns * Tile::kBeside / kWarps;
  const int64_t fewest = std::min<int64_t>(static_cast<int64_t>(std::ceil(a.units * products / kLongest)), a.units);
  double least = INFINITY;
  const auto consider = [&](int64_t splits) {
    splits = std::clamp<int64_t>(splits, std::max<int64_t>(fewest, 1), a.units);
    const int64_t blocks = groups * splits, waves = blocks / slots, rest = blocks % slots;
    const double unit = static_cast<double>(ceil_div(a.units, splits));
    const auto wave = [&](int64_t beside) {
      return (unit * unit_cycles + 1500) * (static_cast<double>(beside) + 0.7) + 2500;
    };
    const double cost = waves * wave(resident) + (rest > 0 ? wave(ceil_div(rest, device.multiprocessors)) : 0) +
                        (splits > 1 ? 3000 + splits * sums / 200 : 0);
    if (cost < least) least = cost, best.splits = static_cast<int>(splits);
  };
  consider(1);
  for (int waves = 1; waves <= 6; ++waves) consider(slots * waves / groups), consider(ceil_div(slots * waves, groups));
  return best;
}

template <typename T, class Tile>
void launch(const Problem& p, Hankel a, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  a.tiles_h = static_cast<int>(ceil_div(a.kernel_h, Tile::kRows));
  a.tiles_w = static_cast<int>(ceil_div(a.kernel_w, Tile::kColumns));
  static thread_local Decisions<10, Cut> decisions;
  Cut cut = decisions({device.id, a.images, a.filters, a.source.height, a.source.width, a.grad.height, a.grad.width,
                       a.kernel_h, a.kernel_w, a.padding_w},
                      [&] { return cut_for<T, Tile>(a, device); });
  apply<Tile>(a, cut);
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t blocks = int64_t{a.tiles_h} * a.tiles_w * a.filters * a.splits;
  launch_early(hankel_grad_weight<T, Tile>, a, blocks, kThreads, stream, {.shared_bytes = cut.shared_bytes});
  check_launch("hankel_grad_weight");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

template <int kBeside>
using Square = Tile<4, 2, kBeside, 2>;
template <int kBeside>
using Small = Tile<2, 1, kBeside, 3>;
template <int kBeside>
using Wide = Tile<1, 4, kBeside, 2>;
template <int kBeside>
using Tall = Tile<8, 1, kBeside, 2>;

// What shared memory and tensor cores have to do for 8 rows of the input and a step along them.
template <class Tile>
double cost_of(int64_t kernel_h, int64_t kernel_w, Tile) {
  const int64_t tiles = ceil_div(kernel_h, Tile::kRows) * ceil_div(kernel_w, Tile::kColumns);
  const int64_t multiplications =
      ceil_div(kernel_h, 8) * ceil_div(kernel_w, Tile::kColumns) * Tile::kColumnTiles * Tile::kSteps;
  return std::max(1.5 * multiplications, 1.0 * tiles * (Tile::kWords + 2 * Tile::kSteps)) + 6.0 * tiles;
}

template <int kBeside>
double least_cost(int64_t kernel_h, int64_t kernel_w) {
  const auto cost = [&](auto tile) { return cost_of(kernel_h, kernel_w, tile); };
  return std::min({cost(Square<kBeside>{}), cost(Small<kBeside>{}), cost(Wide<kBeside>{}), cost(Tall<kBeside>{})});
}

// Takes the tile that costs least.
template <typename T, int kBeside>
void launch_tile(const Problem& p, const Hankel& a, const Allocate& allocate, cudaStream_t stream) {
  const double least = least_cost<kBeside>(a.kernel_h, a.kernel_w);
  const auto is_best = [&](auto tile) { return cost_of(a.kernel_h, a.kernel_w, tile) == least; };
  if (is_best(Small<kBeside>{})) return launch<T, Small<kBeside>>(p, a, allocate, stream);
  if (is_best(Square<kBeside>{})) return launch<T, Square<kBeside>>(p, a, allocate, stream);
  if (is_best(Wide<kBeside>{})) return launch<T, Wide<kBeside>>(p, a, allocate, stream);
  launch<T, Tall<kBeside>>(p, a, allocate, stream);
}

// Whether images lie side by side.
bool is_narrow(const Problem& p) {
  constexpr int64_t kNarrow = 16;
  return p.out_width <= kNarrow && p.batch > 1;
}

double cost_of(const Problem& p) {
  const bool narrow = is_narrow(p);
  const int64_t pixels = round_up(p.height, 8) * round_up(p.out_width, narrow ? 16 : 32);
  return static_cast<double>(pixels) *
         (narrow ? least_cost<2>(p.kernel_h, p.kernel_w) : least_cost<1>(p.kernel_h, p.kernel_w));
}

}  // namespace

void launch_hankel_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  if (launch_toeplitz_grad_weight_large_channels_last(problem, allocate, stream)) return;
  // Copies may as well have columns for rows, but rows of an odd length are loaded element by element.
  constexpr double kLess = 0.9;
  const Problem other = exchange(problem);
  const auto odd = [](const Problem& p) { return p.width % 2 + p.out_width % 2; };
  const bool exchanged =
      can_exchange(problem) && odd(other) <= odd(problem) && cost_of(other) < kLess * cost_of(problem);
  Problem p = exchanged ? other : problem;
  both_to_planes(p, allocate, stream);
  Hankel a{};
  a.tap_row = static_cast<int>(exchanged ? 1 : problem.kernel_w);
  a.tap_column = static_cast<int>(exchanged ? problem.kernel_w : 1);
  ImagePlanes &source = a.source, &grad = a.grad;
  source = planes_of(p.input, p.batch, p.channels, p.height, p.width, allocate, stream);
  grad = planes_of(p.output, p.batch, p.filters(), p.out_height, p.out_width, allocate, stream);
  if (launch_hankel_grad_weight_groups(p, exchanged, source, grad, kFewHankelColumns, allocate, stream)) return;
  source = aligned_planes_of(p.input, p.batch, p.channels, p.height, p.width, allocate, stream);
  grad = aligned_planes_of(p.output, p.batch, p.filters(), p.out_height, p.out_width, allocate, stream);
  if (launch_outer_grad_weight_planes(p, exchanged, false, a.source, a.grad, allocate, stream)) return;
  const auto align_rows = [&](Images& v, int64_t channels) {
    const int unit = v.unit;
    static_cast<ImagePlanes&>(v) = with_aligned_rows(v, p.batch, channels, allocate, stream);
    v.loaded = static_cast<int>(v.unit > unit ? round_up(v.width, v.unit / 2) : v.width);
  };
  align_rows(a.source, p.channels), align_rows(a.grad, p.filters());
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (is_narrow(p))
        launch_tile<T, 2>(p, a, allocate, stream);
      else
        launch_tile<T, 1>(p, a, allocate, stream);
    }
  });
}

}  // namespace dwconv
