// The same as outer_grad_weight where four rows of a plane are at most 56 columns, from whole planes in shared memory,
// on sm_90 and later.
//
// Images are what is summed over, and pixels of a plane are counted through: four rows are a piece of 56, so that those
// of a piece of the gradient and a piece of the input that lies so many further on have the same distances. A warp has
// all products of pieces that are `shift` apart. Planes stay as bulk copies bring them, in units of 16 bytes: where a
// plane begins within one, its pixels have numbers a few higher. What lies around it is multiplied as zeros.
//
// Products of all shifts are laid side by side at the end, so that those with the same distance are a diagonal: it has
// the sums of two taps, of columns that are a row apart.
//
// Zeros meet others: sums that are not finite are taken again, product by product.
#include "outer_grad_weight_images.h"

#include <algorithm>
#include <cmath>

#include "launch.h"
#include "outer_grad_weight.h"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "planes.cuh"
#include "turn.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kRows = 4;     // of a piece
constexpr int kImages = 16;  // of a stage
constexpr int kMaxStages = 8, kMaxShifts = 7;
constexpr int kHalves = 2, kThreads = 32 * (kHalves * kMaxShifts + 1);  // warps of a shift
constexpr int kZeroBytes = 512;

struct Flat {
  const char* base;
  int64_t image_bytes, channel_bytes;

  // Pixels of a unit before a channel's first one.
  __host__ __device__ int before(int channel) const {
    return static_cast<int>((reinterpret_cast<uintptr_t>(base) + channel * channel_bytes) % kUnit / 2);
  }
};

struct Images {
  Flat source, grad;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;
  int first_row, last_row;  // of the kernel, that meet the images: from and up to, less one
  bool all_meet;            // as all columns of the kernel do as well
  int height, width;
  int columns, pieces, last_tiles;  // of a piece; pieces of a plane; 8 columns each, of its last piece
  int images, filters, multiplier, splits;
  int first_shift, shifts;
  int pitch, stages;                           // bytes of an image in a stage
  int sums, sum_pitch, sum_left, first_stage;  // floats before the first shift's, of a row
  static constexpr int kBiasSums = 2 * 8 * kMaxStages, kZeros = kBiasSums + 16;

  __device__ int full(int stage) const { return 8 * stage; }
  __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __device__ int stage_bytes() const { return 2 * kImages * pitch; }
  __host__ __device__ int items() const { return filters * splits; }
};

// Loads planes, as stages become free.
[[maybe_unused]] __device__ inline void load_planes(const Images& a) {
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const FilterImages item(a, number);
    struct Planes {
      const char* from;
      int bytes;
    };
    const auto planes = [&](const Flat& v, int channel) {
      const int before = 2 * v.before(channel);
      return Planes{v.base + channel * v.channel_bytes + item.first * v.image_bytes - before,
                    (before + 2 * a.height * a.width + kUnit - 1) & -kUnit};
    };
    Planes source = planes(a.source, item.filter / a.multiplier), grad = planes(a.grad, item.filter);
    for (int image = item.first; image < item.last; image += kImages, turn.next(a.stages)) {
      const int images = min(kImages, item.last - image), barrier = a.full(turn.stage);
      uint32_t to = shared_address(a.first_stage + turn.stage * a.stage_bytes());
      wait(a.empty(turn.stage), turn.parity ^ 1);
      expect_bytes(barrier, images * (source.bytes + grad.bytes));
      for (int k = 0; k < images; ++k, to += a.pitch) {
        copy_bulk(to, source.from, source.bytes, barrier);
        copy_bulk(to + kImages * a.pitch, grad.from, grad.bytes, barrier);
        source.from += a.source.image_bytes, grad.from += a.grad.image_bytes;
      }
      arrive(barrier);
    }
  }
}

// A piece of the input and the warp's half of one of the gradient, of 16 images.
struct Fragments {
  uint32_t g[2][4], x[(kSources + 1) / 2][4];
  int piece;  // the gradient's
};

// The fragment that has a block of 8 columns.
template <bool kOfGrad>
__device__ uint32_t (&fragment_of(Fragments& f, int tile))[4] {
  if constexpr (kOfGrad)
    return f.g[tile / 2];
  else
    return f.x[tile / 2];
}

