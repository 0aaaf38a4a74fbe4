// The same as outer_grad_weight for a tall kernel with few columns, from whole planes in shared memory, multiplied by
// warpgroups: on sm_90, in code for sm_90a.
//
// Columns are summed over and rows multiplied: with A[r][u] = gradient[r][u - shift] and B[u][y] = input[y][u], the
// product has, for column shift + padding of the kernel, the sums for its rows y + padding - r on diagonals. A
// warpgroup has two shifts. A box brings the rows of the input as tensor cores read them, 64 columns each with zeros
// behind; the gradient goes to registers, as far to the side as the shift says. Each warp adds up diagonals of its rows
// of the products, which go through shared memory.
//
// Zeros stand for columns that there are not, and meet others: sums that are not finite are taken again, product by
// product.
#include "outer_grad_weight_tall.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

#include "boxes.cuh"
#include "launch.h"
#include "outer_grad_weight.h"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "planes.cuh"
#include "tensor_cores.cuh"
#include "warpgroups.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

// What a kernel is compiled for.
template <int columns>
struct Form {
  [[maybe_unused]] static constexpr int kColumns = columns;  // of a product, that are computed
  // From a row to the next, in floats, where rows are laid out: lanes in all banks.
  static constexpr int kPitch = columns % 32 == 24 ? columns : columns + 8;
};
constexpr int kGroups = 3, kWarps = kGroups * kGroupWarps;  // that multiply
constexpr int kThreads = 32 * (kWarps + 2);                 // with a warp that loads, and one for the bias
constexpr int kShifts = 2;                                  // of a warpgroup
constexpr int kGroupRows = 64, kGroupSteps = 16;            // of a product, and those that it is summed over
constexpr int kMaxStages = 8, kMostStageImages = 4;
constexpr int kBatch = 8;  // rows of a product that a warp lays out at once

// `width` and what is across are rows of planes, and the other way round.
struct Planes {
  CUtensorMap source_boxes;
  const char *source, *grad;
  int64_t source_image, source_channel, grad_image, grad_channel;  // bytes from one to the next
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;
  int first_row, last_row;  // of the kernel, that meet the images: from and up to, less one
  int parts, part_rows;     // of those rows, for different blocks
  int height, width;
  int rows, columns, pieces;  // of a piece, and of a plane
  int images, filters, multiplier, splits;
  int unit;  // images of which splits have whole numbers
  int stages, stage_images, stage_bytes;
  int tile_bytes, grad_at, grad_bytes;  // of boxes; where the gradient is in a stage, and what it has of an image
  int row_step, column_step;            // elements
  int sums, scratch, first_stage;
  static constexpr int kBias = 8 * 2 * kMaxStages, kZeros = kBias + 16;

  [[maybe_unused]] __device__ int full(int stage) const { return 8 * stage; }
  [[maybe_unused]] __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __host__ __device__ int items() const { return filters * parts * splits; }
  // Runs of rows of a product that are of the same row of the image, and of the same warp: their sum tells them apart.
  static constexpr int kMostRuns = kGroupRows / kBatch + kGroupWarps - 1;
  signed char run_rows[kMostRuns];  // of a piece, or less than 0
  __host__ __device__ int runs() const { return rows + kGroupWarps - 1; }

  __host__ __device__ int down(int rows_apart) const {
    constexpr int kMany = 1024;
    return (rows_apart + kMany * rows) / rows - kMany;
  }
  // Of the shifts that rows of the kernel from `row` on have part of, and that those before it have.
  __host__ __device__ int first_shift(int row) const {
    const int shift = down(row - padding_h);
    return shift > -pieces ? shift : 1 - pieces;
  }
  __host__ __device__ int last_shift(int row) const {
    const int shift = down(row - 1 - padding_h + rows - 1);
    return shift < pieces ? shift : pieces - 1;
  }
};

// What a block adds up: the images of a split, for a filter and some rows.
struct Item {
  int filter, split, part, first, last;

