// Forward and grad_input of small kernels in channels_last (march_channels_last.cuh). A thread owns one channel, or two
// neighbouring ones, or all three of an image that has three, of a strip of columns. It marches down the image: each
// source row, read once, is added to all the output rows that it reaches, whose sums are in registers; the oldest of
// them is then complete. Outputs go to memory directly, or, where they are many to a source row, by way of shared
// memory, from which bulk copies take them.
#include <cmath>
#include <limits>
#include <numeric>

#include "boxes.cuh"
#include "launch.h"
#include "mapping.h"
#include "march_channels_last.cuh"
#include "overlap.cuh"
#include "small_kernels.h"
#include "three_channels.h"

namespace dwconv {
namespace {

// Targets are counted in units: output rows and columns, or, where grad_input spreads the gradient (stride 2), pairs of
// them, the second of which takes the odd taps. A unit reads the source from unit * step - lead on.
struct March {
  CUtensorMap map;  // of the source, where rows come as boxes, see Tile::kBoxes
  Pixels source;
  int height, width;  // of the source
  int rows;           // of the source, of both halves of an image, see Tile::kHalves
  char* target;
  int64_t target_image_bytes, target_row_bytes;
  int target_pixel_bytes;
  int target_height, target_width, filters;  // `filters`: channels of the target
  const void* weight;
  int64_t weight_filter, weight_row, weight_column;
  const void* bias;
  int64_t bias_stride;
  int fan_out, fan_in;  // filters per source channel, source channels per filter
  int padding_h, padding_w;
  int lead_h, lead_w, skew_h, skew_w;  // skew: how far the first pair begins before the image
  int units, all_units;                // rows of units, of an image and of all

  int lanes, strips;  // threads side by side: for the channels of a slab, and for the strips of columns
  int threads;        // without the warp that loads
  // If not 0: a warp owns that many strips, of all channels, and puts their outputs side by side before it stores them.
  int warp_strips;
  // If not 0: rows of outputs are put together in shared memory and leave by bulk copies, from two buffers in turn of
  // so many bytes each, behind the ring.
  int row_bytes;
  int group;  // source rows that are loaded together
  int slot_bytes, ring_bytes;
  int stage_bytes;  // behind the ring, for the outputs of a warp
  // Weights that lie side by side may come by a bulk copy, behind all that: the first of them in memory, bytes of a
  // block's, and how far behind a unit they begin, there and here.
  const char* taps;
  int taps_bytes, taps_shift;
  int workers;  // blocks that share the rows of a slab and a span
  Shares shares;
  bool bulk;          // whether rows come by bulk copies
  bool pairs;         // whether a thread may own two channels
  bool split;         // whether these lie in no word of the source, and are read one by one
  bool split_stores;  // the same of the target
  bool twins;         // whether it may own both filters of one
  bool wide;          // whether all of the target is a multiple of 16 bytes
  // With three channels: whether outputs of a strip are whole words of four elements, and what it reads begins with the
  // second element of one.
  bool fours;
  Divider by_lanes, by_slabs, by_spans, by_units, by_fan_out;
};

constexpr int kGroups = Barriers::kStages;  // of rows in the ring: one to work on, the others on their way
constexpr int kRing = 128;                  // offset of the ring, behind the barriers
constexpr int kTapsBarrier = 64;            // offset of the one for weights
constexpr int kCopiesBarrier = 72;          // of those for copies behind which the loading warp has something to do
static_assert(kTapsBarrier >= 16 * Barriers::kStages && kCopiesBarrier + 8 * kGroups <= kRing);

// Of an image, or half of one, see Tile::kHalves: where it lies in either array, and what of it.
struct Image {
  int64_t source, target;  // bytes
  int lead_h, height, target_height;
};

template <class Tile>
__device__ Image image_of(const March& a, int number) {
  if constexpr (!Tile::kHalves) {
    return {number * a.source.image_bytes, number * a.target_image_bytes, a.lead_h, a.height, a.target_height};
  } else {
    const int half = number % 2, image = number / 2, source_half = (half + a.padding_h) % 2;
    return {image * a.source.image_bytes + source_half * (a.source.row_bytes / 2),
            image * a.target_image_bytes + half * (a.target_row_bytes / 2), (a.padding_h - half + source_half) / 2,
            (a.rows - source_half + 1) / 2, (a.target_height - half + 1) / 2};
  }
}

// Rows of units [begin, end) of all images, as far as they are of one image.
template <class Tile>
__device__ Run run_of(const March& a, int begin, int end) {
  uint32_t number = begin;
  if (Tile::kHalves) a.by_units.split(number);
  const Image image = image_of<Tile>(a, number);
  return run_of<Tile::kStep, Tile::kExtentH>(a.by_units, image.lead_h, image.height, begin, end);
}

// Rows of float as boxes, one instruction each, which one thread of a warp begins: with zeros beside the image.
class BoxLoader {
 public:
  __device__ BoxLoader(const March& a, int slab, int column) : channel_(slab / 4), column_(column) {}

  __device__ void seek(int image, int row) { image_ = image, row_ = row; }
  __device__ void next() { ++row_; }

  __device__ void load(const March& a, int to, int barrier) const {
    if (is_elected()) {
      expect_bytes(barrier, a.source.columns * a.source.pitch);
      copy_box(to, a.map, channel_, column_, row_, image_, barrier);
    }
    __syncwarp();
  }

 private:
  int channel_, column_, image_, row_;
};

// Source rows of a block on their way to the ring.
template <class Tile, class Loader>
class Feed {
  static constexpr bool kBoxes = std::is_same_v<Loader, BoxLoader>;

  __device__ static Loader loader_of(const March& a, int slab, int column) {
    if constexpr (kBoxes)
      return Loader(a, slab, column);
    else
      return Loader(a.source, slab, column, a.width);
  }

 public:
  __device__ Feed(const March& a, int slab, int column, int begin, int end)
      : loader_(loader_of(a, slab, column)), begin_(begin), end_(end) {}

  // Finds the next row. Returns whether there is one.
  __device__ bool find(const March& a) {
    while (left_ <= 0 && begin_ < end_) {
      const Run r = run_of<Tile>(a, begin_, end_);
      begin_ += r.end - r.begin;
      left_ = r.row_end - r.row;
      if constexpr (kBoxes)
        loader_.seek(r.image, r.row);
      else
        loader_.seek(a.source, image_of<Tile>(a, r.image).source, r.row);
    }
    return left_ > 0;
  }

  // Begins to load a group of rows.
  template <typename... Barrier>
  __device__ void load(const March& a, Barrier... barrier) {
    for (int i = 0; i < a.group && find(a); ++i) {
      if constexpr (kBoxes)
        loader_.load(a, kRing + slot_, barrier...), loader_.next();
      else
        loader_.load(a.source, kRing + slot_, barrier...), loader_.next(a.source);
      --left_;
      slot_ += a.slot_bytes;
      if (slot_ == a.ring_bytes) slot_ = 0;
    }
  }

  // Clears what is beside the rows of a group.
  __device__ void clear_beside(const March& a, int stage) const {
    for (int i = threadIdx.x % 32 / 16; i < a.group; i += 2)
      loader_.clear_beside(a.source, kRing + (stage * a.group + i) * a.slot_bytes);
  }

