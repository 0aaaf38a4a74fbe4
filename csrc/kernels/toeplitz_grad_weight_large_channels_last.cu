// The same as outer_grad_weight from images in channels_last as they are, for kernels of 8 to 14 lines, or 15 without a
// bias, by up to 16 on images whose lines have 21 to 32 pixels, or some spans of about as many, on sm_90 and later.
//
// A line is a row of an image, or a column where the kernel is taller than wide. For a channel and a line r of the
// gradient, with taps j along the line down and lines of the input across, a product A[j][u] B[u][i] sums
// gradient[r][u + padding - j] input[r + i - padding][u] over the places u of a line. A is a Toeplitz matrix: its 8 x 8
// blocks on a diagonal are the same, so that a line of the gradient is read about once for all taps. A warp has the
// sums of all taps of 8 channels in registers, over all lines and images of its block.
//
// Boxes of 16 channels come to shared memory, with zeros around the images and the gradient's lines. A thread reads 8
// channels of a pixel at once, and a byte permutation of two pixels makes a pair (k, k + 1) of each channel. Which
// places are a pair is up to us, as long as it is the same for both matrices: places that are 4 apart. Boxes exchange
// units of 16 bytes so that 8 pixels side by side lie in all banks; of neighbouring lines, which do not, one is read
// the other half first.
//
// Lines of the tiles that the kernel does not reach are ones: they make the sums of the gradient, for the bias.
//
// Zeros meet others: sums that are not finite are taken again, product by product.
#include "toeplitz_grad_weight_large_channels_last.h"

#include <algorithm>
#include <cmath>

#include "boxes.cuh"
#include "clusters.cuh"
#include "overlap.cuh"
#include "stream.cuh"
#include "tensor_cores.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kOctet = 8, kOctets = 2, kBoxChannels = kOctet * kOctets;  // channels of a warp, and of a block
[[maybe_unused]] constexpr int kPixelBytes = 2 * kBoxChannels, kRunBytes = 8 * kPixelBytes;  // of a block; of 8 pixels
constexpr int kTaps = 16, kPlaces = 32;                                                      // along a line, at most
constexpr int kTiles = 2, kLines = 8 * kTiles;       // of the input that are multiplied at once
constexpr int kSourceBytes = kPlaces * kPixelBytes;  // of a line in shared memory
constexpr int kGradPlaces = kPlaces + kTaps, kGradBytes = kGradPlaces * kPixelBytes;
constexpr int kLineBytes = kTaps * 4 * kOctet + 32;  // of sums of a line: lanes in all banks
constexpr int kTogether = 2;                         // lines of the gradient that meet the same lines of the input
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kShares = kWarps / kOctets;                   // warps with other lines of the gradient
constexpr int kSumBytes = kTogether * kLines * kLineBytes;  // of a warp
constexpr int kFewStages = 2, kMaxStages = 8, kMostCluster = 16;

struct Side {
  const char* base;
  int64_t image_bytes, line_bytes, place_bytes;
  int lines, places;
};

struct Large {
  CUtensorMap source_boxes, grad_boxes;
  Side source, grad;
  WeightSums result;
  int kernel_short, kernel_long, padding_short, padding_long;
  int tap_short, tap_long;  // taps from one to the next
  int images, channels, slabs, splits;
  int rows, bands, spans;  // lines of the gradient of a stage, and how many of an image; spans of the input's lines
  int stages, ahead, stage_bytes;
  bool cluster;  // whether the splits of the same channels are one, which adds up its sums
  static constexpr int kOnes = 2 * 8 * kMaxStages, kFirstStage = (kOnes + kSourceBytes + 255) / 256 * 256;

  __host__ __device__ int grad_bytes() const { return rows * kGradBytes; }  // of a stage
  __host__ __device__ int slots() const { return result.taps + (result.grad_bias != nullptr); }
};

// A stage's barriers.
[[maybe_unused]] __device__ inline int full_barrier(int stage) {
  return 8 * stage;
}
[[maybe_unused]] __device__ inline int empty_barrier(int stage) {
  return 8 * (kMaxStages + stage);
}