  __device__ Item(const Planes& a, int number) : filter(number), split(0), part(0), first(0), last(a.images) {
    if (a.parts > 1) part = filter % a.parts, filter /= a.parts;  // they share planes
    if (a.splits == 1) return;
    split = filter / a.filters, filter %= a.filters;
    const int64_t units = (a.images + a.unit - 1) / a.unit;
    first = a.unit * static_cast<int>(units * split / a.splits);
    last = min(a.unit * static_cast<int>(units * (split + 1) / a.splits), a.images);
  }

  __device__ int first_row(const Planes& a) const { return a.first_row + part * a.part_rows; }
  __device__ int last_row(const Planes& a) const { return min(first_row(a) + a.part_rows, a.last_row); }
};

// A place in the ring of stages.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(const Planes& a) {
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
};

// What a thread loads next.
class Ahead {
 public:
  __device__ explicit Ahead(int stages) : stages_(stages), number_(blockIdx.x) {}
  __device__ bool more(const Planes& a) const { return number_ < a.items(); }

  // Loads a stage, as soon as it is free.
  __device__ void load_next(const Planes& a) {
    const Item item(a, number_);
    const int channel = item.filter / a.multiplier, image = item.first + image_;
    const int barrier = a.full(turn_.stage);
    int to = stages_ + turn_.stage * a.stage_bytes;
    wait(a.empty(turn_.stage), turn_.parity ^ 1);
    const int images = min(a.stage_images, item.last - image);
    const char* from = a.grad + item.filter * a.grad_channel + image * a.grad_image;
    uint32_t grad_to = shared_address(to + a.grad_at);
    expect_bytes(barrier, images * (a.tile_bytes + a.grad_bytes));
    for (int k = 0; k < images; ++k, to += a.tile_bytes, grad_to += a.grad_bytes, from += a.grad_image) {
      copy_box(to, a.source_boxes, 0, 0, channel, image + k, barrier);
      copy_bulk(grad_to, from, a.grad_bytes, barrier);
    }
    arrive(barrier);
    image_ += a.stage_images;
    if (image + a.stage_images >= item.last) number_ += gridDim.x, image_ = 0;
    turn_.next(a);
  }

 private:
  int stages_, number_, image_ = 0;  // the latter of an item's
  Turn turn_;
};

// Adds up the gradient of a tall kernel's planes, for the bias.
template <typename T, class Form>
__device__ void add_bias(const Planes& a, int stages) {
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  const int lane = threadIdx.x % 32;
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    float sums[4] = {};
    for (int image = item.first; image < item.last; image += a.stage_images, turn.next(a)) {
      const uint32_t grad = shared_address(stages + turn.stage * a.stage_bytes + a.grad_at);
      const int bytes = min(a.stage_images, item.last - image) * a.grad_bytes;
      wait(a.full(turn.stage), turn.parity);
      for (int at = kUnit * lane; at - kUnit * lane < bytes; at += 32 * kUnit) {
        uint32_t g[4];
        load_matrices(g, at < bytes ? grad + at : shared_address(Planes::kZeros));
        multiply(sums, sums, g, {kOne, kOne}, T{});
      }
      arrive_together(a.empty(turn.stage), lane == 0);
    }
    float total = lane % 4 == 0 ? sums[0] + sums[2] : 0;
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane < kGroupWarps) shared<float>(Planes::kBias + 4 * lane) = lane == 0 ? total : 0;
    meet<1>(32 * (kWarps + 1));
    meet<1>(32 * (kWarps + 1));
  }
}

// A tap's sum, product by product.
template <typename T>
__device__ __noinline__ float sum_by_products(const Planes& a, const Item& item, int i, int j) {
  const int dy = i - a.padding_h, dx = j - a.padding_w;
  double total = 0;
  for (int image = item.first; image < item.last; ++image) {
    const auto* x =
        reinterpret_cast<const T*>(a.source + item.filter / a.multiplier * a.source_channel + image * a.source_image);
    const auto* g = reinterpret_cast<const T*>(a.grad + item.filter * a.grad_channel + image * a.grad_image);
    for (int r = max(-dy, 0); r < min(a.height, a.height - dy); ++r) {
      float sum = 0;
      for (int w = max(-dx, 0); w < min(a.width, a.width - dx); ++w)
        sum = fmaf(widen(x[(r + dy) * a.row_step + (w + dx) * a.column_step]),
                   widen(g[r * a.row_step + w * a.column_step]), sum);
      total += sum;
    }
  }
  return static_cast<float>(total);
}

