// Forward and grad_input of 3x3 in 16 bits on images of three channels (three_channels.cuh). A block marches down a
// band of rows with the sums of three output rows in registers. Bulk copies of whole rows fill its ring, two rows at a
// time, with zeros on both sides of a row; the warps take turns to begin them. A warp puts its part of two output rows
// side by side, and bulk copies take them away.
//
// Of a source that begins between multiples of 16 bytes, bulk copies take all of a row but its first and its last unit,
// and lanes what these two have of the row itself; threads read it where it lies.
#include <algorithm>

#include "launch.h"
#include "mapping.h"
#include "channels_last.cuh"
#include "overlap.cuh"
#include "three_channels.cuh"
#include "three_channels.h"

namespace dwconv {
namespace {

constexpr int kThreads = 512;                      // of a multiprocessor: what registers allow
constexpr int kRows = 2;                           // of a stage of the ring, and of outputs that leave together
constexpr int kMostStages = 4, kFewestStages = 3;  // of the ring
constexpr int kLag = 2;                            // a stage is filled again so many steps after it was read
constexpr int kZeros = 16 * kMostStages;           // where zeros lie in shared memory, behind barriers
constexpr int kRing = kZeros + 4 * kUnit;          // where the ring begins

struct Images {
  const char* source;
  char* target;
  const void *weight, *bias;
  int weight_filter, weight_row, weight_column, bias_stride;
  int height, row_bytes;
  int shift;   // bytes that the source begins behind a unit
  int rows;    // of a band
  int strips;  // threads that have pixels
  int stages;  // of the ring
  Divider by_bands;
};

template <typename T>
__device__ uint2 narrow_four(const float* x) {
  const Pair<T> low = narrow_pair(x[0], x[1], T{}), high = narrow_pair(x[2], x[3], T{});
  return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

// A thread's outputs by the taps that meet the image. For kernels with a tap that is Inf or NaN, which must not meet
// padding.
template <typename T>
__device__ __noinline__ void strip_by_taps(const Images& a, int image, int begin, int end) {
  constexpr int kPixelBytes = kChannels * static_cast<int>(sizeof(T));
  const int64_t first = static_cast<int64_t>(image) * a.height * a.row_bytes;
  for (int y = begin; y < end; ++y)
    for (int e = static_cast<int>(threadIdx.x) * kElements; e < static_cast<int>(threadIdx.x + 1) * kElements; ++e) {
      const int c = e % kChannels;
      const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[c * a.bias_stride]) : 0.f;
      const float sum = sum_of_taps(
          bias, reinterpret_cast<const T*>(a.source + first) + c, a.row_bytes, kPixelBytes, a.height,
          a.row_bytes / kPixelBytes, static_cast<const T*>(a.weight) + c * a.weight_filter, a.weight_row,
          a.weight_column, kKernel, kKernel, [&](int i) { return y - 1 + i; },
          [&](int j) { return e / kChannels - 1 + j; });
      reinterpret_cast<T*>(a.target + first + static_cast<int64_t>(y) * a.row_bytes)[e] = narrow<T>(sum);
    }
}

// kOffset: elements that the source begins behind a multiple of 4 of them, if it begins between units; or -1.
template <typename T, int kOffset>
__global__ void __launch_bounds__(kThreads, 1) three_channels(const __grid_constant__ Images a) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSize = sizeof(T), kBytes = kElements * kSize;  // of a thread
  constexpr bool kShifted = kOffset >= 0;
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int strip = min(static_cast<int>(threadIdx.x), a.strips - 1);
  const int row_pitch = a.row_bytes + (kShifted ? 2 : 1) * kUnit, stage_bytes = kRows * row_pitch;
  const auto full = [&](int stage) { return 8 * stage; };
  const auto done = [&](int stage) { return 8 * (kMostStages + stage); };
  if (threadIdx.x == 0)
    for (int stage = 0; stage < a.stages; ++stage)
      init_barrier(full(stage), 1), init_barrier(done(stage), warps * kWarpArrivals);
  if (threadIdx.x < (kRing - kZeros) / kUnit) shared<uint4>(kZeros + threadIdx.x * kUnit) = uint4{};
  for (int i = threadIdx.x; i <= kRows * a.stages; i += blockDim.x) shared<uint4>(kRing + i * row_pitch) = uint4{};
  before_bulk_copies();
  __syncthreads();

