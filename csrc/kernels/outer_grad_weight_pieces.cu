// The same as outer_grad_weight where two or four rows of a plane are 56 columns, multiplied by warpgroups: on sm_90,
// in code for sm_90a.
//
// Images are what is summed over, and rows that are 56 columns together a piece: all pairs of a piece of the gradient
// and one of the input that lies `shift` pieces further on go into the same products. A warpgroup has two shifts, which
// it multiplies by one instruction, with zeros where there is a piece for one of them only. Boxes bring pieces of all
// images of a stage as tensor cores read them, both factors from shared memory.
//
// At the end the products go through shared memory, to be added up along diagonals. Of rows of 28 columns, those of a
// shift, block by block: a warp has a row of the gradient and one of the input, whose sums are added up later. Of rows
// of 14 columns, those of all shifts side by side, so that pixels as far apart are a diagonal: it has the sums of two
// taps, of columns that are a row apart.
//
// Planes of 14 columns begin within a unit of 16 bytes, every other one of them: its pixels have numbers that are a few
// higher, and pixels before it become zeros. Zeros meet others: sums that are not finite are taken again, product by
// product.
#include "outer_grad_weight_pieces.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "boxes.cuh"
#include "outer_grad_weight.h"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "turn.cuh"
#include "warpgroups.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kGroups = 4, kShifts = 2;        // warpgroups, and shifts of each
constexpr int kWarps = kGroups * kGroupWarps;  // that multiply; one more loads, one looks after edges and the bias
constexpr int kThreads = 32 * (kWarps + 2);
constexpr int kStepImages = 16, kStepBytes = kStepImages * kBoxPitch;  // that a multiplication sums over, of a piece
constexpr int kStep = kStepBytes / kUnit;
constexpr int kMaxStages = 8, kMaxSteps = 4;
constexpr int kTiles = kBoxPitch / 16;            // 8 columns each, of a piece: the last one is left alone
constexpr int kProductBytes = 4 * kLong * kLong;  // of a shift

// Rows of so many columns: those of a piece, and of the row before that it may begin with.
template <int kWidth>
struct Rows {
  static constexpr int kCount = kLong / kWidth;
  // Whether planes may begin within a unit.
  static constexpr bool kMayBeginBefore = kWidth < 16;
  static constexpr int kFirst = kMayBeginBefore ? -1 : 0;
};

struct Pieces {
  CUtensorMap source_boxes[2], grad_boxes[2];  // of channels with even numbers, and of the others
  PlanePair planes;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;
  int first_row, last_row;  // of the kernel, that meet the images: from and up to, less one
  int groups, group_rows;   // parts of those rows for different blocks
  int before;               // columns of pieces before the first pixel, of every other channel
  int pieces;
  int images, filters, splits;
  int steps, stages;                    // of a stage, and how many of them there are
  int sums, scratch, first_stage;       // places in shared memory
  int sum_shifts, sum_left, sum_pitch;  // shifts that there are sums of; floats before them, and of a row
  static constexpr int kZeros = 8 * 3 * kMaxStages, kSums = kZeros + kUnit;

  __device__ int full(int stage) const { return 8 * stage; }
  __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __device__ int ready(int stage) const { return 8 * (2 * kMaxStages + stage); }
  __host__ __device__ int piece_bytes() const { return steps * kStepBytes; }
  __host__ __device__ int factor_bytes() const { return pieces * piece_bytes(); }
  __host__ __device__ int stage_bytes() const { return 2 * factor_bytes(); }
  __host__ __device__ int stage_images() const { return steps * kStepImages; }
  __host__ __device__ int items() const { return filters * groups * splits; }
  __device__ int before_channel(int channel) const { return channel % 2 > 0 ? before : 0; }
};

// What a block adds up: the images of a split, for a filter and some rows of the kernel.
struct Item {
  int filter, split, first, last;  // images
  int first_row, last_row;