// Where a warp's sums of a run of rows are: for columns of the kernel on either side of the middle.
template <int kColumns>
__device__ int sums_at(const Planes& a, int shift, int run, bool left) {
  return a.sums + 4 * kColumns * (2 * (shift * a.runs() + run) + left);
}

// Adds up what warps have of each tap.
template <typename T, class Form>
__device__ void add_up(const Planes& a, const Item& item, uint32_t memory) {
  constexpr int kColumns = Form::kColumns;
  const int first_row = item.first_row(a), last_row = item.last_row(a), first_shift = a.first_shift(first_row);
  const int shifts = a.last_shift(last_row) - first_shift + 1;
  const auto put = [&](int i, int j, float sum) {
    a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, sum);
  };
  for (int k = threadIdx.x; k < (last_row - first_row) * a.kernel_w; k += 32 * kWarps) {
    const int i = first_row + k / a.kernel_w, j = k % a.kernel_w, dx = j - a.padding_w;
    const int first = a.down(i - a.padding_h), source = i - a.padding_h - first * a.rows;
    float sum = 0;
    if (dx > -a.width && dx < a.width) {
      const uint32_t from = memory + sums_at<kColumns>(a, first - first_shift, 0, dx < 0) +
                            4 * (source * a.width + (dx < 0 ? dx + a.width : dx));
      const int next_shift = sums_at<kColumns>(a, 1, 0, false) - a.sums - 4 * a.columns;
#pragma unroll 4
      for (int run = 0; run < a.runs(); ++run) {
        const int row = a.run_rows[run], next = source + row >= a.rows, shift = first + next - first_shift;
        const uint32_t at = from + 4 * (2 * kColumns * run + row * a.width) + (next ? next_shift : 0);
        if (row >= 0 && shift >= 0 && shift < shifts) sum += __uint_as_float(load_word(at));
      }
      if (!is_finite(sum)) sum = sum_by_products<T>(a, item, i, j);
    }
    put(i, j, sum);
  }
  // Rows of the kernel that never meet the images.
  for (int k = threadIdx.x; item.part == 0 && k < (a.kernel_h - (a.last_row - a.first_row)) * a.kernel_w;
       k += 32 * kWarps) {
    const int row = k / a.kernel_w;
    put(row < a.first_row ? row : row - a.first_row + a.last_row, k % a.kernel_w, 0);
  }
  if (a.result.with_bias() && item.part == 0 && threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < kGroupWarps; ++w) sum += shared<float>(Planes::kBias + 4 * w);
    a.result.put<T>(item.filter, item.split, a.kernel_h * a.kernel_w, sum);
  }
}

__device__ inline void store_pair(uint32_t to, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}
__device__ inline void store_word(uint32_t to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// The distances of columns that a lane has of each row of a product: one in either half.
template <class Form>
struct Distances {
  int place[2];  // in the row of a product, from the column of its own: of the row's columns and the distance
  int wraps[2];  // the first column from which that far is beyond the image's row
  bool any[2];

  __device__ Distances(const Planes& a, int lane) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      place[c] = lane + c * Form::kColumns / 2;
      any[c] = lane < Form::kColumns / 2 && place[c] < a.columns;
      place[c] = any[c] ? place[c] : 0, wraps[c] = a.width - place[c] % a.width;
    }
  }
};