 private:
  Loader loader_;
  int begin_, end_;          // rows of units that no source row was loaded for
  int left_ = 0, slot_ = 0;  // source rows of the run, and the next one's place in the ring
};

// The outputs of a filter in a strip of rows [begin, end) by the taps that meet the image. For kernels with a tap
// that is Inf or NaN, which must not meet padding.
template <typename T, class Tile>
__device__ __noinline__ void strip_by_taps(const March& a, int begin, int end, int filter, int column) {
  const T* weight = static_cast<const T*>(a.weight) + filter * a.fan_in * a.weight_filter;
  const int x_end = min((column + Tile::kStrip) * Tile::kPair - a.skew_w, a.target_width);
  uint32_t channel = filter;
  a.by_fan_out.split(channel);
  for (; begin < end; ++begin) {
    uint32_t image = begin;
    int y_begin = static_cast<int>(a.by_units.split(image)) * Tile::kPair - a.skew_h;
    if (Tile::kHalves) y_begin = 2 * y_begin + image % 2, image /= 2;
    constexpr int kRows = Tile::kHalves ? 2 : 1;  // from one that an array's `row_bytes` lead to to the next
    for (int y = max(y_begin, 0); y < min(y_begin + Tile::kPair, a.target_height); ++y)
      for (int x = max(column * Tile::kPair - a.skew_w, 0); x < x_end; ++x) {
        float sum = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
        const auto row_of = [&](int i) {
          const int row = y + a.padding_h - i;
          if (Tile::kSpread) return row % 2 == 0 ? row / 2 : -1;
          return y * Tile::kStride - a.padding_h + i * Tile::kDilation;
        };
        const auto column_of = [&](int j) {
          const int column = x + a.padding_w - j;
          if (Tile::kSpread) return column % 2 == 0 ? column / 2 : -1;
          return x * Tile::kStride - a.padding_w + j * Tile::kDilation;
        };
        const char* from = a.source.begin + image * a.source.image_bytes;
        for (int q = 0; q < a.fan_in; ++q)
          sum = sum_of_taps(sum, reinterpret_cast<const T*>(from) + channel * a.fan_in + q, a.source.row_bytes / kRows,
                            a.source.pixel_bytes, Tile::kHalves ? a.rows : a.height, a.width,
                            weight + q * a.weight_filter, a.weight_row, a.weight_column, Tile::kKernelH, Tile::kKernelW,
                            row_of, column_of);
        char* to = a.target + image * a.target_image_bytes + y * (a.target_row_bytes / kRows) +
                   static_cast<int64_t>(x) * a.target_pixel_bytes;
        reinterpret_cast<T*>(to)[filter] = narrow<T>(sum);
      }
  }
}

// What a kernel is compiled for. kSpread: grad_input at stride 2. kFan: source channels that a filter sums over, if
// kChannels, those that a thread owns side by side, is 1. kTwins: the two that a thread owns are filters of one
// channel.
template <class Kernel, bool kSpread_, int kChannels_, int kFan_, bool kTwins_ = false, bool kHalves_ = false>
struct Tile {
  static constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr bool kSpread = kSpread_;
  static constexpr int kChannels = kChannels_, kFan = kFan_;
  static constexpr bool kTwins = kTwins_;
  // Whether even and odd rows are images of their own, since no row meets one of the other sort: at dilation 2.
  static constexpr bool kHalves = kHalves_;
  static constexpr int kRowDilation = kHalves ? 1 : kDilation;

  static constexpr int kPair = kSpread ? 2 : 1;                     // outputs of a unit, along a side
  static constexpr int kStep = kSpread ? 1 : kStride;               // source rows from unit to unit
  static constexpr int kStrip = kSpread || kChannels == 3 ? 4 : 7;  // units of a thread
  static constexpr int kLive = (kKernelH - 1) / kStride + 1;        // rows of units under way
  static constexpr int kExtentH = kSpread ? kLive : (kKernelH - 1) * kRowDilation + 1;
  static constexpr int kExtentW = kSpread ? (kKernelW - 1) / 2 + 1 : (kKernelW - 1) * kDilation + 1;
  static constexpr int kColumns = (kStrip - 1) * kStep + kExtentW;  // of the source, for a strip
  static constexpr int kRowsPerStep = kStep * kRowDilation;