// 8 channels of a pixel.
[[maybe_unused]] __device__ inline uint4 load_pixel(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

// Two pixels of each channel, in the order that the selectors say.
[[maybe_unused]] __device__ inline void pair_up(uint4 first, uint4 second, uint32_t low, uint32_t high,
                                                uint32_t (&pairs)[kOctet]) {
  const uint32_t a[4] = {first.x, first.y, first.z, first.w}, b[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    pairs[2 * k] = __byte_perm(a[k], b[k], low), pairs[2 * k + 1] = __byte_perm(a[k], b[k], high);
}

// Where a unit is, as boxes exchange them.
[[maybe_unused]] __device__ inline uint32_t exchanged_unit(uint32_t address) {
  return address ^ (address >> 3 & kUnit);
}

// Where a lane's two pixels are: of a line of the gradient, of a line of the first tile of the input, and of one of the
// second tile.
struct Pixels {
  uint32_t grad[2], source[2], last[2];
};

// A warp's sums.
template <typename T>
struct Sums {
  float sum[kTogether][kTiles][kOctet][4];  // taps g and g + 8 by lines 2 t and 2 t + 1

  __device__ void clear() {
#pragma unroll
    for (auto& q : sum)
#pragma unroll
      for (auto& n : q)
#pragma unroll
        for (auto& c : n)
#pragma unroll
          for (float& e : c) e = 0;
  }

  // Adds the products of some lines of the gradient. `low` and `high` select pairs of the input.
  __device__ void add(Pixels at, uint32_t low, uint32_t high) {
#pragma unroll 1
    for (int place = 0; place < kPlaces; place += 16) {
      uint32_t x[kTiles][2][kOctet];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const auto& from = n == 0 ? at.source : at.last;
          pair_up(load_pixel(from[0] + k * kRunBytes), load_pixel(from[1] + k * kRunBytes), low, high, x[n][k]);
        }
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        uint32_t a[3][kOctet];  // runs of 8 places
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const int offset = q * kGradBytes + (k - 1) * kRunBytes;
          pair_up(load_pixel(at.grad[0] + offset), load_pixel(at.grad[1] + offset), 0x5410, 0x7632, a[k]);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int c = 0; c < kOctet; ++c)
            multiply(sum[q][n][c], sum[q][n][c], {a[1][c], a[0][c], a[2][c], a[1][c]}, {x[n][0][c], x[n][1][c]}, T{});
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        at.grad[h] += 2 * kRunBytes, at.source[h] += 2 * kRunBytes, at.last[h] += 2 * kRunBytes;
    }
  }

  // To shared memory, as place_of() says.
  __device__ void store(uint32_t to) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const bool exchanged = t >= 2;
#pragma unroll
    for (int q = 0; q < kTogether; ++q)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t at = to + (q * kLines + 8 * n + 2 * t + e % 2) * kLineBytes + (8 * (e / 2) + g) * 4 * kOctet;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) v[c] = exchanged ? sum[q][n][4 * (1 - h) + c][e] : sum[q][n][4 * h + c][e];
            shared_at<float4>(at + 16 * h) = {v[0], v[1], v[2], v[3]};
          }
        }
  }
  // Of a channel of 8; of every second four lines, halves of the channels are exchanged.
  static __device__ int place_of(int q, int line, int tap, int channel) {
    return (q * kLines + line) * kLineBytes + tap * 4 * kOctet + 4 * (channel ^ (line & 4));
  }
};

