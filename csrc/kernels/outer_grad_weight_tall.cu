// The same as outer_grad_weight for a tall kernel with few columns, from whole planes in shared memory, multiplied by
// warpgroups: on sm_90, in code for sm_90a.
//
// Columns are summed over and rows multiplied: with A[r][u] = gradient[r][u - shift] and B[u][y] = input[y][u], the
// product has, for column shift + padding of the kernel, the sums for its rows y + padding - r on the diagonals. A
// warpgroup has two shifts. A box brings the rows of the input as tensor cores read them, 64 columns each with zeros
// behind; the gradient goes to registers, as far to the side as the shift says. Each warp adds up diagonals of its rows
// of the products, which go through shared memory.
//
// Zeros stand for columns that there are not, and meet others: sums that are not finite are taken again, product by
// product.
//
// Arrays that begin within a unit of 16 bytes are read as they lie: rows of boxes then begin where units do, with what
// is beside a row of the input instead of zeros, and gradients that meet it are zeros. The first plane of an array and
// the last one, whose boxes would reach beyond it, come by registers.
#include "outer_grad_weight_tall.h"

#include <algorithm>
#include <cmath>

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

constexpr int kGroupRows = 64, kGroupSteps = 16;  // of a product of a warpgroup, and those that it is summed over
constexpr int kGroups = 3, kShifts = 2;           // warpgroups, and shifts of each
constexpr int kWarps = kGroups * kGroupWarps;     // that multiply; one more loads, one is for the bias
constexpr int kThreads = 32 * (kWarps + 2);
constexpr int kMaxStages = 8, kStageImages = 4;
constexpr int kBatch = 8;  // rows of a product that a warp lays out at once

// From a row of a product to the next, in floats, where they are laid out: lanes in all banks.
template <int kRows>
constexpr int kPitch = kRows % 32 == 24 ? kRows : kRows + 8;

struct Planes {
  CUtensorMap source_boxes;
  PlanePair planes;
  WeightSums result;
  int kernel_rows, kernel_columns, padding_rows, padding_columns;
  int first_column, last_column;  // of the kernel, that meet the images: from and up to, less one
  int rows, columns;              // of a plane
  int source_begin, grad_begin;   // pixels from where a unit begins to where the arrays do
  int images, filters, splits;
  int stages, stage_bytes, box_bytes, grad_bytes;  // the latter of an image, as it comes
  int sums, scratch, first_stage;                  // places in shared memory
  static constexpr int kBias = 8 * 2 * kMaxStages, kZeros = kBias + 16, kSums = kZeros + kUnit;

  __device__ int full(int stage) const { return 8 * stage; }
  __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __device__ int grad_at() const { return kStageImages * box_bytes; }  // in a stage
  __host__ __device__ int items() const { return filters * splits; }
  __host__ __device__ int first_shift() const { return first_column - padding_columns; }
  __host__ __device__ int shifts() const { return last_column - first_column; }
};

// A plane of `bytes` that lies in units of 16 bytes from `begin` bytes behind one on. The first plane of an array and
// the last one share units with what is outside of it, which is not read.
struct PlaneInUnits {
  const char* at;
  int begin, bytes;
  bool is_first, is_last;

  __device__ bool begins_outside() const { return begin > 0 && is_first; }
  __device__ bool ends_outside() const { return begin > 0 && is_last; }
};

