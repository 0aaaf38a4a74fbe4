// Whole planes of toeplitz_large (toeplitz_large_planes.cuh) where each warp multiplies by itself.
//
// A warp slides down the source. Two rows of it, in registers, meet 2 * kSteps rows of the target, every two of these
// with another two rows of the kernel, whose band matrices stay in registers until all have met them. The 16 rows of a
// multiplication are one row of 16 images, or two rows of 8.
#include "toeplitz_large_planes.cuh"

namespace dwconv {
namespace {

// Computes 2 * kSteps rows of the target from `row` on, and puts them at out_at as they lie side by side there. Returns
// the number of the next unit to the first lane, which has asked for it meanwhile.
template <typename T, int kTiles, int kDepth, int kSides, int kSteps, Begin kBegin>
__device__ int slide(const Planes& a, const PlanesTask& t, int source_at, int out_at, int row) {
  constexpr int kEdge = kDepth / 2, kRows = 2 / kSides;  // of an image in a multiplication
  constexpr bool kShifted = kBegin == Begin::kShifted, kMasks = kShifted || kBegin == Begin::kEarlier;
  constexpr int kGroups = kTiles + kShifted;           // of the source
  constexpr int kTogether = kTiles == 2 ? kSides : 1;  // sides whose source is loaded at once, as registers allow
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2, image = lane % 16 / kRows;
  const int entry = pair - quad + 7;  // of the lane's first pair in a row of weights

  float sum[kSides][kSteps][kTiles][4];
#pragma unroll
  for (int p = 0; p < kSides; ++p)
#pragma unroll
    for (int q = 0; q < kSteps; ++q)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[p][q][j][v] = t.bias;

  // At step s rows of the source from top + p + 2 s on meet rows of the kernel from 2 (s - q) on.
  // A last row alone takes half of a multiplication, which pays where there are few rows.
  const int pairs = (a.kernel_h + 1) / 2, whole = kSteps == 1 ? a.kernel_h / 2 : pairs;
  const int top = row - a.padding_h, steps = (a.out_height - row + 1) / 2;
  const int begin = max(-top - 1, 0) / 2, end = min((a.height - top + 1) / 2, pairs + kSteps - 1);
  int y = top + 2 * begin + lane / 16 + lane % kRows;
  const uint32_t zeros = __shfl_sync(~0u, shared_address(0), 0);
  uint32_t source = zeros + source_at + image * a.source_plane + y * a.source_pitch;
  if (image >= t.images) y = -(1 << 30);
  const char* band =
      shared_memory + t.weights_at + (entry & 1) * a.copy + 2 * (entry & ~1) + 2 * begin * a.weight_pitch;
  // From this step on all rows have met some of the kernel; never where more rows are missing than is compiled for.
  // What has gone through a shuffle is not computed again at each step.
  const int all_from = __shfl_sync(~0u,
                                   steps >= kSteps                     ? kSteps - 1
                                   : kSteps > 2 && steps == kSteps - 1 ? kSteps - 2
                                                                       : pairs,
                                   0);
  // The first group may begin with columns of the row before; shifted, the last one is the first one of the row after.
  const uint32_t inside = kMasks ? columns_inside(a) : 0;
  uint32_t b[kSteps][kDepth][2];
  const auto load_band = [&](auto& to, const char* from) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
      to[k][0] = *reinterpret_cast<const uint32_t*>(from + k * kLargeGroupBytes),
      to[k][1] = *reinterpret_cast<const uint32_t*>(from + a.weight_pitch + k * kLargeGroupBytes);
  };
#pragma unroll
  for (int q = 1; q < kSteps; ++q)
    if (begin - q >= 0) load_band(b[kSteps - q], band - 2 * q * a.weight_pitch);
  int first = begin;
  do {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int s = first + u;
      if (s >= end) break;
      if (s < pairs) load_band(b[u], band);
      band += 2 * a.weight_pitch;
      uint32_t x[kTogether][kGroups][4];
      const auto load_rows = [&](int p) {
        const bool there = static_cast<uint32_t>(y + p) < static_cast<uint32_t>(a.height);
        const uint32_t from = there ? source + p * a.source_pitch : zeros;
#pragma unroll
        for (int c = 0; c < kGroups; ++c) load_matrices(x[p % kTogether][c], from + c * kLargeGroupBytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if constexpr (kMasks) x[p % kTogether][0][k] &= inside;
          if constexpr (kShifted) x[p % kTogether][kTiles][k] &= ~inside;
        }
      };
      // By two rows of the kernel, or by the last one alone.
      const auto multiply_group = [&](int p, int c, int k, int first_q, int last_q, auto whole) {
        const int j = c + kEdge - k;
        if (j < 0 || j >= kTiles) return;
#pragma unroll
        for (int q = first_q; q <= last_q; ++q) {
          const auto& rows = x[p % kTogether][c];
          const auto& two = b[(u - q + kSteps) % kSteps][k];
          if constexpr (whole)
            multiply(sum[p][q][j], std::as_const(sum[p][q][j]), rows, two, T{});
          else
            multiply(sum[p][q][j], std::as_const(sum[p][q][j]), {rows[0], rows[1]}, two[0], T{});
        }
      };
      const auto multiply_rows = [&](int p, int first_q, int last_q, auto whole) {
#pragma unroll
        for (int c = 0; c < kGroups; ++c)
#pragma unroll
          for (int k = kShifted; k < kDepth; ++k) multiply_group(p, c, k, first_q, last_q, whole);
        // Columns that are counted from an earlier one hardly ever meet the first matrix.
        if (kShifted && a.meets_first)
#pragma unroll
          for (int c = 0; c < kGroups; ++c) multiply_group(p, c, 0, first_q, last_q, whole);
      };
      // Mostly all rows have some of the kernel to meet, and more sums are there to be added to at once.
      const bool all_meet = s >= all_from && s < whole;
#pragma unroll
      for (int side = 0; side < kSides; side += kTogether) {
        const auto multiply_sides = [&](int first_q, int last_q, auto whole) {
#pragma unroll
          for (int p = side; p < side + kTogether; ++p) multiply_rows(p, first_q, last_q, whole);
        };
#pragma unroll
        for (int p = side; p < side + kTogether; ++p) load_rows(p);
        if (all_meet && (kSteps == 2 || steps >= kSteps)) {
          multiply_sides(0, kSteps - 1, std::true_type{});
        } else if (kSteps > 2 && all_meet) {
          multiply_sides(0, kSteps - 2, std::true_type{});
        } else {
#pragma unroll
          for (int q = 0; q < kSteps; ++q)
            if (kSteps == 1)
              multiply_sides(q, q, std::false_type{});
            else if (static_cast<uint32_t>(s - q) < static_cast<uint32_t>(pairs) && q < steps)
              multiply_sides(q, q, std::true_type{});
        }
      }
      source += 2 * a.source_pitch, y += 2;
    }
    first += kSteps;
  } while (first < end);
  const int next = lane == 0 ? take_unit(a) : 0;