  static constexpr bool kBulk = kChannels >= 2 || kFan == 2 || kKernelH > 3;  // whether it is compiled for bulk copies
  // Whether rows of pixels that fit no units of 16 bytes may come so, too.
  static constexpr bool kBulkJoined = kBulk && kChannels == 3;
  // Whether there is code of its own for rows of pixels that fit no units, by bulk copies: where masks of what lies
  // beside the image are not to cost others registers.
  static constexpr bool kJoins = !kBulkJoined && kFan == 1 && !kTwins && kDilation == 1 && kKernelH > 1 &&
                                 kKernelW > 1 && kKernelH <= 7 && !(kSpread && kChannels == 2);
  // Whether bulk copies are those of boxes: where a thread takes so many registers that a block has 8 warps at most,
  // none of which can be spared, nor are they as many as all channels have.
  static constexpr bool kBoxes = kBulk && kKernelH > 7 && kKernelW > 7;
  // Whether it is compiled for bulk copies of shifted pixels, too: not where they would cost registers of too many
  // threads.
  static constexpr bool kShifts = kBulk && !kBoxes && kChannels != 3 && kRowDilation == 1;
  // Whether weights may come by bulk copies: it pays where there are many.
  static constexpr bool kBulkTaps = kBulk && kKernelH * kKernelW >= 25;
  // Whether outputs leave by bulk copies where rows come by them: it pays where there are four times as many.
  static constexpr bool kLeaves = kSpread && kChannels == 2;
  // Whether sums that are never stored are left out: where a row has many taps, and they are not the few of a band.
  static constexpr bool kSkips = !kSpread && kStride == 1 && kKernelH >= 5 && kKernelW >= 5;
  // As many threads as registers allow.
  static constexpr int kRegisters = kRowDilation * (kSpread ? kKernelH : kLive) * kPair * kStrip * kChannels +
                                    kKernelH * kKernelW * kChannels * kFan + kColumns * kChannels + 16 + 16 * kFan;
  static constexpr int kThreads = std::min(65536 / kRegisters, 1024) / 128 * 128;
  static constexpr int kBlocks = kThreads > 512 ? 2 : 1;
  static constexpr int kMaxThreads = kThreads / kBlocks;
  // Threads that load nothing need some 16 registers less.
  static constexpr int kBulkThreads = kBlocks > 1 ? kMaxThreads : std::min(65536 / (kRegisters - 16), 512) / 128 * 128;
  // Whether bulk copies are begun by a warp that does nothing else. Of a few warps none can be spared: then the first
  // one begins them.
  static constexpr int kLoading = kBoxes || (kFan == 2 && kBulkThreads <= 256) ? 0 : 32;
};

// A value that ptxas is to keep in a register: addresses in shared memory begin with a special register, which it would
// otherwise read anew, and wait for, wherever one is used.
__device__ inline uint32_t kept(uint32_t value) {
  return __shfl_sync(__activemask(), value, threadIdx.x % 32);
}

// By its address in shared memory.
template <typename T>
__device__ T& at_address(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// Neighbouring channels of a pixel in shared memory.
template <typename T, int kChannels>
__device__ void read_elements(uint32_t at, float (&x)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) x[c] = widen(at_address<T>(at + c * static_cast<int>(sizeof(T))));
}
template <typename T, int kChannels>
__device__ void read_pixel(uint32_t at, float (&x)[kChannels]) {
  if constexpr (kChannels == 1 || kChannels == 3) {
    read_elements<T>(at, x);
  } else if constexpr (sizeof(T) == 4) {
    const float2 both = at_address<float2>(at);
    x[0] = both.x, x[1] = both.y;
  } else {
    widen_pair(at_address<uint32_t>(at), x[0], x[1], T{});
  }
}

template <typename T, int kChannels>
__device__ void write_elements(char* to, const float (&x)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) reinterpret_cast<T*>(to)[c] = narrow<T>(x[c]);
}
template <typename T, int kChannels>
__device__ void write_pixel(char* to, const float (&x)[kChannels]) {
  if constexpr (kChannels == 1 || kChannels == 3)
    write_elements<T>(to, x);
  else if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  else
    *reinterpret_cast<Pair<T>*>(to) = narrow_pair(x[0], x[1], T{});
}

// Four neighbouring elements.
template <typename T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

template <typename T>
__device__ Four<T> narrow_four(float a, float b, float c, float d) {
  if constexpr (sizeof(T) == 4) {
    return make_float4(a, b, c, d);
  } else {
    const Pair<T> low = narrow_pair(a, b, T{}), high = narrow_pair(c, d, T{});
    return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }
}

// Pixels of three channels in shared memory, the first of which is the second one of four neighbouring elements.
template <typename T, int kPixels>
__device__ void read_fours(uint32_t at, float (&x)[kPixels][3]) {
#pragma unroll
  for (int i = 0; i < 3 * kPixels + 1; i += 4) {
    const Four<T> word = at_address<Four<T>>(at + (i - 1) * static_cast<int>(sizeof(T)));
    float four[4];
    if constexpr (sizeof(T) == 4)
      four[0] = word.x, four[1] = word.y, four[2] = word.z, four[3] = word.w;
    else
      widen_pair(word.x, four[0], four[1], T{}), widen_pair(word.y, four[2], four[3], T{});
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (const int k = i + j - 1; k >= 0 && k < 3 * kPixels) x[k / 3][k % 3] = four[j];
  }
}

// How a warp has a row of its strips in shared memory, side by side.
struct Stage {
  uint32_t strip, first;  // where the thread's strip lies, and the first element
  int before;             // outputs of the warp before that strip
  int begin, end;         // of the elements, those inside the image
};

// `x`: column of the target where the thread's strip begins; `live`: whether it has one.
template <typename T, class Tile>
__device__ Stage stage_of(const March& a, uint32_t thread, int x, bool live) {
  constexpr int kWidth = Tile::kStrip * Tile::kPair, kChannels = Tile::kChannels, kSize = sizeof(T);
  uint32_t strip = thread % 32;
  const int warp = static_cast<int>(thread / 32), lane = a.by_lanes.split(strip);
  const int pixel = kChannels == 3 ? 3 : a.lanes * kChannels;  // elements
  Stage s;
  s.before = live ? static_cast<int>(strip) * kWidth : 0;
  s.first = shared_address(kRing + a.ring_bytes + warp * a.stage_bytes);
  s.strip = s.first + (s.before * pixel + lane * kChannels) * kSize;
  x -= s.before;
  s.begin = max(-x, 0) * pixel;
  s.end = min(min(a.warp_strips, a.strips - warp * a.warp_strips) * kWidth, a.target_width - x) * pixel;
  return s;
}

// Stores a row of a warp's strips. Pixels of less than a sector of 32 bytes, written one by one, would write every
// sector several times. `pixels`: where the first strip begins in the target.
template <typename T, class Tile>
__device__ void store_staged(const March& a, const Stage& s, char* pixels, bool live,
                             const float (&values)[Tile::kStrip * Tile::kPair][Tile::kChannels]) {
  constexpr int kWidth = Tile::kStrip * Tile::kPair, kChannels = Tile::kChannels, kSize = sizeof(T);
  constexpr int kWord = kChannels == 3 ? 1 : kChannels, kWords = kWidth * kChannels / kWord;  // elements of a word
  using Word =
      std::conditional_t<kWord * kSize == 8, float2, std::conditional_t<kWord * kSize == 4, uint32_t, uint16_t>>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  __syncwarp();
  if constexpr (kChannels == 3) {
    if (live)
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        at_address<Four<T>>(s.strip + i * kSize) =
            narrow_four<T>(values[i / 3][i % 3], values[(i + 1) / 3][(i + 1) % 3], values[(i + 2) / 3][(i + 2) % 3],
                           values[(i + 3) / 3][(i + 3) % 3]);
  } else if (live) {
#pragma unroll
    for (int v = 0; v < kWidth; ++v)
      write_pixel<T>(&at_address<char>(s.strip + v * a.lanes * kChannels * kSize), values[v]);
  }
  __syncwarp();
  if (kChannels == 3 && a.fours) {
#pragma unroll
    for (int v = 0; v < kWords; v += 4)
      if (const int at = 32 * v + 4 * lane; at < s.end)
        *reinterpret_cast<Four<T>*>(pixels + at * kSize) = at_address<Four<T>>(s.first + at * kSize);
    return;
  }
#pragma unroll
  for (int v = 0; v < kWords; ++v)
    if (const int at = (32 * v + lane) * kWord; at >= s.begin && at < s.end)
      *reinterpret_cast<Word*>(pixels + at * kSize) = at_address<Word>(s.first + at * kSize);
}

// Waits for the others of so many threads of a block, whole warps.
__device__ inline void sync_warps(int threads) {
  __syncwarp();
  asm volatile("barrier.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}

// Lets them go on as for sync_warps, and does not wait.
__device__ inline void arrive_warps(int threads) {
  __syncwarp();
  asm volatile("barrier.arrive.aligned 1, %0;" ::"r"(threads) : "memory");
}

// Waits, too. Returns whether `value` is true for all of them.
__device__ inline bool all_of(int threads, bool value) {
  int all;
  __syncwarp();
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.s32 mine, %2, 0;\n"
      "barrier.red.and.pred.aligned all, 1, %1, mine;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}"
      : "=r"(all)
      : "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return all;
}

// A warp begins to store a row of so many pixels, `part` bytes of each, by bulk copies.
__device__ inline void store_row(const March& a, char* to, int from, int pitch, int columns, int part) {
  const int lane = threadIdx.x % 32;
  if (part == a.target_pixel_bytes) part *= columns, columns = 1;
#pragma unroll 1
  for (int i = lane; i < columns; i += 32)
    store_bulk(to + static_cast<int64_t>(i) * a.target_pixel_bytes, shared_address(from + i * pitch), part);
  commit_stores();
}

// The warp that loads prepares the barriers.
__device__ inline void init_barriers(int warps) {
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kGroups; ++i)
      init_barrier(Barriers::full(i), 1), init_barrier(Barriers::done(i), warps * kWarpArrivals),
          init_barrier(kCopiesBarrier + 8 * i, 1);
  if (threadIdx.x % 32 == 0) init_barrier(kTapsBarrier, 1);
  before_bulk_copies();
  __syncwarp();
}

// How rows come to shared memory: by all threads; by bulk copies; by those of shifted pixels; or by those of rows of
// pixels that fit no units.
enum class Way { kThreads, kBulk, kShifted, kJoined };

// Bulk copies the last warp begins, or the first one (see Tile::kLoading). The others then wait for each other only
// where rows of outputs leave by bulk copies, too.
template <typename T, class Tile, Way way>
__global__ void __launch_bounds__(way != Way::kThreads ? Tile::kBulkThreads : Tile::kMaxThreads, Tile::kBlocks)
    march_channels_last(const __grid_constant__ March a) {
  constexpr bool kBulk = way != Way::kThreads, kShifted = way == Way::kShifted;
  constexpr bool kJoined = way == Way::kJoined || (way == Way::kBulk && Tile::kBulkJoined);
#if __CUDA_ARCH__ < 900
  if constexpr (kBulk) return;
#endif
  constexpr int kChannels = Tile::kChannels, kFan = Tile::kFan, kStrip = Tile::kStrip, kLive = Tile::kLive;
  constexpr int kPair = Tile::kPair, kStep = Tile::kStep, kDilation = Tile::kDilation;
  constexpr int kRowDilation = Tile::kRowDilation;
  // Whether two channels may lie in no word: of the source, or of the target.
  constexpr bool kSplits = !kBulk && kChannels == 2 && !Tile::kTwins;
  constexpr bool kStages = !kBulk || kJoined;  // whether outputs of a warp may go by way of shared memory
  constexpr int kSize = sizeof(T), kWidth = kStrip * kPair, kTaps = Tile::kKernelH * Tile::kKernelW;

  uint32_t worker = blockIdx.x, strip = a.warp_strips ? threadIdx.x % 32 : threadIdx.x;
  const int slab = a.by_slabs.split(worker) * a.lanes;
  const int first_column = a.by_spans.split(worker) * a.strips * kStrip;
  const int begin = a.shares.begin(worker), end = a.shares.begin(worker + 1);
  int lane = a.by_lanes.split(strip);
  bool live = true;
  if (a.warp_strips) {
    live = strip < a.warp_strips;
    strip = threadIdx.x / 32 * a.warp_strips + (live ? strip : 0);
    live = live && strip < a.strips;
    if (!live) strip = threadIdx.x / 32 * a.warp_strips, lane = 0;
  }
  if (kBulk && threadIdx.x >= a.threads) live = false, strip = 0, lane = 0;
  live = live && (slab + lane) * kChannels < a.filters;
  if (!live) lane = 0;
  const int filter = (slab + lane) * kChannels;
  const auto source_of = [&](int target) {  // the first source channel of a filter
    uint32_t channel = target;
    a.by_fan_out.split(channel);
    return static_cast<int>(channel) * kFan;
  };
  const int slab_channel = source_of(slab * kChannels);
  const int source_column = first_column * kStep - a.lead_w;

  const int warps = (a.threads + 31) / 32;  // without the one that loads
  const int taps_at = kRing + a.ring_bytes + warps * a.stage_bytes + 2 * a.row_bytes,
            taps_shift = kShifted ? a.taps_shift : 0;
  using Bulk = std::conditional_t<Tile::kBoxes, BoxLoader, BulkLoader<kShifted>>;
  using Loader = std::conditional_t<kBulk, Bulk, RowLoader>;
  Feed<Tile, Loader> feed(a, slab_channel * kSize, source_column, begin, end);
  const bool loads = kBulk && (Tile::kLoading > 0 ? threadIdx.x >= 32 * warps : threadIdx.x < 32);
  const auto load_taps = [&] {
    if (!Tile::kBulkTaps || a.taps_bytes == 0) return;
    const int first = slab * kChannels * kFan * kTaps * kSize;
    const int bytes = min(a.lanes * kChannels, a.filters - slab * kChannels) * kFan * kTaps * kSize;
    const int head = kShifted ? min((kUnit - taps_shift) % kUnit, bytes) : 0, end = head + ((bytes - head) & -kUnit);
    const int lane = threadIdx.x % 32, to = taps_at + taps_shift;
    const char* from = a.taps + first;
    // Whole units by a bulk copy, what is before and behind them by the lanes.
    if (lane == 0 && head < end) {
      expect_bytes(kTapsBarrier, end - head);
      copy_bulk(shared_address(to + head), from + head, end - head, kTapsBarrier);
    }
    const int near = 2 * lane, far = end + 2 * lane;
    uint16_t low = 0, high = 0;
    if (near < head) low = *reinterpret_cast<const uint16_t*>(from + near);
    if (far < bytes) high = *reinterpret_cast<const uint16_t*>(from + far);
    if (near < head) shared<uint16_t>(to + near) = low;
    if (far < bytes) shared<uint16_t>(to + far) = high;
    __syncwarp();
    if (lane == 0) arrive(kTapsBarrier);
    __syncwarp();
  };
  // Whether the warp that loads clears what comes with rows of shifted pixels beside the image, or others mask it:
  // where rows take little time, or there is little to mask, that is less than others would wait.
  constexpr bool kClears = kShifted && Tile::kLoading > 0 && Tile::kFan == 1 && Tile::kKernelW > 1;
  const bool clears = kClears && a.source.row_runs;
  // Loads a group of rows, if there are more.
  const auto load_group = [&](uint32_t i) {
    if (!feed.find(a)) return false;
    const int stage = i % kGroups, barrier = clears ? kCopiesBarrier + 8 * stage : Barriers::full(stage);
    if (i >= kGroups) wait(Barriers::done(stage), (i / kGroups - 1) % 2);
    if constexpr (kBulk) feed.load(a, barrier);
    if (threadIdx.x % 32 == 0) arrive(barrier);
    return true;
  };
  // Clears what is beside a group when it is there, and hands it to the others.
  const auto clear_group = [&](uint32_t i) {
    const int stage = i % kGroups;
    wait(kCopiesBarrier + 8 * stage, i / kGroups % 2);
    if constexpr (kClears) feed.clear_beside(a, stage);
    before_bulk_copies();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(Barriers::full(stage));
  };
  if constexpr (kBulk) {
    if (loads) {
      if (Tile::kBoxes && threadIdx.x == 0) prefetch(a.map);
      init_barriers(warps);
      if (Tile::kLoading > 0) arrive_warps(blockDim.x);
      feed.find(a);
      settle_and_wait_for_kernel_before(a.group);
      let_next_kernel_start();
      load_taps();
      if (Tile::kLoading > 0) {
        // A group is waited for when the next but one is asked for: later, others would wait for it.
        constexpr uint32_t kBehind = 2;
        uint32_t i = 0;
        for (; load_group(i); ++i)
          if (clears && i >= kBehind) clear_group(i - kBehind);
        if (clears)
          for (uint32_t last = i > kBehind ? i - kBehind : 0; last < i; ++last) clear_group(last);
        return;
      }
      load_group(0), load_group(1);
    }
    if (!Tile::kBoxes && !a.source.joined)
      clear_columns(a.source, source_column, a.width, kRing, a.slot_bytes, a.ring_bytes, 32 * warps);
    sync_warps(blockDim.x);
    wait_for_kernel_before();
    let_next_kernel_start();
  } else {
    if (a.source.unit == kUnit) {
      clear_columns(a.source, source_column, a.width, kRing, a.slot_bytes, a.ring_bytes, blockDim.x);
    } else {
      clear_ring(a.source, source_column, a.width, kRing, a.ring_bytes);
      __syncthreads();
    }
    feed.find(a);
    settle_and_wait_for_kernel_before(a.group);
    let_next_kernel_start();
    for (int i = 0; i < kGroups - 1; ++i) feed.load(a), commit_copies();
  }

  float weight[kFan * kChannels][Tile::kKernelH][Tile::kKernelW] = {};
  float bias[kChannels] = {};
  bool finite = true;  // then a product with a zero is a zero
  const auto take_weights = [&](auto&& tap) {
#pragma unroll
    for (int c = 0; c < kFan * kChannels; ++c)
#pragma unroll
      for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kKernelW; ++j) weight[c][i][j] = widen(tap(c, i, j));
  };
  const bool bulk_taps = kBulk && Tile::kBulkTaps && a.taps_bytes > 0;
  if (bulk_taps) wait(kTapsBarrier, 0);
  if (live) {
    if (bulk_taps) {
      const bool backwards = a.weight_column < 0;
      const T* first = &shared<T>(taps_at + taps_shift) + lane * kChannels * kFan * kTaps + (backwards ? kTaps - 1 : 0);
      const int step = backwards ? -1 : 1;
      take_weights([&](int c, int i, int j) { return first[c * kTaps + (i * Tile::kKernelW + j) * step]; });
    } else {
      const T* first = static_cast<const T*>(a.weight) + filter * kFan * a.weight_filter;
      take_weights(
          [&](int c, int i, int j) { return first[c * a.weight_filter + i * a.weight_row + j * a.weight_column]; });
    }
    float zero = 0;
#pragma unroll
    for (int c = 0; c < kFan * kChannels; ++c)
#pragma unroll
      for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kKernelW; ++j) zero = fmaf(weight[c][i][j], 0.f, zero);
    finite = zero == 0.f;
    if (a.bias)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) bias[c] = widen(static_cast<const T*>(a.bias)[(filter + c) * a.bias_stride]);
  }

  // What has to be computed again is stored again, which nothing would order behind a bulk copy.
  bool rows_leave = false;
  if constexpr (kBulk && Tile::kLeaves) rows_leave = a.row_bytes > 0 && all_of(32 * warps, finite);

  // Sums of the rows of units under way, the oldest first. Rows of either parity have sums of their own where there is
  // dilation, if they are not images of their own, and so have both rows of a pair.
  constexpr int kSets = Tile::kSpread ? 2 : kRowDilation;
  float sum[kSets][kLive][kWidth][kChannels] = {};
  const auto begins = [&](int c) { return Tile::kSpread ? 0.f : bias[c]; };
  const auto clear = [&](int set) {
#pragma unroll
    for (int o = 0; o < kLive; ++o)
#pragma unroll
      for (int v = 0; v < kWidth; ++v)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[set][o][v][c] = begins(c);
  };
  const auto roll = [&](int set) {
#pragma unroll
    for (int o = 0; o < kLive; ++o)
#pragma unroll
      for (int v = 0; v < kWidth; ++v)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          sum[set][o][v][c] = o + 1 < kLive ? sum[set][o + 1][v][c] : begins(c);
          asm volatile("" : "+f"(sum[set][o][v][c]));  // or else other rows would wait for moves, too
        }
  };

  const int pitch = a.source.pitch;
  const uint32_t base = kept(shared_address(0));
  const bool first_lane = kept(threadIdx.x % 32) == 0;
  const uint32_t place = base + kRing + static_cast<int>(strip) * kStrip * kStep * pitch +
                         (source_of(filter) - slab_channel) * kSize + a.source.shift;
  int pitches[Tile::kColumns];
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j) {
    pitches[j] = j * pitch;
    // Opaque, so that each is added to a row's address, not one to the other: it pays where there is less to multiply.
    if constexpr (!Tile::kSkips) asm("" : "+r"(pitches[j]));
  }
  const int column = first_column + static_cast<int>(strip) * kStrip;
  const int x0 = column * kStep - a.lead_w;        // where the strip begins in the source
  const int target_x = column * kPair - a.skew_w;  // and in the target
  const bool inside = x0 >= 0 && x0 + Tile::kColumns <= a.width;
  bool inner = (kBulk && !kJoined) || !a.source.joined || inside;  // or else it has to mask
  if constexpr (kShifted) {
    // What is of other pixels before the row and behind it: what a unit has before a channel's place, or behind.
    const int before = (source_of(filter) + kChannels * kFan) * kSize + a.source.shift - a.source.bytes;
    const int behind = kUnit - a.source.shift - source_of(filter) * kSize;
    inner =
        kClears || !a.source.row_runs || ((x0 >= 0 || before <= 0) && (x0 + Tile::kColumns <= a.width || behind <= 0));
  }
  const uint32_t phases =
      a.source.joined || a.source.apart ? kUnit - 1 : 0;  // how far behind its place a row may begin: see phase_of
  const bool whole = live && target_x >= 0 && target_x + kWidth <= a.target_width;
  // Rows of outputs that leave together, as far as they lie inside the image.
  const int row_pitch = a.lanes * kChannels * kSize;
  const int row_place = static_cast<int>(strip) * kWidth * row_pitch + lane * kChannels * kSize;
  const int row_x = first_column * kPair - a.skew_w;
  const int row_before = max(-row_x, 0);
  const int row_columns = min(a.strips * kWidth, a.target_width - row_x) - row_before;
  const int64_t row_offset =  // of the thread's pixels in the row
      (static_cast<int64_t>(strip) * kWidth - row_before) * a.target_pixel_bytes + lane * kChannels * kSize;
  const int row_part = min(row_pitch, (a.filters - slab * kChannels) * kSize);
  Stage stage{};
  if (kStages && a.warp_strips) {
    stage = stage_of<T, Tile>(a, threadIdx.x, target_x, live);
    if constexpr (kChannels == 3)
      stage.strip = kept(stage.strip), stage.first = kept(stage.first), stage.end = kept(stage.end);
  }
  int slot = 0, fresh = 0;            // the next row in the ring; how many rows of its group are left
  uint32_t groups = 0;                // that have been waited for
  int buffer = kRing + a.ring_bytes;  // for the next row of outputs
  for (int at = begin; at < end;) {
    const Run t = run_of<Tile>(a, at, end);
    const int count = t.end - t.begin;
    const Image image = image_of<Tile>(a, t.image);
    char* to = a.target + (image.target + (t.begin * kPair - a.skew_h) * a.target_row_bytes +
                           static_cast<int64_t>(target_x - stage.before) * a.target_pixel_bytes +
                           (kStages && a.warp_strips ? 0 : filter * kSize));

    const auto store = [&](int y, const float (&values)[kWidth][kChannels]) {
      char* pixel = to;
      to += a.target_row_bytes;
      if ((Tile::kSpread || Tile::kHalves) && static_cast<uint32_t>(y) >= static_cast<uint32_t>(image.target_height))
        return;
      if (kBulk && Tile::kLeaves && rows_leave) {
        // Two buffers: the first warp sees to it that the other one is free before anybody may go on to it.
        if (live)
#pragma unroll
          for (int v = 0; v < kWidth; ++v) write_pixel<T>(&shared<char>(buffer + row_place + v * row_pitch), values[v]);
        before_bulk_copies();
        if (threadIdx.x < 32) wait_stores();
        sync_warps(32 * warps);
        if (threadIdx.x < 32)
          store_row(a, pixel - row_offset, buffer + row_before * row_pitch, row_pitch, row_columns, row_part);
        buffer = buffer == kRing + a.ring_bytes ? buffer + a.row_bytes : kRing + a.ring_bytes;
        return;
      }
      if (kStages && a.warp_strips) {
        if constexpr (kChannels != 3) {  // worked out for every row: not worth registers of all kernels
          uint32_t thread;
          asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
          stage = stage_of<T, Tile>(a, thread, target_x, live);
        }
        store_staged<T, Tile>(a, stage, pixel, live, values);
      } else if (whole && kSplits && a.split_stores) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v, pixel += a.target_pixel_bytes) write_elements<T>(pixel, values[v]);
      } else if (whole) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v, pixel += a.target_pixel_bytes) write_pixel<T>(pixel, values[v]);
      } else if (live) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v, pixel += a.target_pixel_bytes)
          if (static_cast<uint32_t>(target_x + v) < static_cast<uint32_t>(a.target_width)) {
            if (kSplits && a.split_stores)
              write_elements<T>(pixel, values[v]);
            else
              write_pixel<T>(pixel, values[v]);
          }
      }
    };

    // Rows above the image leave the sums as they begin, and there are outputs to store when all are under way.
    const int first_row = t.begin * kStep - image.lead_h;
    const int above = min((t.row - first_row) / Tile::kRowsPerStep, kLive - 1);
    if (above > 0)