// A unit of those that a plane lies in, pixel by pixel: what is not the plane's becomes zeros.
__device__ __noinline__ uint4 load_edge(const char* plane, int bytes, int at) {
  uint32_t words[4] = {};
  for (int k = 0; k < kUnit / 2; ++k) {
    if (at + 2 * k < 0 || at + 2 * k >= bytes) continue;
    const uint32_t half = __ldg(reinterpret_cast<const uint16_t*>(plane + at) + k);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if (k / 2 == w) words[w] |= half << k % 2 * 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Loads planes, as stages become free: by a warp, one thread of which begins copies.
class Loader {
 public:
  __device__ Loader(const Planes& a, int stages) : a_(a), stages_(stages), lane_(threadIdx.x % 32) {}

  __device__ void run() const {
    Turn turn;
    for (int number = blockIdx.x; number < a_.items(); number += gridDim.x) {
      const FilterImages item(a_, number);
      const int channel = item.filter / a_.planes.multiplier;
      // Planes at the ends of an array share units with what is outside of it.
      int channels = 0;
      bool may_share = false;
      if (a_.source_begin + a_.grad_begin > 0) {
        channels = a_.filters / a_.planes.multiplier;
        may_share = channel == 0 || channel == channels - 1;
      }
      for (int image = item.first; image < item.last; image += kStageImages, turn.next(a_.stages)) {
        const int barrier = a_.full(turn.stage), images = min(kStageImages, item.last - image);
        int to = stages_ + turn.stage * a_.stage_bytes, grad_to = to + a_.grad_at();
        const char* grad = a_.planes.grad + item.filter * a_.planes.grad_channel + image * a_.planes.grad_image;
        wait(a_.empty(turn.stage), turn.parity ^ 1);
        if (may_share && (image == 0 || image + images == a_.images)) {
          for (int k = 0; k < images; ++k, to += a_.box_bytes, grad_to += a_.grad_bytes) {
            const bool first = image + k == 0, last = image + k == a_.images - 1;
            load_source(channel, image + k, first && channel == 0, last && channel == channels - 1, to, barrier);
            load_grad(grad + k * a_.planes.grad_image, first && item.filter == 0, last && item.filter == a_.filters - 1,
                      grad_to, barrier);
          }
          before_bulk_copies();
        } else if (lane_ == 0) {
          grad -= 2 * a_.grad_begin;
          expect_bytes(barrier, images * (a_.box_bytes + a_.grad_bytes));
          for (int k = 0; k < images; ++k, to += a_.box_bytes, grad_to += a_.grad_bytes) {
            copy_box(to, a_.source_boxes, 0, 0, channel, image + k, barrier);
            copy_bulk(shared_address(grad_to), grad + k * a_.planes.grad_image, a_.grad_bytes, barrier);
          }
        }
        arrive_together(barrier, lane_ == 0);
      }
    }
  }

 private:
  const Planes& a_;
  const int stages_, lane_;

  __device__ void load_source(int channel, int image, bool first, bool last, int to, int barrier) const {
    if (a_.source_begin == 0 || (!first && !last)) {
      if (lane_ > 0) return;
      expect_bytes(barrier, a_.box_bytes);
      return copy_box(to, a_.source_boxes, 0, 0, channel, image, barrier);
    }
    const char* from = a_.planes.source + channel * a_.planes.source_channel + image * a_.planes.source_image;
    constexpr int kLineUnits = kBoxPitch / kUnit;
    const int row_units = a_.columns / 8;
    load_units(
        {from, 2 * a_.source_begin, 2 * a_.rows * a_.columns, first, last}, a_.rows * kLineUnits,
        [&](int k) { return k / kLineUnits * row_units + k % kLineUnits; },
        [&](int k) { return to + k / kLineUnits * kBoxPitch + (k % 8 ^ k / kLineUnits % 8) * kUnit; });
  }
  __device__ void load_grad(const char* from, bool first, bool last, int to, int barrier) const {
    if (a_.grad_begin == 0 || (!first && !last)) {
      if (lane_ > 0) return;
      expect_bytes(barrier, a_.grad_bytes);
      return copy_bulk(shared_address(to), from - 2 * a_.grad_begin, a_.grad_bytes, barrier);
    }
    load_units(
        {from, 2 * a_.grad_begin, 2 * a_.rows * a_.columns, first, last}, a_.grad_bytes / kUnit,
        [](int k) { return k; }, [&](int k) { return to + k * kUnit; });
  }

  // Loads units by registers: number `k` is unit_of(k) of those that the plane lies in, and goes to place_of(k).
  template <typename Unit, typename Place>
  __device__ void load_units(const PlaneInUnits& plane, int count, Unit&& unit_of, Place&& place_of) const {
    constexpr int kAtOnce = 7;
    const auto* whole = reinterpret_cast<const uint4*>(plane.at - plane.begin);
    const int units = plane.bytes / kUnit, low = plane.begins_outside(), high = units - plane.ends_outside();
    for (int begin = lane_; begin < count; begin += 32 * kAtOnce) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) values[k] = __ldg(whole + min(max(unit_of(begin + 32 * k), low), high));
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int number = begin + 32 * k, unit = unit_of(number);
        if (number >= count) break;
        if (unit < low || unit > high) values[k] = load_edge(plane.at, plane.bytes, unit * kUnit - plane.begin);
        shared<uint4>(place_of(number)) = values[k];
      }
    }
  }
};

