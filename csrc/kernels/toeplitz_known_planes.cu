// toeplitz_small_planes for planes of 7 x 7 and 14 x 14 that stay as large, with code without a branch: what lies
// outside of a plane is known, and what is beside a row, another one, meets zeros of B. Rows of 7 begin at even and odd
// places in turn: a pair of pixels or outputs that would begin at an odd one begins a column earlier, and so B has a
// version for each case. So have rows of 14 that all begin at odd places.
//
// One warp copies, or two, and the others compute: they wait for pixels and for a buffer to write outputs to, but never
// while something is copied. Where all that is copied is whole units of 16 bytes, there is code for that alone. Else a
// part is loaded with the units that it shares with its neighbours, so that its bytes keep their place within 16; of a
// unit that reaches out of the tensor the elements inside are loaded one by one.
#include <algorithm>
#include <utility>

#include "toeplitz_small_planes.cuh"

namespace dwconv {
namespace {

// Planes of 7 x 7 of which those of 16 images are multiplied with the rows of a kernel in B. Two source rows are one
// multiplication. A row of 8 columns begins with one that is not the plane's, or ends with it, so that pairs are words:
// for that B comes in versions for even and odd rows of the plane. Columns of B are in such an order that the word
// which two target rows share has both its halves in the same thread.
template <typename T, int kKernelH>
struct Seven {
  static constexpr int kSide = 7, kReach = kKernelH / 2;
  // By source row - target row + kReach + 1, for an even source row; and for the row that follows.
  uint32_t band[kKernelH + 1][2];

  // `weights`: the rows between zeros, the first entry of each being one; odd, odd_target: whether planes begin at odd
  // places.
  __device__ void prepare(uint32_t weights, int odd, int odd_target) {
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2, n = lane / 4;
    const auto entry = [&](int x, int v) {  // bytes
      return x >= 0 && x < kSide && v >= 0 && v < kSide ? 2 * (kMiddle + x - v) : 0;
    };
    const int even = n, other = n < 6 ? n + 1 : n == 7 ? 0 : -1;  // columns, of rows at even and odd places
    const bool begins_other = (kReach + 1 + odd_target) & 1;
    const int target[2] = {begins_other ? other : even, begins_other ? even : other};
#pragma unroll
    for (int i = 0; i <= kKernelH; ++i) {
      const int to = target[i % 2];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int row = i + next - 1, x = pair - (odd ^ next);
        band[i][next] = 0;
        if (row < 0 || row >= kKernelH) continue;
        const uint32_t at = weights + row * (4 * kEntries);
        band[i][next] = __byte_perm(read_element(at + entry(x, to)), read_element(at + entry(x + 1, to)), 0x5410);
      }
    }
  }