#pragma unroll
      for (int set = 0; set < kSets; ++set) clear(set);
    uint32_t lies = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(a.source.base)) +
                    static_cast<uint32_t>(image.source) + t.row * static_cast<uint32_t>(a.source.row_bytes) +
                    source_column * a.source.pixel_bytes + slab_channel * kSize;
    // The next row, counted from the first one inside the image: a number that changes is not worked out again for
    // every row.
    int next = first_row + above * Tile::kRowsPerStep - t.row;
    const uint32_t inside = max(t.row_end - t.row, 0), outputs = count;
    for (int done = (above - (kLive - 1)) * kRowDilation; done < count; done += kRowDilation) {
#pragma unroll
      for (int u = 0; u < Tile::kRowsPerStep; ++u) {
        const int set = kStep == 1 ? u : 0;  // not spread
        if (static_cast<uint32_t>(next++) < inside) {
          if (fresh == 0) {
            if (slot == a.ring_bytes) slot = 0;
            if constexpr (kBulk) {
              arrive_together_at(base + Barriers::done((groups - 1) % kGroups), first_lane, groups > 0);
              wait_at(base + Barriers::full(groups % kGroups), groups / kGroups % 2);
              ++groups;
              if (Tile::kLoading == 0 && loads) load_group(groups + 1);
            } else {
              wait_copies<kGroups - 2>();
              __syncthreads();
              feed.load(a);
              commit_copies();
            }
            fresh = a.group;
          }
          --fresh;
          uint32_t from = place + slot;
          if (!kBulk || kJoined) from += lies & phases, lies += static_cast<uint32_t>(a.source.row_bytes);
          slot += a.slot_bytes;
          // The row of units whose sums are the oldest, and whether those of others are ever stored.
          const int oldest = done + (kStep == 1 ? u : 0);
          const auto wanted = [&](int o) {
            return static_cast<uint32_t>(oldest + o * kRowDilation) < static_cast<uint32_t>(count);
          };
          const bool all_wanted = !Tile::kSkips || (wanted(0) && wanted(kLive - 1));
          const auto read = [&](int q, float (&x)[Tile::kColumns][kChannels]) {
            if constexpr (Tile::kSkips) asm volatile("" ::: "memory");  // each of two ways reads as it multiplies
            bool have = false;
            if constexpr (kChannels == 3)
              if (a.fours) read_fours<T>(from, x), have = true;
            if (!have)
#pragma unroll
              for (int j = 0; j < Tile::kColumns; ++j)
                if constexpr (Tile::kTwins) {
                  float both[1];
                  read_pixel<T>(from + pitches[j], both);
                  x[j][0] = x[j][1] = both[0];
                } else if constexpr (kShifted && kChannels == 2) {
                  read_elements<T>(from + pitches[j], x[j]);
                } else if constexpr (kSplits) {
                  if (a.split)
                    read_elements<T>(from + pitches[j], x[j]);
                  else
                    read_pixel<T>(from + pitches[j], x[j]);
                } else {
                  read_pixel<T>(from + pitches[j] + q * kSize, x[j]);
                }
            if (!inner)
#pragma unroll
              for (int j = 0; j < Tile::kColumns; ++j)
                if (static_cast<uint32_t>(x0 + j) >= static_cast<uint32_t>(a.width))
#pragma unroll
                  for (int c = 0; c < kChannels; ++c) x[j][c] = 0;
          };
#pragma unroll
          for (int q = 0; q < kFan; ++q) {
            const auto add = [&](const float (&x)[Tile::kColumns][kChannels], int s, int o, int v, int i, int j, int at,
                                 bool first) {
#pragma unroll
              for (int c = 0; c < kChannels; ++c) {
                const bool youngest = Tile::kSpread ? i + 2 >= Tile::kKernelH : o + 1 == kLive;
                const float before = !first || q > 0 ? sum[s][o][v][c] : youngest ? begins(c) : sum[s][o + 1][v][c];
                sum[s][o][v][c] = fmaf(x[at][c], weight[kFan > 1 ? q : c][i][j], before);
              }
            };
            // A column of taps in a row of units under way.
            const auto add_column = [&](const float (&x)[Tile::kColumns][kChannels], int o, int j) {
              const int i = (kLive - 1 - o) * kStep + (kStep == 1 ? 0 : u);
              if (i >= Tile::kKernelH) return;
#pragma unroll
              for (int v = 0; v < kStrip; ++v)
                add(x, set, o, v, i, j, v * kStep + j * kDilation, j == 0 && (kStep == 1 || u == 0));
            };
            if (all_wanted) {
              float x[Tile::kColumns][kChannels];
              read(q, x);
              if constexpr (Tile::kSpread) {
#pragma unroll
                for (int j = 0; j < Tile::kKernelW; ++j)
#pragma unroll
                  for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
                    for (int v = 0; v < kStrip; ++v)
                      add(x, i % 2, i / 2, 2 * v + j % 2, i, j, v + (Tile::kExtentW - 1) - j / 2, j < 2);
              } else {
#pragma unroll
                for (int j = 0; j < Tile::kKernelW; ++j)
#pragma unroll
                  for (int o = 0; o < kLive; ++o) add_column(x, o, j);
              }
            } else if constexpr (Tile::kSkips) {
              float x[Tile::kColumns][kChannels];
              read(q, x);
#pragma unroll
              for (int o = 0; o < kLive; ++o)
                if (wanted(o))
#pragma unroll
                  for (int j = 0; j < Tile::kKernelW; ++j) add_column(x, o, j);
            }
          }
        } else if (kStep == 1 || u == 0) {
          roll(set);
          if (Tile::kSpread) roll(1);
        }
        if (kStep > 1 && u > 0) continue;
        if (static_cast<uint32_t>(done + u) >= outputs) continue;
#pragma unroll
        for (int e = 0; e < kPair; ++e) store((t.begin + done) * kPair + e - a.skew_h, sum[kPair > 1 ? e : set][0]);
      }
    }
    at += count;
  }
  if (kBulk && Tile::kLeaves && rows_leave && threadIdx.x < 32) wait_stores();
  if (live && !finite)
    for (int c = 0; c < kChannels; ++c) strip_by_taps<T, Tile>(a, begin, end, filter + c, column);
}