// Adds up the gradient, for the bias.
template <typename T>
__device__ void add_bias(const Planes& a, int stages) {
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  constexpr int kMeeting = 32 * (kWarps + 1);
  const int lane = threadIdx.x % 32;
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const FilterImages item(a, number);
    float sums[4] = {};
    for (int image = item.first; image < item.last; image += kStageImages, turn.next(a.stages)) {
      uint32_t grad = shared_address(stages + turn.stage * a.stage_bytes + a.grad_at());
      wait(a.full(turn.stage), turn.parity);
      for (int k = min(kStageImages, item.last - image); k > 0; --k, grad += a.grad_bytes)
        for (int first = 0; first < a.grad_bytes; first += 32 * kUnit) {
          const int at = first + kUnit * lane;
          uint32_t g[4];
          load_matrices(g, at < a.grad_bytes ? grad + at : shared_address(Planes::kZeros));
#pragma unroll
          for (int e = 0; e < 4; ++e)
            g[e] &= pair_mask(first / 2 + 64 * e + 2 * lane - a.grad_begin, a.rows * a.columns);
          multiply(sums, sums, g, {kOne, kOne}, T{});
        }
      arrive_together(a.empty(turn.stage), lane == 0);
    }
    float total = lane % 4 == 0 ? sums[0] + sums[2] : 0;
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane == 0) shared<float>(Planes::kBias) = total;
    meet<1>(kMeeting);
    meet<1>(kMeeting);
  }
}

// Where a warp's sums of a shift are: for distances of rows from 0 on, or for those below, from -rows on.
template <int kRows>
__device__ int sums_at(const Planes& a, int shift, int warp, bool below) {
  return a.sums + 4 * kRows * (2 * (shift * kGroupWarps + warp) + below);
}

// Adds up what warps have of each tap.
template <typename T, int kRows>
__device__ void add_up(const Planes& a, const FilterImages& item, uint32_t memory) {
  const auto put = [&](int tap, float sum) { a.result.put<T>(item.filter, item.split, tap, sum); };
  for (int tap = threadIdx.x; tap < a.kernel_rows * a.kernel_columns; tap += 32 * kWarps) {
    const int i = tap / a.kernel_columns, j = tap - i * a.kernel_columns, dy = i - a.padding_rows;
    float sum = 0;
    if (dy > -a.rows && dy < a.rows && j >= a.first_column && j < a.last_column) {
      const uint32_t from = memory + sums_at<kRows>(a, j - a.first_column, 0, dy < 0) + 4 * (dy < 0 ? dy + a.rows : dy);
      for (int warp = 0; 16 * warp < a.rows; ++warp) sum += __uint_as_float(load_word(from + 4 * 2 * kRows * warp));
      if (!is_finite(sum)) sum = a.planes.sum_by_products<T>(item, dy, j - a.padding_columns);
    }
    put(tap, sum);
  }
  if (a.result.with_bias() && threadIdx.x == 0) put(a.kernel_rows * a.kernel_columns, shared<float>(Planes::kBias));
}

__device__ inline void store_pair(uint32_t to, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}
__device__ inline void store_word(uint32_t to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// Adds up a warp's rows of the products of its shifts along diagonals. A lane has two distances of the input's rows
// from the gradient's, modulo the rows of a plane: what would be beyond the last row is before the first one.
template <int kRows>
__device__ void add_diagonals(const Planes& a, const float (&products)[kShifts][kRows / 8][4], int first_number,
                              uint32_t memory) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps;
  const uint32_t scratch = memory + a.scratch + 4 * (threadIdx.x / 32) * kBatch * kPitch<kRows>;
  const uint32_t store_to = scratch + 4 * (lane / 4 * kPitch<kRows> + 2 * (lane % 4));
  float above[2], below[2];
#pragma unroll 1
  for (int k = 0; k < 2 * kShifts; ++k) {  // half of the rows of a product
    const int number = first_number + k / 2, first = 16 * warp + k % 2 * kBatch;
    if (number >= a.shifts()) break;
    if (k % 2 == 0) above[0] = above[1] = below[0] = below[1] = 0;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2 * kShifts; ++half)
      if (half == k)
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
          store_pair(store_to + 32 * n, products[half / 2][n][half % 2 * 2], products[half / 2][n][half % 2 * 2 + 1]);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool any = lane < kRows / 2 && lane + c * kRows / 2 < a.rows;
      const int distance = any ? lane + c * kRows / 2 : 0;
      if (first < a.rows) {
        const uint32_t inside = scratch + 4 * (distance + first), beyond = inside - 4 * a.rows;
        float values[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r)
          values[r] = __uint_as_float(
              load_word((first + r >= a.rows - distance ? beyond : inside) + 4 * r * (kPitch<kRows> + 1)));
#pragma unroll
        for (int r = 0; r < kBatch; ++r)
          if (first + r >= a.rows - distance)
            below[c] += values[r];
          else
            above[c] += values[r];
      }
      if (k % 2 == 1 && any) {
        const uint32_t to = memory + sums_at<kRows>(a, number, warp, false) + 4 * distance;
        store_word(to, above[c]), store_word(to + 4 * kRows, below[c]);
      }
    }
  }
}

