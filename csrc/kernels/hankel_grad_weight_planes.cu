// The same as hankel_grad_weight from whole planes in shared memory, on sm_90 and later.
//
// A multiplication takes 16 columns j of the kernel, a Hankel matrix A[j][c] = input[y][c + j - padding], and 8 rows i
// of the kernel, B[c][i] = gradient[y + padding - i][c], and sums over columns c. Rows of 56 columns are seven times 8:
// two images go side by side, and the last 8 columns of both are one multiplication.
//
// A warp takes every eighth row y of two images. Then the next row meets the same rows of the gradient one tile of 8
// kernel rows further on, where they stay in registers. A thread reads its pairs of pixels as words, and puts those
// that begin at an odd column together from two words: planes stay as they come, as boxes, with zeros in between for
// what lies beside the images. A kernel that has more sums than a warp has registers is cut into pieces for different
// blocks. The loop over rows is not unrolled, though the gradient's rows then move from register to register: it would
// not fit the instruction caches.
//
// What lies beside the images is multiplied as zeros, which is exact unless the other factor is Inf or NaN. So sums
// that are finite are right, and the others are taken again, product by product.
#include <algorithm>
#include <cmath>

#include "boxes.cuh"
#include "hankel_grad_weight_planes.h"
#include "launch.h"
#include "outer_grad_weight.h"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "planes.cuh"
#include "turn.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kResidues = 8;                      // of rows: a warp has every eighth row
constexpr int kUnits = 7, kColumns = 8 * kUnits;  // of a row of the gradient, of 8 columns each
constexpr int kWholeSteps = kUnits / 2;           // multiplications along a row, of two units each
constexpr int kGradPitch = 2 * kColumns;          // 8 rows in all banks
constexpr int kZeroRows = 8;                      // above a gradient and below
constexpr int kMaxStages = 8;
[[maybe_unused]] constexpr int kFullAt = 0, kEmptyAt = 8 * kMaxStages;  // barriers
constexpr int kFirstStage = 128;                                        // behind them
constexpr int kBeyond = 2 * (56 + 8);  // bytes read behind the last row, of columns that the kernel does not have

// What a kernel is compiled for.
template <int row_tiles, int column_halves, int warps = 12>
struct Tile {
  static constexpr int kWarps = warps, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = row_tiles, kRows = 8 * row_tiles;  // of the kernel
  // Of the kernel: tiles of 16, and whether there is one of 8 behind them, for which 16 rows are multiplied at once.
  static constexpr int kColumnTiles = column_halves / 2, kRowPairs = column_halves % 2 * (row_tiles + 1) / 2;
  static constexpr int kColumns = 8 * column_halves;
  // Whether tiles that have nothing to add are left out by a branch, which costs registers, or by a predicate.
  static constexpr bool kBranches = row_tiles > 3 && kRowPairs == 0;
  static constexpr int kWords = kUnits + column_halves - 1;         // 8 columns apart, that a thread has of a row
  static constexpr int kSumPitch = kColumns + 4;                    // of a warp's sums in shared memory
  static constexpr int kBiasSums = kWarps * kRows * kSumPitch * 4;  // where they are, behind the others
  static constexpr int kSumBytes = kBiasSums + 4 * kWarps;
};

// sum += a * b, of 16 x 16 by 16 x 8, in all threads or in none. Without a branch: what follows need not wait.
[[maybe_unused]] __device__ inline void multiply_if(bool wanted, float (&sum)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  asm("{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %10, 0;\n"
      "@wanted mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      "}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(static_cast<uint32_t>(wanted)));
#endif
}
[[maybe_unused]] __device__ inline void multiply_if(bool wanted, float (&sum)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %10, 0;\n"
      "@wanted mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      "}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(static_cast<uint32_t>(wanted)));
#endif
}

struct Plane {
  CUtensorMap map;
  const char* base;
  int64_t image_bytes, channel_bytes;
  int rows, width;
};

struct Hankel {
  Plane source, grad;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;  // taps from one row of the kernel to the next, and from a column to the next
  int images, filters, multiplier;
  int pieces_h, pieces_w, splits;
  int stages, stage_bytes;
  // Of a stage: a gradient's rows with 8 rows of zeros above each image and below, the input's with zeros before each
  // row and behind the last one.
  int border, source_pitch, source_at;

  __host__ __device__ int pairs() const { return (images + 1) / 2; }
  __host__ __device__ int grad_slot() const { return (grad.rows + kZeroRows) * kGradPitch; }
  __host__ __device__ int source_slot() const { return source.rows * source_pitch; }
};