  // `from`, `to`: where the two images' planes begin, plus the thread's pair. Returns whether all outputs are finite.
  template <bool kOdd, bool kOddTarget>
  __device__ bool compute(const uint32_t (&from)[2], const uint32_t (&to)[2], float start) const {
    const float before[4] = {start, start, start, start};
    float sum[kSide][4];
    uint32_t zero = 0;
    const bool last = threadIdx.x % 4 == 3;
    const auto narrowed = [&](int r, int h) {
      const auto values = narrow_pair(sum[r][2 * h], sum[r][2 * h + 1], T{});
      add_zeros(zero, values);
      return *reinterpret_cast<const uint32_t*>(&values);
    };
    uint32_t next[4];  // of the two source rows to come
    const auto read = [&](int y) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (y + k / 2 < kSide) next[k] = read_word(from[k % 2] + 2 * (kSide * (y + k / 2) - (y + k / 2 + kOdd) % 2));
    };
    read(0);
#pragma unroll
    for (int y = 0; y < kSide; y += 2) {
      const uint32_t x[4] = {next[0], next[1], next[2], next[3]};
      read(y + 2);
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        const int i = y - r + kReach + 1;
        if (i < 0 || i > kKernelH) continue;
        const bool starts = y == 0 || i < 2;
        if (y + 1 < kSide)
          multiply(sum[r], starts ? before : std::as_const(sum[r]), x, band[i], T{});
        else if (i > 0)
          multiply(sum[r], {x[0], x[1]}, band[i][0], T{});
      }
      // Rows that are complete by now, two by two: of those that share a word the upper one begins evenly.
      const auto completes = [&](int r) { return (r + kReach < kSide ? r + kReach : kSide - 1) / 2 * 2 == y; };
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        constexpr int kAlone = kOddTarget ? 0 : kSide - 1;  // the row that shares its word with another plane
        if (completes(kAlone)) {
          const uint32_t alone = narrowed(kAlone, h), at = to[h] + 2 * (kSide * kAlone + kOddTarget);
          if (!last) write_word(at, alone);
          if (last) write_element(kOddTarget ? to[h] - 4 * 3 : at, kOddTarget ? alone >> 16 : alone);
        }
#pragma unroll
        for (int r = kOddTarget; r + 1 < kSide; r += 2) {
          if (!completes(r + 1)) continue;
          const uint32_t upper = narrowed(r, h), lower = narrowed(r + 1, h);
          write_word(to[h] + 2 * (kSide * r), __byte_perm(upper, lower, last ? 0x7610 : 0x3210));
          if (!last) write_word(to[h] + 2 * (kSide * (r + 1) + 1), lower);
        }
      }
    }
    return zero == 0;
  }
};

// Half a plane of 14 x 14: its upper 7 rows, or the lower ones, for which it is a mirror image. Where all rows of the
// source begin at odd places, they are read from a column earlier on, and so B has a version for that.
template <typename T, int kKernelH>
struct Fourteen {
  static constexpr int kSide = 14, kRows = 7, kReach = kKernelH / 2;
  uint32_t band[kKernelH][2][2];  // by source row - target row + kReach, in the order of the half; by 8 columns

  __device__ void prepare(uint32_t weights, bool lower, int odd) {
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2, n = lane / 4, entry = kMiddle + pair - n - odd;
    const uint32_t from = weights + (entry % 2 ? 2 * kEntries + 2 * (entry - 1) : 2 * entry);
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          band[i][v][k] = read_word_again(from + (lower ? kKernelH - 1 - i : i) * (4 * kEntries) + 16 * (k - v));
          if (k == 0 && pair == 0 && odd) band[i][v][k] &= 0xffff0000u;      // column -1
          if (k == 1 && pair == 6) band[i][v][k] &= odd ? 0x0000ffffu : 0u;  // columns 14 and 15
        }
  }

  template <bool kLower>
  __device__ bool compute(const uint32_t (&from)[2], const uint32_t (&to)[2], float start) const {
    constexpr auto row = [](int r) { return 2 * kSide * (kLower ? kSide - 1 - r : r); };  // bytes
    const float before[4] = {start, start, start, start};
    float sum[kRows][2][4];
    uint32_t zero = 0;
    const bool inside = threadIdx.x % 4 < 3;  // of the second 8 columns
    uint32_t next[2][2];
    const auto read = [&](int s) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int k = 0; k < 2; ++k) next[h][k] = read_word(from[h] + row(s) + 16 * k);
    };
    read(0);
#pragma unroll
    for (int s = 0; s < kRows + kReach; ++s) {
      const uint32_t x[4] = {next[0][0], next[1][0], next[0][1], next[1][1]};
      if (s + 1 < kRows + kReach) read(s + 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = s - r + kReach;
        if (i < 0 || i >= kKernelH) continue;
#pragma unroll
        for (int v = 0; v < 2; ++v)
          multiply(sum[r][v], s == 0 || i == 0 ? before : std::as_const(sum[r][v]), x, band[i][v], T{});
      }
      const int r = s - kReach;  // the row before had its last source row
      if (r < 0) continue;
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto values = narrow_pair(sum[r][v][2 * h], sum[r][v][2 * h + 1], T{});
          add_zeros(zero, values);
          if (v == 0 || inside) write_word(to[h] + row(r) + 16 * v, *reinterpret_cast<const uint32_t*>(&values));
        }
    }
    return zero == 0;
  }
};

