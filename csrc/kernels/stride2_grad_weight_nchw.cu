// grad_weight (and the bias gradient) at stride 2 of kernels of at most 7 x 7 in 16 bits, where the gradient has 28
// columns and the input 56, on tensor cores, as sums over images.
//
// As in flat_grad_weight_nchw.cu rows lie in shared memory as they do in memory, with A[m][n] = input[n][m] and
// B[n][k] = gradient[n][k], of 16 images. Two rows of the gradient are 7 times 8: a warp has every seventh 8 of them,
// which are in the same columns of all pairs of rows and meet 32 pixels of 7 rows of the input each. All their products
// stay in registers, of both filters where a channel has two. A tap's sum is of those that are as far from each other
// as it says; the others are left out at the end.
//
// Arrays may begin anywhere within 16 bytes: pixels are counted from the multiple before. Then a row of the gradient
// ends within 8 of them, in two places, and another warp has these for the other row. What is beside a plane of the
// input in its first and its last 16 bytes is in the row above it or below, and becomes zero as it is read.
//
// A block has a channel, of 14 rows of the gradient and 16 images at a time. Some warps do nothing but load: two by
// bulk copies on sm_90 and later, more by cp.async before. Rows outside the image are zeros.
#include "stride2_grad_weight_nchw.h"

#include <algorithm>

#include "image_sums.cuh"
#include "shifted_runs.cuh"

namespace dwconv {
namespace {

constexpr int kPixels = 8;                              // of 16 bytes
constexpr int kColumns = 28, kRowBytes = 2 * kColumns;  // of the gradient
constexpr int kRows = 14;                               // of the gradient that are loaded together
constexpr int kReach = 3, kKernel = 2 * kReach + 1;     // rows and columns around twice a gradient's that taps are in
constexpr int kPhases = 7, kPairs = kRows / 2;          // warps that multiply, pairs of rows
constexpr int kLoaders = 2, kMoreLoaders = 5;           // warps that load, by bulk copies and otherwise
constexpr int kMostWarps = 12;                          // more leave too few registers
constexpr int kSourceRowBytes = 2 * kRowBytes, kSourceRows = 2 * (kRows - 1) + kKernel;
constexpr int kSourceBytes = kSourceRows * kSourceRowBytes, kSourceUnits = kSourceRowBytes / kUnit;
constexpr int kBandBytes = kRows * kRowBytes;  // of a gradient plane
constexpr int kStages = 2;
constexpr int kFull = 0, kDone = 32;                                               // where barriers are
constexpr int kSlots = kKernel * kKernel + 1, kSlotPitch = kPhases * kPixels + 1;  // of what is added up at the end
static_assert(kTotalsBarrier >= kFull + 8 * kStages && kTotalsBarrier < kDone);
static_assert(kPhases * kPixels == 2 * kColumns);

// What a stage has of an image: from one to the next, an odd number of 16 bytes. kShifted: with room for what is
// around.
template <int kFilters, bool kShifted>
struct Stage {
  static constexpr int kSource = (kSourceBytes / kUnit + kShifted | 1) * kUnit;
  static constexpr int kBand = kBandBytes + kShifted * kUnit;  // from one filter to the next
  static constexpr int kGrad = (kFilters * kBand / kUnit | 1) * kUnit;
  static constexpr int kGradAt = kImages * kSource, kBytes = kGradAt + kImages * kGrad;
};

struct Stride2Planes {
  const char* base;
  int64_t image_bytes;  // from one image to the next
  int planes;
  int shift;    // bytes before the array in the 16 that it begins in
  bool joined;  // what is beside an image are its neighbours
};

struct Stride2 : ImageSums {
  Stride2Planes source, grad;
  bool bulk;      // copies
  bool anywhere;  // whether an array begins between units
  int workers;    // warps that multiply
  int loaders;    // warps that load
  int bands;      // of kRows rows of the gradient
  int groups, splits;
  int totals;  // where the first block of a cluster gets the sums of all of it in shared memory, or 0
};

// The first 16 pixels, or the last 16, of the 32 of a row of the input that a phase's gradients meet, by 8. The middle
// phase has the end of one row and the beginning of the next one, and meets 16 pixels of the one and of the other.
__device__ inline int first_unit(int phase, int half) {
  const int first = phase == 0 ? 0 : phase == 1 ? 1 : phase == 2 ? 3 : phase == 4 ? 0 : phase == 5 ? 2 : 3;
  return phase == kPhases / 2 ? (half == 0 ? 5 : 0) : first + 2 * half;
}
__device__ inline bool is_second_row(int phase, int half) {
  return phase + half > kPhases / 2;
}

// What a warp multiplies where arrays begin anywhere: 8 gradients of a pair of rows, counted from the 16 bytes on that
// the first row begins in, of those that are in one of these rows; and from which pixels of the input on, by 8 as well.
struct Anywhere {
  int unit, first_unit;
  bool second;   // row
  bool is_wide;  // 32 pixels are met, not 16