  __device__ Item(const Pieces& a, int number) : split(0), first(0), last(a.images) {
    const int group = number % a.groups;
    filter = number / a.groups;
    first_row = a.first_row + group * a.group_rows, last_row = min(first_row + a.group_rows, a.last_row);
    if (a.splits == 1) return;
    split = filter / a.filters, filter %= a.filters;
    // Whole stages: a box has the images that follow in the array, whatever split they are of.
    const int all = (a.images + a.stage_images() - 1) / a.stage_images();
    first = static_cast<int>(int64_t{all} * split / a.splits) * a.stage_images();
    last = min(static_cast<int>(int64_t{all} * (split + 1) / a.splits) * a.stage_images(), a.images);
  }
};

// The shifts of pieces, from and up to, less one, that some rows of the kernel meet.
template <int kWidth>
struct ShiftsOf {
  int first, last;

  __host__ __device__ ShiftsOf(const Pieces& a, int first_row, int last_row) {
    using R = Rows<kWidth>;
    constexpr int kFar = 64;  // divides down
    const int low = first_row - a.padding_h + R::kFirst, high = last_row - 1 - a.padding_h + R::kCount - 1;
    first = (low + kFar * R::kCount) / R::kCount - kFar;
    last = (high + kFar * R::kCount) / R::kCount - kFar + 1 - R::kFirst;
    first = first > 1 - a.pieces ? first : 1 - a.pieces;
    last = last < a.pieces ? last : a.pieces;
  }
};

// Loads pieces, as stages become free.
template <int kWidth>
__device__ void load_pieces(const Pieces& a, int stages) {
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const int channel = item.filter / a.planes.multiplier;
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      const int barrier = a.full(turn.stage), to = stages + turn.stage * a.stage_bytes();
      wait(a.empty(turn.stage), turn.parity ^ 1);
      expect_bytes(barrier, a.stage_bytes());
      if constexpr (Rows<kWidth>::kMayBeginBefore) {
        for (int piece = 0; piece < a.pieces; ++piece) {
          const int at = to + piece * a.piece_bytes();
          copy_box(at, a.source_boxes[channel % 2], kLong * piece, image, channel / 2, 0, barrier);
          copy_box(at + a.factor_bytes(), a.grad_boxes[item.filter % 2], kLong * piece, image, item.filter / 2, 0,
                   barrier);
        }
      } else {
        copy_box(to, a.source_boxes[0], 0, image, 0, channel, barrier);
        copy_box(to + a.factor_bytes(), a.grad_boxes[0], 0, image, 0, item.filter, barrier);
      }
      arrive(barrier);
    }
  }
}

// Makes zeros of what is before the first pixels, and adds up the gradient for the bias.
template <typename T, int kWidth>
__device__ void look_after_edges(const Pieces& a, int stages) {
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  const int lane = threadIdx.x % 32;
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    float sums[4] = {};
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      const int stage = stages + turn.stage * a.stage_bytes(), grad = stage + a.factor_bytes();
      wait(a.full(turn.stage), turn.parity);
      if constexpr (Rows<kWidth>::kMayBeginBefore) {
        if (a.before_channel(item.filter) > 0) {
          for (int k = lane; k < a.stage_images(); k += 32) {
            const int unit = k * kBoxPitch + k % 8 * kUnit;  // the first one of an image
            for (int at = 0; at < 2 * a.before; at += 4)
              shared<uint32_t>(stage + unit + at) = 0, shared<uint32_t>(grad + unit + at) = 0;
          }
          before_bulk_copies();
        }
        arrive_together(a.ready(turn.stage), lane == 0);
      }
      if (a.result.with_bias()) {
        for (int at = 0; at < a.factor_bytes(); at += 32 * kUnit) {
          uint32_t g[4];
          const bool is_behind = (lane ^ (at / kBoxPitch + lane / 8)) % 8 == kTiles - 1;
          load_matrices(g, is_behind ? shared_address(Pieces::kZeros) : shared_address(grad + at + kUnit * lane));
          multiply(sums, sums, g, {kOne, kOne}, T{});
        }
      }
      arrive_together(a.empty(turn.stage), lane == 0);
    }
    if (!a.result.with_bias()) continue;
    float total = lane % 4 == 0 ? sums[0] + sums[2] : 0;
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane == 0 && item.first_row == a.first_row)
      a.result.put<T>(item.filter, item.split, a.kernel_h * a.kernel_w, total);
  }
}

