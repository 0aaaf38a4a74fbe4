// Whole planes of toeplitz_large (toeplitz_large_planes.cuh) where the four warps of a warpgroup multiply together, on
// sm_90. A multiplication has rows of the source in registers, 16 of each warp, and band matrices in shared memory.
//
// A warpgroup slides down the source. Two rows of it, in registers, meet rows of the target that are 4 kRows apart,
// each with another two rows of the kernel; the warps of the group have the rows between.
#include "toeplitz_large_planes.cuh"
#include "warpgroups.cuh"

namespace dwconv {
namespace {

template <typename T, int kTiles, int kSides, int kSteps, bool kMasks>
struct Slide {
  static constexpr int kEdge = kTiles - 1, kDepth = 2 * kEdge + 1;  // all tiles meet all groups, some by zeros
  static constexpr int kRows = 2 / kSides;                          // of an image in a warp's 16 rows
  static constexpr int kApart = kGroupWarps * kRows;                // rows of the target
  static constexpr int kUnitRows = kSteps * kApart;

  using Sums = float[kSteps][kTiles][4];

  const Planes& a;
  Sums& sum;
  uint32_t source, zeros;  // the lane's row of the source at step 0, and a row of zeros
  int y;                   // likewise
  uint32_t inside;         // what is the image's of the first group's columns
  Matrices matrices;       // of the kernel's first row

  // Rows of the source of a step.
  using Rows = uint32_t[kTiles][4];
  __device__ void load(Rows& x, int s) const {
    const bool there = static_cast<uint32_t>(y + 2 * s) < static_cast<uint32_t>(a.height);
    const uint32_t from = there ? source + 2 * s * a.source_pitch : zeros;
#pragma unroll
    for (int c = 0; c < kTiles; ++c) load_matrices(x[c], from + c * kLargeGroupBytes);
    if constexpr (kMasks)
#pragma unroll
      for (int k = 0; k < 4; ++k) x[0][k] &= inside;
  }

  // Steps [begin, end), at all of which rows kLow to kHigh of the target have rows of the kernel to meet. x: what is
  // loaded of the first of them, and then of the one behind.
  template <int kLow, int kHigh>
  __device__ void multiply(Rows& x, int begin, int end) {
    if (begin >= end) return;
    matrices.place = same_of_warp(matrices.place), begin = same_of_warp(begin), end = same_of_warp(end);
    const auto begin_step = [&](const Rows& x, int s) {
      before_multiplications();
#pragma unroll
      for (int c = 0; c < kTiles; ++c)
#pragma unroll
        for (int q = kLow; q <= kHigh; ++q)
          multiply_together(sum[q], x[c], matrices.from(((2 * s - kApart * q) * kDepth + kEdge - c) * 8), T{});
      commit_multiplications();
    };
    // Rows are loaded while multiplications are under way, which end every other step: compilers lose track of those
    // that a loop's next turn would wait for.
    Rows next;
    int s = begin;
#pragma unroll 1
    for (; s + 1 < end; s += 2) {
      begin_step(x, s);
      load(next, s + 1);
      begin_step(next, s + 1);
      wait_multiplications<1>();
      load(x, s + 2);
      wait_multiplications<0>();
    }
    if (s < end) {
      begin_step(x, s);
      wait_multiplications<0>();
      load(x, s + 1);
    }
  }