  const int out = out_at + quad / kRows * a.out_plane + quad % kRows * a.out_pitch + 2 * pair;
  const bool last = (kTiles - 1) * kLargeGroup + pair < a.out_width;
  if (a.box_store) wait_stores(), __syncwarp();  // what lay there is on its way
  const auto none = narrow_pair(0.f, 0.f, T{});
  Pair<T> zero[] = {none, none};
#pragma unroll
  for (int p = 0; p < kSides; ++p)
#pragma unroll
    for (int q = 0; q < kSteps; ++q)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int to = out + 8 / kRows * h * a.out_plane + (2 * q + p) * a.out_pitch;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const auto values = narrow_pair(sum[p][q][j][2 * h], sum[p][q][j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
          zero[h] = __hfma2(values, none, zero[h]);
#endif
          if (j < kTiles - 1 || last) shared<Pair<T>>(to + j * kLargeGroupBytes) = values;
        }
      }
  zero[0] = __hadd2(zero[0], zero[1]);
  if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
    for (int v = 0; v < kSides * kSteps * 2 * kTiles * 2; ++v) {
      const int column = v / 2 % kTiles * kLargeGroup + pair + v % 2, n = (v / (2 * kTiles) % 2 * 8 + quad) / kRows;
      const int r = v / (4 * kTiles) * kRows + quad % kRows;
      if (row + r >= a.out_height || n >= t.images || column >= a.out_width) continue;
      T& to = shared<T>(out_at + n * a.out_plane + r * a.out_pitch + 2 * column);
      if (!is_finite(widen(to))) to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, row + r, column, 1, false));
    }
  }
  return next;
}

