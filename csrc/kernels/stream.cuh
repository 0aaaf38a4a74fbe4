// Rows of contiguous planes, one after the other, flowing through a ring in shared memory.
//
// A block works through a run of chunks: some whole planes each, or a band of rows of one plane. Loads of the chunks to
// come are under way while it computes, without a register being spent on them, and a row that two neighbouring bands
// need is loaded once. Copies go in units of 16 bytes whatever the address of a row: bulk copies on sm_90 and later,
// cp.async on sm_80 and later, plain loads before. Nothing outside the array is touched: its first and last bytes, as
// far as they share 16 bytes with what lies around, are copied element by element.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "copies.cuh"
#include "device.h"

namespace dwconv {

// What bulk copies are waited for with. They lie at the beginning of shared memory.
struct Barriers {
  static constexpr int kStages = 4;                                        // at most
  static __device__ int full(int stage) { return 8 * stage; }              // a chunk has arrived
  static __device__ int known(int stage) { return full(kDepth + stage); }  // it is known which one it will be
  static __device__ int done(int stage) { return 8 * (kStages + stage); }  // all warps are done with it
};

// The ways to copy between global and shared memory. Bulk copies are begun by one thread, the others are everybody's,
// or dedicated warps'. These are the last ones, and do nothing else: then the others never wait for them.
struct Copier {
#if __CUDA_ARCH__ >= 900
  const bool bulk, dedicated;
  const int loaders;
  // `always`: there are dedicated warps even where copies are not bulk copies, of so many threads.
  __device__ Copier(bool bulk, bool dedicated, bool always = false, int loaders = 32)
      : bulk(bulk), dedicated(dedicated && (bulk || always)), loaders(this->dedicated ? loaders : 0) {}
#elif __CUDA_ARCH__ >= 800
  static constexpr bool bulk = false;
  const bool dedicated;
  const int loaders;
  __device__ Copier(bool, bool dedicated, bool always = false, int loaders = 32)
      : dedicated(dedicated && always), loaders(this->dedicated ? loaders : 0) {}
#else
  static constexpr bool bulk = false, dedicated = false;
  static constexpr int loaders = 0;
  __device__ Copier(bool, bool, bool = false, int = 0) {}
#endif

  __device__ int workers() const { return blockDim.x - loaders; }  // threads that compute
  __device__ bool is_worker() const { return static_cast<int>(threadIdx.x) < workers(); }
  // Among the threads that copy.
  __device__ int rank() const { return dedicated ? threadIdx.x - workers() : threadIdx.x; }
  __device__ bool loads() const { return bulk ? rank() == 0 : true; }  // whether the thread has to do with loads

  // `for_all`: whether one thread says for all that they are done with a chunk, of which so many are under way.
  __device__ void init(bool for_all = false, int depth = kDepth) const {
    if ((bulk || dedicated) && threadIdx.x == 0) {
      for (int i = 0; i < depth; ++i) {
        init_barrier(Barriers::full(i), bulk ? 1 : 1 + loaders);
        init_barrier(Barriers::done(i), for_all && kWarpArrivals == 1 ? 1 : workers() / 32 * kWarpArrivals);
      }
      before_bulk_copies();
    }
  }

  // Begins a copy; both addresses and `bytes` are multiples of 16.
  __device__ void load(void* to, const void* from, int bytes, int barrier) const {
    if (bulk) {
      if (rank() > 0 || bytes == 0) return;
      expect_bytes(barrier, bytes);
      return copy_bulk(shared_address(to), from, bytes, barrier);
    }
    const int warp = rank() / 32, warps = (dedicated ? loaders : blockDim.x) / 32;
    copy_by_warps(shared_address(to), static_cast<const char*>(from), bytes, warp, warps);
  }

  // Ends the loads of one chunk.
  __device__ void commit(int stage) const {
    if ((bulk || dedicated) && rank() == 0) arrive(Barriers::full(stage));  // with what it wrote by itself
    if (bulk) return;
    if (dedicated)
      arrive_after_copies(Barriers::full(stage));
    else
      commit_copies();
  }