// Makes zeros of all columns but those in [first, last).
template <bool kOfGrad>
__device__ void keep_columns(Fragments& f, int first, int last) {
  constexpr int kTiles = kOfGrad ? 4 : kSources;
  const int column = threadIdx.x % 32 / 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint32_t mask = 8 * tile + column >= first && 8 * tile + column < last ? ~0u : 0u;
    uint32_t (&to)[4] = fragment_of<kOfGrad>(f, tile);
    constexpr int kNext = kOfGrad ? 2 : 1;  // from the first 8 images to the others
    const int at = tile % 2 * (kOfGrad ? 1 : 2);
    to[at] &= mask, to[at + kNext] &= mask;
  }
}

// A tap's sum, product by product.
template <typename T>
__device__ __noinline__ float sum_by_products(const Images& a, const FilterImages& item, int i, int j) {
  const int dy = i - a.padding_h, dx = j - a.padding_w;
  double total = 0;
  for (int image = item.first; image < item.last; ++image) {
    const auto plane = [&](const Flat& v, int channel) {
      return reinterpret_cast<const T*>(v.base + channel * v.channel_bytes + image * v.image_bytes);
    };
    const T *x = plane(a.source, item.filter / a.multiplier), *g = plane(a.grad, item.filter);
    for (int r = max(-dy, 0); r < min(a.height, a.height - dy); ++r) {
      float sum = 0;
      for (int w = max(-dx, 0); w < min(a.width, a.width - dx); ++w)
        sum = fmaf(widen(x[(r + dy) * a.width + w + dx]), widen(g[r * a.width + w]), sum);
      total += sum;
    }
  }
  return static_cast<float>(total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) outer_images(const __grid_constant__ Images a) {
#if __CUDA_ARCH__ >= 900
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s)
      init_barrier(a.full(s), 1), init_barrier(a.empty(s), kHalves * a.shifts * kWarpArrivals);
  for (int i = 16 * threadIdx.x; i < kZeroBytes + 4 * a.columns * a.sum_pitch; i += 16 * blockDim.x)
    shared<uint4>(Images::kZeros + i) = uint4{};
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  if (warp == kHalves * a.shifts) {
    if (is_elected()) load_planes(a);
    return;
  }

  const uint32_t memory = kept_shared_address();
  const int lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);  // kept as well
  const int half = warp / a.shifts, tap = warp - half * a.shifts, shift = a.first_shift + tap;
  const int first_piece = max(-shift, 0), last_piece = min(a.pieces, a.pieces - shift);
  const int grad_image = lane % 8 + lane / 16 * 8, source_image = lane % 16;  // that the lane names a row of
  const bool has_bias = a.result.with_bias() && shift == 0;
  const int bias_sum = Images::kBiasSums + 4 * half;
  Turn turn;