// A warp stores what lies at out_at: `bytes` of each image.
template <int kBytes>
__device__ void store_planes(const Planes& a, char* target, int out_at, int bytes, int images) {
  using Word = LargeWord<kBytes>;
  uint32_t first = threadIdx.x % 32;
  const int piece = a.by_store_pieces.split(first) * kBytes, image = static_cast<int>(first);
  if (image >= a.store_images) return;
  const int64_t step = 2 * a.store_images * a.target_image;
  const int step_shared = a.store_images * a.out_plane;
#pragma unroll 1
  for (int at = piece; at < bytes; at += static_cast<int>(a.by_store_pieces.divisor) * kBytes) {
    char* to = target + 2 * image * a.target_image + at;
    int from = out_at + image * a.out_plane + at;
    visit_images(image, a.store_images, images, [&](auto count) {
      Word words[count];
#pragma unroll
      for (int k = 0; k < count; ++k, from += step_shared) words[k] = shared<Word>(from);
#pragma unroll
      for (int k = 0; k < count; ++k, to += step) *reinterpret_cast<Word*>(to) = words[k];
    });
  }
}

// Consumers take the units of a block's tasks, each from the slot of its task.
template <typename T, int kTiles, int kDepth, int kSides, int kSteps, Begin kBegin>
__device__ void consume(const Planes& a, int count, int warp) {
  const int all = count * a.units, out_at = a.out_at + warp * a.out_bytes;
  int number = warp;
#pragma unroll 1
  while (number < all) {
    uint32_t task = number;
    const int unit = a.by_units.split(task);
    uint32_t round = task;
    const int slot = a.by_slots.split(round);
    // Rows in the middle, which meet the most rows of the kernel, come first.
    const int step = (unit + 1) / 2, place = (a.units - 1) / 2 + (unit % 2 == 1 ? step : -step);
    const int row = place * 2 * kSteps, rows = min(a.out_height - row, 2 * kSteps);
    wait(full_barrier(a, slot), round & 1);
    const PlanesTask t = task_in(a, slot);
    const int next =
        slide<T, kTiles, kDepth, kSides, kSteps, kBegin>(a, t, a.source_at + slot * a.slot_bytes, out_at, row);
    if (a.box_store) before_bulk_copies();
    const int lane = threadIdx.x % 32;
    arrive_together(empty_barrier(a, slot), lane == 0);
    number = __shfl_sync(~0u, next, 0);
    if (a.box_store) {
      if (is_elected()) store_box(a.target_map, out_at, row * a.out_width, t.target, t.image, 0);
      commit_stores();
      continue;
    }
    T* target = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel +
                static_cast<int64_t>(row) * a.out_width;
    const int bytes = 2 * rows * a.out_width;
    switch (a.store_unit) {
      case 16: store_planes<16>(a, reinterpret_cast<char*>(target), out_at, bytes, t.images); break;
      case 8: store_planes<8>(a, reinterpret_cast<char*>(target), out_at, bytes, t.images); break;
      default: store_planes<4>(a, reinterpret_cast<char*>(target), out_at, bytes, t.images); break;
    }
    __syncwarp();
  }
  if (a.box_store) wait_stores();
}

template <typename T, int kTiles, int kDepth, int kSides, int kSteps, int kThreads, Begin kBegin>
__global__ void __launch_bounds__(kThreads, 1) toeplitz_large_planes(const __grid_constant__ Planes a) {
#if __CUDA_ARCH__ < 900
  if constexpr (comes_raw(kBegin)) return;  // there are no bulk copies
#endif
  let_next_kernel_start();
  const int block = blockIdx.x, first = block * a.each + min(block, a.more), count = a.each + (block < a.more);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kThreads / 32;
  ask_for_planes<T>(a, a.early, first, count, 8 * kSides);
  // Zeros where nothing is copied to: the row outside of all images, around the weights, and behind the columns.
  for (int i = 16 * threadIdx.x; i < a.source_at; i += 16 * kThreads) shared<uint4>(i) = uint4{};
  constexpr int kImages = 8 * kSides;
  if (!comes_raw(kBegin) && a.width % kLargeGroup != 0)
    for (int image = warp; image < a.slots * kImages; image += warps)
      for (int row = lane; row < a.height; row += 32)
        shared<uint4>(a.source_at + image / kImages * a.slot_bytes + image % kImages * a.source_plane +
                      row * a.source_pitch + (kTiles - 1) * kLargeGroupBytes) = uint4{};
  __syncthreads();
  if (threadIdx.x < a.slots) {
    init_barrier(full_barrier(a, threadIdx.x), 2 * 32 * a.producers);
    init_barrier(empty_barrier(a, threadIdx.x), a.units * kWarpArrivals);
    init_barrier(raw_barrier(a, threadIdx.x), a.producers);
  }
  if (threadIdx.x == 0) shared<int>(a.counter_at) = a.consumers, init_barrier(a.counter_at + 8, a.consumers);
  if (comes_raw(kBegin) || a.bulk_load) before_bulk_copies();
  __syncthreads();
  const bool consumes = warp >= a.producers;
  if (!consumes || (kConsumersHelp<kTiles, kBegin> && warp < 2 * a.producers))
    produce<T, kTiles, kSides, kBegin>(a, first, consumes ? 1 : count, threadIdx.x - (consumes ? 32 * a.producers : 0),
                                       consumes);
  if (consumes) {
    wait_for_kernel_before();
    if constexpr (kBegin == Begin::kMoved) get_first_planes<T, kTiles, kSides>(a, first, count, warp - a.producers);
    consume<T, kTiles, kDepth, kSides, kSteps, kBegin>(a, count, warp - a.producers);
  }
}