// A tap's sum, product by product.
template <typename T>
__device__ __noinline__ float sum_by_products(const Large& a, int channel, int first, int last, int i, int j) {
  const int across = i - a.padding_short, along = j - a.padding_long;
  const auto at = [&](const Side& v, int image, int line, int place) {
    return widen(*reinterpret_cast<const T*>(v.base + image * v.image_bytes + line * v.line_bytes +
                                             place * v.place_bytes + 2 * channel));
  };
  double total = 0;
  for (int image = first; image < last; ++image)
    for (int r = max(-across, 0); r < min(a.grad.lines, a.source.lines - across); ++r) {
      float sum = 0;
      for (int w = max(-along, 0); w < min(a.grad.places, a.source.places - along); ++w)
        sum = fmaf(at(a.source, image, r + across, w + along), at(a.grad, image, r, w), sum);
      total += sum;
    }
  return static_cast<float>(total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) toeplitz_grad_weight_large(const __grid_constant__ Large a) {
#if __CUDA_ARCH__ >= 900
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    prefetch(a.source_boxes), prefetch(a.grad_boxes);
    for (int s = 0; s < a.stages; ++s)
      init_barrier(full_barrier(s), 1), init_barrier(empty_barrier(s), kWarps * kWarpArrivals);
  }
  for (int i = 4 * threadIdx.x; i < kSourceBytes; i += 4 * kThreads) shared<uint32_t>(Large::kOnes + i) = kOnes;
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();

  // Blocks side by side read the same pixels, other channels of them.
  const int slab = a.cluster ? cluster_number() : blockIdx.x % a.slabs;
  const int split = a.cluster ? rank_in_cluster() : blockIdx.x / a.slabs;
  const int first = static_cast<int>(int64_t{a.images} * split / a.splits);
  const int last = static_cast<int>(int64_t{a.images} * (split + 1) / a.splits), parts = a.bands * a.spans,
            steps = (last - first) * parts;
  const uint32_t memory = kept_shared_address();
  const int lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);  // kept as well
  const int octet = warp % kOctets, share = warp / kOctets;

  // Begins to load what comes in a step, as soon as its stage is free.
  const auto load = [&](int step) {
    if (!is_elected() || step >= steps) return;
    const int turn = step / a.stages, stage = step - turn * a.stages, barrier = full_barrier(stage);
    const int image = step / parts, part = step - image * parts, span = part / a.bands;
    const int line = (part - span * a.bands) * a.rows, place = span * kPlaces;
    const int to = Large::kFirstStage + stage * a.stage_bytes, channel = slab * kBoxChannels;
    wait(empty_barrier(stage), turn % 2 ^ 1);
    expect_bytes(barrier, a.stage_bytes);
    copy_box(to, a.grad_boxes, channel, place + a.padding_long - kTaps, line, first + image, barrier);
    copy_box(to + a.grad_bytes(), a.source_boxes, channel, place, line - a.padding_short, first + image, barrier);
    arrive(barrier);
  };
  if (warp == 0)
    for (int s = 0; s < a.ahead; ++s) load(s);

  // The lane's pixels in the first stage. Of every second line the other half is read first.
  const int g = lane / 4, t = lane % 4, second_first = g % 2;
  const bool is_one = kLines - 8 + g >= a.kernel_short + kTogether - 1;  // beyond what the kernel reaches
  const uint32_t low = second_first ? 0x1054 : 0x5410, high = second_first ? 0x3276 : 0x7632;
  Pixels pixels;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t stage = memory + Large::kFirstStage + octet * kUnit;
    const int place = t + 4 * (h ^ second_first);
    pixels.grad[h] = exchanged_unit(stage + (kTaps + t + 4 * h - g) * kPixelBytes);
    pixels.source[h] = exchanged_unit(stage + a.grad_bytes() + g * kSourceBytes + place * kPixelBytes);
    pixels.last[h] = is_one ? exchanged_unit(memory + Large::kOnes + place * kPixelBytes + octet * kUnit)
                            : pixels.source[h] + (kLines - 8) * kSourceBytes;
  }
  Sums<T> sums;
  sums.clear();
  int stage = 0, band = 0, next = share;  // `next`: of the warp's lines, counted in those that are taken together
  uint32_t parity = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (warp == 0) load(step + a.ahead);
    wait_at(memory + full_barrier(stage), parity);
    const int count = (min(a.rows, a.grad.lines - band * a.rows) + kTogether - 1) / kTogether;