// What a block works on: a piece of a filter's kernel, and pairs of images.
struct Part {
  int filter, split;
  int i, j;         // the first row and column of the piece
  int first, last;  // pairs

  template <class Tile>
  static __device__ Part of(const Hankel& a, Tile) {
    const int pieces = a.pieces_h * a.pieces_w, piece = blockIdx.x % pieces, rest = blockIdx.x / pieces;
    Part p;
    p.filter = rest % a.filters, p.split = rest / a.filters;
    p.i = piece / a.pieces_w * Tile::kRows, p.j = piece % a.pieces_w * Tile::kColumns;
    p.first = static_cast<int>(int64_t{a.pairs()} * p.split / a.splits);
    p.last = static_cast<int>(int64_t{a.pairs()} * (p.split + 1) / a.splits);
    return p;
  }
};

// Clears what boxes do not write to.
[[maybe_unused]] __device__ inline void clear_behind(const Hankel& a, int threads) {
  const auto clear = [&](int from, int end) {
    for (int i = from + kUnit * threadIdx.x; i < end; i += kUnit * threads) shared<uint4>(i) = uint4{};
  };
  for (int s = 0; s < a.stages; ++s) {
    const int stage = kFirstStage + s * a.stage_bytes;
    clear(stage + 2 * a.grad_slot(), stage + a.source_at);
    clear(stage + a.source_at + 2 * a.source_slot(), stage + a.stage_bytes);
  }
}

// What a thread loads next.
struct Ahead {
  int pair;
  Turn turn;

  // As soon as the stage is free. What is outside of the images becomes zeros.
  [[maybe_unused]] __device__ void load_next(const Hankel& a, const Part& part) {
    const int barrier = kFullAt + 8 * turn.stage, stage = kFirstStage + turn.stage * a.stage_bytes;
    wait(kEmptyAt + 8 * turn.stage, turn.parity ^ 1);
    if (is_elected()) {
      expect_bytes(barrier, 2 * (a.grad_slot() + a.source_slot()));
      copy_box(stage, a.grad.map, 0, -kZeroRows, part.filter, 2 * pair, barrier);
      copy_box(stage + a.source_at, a.source.map, -a.border / 2, 0, part.filter / a.multiplier, 2 * pair, barrier);
      arrive(barrier);
    }
    __syncwarp();
    ++pair, turn.next(a.stages);
  }
};

// Adds the products of every eighth row of two images.
template <typename T, class Tile>
struct Marcher {
  static constexpr int kRowTiles = Tile::kRowTiles, kColumnTiles = Tile::kColumnTiles, kRowPairs = Tile::kRowPairs;
  static constexpr int kSteps = kUnits;  // of two images
  static constexpr int kLoads = 4;       // of four matrices each

  float sum[kRowTiles][kColumnTiles][4] = {};  // columns g and g + 8 of a tile by rows 2 t and 2 t + 1
  float last[std::max(kRowPairs, 1)][4] = {};  // rows g and g + 8 of two tiles by columns 2 t and 2 t + 1

  // A tile's rows of the gradient: units 0 to 6 of the first image, then the last and the first ones of the second.
  struct Grads {
    uint32_t unit[4 * kLoads];

    // Zeros where no row is inside the image.
    __device__ void load(bool inside, uint32_t first, uint32_t last, uint32_t second) {
      const auto load_four = [&](int at, uint32_t from) {
        load_matrices(*reinterpret_cast<uint32_t (*)[4]>(unit + at), from);
      };
      if (inside)
        load_four(0, first), load_four(4, last), load_four(8, second), load_four(12, second + 64);
      else
#pragma unroll
        for (uint32_t& of : unit) of = 0;
    }
    // The two units that step `step` multiplies: of the first image, of the second one, and the last ones of both.
    __device__ uint32_t low(int step) const {
      return unit[step < kWholeSteps ? 2 * step : step < kSteps - 1 ? 2 * (step - kWholeSteps) + 8 : 6];
    }
    __device__ uint32_t high(int step) const {
      return unit[step < kWholeSteps ? 2 * step + 1 : step < kSteps - 1 ? 2 * (step - kWholeSteps) + 9 : 7];
    }
  };

  // A thread's words of a row of each image: where its pairs of pixels are, 8 columns apart, and those behind.
  struct Words {
    uint32_t low[2][Tile::kWords], high[2][Tile::kWords];