// Adds up a warp's rows of the products of some shifts along diagonals, those of a row of the image at a time. What
// would be beyond the image's row is before its first column: of the same row, at a distance that is less by a row.
template <class Form>
__device__ void add_diagonals(const Planes& a, const float (&sums)[kShifts][Form::kColumns / 8][4], int first_number,
                              int shifts, uint32_t memory, const Distances<Form>& distances) {
  constexpr int kColumns = Form::kColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps;
  const uint32_t scratch = memory + a.scratch + 4 * (threadIdx.x / 32) * kBatch * Form::kPitch;
  const uint32_t store_to = scratch + 4 * (lane / 4 * Form::kPitch + 2 * (lane % 4));
  int row = 0;  // of a piece
  float right[2], left[2];
#pragma unroll 1
  for (int k = 0; k < 2 * kShifts; ++k) {  // half of the rows of a product
    const int number = first_number + k / 2;
    if (number >= shifts) break;
    if (k % 2 == 0) row = 16 * warp / a.width, right[0] = right[1] = left[0] = left[1] = 0;
    const int first = 16 * warp + k % 2 * kBatch;
    if (first >= a.columns) continue;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2 * kShifts; ++half)
      if (half == k)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
          store_pair(store_to + 32 * n, sums[half / 2][n][half % 2 * 2], sums[half / 2][n][half % 2 * 2 + 1]);
    __syncwarp();
    const int column = first - row * a.width, end = a.width - column;  // of the image's row
    const auto end_run = [&] {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (distances.any[c]) {
          const uint32_t to = memory + sums_at<kColumns>(a, number, row + warp, false) + 4 * distances.place[c];
          store_word(to, right[c]), store_word(to + 4 * kColumns, left[c]);
        }
      ++row;
    };
    // Adds some rows of the product, whose columns follow from those of the gradient.
    const auto add = [&](int from, int to, int column) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint32_t inside = scratch + 4 * (distances.place[c] + column), beyond = inside - 4 * a.width;
        const int first_beyond = distances.wraps[c] - column;
        float products[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r)
          products[r] = __uint_as_float(load_word((r >= first_beyond ? beyond : inside) + 4 * r * (Form::kPitch + 1)));
#pragma unroll
        for (int r = 0; r < kBatch; ++r)
          if (r >= from && r < to) {
            if (r >= first_beyond)
              left[c] += products[r];
            else
              right[c] += products[r];
          }
      }
    };
    if (end >= kBatch)
      add(0, kBatch, column);
    else
      add(0, end, column);
    if (end <= kBatch) {
      end_run();
      right[0] = right[1] = left[0] = left[1] = 0;
      if (end < kBatch && first + end < a.columns) add(end, kBatch, -end);
    }
    if (k % 2 == 1 && row * a.width < first + kBatch && row < a.rows) end_run();  // it goes on in the next warp's rows
  }
}

// What a lane has of a gradient's columns of a tall kernel's planes, and of two shifts, one after the other.
class Columns {
 public:
  static constexpr int kSteps = kGroupRows / kGroupSteps;

  __device__ Columns(const Planes& a, int shift) : is_odd_(shift & 1) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps, column = 2 * (lane % 4) - shift;
#pragma unroll
    for (int h = 0; h < 2; ++h)  // rows that there are not are the last one
      place_[h] = 2 * (min(16 * warp + 8 * h + lane / 4, a.width - 1) * a.height + column + is_odd_);
#pragma unroll
    for (int j = 0; j < kShifts; ++j)
#pragma unroll
      for (int k = 0; k < 2 * kSteps; ++k) masks_[j][k] = mask(8 * k + column - j, a.height);
  }

  // Adds the products of some images.
  template <typename T, int kTiles>
  __device__ void add(float (&sums)[kShifts][kTiles][4], const Planes& a, uint32_t grad, uint32_t source,
                      int images) const {
    Words words;
    load(words, grad);
#pragma unroll 1
    for (; images > 0; --images, source += a.tile_bytes) {
      const uint32_t next = images > 1 ? grad + a.grad_bytes : grad;
      uint32_t g[2][kShifts][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t (&here)[kShifts][4] = g[step % 2];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t between = __byte_perm(words.before[e], words.here[e], 0x5432);
          here[0][e] = (is_odd_ ? between : words.here[e]) & masks_[0][2 * step + e / 2];
          here[1][e] = (is_odd_ ? words.before[e] : between) & masks_[1][2 * step + e / 2];
        }
        load(words, step + 1 < kSteps ? grad + 2 * kGroupSteps * (step + 1) : next);  // what is next
        before_multiplications();
#pragma unroll
        for (int j = 0; j < kShifts; ++j)
          multiply_together(sums[j], here[j], swizzled_rows(source + 2 * kGroupSteps * step), T{});
        commit_multiplications();
        wait_multiplications<1>();
      }
      grad = next;
    }
  }

 private:
  int is_odd_, place_[2];
  uint32_t masks_[kShifts][2 * kSteps];

  // Pairs of columns from an even one on, and the pairs before.
  struct Words {
    uint32_t here[4], before[4];
  };
  __device__ void load(Words& words, uint32_t grad) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t from = grad + place_[e % 2] + 16 * (e / 2);
      words.here[e] = load_word(from), words.before[e] = load_word(from - 4);
    }
  }

  // Which of a pair of columns there are.
  static __device__ uint32_t mask(int column, int columns) {
    return (column >= 0 && column < columns ? 0xffffu : 0u) | (column >= -1 && column + 1 < columns ? 0xffff0000u : 0u);
  }
};