  // Waits for the older of the chunks under way. What others loaded is there after the next __syncthreads().
  __device__ void wait_full(int stage, uint32_t parity) const {
    if (bulk || dedicated) return wait(Barriers::full(stage), parity);
    wait_copies<kDepth - 1>();
  }

  // After reading a chunk, where there is a dedicated warp: it may load another one in its place.
  __device__ void finish(int stage) const { arrive_together(Barriers::done(stage), threadIdx.x % 32 == 0); }

  // The same for all, behind a barrier of theirs.
  __device__ void finish_for_all(int stage) const {
    if (kWarpArrivals > 1)
      finish(stage);
    else if (threadIdx.x == 0)
      arrive(Barriers::done(stage));
  }

  // Between writing a buffer and storing it, before a __syncthreads().
  __device__ void before_store() const {
    if (bulk) before_bulk_copies();
  }

  // Stores a buffer, by so many threads, of which number `first` begins bulk copies. `from` and `to` lie at the same
  // place within 16 bytes.
  template <typename T>
  __device__ void store(T* to, const T* from, int count, int threads, int first) const {
    constexpr int kPerUnit = kUnit / sizeof(T);
    const int misfit = static_cast<int>(reinterpret_cast<uintptr_t>(to) / sizeof(T)) % kPerUnit;
    const int head = min((kPerUnit - misfit) % kPerUnit, count);
    const int body = (count - head) / kPerUnit * kPerUnit;
#if __CUDA_ARCH__ >= 900
    if (bulk) {
      if (static_cast<int>(threadIdx.x) == first) {
        if (body > 0) store_bulk(to + head, shared_address(from + head), body * static_cast<int>(sizeof(T)));
        commit_stores();
      }
    } else
#endif
      store_by_warps(to + head, shared_address(from + head), body * sizeof(T), threads / 32);
    const int i = threads - 1 - static_cast<int>(threadIdx.x);  // the last threads: the first one begins copies
    if (i < count - body) {
      const int at = i < head ? i : i + body;
      to[at] = from[at];
    }
  }

  // Waits until all stores have read their buffers, by the thread that begins them.
  __device__ void stored(int first) const {
    if (bulk && static_cast<int>(threadIdx.x) == first) wait_stores();
  }

 private:
  // As copy_by_warps, the other way. So many units of a lane are read before the first one is written.
  static __device__ void store_by_warps(void* to, uint32_t from, int bytes, int warps) {
    constexpr int kTogether = 4, kStep = 32 * kUnit;
#pragma unroll 1
    for (int at = kTogether * kStep * (threadIdx.x / 32) + kUnit * (threadIdx.x % 32); at < bytes;
         at += warps * kTogether * kStep) {
      char* const its = static_cast<char*>(to) + at;
      const int left = bytes - at;
      uint4 units[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (k * kStep < left) units[k] = shared_at<uint4>(from + at + k * kStep);
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (k * kStep < left) *reinterpret_cast<uint4*>(its + k * kStep) = units[k];
    }
  }
};

__device__ inline void widen_pair(uint32_t pair, float& low, float& high, __nv_bfloat16) {
  low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
}
__device__ inline void widen_pair(uint32_t pair, float& low, float& high, __half) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  low = both.x, high = both.y;
}

// Neighbouring elements in shared memory, wherever they begin.
template <typename T, int kCount>
__device__ void read_row(int offset, float (&x)[kCount]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = shared<float>(offset + 4 * j);
  } else {  // two at a time, and shifted where they begin at an odd one
    const int first = offset & ~3;
    const uint32_t shift = (offset & 2) * 8;
    uint32_t word = shared<uint32_t>(first);
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      const uint32_t next = shared<uint32_t>(first + 2 * j + 4);
      float beyond;
      widen_pair(__funnelshift_r(word, next, shift), x[j], j + 1 < kCount ? x[j + 1] : beyond, T{});
      word = next;
    }
  }
}