    __device__ void load(uint32_t from, int slot) {
#pragma unroll
      for (int image = 0; image < 2; ++image, from += slot)
#pragma unroll
        for (int w = 0; w < Tile::kWords; ++w)
          low[image][w] = load_word(from + 16 * w), high[image][w] = load_word(from + 16 * w + 4);
    }
  };

  // A thread's pairs of pixels of a row of each image, 8 columns apart, four for each multiplication. Those that two of
  // them have are made twice, in different ways: a compiler would copy them, again and again.
  struct Pixels {
    static constexpr int kQuads = kWholeSteps + kColumnTiles - 1;
    uint32_t quad[2][kQuads][4], both[kColumnTiles][4];  // of both images
    uint32_t half[kSteps][2];

    __device__ Pixels(const Words& words, uint32_t select, uint32_t other_select) {
#pragma unroll
      for (int image = 0; image < 2; ++image)
#pragma unroll
        for (int w = 0; w < Tile::kWords; ++w) {
          const uint32_t low = words.low[image][w], high = words.high[image][w];
          const uint32_t pair = __byte_perm(low, high, select);
          if (w / 2 < kQuads) quad[image][w / 2][w % 2] = pair;
          if (w > 0 && (w - 1) / 2 < kQuads)
            quad[image][(w - 1) / 2][w % 2 == 1 ? 2 : 3] = __byte_perm(high, low, other_select);
          if (w >= kUnits - 1 && w - (kUnits - 1) < 2 * kColumnTiles)
            both[(w - kUnits + 1) / 2][(w - kUnits + 1) % 2 + 2 * image] = pair;
          if (kRowPairs > 0) {
            const int at = w - 2 * kColumnTiles;
            if (at >= 0 && at < 2 * kWholeSteps) half[image * kWholeSteps + at / 2][at % 2] = pair;
            if (at == kUnits - 1) half[kSteps - 1][image] = pair;
          }
        }
    }
    // What a step multiplies for a tile of columns.
    __device__ const uint32_t (&of(int step, int tile) const)[4] {
      return step < kSteps - 1 ? quad[step / kWholeSteps][step % kWholeSteps + tile] : both[tile];
    }
  };

  // `source`, `source_slot` and `select`: the thread's words of the first row, from an image to the next, and how two
  // become a pair. `grad`, `grad_last` and `grad_second`: its addresses of the rows of the gradient that the first row
  // meets first. Tile i has something to add in row n if 8 * (n - i) + `begin` is in [0, `end`); `tiles` is how many
  // there are.
  __device__ void add(uint32_t source, int source_slot, int source_step, uint32_t select, uint32_t grad,
                      uint32_t grad_last, uint32_t grad_second, int rows, int begin, int end, int tiles) {
    constexpr int kGradStep = 8 * kGradPitch;
    const uint32_t other_select = select == 0x3210 ? 0x7654 : 0x1076;
    const auto meets = [&](int i) { return static_cast<unsigned>(begin - 8 * i) < static_cast<unsigned>(end); };
    Grads g[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      g[i].load(meets(i), grad - i * kGradStep, grad_last - i * kGradStep, grad_second - i * kGradStep);
    Words words;
    words.load(source, source_slot);
#pragma unroll 1
    while (true) {
      bool wanted[kRowTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) wanted[i] = i < tiles && meets(i);
      const Pixels x(words, select, other_select);
      if constexpr (Tile::kBranches) {
        const auto multiply_tile = [&](int i, int j, int step) {
          multiply(sum[i][j], sum[i][j], x.of(step, j), {g[i].low(step), g[i].high(step)}, T{});
        };
        bool all = true;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) all &= wanted[i];
        if (all) {
#pragma unroll
          for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
              for (int i = kRowTiles - 1; i >= 0; --i) multiply_tile(i, j, step);
        } else {
#pragma unroll
          for (int i = kRowTiles - 1; i >= 0; --i)
            if (wanted[i])
#pragma unroll
              for (int step = 0; step < kSteps; ++step)
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j) multiply_tile(i, j, step);
        }
      } else {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
            for (int i = kRowTiles - 1; i >= 0; --i)
              multiply_if(wanted[i], sum[i][j], x.of(step, j), {g[i].low(step), g[i].high(step)}, T{});
#pragma unroll
          for (int pair = kRowPairs - 1; pair >= 0; --pair) {
            const int i = 2 * pair, next = i + 1;
            const bool has_next = next < kRowTiles;
            const Grads &a = g[i], &b = g[next % kRowTiles];
            multiply_if(wanted[i] || (has_next && wanted[next % kRowTiles]), last[pair],
                        {a.low(step), has_next ? b.low(step) : 0, a.high(step), has_next ? b.high(step) : 0},
                        x.half[step], T{});
          }
        }
      }
      begin += 8, rows -= 8;
      if (rows <= 0) return;
      // The rows of the gradient that a tile meets next are those that the tile before has met.
#pragma unroll
      for (int i = kRowTiles - 1; i > 0; --i) g[i] = g[i - 1];
      grad += kGradStep, grad_last += kGradStep, grad_second += kGradStep;
      g[0].load(meets(0), grad, grad_last, grad_second);
      source += source_step;
      words.load(source, source_slot);
    }
  }

  // Calls put(row, column, sum) for all of a thread's sums.
  template <typename Put>
  __device__ void for_each(Put&& put) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) put(8 * i + 2 * t + e % 2, 16 * j + g + e / 2 * 8, sum[i][j][e]);
        if (kRowPairs > 0 && i % 2 == e / 2) put(8 * i + g, 16 * kColumnTiles + 2 * t + e % 2, last[i / 2][e]);
      }
  }
};

