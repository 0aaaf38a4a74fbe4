// grad_weight (and the bias gradient) of 3x3 on images of three channels that lie as they are in memory, channels_last.
//
// A row of such an image is a line of neighbouring elements whose channels take turns. A thread owns four pixels, 12
// elements, and marches down a band of rows with the sums of all taps of all three filters in registers; it reads four
// elements at a time. The threads of a row are a group; a block has some groups, each with a band and a ring of its
// own, which bulk copies of whole rows fill. Zeros lie on both sides of a row. Bands are gone through downwards and
// upwards by turns: so neighbours read the rows that both need at the same time, and memory is asked for them once.
//
// Where rows begin between units of 16 bytes, both arrays as far behind one, a row is copied with all units that it has
// a part of, a thread reads the four elements at a time that have its own among them, and what lies beside a row is of
// other ones: the first and the last thread take zeros instead.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <algorithm>

#include "launch.h"
#include "overlap.cuh"
#include "partial_sums.h"
#include "three_channels.cuh"
#include "three_channels_grad_weight.h"

namespace dwconv {
namespace {

constexpr int kSums = kTaps * kChannels;
constexpr int kThreads = 512;  // of a block, at most
// Of a group, and of all groups. More of them would have more rows under way than memory likes: each makes it slower.
constexpr int kStages = 2, kMostRings = 32;
constexpr int kZeros = 16 * kMostRings;    // where zeros lie in shared memory, behind barriers
constexpr int kRing = kZeros + 6 * kUnit;  // where the rings begin

struct Images {
  const char *source, *grad;  // where their first units begin
  float* partial;             // [block][tap, or bias behind the last tap][channel]
  int height, row_bytes;
  int shift;                   // how far behind a unit both begin
  int bands, rows, all_bands;  // bands of an image, of so many rows each, and of all images
  int groups;                  // of a block
  int strips, group_threads;   // threads of a group that have pixels, and all of them
  int stage_bytes;
  Divider by_bands, by_group_threads;
};

// What is read of a row, four elements at a time, of which the first one lies `misfit` elements behind such four: from
// which element on, counted from the thread's own ones, and how often. `beside`: elements on both sides that are
// needed.
template <int misfit, int beside>
struct Reads {
  static constexpr int kFirst = -(misfit + (beside > misfit ? (beside - misfit + 3) / 4 * 4 : 0));
  static constexpr int kCount = (kElements + beside - kFirst + 3) / 4;
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
      const T* x = reinterpret_cast<const T*>(a.source + a.shift + (image + y) * a.row_bytes);
      const T* g = reinterpret_cast<const T*>(a.grad + a.shift + (image + row) * a.row_bytes);
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

// By one warp: the rows of a group's bands, step by step.
class Feed {
 public:
  __device__ Feed(const Images& a, int first, bool up) : band_(a, first), up_(up) { seek(a); }

  // Begins to load what the next step needs, if there is one. `ready()`: waits until there is room.
  // `more`: bytes that rows are longer for their first and last units.
  template <typename Ready>
  __device__ void load(const Images& a, int every, int more, uint32_t to, int barrier, Ready&& ready) {
    if (band_.done(a)) return;
    if (is_elected()) {
      ready();
      const int bytes = a.row_bytes + more;
      if (static_cast<uint32_t>(row_) < static_cast<uint32_t>(a.height))
        expect_bytes(barrier, bytes), copy_bulk(to, source_, bytes, barrier);
      if (band_.has_grad(step_)) {
        expect_bytes(barrier, bytes);
        copy_bulk(to + kUnit + bytes, source_ + to_grad_, bytes, barrier);
      }
      arrive(barrier);
    }
    __syncwarp();
    row_ += up_ ? -1 : 1, source_ += up_ ? -a.row_bytes : a.row_bytes;
    if (++step_ == band_.steps) band_.next(a, every), seek(a);
  }

 private:
  Band band_;
  bool up_;
  int step_, row_;  // the row of the input
  const char* source_;
  int64_t to_grad_;  // from there to the row of the gradient