#pragma unroll 1
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const FilterImages item(a, number);
    const int source_before = a.source.before(item.filter / a.multiplier), grad_before = a.grad.before(item.filter);
    const int plane = a.height * a.width, last = (a.pieces - 1) * a.columns;
    int image = item.first, piece = first_piece;
    uint32_t grad = 0, source = 0;
    const auto load = [&](Fragments& f) {
      if (piece == first_piece) {
        wait_at(memory + a.full(turn.stage), turn.parity);
        const uint32_t stage = memory + a.first_stage + turn.stage * a.stage_bytes();
        const int images = item.last - image;  // images that there are not are zeros
        grad = (grad_image < images ? stage + (kImages + grad_image) * a.pitch : memory + Images::kZeros) +
               lane / 8 % 2 * 16 + 2 * kHalf * half + first_piece * 2 * a.columns;
        source = (source_image < images ? stage + source_image * a.pitch : memory + Images::kZeros) + lane / 16 * 16 +
                 (first_piece + shift) * 2 * a.columns;
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices_transposed(f.g[m], grad + 32 * m);
#pragma unroll
      for (int n = 0; n < kSources; n += 2) load_pair(f.x[n / 2], n, source);
      f.piece = piece;
      grad += 2 * a.columns, source += 2 * a.columns;
      if (++piece < last_piece) return;
      piece = first_piece, image += kImages;
      arrive_together_at(memory + a.empty(turn.stage), lane == 0);
      turn.next(a.stages);
    };

    HalfProducts<T> products;
    products.clear();
    float bias[4] = {};
    const auto add = [&](Fragments& f) {
      const bool grad_is_last = f.piece + 1 == a.pieces, source_is_last = f.piece + shift + 1 == a.pieces;
      // Columns beside the plane are zeros.
      const int grad_columns = grad_is_last ? plane + grad_before - last : a.columns;
      if (grad_is_last && grad_columns <= kHalf * half) return;
      if (grad_is_last || (f.piece == 0 && grad_before > 0) || has_bias)
        keep_columns<true>(f, (f.piece == 0 ? grad_before : 0) - kHalf * half, grad_columns - kHalf * half);
      if (source_is_last || (f.piece + shift == 0 && source_before > 0))
        keep_columns<false>(f, f.piece + shift == 0 ? source_before : 0,
                            source_is_last ? plane + source_before - last : a.columns);
      const int sources = source_is_last ? a.last_tiles : a.columns / 8;
#pragma unroll
      for (int n = 0; n < kSources; n += 2)
        if (n < 4 || sources > 4) products.template add<false>(f.g, n, f.x[n / 2], [](int) {});
      if (has_bias)
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply(bias, bias, f.g[m], {kOnes, kOnes}, T{});
    };
    Fragments one, other;
    load(one);
    while (true) {
      const bool more = image < item.last;
      if (more) load(other);
      add(one);
      if (!more) break;
      const bool again = image < item.last;
      if (again) load(one);
      add(other);
      if (!again) break;
    }

    products.store(a.sums + 4 * (a.sum_left + tap * a.columns + kHalf * half * a.sum_pitch), a.sum_pitch,
                   a.columns - kHalf * half, a.columns);
    if (has_bias) {
      float total = lane % 4 == 0 ? bias[0] + bias[2] : 0;
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
      if (lane == 0) shared<float>(bias_sum) = total;
    }
    const int threads = 32 * kHalves * a.shifts;
    sync_multiplying(threads);
    if (a.result.with_bias() && threadIdx.x == 0)
      a.result.put<T>(item.filter, item.split, a.kernel_h * a.kernel_w,
                      shared<float>(Images::kBiasSums) + shared<float>(Images::kBiasSums + 4));
    // Distances, by rows and the rest.
    for (int k = threadIdx.x; k < (a.last_row - a.first_row + 1) * a.width; k += threads) {
      const int row = k / a.width, i = a.first_row - 1 + row, rest = k - row * a.width;
      const int distance = (i - a.padding_h) * a.width + rest + source_before - grad_before;
      const uint32_t from = memory + a.sums + 4 * (a.sum_left + distance - a.first_shift * a.columns);
      const int before = grad_before % a.width;
      float low = 0, high = 0;  // of this row of the kernel, and of the next one, a row of columns to the left
      constexpr int kAtOnce = kLong / kRows / 2;  // many loads: none waits
#pragma unroll
      for (int first = 0; first < kLong / kRows; first += kAtOnce) {
        float products[kAtOnce][kRows];
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            products[c][r] = __uint_as_float(load_word(from + 4 * (r * a.width + first + c) * (a.sum_pitch + 1)));
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
          const float total = (products[c][0] + products[c][1]) + (products[c][2] + products[c][3]);
          const int column = first + c - before, w = column < 0 ? column + a.width : column;
          const bool is_low = w + rest < a.width, is_there = first + c < a.width;
          low += is_there && is_low ? total : 0, high += is_there && !is_low ? total : 0;
        }
      }
      const auto put = [&](int i, int j, float sum) {
        if (i < a.first_row || i >= a.last_row || j < 0 || j >= a.kernel_w) return;
        if (!is_finite(sum)) sum = sum_by_products<T>(a, item, i, j);
        a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, sum);
      };
      put(i, rest + a.padding_w, low), put(i + 1, rest - a.width + a.padding_w, high);
    }
    // Taps that never meet the images.
    for (int k = threadIdx.x; !a.all_meet && k < a.kernel_h * a.kernel_w; k += threads) {
      const int i = k / a.kernel_w, j = k - i * a.kernel_w, dx = j - a.padding_w;
      if (i < a.first_row || i >= a.last_row || dx <= -a.width || dx >= a.width)
        a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, 0);
    }
    sync_multiplying(threads);
  }
#endif
}

template <typename T>
void launch(const Problem& p, const Images& a, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = outer_images<T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = std::min<int64_t>(a.items(), current_device().multiprocessors);
  launch_early(kernel, a, blocks, 32 * (kHalves * a.shifts + 1), stream, {.shared_bytes = shared_bytes});
  check_launch("outer_images");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

// Into how many parts the images are divided.
int splits_for(const Images& a, int multiprocessors) {
  const int units = static_cast<int>(ceil_div(a.images, kImages));
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int fewest = static_cast<int>(std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.pieces, kLongest), 1, units));
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(units, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(int64_t{a.filters} * splits, multiprocessors));
    const double cost = rounds * (static_cast<double>(ceil_div(units, splits)) * 900 + 2500) + (splits > 1 ? 5000 : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

}  // namespace