// The same of float from an even place on (8 bytes), two at a time; columns from one more on if kOdd.
template <bool kOdd, int kCount>
__device__ void read_row_by_pairs(int offset, float (&x)[kCount]) {
#pragma unroll
  for (int j = -kOdd; j < kCount; j += 2) {
    const float2 pair = shared<float2>(offset + 4 * j);
    if (j >= 0) x[j] = pair.x;
    if (j + 1 < kCount) x[j + 1] = pair.y;
  }
}

// An array of images of contiguous planes. `base` lies at the same place within 16 bytes for every image.
struct Planes {
  char* base;
  int64_t image_bytes;  // from one image to the next
  int rows;             // of an image: its planes times their height
  int row_bytes;
};

// Rows in a ring. A row lies at the same place within 16 bytes in the ring and in the array: `capacity` rows are a
// multiple of 16 bytes, and so are `period`, of which capacity is a multiple.
struct RowRing {
  int memory;  // slot 0 begins at memory + phase
  int phase;   // of the array, within 16 bytes
  int row_bytes, capacity, period;

  __device__ int at(int slot) const { return memory + phase + slot * row_bytes; }
  __device__ int wrap(int slot) const { return slot >= capacity ? slot - capacity : slot < 0 ? slot + capacity : slot; }
};

// A walk down the rows of a ring.
class RowWalk {
 public:
  // From `slot` on, which may lie outside the ring by less than its size.
  __device__ RowWalk(const RowRing& ring, int slot)
      : next_(ring.at(ring.wrap(slot))),
        row_bytes_(ring.row_bytes),
        end_(ring.at(ring.capacity)),
        ring_bytes_(ring.capacity * ring.row_bytes) {}

  // Where the next row begins.
  __device__ int next() {
    const int here = next_;
    next_ += row_bytes_;
    if (next_ >= end_) next_ -= ring_bytes_;
    return here;
  }

 private:
  int next_;
  const int row_bytes_, end_, ring_bytes_;
};

// Reads columns from x0 on of the walk's next row, zeros outside the image; columns x0 + [kSure, kSureEnd) are sure to
// lie inside. By pairs where rows lie evenly, and x0 is even, or odd.
enum class ReadBy { kOne, kEvenPairs, kOddPairs };
template <typename T, int kSure, int kSureEnd, ReadBy kBy = ReadBy::kOne, int kCount>
__device__ void read_next(RowWalk& walk, bool inside, int x0, int width, float (&x)[kCount]) {
  const int row = walk.next();
  constexpr bool kOdd = kBy == ReadBy::kOddPairs;
  const int from = inside ? row + x0 * static_cast<int>(sizeof(T)) : kZeros + 4 * kOdd;
  if constexpr (kBy == ReadBy::kOne)
    read_row<T>(from, x);
  else
    read_row_by_pairs<kOdd>(from, x);
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (j < kSure || j >= kSureEnd) x[j] = static_cast<uint32_t>(x0 + j) < static_cast<uint32_t>(width) ? x[j] : 0.f;
}

// Where in the ring the rows are, counted through all images; who loads and who reads each keep one.
struct Cursor {
  int end = 0;   // the row behind the last one placed
  int slot = 0;  // the slot behind the last one placed

  __device__ int slot_of(const RowRing& ring, int row) const { return ring.wrap(slot - (end - row)); }

  // Gives slots to the rows of [begin, end) that have none.
  __device__ void place(const RowRing& ring, int begin, int end) {
    if (begin > this->end) {  // rows are skipped: the same place within 16 bytes, 16 bytes from what is there
      const int skip = (begin - this->end) & (ring.period - 1);
      slot = ring.wrap(slot + (skip ? skip : ring.period));
      this->end = begin;
    }
    if (end > this->end) {
      slot = ring.wrap(slot + (end - this->end));
      this->end = end;
    }
  }
};

struct Nothing {
  __device__ void operator()() const {}
};