// The products of a warpgroup: of a shift, and of the next one.
struct Products {
  float sum[kShifts * kTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kShifts * kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = 0;
  }

  // Adds those of `count` steps, which follow one another: without branches in between, so that none waits.
  template <typename T, int kCount>
  __device__ void add_steps(uint64_t& g, uint64_t& x) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) multiply_columns<kShifts * kTiles>(sum, g + k * kStep, x + k * kStep, T{});
    g += kCount * kStep, x += kCount * kStep;
  }
  template <typename T>
  __device__ void add_steps(uint64_t g, uint64_t x, int count) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (; count >= kAtOnce; count -= kAtOnce) add_steps<T, kAtOnce>(g, x);
    if (count & 2) add_steps<T, 2>(g, x);
    if (count & 1) add_steps<T, 1>(g, x);
  }

  // Adds those of a stage. Where there is a piece for one of the shifts only, the other one's are zeros.
  template <typename T>
  __device__ void add(const Pieces& a, uint32_t source, uint32_t grad, uint32_t zeros_before, uint32_t zeros_behind,
                      int shift) {
    const int bytes = a.piece_bytes(), first = max(-shift, 0), last = min(a.pieces, a.pieces - shift);
    const bool has_end = shift >= 0, has_begin = shift < 0;  // a piece for the first shift only, or for the next one
    before_multiplications();
    const uint64_t g = swizzled_columns(grad + first * bytes, 0);
    if (has_begin)
      add_steps<T>(swizzled_columns(grad + (first - 1) * bytes, 0),
                   swizzled_columns(zeros_before, source - zeros_before), a.steps);
    add_steps<T>(g, swizzled_columns(source + (first + shift) * bytes, bytes), (last - first - has_end) * a.steps);
    if (has_end) {
      const uint32_t from = source + (a.pieces - 1) * bytes;
      add_steps<T>(swizzled_columns(grad + (last - 1) * bytes, 0), swizzled_columns(from, zeros_behind - from),
                   a.steps);
    }
    commit_multiplications();
    wait_multiplications<0>();
  }

  // To shared memory, as a matrix of the gradient's columns by the input's.
  template <int kShift>
  __device__ void store(uint32_t to, int pitch) const {
    const int warp = threadIdx.x / 32 % kGroupWarps, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (16 * warp + 8 * h >= kLong) break;
      const uint32_t row = to + 4 * ((16 * warp + 8 * h + g) * pitch + 2 * t);
#pragma unroll
      for (int n = 0; n < kLong / 8; ++n) {
        const float (&pair)[4] = sum[kShift * kTiles + n];
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + 32 * n), "f"(pair[2 * h]), "f"(pair[2 * h + 1])
                     : "memory");
      }
    }
  }
};

// Where sums are of a row of the gradient and one of the input, of their pieces, and of a shift.
template <int kWidth>
__device__ int sums_at(const Pieces& a, int shift, int row, int source_row) {
  constexpr int kRows = Rows<kWidth>::kCount;
  return a.sums + 4 * a.kernel_w * ((row * a.sum_shifts + shift) * kRows + source_row);
}

