// grad_weight (and the bias gradient) of 3x3 on images of three channels that lie as they are in memory, channels_last.
//
// A row of such an image is a line of neighbouring elements whose channels take turns. A thread owns four pixels, 12
// elements, and marches down a band of rows with the sums of all taps of all three filters in registers; it reads four
// elements at a time. The threads of a row are a group; a block has some groups, each with a band and a ring of its
// own, which bulk copies of whole rows fill. Zeros lie on both sides of a row. Bands are gone through downwards and
// upwards by turns: so neighbours read the rows that both need at the same time, and memory is asked for them once.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <algorithm>

#include "launch.h"
#include "overlap.cuh"
#include "partial_sums.h"
#include "stream.cuh"
#include "three_channels_grad_weight.h"

namespace dwconv {
namespace {

constexpr int kChannels = 3, kKernel = 3, kTaps = kKernel * kKernel, kSums = kTaps * kChannels;
constexpr int kPixels = 4, kElements = kPixels * kChannels;  // of a thread
constexpr int kThreads = 512;                                // of a block, at most
constexpr int kMostStages = 8, kMostRings = 32;              // of a group; stages of all groups
constexpr int kRing = 16 * kMostRings;                       // where the rings begin in shared memory, behind barriers

struct Images {
  const char *source, *grad;
  float* partial;  // [block][tap, or bias behind the last tap][channel]
  int height, row_bytes;
  int bands, rows, all_bands;  // bands of an image, of so many rows each, and of all images
  int strips, group_threads;   // threads of a group that have pixels, and all of them
  int depth, stage_bytes;      // of a ring
  bool with_bias;
  Divider by_bands, by_group_threads;
};

// A band of rows. A step brings one row of the gradient, as long as there are, and the row of the input behind it.
struct Band {
  int index, image, begin, steps;

  __device__ Band(const Images& a, int index) : index(index) { find(a); }
  __device__ bool done(const Images& a) const { return index >= a.all_bands; }
  __device__ void next(const Images& a, int every) { index += every, find(a); }
  __device__ bool has_grad(int step) const { return step < steps - (kKernel - 1); }
  __device__ int grad_row(int step, bool up) const { return up ? begin + steps - kKernel - step : begin + step; }
  __device__ int source_row(int step, bool up) const { return grad_row(step, up) + (up ? 1 : -1); }

 private:
  __device__ void find(const Images& a) {
    uint32_t rest = index;
    begin = a.by_bands.split(rest) * a.rows, image = rest;
    steps = min(a.rows, a.height - begin) + kKernel - 1;
  }
};

template <typename T>
__device__ void read_four(int offset, float* x) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = shared<float4>(offset);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    const uint2 four = shared<uint2>(offset);
    widen_pair(four.x, x[0], x[1], T{}), widen_pair(four.y, x[2], x[3], T{});
  }
}

// One sum of a thread, of products inside the image only.
template <typename T>
__device__ float sum_by_products(const Images& a, int first, int every, int strip, int sum) {
  const int channel = sum % kChannels, i = sum / kChannels / kKernel - 1, j = sum / kChannels % kKernel - 1;
  const int width = a.row_bytes / (kChannels * static_cast<int>(sizeof(T)));
  float total = 0;
  for (Band band(a, first); !band.done(a); band.next(a, every))
    for (int step = 0; band.has_grad(step); ++step) {
      const int row = band.begin + step, y = row + i;
      if (y < 0 || y >= a.height) continue;
      const int64_t image = static_cast<int64_t>(band.image) * a.height;
      const T* x = reinterpret_cast<const T*>(a.source + (image + y) * a.row_bytes);
      const T* g = reinterpret_cast<const T*>(a.grad + (image + row) * a.row_bytes);
      for (int v = strip * kPixels; v < (strip + 1) * kPixels; ++v)
        if (v + j >= 0 && v + j < width)
          total = fmaf(widen(x[(v + j) * kChannels + channel]), widen(g[v * kChannels + channel]), total);
    }
  return total;
}

// Where in shared memory a thread leaves a sum.
__device__ inline float& sum_at(int sum, int thread) {
  return shared<float>(kRing + 4 * (sum * static_cast<int>(blockDim.x) + thread));
}