constexpr int kStages = 2;

// Copies the units of [first, last), each of `lanes` threads one every so many: they go along lines of memory, which
// begin with a lane. `there` begins with a unit. Loads are by cp.async where there is that.
template <bool kLoad, int kTogether>
__device__ void copy_units(uint32_t slot, char* there, int first, int last, int rank, int lanes) {
  constexpr int kLine = 128;
  const int step = lanes * kUnit;
  const auto has = [&](int at) { return static_cast<uint32_t>(at - first) < static_cast<uint32_t>(last - first); };
#pragma unroll 1
  for (int at = rank * kUnit - static_cast<int>(reinterpret_cast<uintptr_t>(there) % kLine); at < last;
       at += kTogether * step) {
    const uint32_t unit = slot + at;
    char* const its = there + at;
    if constexpr (kLoad) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (has(at + k * step)) copy_unit<kUnit>(unit + k * step, its + k * step);
    } else {
      uint4 value[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (has(at + k * step)) value[k] = shared_at<uint4>(unit + k * step);
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (has(at + k * step)) *reinterpret_cast<uint4*>(its + k * step) = value[k];
    }
  }
}

// One of so many warps.
struct Share {
  int warp, warps;
};

// A warp copies its share between memory and the slots of a part, 8 lanes an image. `first_apart`, `last_apart`:
// whether units at a run's ends that are not the run's alone are copied element by element. Loads leave zeros around
// these.
template <bool kLoad>
__device__ void copy_by_warp(const ImageRuns& v, int stage, const Part& part, int plane, bool first_apart,
                             bool last_apart, Share share) {
  constexpr int kLanes = 8, kImagesOfWarp = 32 / kLanes, kTogether = 8;
  const int lane = threadIdx.x % 32, rank = lane % kLanes, own = lane / kLanes + share.warp * kImagesOfWarp;
  const int step = share.warps * kImagesOfWarp;
  char* run = v.base + (part.image + own) * v.image_bytes + int64_t{part.channel} * plane;
  uint32_t slot = shared_address(stage + v.memory + own * v.pitch);
#pragma unroll 1
  for (int n = own; n < part.images; n += step) {
    const int begin = static_cast<int>(reinterpret_cast<uintptr_t>(run) % kUnit), end = begin + part.channels * plane;
    const int first = first_apart && begin > 0 ? kUnit : 0, last = (last_apart ? end : end + kUnit - 1) & -kUnit;
    char* const there = run - begin;
    copy_units<kLoad, kTogether>(slot, there, first, last, rank, kLanes);
    const auto copy_elements = [&](int at) {
      const bool inside = at >= begin && at < end;
      uint16_t* const element = reinterpret_cast<uint16_t*>(there + at);
      if (kLoad)
        write_element(slot + at, inside ? __ldg(element) : 0);
      else if (inside)
        *element = static_cast<uint16_t>(read_element(slot + at));
    };
    if (first > 0) copy_elements(2 * rank);
    if (last < end) copy_elements(last + 2 * rank);
    run += step * v.image_bytes, slot += step * v.pitch;
  }
}

// How a part is copied: all of it as whole units in bulk; its source in bulk, with the units that it shares with its
// neighbours; without bulk copies.
enum class Copies { kUnits, kBulk, kAsync };

// What a warp that copies does. One thread of it begins bulk copies.
template <int kSide, Copies kCopies>
class PartCopier {
 public:
  __device__ explicit PartCopier(const Small& a)
      : a_(a), stores_bulk_(kUnits || (kCopies == Copies::kBulk && a.bulk_stores)) {}

  // Arrivals that complete a load.
  static constexpr int kArrivals = kCopies == Copies::kUnits ? 1 : (kCopies == Copies::kAsync ? 32 : 0) + kWarpArrivals;

