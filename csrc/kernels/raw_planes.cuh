// Planes in 16 bits that come to shared memory as they lie, in units of 16 bytes by bulk copies, whether or not they
// begin with one: a few elements of what surrounds them come as well. What ldmatrix needs is made of that in place, by
// the warps that copy, each of which has some of the images.
#pragma once

#include "boxes.cuh"
#include "stream.h"
#include "toeplitz_large.cuh"

namespace dwconv {

struct RawPlanes {
  int begin;       // bytes from a multiple of 16 to the first element
  int head, tail;  // elements of an image that units of 16 bytes share with what is outside of it
  int channels;
  int plane, in_plane;  // bytes from one to the next in a slot, and before what comes; 0 if planes do not come so
};

// Describes planes that could come so: without gaps, and images begin alike.
inline bool describe_raw(RawPlanes& r, const Large& a, int64_t row) {
  const int64_t plane = 2 * int64_t{a.height} * a.width;
  r.channels = static_cast<int>(ceil_div(a.targets, a.by_fan_out.divisor));
  r.begin = static_cast<int>(reinterpret_cast<uintptr_t>(a.source) % 16);
  r.head = r.begin > 0 ? (16 - r.begin) / 2 : 0, r.tail = static_cast<int>((r.begin + r.channels * plane) % 16 / 2);
  r.plane = r.in_plane = 0;
  return a.source_row == row && 2 * a.source_channel == plane && plane % 4 == 0 && 2 * a.source_image % 16 == 0;
}

// Describes boxes of words of 4 bytes of some of `batch` images, which have so many words without gaps.
inline bool describe_words(CUtensorMap& map, const void* data, int64_t words, int64_t box, int64_t batch, int64_t image,
                           int images) {
  return describe_boxes(map, const_cast<void*>(data), 4, {words, batch, 1, 1}, {2 * image, 2 * image, 2 * image},
                        {static_cast<int>(box), images, 1, 1});
}

// Such boxes of the source. If that begins between multiples of 16 bytes, words are counted from the first one inside
// of an image, and those at its ends are left out that share 16 bytes with what is outside.
inline bool describe_raw_words(CUtensorMap& map, const RawPlanes& r, const Large& a, int64_t box, int images) {
  int64_t words = int64_t{r.channels} * a.height * a.width / 2;
  auto from = static_cast<const char*>(a.source);
  if (r.begin > 0) words -= (r.head + r.tail) / 2, from += 2 * r.head;
  return describe_words(map, from, words, box, a.batch, a.source_image, images);
}

// The word of them that is the first one of a box which begins with a word of an image, or with what surrounds it.
__device__ inline int raw_word(const RawPlanes& r, int word) {
  return word - (r.begin > 0 ? kUnit / 4 : 0);
}

// Bytes that such a plane takes at most.
inline int64_t raw_bytes(const RawPlanes& r, const Large& a) {
  const int64_t plane = 2 * int64_t{a.height} * a.width;
  return round_up(plane + (plane % 16 == 0 ? r.begin : 14), 16);
}

// Bytes from the multiple of 16 before a plane to the plane.
__device__ inline int raw_shift(const RawPlanes& r, const Large& a, int channel) {
  return static_cast<int>(2 * channel * a.source_channel + r.begin) & 15;
}

// Where its first element lies then.
__device__ inline int raw_at(const RawPlanes& r, const Large& a, int channel, int slot_at) {
  return slot_at + r.in_plane + raw_shift(r, a, channel);
}

// Images of a task.
struct RawImages {
  int channel, image, begin, end;  // those from begin to end are a warp's
};

// Those of a task that one of some warps has.
__device__ inline RawImages raw_images(const Large& a, uint32_t task, int images, int warp, int warps) {
  RawImages t;
  t.image = a.by_images.split(task) * images;
  a.by_fan_out.split(task);
  t.channel = static_cast<int>(task);
  images = min(images, a.batch - t.image);
  const int each = (images + warps - 1) / warps;
  t.begin = min(warp * each, images), t.end = min(t.begin + each, images);
  return t;
}

// Begins to copy them, for one thread. What lies in the units at the ends of an image is left out.
__device__ inline void copy_raw(const RawPlanes& r, const Large& a, const RawImages& t, int slot_at, int barrier) {
  const int shift = raw_shift(r, a, t.channel), bytes = 2 * a.height * a.width;
  const int first = t.channel == 0 && r.head > 0 ? 16 : 0;
  const int last = shift + bytes + (t.channel == r.channels - 1 ? 0 : 15) & ~15;
  auto from = static_cast<const char*>(a.source) +
              2 * ((t.image + t.begin) * a.source_image + t.channel * a.source_channel) - shift + first;
  uint32_t to = shared_address(slot_at + t.begin * r.plane + r.in_plane + first);
  if (t.begin < t.end) expect_bytes(barrier, (t.end - t.begin) * (last - first));
#pragma unroll 1
  for (int n = t.begin; n < t.end; ++n, from += 2 * a.source_image, to += r.plane)
    copy_bulk(to, from, last - first, barrier);
}

// Loads that, by all lanes of a warp. `at`: where the first element of the first image's plane lies.
template <typename T>
__device__ void load_ends(const RawPlanes& r, const Large& a, const RawImages& t, int at, bool has_head = true,
                          bool has_tail = true) {
  const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + t.channel * a.source_channel;
  constexpr int kMost = 8;  // at an end
  const auto load = [&](int count, int first) {
    if (count == 0) return;
    const int k = threadIdx.x % kMost;
#pragma unroll 8
    for (int n = t.begin + threadIdx.x % 32 / kMost; n < t.end; n += 32 / kMost)
      if (k < count) shared<T>(at + n * r.plane + 2 * (first + k)) = source[n * a.source_image + first + k];
    __syncwarp();
  };
  load(has_head && t.channel == 0 ? r.head : 0, 0);
  const int tail = has_tail && t.channel == r.channels - 1 ? r.tail : 0;
  load(tail, a.height * a.width - tail);
}

// Two words of 16 bits each from a word on, or from its second half on.
__device__ inline uint32_t from_half(uint32_t word, uint32_t next, bool second) {
  return __byte_perm(word, next, second ? 0x5432 : 0x3210);
}

// Images `plane` bytes apart in shared memory, by number. What follows is called with what it needs in registers:
// stores to shared memory would have the compiler read a problem again.
struct RawSpan {
  uint32_t at;
  int plane, begin, end;
};

// Moves planes of so many units of 16 bytes towards the beginning, by `far` bytes and kWords words, and by half a word
// more: some are read before as many are written.
template <int kWords>
__device__ __noinline__ void move_raw(RawSpan t, int units, int far, bool half) {
  const int lane = threadIdx.x % 32;
  constexpr int kAhead = 3;
#pragma unroll 1
  for (int n = t.begin; n < t.end; ++n) {
    uint32_t to = t.at + n * t.plane + 16 * lane;
#pragma unroll 1
    for (int left = units - lane; left > -lane; left -= 32 * kAhead, to += 512 * kAhead) {
      uint4 here[kAhead], next[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (32 * k < left)
          here[k] = shared_at<uint4>(to + far + 512 * k), next[k] = shared_at<uint4>(to + far + 512 * k + 16);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const uint32_t words[] = {here[k].x, here[k].y, here[k].z, here[k].w,
                                  next[k].x, next[k].y, next[k].z, next[k].w};
        if (32 * k < left)
          shared_at<uint4>(to + 512 * k) = {from_half(words[kWords], words[kWords + 1], half),
                                            from_half(words[kWords + 1], words[kWords + 2], half),
                                            from_half(words[kWords + 2], words[kWords + 3], half),
                                            from_half(words[kWords + 3], words[kWords + 4], half)};
      }
      __syncwarp();
    }
  }
}

__device__ inline void move_raw(const RawPlanes& r, const Large& a, const RawImages& t, int slot_at) {
  const int shift = raw_shift(r, a, t.channel), units = a.height * a.width / 8;
  const RawSpan span{shared_address(slot_at), r.plane, t.begin, t.end};
  const bool half = shift % 4 != 0;
  switch (shift / 4) {
    case 0: return move_raw<0>(span, units, r.in_plane, half);
    case 1: return move_raw<1>(span, units, r.in_plane, half);
    case 2: return move_raw<2>(span, units, r.in_plane, half);
    default: return move_raw<3>(span, units, r.in_plane, half);
  }
}

// How planes of at most 32 rows are parted into rows, behind whose columns are zeros. A lane has a row; images of few
// rows are parted side by side.
struct RawRows {
  Divider by_height;
  int together, words, pitch;  // images side by side; of a row, of 4 bytes; from one row to the next, in bytes
};

// kGroups groups of 8 columns, of which only the last one may not be full. `Word`: what is loaded at once, of which
// rows are multiples; kSkip: words of 4 bytes of the first one before a row. `far`: bytes from where the first row goes
// to where it is, as far as they are words of 4 bytes; half a word more.
template <int kGroups, typename Word, int kSkip>
__device__ __forceinline__ void part_raw_here(RawSpan t, RawRows rows, int far, bool half) {
  constexpr int kWords = 4 * kGroups, kSure = kWords - 4, kWordsOf = sizeof(Word) / 4;
  constexpr int kLoads = (kWords + 1 + kSkip + kWordsOf - 1) / kWordsOf, kAhead = 2;
  uint32_t first = threadIdx.x % 32;
  const int row = rows.by_height.split(first), image = t.begin + static_cast<int>(first);
  const int end = static_cast<int>(first) < rows.together ? t.end : 0, step = rows.together * t.plane;
  uint32_t to = t.at + image * t.plane, from = to + far - 4 * kSkip + row * 4 * rows.words;
  to += row * rows.pitch;
#pragma unroll 1
  for (int n = image; n - static_cast<int>(first) < t.end; n += kAhead * rows.together) {
    union Row {
      Word loaded[kLoads];
      uint32_t words[kLoads * kWordsOf];
      __device__ Row() {}
    } in[kAhead];
#pragma unroll
    for (int m = 0; m < kAhead; ++m, from += step)
      if (n + m * rows.together < end)
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
          if (k * kWordsOf <= kSure || k * kWordsOf <= rows.words + kSkip)
            in[m].loaded[k] = shared_at<Word>(from + k * static_cast<int>(sizeof(Word)));
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kAhead; ++m, to += step)
      if (n + m * rows.together < end) {
        uint32_t out[kWords];
#pragma unroll
        for (int k = 0; k < kWords; ++k)
          out[k] =
              k < kSure || k < rows.words ? from_half(in[m].words[k + kSkip], in[m].words[k + kSkip + 1], half) : 0;
#pragma unroll
        for (int k = 0; k < kGroups; ++k)
          shared_at<uint4>(to + k * kLargeGroupBytes) = {out[4 * k], out[4 * k + 1], out[4 * k + 2], out[4 * k + 3]};
      }
  }
}