template <typename T>
__device__ __noinline__ void sum_again(const Images& a, int first, int every, int strip) {
  for (int i = 0; i < kSums; ++i)
    if (float& sum = sum_at(i, threadIdx.x); !is_finite(sum)) sum = sum_by_products<T>(a, first, every, strip, i);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) three_channels_grad_weight(const __grid_constant__ Images a) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSize = sizeof(T);
  let_next_kernel_start();
  uint32_t rest = threadIdx.x;
  const int place = a.by_group_threads.split(rest), group = rest, groups = blockDim.x / a.group_threads;
  const int ring = kRing + group * a.depth * a.stage_bytes;
  const bool live = place < a.strips, loads = place == 0;
  const int strip = min(place, a.strips - 1);
  const auto full = [&](int stage) { return 8 * (group * a.depth + stage); };
  const auto done = [&](int stage) { return 8 * (kMostRings + group * a.depth + stage); };
  if (loads)
    for (int stage = 0; stage < a.depth; ++stage) {
      init_barrier(full(stage), 1), init_barrier(done(stage), a.group_threads / 32);
      const int at = ring + stage * a.stage_bytes;
      shared<uint4>(at) = shared<uint4>(at + kUnit + a.row_bytes) = uint4{};
    }
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();

  const int first = blockIdx.x * groups + group, every = gridDim.x * groups;
  const bool up = first % 2 > 0 && every % 2 == 0;  // all bands of a thread
  const auto is_row = [&](int y) { return static_cast<unsigned>(y) < static_cast<unsigned>(a.height); };

  // By the thread that loads: the next step that is not under way.
  Band ahead(a, first);
  int ahead_step = 0;
  const auto load = [&](int stage) {
    if (ahead.done(a)) return;
    const int at = ring + stage * a.stage_bytes, barrier = full(stage);
    const auto copy = [&](int to, const char* images, int row) {
      const int64_t number = static_cast<int64_t>(ahead.image) * a.height + row;
      expect_bytes(barrier, a.row_bytes);
      copy_bulk(shared_address(to), images + number * a.row_bytes, a.row_bytes, barrier);
    };
    if (const int y = ahead.source_row(ahead_step, up); is_row(y)) copy(at + kUnit, a.source, y);
    if (ahead.has_grad(ahead_step)) copy(at + 2 * kUnit + a.row_bytes, a.grad, ahead.grad_row(ahead_step, up));
    arrive(barrier);
    if (++ahead_step == ahead.steps) ahead.next(a, every), ahead_step = 0;
  };
  if (loads)
    for (int stage = 0; stage < a.depth - 1; ++stage) load(stage);

  float sum[kKernel][kKernel][kChannels] = {}, g[kKernel][kElements];
  double biases[kChannels] = {};
  int stage = 0;
  uint32_t parity = 0;
  bool later = false;  // whether a stage was done before
  const int source_at = ring + kUnit + strip * kElements * kSize, grad_at = source_at + kUnit + a.row_bytes;
  for (Band band(a, first); !band.done(a); band.next(a, every)) {
#pragma unroll
    for (int r = 0; r < kKernel; ++r)
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[r][e] = 0;
    float bias[kChannels] = {};
    for (int step = 0; step < band.steps;) {
#pragma unroll
      for (int u = 0; u < kKernel; ++u, ++step) {
        if (step >= band.steps) break;
        if (loads) {  // into the stage of the step before
          const int before = stage == 0 ? a.depth - 1 : stage - 1;
          if (later) wait(done(before), stage == 0 ? parity ^ 1 : parity);
          load(before);
        }
        later = true;
        wait(full(stage), parity);
        const int at = stage * a.stage_bytes;
        if (band.has_grad(step)) {
#pragma unroll
          for (int e = 0; e < kElements; e += 4) read_four<T>(grad_at + at + e * kSize, g[u] + e);
          if (a.with_bias)
#pragma unroll
            for (int e = 0; e < kElements; ++e) bias[e % kChannels] += g[u][e];
        } else {
#pragma unroll
          for (int e = 0; e < kElements; ++e) g[u][e] = 0;
        }
        if (is_row(band.source_row(step, up))) {
          float x[4 + kElements + 4];
#pragma unroll
          for (int e = -4; e <= kElements; e += 4) read_four<T>(source_at + at + e * kSize, x + 4 + e);
#pragma unroll
          for (int i = 0; i < kKernel; ++i)
#pragma unroll
            for (int j = 0; j < kKernel; ++j)
#pragma unroll
              for (int e = 0; e < kElements; ++e) {
                float& s = sum[i][j][e % kChannels];
                s = fmaf(x[4 + e + (j - 1) * kChannels], g[(u - i + kKernel) % kKernel][e], s);
              }
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(done(stage));
        if (++stage == a.depth) stage = 0, parity ^= 1;
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) biases[c] += bias[c];
  }
  __syncthreads();

  // The rings have served: their memory takes the sums of all threads. Upwards, the first row of the kernel came last.
  float check = 0;
#pragma unroll
  for (int i = 0; i < kKernel; ++i)
#pragma unroll
    for (int k = 0; k < kKernel * kChannels; ++k) {
      const float value = live ? sum[i][k / kChannels][k % kChannels] : 0;
      check = fmaf(value, 0.f, check);
      sum_at((up ? kKernel - 1 - i : i) * kKernel * kChannels + k, threadIdx.x) = value;
    }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) sum_at(kSums + c, threadIdx.x) = live ? static_cast<float>(biases[c]) : 0;
  if (check != 0) sum_again<T>(a, first, every, strip);
  __syncthreads();
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, all = kSums + (a.with_bias ? kChannels : 0);
#pragma unroll 1
  for (int k = threadIdx.x / 32; k < all; k += warps) {
    float total = 0;
#pragma unroll 4
    for (int thread = lane; thread < static_cast<int>(blockDim.x); thread += 32) total += sum_at(k, thread);
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane == 0) a.partial[blockIdx.x * all + k] = total;
  }