// Adds up products of a shift along diagonals, one for each column of the kernel: a warp those of two rows.
template <int kWidth>
__device__ void add_diagonals(const Pieces& a, uint32_t products, uint32_t memory, int shift) {
  constexpr int kRows = Rows<kWidth>::kCount;
  static_assert(kRows * kRows == kGroupWarps);
  const int warp = threadIdx.x / 32 % kGroupWarps, row = warp % kRows, source_row = warp / kRows;
  for (int j = threadIdx.x % 32; j < a.kernel_w; j += 32) {
    const int dx = j - a.padding_w, first = max(0, -dx), last = min(kWidth, kWidth - dx);  // columns of the gradient
    const uint32_t mask = first < last ? ((1u << last) - 1) & ~((1u << first) - 1) : 0;
    const uint32_t from = products + 4 * (kWidth * (row * kLong + source_row) + dx);
    float total[2] = {};
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      float product;
      asm volatile(
          "{\n"
          ".reg .pred there;\n"
          "setp.ne.u32 there, %2, 0;\n"
          "mov.f32 %0, 0f00000000;\n"
          "@there ld.shared.f32 %0, [%1];\n"
          "}"
          : "=f"(product)
          : "r"(from + 4 * w * (kLong + 1)), "r"(mask & 1u << w));
      total[w % 2] += product;
    }
    shared_at<float>(memory + sums_at<kWidth>(a, shift, row, source_row) + 4 * j) = total[0] + total[1];
  }
}

// Adds up what there is of each tap, over rows of a piece of the gradient.
template <typename T, int kWidth>
__device__ void add_rows(const Pieces& a, const Item& item, const ShiftsOf<kWidth>& shifts, uint32_t memory) {
  constexpr int kRows = Rows<kWidth>::kCount;
  const int taps = (item.last_row - item.first_row) * a.kernel_w;
  for (int tap = threadIdx.x; tap < taps; tap += 32 * kWarps) {
    const int row = tap / a.kernel_w, j = tap - row * a.kernel_w, i = item.first_row + row;
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int meets = i - a.padding_h + r - kRows * (shifts.first - 1), shift = meets / kRows - 1;
      if (shift >= 0 && shift < shifts.last - shifts.first)
        sum += __uint_as_float(load_word(memory + sums_at<kWidth>(a, shift, r, meets % kRows) + 4 * j));
    }
    if (!is_finite(sum)) sum = a.planes.sum_by_products<T>(item, i - a.padding_h, j - a.padding_w);
    a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, sum);
  }
}

// Adds up products of all shifts along diagonals, one for each distance of pixels.
template <typename T, int kWidth>
__device__ void add_distances(const Pieces& a, const Item& item, const ShiftsOf<kWidth>& shifts, int before,
                              uint32_t memory) {
  constexpr int kRows = Rows<kWidth>::kCount, kAtOnce = kWidth / 2;  // many loads: none waits
  const auto put = [&](int i, int j, float sum) {
    if (i < item.first_row || i >= item.last_row || j < 0 || j >= a.kernel_w) return;
    if (!is_finite(sum)) sum = a.planes.sum_by_products<T>(item, i - a.padding_h, j - a.padding_w);
    a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, sum);
  };
  for (int k = threadIdx.x; k < (item.last_row - item.first_row + 1) * kWidth; k += 32 * kWarps) {
    const int row = k / kWidth, i = item.first_row - 1 + row, rest = k - row * kWidth;
    const int distance = (i - a.padding_h) * kWidth + rest;
    const uint32_t from = memory + a.sums + 4 * (a.sum_left + distance - shifts.first * kLong);
    float low = 0, high = 0;  // of this row of the kernel, and of the next one, a row of columns to the left
#pragma unroll
    for (int first = 0; first < kWidth; first += kAtOnce) {
      float products[kAtOnce][kRows];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          products[c][r] = __uint_as_float(load_word(from + 4 * (r * kWidth + first + c) * (a.sum_pitch + 1)));
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const float total = (products[c][0] + products[c][1]) + (products[c][2] + products[c][3]);
        const int column = first + c - before, w = column < 0 ? column + kWidth : column;
        (w + rest < kWidth ? low : high) += total;
      }
    }
    put(i, rest + a.padding_w, low), put(i + 1, rest - kWidth + a.padding_w, high);
  }
  // Columns that never meet the images.
  for (int k = threadIdx.x; k < (item.last_row - item.first_row) * a.kernel_w; k += 32 * kWarps) {
    const int row = k / a.kernel_w, j = k - row * a.kernel_w, dx = j - a.padding_w;
    if (dx < -kWidth || dx >= kWidth) put(item.first_row + row, j, 0);
  }
}