bool launch_outer_grad_weight_images(const Problem& p, bool exchanged, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  if (device.capability < 90 || !can_overlap(outer_images<__half>)) return false;  // bulk copies
  if (source.height != grad.height || source.width != grad.width) return false;
  const OuterSizes sizes = OuterSizes::of(p, false);
  Images a{};
  a.height = source.height, a.width = source.width, a.columns = kRows * a.width;
  if (a.columns > kLong || 2 * a.columns <= kLong || 2 * a.columns % kUnit > 0) return false;
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  if (a.images < 2 * kImages) return false;  // too few to be worth to add up all products
  a.multiplier = static_cast<int>(p.multiplier);
  int before = 0;  // at most, that pixels have higher numbers for
  const auto arrange = [&](Flat& v, const ImagePlanes& from, int channels) {
    v = {from.base, from.image_bytes, from.channel_bytes};
    // Whole units are read, which have to be the tensor's: it begins and ends with one, and has no gaps between planes.
    const int64_t plane = 2 * from.height * from.width, all = plane * channels;
    for (int channel = 0; channel < std::min(channels, 8); ++channel) before = std::max(before, v.before(channel));
    return from.row_bytes == 2 * from.width && (channels == 1 || from.channel_bytes == plane) &&
           (reinterpret_cast<uintptr_t>(from.base) | all | (a.images > 1 ? from.image_bytes : 0)) % kUnit == 0;
  };
  if (!arrange(a.source, source, static_cast<int>(p.channels)) || !arrange(a.grad, grad, a.filters)) return false;
  const int plane = a.height * a.width;
  a.pieces = static_cast<int>(ceil_div(plane + before, a.columns));
  a.last_tiles = static_cast<int>(ceil_div(plane + before - (a.pieces - 1) * a.columns, 8));
  if (plane <= (a.pieces - 1) * a.columns) return false;  // a piece that only some channels have
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = exchanged ? 1 : a.kernel_w, a.tap_column = exchanged ? a.kernel_h : 1;
  a.first_row = static_cast<int>(sizes.first_row()), a.last_row = static_cast<int>(sizes.last_row());
  a.all_meet = a.last_row - a.first_row == a.kernel_h && a.padding_w < a.width && a.kernel_w - a.padding_w <= a.width;
  // The distances that there may be, as the kernel goes through them.
  const auto down = [&](int distance) { return (distance + 64 * a.columns) / a.columns - 64; };
  const int least = (a.first_row - 1 - a.padding_h) * a.width - before;
  const int most = (a.last_row - a.padding_h) * a.width - 1 + before;
  a.first_shift = std::max(down(least), 1 - a.pieces);
  a.shifts = std::min(down(most + a.columns - 1), a.pieces - 1) - a.first_shift + 1;
  if (a.shifts < 5 || a.shifts > kMaxShifts) return false;
  a.sum_left = std::max(a.first_shift * a.columns - least, 0);
  const int right = std::max(most + a.columns - (a.first_shift + a.shifts) * a.columns, 0);
  a.sum_left = (a.sum_left + 1) & ~1;  // pairs are stored
  // Rows in all banks.
  a.sum_pitch = static_cast<int>(round_up(a.sum_left + a.shifts * a.columns + right - 8, 32)) + 8;
  a.pitch = static_cast<int>(round_up(2 * (plane + before), kUnit)) | kUnit;  // images in all banks
  a.sums = Images::kZeros + kZeroBytes;
  a.first_stage = static_cast<int>(round_up(a.sums + 4 * a.columns * a.sum_pitch, 128));
  const int64_t stage = 2 * kImages * a.pitch, beyond = 256;
  const int64_t room = device.shared_per_block - a.first_stage - beyond;
  a.stages = static_cast<int>(std::min<int64_t>(room / stage, kMaxStages));
  if (a.stages < 3 || 2 * plane > kZeroBytes - 64) return false;
  a.splits = splits_for(a, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes = a.first_stage + a.stages * stage + beyond;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) launch<T>(p, a, shared_bytes, stream);
  });
  return true;
}

}  // namespace dwconv