// Loads rows [row, row + rows) of an image to `slot` and on, where no wrap is. `joined`: the row before, and with it
// all 16 bytes that it ends in, was loaded next to them. `ready`: called when memory is about to be read.
template <typename T, class SomeCopier, typename Ready>
__device__ void load_rows(const SomeCopier& copier, const RowRing& ring, const Planes& planes, int image, int row,
                          int rows, int slot, bool joined, int barrier, Ready&& ready) {
  const auto down = [](int64_t offset) { return offset / kUnit * kUnit; };
  const auto up = [&](int64_t offset) { return down(offset + kUnit - 1); };
  // Offsets are from the 16 bytes in which the image begins; the outermost 16 bytes may not be the image's alone.
  const int64_t begin = ring.phase + static_cast<int64_t>(row) * planes.row_bytes;
  const int64_t end = begin + static_cast<int64_t>(rows) * planes.row_bytes;
  const int64_t inner_begin = up(ring.phase);
  const int64_t inner_end = down(ring.phase + static_cast<int64_t>(planes.rows) * planes.row_bytes);
  const int64_t from = max(joined ? up(begin) : down(begin), inner_begin), to = min(up(end), inner_end);
  const char* source = planes.base + image * planes.image_bytes - ring.phase;
  char* target = shared_memory + ring.at(slot) - begin;
  ready();
  copier.load(target + from, source + from, static_cast<int>(to - from), barrier);
  if (copier.rank() == 0) {
    const auto copy = [&](int64_t i) { *reinterpret_cast<T*>(target + i) = *reinterpret_cast<const T*>(source + i); };
    for (int64_t i = begin; i < min(inner_begin, end); i += sizeof(T)) copy(i);
    for (int64_t i = max(max(inner_begin, inner_end), begin); i < end; i += sizeof(T)) copy(i);
  }
}

// Loads the rows of [begin, end) of an image that are not yet in the ring.
template <typename T, class SomeCopier, typename Ready = Nothing>
__device__ void load_rows(const SomeCopier& copier, const RowRing& ring, const Planes& planes, Cursor& cursor,
                          int image, int begin, int end, int barrier, Ready&& ready = {}) {
  const int before = image * planes.rows;  // rows of the images before
  const int from = max(before + begin, cursor.end);
  const bool joined = before + begin <= cursor.end && from > before;
  cursor.place(ring, before + begin, before + end);
  const int rows = before + end - from;
  if (rows <= 0) return;
  const int slot = cursor.slot_of(ring, from);
  const int first = min(rows, ring.capacity - slot);
  load_rows<T>(copier, ring, planes, image, from - before, first, slot, joined && slot > 0, barrier, ready);
  if (first < rows)
    load_rows<T>(copier, ring, planes, image, from - before + first, rows - first, 0, false, barrier, ready);
}

// As many threads as leave few of them idle in the last round.
inline int threads_for(int64_t units, int most) {
  const int64_t rounds = ceil_div(units, most);
  return static_cast<int>(std::max<int64_t>(round_up(ceil_div(units, rounds), 32), 64));
}

// What was decided for the last few problems, which tend to come back: networks have layers, and training has steps.
template <size_t kInts, typename Decision>
class Decisions {
 public:
  using Key = std::array<int64_t, kInts>;

  template <typename Decide>
  const Decision& operator()(const Key& key, Decide&& decide) {
    uint64_t hash = 0;
    for (const int64_t value : key) hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
    // Problems that share a set would decide anew in every step if they took each other's only place.
    const auto set = entries_.begin() + (hash >> 61) * kWays;
    const auto found = std::find_if(set, set + kWays, [&](const Entry& e) { return !e.decision || e.key == key; });
    Entry& entry = found < set + kWays ? *found : set[next_++ % kWays];
    if (!entry.decision || entry.key != key) entry = {key, decide()};
    return *entry.decision;
  }

 private:
  struct Entry {
    Key key;
    std::optional<Decision> decision;
  };
  static constexpr size_t kWays = 4;
  std::array<Entry, 8 * kWays> entries_;
  size_t next_ = 0;  // the way that makes room
};

}  // namespace dwconv