// How the rows of a slab and a span are shared: see March.
struct Deal {
  int workers = 1, grain = 1;
};

// How a pass is cut: see March.
struct Cut {
  int lanes, strips, group;
  Deal deal;
};

// What there is to know of a class of tiles.
struct TileSize {
  int kernel_h, kernel_w, channels, fan, pair, step, strip, live, extent_h, extent_w;
  bool leaves, skips, bulk_joined, halves, boxes, shifts;
  int loading;                    // threads for that alone where rows come by bulk copies
  int threads_per_block[2];       // at most, where rows come without bulk copies and with them
  int registers[2] = {128, 128};  // of a thread
};

// Fills in how rows are shared.
void take(March& a, const Deal& deal) {
  a.workers = deal.workers, a.shares = Shares(a.all_units, deal.workers, a.all_units / a.units, deal.grain);
}

// Fills in what follows from a cut.
void apply(March& a, const Cut& cut, const TileSize& tile, int64_t element) {
  a.lanes = cut.lanes, a.strips = cut.strips, a.group = cut.group;
  take(a, cut.deal);
  const int64_t units_w = ceil_div(a.target_width + a.skew_w, tile.pair);
  a.by_lanes = Divider(cut.lanes), a.by_slabs = Divider(ceil_div(a.filters, cut.lanes * tile.channels));
  a.by_spans = Divider(ceil_div(units_w, cut.strips * tile.strip));
  a.by_units = Divider(a.units), a.by_fan_out = Divider(a.fan_out);
  const int pixel_bytes = static_cast<int>(cut.lanes * tile.channels * element);
  const int64_t part = std::min<int64_t>(cut.lanes * tile.channels, a.filters) * element;
  const bool split = tile.channels == 2 && (a.split || a.split_stores), shifted = a.source.shift > 0;
  const bool narrow =
      pixel_bytes < 32 && !split && a.target_pixel_bytes == pixel_bytes && a.filters == cut.lanes * tile.channels;
  a.warp_strips = narrow ? 32 / cut.lanes : 0;
  a.threads = narrow ? static_cast<int>(ceil_div(cut.strips, a.warp_strips)) * 32 : cut.lanes * cut.strips;
  const int64_t source_part = part * a.fan_in / a.fan_out;
  a.source.row_runs = a.bulk && tile.shifts && shifted && source_part == a.source.bytes && !narrow && !a.split_stores;
  // Slabs of pixels that are no whole units, where a block has too few threads for all channels.
  constexpr int kLeastApart = 256;
  const int room = tile.threads_per_block[a.bulk] - (a.bulk ? tile.loading : 0);
  const bool apart = a.bulk && tile.bulk_joined && tile.channels < 3 && a.source.joined &&
                     a.filters > room * tile.channels && source_part >= kLeastApart;
  cut_pixels(a.source, source_part, (cut.strips * tile.strip - 1) * tile.step + tile.extent_w, a.threads, apart);
  // A bulk copy of less than some 500 bytes takes longer than its bytes do; but where a row of outputs takes two rows,
  // other copies take as many instructions as the products do.
  const int least = tile.boxes ? kUnit : tile.step > 1 ? 384 : 512;
  const auto pays = [&](int64_t bytes, int64_t pixel) { return bytes == pixel || bytes >= least; };
  if (shifted)
    a.bulk = a.bulk && tile.shifts && !narrow && !a.split_stores;
  else
    a.bulk = a.bulk && !split;
  a.bulk = a.bulk && (a.source.joined  ? tile.bulk_joined
                      : a.source.apart ? true
                                       : a.source.unit == kUnit && pays(a.source.slab_bytes, a.source.pixel_bytes));
  if (tile.boxes)
    a.bulk = a.bulk && a.source.slab_bytes % kUnit == 0 && a.source.slab_bytes <= kMostBoxSide * element &&
             a.source.columns <= kMostBoxSide;
  a.slot_bytes = a.source.ring_row_bytes();
  if (tile.boxes && a.bulk) a.slot_bytes = static_cast<int>(round_up(a.slot_bytes, kBoxUnit));
  a.ring_bytes = kGroups * cut.group * a.slot_bytes;
  const int row_bytes = static_cast<int>(round_up(cut.strips * tile.strip * tile.pair * pixel_bytes, kUnit));
  const bool leaves = tile.leaves && a.bulk && a.wide && pixel_bytes % kUnit == 0 && pays(part, a.target_pixel_bytes);
  a.row_bytes = leaves ? row_bytes : 0;
  if (leaves) a.warp_strips = 0, a.threads = cut.lanes * cut.strips;
  a.bulk = a.bulk && (a.warp_strips == 0 || a.source.joined);
  a.stage_bytes = static_cast<int>(round_up(a.warp_strips * tile.strip * tile.pair * pixel_bytes, kUnit));
}