template <typename T, class Form>
__global__ void __launch_bounds__(launch_threads(kThreads), 1) outer_tall(const __grid_constant__ Planes a) {
  if (!kHasWarpgroups) return;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  // Where stages begin, as a multiple of an address.
  const int stages = a.first_stage + static_cast<int>(-shared_address(a.first_stage) % kBoxAlignment);
  const bool has_bias = a.result.with_bias();
  if (threadIdx.x == 0) {
    const int warps = kWarps + has_bias;
    for (int s = 0; s < a.stages; ++s) {
      init_barrier(a.full(s), 1), init_barrier(a.empty(s), warps * kWarpArrivals);
    }
  }
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(Planes::kZeros + 4 * threadIdx.x) = 0;
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  if (warp >= kWarps) {
    if (warp == kWarps) {
      if (is_elected())
        for (Ahead ahead(stages); ahead.more(a);) ahead.load_next(a);
    } else if (has_bias) {
      add_bias<T, Form>(a, stages);
    }
    return;
  }

  const int group = warp / kGroupWarps;
  const uint32_t memory = kept_shared_address();
  const Distances<Form> distances(a, lane);
  const auto number_of = [&](int j) { return group * kShifts + j; };  // the warpgroup's shifts
  Turn turn;
#pragma unroll 1
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const int first_shift = a.first_shift(item.first_row(a));
    const int shifts = a.last_shift(item.last_row(a)) - first_shift + 1;
    float sums[kShifts][Form::kColumns / 8][4] = {};
    const Columns columns(a, first_shift + number_of(0));
#pragma unroll 1
    for (int image = item.first; image < item.last; image += a.stage_images) {
      wait_at(memory + a.full(turn.stage), turn.parity);
      const uint32_t source = memory + stages + turn.stage * a.stage_bytes;
      if (number_of(0) < shifts)
        columns.add<T>(sums, a, source + a.grad_at, source, min(item.last - image, a.stage_images));
      wait_multiplications<0>();
      arrive_together_at(memory + a.empty(turn.stage), lane == 0);
      turn.next(a);
    }
    add_diagonals<Form>(a, sums, number_of(0), shifts, memory, distances);
    const int threads = 32 * (kWarps + has_bias);
    meet<1>(threads);
    add_up<T, Form>(a, item, memory);
    meet<1>(threads);
  }
}

template <typename T, class Form>
void launch(const Problem& p, const Planes& a, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = outer_tall<T, Form>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = std::min<int64_t>(a.items(), current_device().multiprocessors);
  launch_early(kernel, a, blocks, kThreads, stream, {.shared_bytes = shared_bytes});
  check_launch("outer_tall");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

// Into how many parts the images are divided.
int splits_for(const Planes& a, int columns, int multiprocessors) {
  const int units = static_cast<int>(ceil_div(a.images, a.unit));
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int fewest = static_cast<int>(std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.pieces, kLongest), 1, units));
  const int shifts = a.last_shift(a.last_row) - a.first_shift(a.first_row) + 1;
  const double unit = 2. * columns * shifts;  // cycles of multiplications
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(units, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(int64_t{a.filters} * a.parts * splits, multiprocessors));
    const double cost = rounds * (static_cast<double>(ceil_div(units, splits)) * unit + 2500) + (splits > 1 ? 5000 : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

}  // namespace