// The sum of one tap over a split, of products inside the image only.
template <typename T>
__device__ __noinline__ float sum_by_products(const Hankel& a, const Part& part, int i, int j) {
  const int shift = i - a.padding_h, diagonal = j - a.padding_w;
  double total = 0;
  for (int n = 2 * part.first; n < min(2 * part.last, a.images); ++n)
    for (int r = max(-shift, 0); r < min(a.grad.rows, a.source.rows - shift); ++r) {
      const T* x = reinterpret_cast<const T*>(a.source.base + part.filter / a.multiplier * a.source.channel_bytes +
                                              n * a.source.image_bytes) +
                   (r + shift) * a.source.width + diagonal;
      const T* g =
          reinterpret_cast<const T*>(a.grad.base + part.filter * a.grad.channel_bytes + n * a.grad.image_bytes) +
          r * a.grad.width;
      float sum = 0;
      for (int c = max(-diagonal, 0); c < min(a.grad.width, a.source.width - diagonal); ++c)
        sum = fmaf(widen(x[c]), widen(g[c]), sum);
      total += sum;
    }
  return static_cast<float>(total);
}

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) hankel_planes(const __grid_constant__ Hankel a) {
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const Part part = Part::of(a, Tile{});
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s) {
      init_barrier(kFullAt + 8 * s, 1);
      init_barrier(kEmptyAt + 8 * s, Tile::kWarps * kWarpArrivals);
    }
  if (threadIdx.x == 0) prefetch(a.source.map), prefetch(a.grad.map);
  clear_behind(a, Tile::kThreads);
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();

  const uint32_t memory = kept_shared_address();
  const int lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);  // kept as well
  // The thread's first pair of pixels, and where its rows of the gradient are if the first of them is row 0.
  const int column = 2 * (lane % 4) + lane / 4 + part.j - a.padding_w;
  const uint32_t select = column % 2 == 0 ? 0x3210 : 0x5432;
  const int source_at = a.source_at + a.border + 2 * (column & ~1);
  const int grad_at = (8 - lane % 8) * kGradPitch;
  const int grad_first = 16 * (lane / 8), last_at = lane / 8 < 3 ? 64 + grad_first : a.grad_slot() + 16 * (kUnits - 1);
  const int tiles = min(Tile::kRowTiles, (a.kernel_h - part.i + 7) / 8);
  const bool with_bias = a.result.with_bias() && part.i == 0 && part.j == 0;
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  float bias = 0;
  Marcher<T, Tile> marcher;
  // Stages are filled again a little late, so that no warp waits for those that are slower.
  Ahead ahead{part.first};
  for (int s = min(3, a.stages - 1); s < a.stages && ahead.pair < part.last && warp == 0; ++s) ahead.load_next(a, part);
  Turn turn;
  int item = warp;  // rows of a pair, counted on from pair to pair