// What a lane has of the gradient's columns, for two shifts, one after the other.
class Columns {
 public:
  static constexpr int kSteps = kGroupRows / kGroupSteps;

  // `shift`: of the input's columns, as they come.
  __device__ Columns(const Planes& a, int shift) : is_odd_((shift + a.grad_begin) & 1) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps, column = 2 * (lane % 4) - shift;
#pragma unroll
    for (int h = 0; h < 2; ++h)  // rows that there are not are the last one
      place_[h] = 2 * (min(16 * warp + 8 * h + lane / 4, a.rows - 1) * a.columns + column + is_odd_ + a.grad_begin);
#pragma unroll
    for (int j = 0; j < kShifts; ++j)
#pragma unroll
      for (int k = 0; k < 2 * kSteps; ++k)
        masks_[j][k] =
            pair_mask(8 * k + column - j, a.columns) & pair_mask(8 * k + 2 * (lane % 4) - a.source_begin, a.columns);
  }

  // Adds the products of some images.
  template <typename T, int kTiles>
  __device__ void add(float (&sums)[kShifts][kTiles][4], const Planes& a, uint32_t grad, uint32_t source,
                      int images) const {
    Words words;
    load(words, grad);
#pragma unroll 1
    for (; images > 0; --images, source += a.box_bytes) {
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
};

template <typename T, int kRows>
__global__ void __launch_bounds__(launch_threads(kThreads), 1) outer_tall(const __grid_constant__ Planes a) {
  if (!kHasWarpgroups) return;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool has_bias = a.result.with_bias();
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s)
      init_barrier(a.full(s), kWarpArrivals), init_barrier(a.empty(s), (kWarps + has_bias) * kWarpArrivals);
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(Planes::kZeros + 4 * threadIdx.x) = 0;
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  // Where stages begin, as a multiple of an address.
  const int stages = a.first_stage + static_cast<int>(-shared_address(a.first_stage) % kBoxAlignment);
  if (warp == kWarps) {
    Loader(a, stages).run();
    return;
  }
  if (warp > kWarps) {
    if (has_bias) add_bias<T>(a, stages);
    return;
  }

  const uint32_t memory = kept_shared_address();
  const int first_number = warp / kGroupWarps * kShifts, threads = 32 * (kWarps + has_bias);
  const Columns columns(a, a.first_shift() + first_number + a.source_begin);
  Turn turn;
#pragma unroll 1
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const FilterImages item(a, number);
    float products[kShifts][kRows / 8][4] = {};
#pragma unroll 1
    for (int image = item.first; image < item.last; image += kStageImages, turn.next(a.stages)) {
      wait_at(memory + a.full(turn.stage), turn.parity);
      const uint32_t source = memory + stages + turn.stage * a.stage_bytes;
      if (first_number < a.shifts())
        columns.add<T>(products, a, source + a.grad_at(), source, min(item.last - image, kStageImages));
      wait_multiplications<0>();
      arrive_together_at(memory + a.empty(turn.stage), lane == 0);
    }
    add_diagonals<kRows>(a, products, first_number, memory);
    meet<1>(threads);
    add_up<T, kRows>(a, item, memory);
    meet<1>(threads);
  }
}