  // `before`, `source_before`: pixels before the arrays in the 16 bytes that they begin in.
  __host__ __device__ Anywhere(int warp, int before, int source_before) {
    const int shared_unit = (kColumns + before) / kPixels;  // of both rows, unless the second one begins there
    const bool splits = (kColumns + before) % kPixels != 0;
    unit = warp - (splits && warp > shared_unit), second = splits ? warp > shared_unit : warp >= shared_unit;
    constexpr int kWidth = 2 * kColumns, kLast = kWidth / kPixels;  // the last 8 pixels, with the end of a row
    const auto within = [](int value, int least, int most) {
      return value < least ? least : value > most ? most : value;
    };
    const int row = second ? kColumns : 0, gradient = unit * kPixels - before - row;
    const auto pixel = [&](int gradient, int more) {
      return within(2 * within(gradient, 0, kColumns - 1) + more, 0, kWidth - 1) + source_before;
    };
    first_unit = pixel(gradient, -kReach) / kPixels;
    is_wide = pixel(gradient + kPixels - 1, kReach) / kPixels > first_unit + 1;
    first_unit = within(first_unit, 0, kLast - (is_wide ? 3 : 1));
  }
  // How many warps that takes.
  static int warps(int before) { return kPhases + ((kColumns + before) % kPixels != 0) + (before > 0); }
};

// The sum of one tap over some images, again.
template <typename T>
__device__ __noinline__ float sum_by_products(const Stride2& a, int filter, int first, int last, int tap) {
  const auto all = [](int, int) { return true; };
  return sum_of_lanes(sum_inside<T>(a, a.source, a.grad, filter, tap, first, last - first, 0, a.out_height, all));
}

// The rows of the input that a band of gradients meets, those inside the image, and what is made zero before them.
struct SourceRows {
  int begin, end, before;
  __device__ SourceRows(const Stride2& a, int band) {
    const int top = 2 * kRows * band - kReach;
    begin = max(top, 0), end = min(top + kSourceRows, a.height), before = (begin - top) * kSourceRowBytes;
  }
  __device__ int bytes() const { return (end - begin) * kSourceRowBytes; }
};

// kFilters: of a channel. kPlain: by bulk copies, of arrays that begin with 16 bytes.
template <typename T, int kFilters, bool kPlain>
__global__ void __launch_bounds__(32 * (kPlain ? kPhases + kLoaders : kMostWarps), 1)
    stride2_grad_weight_nchw(const __grid_constant__ Stride2 a) {
#if __CUDA_ARCH__ < 800
  if constexpr (sizeof(T) == 2) return;  // it is not launched
#elif __CUDA_ARCH__ < 900
  if constexpr (kPlain) return;
#endif
  using Place = Stage<kFilters, !kPlain>;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool cluster = a.totals > 0;
  const int channel = cluster ? blockIdx.x / a.splits : blockIdx.x % a.groups;
  const int split = cluster ? blockIdx.x % a.splits : blockIdx.x / a.groups;
  const int taps = a.taps(), slots = a.slots();
  const Totals totals{a.totals, kFilters, slots};
  const auto [first, last] = Steps((a.images + kImages - 1) / kImages, a.splits, split);
  const int steps = (last - first) * a.bands;
  if (cluster) enter_cluster(split == 0, kTotalsBarrier, 4 * a.splits * kFilters * slots);
  const bool anywhere = !kPlain && a.anywhere;
  const int workers = kPlain ? kPhases : a.workers, loaders = kPlain ? kLoaders : a.loaders;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i)
      init_barrier(kFull + 8 * i, kPlain ? kLoaders * kWarpArrivals : loaders * ((a.bulk ? 0 : 32) + kWarpArrivals)),
          init_barrier(kDone + 8 * i, workers * kWarpArrivals);
    before_bulk_copies();
  }
  let_next_kernel_start();
  __syncthreads();
  wait_for_kernel_before();