// Taps of rows that never meet the images.
template <typename T>
__device__ void put_others(const Pieces& a, const Item& item) {
  if (item.first_row > a.first_row) return;
  for (int i = threadIdx.x / 32; i < a.kernel_h; i += kWarps)
    if (i < a.first_row || i >= a.last_row)
      for (int j = threadIdx.x % 32; j < a.kernel_w; j += 32)
        a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, 0);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(launch_threads(kThreads), 1) outer_pieces(const __grid_constant__ Pieces a) {
  if (!kHasWarpgroups) return;
  constexpr bool kHasEdges = Rows<kWidth>::kMayBeginBefore;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool looks_after = kHasEdges || a.result.with_bias();
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s) {
      init_barrier(a.full(s), 1), init_barrier(a.ready(s), kWarpArrivals);
      init_barrier(a.empty(s), (kWarps + looks_after) * kWarpArrivals);
    }
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(Pieces::kZeros + 4 * threadIdx.x) = 0;
  // Where stages begin, as a multiple of an address, with zeros before and behind.
  const int stages = a.first_stage + static_cast<int>(-shared_address(a.first_stage) % kBoxAlignment) + a.piece_bytes();
  for (int at = kUnit * threadIdx.x; at < a.piece_bytes(); at += kUnit * kThreads)
    shared<uint4>(stages - a.piece_bytes() + at) = shared<uint4>(stages + a.stages * a.stage_bytes() + at) = uint4{};
  if constexpr (kHasEdges)  // and beside the products
    for (int k = threadIdx.x; k < kLong * a.sum_pitch; k += kThreads) shared<float>(a.sums + 4 * k) = 0;
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  if (warp == kWarps) {
    if (is_elected()) load_pieces<kWidth>(a, stages);
    return;
  }
  if (warp > kWarps) {
    if (looks_after) look_after_edges<T, kWidth>(a, stages);
    return;
  }

  const uint32_t memory = kept_shared_address();
  const int group = warp / kGroupWarps, number_of_shift = group * kShifts;
  const uint32_t scratch = memory + a.scratch + group * kProductBytes;
  const uint32_t zeros_before = memory + stages - a.piece_bytes();
  const uint32_t zeros_behind = memory + stages + a.stages * a.stage_bytes();
  Turn turn;
#pragma unroll 1
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const ShiftsOf<kWidth> shifts(a, item.first_row, item.last_row);
    const int shift = shifts.first + number_of_shift;
    const bool is_needed = shift < shifts.last, has_next = shift + 1 < shifts.last;
    Products products;
    products.clear();
#pragma unroll 1
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      wait_at(memory + (kHasEdges ? a.ready(turn.stage) : a.full(turn.stage)), turn.parity);
      const uint32_t source = memory + stages + turn.stage * a.stage_bytes();
      if (is_needed) products.add<T>(a, source, source + a.factor_bytes(), zeros_before, zeros_behind, shift);
      arrive_together_at(memory + a.empty(turn.stage), lane == 0);
    }
    if constexpr (kHasEdges) {
      const uint32_t sums = memory + a.sums + 4 * (a.sum_left + number_of_shift * kLong);
      if (is_needed) products.store<0>(sums, a.sum_pitch);
      if (has_next) products.store<1>(sums + 4 * kLong, a.sum_pitch);
      meet<1>(32 * kWarps);
      add_distances<T, kWidth>(a, item, shifts, a.before_channel(item.filter), memory);
    } else {
      if (is_needed) {
        meet_group(2 + group);
        products.store<0>(scratch, kLong);
        meet_group(2 + group);
        add_diagonals<kWidth>(a, scratch, memory, number_of_shift);
      }
      if (has_next) {
        meet_group(2 + group);
        products.store<1>(scratch, kLong);
        meet_group(2 + group);
        add_diagonals<kWidth>(a, scratch, memory, number_of_shift + 1);
      }
      meet<1>(32 * kWarps);
      add_rows<T, kWidth>(a, item, shifts, memory);
    }
    put_others<T>(a, item);
    meet<1>(32 * kWarps);
  }
}