  // All steps from `begin` to `end`: rows of the target begin and end to meet the kernel one after the other. Where
  // some steps end others begin, since there are no steps without rows to meet.
  template <int kLow = 0, int kHigh = 0>
  __device__ void visit(Rows& x, int begin, int end, int rows, int pairs) {
    // Row q meets steps [q kStep, q kStep + pairs).
    constexpr int kStep = kApart / 2;
    const int from = max(begin, max(kHigh * kStep, kLow > 0 ? (kLow - 1) * kStep + pairs : 0));
    const int to = min(end, min(kLow * kStep + pairs, kHigh + 1 < rows ? (kHigh + 1) * kStep : end));
    if (kHigh < rows) multiply<kLow, kHigh>(x, from, to);
    if constexpr (kHigh + 1 < kSteps)
      visit<kLow, kHigh + 1>(x, begin, end, rows, pairs);
    else if constexpr (kLow + 1 < kSteps)
      visit<kLow + 1, kLow + 1>(x, begin, end, rows, pairs);
  }
};

// Warpgroups take the units of a block's tasks, each from the slot of its task.
template <typename T, int kTiles, int kSides, int kSteps, bool kMasks>
__device__ void consume(const Planes& a, int count, int warp) {
  using Sliding = Slide<T, kTiles, kSides, kSteps, kMasks>;
  constexpr int kRows = Sliding::kRows, kApart = Sliding::kApart;
  constexpr int kUnitRows = Sliding::kUnitRows, kFirstBarrier = 3;  // producers have the others
  const int group = warp / kGroupWarps, all = count * a.units, out_at = a.out_at + group * a.out_bytes;
  const int next_at = a.counter_at + 8 + 4 * group;
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2;
  warp %= kGroupWarps;
  int number = same_of_warp(group);
#pragma unroll 1
  while (number < all) {
    uint32_t task = number;
    const int unit = a.by_units.split(task);
    uint32_t round = task;
    const int slot = a.by_slots.split(round);
    // Rows in the middle, which meet the most rows of the kernel, come first.
    const int step = (unit + 1) / 2, place = (a.units - 1) / 2 + (unit % 2 == 1 ? step : -step);
    const int row = place * kUnitRows, rows = min((a.out_height - row + kApart - 1) / kApart, kSteps);
    wait(full_barrier(a, slot), round & 1);
    const PlanesTask t = task_in(a, slot);

    typename Sliding::Sums sum;
#pragma unroll
    for (int q = 0; q < kSteps; ++q)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[q][j][v] = t.bias;

    const int pairs = (a.kernel_h + 1) / 2, top = row - a.padding_h, image = lane % 16 / kRows;
    const int y = top + warp * kRows + lane % kRows + lane / 16;
    const int begin = max(-top - kApart + 1, 0) / 2;
    const int end = min((a.height - top + 1) / 2, pairs + (rows - 1) * kApart / 2);
    const int source_at = a.source_at + slot * a.slot_bytes + image * a.source_plane + y * a.source_pitch;
    Sliding slide{a,
                  sum,
                  shared_address(source_at),
                  shared_address(0),
                  image < t.images ? y : -(1 << 30),
                  kMasks ? columns_inside(a) : 0,
                  Matrices(same_of_warp(shared_address(t.weights_at)), Sliding::kDepth * 128, 128)};
    typename Sliding::Rows x;
    slide.load(x, begin);
    slide.visit(x, begin, end, rows, pairs);
    arrive_together(empty_barrier(a, slot), lane == 0);

    wait_stores();
    __syncwarp();
    if (warp == 0 && is_elected()) shared<int>(next_at) = take_unit(a);
    meet_group(kFirstBarrier + group);
    number = same_of_warp(shared<int>(next_at));
    const bool last = (kTiles - 1) * kLargeGroup + pair < a.out_width;
    const auto none = narrow_pair(0.f, 0.f, T{});
    Pair<T> zero[] = {none, none};
    // kApart is a multiple of a box's rows.
    const auto place_of = [&](int n, int q, int r) {
      return out_at + (q * kApart >> a.box_rows_log) * a.box_bytes + (r >> a.box_rows_log) * a.box_bytes +
             n * a.out_plane + (r & (1 << a.box_rows_log) - 1) * a.out_pitch;
    };
#pragma unroll
    for (int q = 0; q < kSteps; ++q)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int to = place_of((8 * h + quad) / kRows, q, warp * kRows + quad % kRows) + 2 * pair;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const auto values = narrow_pair(sum[q][j][2 * h], sum[q][j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
          zero[h] = __hfma2(values, none, zero[h]);
#endif
          if (j < kTiles - 1 || last) shared<Pair<T>>(to + j * kLargeGroupBytes) = values;
        }
      }
    zero[0] = __hadd2(zero[0], zero[1]);
    if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
      for (int v = 0; v < kSteps * 2 * kTiles * 2; ++v) {
        const int column = v / 2 % kTiles * kLargeGroup + pair + v % 2, n = (v / (2 * kTiles) % 2 * 8 + quad) / kRows;
        const int q = v / (4 * kTiles), r = warp * kRows + quad % kRows, y = row + q * kApart + r;
        if (y >= a.out_height || n >= t.images || column >= a.out_width) continue;
        T& to = shared<T>(place_of(n, q, r) + 2 * column);
        if (!is_finite(widen(to))) to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, y, column, 1, false));
      }
    }
    before_bulk_copies();
    meet_group(kFirstBarrier + group);
    if (is_elected()) {
      const int end = min(a.out_height - row, kUnitRows);
#pragma unroll 1
      for (int box = warp; box << a.box_rows_log < end; box += kGroupWarps)
        store_box(a.target_map, out_at + box * a.box_bytes, (row + (box << a.box_rows_log)) * a.out_width, t.target,
                  t.image, 0);
      commit_stores();
    }
    __syncwarp();
  }
  wait_stores();
}