#pragma unroll 1
    for (; next < count; next += kShares) {
      const uint32_t line = next * kTogether, at = stage * a.stage_bytes, source = at + line * kSourceBytes;
      Pixels here = pixels;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        here.grad[h] += at + line * kGradBytes, here.source[h] += source, here.last[h] += is_one ? 0 : source;
      sums.add(here, low, high);
    }
    next -= count;
    arrive_together_at(memory + empty_barrier(stage), lane == 0);
    if (++stage == a.stages) stage = 0, parity ^= 1;
    if (++band == a.bands) band = 0;
  }

  __syncthreads();
  sums.store(memory + Large::kFirstStage + warp * kSumBytes);
  __syncthreads();
  constexpr int kTotals = Large::kFirstStage + kWarps * kSumBytes;
  const auto total_of = [&](int channel, auto&& line_of, int j) {
    float total = 0;
#pragma unroll
    for (int s = 0; s < kShares; ++s)
#pragma unroll
      for (int q = 0; q < kTogether; ++q)
        total += shared<float>(Large::kFirstStage + (s * kOctets + channel / kOctet) * kSumBytes +
                               Sums<T>::place_of(q, line_of(q), j, channel % kOctet));
    return total;
  };
  const int taps = a.result.taps, slots = a.slots();
  for (int k = threadIdx.x; k < slots * kBoxChannels; k += kThreads) {
    const int channel = k % kBoxChannels, tap = k / kBoxChannels, filter = slab * kBoxChannels + channel;
    if (filter >= a.channels) continue;
    float total = 0;
    int slot = tap;
    if (tap < taps) {
      const int i = tap / a.kernel_long, j = tap - i * a.kernel_long;
      slot = i * a.tap_short + j * a.tap_long;
      total = total_of(channel, [&](int q) { return i + q; }, j);
      if (!is_finite(total)) total = sum_by_products<T>(a, filter, first, last, i, j);
    } else {
      total = total_of(channel, [](int) { return kLines - 1; }, a.padding_long);
    }
    if (a.cluster)
      shared<float>(kTotals + 4 * (channel * slots + slot)) = total;
    else
      a.result.put<T>(filter, split, slot, total);
  }
  if (!a.cluster) return;
  meet_in_cluster();
  // Each block adds up a part.
  const int count = slots * min(kBoxChannels, a.channels - slab * kBoxChannels);
  for (int k = count * split / a.splits + threadIdx.x; k < count * (split + 1) / a.splits; k += kThreads) {
    float total = 0;
#pragma unroll 4
    for (int s = 0; s < a.splits; ++s) total += read_in_cluster(s, kTotals + 4 * k);
    a.result.put<T>(slab * kBoxChannels + k / slots, split, k % slots, total);
  }
  meet_in_cluster();
#endif
}

// How the work is cut.
struct Cut {
  int rows, splits;  // no rows where it cannot be
  bool cluster;
};

// Fills in what follows from the lines of a stage.
void apply(Large& a, int rows, const Device& device) {
  a.rows = rows, a.bands = static_cast<int>(ceil_div(a.grad.lines, rows));
  a.stage_bytes = a.grad_bytes() + (rows + a.kernel_short - 1) * kSourceBytes;
  a.stages = std::min((device.shared_per_block - Large::kFirstStage) / a.stage_bytes, kMaxStages);
  a.ahead = std::max(a.stages - 2, 1);  // no warp waits for the one before
}

int64_t bytes_of_sums(const Large& a, bool cluster) {
  return int64_t{kWarps} * kSumBytes + (cluster ? int64_t{4} * a.slots() * kBoxChannels : 0);
}

template <typename T>
Cut cut_for(Large a, const Device& device) {
  const auto kernel = toeplitz_grad_weight_large<T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  const int64_t room = device.shared_per_block - Large::kFirstStage;
  Cut cut{};
  if (bytes_of_sums(a, false) > room) return cut;
  // As many lines in a stage as leave room for another one.
  for (int bands = 1;; ++bands) {
    const int rows = static_cast<int>(round_up(ceil_div(a.grad.lines, bands), kTogether));
    apply(a, rows, device);
    if (a.stages >= kFewStages && rows + a.kernel_short <= kMostBoxSide) break;
    if (rows == kTogether) return cut;
  }
  // As many parts of the images as blocks run at once, but more where sums get long: they lose digits in float32.
  constexpr int64_t kLongest = 12 << 10;
  const int64_t products = int64_t{a.images} * a.grad.lines * a.grad.places / kShares;
  const int64_t splits = std::max<int64_t>(device.multiprocessors / a.slabs, ceil_div(products, kLongest));
  cut.rows = a.rows, cut.splits = static_cast<int>(std::clamp<int64_t>(splits, 1, a.images));
  cut.cluster = cut.splits > 1 && cut.splits <= kMostCluster && bytes_of_sums(a, true) <= room &&
                fits_clusters(kernel, a.slabs, cut.splits, kThreads, device.shared_per_block);
  return cut;
}