// Threads of a block, and bytes of shared memory.
int threads_of(const March& a, const TileSize& tile) {
  return a.bulk ? static_cast<int>(round_up(a.threads, 32)) + tile.loading : a.threads;
}
int shared_bytes(const March& a) {
  return kRing + a.ring_bytes + a.threads / 32 * a.stage_bytes + 2 * a.row_bytes + a.taps_bytes;
}

// Blocks that fit a multiprocessor, none if a cut is not possible.
int64_t resident_blocks(const March& a, const TileSize& tile, const Device& d) {
  if (threads_of(a, tile) > tile.threads_per_block[a.bulk] || shared_bytes(a) > d.shared_per_block) return 0;
  if (!a.bulk && !a.source.joined && a.source.units > a.threads) return 0;
  // Each scheduler has the registers of whole warps. The estimate of the other tiles was fitted without that.
  const int64_t warps = ceil_div(threads_of(a, tile), 32), registers = round_up(tile.registers[a.bulk], 8);
  const bool schedulers = tile.skips || tile.loading == 0;
  const int64_t most = schedulers ? 4 * ((16 << 10) / (32 * registers)) : (64 << 10) / (32 * registers);
  return std::min<int64_t>({d.shared_per_multiprocessor / (shared_bytes(a) + 1024), most / warps, 64 / warps, 32});
}

// Calls visit(Deal) with the ways to share rows, where `resident` blocks fit a multiprocessor: as many even shares as
// blocks run at once, or so many of whole images; bands of images, more than run at once.
template <typename Visit>
void for_each_deal(const March& a, const TileSize& tile, int64_t resident, const Device& d, Visit&& visit) {
  const int64_t parts = int64_t{a.by_slabs.divisor} * a.by_spans.divisor, images = a.all_units / a.units;
  const int64_t most = std::max<int64_t>(resident * d.multiprocessors / parts, 1);
  visit(Deal{static_cast<int>(std::min<int64_t>(most, a.all_units)), 1});
  // Whole images, if no multiprocessor then has far more of them than others.
  const int64_t whole = ceil_div(images, ceil_div(images, most)), blocks = whole * parts;
  if (4 * round_up(blocks, d.multiprocessors) <= 5 * blocks || blocks <= d.multiprocessors)
    visit(Deal{static_cast<int>(whole), a.units});
  // Three times as many rows as two bands need both; twice, where no columns are read twice, too.
  const double times = tile.extent_w == 1 ? 2 : 3;
  const double least = std::max(3., times * (tile.extent_h - tile.step) / tile.step);
  for (int64_t bands = 1; bands * least <= a.units; bands *= 2)
    if (images * bands > most) visit(Deal{static_cast<int>(images * bands), 1});
}

// What a block has to do that has the largest share of the rows.
struct Work {
  double rows, rolls;         // that are multiplied, and that are not; counted as units
  double units;               // of the target
  double source_rows, again;  // that are loaded; and more of them, which another share loads, too
};

Work work_of(const March& a, const TileSize& tile) {
  const int grain = a.shares.grain;
  const double units = static_cast<double>(ceil_div(a.all_units / grain, a.workers) * grain);
  // Even shares begin and end within an image, if they do not happen to be of whole ones.
  const int share = a.all_units / a.workers;
  const bool aligned = grain > 1 || (a.all_units % a.workers == 0 && (share % a.units == 0 || a.units % share == 0));
  const double images = aligned ? std::max(units / a.units, 1.) : units / a.units + 1;
  const double most = std::max(images, units / a.units) * a.height, own = std::min(units * tile.step, most);
  const double again = std::min(units * tile.step + images * (tile.extent_h - tile.step), most) - own;
  return {units + again / tile.step, images * (tile.live - 1), units, own, again};
}