#pragma unroll 1
  for (int pair = part.first; pair < part.last; ++pair, turn.next(a.stages), item -= kResidues) {
    const uint32_t stage = memory + kFirstStage + turn.stage * a.stage_bytes;
    if (warp == 0 && ahead.pair < part.last) ahead.load_next(a, part);
    wait_at(memory + kFullAt + 8 * turn.stage, turn.parity);
    if (item < kResidues) {
      const int begin = item + a.padding_h - part.i;
      const uint32_t grad = stage + grad_at + begin * kGradPitch;
      if (item < a.source.rows)
        marcher.add(stage + source_at + item * a.source_pitch, a.source_slot(), 8 * a.source_pitch, select,
                    grad + grad_first, grad + last_at, grad + grad_first + a.grad_slot(), a.source.rows - item, begin,
                    a.grad.rows + 7, tiles);
      if (with_bias)
        for (int i = 512 * item; i < 2 * a.grad_slot(); i += 512 * kResidues) {  // with zeros between them, and behind
          uint32_t g[4];
          float sum[4] = {};
          const int at = i + 16 * lane;
          load_matrices(g, stage + (at < 2 * a.grad_slot() ? 8 * kGradPitch + at : 0));
          multiply(sum, sum, g, {kOnes, kOnes}, T{});
          bias += sum[0] + sum[2];
        }
      item += Tile::kWarps;
    }
    arrive_together_at(memory + kEmptyAt + 8 * turn.stage, lane == 0);
  }
  __syncthreads();

  constexpr int kSums = kFirstStage;
  marcher.for_each([&](int row, int column, float sum) {
    shared<float>(kSums + 4 * ((warp * Tile::kRows + row) * Tile::kSumPitch + column)) = sum;
  });
  bias = lane % 4 == 0 ? bias : 0;
  for (int offset = 16; offset > 0; offset /= 2) bias += __shfl_xor_sync(~0u, bias, offset);
  if (lane == 0) shared<float>(kSums + Tile::kBiasSums + 4 * warp) = bias;
  __syncthreads();
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kColumns; index += Tile::kThreads) {
    const int row = index / Tile::kColumns, i = part.i + row, j = part.j + index % Tile::kColumns;
    if (i >= a.kernel_h || j >= a.kernel_w) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w)
      total += shared<float>(kSums + 4 * ((w * Tile::kRows + row) * Tile::kSumPitch + index % Tile::kColumns));
    if (!is_finite(total)) total = sum_by_products<T>(a, part, i, j);
    a.result.put<T>(part.filter, part.split, i * a.tap_row + j * a.tap_column, total);
  }
  if (with_bias && threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < Tile::kWarps; ++w) total += shared<float>(kSums + Tile::kBiasSums + 4 * w);
    a.result.put<T>(part.filter, part.split, a.kernel_h * a.kernel_w, total);
  }
#endif
}

// Cycles of a multiprocessor for a row of a pair of images, as measured: what is loaded for them, and multiplications.
template <class Tile>
double cost_of(const Problem& p, Tile) {
  const int64_t pieces = ceil_div(p.kernel_h, Tile::kRows) * ceil_div(p.kernel_w, Tile::kColumns);
  constexpr int kMultiplications = kUnits * (Tile::kRowTiles * Tile::kColumnTiles + Tile::kRowPairs);
  return static_cast<double>(pieces) * (50 + 1.55 * kMultiplications);
}

// Calls visit(Tile{}) for all that the kernel is compiled for.
template <typename Visitor>
void visit_tiles(Visitor&& visit) {
  visit(Tile<2, 2, 16>{}), visit(Tile<3, 3>{}), visit(Tile<4, 4>{}), visit(Tile<3, 5>{}), visit(Tile<3, 6>{});
}

double least_cost(const Problem& p) {
  double least = INFINITY;
  visit_tiles([&](auto tile) { least = std::min(least, cost_of(p, tile)); });
  return least;
}

// The same of outer_grad_weight_planes.cu: a row of the kernel after the other, or, of columns that are near, two a
// warp for one or two groups of them.
double cost_of_outer(const Problem& p) {
  const int64_t rows = OuterSizes::of(p, false).rows();
  constexpr int64_t kMost = 11, kMostOfGroup = 16;
  if (rows <= kMost) return 6.7 * static_cast<double>(rows);
  const bool near =
      p.width == kColumns && p.out_width == kColumns && p.padding_w <= kNear && p.kernel_w - 1 - p.padding_w <= kNear;
  return !near || rows > 2 * kMostOfGroup ? INFINITY : rows <= kMostOfGroup ? 95 : 140;
}