template <typename T>
bool launch(const Problem& p, Large& a, bool tall, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_large<T>;
  const Device& device = current_device();
  if (device.capability < 90 || !can_overlap(kernel)) return false;  // boxes
  a.slabs = static_cast<int>(ceil_div(a.channels, kBoxChannels));
  // Larger images are spread over the device in smaller pieces, where they are few.
  if (a.spans > 1 && 4 * int64_t{a.slabs} * a.images < 3 * device.multiprocessors) return false;
  a.result = weight_sums(p, 1, allocate);
  static thread_local Decisions<11, Cut> decisions;
  const Cut cut = decisions({device.id, a.images, a.channels, a.source.lines, a.source.places, a.grad.lines,
                             a.grad.places, a.kernel_short, a.kernel_long, a.padding_short, a.slots()},
                            [&] { return cut_for<T>(a, device); });
  if (cut.rows == 0) return false;
  apply(a, cut.rows, device);
  a.splits = cut.splits, a.cluster = cut.cluster;
  const auto boxes = [&](CUtensorMap& map, const View& view, const Side& side, int places, int lines) {
    return describe_boxes(map, view.data, 2, {a.channels, side.places, side.lines, a.images},
                          {2 * view.stride[tall ? 2 : 3], 2 * view.stride[tall ? 3 : 2], 2 * view.stride[0]},
                          {kBoxChannels, places, lines, 1}, CU_TENSOR_MAP_SWIZZLE_32B);
  };
  if (!boxes(a.source_boxes, p.input, a.source, kPlaces, a.rows + a.kernel_short - 1) ||
      !boxes(a.grad_boxes, p.output, a.grad, kGradPlaces, a.rows))
    return false;
  if (!a.cluster) a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes =
      Large::kFirstStage + std::max(int64_t{a.stages} * a.stage_bytes, bytes_of_sums(a, a.cluster));
  launch_early(kernel, a, int64_t{a.slabs} * a.splits, kThreads, stream,
               {.cluster = a.cluster ? a.splits : 1, .shared_bytes = shared_bytes});
  check_launch("toeplitz_grad_weight_large");
  launch_add_partial_sums(p, a.result, a.splits, stream);
  return true;
}

}  // namespace

bool launch_toeplitz_grad_weight_large_channels_last(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.multiplier != 1 || p.input.stride[1] != 1 || p.output.stride[1] != 1 || p.channels % 8 > 0) return false;
  const bool tall = p.kernel_h > p.kernel_w;
  const auto side = [&](const View& view, int64_t height, int64_t width) {
    if (tall) std::swap(height, width);
    return Side{static_cast<const char*>(view.data), 2 * view.stride[0],       2 * view.stride[tall ? 3 : 2],
                2 * view.stride[tall ? 2 : 3],       static_cast<int>(height), static_cast<int>(width)};
  };
  Large a{};
  a.source = side(p.input, p.height, p.width), a.grad = side(p.output, p.out_height, p.out_width);
  a.kernel_short = static_cast<int>(tall ? p.kernel_w : p.kernel_h);
  a.kernel_long = static_cast<int>(tall ? p.kernel_h : p.kernel_w);
  a.padding_short = static_cast<int>(tall ? p.padding_w : p.padding_h);
  a.padding_long = static_cast<int>(tall ? p.padding_h : p.padding_w);
  a.tap_short = static_cast<int>(tall ? 1 : p.kernel_w), a.tap_long = static_cast<int>(tall ? p.kernel_w : 1);
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  const int places = std::max(a.source.places, a.grad.places);
  a.spans = static_cast<int>(ceil_div(places, kPlaces));
  // With fewer places or lines more products would be zeros than copies cost.
  if (8 * places <= 5 * kPlaces * a.spans || a.kernel_long > kTaps) return false;
  const int lines = a.kernel_short + kTogether - 1, most = kLines - (p.bias != nullptr);  // one is left for the bias
  if (lines > most || lines <= kLines / 2) return false;
  bool done = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) done = launch<T>(p, a, tall, allocate, stream);
  });
  return done;
}

}  // namespace dwconv