  // A part's load, as far as it takes no memory.
  struct Load {
    Part part;
    const char* from;  // of the first image
    int to, bytes;
    bool ends;  // whether there is more beside these bytes
  };
  __device__ Load load_of(const Part& part) const {
    if constexpr (kCopies == Copies::kAsync) return {part};
    const ImageRuns& v = a_.source;
    const int64_t offset = int64_t{part.channel} * kPlane;
    const char* const from = v.base + part.image * v.image_bytes + offset;
    if constexpr (kUnits) {
      const int begin = static_cast<int>(offset) & (kUnit - 1);
      return {part, from - begin, v.memory, (begin + part.channels * kPlane + kUnit - 1) & -kUnit, false};
    } else {
      const PartUnits units(a_, part, v.phase(0, offset), kPlane);
      return {part, from - units.begin + units.first, v.memory + units.first, units.last - units.first,
              units.first > 0 || units.last < units.end};
    }
  }

  __device__ void begin(const Load& load, int stage) const {
    const ImageRuns& v = a_.source;
    const int barrier = Barriers::full(stage), place = stage * a_.stage_bytes, images = load.part.images;
    if constexpr (kCopies == Copies::kAsync) {
      begin_share(load, stage, {0, 1});
      arrive_after_copies(barrier);
    } else if (is_elected()) {
      expect_bytes(barrier, images * load.bytes);
      uint32_t to = shared_address(place + load.to);
      const char* from = load.from;
#pragma unroll 4
      for (int n = 0; n < images; ++n, from += v.image_bytes, to += v.pitch) copy_bulk(to, from, load.bytes, barrier);
      if (kUnits) arrive(barrier);
    }
    if (load.ends) load_ends(a_, stage, load.part, kPlane);
    if (kUnits)
      __syncwarp();
    else
      arrive_together(barrier, threadIdx.x % 32 == 0);
  }

  // Begins a warp's share of a load that is not by bulk copies.
  __device__ void begin_share(const Load& load, int stage, Share share) const {
    copy_by_warp<true>(a_.source, stage * a_.stage_bytes, load.part, kPlane, has_first(a_, load.part),
                       has_last(a_, load.part), share);
  }

  __device__ void load(int number, int last, int stage) const {
    if (number < last) begin(load_of(part_of(a_, number)), stage);
  }

  __device__ void store(const Part& part, int buffer, Share share = {0, 1}) const {
    const ImageRuns& v = a_.target;
    const int64_t offset = int64_t{part.channel} * kPlane;
    const int place = buffer * kImages * v.pitch, bytes = part.channels * kPlane;
    if (!stores_bulk_) return copy_by_warp<false>(v, place, part, kPlane, true, true, share);
    if (is_elected()) {
      char* to = v.base + part.image * v.image_bytes + offset;
      uint32_t from = shared_address(place + v.memory + (static_cast<int>(offset) & (kUnit - 1)));
#pragma unroll 4
      for (int n = 0; n < part.images; ++n, to += v.image_bytes, from += v.pitch) store_bulk(to, from, bytes);
      commit_stores();
    }
    __syncwarp();
  }

  // Until a buffer that was stored may be written to.
  __device__ void wait_until_stored() const {
    if (stores_bulk_) wait_stores();
    __syncwarp();
  }

  // Between writing outputs and their store.
  __device__ void before_store() const {
    if (stores_bulk_) before_bulk_copies();
  }

 private:
  static constexpr bool kUnits = kCopies == Copies::kUnits;
  static constexpr int kPlane = 2 * kSide * kSide;

  const Small& a_;
  const bool stores_bulk_;
};

// Warps that copy: of long rows one loads, and one stores.
constexpr int copiers_of(int side) {
  return side == 7 ? 1 : 2;
}