// Estimates how long a cut takes, in nanoseconds, from what instructions, memory and latency cost. The numbers are
// fitted to 2,400 timings of cuts on an H100, with each of the three felt beside the others.
double time_of(const March& a, const TileSize& tile, int64_t element, int64_t resident, const Device& d) {
  const Work work = work_of(a, tile);
  const double multiprocessors = d.multiprocessors;
  const double parts = static_cast<double>(a.by_slabs.divisor) * a.by_spans.divisor;
  const double grid = parts * a.workers, places = static_cast<double>(resident) * multiprocessors;
  const double waves = std::max(grid / places, 1.);
  const bool many = grid > places;  // blocks begin as others end

  const double warps = std::ceil(a.threads / 32.), unpack = element == 2;
  const double outputs = tile.strip * tile.pair * tile.pair * tile.channels;
  const double columns = (tile.strip - 1) * tile.step + tile.extent_w;
  const double load = a.bulk ? 0 : 140 + 131 * a.slot_bytes / (a.threads * (a.source.joined ? kUnit : a.source.unit));
  const double products = tile.kernel_h * tile.kernel_w * tile.strip * tile.channels * tile.fan;
  const double row = products + tile.step * (20 + load) +
                     tile.step * tile.fan * columns * (2 + 0.57 * unpack * tile.channels) +
                     outputs / tile.channels * unpack;
  const double roll = 0.43 * tile.live * outputs + 15;
  const double skipped = tile.skips ? 0.5 * (work.rows - work.units) * products : 0;
  const double blocks = many ? grid / multiprocessors : std::ceil(grid / multiprocessors);  // of a multiprocessor
  // Where much is multiplied, the scheduler with the most warps of a block ends last.
  const double uneven = tile.skips ? std::ceil(warps / 4) * 4 / warps : 1;
  const double instructions = uneven * blocks * warps * (2675 + work.rows * row + work.rolls * roll - skipped) / 9.9;

  const double pixel = a.source.bytes, outer = (a.by_spans.divisor - 1.) * std::max(tile.extent_w - tile.step, 0);
  const double in = pixel * a.width * work.source_rows * a.workers;
  const double out = static_cast<double>(a.all_units / a.units) * a.target_height * a.target_width * a.filters *
                     element / (tile.halves ? 2 : 1);
  const double again = pixel * a.width * work.again * a.workers;
  const double beside = pixel * outer * (work.source_rows + work.again) * a.workers;
  double bytes = in + out + 0.012 * again + (tile.skips ? 0.3 : 0.88) * beside;
  if (tile.skips && a.bulk && !tile.boxes && a.by_slabs.divisor > 1) bytes *= 1.05;  // a copy for each pixel
  if (a.by_slabs.divisor > 1 && a.source.slab_bytes < 128) bytes *= 1 + 0.1 * (128 - a.source.slab_bytes) / 128;
  const double on_the_way = std::min(grid, places) / multiprocessors * (kGroups - 1) * a.group * a.slot_bytes;
  // The more pages of memory are in use at a time, the slower it gets: blocks side by side had better be neighbours.
  constexpr double kPage = 2 << 20;
  const double pages = std::min<double>(a.workers, places / parts) * std::min((in + out) / a.workers / kPage, 2.);
  const double memory =
      bytes / 4217 * (1 + 0.111 * std::pow(34e3 / on_the_way, 2)) * (1 + 0.371 * pages / (pages + 37));

  const double columns_inside = std::min(a.source.columns, a.width);
  const double copying = a.source.apart ? 20 * blocks * (work.source_rows + work.again) * columns_inside : 0;
  const double waits = tile.step * (56 + 315. / a.group);  // for the source rows of a unit
  const double rounds = std::ceil(waves - 0.05);           // of blocks, one after the other
  const double latency = rounds * (3413 + ((work.rows + work.rolls) * (0.98 * row + waits) - 0.98 * skipped) / 1.75);
  // Multiprocessors that all have as much to do wait for those that get the least of memory's bandwidth, and others for
  // the blocks that end last, or for each block's first rows, if there is no other block meanwhile.
  const double tail = !many ? 0 : 0.237 / waves + (resident == 1 ? 0.179 : 0);
  const auto fourth = [](double x) { return x * x * x * x; };
  return 1680. * a.group / tile.step +
         std::sqrt(std::sqrt(fourth(instructions * (1 + tail)) + fourth(memory * (1 + (many ? tail : 0.184))) +
                             fourth(latency) + fourth(copying)));
}

Cut cut_for(const March& whole, const TileSize& tile, int64_t element, const Device& d) {
  const int64_t all = ceil_div(whole.filters, tile.channels);
  const int64_t strips_w = ceil_div(ceil_div(whole.target_width + whole.skew_w, tile.pair), tile.strip);
  const int room = tile.threads_per_block[whole.bulk] - (whole.bulk ? tile.loading : 0);
  // Slabs begin at a multiple of 16 bytes in both arrays, and with the first filter of a channel.
  const int64_t granule =
      std::lcm(std::max<int64_t>(kUnit * whole.fan_out / (element * tile.channels), 1), whole.fan_out);
  constexpr int kFewThreads = 64;  // fewer were never timed: only where there is nothing else
  Cut best{};
  double best_time = std::numeric_limits<double>::infinity();
  int64_t before = 0;
  for (int64_t slabs = 1; slabs <= all; ++slabs) {
    const int64_t lanes = slabs == 1 ? all : round_up(ceil_div(all, slabs), granule);
    if (lanes > room || lanes == before) continue;
    if (lanes < 16 && slabs > 1 && best.lanes > 0) break;
    before = lanes;
    for (int64_t strips = 1; strips <= std::min(room / lanes, std::max<int64_t>(strips_w, 2)); ++strips) {
      // As few strips as make so many spans.
      if (strips > 1 && strips < strips_w && ceil_div(strips_w, strips) == ceil_div(strips_w, strips - 1)) continue;
      for (const int group : {1, 2, 3}) {
        March a = whole;
        apply(a, {static_cast<int>(lanes), static_cast<int>(strips), group}, tile, element);
        const int64_t resident = resident_blocks(a, tile, d);
        if (resident == 0) continue;
        const bool few = a.threads < kFewThreads && a.warp_strips == 0;
        for_each_deal(a, tile, resident, d, [&](const Deal& deal) {
          take(a, deal);
          const double time = time_of(a, tile, element, resident, d) * (few ? 4 : 1);
          if (time < best_time * 0.995) best_time = time, best = {a.lanes, a.strips, group, deal};
        });
      }
    }
  }
  if (best.lanes == 0) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  return best;
}