  if (warp >= workers) {
    const int grad_loaders = loaders / 2, input_loaders = loaders - grad_loaders;
    const bool input = warp < workers + input_loaders;
    const int loader = warp - workers - (input ? 0 : input_loaders);
    const Stride2Planes& v = input ? a.source : a.grad;
    const int plane_bytes = (input ? 4 : 1) * a.bands * kBandBytes, pitch = input ? Place::kSource : Place::kGrad;
    const int first_plane = input ? channel : channel * kFilters;
    const char* const plane = v.base + int64_t{first_plane} * plane_bytes;
    int image = first * kImages, band = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, full = kFull + 8 * stage, images = min(kImages, a.images - image);
      const int to = kHead + stage * Place::kBytes + (input ? 0 : Place::kGradAt);
      if (step >= kStages) wait(kDone + 8 * stage, (step / kStages - 1) & 1);
      // Rows of the input that are not there are zeros, as are images.
      const SourceRows rows(a, band);
      const int before = input ? rows.before : 0, bytes = input ? rows.bytes() : kBandBytes;
      const int behind = !kPlain && v.shift > 0 ? kUnit : 0;  // to be loaded behind the rows, for those before
      const char* const from =
          plane + image * v.image_bytes + (input ? rows.begin * kSourceRowBytes : band * kBandBytes);
      if constexpr (kPlain) {
        if (is_elected()) {
          expect_bytes(full, images * bytes * (input ? 1 : kFilters));
          const char* run = from;
          uint32_t slot = shared_address(to + before);
#pragma unroll 2
          for (int n = 0; n < images; ++n, run += v.image_bytes, slot += pitch) {
            copy_bulk(slot, run, bytes, full);
            if (kFilters == 2 && !input) copy_bulk(slot + Place::kBand, run + plane_bytes, kBandBytes, full);
          }
        }
      } else {
#pragma unroll 1
        for (int f = 0; f < (input ? 1 : kFilters); ++f) {
          // Nothing outside the array is touched.
          const bool is_first = first_plane + f == 0 && band == 0 && (image == 0 || !v.joined);
          const bool is_last = first_plane + f == v.planes - 1 &&
                               (input ? rows.end == a.height : band == a.bands - 1) &&
                               (image + images == a.images || !v.joined);
          load_images(from + int64_t{f} * plane_bytes - v.shift, v.image_bytes, images, to + before + f * Place::kBand,
                      pitch, is_first ? v.shift : 0, bytes + (is_last ? v.shift : behind), full, a.bulk, loader,
                      input ? input_loaders : grad_loaders);
        }
        if (!a.bulk) arrive_after_copies(full);
      }
      // What no copy is to write, by one of the warps.
      const auto clear = [&](int from, int size) {
        for (int at = lane * kUnit; at < size; at += 32 * kUnit) shared<uint4>(from + at) = uint4{};
      };
      if (loader == 0) {
        if (input && (step < kStages || a.bands % kStages != 0))  // else the stage had the same rows before
#pragma unroll 1
          for (int n = 0; n < images; ++n) {
            clear(to + n * pitch, before);
            clear(to + n * pitch + before + bytes + behind, kSourceBytes - before - bytes);
          }
        for (int n = images; n < kImages; ++n) clear(to + n * pitch, pitch);
        before_bulk_copies();  // to the same places
      }
      arrive_together(full, is_elected());
      __syncwarp();
      if (++band == a.bands) band = 0, image += kImages;
    }
  } else {
    float sum[kFilters][kKernel][2][4] = {}, bias[kFilters][4] = {};
    const uint32_t source = shared_address(kHead) + (lane % 8 + lane / 16 * 8) * Place::kSource + lane / 8 % 2 * kUnit;
    const int before = anywhere ? a.grad.shift / 2 : 0, source_before = anywhere ? a.source.shift / 2 : 0;
    const Anywhere mine(warp, before, source_before);
    const int unit = anywhere ? mine.unit : warp;
    const bool is_wide = !anywhere || mine.is_wide;
    uint32_t from[2];
    int first_units[2];
    const bool second_row = anywhere && mine.second;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      first_units[h] = anywhere ? mine.first_unit + 2 * h : first_unit(warp, h);
      const bool second = anywhere ? mine.second : is_second_row(warp, h);
      from[h] = source + first_units[h] * kUnit + (second ? 2 * kSourceRowBytes : 0);
    }
    // Of both filters, or of two pairs of rows.
    const uint32_t grad = shared_address(kHead) + Place::kGradAt + lane % 16 * Place::kGrad + unit * kUnit +
                          lane / 16 * (kFilters == 2 ? Place::kBand : 2 * kRowBytes);