template <typename T, int kRows>
void launch(const Problem& p, const Planes& a, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = outer_tall<T, kRows>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = std::min<int64_t>(a.items(), current_device().multiprocessors);
  launch_early(kernel, a, blocks, kThreads, stream, {.shared_bytes = shared_bytes});
  check_launch("outer_tall");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

// Into how many parts the images are divided.
int splits_for(const Planes& a, int rows, int multiprocessors) {
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int fewest =
      static_cast<int>(std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.columns, kLongest), 1, a.images));
  const double image = 2. * rows * a.shifts();  // cycles of multiplications
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(a.images, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(int64_t{a.filters} * splits, multiprocessors));
    const double cost =
        rounds * (static_cast<double>(ceil_div(a.images, splits)) * image + 2500) + (splits > 1 ? 5000 : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

}  // namespace

bool launch_outer_grad_weight_tall(const Problem& p, const ImagePlanes& source, const ImagePlanes& grad,
                                   const Allocate& allocate, cudaStream_t stream) {
  if (!has_warpgroups(outer_tall<__half, kGroupRows>)) return false;
  const Device& device = current_device();
  if (source.height != grad.height || source.width != grad.width) return false;
  const OuterSizes sizes = OuterSizes::of(p, false);
  Planes a{};
  a.rows = source.height, a.columns = source.width;
  const auto fits = [](int size) { return 2 * size > kGroupRows && size <= kGroupRows && size % 8 == 0; };
  if (!fits(a.rows) || !fits(a.columns)) return false;
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  constexpr int kFewImages = 16;  // too few to be worth to add up all products
  if (a.images < kFewImages) return false;
  a.kernel_rows = static_cast<int>(p.kernel_w), a.kernel_columns = static_cast<int>(p.kernel_h);
  a.padding_rows = static_cast<int>(p.padding_w), a.padding_columns = static_cast<int>(p.padding_h);
  a.first_column = static_cast<int>(sizes.first_row()), a.last_column = static_cast<int>(sizes.last_row());
  if (a.shifts() > kGroups * kShifts) return false;

  constexpr int kFewRows = 56;
  const int rows = a.rows <= kFewRows ? kFewRows : kGroupRows;
  const int pitch = a.rows <= kFewRows ? kPitch<kFewRows> : kPitch<kGroupRows>;
  a.sums = Planes::kSums;
  a.scratch = a.sums + 4 * kGroups * kShifts * kGroupWarps * 2 * rows;
  a.first_stage = a.scratch + 4 * kWarps * kBatch * pitch;
  const auto begin_of = [](const ImagePlanes& v) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(v.base) % kUnit / 2);
  };
  a.source_begin = begin_of(source), a.grad_begin = begin_of(grad);
  if (a.source_begin + a.columns > kGroupRows) return false;
  a.box_bytes = kBoxPitch * rows;
  a.grad_bytes = static_cast<int>(round_up(2 * (a.grad_begin + a.rows * a.columns), kUnit));
  constexpr int kBeyond = 64;  // what is read behind planes
  a.stage_bytes =
      static_cast<int>(round_up(kStageImages * int64_t{a.box_bytes + a.grad_bytes} + kBeyond, kBoxAlignment));
  const int64_t first = a.first_stage + kBoxAlignment - 1;
  a.stages = static_cast<int>(std::min<int64_t>((device.shared_per_block - first) / a.stage_bytes, kMaxStages));
  if (a.stages < 2) return false;

  const auto has_units = [&](const ImagePlanes& v) {
    return v.row_bytes == 2 * v.width && (v.channel_bytes | (a.images > 1 ? v.image_bytes : 0)) % kUnit == 0;
  };
  if (!has_units(source) || !has_units(grad)) return false;
  if (!describe_boxes(a.source_boxes, const_cast<char*>(source.base) - 2 * a.source_begin, 2,
                      {a.source_begin > 0 ? kGroupRows : a.columns, a.rows, p.channels, a.images},
                      {source.row_bytes, source.channel_bytes, source.image_bytes}, {kGroupRows, rows, 1, 1},
                      CU_TENSOR_MAP_SWIZZLE_128B))
    return false;
  a.planes = pair_of(source, grad, p.multiplier);
  a.splits = splits_for(a, rows, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes = first + int64_t{a.stages} * a.stage_bytes;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (rows == kFewRows) return launch<T, kFewRows>(p, a, shared_bytes, stream);
      launch<T, kGroupRows>(p, a, shared_bytes, stream);
    }
  });
  return true;
}

}  // namespace dwconv