template <typename T, class Tile>
void launch(March a, cudaStream_t stream) {
  if (Tile::kHalves) {
    a.rows = a.height, a.height = (a.height + 1) / 2;
    a.source.row_bytes *= 2, a.target_row_bytes *= 2;
    const int images = a.all_units / a.units;
    a.units = (a.units + 1) / 2, a.all_units = 2 * images * a.units;
  }
  constexpr bool kJoins = Tile::kBulkJoined || Tile::kJoins;
  constexpr TileSize kTile{Tile::kKernelH, Tile::kKernelW, Tile::kChannels,
                           Tile::kFan,     Tile::kPair,    Tile::kStep,
                           Tile::kStrip,   Tile::kLive,    Tile::kExtentH,
                           Tile::kExtentW, Tile::kLeaves,  Tile::kSkips,
                           kJoins,         Tile::kHalves,  Tile::kBoxes,
                           Tile::kShifts,  Tile::kLoading, {Tile::kMaxThreads, Tile::kBulkThreads}};
  const Device& device = current_device();
  const bool shifted = Tile::kShifts && a.source.shift > 0, joined = Tile::kJoins && a.source.joined;
  const auto kernel_for = [&](bool bulk) {
    constexpr Way kBulk = Tile::kBulk ? Way::kBulk : Way::kThreads, kShifted = Tile::kShifts ? Way::kShifted : kBulk;
    if (!bulk) return march_channels_last<T, Tile, Way::kThreads>;
    constexpr Way kJoined = Tile::kJoins ? Way::kJoined : kBulk;
    if (joined) return march_channels_last<T, Tile, kJoined>;
    return shifted ? march_channels_last<T, Tile, kShifted> : march_channels_last<T, Tile, kBulk>;
  };
  struct Decision {
    Cut cut;
    bool bulk;
    int registers;
  };
  // Steps that are never taken may be anything.
  constexpr int element = sizeof(T);
  const int64_t images = a.all_units / a.units, row = a.height > 1 ? a.source.row_bytes : a.source.pixel_bytes;
  const std::array<int64_t, 3> steps = {a.source.pixel_bytes, row, images > 1 ? a.source.image_bytes : row};
  const auto describe = [&](const std::array<int, 4>& box) {
    return describe_boxes(a.map, const_cast<char*>(a.source.base), element,
                          {a.source.bytes / element, a.width, a.height, images}, steps, box);
  };
  const bool boxes =
      !Tile::kBoxes || (a.source.unit == kUnit && a.source.shift == 0 && describe({kUnit / element, 1, 1, 1}));
  static thread_local Decisions<15, Decision> decisions;
  const Decision& decision = decisions(
      {device.id, a.all_units, a.units, a.filters, a.fan_out, a.height, a.width, a.target_width, a.lead_w,
       a.source.shift > 0 ? 2 * kUnit : a.source.unit, a.source.joined + 2 * a.split + 4 * a.split_stores,
       a.source.pixel_bytes, a.target_pixel_bytes, a.wide, boxes},
      [&] {
        March now = a;
        TileSize tile = kTile;
        for (const bool bulk : {false, true}) {
          cudaFuncAttributes attributes{};
          cudaFuncGetAttributes(&attributes, kernel_for(bulk));
          // The estimate was fitted to some 128 registers where a thread has several channels of many taps.
          constexpr int kFew = 96, kFitted = 128;
          const bool fitted = Tile::kChannels > 1 && Tile::kDilation == 1 && attributes.numRegs > kFew;
          tile.registers[bulk] = std::max(attributes.numRegs, fitted ? kFitted : 32);
          // The code at hand may be of an architecture before the device's.
          now.bulk = (Tile::kBulk || joined) && boxes && device.capability >= 90 && attributes.ptxVersion >= 90;
        }
        const Decision made{cut_for(now, tile, sizeof(T), device), now.bulk, tile.registers[1]};
        apply(now, made.cut, tile, sizeof(T));
        cudaFuncSetAttribute(kernel_for(now.bulk), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.shared_per_block);
        return made;
      });
  a.bulk = decision.bulk;
  apply(a, decision.cut, kTile, sizeof(T));
  if (Tile::kBoxes && a.bulk && !describe({a.source.slab_bytes / element, a.source.columns, 1, 1}))
    throw std::runtime_error("dwconv: CUDA cannot describe boxes of pixels");
  if (Tile::kBulkTaps && a.bulk && a.taps && (shifted || a.taps_shift == 0)) {
    TileSize tile = kTile;
    tile.registers[1] = decision.registers;
    const int64_t resident = resident_blocks(a, tile, device);
    const int filters = a.lanes * Tile::kChannels, taps = Tile::kFan * Tile::kKernelH * Tile::kKernelW;
    a.taps_bytes = static_cast<int>(round_up(filters * taps * sizeof(T) + a.taps_shift, kUnit));
    if (resident_blocks(a, tile, device) < resident) a.taps_bytes = 0;
  }
  const int64_t blocks = int64_t{a.by_slabs.divisor} * a.by_spans.divisor * a.workers;
  launch_early<March>(kernel_for(a.bulk), a, blocks, threads_of(a, kTile), stream, {.shared_bytes = shared_bytes(a)});
  check_launch("march_channels_last");
}

March march_of(const Problem& p) {
  const Mapping map(p);
  const int64_t element = size_of(p.dtype);
  March a{};
  a.height = map.height, a.width = map.width;
  a.source = pixels_of(map.source, element, map.sources, a.height, a.width, p.batch);
  a.target = static_cast<char*>(map.target.data);
  a.target_image_bytes = map.target.stride[0] * element, a.target_row_bytes = map.target.stride[2] * element;
  a.target_pixel_bytes = static_cast<int>(map.target.stride[3] * element);
  a.target_height = map.out_height, a.target_width = map.out_width, a.filters = map.targets;
  a.weight = map.weight.data, a.weight_filter = map.weight.stride[0];
  a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  // Forwards, or backwards from the last one.
  const int64_t taps = p.kernel_h * p.kernel_w;
  const bool backwards = a.weight_column < 0;
  const char* first = static_cast<const char*>(a.weight) - (backwards ? (taps - 1) * element : 0);
  const bool side_by_side = a.weight_column == (backwards ? -1 : 1) && a.weight_row == p.kernel_w * a.weight_column &&
                            a.weight_filter == taps;
  constexpr int64_t kMost = (int64_t{1} << 31) - kUnit;  // bytes
  if (side_by_side && int64_t{map.targets} * map.fan_in * taps * element <= kMost)
    a.taps = first, a.taps_shift = static_cast<int>(reinterpret_cast<uintptr_t>(first) % kUnit);
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.fan_out = map.fan_out, a.fan_in = map.fan_in;
  a.padding_h = a.lead_h = map.padding_h, a.padding_w = a.lead_w = map.padding_w;
  a.units = a.target_height;
  if (map.spread) {
    a.skew_h = a.padding_h % 2, a.skew_w = a.padding_w % 2;
    a.lead_h = static_cast<int>(p.kernel_h - 1) / 2 - a.padding_h / 2;
    a.lead_w = static_cast<int>(p.kernel_w - 1) / 2 - a.padding_w / 2;
    a.units = (a.target_height + a.skew_h + 1) / 2;
  }
  a.all_units = static_cast<int>(p.batch) * a.units;
  // Two channels of a thread lie in one word of either array.
  const int64_t pair = 2 * element;
  const int unit = alignment_of(map.target, element, map.targets, a.target_height, a.target_width, p.batch);
  const bool words = a.source.unit >= pair && a.source.shift % pair == 0;
  const bool splits = p.multiplier == 1 && a.source.unit == kUnit;
  a.split = splits && !words, a.split_stores = splits && unit < pair;
  a.pairs = p.multiplier == 1 && ((words || a.split) && (unit >= pair || a.split_stores));
  a.twins = map.fan_out == 2 && unit >= pair;
  a.wide = unit == kUnit;
  const uint64_t rows = reinterpret_cast<uintptr_t>(a.target) | (a.target_height > 1 ? a.target_row_bytes : 0) |
                        (p.batch > 1 ? a.target_image_bytes : 0);
  const bool reads_fours = reinterpret_cast<uintptr_t>(a.source.base) % (4 * element) == 0;
  a.fours = map.targets == 3 && a.lead_w == 1 && a.source.joined && reads_fours && a.width % 4 == 0 &&
            a.target_width % 4 == 0 && a.target_pixel_bytes == 3 * element && rows % (4 * element) == 0;
  return a;
}

template <typename T>
using Kernels = std::conditional_t<std::is_same_v<T, float>,
                                   decltype(std::tuple_cat(SmallKernels{}, std::tuple<March9x9>{})), SmallKernels>;

template <typename T, class Kernel, bool kSpread>
void launch_kernel(const March& a, cudaStream_t stream) {
  constexpr bool kSums = Kernel::kSquare && Kernel::kKernelH > 1 && Kernel::kKernelH <= 7 && Kernel::kDilation == 1 &&
                         kSpread == (Kernel::kStride > 1);
  if constexpr (kSums)
    if (a.fan_in > 1) return launch<T, Tile<Kernel, kSpread, 1, 2>>(a, stream);
  if constexpr (Kernel::kKernelH == 3 && Kernel::kDilation == 1 && !kSpread)
    if (a.twins) return launch<T, Tile<Kernel, kSpread, 2, 1, true>>(a, stream);
  if constexpr (Kernel::kKernelH == 3 && Kernel::kStride == 1 && Kernel::kDilation == 1)
    if (a.filters == 3 && a.fan_in == 1 && a.fan_out == 1) return launch<T, Tile<Kernel, false, 3, 1>>(a, stream);
  // Fewer sums of a thread pay where memory is not all that counts.
  constexpr bool kHalves = Kernel::kDilation == 2 && sizeof(T) == 2;
  if constexpr (Kernel::kKernelH <= 3)
    if (a.pairs) return launch<T, Tile<Kernel, kSpread, 2, 1, false, kHalves>>(a, stream);
  launch<T, Tile<Kernel, kSpread, 1, 1, false, kHalves>>(a, stream);
}

}  // namespace

void launch_march_channels_last(const Problem& p, cudaStream_t stream) {
  if (launch_three_channels(p, stream)) return;
  const March a = march_of(p);
  const bool spread = p.pass == Pass::kGradInput && p.stride_h > 1;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel<Kernels<T>>(p, [&](auto kernel) {
        using Kernel = decltype(kernel);
        if constexpr (Kernel::kStride > 1)
          if (spread) return launch_kernel<T, Kernel, true>(a, stream);
        launch_kernel<T, Kernel, false>(a, stream);
      });
  });
}

}  // namespace dwconv