  uint32_t image = blockIdx.x;
  const int begin = static_cast<int>(a.by_bands.split(image)) * a.rows, end = min(begin + a.rows, a.height);
  const int source_end = min(end + 1, a.height);
  // Each brings two rows of the source, from the one before `begin` on.
  const int steps = (end - begin + kKernel - 1 + kRows - 1) / kRows;
  const char* source = a.source - (kShifted ? a.shift : 0) + static_cast<int64_t>(image) * a.height * a.row_bytes;
  // Copies rows, but for the edges of shifted ones.
  const auto copy = [&](int step, int stage) {
    const int first = begin - 1 + step * kRows, barrier = full(stage);
    const uint32_t to = shared_address(kRing + kUnit + stage * stage_bytes);
    const char* from = source + static_cast<int64_t>(first) * a.row_bytes;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (first + u < 0 || first + u >= source_end) continue;
      constexpr int kSkipped = kShifted ? kUnit : 0;
      expect_bytes(barrier, a.row_bytes - kSkipped);
      copy_bulk(to + u * row_pitch + kSkipped, from + u * a.row_bytes + kSkipped, a.row_bytes - kSkipped, barrier);
    }
  };
  // A lane's element of the edges of a step's rows, or a zero of what these have of the pixels around; and its place.
  const int edge_lane = lane % kUnit, edge_row = lane / kUnit, edge_byte = edge_lane % 8 * 2;
  const int edge_at = edge_byte + (edge_lane < 8 ? 0 : a.row_bytes);
  const bool own_edge = (edge_lane < 8) != (edge_byte < a.shift);
  const auto edge = [&](int step) {
    const int row = begin - 1 + step * kRows + edge_row;
    if (!own_edge || row < 0 || row >= source_end) return uint16_t{0};
    return *reinterpret_cast<const uint16_t*>(source + static_cast<int64_t>(row) * a.row_bytes + edge_at);
  };
  const auto put_edge = [&](int stage, uint16_t element) {
    shared<uint16_t>(kRing + kUnit + stage * stage_bytes + edge_row * row_pitch + edge_at) = element;
    __syncwarp();
  };
  settle_and_wait_for_kernel_before(a.rows);
  if (warp == 0) {
    const int count = min(a.stages, steps);
    if (is_elected())
#pragma unroll 1
      for (int step = 0; step < count; ++step) {
        copy(step, step);
        if (!kShifted) arrive(full(step));
      }
    __syncwarp();
    if constexpr (kShifted) {
      uint16_t edges[kMostStages];
#pragma unroll
      for (int step = 0; step < kMostStages; ++step) edges[step] = edge(step);
#pragma unroll
      for (int step = 0; step < kMostStages; ++step)
        if (step < count) {
          put_edge(step, edges[step]);
          if (lane == 0) arrive(full(step));
        }
    }
  }

  // A lane has a weight, or a bias; the others ask for it.
  float own = 0;
  if (lane < kTaps * kChannels) {
    const int tap = lane % kTaps, channel = lane / kTaps;
    own = widen(static_cast<const T*>(
        a.weight)[channel * a.weight_filter + tap / kKernel * a.weight_row + tap % kKernel * a.weight_column]);
  } else if (a.bias && lane < (kTaps + 1) * kChannels) {
    own = widen(static_cast<const T*>(a.bias)[(lane - kTaps * kChannels) * a.bias_stride]);
  }
  const bool finite = __all_sync(~0u, lane >= kTaps * kChannels || is_finite(own));  // then a product with zero is zero
  float weight[kKernel][kKernel][kChannels], bias[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      weight[tap / kKernel][tap % kKernel][c] = __shfl_sync(~0u, own, c * kTaps + tap);
    bias[c] = __shfl_sync(~0u, own, kTaps * kChannels + c);
  }