// Into how many parts the pairs of images are divided.
int splits_for(const Hankel& a, double row_cycles, int rows_of_tile, int warps, int multiprocessors) {
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int64_t pairs = a.pairs(), products = ceil_div(pairs * kResidues, warps) * ceil_div(a.source.rows, 8) * 112;
  const int fewest = static_cast<int>(std::clamp<int64_t>(ceil_div(products, kLongest), 1, pairs));
  const int64_t blocks = int64_t{a.filters} * a.pieces_h * a.pieces_w;
  const double pair = row_cycles / (a.pieces_h * a.pieces_w) * a.source.rows;
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min<int64_t>(pairs, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(blocks * splits, multiprocessors));
    const double block = static_cast<double>(ceil_div(pairs, splits)) * pair + 5000 + 50 * rows_of_tile;
    const double cost = rounds * block + (splits > 1 ? 5000 + 10. * splits : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

template <typename T, class Tile>
bool launch(const Problem& p, Hankel a, Tile, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  a.pieces_h = static_cast<int>(ceil_div(a.kernel_h, Tile::kRows));
  a.pieces_w = static_cast<int>(ceil_div(a.kernel_w, Tile::kColumns));
  a.stages = static_cast<int>(std::min<int64_t>((device.shared_per_block - kFirstStage) / a.stage_bytes, kMaxStages));
  if (a.stages < 2) return false;
  a.splits = splits_for(a, cost_of(p, Tile{}), Tile::kRows, Tile::kWarps, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes = kFirstStage + std::max(a.stages * a.stage_bytes, Tile::kSumBytes);
  const auto kernel = hankel_planes<T, Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = int64_t{a.pieces_h} * a.pieces_w * a.filters * a.splits;
  launch_early(kernel, a, blocks, Tile::kThreads, stream, {.shared_bytes = shared_bytes});
  check_launch("hankel_planes");
  launch_add_partial_sums(p, a.result, a.splits, stream);
  return true;
}

}  // namespace

bool launch_hankel_grad_weight_planes(const Problem& p, bool exchanged, const ImagePlanes& source,
                                      const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream) {
  if (current_device().capability < 90 || !can_overlap(hankel_planes<__half, Tile<4, 4>>)) return false;
  constexpr int kFewColumns = 40;  // fewer of them leave too much out
  if (grad.width > kColumns || grad.width <= kFewColumns) return false;
  const auto arrange = [](Plane& to, const ImagePlanes& from) {
    to.base = from.base, to.image_bytes = from.image_bytes, to.channel_bytes = from.channel_bytes;
    to.rows = from.height, to.width = from.width;
    return from.unit == kUnit && from.row_bytes == 2 * from.width && from.row_bytes % kUnit == 0;
  };
  if (std::max(source.height, grad.height) + kZeroRows > kMostBoxSide || source.width > kMostBoxSide) return false;
  Hankel a{};
  if (!arrange(a.source, source) || !arrange(a.grad, grad)) return false;
  const double cost = least_cost(p);
  if (cost > cost_of_outer(p)) return false;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = exchanged ? 1 : a.kernel_w, a.tap_column = exchanged ? a.kernel_h : 1;
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier);
  // Zeros between rows are those behind the one and those before the other.
  const int64_t behind = kColumns + a.kernel_w - 1 - a.padding_w - a.source.width;
  a.border = static_cast<int>(round_up(2 * std::max<int64_t>({a.padding_w, behind, 8}), kUnit));
  a.source_pitch = 2 * a.source.width + a.border;
  a.source_at = static_cast<int>(round_up(2 * a.grad_slot() + kZeroRows * kGradPitch, kBoxUnit));
  const int64_t stage_bytes = a.source_at + 2 * int64_t{a.source_slot()} + a.border + kBeyond;
  a.stage_bytes = static_cast<int>(round_up(stage_bytes, kBoxUnit));
  const auto describe = [&](Plane& plane, int64_t channels, int columns, int rows) {
    return describe_boxes(plane.map, const_cast<char*>(plane.base), 2, {plane.width, plane.rows, channels, p.batch},
                          {2 * plane.width, plane.channel_bytes, plane.image_bytes}, {columns, rows, 1, 2});
  };
  if (!describe(a.source, p.channels, a.source_pitch / 2, a.source.rows) ||
      !describe(a.grad, p.filters(), kColumns, a.grad.rows + kZeroRows))
    return false;
  bool done = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      visit_tiles([&](auto tile) {
        if (!done && cost_of(p, tile) == cost) done = launch<T>(p, a, tile, allocate, stream);
      });
    }
  });
  return done;
}

}  // namespace dwconv