  __device__ void seek(const Images& a) {
    step_ = 0, row_ = band_.source_row(0, up_);
    source_ = a.source + (static_cast<int64_t>(band_.image) * a.height + row_) * a.row_bytes;
    to_grad_ = a.grad - a.source + (up_ ? -a.row_bytes : a.row_bytes);
  }
};

// `kMisfit`: elements that rows begin behind four, if they begin between units.
template <typename T, bool kWithBias, int kMisfit>
__global__ void __launch_bounds__(kThreads, 1) three_channels_grad_weight(const __grid_constant__ Images a) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSize = sizeof(T), kMore = kMisfit > 0 ? kUnit : 0;
  using Source = Reads<kMisfit, kChannels>;
  using Grad = Reads<kMisfit, 0>;
  let_next_kernel_start();
  uint32_t rest = threadIdx.x;
  const int place = a.by_group_threads.split(rest), group = rest, warps = a.group_threads / 32;
  const int ring = kRing + group * kStages * a.stage_bytes, barriers = 8 * group * kStages;
  const bool live = place < a.strips;
  const int strip = min(place, a.strips - 1);
  if (place == 0)
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(barriers + 8 * stage, 1), init_barrier(barriers + 8 * (kMostRings + stage), warps * kWarpArrivals);
      const int at = ring + stage * a.stage_bytes;
      shared<uint4>(at) = shared<uint4>(at + kUnit + a.row_bytes + kMore) = uint4{};
    }
  if (threadIdx.x < (kRing - kZeros) / kUnit) shared<uint4>(kZeros + threadIdx.x * kUnit) = uint4{};
  before_bulk_copies();
  __syncthreads();

  const int first = blockIdx.x * a.groups + group, every = gridDim.x * a.groups;
  const bool up = first % 2 > 0 && every % 2 == 0;  // all bands of a thread
  // One warp of a group begins its copies: of the groups, warps of different schedulers.
  const bool loads = place / 32 == group % warps;
  Feed feed(a, first, up);
  settle_and_wait_for_kernel_before(a.rows);
  if (loads)
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage)
      feed.load(a, every, kMore, shared_address(ring + stage * a.stage_bytes + kUnit), barriers + 8 * stage, [] {});

  float sum[kKernel][kKernel][kChannels] = {}, g[kKernel][kElements];
  double biases[kChannels] = {};
  // See kept_shared_address.
  const auto kept = [](uint32_t value) { return __shfl_sync(~0u, value, threadIdx.x % 32); };
  const uint32_t base = kept_shared_address(), zeros = base + kZeros;
  const uint32_t ring_at = kept(base + ring),
                 strip_at = kept(kUnit + (kMisfit > 0 ? a.shift : 0) + strip * kElements * kSize);
  const bool begins_row = kMisfit > 0 && strip == 0, ends_row = kMisfit > 0 && strip == a.strips - 1;
  const uint32_t first_barrier = kept(base + barriers), last_barrier = kept(base + barriers + 8 * (kStages - 1));
  const bool first_lane = kept(threadIdx.x % 32) == 0;
  uint32_t barrier = first_barrier, at = ring_at, parity = 0;
  bool later = false;  // whether a stage was done before
  for (Band band(a, first); !band.done(a); band.next(a, every)) {
#pragma unroll
    for (int r = 0; r < kKernel; ++r)
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[r][e] = 0;
    float bias[kChannels] = {};
    int row = band.source_row(0, up), left = band.steps;
    do {
#pragma unroll
      for (int u = 0; u < kKernel; ++u) {
        if (left == 0) break;
        const bool is_first = barrier == first_barrier;
        if (loads) {  // into the stage of the step before
          const uint32_t before = is_first ? last_barrier : barrier - 8;
          const uint32_t to = is_first ? ring_at + (kStages - 1) * a.stage_bytes : at - a.stage_bytes;
          feed.load(a, every, kMore, to + kUnit, static_cast<int>(before - base), [&] {
            if (later) wait_at(before + 8 * kMostRings, parity ^ is_first);
          });
        }
        later = true;
        wait_at(barrier, parity);
        const uint32_t grad_from = at + strip_at + kUnit + a.row_bytes + kMore + Grad::kFirst * kSize;
        const uint32_t grad_at = left > kKernel - 1 ? grad_from : zeros;
        const bool is_row = static_cast<uint32_t>(row) < static_cast<uint32_t>(a.height);
        const uint32_t source_at = is_row ? at + strip_at + Source::kFirst * kSize : zeros;
        float x[4 * Source::kCount], own[4 * Grad::kCount];
#pragma unroll
        for (int k = 0; k < 4 * Grad::kCount; k += 4) read_four<T>(grad_at + k * kSize, own + k);
#pragma unroll
        for (int k = 0; k < 4 * Source::kCount; k += 4) read_four<T>(source_at + k * kSize, x + k);
        arrive_together_at(barrier + 8 * kMostRings, first_lane);
#pragma unroll
        for (int e = 0; e < kElements; ++e) g[u][e] = own[e - Grad::kFirst];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (begins_row) x[c - kChannels - Source::kFirst] = 0;
          if (ends_row) x[c + kElements - Source::kFirst] = 0;
        }
        if constexpr (kWithBias)
#pragma unroll
          for (int e = 0; e < kElements; ++e) bias[e % kChannels] += g[u][e];
#pragma unroll
        for (int i = 0; i < kKernel; ++i)
#pragma unroll
          for (int j = 0; j < kKernel; ++j)
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
              float& s = sum[i][j][e % kChannels];
              s = fmaf(x[e + (j - 1) * kChannels - Source::kFirst], g[(u - i + kKernel) % kKernel][e], s);
            }
        const bool is_last = barrier == last_barrier;
        at = is_last ? ring_at : at + a.stage_bytes, barrier = is_last ? first_barrier : barrier + 8, parity ^= is_last;
        --left, row += up ? -1 : 1;
      }
    } while (left > 0);
    if constexpr (kWithBias)
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
  for (int c = 0; c < kChannels && kWithBias; ++c)
    sum_at(kSums + c, threadIdx.x) = live ? static_cast<float>(biases[c]) : 0;
  if (check != 0) sum_again<T>(a, first, every, strip);
  __syncthreads();
  const int lane = threadIdx.x % 32, all_warps = blockDim.x / 32, all = kSums + (kWithBias ? kChannels : 0);