bool launch_outer_grad_weight_tall(const Problem& p, const ImagePlanes& source, const ImagePlanes& grad,
                                   const Allocate& allocate, cudaStream_t stream) {
  if (!has_warpgroups(outer_tall<__half, Form<kGroupRows>>)) return false;
  const Device& device = current_device();
  if (source.height != grad.height || source.width != grad.width) return false;
  const OuterSizes sizes = OuterSizes::of(p, false);
  Planes a{};
  a.height = source.width, a.width = source.height;
  const auto fits = [](int size) { return 2 * size > kGroupRows && size <= kGroupRows && size % 8 == 0; };
  if (!fits(a.height) || !fits(a.width)) return false;
  a.rows = 1, a.columns = a.width, a.pieces = a.height;
  std::fill(std::begin(a.run_rows), std::end(a.run_rows), -1);
  for (int row = 0; row < a.columns; ++row)  // of a product
    a.run_rows[row / a.width + row / 16] = static_cast<signed char>(row / a.width);
  const int plane = a.height * a.width;
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.unit = 1;
  if (a.images < kGroupSteps) return false;  // too few to be worth to add up all products
  a.multiplier = static_cast<int>(p.multiplier);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = 1, a.tap_column = a.kernel_h;
  a.first_row = static_cast<int>(sizes.first_row()), a.last_row = static_cast<int>(sizes.last_row());

  constexpr int kMostShifts = kGroups * kShifts;
  a.parts = 1, a.part_rows = a.last_row - a.first_row;
  if (a.last_shift(a.last_row) - a.first_shift(a.first_row) >= kMostShifts) return false;

  const int columns = a.columns <= 56 ? 56 : 64;
  const int pitch = columns == 56 ? Form<56>::kPitch : Form<64>::kPitch;
  a.row_step = 1, a.column_step = a.height;
  a.sums = Planes::kZeros + kUnit;
  a.scratch = a.sums + 4 * kMostShifts * a.runs() * 2 * columns;
  a.first_stage = a.scratch + 4 * kMostShifts / kShifts * kGroupWarps * kBatch * pitch;
  constexpr int kFewStages = 3, kBeyond = 64;  // the latter: what is read behind planes
  const int64_t room = device.shared_per_block - a.first_stage - (kBoxAlignment - 1);
  a.tile_bytes = kBoxPitch * columns, a.grad_bytes = 2 * plane;
  for (a.stage_images = kMostStageImages; a.stage_images > 0; --a.stage_images) {
    a.grad_at = a.tile_bytes * a.stage_images;
    a.stage_bytes =
        static_cast<int>(round_up(a.grad_at + int64_t{a.stage_images} * a.grad_bytes + kBeyond, kBoxAlignment));
    a.stages = static_cast<int>(std::min<int64_t>(room / a.stage_bytes, kMaxStages));
    if (a.stages >= kFewStages || a.stage_images == 1) break;
  }
  if (a.stages < 2) return false;

  const auto begins_with_unit = [&](const ImagePlanes& v) {
    return v.row_bytes == 2 * v.width &&
           (reinterpret_cast<uintptr_t>(v.base) | v.channel_bytes | v.image_bytes) % kUnit == 0;
  };
  if (!begins_with_unit(source) || !begins_with_unit(grad) ||
      !describe_boxes(a.source_boxes, const_cast<char*>(source.base), 2,
                      {source.width, source.height, p.channels, a.images},
                      {source.row_bytes, source.channel_bytes, source.image_bytes}, {kGroupRows, columns, 1, 1},
                      CU_TENSOR_MAP_SWIZZLE_128B))
    return false;
  a.source = source.base, a.source_image = source.image_bytes, a.source_channel = source.channel_bytes;
  a.grad = grad.base, a.grad_image = grad.image_bytes, a.grad_channel = grad.channel_bytes;
  a.splits = splits_for(a, columns, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes = a.first_stage + kBoxAlignment - 1 + int64_t{a.stages} * a.stage_bytes;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (columns == 56) return launch<T, Form<56>>(p, a, shared_bytes, stream);
      launch<T, Form<64>>(p, a, shared_bytes, stream);
    }
  });
  return true;
}

}  // namespace dwconv