#pragma unroll 1
    for (int step = 0, band = 0; step < steps; ++step, band = band + 1 < a.bands ? band + 1 : 0) {
      const int stage = step % kStages, place = stage * Place::kBytes;
      wait(kFull + 8 * stage, step / kStages & 1);
      uint32_t g[kPairs + 1][kFilters][2];
#pragma unroll
      for (int y = 0; y < 4 * (kPairs - 1) + kKernel; ++y) {
        if (y % 4 == 0 && y / 4 < kPairs && (kFilters == 2 || y % 8 == 0)) {
          const int q = y / 4;
          uint32_t both[4];
          load_matrices_transposed(both, grad + place + 2 * q * kRowBytes);
#pragma unroll
          for (int e = 0; e < 4; ++e) (kFilters == 2 ? g[q][e / 2 % kFilters] : g[q + e / 2][0])[e % 2] = both[e];
        }
        uint32_t x[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (h == 1 && !is_wide) continue;
          load_matrices_transposed(x[h], from[h] + place + y * kSourceRowBytes);
          // The last 16 bytes of the row above the plane have what is before it, the first ones below what is behind.
          constexpr int kAbove = kReach - 1, kBelow = kReach + 2 * kRows;
          if (!kPlain && (y == kAbove || y == kAbove - 2 || y == kBelow - 2)) {
            const int row = y + 2 * second_row;
            const bool is_above = anywhere && row == kAbove && band == 0;
            const bool is_below = anywhere && row == kBelow && band == a.bands - 1;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int unit = first_units[h] + e % 2;
              if ((is_above && unit == kSourceUnits) || (is_below && unit == 0)) x[h][e] = 0;
            }
          }
#pragma unroll
          for (int q = 0; q < kPairs; ++q) {
            const int i = y - 4 * q;
            if (i < 0 || i >= kKernel) continue;
#pragma unroll
            for (int f = 0; f < kFilters; ++f) multiply(sum[f][i][h], sum[f][i][h], x[h], g[q][f], T{});
          }
        }
      }
      if (a.result.with_bias()) {
#pragma unroll 1
        for (int q = 0; q < kPairs; ++q) {
          uint32_t both[4];
          load_matrices_transposed(both, grad + place + 2 * q * kRowBytes);
#pragma unroll
          for (int f = 0; f < kFilters; ++f) add_to_bias(bias[f], {both[2 * f], both[2 * f + 1]}, T{});
        }
      }
      arrive_together(kDone + 8 * stage, lane == 0);
    }

    // What was loaded has served: for each tap there are to be the products of a pair of rows, zeros where it has none.
    meet<1>(32 * workers);
    for (int at = threadIdx.x; at < kFilters * kSlots * kSlotPitch; at += 32 * workers)
      shared<float>(kHead + 4 * at) = 0;
    meet<1>(32 * workers);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int gradient = kPixels * unit + lane % 4 * 2 + e - before;
      if (gradient < 0 || gradient >= 2 * kColumns) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int column = (first_units[h] + m) * kPixels + lane / 4 - source_before;
          const int j = column - 2 * (gradient % kColumns) + kReach;  // far from the kernel where rows differ
          if (j < 0 || j >= kKernel || column < 0 || column >= 2 * kColumns) continue;
#pragma unroll
          for (int f = 0; f < kFilters; ++f)
#pragma unroll
            for (int i = 0; i < kKernel; ++i)
              shared<float>(kHead + 4 * ((f * kSlots + i * kKernel + j) * kSlotPitch + gradient)) =
                  sum[f][i][h][2 * m + e];
        }
      const bool counts = !anywhere || mine.second == (gradient >= kColumns);
      if (lane < 4 && counts)  // every row of the product is the same
#pragma unroll
        for (int f = 0; f < kFilters; ++f)
          shared<float>(kHead + 4 * ((f * kSlots + kSlots - 1) * kSlotPitch + gradient)) = bias[f][e];
    }
  }
  __syncthreads();
  if (cluster) meet_cluster();