// kKernelH: with what dilation puts between the rows.
template <typename T, int kKernelH, int kSide, Copies kCopies>
__global__ void __launch_bounds__(32 * (kMaxWarps + copiers_of(kSide)), kSide == 7 ? 3 : 2)
    toeplitz_known_planes(const __grid_constant__ Small a) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kUnits = kCopies == Copies::kUnits, kAsync = kCopies == Copies::kAsync;
  if constexpr (!kAsync && __CUDA_ARCH__ < 900) return;
  constexpr bool kSeven = kSide == 7, kOneCopier = copiers_of(kSide) == 1;
  constexpr int kPlane = 2 * kSide * kSide, kShare = kSeven ? 1 : 2;
  const PartCopier<kSide, kCopies> copier(a);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_of_a = lane / 4, pair = lane % 4 * 2;
  const int workers = a.block_channels * kShare;  // warps that compute
  // An output buffer may be written to.
  const auto free_buffer = [](int buffer) { return Barriers::done(kStages + buffer); };
  if (threadIdx.x == 0)
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(Barriers::full(stage), copier.kArrivals);
      init_barrier(Barriers::done(stage), workers * kWarpArrivals);
      init_barrier(free_buffer(stage), kWarpArrivals);
    }
  // What lies around the runs is multiplied with zeros: it should be finite.
  for (int i = threadIdx.x; i < kStages * kImages * static_cast<int>(a.by_clear.divisor); i += blockDim.x) {
    uint32_t slot = i;
    const int unit = a.by_clear.split(slot);
    shared<uint4>(a.source.memory + slot * a.source.pitch + a.clear_from + unit * kUnit) = uint4{};
  }
  before_bulk_copies();
  __syncthreads();
  const int own = warp / kShare, first_tile = warp % kShare;  // the warp's channel of the part, its half of a plane
  // Memory likes to be read and written in one place at a time: blocks side by side take channels side by side.
  const int first = blockIdx.x, step = gridDim.x, last = a.groups * a.batches;
  const Part first_part = part_of(a, first);

  if (warp >= workers) {
    const bool loads = kOneCopier || warp == workers, stores = kOneCopier || warp > workers;
    const auto first_load = copier.load_of(first_part);
    settle_and_wait_for_kernel_before(a.images);
    let_next_kernel_start();
    // Without bulk copies the first part is loaded, and the last ones are stored, by both warps.
    constexpr bool kTogether = kAsync && !kOneCopier;
    const Share share{warp - workers, 2};
    if constexpr (kTogether) {
      copier.begin_share(first_load, 0, share);
      if (stores) {
        commit_copies();
        wait_copies<0>();
      }
      meet<1>(2 * 32);
      if (loads) {
        arrive_after_copies(Barriers::full(0));
        arrive_together(Barriers::full(0), lane == 0);
        copier.load(first + step, last, 1);
      }
    } else if (loads) {
      copier.begin(first_load, 0);
      // Of short rows in whole units one part is asked for at first, which then is there sooner.
      if (kSeven && kUnits) wait(Barriers::full(0), 0);
      copier.load(first + step, last, 1);
    }
    int stage = 0;
    uint32_t parity = 0;
    for (int number = first; number < last; number += step) {
      wait(Barriers::done(stage), parity);
      const bool is_late = kTogether && number + kStages * step >= last;
      if (stores || is_late) copier.store(part_of(a, number), stage, is_late ? share : Share{0, 1});
      if (loads) copier.load(number + kStages * step, last, stage);
      if (stores) {
        copier.wait_until_stored();
        arrive_together(free_buffer(stage), lane == 0);
      }
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    return;
  }

  Taps<T, kKernelH, true> taps;
  // Those of the part that follows, while this one is computed if there are registers for them, or stored.
  constexpr bool kAhead = kKernelH < 7 && !kSeven;
  const auto fetch_next = [&](int number) {
    taps.fetch(a, part_of(a, number + step), own, !a.keeps && number + step < last);
  };
  settle_and_wait_for_kernel_before(a.images);
  let_next_kernel_start();
  taps.fetch(a, first_part, own, true);

  const uint32_t memory = shared_address(0);
  const int weights = a.weights_at + warp * (kKernelH * kEntries * 4);
  const auto odd_place = [](const ImageRuns& v) {
    return kUnits ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(v.base) / 2 & 1);
  };
  const int earlier = kSeven ? 0 : odd_place(a.source);  // columns that rows are read from
  const uint32_t lane_from = memory + a.source.memory + own * kPlane + 2 * (pair - earlier);
  const uint32_t lane_to = memory + a.target.memory + own * kPlane + 2 * pair;
  std::conditional_t<kSeven, Seven<T, kKernelH>, Fourteen<T, kKernelH>> plane;
  int odd = 0, odd_target = 0;  // of 7 columns: whether the channel's planes begin at odd places
  float start = 0;
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int number = first; number < last; number += step) {
    const Part part = part_of(a, number);
    if ((number == first || !a.keeps) && own < part.channels) {
      taps.lay(weights);
      start = widen(taps.bias);
      if constexpr (kSeven) {
        odd = odd_place(a.source) ^ ((part.channel + own) & 1);
        odd_target = odd_place(a.target) ^ ((part.channel + own) & 1);
        plane.prepare(memory + weights, odd, odd_target);
      } else {
        plane.prepare(memory + weights, first_tile, earlier);
      }
    }
    wait(Barriers::full(stage), parity);
    wait(free_buffer(stage), parity ^ 1);
    if (kAhead) fetch_next(number);
    if (own < part.channels) {
      // Where the thread's two images are. What there is not is computed from what lies there, and not stored.
      uint32_t from[2], to[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int index = row_of_a + 8 * h;
        const auto place = [&](const ImageRuns& v) {
          const int64_t offset = int64_t{part.channel} * kPlane;
          return index * v.pitch + stage * kImages * v.pitch +
                 (kUnits   ? static_cast<int>(offset) & (kUnit - 1)
                  : kAsync ? v.phase(part.image + index, offset)
                           : v.phase(0, offset));  // all images lie alike
        };
        from[h] = lane_from + place(a.source), to[h] = lane_to + place(a.target);
      }
      const auto compute = [&] {
        if constexpr (!kSeven) {
          return first_tile ? plane.template compute<true>(from, to, start)
                            : plane.template compute<false>(from, to, start);
        } else {
          if constexpr (!kUnits)
            if (odd != odd_target)
              return odd ? plane.template compute<true, false>(from, to, start)
                         : plane.template compute<false, true>(from, to, start);
          return odd ? plane.template compute<true, true>(from, to, start)
                     : plane.template compute<false, false>(from, to, start);
        }
      };
      const bool finite = compute();
      // The thread's columns here are not all that it has computed.
      if (__any_sync(~0u, !finite)) {
        __syncwarp();
        for (int e = 0; e < (kSeven ? 4 : 8); ++e) {
          const int h = e / 2 % 2, column = pair + e % 2 + e / 4 * 8;
          if (row_of_a + 8 * h < part.images && column < kSide)
            outputs_by_taps<T>(a, from[h] - 2 * (pair - earlier) - memory, to[h] - 2 * pair - memory,
                               part.channel + own, 7 * first_tile, 7, column);
        }
      }
    }
    if (!kAhead) fetch_next(number);
    copier.before_store();
    arrive_together(Barriers::done(stage), lane == 0);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
#endif
}