#pragma unroll 1
  for (int k = threadIdx.x / 32; k < all; k += all_warps) {
    float total = 0;
#pragma unroll 4
    for (int thread = lane; thread < static_cast<int>(blockDim.x); thread += 32) total += sum_at(k, thread);
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane == 0) a.partial[blockIdx.x * all + k] = total;
  }
#endif
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

template <typename T, bool kWithBias, int kMisfit>
bool launch(const Problem& p, Images a, int groups, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = three_channels_grad_weight<T, kWithBias, kMisfit>;
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
  const int64_t sums = (kTaps + kWithBias) * kChannels;
  a.partial = static_cast<float*>(allocate(blocks * sums * static_cast<int64_t>(sizeof(float))));
  const int threads = groups * a.group_threads;
  const int64_t rings = int64_t{groups} * kStages * a.stage_bytes,
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
  const auto shift_of = [](const View& view) { return reinterpret_cast<uintptr_t>(view.data) % kUnit; };
  if (element > 4 || !has_three_channels(p) || !has_dense_rows(p.input, p, element) ||
      !has_dense_rows(p.output, p, element) || shift_of(p.input) != shift_of(p.output))
    return false;
  Images a{};
  a.shift = static_cast<int>(shift_of(p.input));
  a.source = static_cast<const char*>(p.input.data) - a.shift;
  a.grad = static_cast<const char*>(p.output.data) - a.shift;
  a.height = static_cast<int>(p.height), a.row_bytes = static_cast<int>(p.width * kChannels * element);
  a.strips = static_cast<int>(p.width / kPixels);
  a.group_threads = static_cast<int>(round_up(a.strips, 32));
  if (a.group_threads > kThreads || 4 * a.strips < 3 * a.group_threads) return false;
  const int groups = a.groups = kThreads / a.group_threads;
  constexpr int64_t kFewestRows = 4;  // of a group: few rows are left to others
  if (p.batch * p.height < kFewestRows * groups * device.multiprocessors) return false;
  a.stage_bytes = 2 * (a.row_bytes + kUnit + (a.shift > 0 ? kUnit : 0)), a.by_group_threads = Divider(a.group_threads);
  if (int64_t{groups} * kStages * a.stage_bytes > device.shared_per_block - kRing) return false;
  const int misfit = static_cast<int>(a.shift / element % 4);  // of what is read at once
  if (a.shift > 0 && misfit == 0) return false;
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launch_misfit = [&](auto misfit) {
      constexpr int kMisfit = decltype(misfit)::value;
      return p.bias ? launch<T, true, kMisfit>(p, a, groups, allocate, stream)
                    : launch<T, false, kMisfit>(p, a, groups, allocate, stream);
    };
    using std::integral_constant;
    if constexpr (sizeof(T) <= 4)
      launched = misfit == 0   ? launch_misfit(integral_constant<int, 0>{})
                 : misfit == 1 ? launch_misfit(integral_constant<int, 1>{})
                 : misfit == 2 ? launch_misfit(integral_constant<int, 2>{})
                               : launch_misfit(integral_constant<int, 3>{});
  });
  return launched;
}

}  // namespace dwconv