template <typename T, int kWidth>
void launch(const Problem& p, const Pieces& a, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = outer_pieces<T, kWidth>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = std::min<int64_t>(a.items(), current_device().multiprocessors);
  launch_early(kernel, a, blocks, kThreads, stream, {.shared_bytes = shared_bytes});
  check_launch("outer_pieces");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

// Into how many parts the images are divided.
int splits_for(const Pieces& a, int multiprocessors) {
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int units = static_cast<int>(ceil_div(a.images, a.stage_images()));
  const int fewest = static_cast<int>(std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.pieces, kLongest), 1, units));
  const double unit = 24. * kShifts * kGroups * a.pieces * a.steps;  // cycles of multiplications
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(units, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(int64_t{a.filters} * a.groups * splits, multiprocessors));
    const double cost = rounds * (static_cast<double>(ceil_div(units, splits)) * unit + 2500) + (splits > 1 ? 5000 : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

// Fills in what depends on the columns of a plane.
template <int kWidth>
bool arrange(Pieces& a, const Problem& p, const ImagePlanes& source, const ImagePlanes& grad) {
  using R = Rows<kWidth>;
  const int plane = 2 * source.height * source.width;
  if (R::kMayBeginBefore) {
    a.before = plane % kUnit / 2;
    if (plane % (kUnit / 2) > 0 || (a.before > 0 && (a.planes.multiplier > 1 || a.filters % 2 > 0))) return false;
  } else if (source.height % R::kCount > 0) {
    return false;
  }
  a.pieces = static_cast<int>(ceil_div(plane / 2 + a.before, kLong));
  a.images = static_cast<int>(p.batch);
  constexpr int kMostGroups = R::kMayBeginBefore ? 1 : 4;
  for (a.groups = 1; a.groups <= kMostGroups; ++a.groups) {
    a.group_rows = static_cast<int>(ceil_div(a.last_row - a.first_row, a.groups)), a.sum_shifts = 0;
    for (int row = a.first_row; row < a.last_row; row += a.group_rows) {
      const ShiftsOf<kWidth> shifts(a, row, std::min(row + a.group_rows, a.last_row));
      a.sum_shifts = std::max(a.sum_shifts, shifts.last - shifts.first);
    }
    if (a.sum_shifts <= kGroups * kShifts) break;
  }
  if (a.groups > kMostGroups) return false;
  a.groups = static_cast<int>(ceil_div(a.last_row - a.first_row, a.group_rows));
  a.sums = Pieces::kSums;
  if constexpr (R::kMayBeginBefore) {
    // The distances that there may be, as the kernel goes through them.
    const ShiftsOf<kWidth> shifts(a, a.first_row, a.last_row);
    const int least = (a.first_row - 1 - a.padding_h) * kWidth, most = (a.last_row - a.padding_h) * kWidth - 1 + kLong;
    a.sum_left = static_cast<int>(round_up(std::max(shifts.first * kLong - least, 0), 2));  // pairs are stored
    const int right = std::max(most - shifts.last * kLong, 0);
    a.sum_pitch = static_cast<int>(round_up(a.sum_left + a.sum_shifts * kLong + right - 8, 32)) + 8;  // in all banks
    a.first_stage = a.sums + 4 * kLong * a.sum_pitch;
  } else {
    a.scratch = a.sums + static_cast<int>(round_up(4 * a.kernel_w * a.sum_shifts * R::kCount * R::kCount, kUnit));
    a.first_stage = a.scratch + kGroups * kProductBytes;
  }
  const auto stages = [&] {
    const int64_t room = current_device().shared_per_block - a.first_stage - (kBoxAlignment - 1) - 2 * a.piece_bytes();
    return static_cast<int>(std::min<int64_t>(room / a.stage_bytes(), kMaxStages));
  };
  // As many steps as leave three stages, and not more images that there are not.
  a.steps = 1;
  for (int steps = 2; steps <= kMaxSteps; ++steps) {
    const int before = std::exchange(a.steps, steps);
    if (stages() < 3 || ceil_div(a.images, steps * kStepImages) * steps > ceil_div(a.images, kStepImages))
      a.steps = before;
  }
  a.stages = stages();
  if (a.stages < 2) return false;

  const auto describe = [&](CUtensorMap(&maps)[2], const ImagePlanes& v, int64_t channels) {
    const int images = a.stage_images();
    if (v.row_bytes != 2 * v.width) return false;
    if constexpr (R::kMayBeginBefore) {
      if (channels > 1 && v.channel_bytes != plane) return false;
      for (int k = 0; k < 2 && k < channels; ++k) {
        const int before = k * a.before;
        if (!describe_boxes(maps[k], const_cast<char*>(v.base) + k * v.channel_bytes - 2 * before, 2,
                            {plane / 2 + before, a.images, (channels + 1 - k) / 2, 1},
                            {v.image_bytes, 2 * v.channel_bytes, v.image_bytes}, {kBoxPitch / 2, images, 1, 1},
                            CU_TENSOR_MAP_SWIZZLE_128B))
          return false;
      }
      return true;
    } else {
      return describe_boxes(maps[0], const_cast<char*>(v.base), 2, {kLong, a.images, a.pieces, channels},
                            {v.image_bytes, 2 * kLong, v.channel_bytes}, {kBoxPitch / 2, images, a.pieces, 1},
                            CU_TENSOR_MAP_SWIZZLE_128B);
    }
  };
  return describe(a.source_boxes, source, p.channels) && describe(a.grad_boxes, grad, p.filters());
}

}  // namespace