template <typename T, int kKernelH, int kSide>
void launch(Small a, bool bulk, cudaStream_t stream) {
  constexpr int kPlane = 2 * kSide * kSide, kShare = kSide == 7 ? 1 : 2;
  const Device& device = current_device();
  a.batches = static_cast<int>(ceil_div(a.images, kImages));
  const auto lay_out = [&](int channels) {
    a.block_channels = channels;
    a.source.pitch = a.target.pitch = slot_pitch(channels * kPlane);
    a.stage_bytes = kImages * a.source.pitch;
    a.source.memory = kHead, a.target.memory = kHead + kStages * a.stage_bytes;
    a.weights_at = a.target.memory + kStages * a.stage_bytes;
    a.groups = static_cast<int>(ceil_div(a.channels, channels));
    return a.weights_at + channels * kShare * (kKernelH * kEntries * 4);
  };
  // As many channels as leave room for a second block, and every multiprocessor something to do.
  constexpr int kReserved = 1 << 10;  // bytes that CUDA takes for a block
  int channels = std::min(kMaxWarps / kShare, a.channels), bytes = lay_out(channels);
  while (channels > 1 && (2 * (bytes + kReserved) > device.shared_per_multiprocessor ||
                          int64_t{a.groups} * a.batches < device.multiprocessors))
    channels /= 2, bytes = lay_out(channels);
  a.by_groups = Divider(a.groups);
  const bool full = a.images % kImages == 0 && a.channels % channels == 0;  // all parts are alike
  a.clear_from = full ? channels * kPlane / kUnit * kUnit : 0;
  a.by_clear = Divider((a.source.pitch - a.clear_from) / kUnit);
  a.rows = 0;
  for (int i = 0; i < a.kernel_h; ++i) a.rows |= 1u << (kKernelH / 2 - a.padding_h + i * a.dilation_h);
  const int64_t image = int64_t{a.channels} * kPlane;
  // Bulk loads lie alike in all images, and bulk stores are whole units.
  const auto whole = [&](const ImageRuns& v) {
    return reinterpret_cast<uintptr_t>(v.base) % kUnit == 0 && v.image_bytes % kUnit == 0 && image % kUnit == 0;
  };
  a.bulk = bulk && device.capability >= 90 && (a.source.image_bytes | a.target.image_bytes) % kUnit == 0;
  a.bulk_stores = bulk && device.capability >= 90 && whole(a.target) && channels * kPlane % kUnit == 0;
  const auto go = [&](auto copies) {
    const auto kernel = toeplitz_known_planes<T, kKernelH, kSide, decltype(copies)::value>;
    const int threads = 32 * (channels * kShare + copiers_of(kSide));
    const int64_t parts = int64_t{a.groups} * a.batches;
    static thread_local Decisions<5, int64_t> decisions;
    const int64_t blocks = decisions({device.id, threads, bytes, parts, a.groups}, [&] {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
      int resident = 0;
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
      const int64_t slots = int64_t{std::max(resident, 1)} * device.multiprocessors;
      if (kSide > 7) return std::min(parts, slots);
      // As many as have the same number of parts, if possible, and weights stay where a block has the same channels
      // again and again.
      const int64_t turns = ceil_div(parts, slots), even = ceil_div(parts, turns), same = round_up(even, a.groups);
      return turns > 1 && same <= slots ? same : even;
    });
    a.keeps = blocks % a.groups == 0;
    launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = bytes});
  };
  // In bulk also where the code at hand is that of the device.
  if (!a.bulk || !can_overlap(toeplitz_known_planes<T, kKernelH, kSide, Copies::kBulk>))
    go(std::integral_constant<Copies, Copies::kAsync>{});
  else if (a.bulk_stores && whole(a.source))
    go(std::integral_constant<Copies, Copies::kUnits>{});
  else
    go(std::integral_constant<Copies, Copies::kBulk>{});
  check_launch("toeplitz_known_planes");
}

}  // namespace

void launch_toeplitz_known_planes(Small a, DType dtype, int rows, bool bulk, cudaStream_t stream) {
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto kernel_h) {
        constexpr int kKernelH = decltype(kernel_h)::value;
        if (a.width == 7) return launch<T, kKernelH, 7>(a, bulk, stream);
        return launch<T, kKernelH, 14>(a, bulk, stream);
      };
      if (rows <= 3) return go(std::integral_constant<int, 3>{});
      if (rows <= 5) return go(std::integral_constant<int, 5>{});
      return go(std::integral_constant<int, 7>{});
    }
  });
}

}  // namespace dwconv