#pragma unroll 1
  for (int begin = 32 * warp; begin < kFilters * slots; begin += blockDim.x) {
    const int at = begin + lane, f = at / slots, slot = at % slots;
    float total = 0;
    if (f < kFilters) {
      const int product = slot == taps ? kSlots - 1 : (a.row_of(slot) + kReach) * kKernel + a.column_of(slot) + kReach;
      const int from = kHead + 4 * (f * kSlots + product) * kSlotPitch;
#pragma unroll 8
      for (int k = 0; k < kPhases * kPixels; ++k) total += shared<float>(from + 4 * k);
    }
    uint32_t again = __ballot_sync(~0u, slot < taps && !is_finite(total));
    for (; again; again &= again - 1) {
      const int which = begin + __ffs(again) - 1, end = min(last * kImages, a.images);
      const float exact =
          sum_by_products<T>(a, channel * kFilters + which / slots, first * kImages, end, which % slots);
      if (at == which) total = exact;
    }
    if (f >= kFilters) continue;
    if (cluster)
      totals.send(split, f, slot, total);
    else
      a.result.put<T>(channel * kFilters + f, split, slot, total);
  }
  if (cluster && split == 0) totals.put<T>(a.result, a.splits, channel * kFilters);
}

template <typename T, int kFilters, bool kPlain>
bool launch(const Problem& p, Stride2 a, const Device& device, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = stride2_grad_weight_nchw<T, kFilters, kPlain>;
  const int64_t slots = p.taps() + (p.bias != nullptr), totals = 4 * 2 * kFilters * slots;
  const int64_t bytes = kHead + kStages * Stage<kFilters, !kPlain>::kBytes + kTail;
  a.anywhere = (a.source.shift | a.grad.shift) != 0;
  a.workers = a.anywhere ? Anywhere::warps(a.grad.shift / 2) : kPhases;
  a.loaders = a.bulk ? kLoaders : std::min(kMoreLoaders, kMostWarps - a.workers);
  const int threads = 32 * (a.workers + a.loaders);
  if (bytes > device.shared_per_block) return false;
  const int64_t steps = ceil_div(a.images, kImages);
  static thread_local Decisions<5, Splits> decisions;
  const auto [splits, cluster] = decisions({device.id, steps, a.groups, a.bulk, threads}, [&] {
    return split_steps(kernel, device, steps, a.groups, threads, bytes, a.bulk ? totals : 0);
  });
  a.splits = splits;
  if (cluster) a.totals = static_cast<int>(bytes);
  a.result = weight_sums(p, cluster ? 1 : a.splits, allocate);
  launch_early(kernel, a, int64_t{a.groups} * a.splits, threads, stream,
               {.cluster = cluster ? a.splits : 1, .shared_bytes = bytes + (cluster ? totals : 0)});
  check_launch("stride2_grad_weight_nchw");
  launch_add_partial_sums(p, a.result, a.splits, stream);
  return true;
}

}  // namespace

bool launch_stride2_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const auto is_near = [](int64_t kernel, int64_t dilation, int64_t padding) {
    return padding <= kReach && (kernel - 1) * dilation - padding <= kReach;
  };
  if (device.capability < 80 || p.stride_h != 2 || p.out_width != kColumns || p.width != 2 * kColumns ||
      p.out_height % kRows != 0 || p.height != 2 * p.out_height || p.multiplier > 2 ||
      !is_near(p.kernel_h, p.dilation_h, p.padding_h) || !is_near(p.kernel_w, p.dilation_w, p.padding_w) ||
      p.input.stride[0] % kPixels != 0 || p.output.stride[0] % kPixels != 0)
    return false;
  Stride2 a{};
  const auto arrange = [](Stride2Planes& v, const View& view, int64_t planes, int64_t pixels) {
    v.base = static_cast<const char*>(view.data), v.image_bytes = 2 * view.stride[0];
    v.planes = static_cast<int>(planes), v.joined = view.stride[0] == planes * pixels;
    v.shift = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
  };
  arrange(a.source, p.input, p.channels, p.height * p.width);
  arrange(a.grad, p.output, p.filters(), p.out_height * p.out_width);
  a.take(p);
  a.bands = static_cast<int>(p.out_height / kRows);
  a.groups = static_cast<int>(p.channels);
  bool served = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto filters) {
        constexpr int kFilters = decltype(filters)::value;
        a.bulk = bulk && can_overlap(stride2_grad_weight_nchw<T, kFilters, true>);  // else it is not code for sm_90
        served = a.bulk && a.source.shift == 0 && a.grad.shift == 0
                     ? launch<T, kFilters, true>(p, a, device, allocate, stream)
                     : launch<T, kFilters, false>(p, a, device, allocate, stream);
      };
      if (p.multiplier == 2) return go(std::integral_constant<int, 2>{});
      go(std::integral_constant<int, 1>{});
    }
  });
  return served;
}

}  // namespace dwconv