#endif
}

// Whether an array has its rows and images one behind the other, in units of 16 bytes.
bool is_dense(const View& view, const Problem& p, int64_t element) {
  const int64_t row = p.width * kChannels;
  return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 && row * element % kUnit == 0 &&
         view.stride[3] == kChannels && (p.height == 1 || view.stride[2] == row) &&
         (p.batch == 1 || view.stride[0] == p.height * row);
}

// How many bands an image has: as many as leave the fewest steps to one of so many places.
int bands_for(const Problem& p, int64_t places) {
  constexpr int kFewestRows = 8, kMostRows = 128;
  int64_t fewest = INT64_MAX;
  int best = 1;
  for (int rows = kFewestRows; rows <= kMostRows; ++rows) {
    const int64_t bands = ceil_div(p.height, rows);
    const int64_t steps = ceil_div(p.batch * bands, places) * (ceil_div(p.height, bands) + kKernel - 1);
    if (steps < fewest) fewest = steps, best = static_cast<int>(bands);
  }
  return best;
}

template <typename T>
bool launch(const Problem& p, Images a, int groups, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = three_channels_grad_weight<T>;
  if (!can_overlap(kernel)) return false;  // nor does it copy rows
  const Device& device = current_device();
  static thread_local Decisions<4, int> decisions;
  a.bands = decisions({device.id, p.batch, p.height, groups}, [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    return bands_for(p, int64_t{device.multiprocessors} * groups);
  });
  a.rows = static_cast<int>(ceil_div(p.height, a.bands)), a.bands = static_cast<int>(ceil_div(p.height, a.rows));
  a.all_bands = static_cast<int>(p.batch * a.bands), a.by_bands = Divider(a.bands);
  const int64_t blocks = std::min<int64_t>(ceil_div(a.all_bands, groups), device.multiprocessors);
  const int64_t sums = (kTaps + a.with_bias) * kChannels;
  a.partial = static_cast<float*>(allocate(blocks * sums * static_cast<int64_t>(sizeof(float))));
  const int threads = groups * a.group_threads;
  const int64_t rings = int64_t{groups} * a.depth * a.stage_bytes,
                all_sums = int64_t{4} * (kSums + kChannels) * threads;
  launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = kRing + std::max(rings, all_sums)});
  check_launch("three_channels_grad_weight");
  launch_add_partial_sums(p, a.partial, blocks, stream);
  return true;
}

}  // namespace

bool launch_three_channels_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const int64_t element = size_of(p.dtype);
  const bool same = p.kernel_h == kKernel && p.kernel_w == kKernel && p.stride_h == 1 && p.stride_w == 1 &&
                    p.dilation_h == 1 && p.dilation_w == 1 && p.padding_h == 1 && p.padding_w == 1;
  if (!same || p.channels != kChannels || p.multiplier != 1 || element > 4 || p.width % kPixels > 0 ||
      !is_dense(p.input, p, element) || !is_dense(p.output, p, element))
    return false;
  Images a{};
  a.source = static_cast<const char*>(p.input.data), a.grad = static_cast<const char*>(p.output.data);
  a.height = static_cast<int>(p.height), a.row_bytes = static_cast<int>(p.width * kChannels * element);
  a.with_bias = p.bias != nullptr;
  a.strips = static_cast<int>(p.width / kPixels);
  a.group_threads = static_cast<int>(round_up(a.strips, 32));
  if (a.group_threads > kThreads || 4 * a.strips < 3 * a.group_threads) return false;
  const int groups = kThreads / a.group_threads;
  constexpr int64_t kFewestRows = 4;  // of a group: few rows are left to others
  if (p.batch * p.height < kFewestRows * groups * device.multiprocessors) return false;
  a.stage_bytes = 2 * (a.row_bytes + kUnit), a.by_group_threads = Divider(a.group_threads);
  const int64_t room = (device.shared_per_block - kRing) / (int64_t{groups} * a.stage_bytes);
  a.depth = static_cast<int>(std::min<int64_t>({kMostStages, kMostRings / groups, room}));
  if (a.depth < 2) return false;
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) launched = launch<T>(p, a, groups, allocate, stream);
  });
  return launched;
}

}  // namespace dwconv