template <typename T, int kTiles, int kSides, int kSteps, int kThreads, Begin kBegin>
__global__ void __launch_bounds__(launch_threads(kThreads), 1) toeplitz_large_groups(const __grid_constant__ Planes a) {
  if (!kHasWarpgroups) return;
  constexpr bool kRaw = comes_raw(kBegin);
  let_next_kernel_start();
  const int block = blockIdx.x, first = block * a.each + min(block, a.more), count = a.each + (block < a.more);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kThreads / 32;
  constexpr int kImages = 8 * kSides, kMatrices = 2 * kTiles - 1;
  ask_for_planes<T>(a, a.early, first, count, kImages);
  // Zeros where nothing is copied to: the row outside of all images, around the weights, and behind the columns.
  for (int i = 16 * threadIdx.x; i < a.source_at; i += 16 * kThreads) shared<uint4>(i) = uint4{};
  if (!kRaw && a.width % kLargeGroup != 0)
    for (int image = warp; image < a.slots * kImages; image += warps)
      for (int row = lane; row < a.height; row += 32)
        shared<uint4>(a.source_at + image / kImages * a.slot_bytes + image % kImages * a.source_plane +
                      row * a.source_pitch + (kTiles - 1) * kLargeGroupBytes) = uint4{};
  __syncthreads();
  if (threadIdx.x < a.slots) {
    init_barrier(full_barrier(a, threadIdx.x), 2 * 32 * a.producers);
    init_barrier(empty_barrier(a, threadIdx.x), a.units * kGroupWarps * kWarpArrivals);
    if (kRaw) init_barrier(raw_barrier(a, threadIdx.x), a.producers);
  }
  if (threadIdx.x == 0) shared<int>(a.counter_at) = a.consumers;
  if (kRaw || a.bulk_load) before_bulk_copies();
  __syncthreads();
  // Producers need few registers: what they leave the others share.
  constexpr int kGroups = kThreads / kGroupThreads, kAll = (64 << 10) / kThreads / 8 * 8 * kGroups, kFew = 80;
  if (warp < kGroupWarps) {
    give_registers<kFew>();
    produce<T, kTiles, kSides, kBegin, kMatrices>(a, first, count, threadIdx.x);
  } else {
    take_registers<(kAll - kFew) / (kGroups - 1) / 8 * 8>();
    // The first filter is theirs, while planes come.
    const int thread = threadIdx.x - kGroupThreads, threads = kThreads - kGroupThreads;
    uint32_t target = first;
    a.by_images.split(target);
    const int lanes = threads / static_cast<int>(a.by_weight_side.divisor);
    settle_and_wait_for_kernel_before(lanes);
    LargeWeights<T> weights;
    weights.begin(a, static_cast<int>(target), thread, lanes);
    weights.write(a, a.weights_at);
    meet<1>(threads);
    write_matrices<kMatrices>(a, a.weights_at, a.matrices_at, thread, threads);
    before_bulk_copies();
    if (!kRaw && count > 1) let_meet<kMatricesBarrier>(kThreads);
    meet<1>(threads);
    consume<T, kTiles, kSides, kSteps, kBegin == Begin::kEarlier>(a, count, warp - kGroupWarps);
  }
}

template <typename T>
bool launch(const LargeProblem& p, cudaStream_t stream) {
  constexpr int kTiles = 4, kSides = 2, kSteps = 4, kThreads = 512;
  using Sliding = Slide<T, kTiles, kSides, kSteps, false>;
  Planes a{};
  static_cast<Large&>(a) = arguments_of(p);
  if (p.stride_h != 1 || a.out_width % 2 != 0 || (a.target_row != a.out_width && a.out_height > 1)) return false;
  constexpr int kManyRows = 20;  // of a kernel: with fewer, few steps have all of a unit's rows to multiply with
  if (a.kernel_h < kManyRows) return false;
  if (!has_warpgroups(toeplitz_large_groups<T, kTiles, kSides, kSteps, kThreads, Begin::kAligned>)) return false;
  const PlanesShape shape{.tiles = kTiles,
                          .depth = Sliding::kDepth,
                          .sides = kSides,
                          .unit_rows = Sliding::kUnitRows,
                          .threads = kThreads,
                          .producers = kGroupWarps,
                          .groups = true,
                          // So that rows of 8 images, which a warp writes at once, share few banks.
                          .box_rows = a.out_width % 4 == 0 && a.out_width % 8 != 0 ? 2 : 4};
  const int64_t bytes = apply(a, shape, true, p.shared_memory);
  if (bytes == 0 || !pays(a, current_device().multiprocessors)) return false;
  const auto kernel = a.raw.plane > 0 ? toeplitz_large_groups<T, kTiles, kSides, kSteps, kThreads, Begin::kMoved>
                      : a.shift > 0   ? toeplitz_large_groups<T, kTiles, kSides, kSteps, kThreads, Begin::kEarlier>
                                      : toeplitz_large_groups<T, kTiles, kSides, kSteps, kThreads, Begin::kAligned>;
  launch_shares(kernel, a, a.tasks, kThreads, bytes, stream, "toeplitz_large_groups");
  return true;
}

}  // namespace

bool launch_toeplitz_large_groups(const LargeProblem& problem, cudaStream_t stream) {
  return problem.dtype == DType::kFloat16 ? launch<__half>(problem, stream) : launch<__nv_bfloat16>(problem, stream);
}

}  // namespace dwconv