bool launch_outer_grad_weight_pieces(const Problem& p, bool exchanged, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream) {
  if (!has_warpgroups(outer_pieces<__half, kHalfColumns>)) return false;
  const Device& device = current_device();
  if (source.height != grad.height || source.width != grad.width || !has_pieces(source.width)) return false;
  // Too few images to be worth to add up all products: as many as those of more pixels each.
  const int few_images = source.width == kHalfColumns ? kStepImages : 2 * kStepImages;
  if (p.batch < few_images) return false;
  const OuterSizes sizes = OuterSizes::of(p, false);
  Pieces a{};
  a.filters = static_cast<int>(p.filters());
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = exchanged ? 1 : a.kernel_w, a.tap_column = exchanged ? a.kernel_h : 1;
  a.first_row = static_cast<int>(sizes.first_row()), a.last_row = static_cast<int>(sizes.last_row());
  a.planes = pair_of(source, grad, p.multiplier);
  const bool is_half = source.width == kHalfColumns;
  if (!(is_half ? arrange<kHalfColumns>(a, p, source, grad) : arrange<kQuarterColumns>(a, p, source, grad)))
    return false;
  a.splits = splits_for(a, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes =
      a.first_stage + kBoxAlignment - 1 + 2 * a.piece_bytes() + int64_t{a.stages} * a.stage_bytes();
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (is_half) return launch<T, kHalfColumns>(p, a, shared_bytes, stream);
      launch<T, kQuarterColumns>(p, a, shared_bytes, stream);
    }
  });
  return true;
}

}  // namespace dwconv