  float sum[kKernel][kElements];  // of the rows under way, the oldest first
#pragma unroll
  for (int o = 0; o < kKernel; ++o)
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum[o][e] = bias[e % kChannels];
  const auto kept = [&](uint32_t value) { return __shfl_sync(~0u, value, lane); };  // see kept_shared_address
  const uint32_t base = kept_shared_address();
  const int piece = 32 * kBytes,
            pieces = kRing + kUnit + a.stages * stage_bytes;  // a warp's part of a row; all of them
  const int bytes = kept(min(a.strips - warp * 32, 32) * kBytes);
  uint32_t buffer = kept(base + pieces + warp * 2 * kRows * piece + lane * kBytes);
  const uint32_t both_buffers = kept(2 * buffer + kRows * piece), lane_bytes = kept(lane * kBytes);
  char* target = a.target + (static_cast<int64_t>(image) * a.height + begin) * a.row_bytes + warp * piece;
  const uint32_t source_at = kept(base + kRing + kUnit - 4 * kSize + strip * kBytes + (kShifted ? a.shift / 8 * 8 : 0));
  const uint32_t zeros = base + kZeros;
  const uint32_t last_barrier = base + full(a.stages - 1), end_row = kept(source_end),
                 behind_outputs = kept(end + kKernel - 1);
  const bool first_lane = kept(lane) == 0;
  const int first_step = kept(finite ? 1 : steps);  // that stores
  uint32_t barrier = base, parity = 0, at = source_at, row = begin - 1;
  int turn = (warp - kLag % warps + warps) % warps;  // steps until the warp begins copies
  // Of the next rows that the warp copies: on their way since it copied the ones before.
  uint16_t next_edge = 0;
  if constexpr (kShifted)
    next_edge = edge((turn < kLag ? turn + (kLag - turn + warps - 1) / warps * warps : turn) + a.stages - kLag);
  for (int step = 0; step < steps; ++step) {
    if (--turn < 0) {
      turn = warps - 1;
      if (const int next = step + a.stages - kLag; step >= kLag && next < steps && (kShifted || is_elected())) {
        const int stage = static_cast<int>(barrier - base) / 8;
        const int before = stage >= kLag ? stage - kLag : stage - kLag + a.stages;
        wait(done(before), stage >= kLag ? parity : parity ^ 1);
        if constexpr (kShifted) put_edge(before, next_edge), next_edge = edge(next + warps);
        if (!kShifted || is_elected()) copy(next, before), arrive(full(before));
      }
    }
    wait_at(barrier, parity);
    uint2 words[kElements / 4];
#pragma unroll
    for (int u = 0; u < kRows; ++u, ++row) {
      const uint32_t from = row < end_row ? at + u * row_pitch : zeros;
      constexpr int kZero = 4 + (kShifted ? kOffset : 0);  // where the thread's first element is
      constexpr int kFirst = (kZero - kChannels) / 4 * 4, kLast = kZero + kElements + kChannels - 1;
      float x[kLast / 4 * 4 + 4];
#pragma unroll
      for (int e = kFirst; e <= kLast; e += 4) read_four<T>(from + e * kSize, x + e);
      const auto put = [&](uint32_t to) {
#pragma unroll
        for (int w = 0; w < kElements / 4; ++w) shared_at<uint2>(to + w * 4 * kSize) = words[w];
      };
      if (u == kRows - 1) {
        arrive_together_at(barrier + done(0), first_lane);
        put(buffer);
      }
#pragma unroll
      for (int o = 0; o < kKernel; ++o)
#pragma unroll
        for (int j = 0; j < kKernel; ++j)
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            const float before = j > 0 ? sum[o][e] : o + 1 < kKernel ? sum[o + 1][e] : bias[e % kChannels];
            sum[o][e] = fmaf(x[kZero + e + (j - 1) * kChannels], weight[kKernel - 1 - o][j][e % kChannels], before);
          }
#pragma unroll
      for (int w = 0; w < kElements / 4; ++w) words[w] = narrow_four<T>(sum[0] + 4 * w);
      if (u == kRows - 1) put(buffer + piece);
    }
    if (step >= first_step) {
      before_bulk_copies();
      __syncwarp();
      if (is_elected()) {
        store_bulk(target, buffer - lane_bytes, bytes);
        if (row < behind_outputs) store_bulk(target + a.row_bytes, buffer - lane_bytes + piece, bytes);
        commit_stores();
        wait_stores_but_one();  // the buffer of the next step
      }
      target += kRows * a.row_bytes, buffer = both_buffers - buffer;
    }
    const bool last = barrier == last_barrier;
    at = last ? source_at : at + stage_bytes, barrier = last ? base : barrier + 8, parity ^= last;
  }
  if (is_elected()) wait_stores();
  if (!finite && static_cast<int>(threadIdx.x) < a.strips) strip_by_taps<T>(a, image, begin, end);