template <int kGroups, typename Word, int kSkip>
__device__ __noinline__ void part_raw(RawSpan t, RawRows rows, int far, bool half) {
  part_raw_here<kGroups, Word, kSkip>(t, rows, far, half);
}

// kHere: by code of the caller's own, word by word, for warps that have given up registers, which calls would spill.
template <int kGroups, bool kHere>
__device__ inline void part_raw(const RawPlanes& r, const RawRows& rows, const Large& a, const RawImages& t,
                                int slot_at) {
  const int shift = raw_shift(r, a, t.channel), far = r.in_plane + (shift & ~3);
  const RawSpan span{shared_address(slot_at), r.plane, t.begin, t.end};
  const bool half = shift % 4 != 0;
  if constexpr (kHere)
    part_raw_here<kGroups, uint32_t, 0>(span, rows, far, half);
  else if (kGroups == 2 || rows.words % 2 != 0)
    part_raw<kGroups, uint32_t, 0>(span, rows, far, half);
  else if (shift % 8 < 4)
    part_raw<kGroups, uint2, 0>(span, rows, far, half);
  else
    part_raw<kGroups, uint2, 1>(span, rows, far, half);
}

// Whether a barrier's phase is past, for all lanes of a warp.
__device__ inline bool is_past(int barrier, uint32_t parity) {
  uint32_t past = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(past)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return __all_sync(~0u, past != 0);
}

// A warp asks for the planes of tasks in turn, ahead of what it does with those that are there.
class RawTasks {
 public:
  // The first `done` tasks, no more than there are slots, need not be asked for.
  __device__ RawTasks(int done, int slots) : next_(done), slot_(done < slots ? done : 0), parity_(done < slots) {}

  // Calls begin_copies(task, slot), in one thread, as long as there are tasks and slots without one.
  // empty_barrier(slot) tells that. Waits for the slot of `task`.
  template <typename EmptyBarrier, typename BeginCopies>
  __device__ void ask(int task, int tasks, int slots, EmptyBarrier&& empty_barrier, BeginCopies&& begin_copies) {
    for (; next_ < tasks; ++next_) {
      if (next_ >= slots) {
        if (next_ == task)
          wait(empty_barrier(slot_), parity_);
        else if (!is_past(empty_barrier(slot_), parity_))
          return;
      }
      before_bulk_copies();
      __syncwarp();
      if (is_elected()) begin_copies(next_, slot_);
      if (++slot_ == slots) slot_ = 0, parity_ ^= 1;
    }
  }

 private:
  int next_, slot_;
  uint32_t parity_;
};

}  // namespace dwconv