// What is compiled, and for kernels of how many rows: calls visit(tiles, depth, sides, steps, threads, producers) with
// one after the other until it returns true. With more rows there is more to compute of what is loaded.
template <typename Visitor>
bool visit_shapes(int kernel_h, Visitor&& visit) {
  return (kernel_h >= 8 &&
          (visit(Constant<4>{}, Constant<3>{}, Constant<2>{}, Constant<2>{}, Constant<512>{}, Constant<2>{}) ||
           visit(Constant<4>{}, Constant<5>{}, Constant<2>{}, Constant<2>{}, Constant<512>{}, Constant<2>{}))) ||
         (kernel_h >= 15 &&
          (visit(Constant<2>{}, Constant<3>{}, Constant<2>{}, Constant<4>{}, Constant<512>{}, Constant<4>{}) ||
           visit(Constant<7>{}, Constant<5>{}, Constant<1>{}, Constant<2>{}, Constant<448>{}, Constant<2>{}) ||
           visit(Constant<4>{}, Constant<7>{}, Constant<2>{}, Constant<2>{}, Constant<512>{}, Constant<2>{}) ||
           visit(Constant<7>{}, Constant<7>{}, Constant<1>{}, Constant<2>{}, Constant<448>{}, Constant<2>{}) ||
           visit(Constant<7>{}, Constant<9>{}, Constant<1>{}, Constant<2>{}, Constant<448>{}, Constant<2>{}))) ||
         (kernel_h <= 8 &&
          visit(Constant<7>{}, Constant<9>{}, Constant<1>{}, Constant<1>{}, Constant<640>{}, Constant<1>{}));
}

template <typename T>
bool launch(const LargeProblem& p, cudaStream_t stream) {
  Planes a{};
  static_cast<Large&>(a) = arguments_of(p);
  if (p.stride_h != 1 || a.out_width % 2 != 0 || (a.target_row != a.out_width && a.out_height > 1)) return false;
  const Device& device = current_device();
  const bool bulk = can_overlap(toeplitz_large_planes<T, 4, 3, 2, 2, 512, Begin::kAligned>);
  return visit_shapes(a.kernel_h, [&](auto tiles, auto depth, auto sides, auto steps, auto threads, auto producers) {
    // Of kernels of few rows a column more to multiply costs less than moving planes.
    constexpr bool kShifts = steps == 1;
    const int64_t bytes =
        apply(a, {tiles, depth, sides, 2 * steps, threads, producers, kShifts}, bulk, p.shared_memory);
    if (bytes == 0 || !pays(a, device.multiprocessors)) return false;
    constexpr Begin kRaw = kShifts ? Begin::kShifted : Begin::kMoved;
    constexpr Begin kEarlier = sides == 2 ? Begin::kEarlier : Begin::kAligned;
    constexpr int kRawThreads = kShifts ? threads : kMovedThreads;
    const bool is_raw = a.raw.plane > 0;
    const auto kernel = is_raw        ? toeplitz_large_planes<T, tiles, depth, sides, steps, kRawThreads, kRaw>
                        : a.shift > 0 ? toeplitz_large_planes<T, tiles, depth, sides, steps, threads, kEarlier>
                                      : toeplitz_large_planes<T, tiles, depth, sides, steps, threads, Begin::kAligned>;
    launch_shares(kernel, a, a.tasks, is_raw ? kRawThreads : threads, bytes, stream, "toeplitz_large_planes");
    return true;
  });
}

}  // namespace

bool launch_toeplitz_large_planes(const LargeProblem& problem, cudaStream_t stream) {
  return problem.dtype == DType::kFloat16 ? launch<__half>(problem, stream) : launch<__nv_bfloat16>(problem, stream);
}

}  // namespace dwconv