#endif
}

// Rows of a band, so that the last round of blocks is full.
int rows_for(const Problem& p, int64_t places) {
  constexpr int kFewest = 8, kMost = 64, kBefore = 6;  // of the time of a block, that no row of a band takes
  int64_t least = INT64_MAX;
  int best = kFewest;
  for (int rows = kFewest; rows <= kMost; rows += kRows) {
    const int64_t bands = p.batch * ceil_div(p.height, rows);
    const int64_t time = ceil_div(bands, places) * (rows + kKernel - 1 + kBefore);
    if (time < least) least = time, best = rows;
  }
  return best;
}

template <typename T, int kOffset>
bool launch(const Problem& p, Images a, cudaStream_t stream) {
  const auto kernel = three_channels<T, kOffset>;
  if (!can_overlap(kernel)) return false;  // nor does it copy rows
  const Device& device = current_device();
  const int threads = static_cast<int>(round_up(a.strips, 32)), blocks = kThreads / threads;  // of a multiprocessor
  if (blocks == 0 || 4 * a.strips < 3 * threads) return false;
  // Few rows are left to others.
  constexpr int64_t kFewestRows = 8;  // of a block
  const int64_t places = int64_t{blocks} * device.multiprocessors;
  if (p.batch * p.height < kFewestRows * places) return false;
  const int64_t pieces = int64_t{2} * kRows * threads * kElements * sizeof(T),
                stage = kRows * (a.row_bytes + (kOffset < 0 ? 1 : 2) * kUnit);
  const int64_t room = std::min(device.shared_per_multiprocessor / blocks - 1024, device.shared_per_block);
  a.stages = static_cast<int>(std::min<int64_t>((room - kRing - kUnit - pieces) / stage, kMostStages));
  if (a.stages < kFewestStages) return false;
  static thread_local Decisions<4, int> decisions;
  a.rows = decisions({device.id, p.batch, p.height, blocks}, [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    return rows_for(p, places);
  });
  const int64_t bands = ceil_div(p.height, a.rows);
  a.by_bands = Divider(bands);
  launch_early(kernel, a, p.batch * bands, threads, stream,
               {.shared_bytes = kRing + kUnit + a.stages * stage + pieces});
  check_launch("three_channels");
  return true;
}

}  // namespace

bool launch_three_channels(const Problem& p, cudaStream_t stream) {
  const int64_t element = size_of(p.dtype);
  if (element != 2 || !has_three_channels(p)) return false;
  const Mapping map(p);
  if (!has_dense_rows(map.source, p, element) || !is_dense(map.target, p, element)) return false;
  constexpr int64_t kFar = 1 << 24;  // offsets of weights are counted in 32 bits
  const auto& stride = map.weight.stride;
  if (std::max({std::abs(stride[0]), std::abs(stride[2]), std::abs(stride[3]), std::abs(map.bias_stride)}) >= kFar)
    return false;
  Images a{};
  a.source = static_cast<const char*>(map.source.data), a.target = static_cast<char*>(map.target.data);
  a.weight = map.weight.data, a.bias = map.bias;
  a.weight_filter = static_cast<int>(stride[0]), a.weight_row = static_cast<int>(stride[2]);
  a.weight_column = static_cast<int>(stride[3]), a.bias_stride = static_cast<int>(map.bias_stride);
  a.shift = static_cast<int>(reinterpret_cast<uintptr_t>(a.source) % kUnit);
  a.height = map.height, a.row_bytes = static_cast<int>(p.width * kChannels * element);
  a.strips = static_cast<int>(p.width / kPixels);
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const int offset = a.shift == 0 ? -1 : a.shift / 2 % 4;
      switch (offset) {
        case -1: launched = launch<T, -1>(p, a, stream); break;
        case 0: launched = launch<T, 0>(p, a, stream); break;
        case 1: launched = launch<T, 1>(p, a, stream); break;
        case 2: launched = launch<T, 2>(p, a, stream); break;
        default: launched = launch<T, 3>(p, a, stream);
      }
    }
  });
  return launched;
}

}  // namespace dwconv
