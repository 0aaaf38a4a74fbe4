// Forward and grad_input of 7x7 at stride 2 with two filters a channel in channels_last in 16 bits, on tensor cores.
//
// Targets are counted in units: outputs, or, where grad_input spreads the gradient, squares of 2 x 2 of them, each of
// which has some of the taps. A tile are 4 units of a row, and a step's 16 rows of pixels are 8 tiles of 2 rows of
// units. Both filters of a channel are in one multiplication, of 16 x 16 by 16 x 8:
// - forward, 16 columns of a channel by 4 units of either filter, B[k][2 u + f] = weight f[k - 2 u];
// - grad_input, 8 columns of either filter by 4 units, of which each is two columns of the target,
//   B[8 f + k][2 u + e] = weight f[2 (u + 3 - k) + e].
//
// A block owns a slab of source channels and the targets that belong to them, a span of 8 tiles, and a band of rows of
// an image, which it goes down in steps of 4 rows of units. Chunks of source rows come by cp.async as they lie in
// memory. Then their channels are parted: 8 columns by 8 channels are loaded as a matrix, transposed, and stored where
// each channel has its own rows, in a ring of three chunks: two to multiply, one to write. There a matrix instruction
// finds all of A, from all banks; for grad_input, whose tiles are 4 columns apart, every second one in a copy that
// begins 4 columns later. Outputs go through shared memory, from where they are stored as they lie side by side.
//
// For grad_input, pixels that begin between multiples of 16 bytes come from the unit on that they begin in: a slab's
// channels are parted as they lie in units. Some of the first unit, or of the one behind the last, take the places of
// what the other one has of other slabs: threads load them alone, a chunk ahead, and put them there when the units have
// come. Forward, where a slab has two units of a pixel, that would take longer than copying the array first
// (realign.cu).
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include "toeplitz_channels_last.cuh"

namespace dwconv {
namespace {

struct Side {  // an array (N, height, width, channels)
  char* base;
  int64_t image_bytes, row_bytes;
  int pixel_bytes, bytes;  // from one pixel to the next; of a pixel, all channels
  int height, width;
  int unit;                 // bytes that are copied at once: 16, 8, 4 or 2
  int shift;                // bytes behind `base`, then a multiple of 16, that all pixels begin; or 0
  const char *begin, *end;  // of the array
};

struct Strided {
  Side source, target;
  const void* weight;
  int64_t weight_filter, weight_row, weight_column;
  const void* bias;
  int64_t bias_stride;
  int padding_h, padding_w;
  int units_h;     // rows of units of an image
  int band_steps;  // of a block, at most
  Divider by_slabs, by_spans, by_bands;
};

constexpr int kKernel = 7;

// What is the same in every step stays in a register: a compiler works out again what it can, step by step.
__device__ inline uint32_t kept(uint32_t value) {
  return __shfl_sync(~0u, value, threadIdx.x % 32);
}

// What a kernel is compiled for. kSpread: grad_input. kShifted: pixels of the source begin between units.
template <bool kSpread_, bool kShifted_>
struct Way {
  static constexpr bool kSpread = kSpread_, kShifted = kShifted_;
  static constexpr int kStepRows = 4, kSpan = 32;  // of units
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kSources = kSpread ? 32 : 16, kTargets = kSpread ? 16 : 32;  // of a slab

  static constexpr int kStep = kSpread ? 1 : 2, kPair = kSpread ? 2 : 1;
  // Of the source: rows of a chunk, columns of a span, and how it is there as it lies in memory.
  static constexpr int kChunkRows = kStepRows * kStep, kColumns = kSpread ? 40 : 72;
  static constexpr int kRowWarps = kWarps / kChunkRows;  // that have a row of the chunk
  static constexpr int kOctets = kSources / 8, kChunkBytes = kChunkRows * kColumns * kSources * 2;
  // Where channels are parted: copies, their columns, and what a row, a channel and a copy take. The numbers keep the
  // rows of a matrix in different banks.
  static constexpr int kCopies = kSpread ? 2 : 1, kGroups = kSpread ? 4 : 9;
  static constexpr int kRows = 3 * kChunkRows, kRowBytes = kGroups * kUnit, kPlaneBytes = kRows * kRowBytes + kUnit;
  static constexpr int kCopyBytes = kSources * kPlaneBytes + 64;
  // The same of outputs; of a pixel, a thread writes and reads kOutPart bytes at once.
  static constexpr int kOutRows = kStepRows * kPair, kOutColumns = kSpan * kPair, kOutOctets = kTargets / 8;
  static constexpr int kOutPixelBytes = 2 * kTargets, kOutRowBytes = kOutColumns * kOutPixelBytes;
  static constexpr int kOutPart = kSpread ? 4 : 8;

  // Places in shared memory: chunks as they came, parted channels, and the outputs of a step.
  static constexpr int kPlanes = 2 * kChunkBytes, kOut = kPlanes + kCopies * kCopyBytes;
  static constexpr int kSharedBytes = kOut + kOutRows * kOutRowBytes;

  // Where 8 channels of a pixel are in a chunk: one after the other, but 8 pixels' in different banks.
  static __device__ int place_of(int pixel, int octet) {
    return (pixel * kOctets + (octet ^ pixel / (8 / kOctets) % kOctets)) * kUnit;
  }
  // Where a part of an output pixel is, of the first row: exchanged with others, so that those that a warp writes at
  // once, of the same channels of many pixels, and those that it reads at once, of neighbours, are in all banks.
  static __device__ int out_of(int column, int byte) {
    const auto bit = [&](int from, int to) { return (column >> from & 1) << to; };
    return kOut + (column * kOutPixelBytes + byte ^
                   (kSpread ? bit(2, 3) | bit(3, 2) | bit(4, 5) | bit(5, 4) : bit(1, 3) | bit(2, 4) | bit(3, 5)));
  }
};

// Where a block works, and where the source begins that it reads.
struct Place {
  int slab;              // its number
  int image, row, rows;  // of units: the first row, and how many
  int column;            // of units: the first one
  int source_row, source_column;
};

template <class Way>
__device__ Place place_of_block(const Strided& a) {
  uint32_t rest = blockIdx.x;
  Place b;
  b.slab = a.by_slabs.split(rest);
  b.column = a.by_spans.split(rest) * Way::kSpan;
  b.row = a.by_bands.split(rest) * a.band_steps * Way::kStepRows;
  b.image = rest;
  b.rows = min(a.units_h - b.row, a.band_steps * Way::kStepRows);
  b.source_row = Way::kSpread ? b.row + a.padding_h / 2 - 3 : 2 * b.row - a.padding_h;
  b.source_column = Way::kSpread ? b.column + a.padding_w / 2 - 3 : 2 * b.column - a.padding_w;
  return b;
}

// Copies 16 bytes to shared memory, or clears them, wherever `from` is.
__device__ inline void copy_or_clear(int to, const char* from, bool copy) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n.reg .pred clear;\nsetp.eq.s32 clear, %2, 0;\ncp.async.cg.shared.global [%0], [%1], 16, clear;\n}" ::"r"(
          shared_address(to)),
      "l"(from), "r"(static_cast<int>(copy))
      : "memory");
#endif
}

// The same in parts of `unit` bytes.
__device__ inline void copy_parts_or_clear(int to, const char* from, bool copy, int unit) {
  if (!copy) {
    shared<uint4>(to) = {};
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kUnit; i += unit) switch (unit) {
      case 8: copy_unit<8>(shared_address(to + i), from + i); break;
      case 4: copy_unit<4>(shared_address(to + i), from + i); break;
      default: copy_unit<2>(shared_address(to + i), from + i);
    }
}

// The same, of a unit that may lie at an end of the array, as far as it is the array's.
__device__ inline void copy_inside(int to, const char* from, const char* begin, const char* end) {
#pragma unroll 1
  for (int i = 0; i < kUnit; i += 2)
    if (from + i >= begin && from + i < end) shared<uint16_t>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
}

// A thread's part in loading chunks of source rows, of which each has its warps: 16 bytes of some pixels of a row.
// What is outside the image are zeros.
template <class Way>
class Source {
 public:
  __device__ Source(const Strided& a, const Place& b) {
    const int thread = threadIdx.x % (32 * Way::kRowWarps), octet = thread % Way::kOctets;
    const int row = threadIdx.x / (32 * Way::kRowWarps), first = thread / Way::kOctets;
    // The first unit, or the one behind the last in its place.
    const bool behind = octet == 0 && is_behind(a);
    const int slab = b.slab * Way::kSources * 2, at = slab + (behind ? Way::kOctets : octet) * kUnit;
    const int x = b.source_column + first;
    y_ = b.source_row + row;
    to_ = Way::place_of(row * Way::kColumns + first, octet);
    from_ = a.source.base + (b.image * a.source.image_bytes + y_ * a.source.row_bytes +
                             static_cast<int64_t>(x) * a.source.pixel_bytes + at);
    last_ = first + (kTurns - 1) * kAtOnce < Way::kColumns;
    const int end = a.source.bytes + a.source.shift;
    exists_ = at < end;
    exchanges_ = Way::kShifted && octet == 0 && (behind || slab + Way::kSources * 2 < end);
    for (int t = 0; t < kTurns; ++t)
      inside_ |= (static_cast<uint32_t>(x + t * kAtOnce) < static_cast<uint32_t>(a.source.width)) << t;
  }

  // Begins to load the next chunk, an even or an odd one, if there is any, and goes on.
  __device__ void load(const Strided& a, int chunk, bool any) {
    const bool row = exists_ && static_cast<uint32_t>(y_) < static_cast<uint32_t>(a.source.height);
    const uint32_t inside = row ? inside_ : 0;
    const int step = kAtOnce * a.source.pixel_bytes, place = to_ + chunk % 2 * Way::kChunkBytes;
    const auto load = [&](int t, auto&& copy) {
      if (any && (t + 1 < kTurns || last_))
        copy(place + t * kAtOnce * Way::kOctets * kUnit, from_ + t * step, (inside >> t & 1) != 0);
    };
    if (Way::kShifted ? is_inside(a) : a.source.unit == kUnit) {
#pragma unroll
      for (int t = 0; t < kTurns; ++t)
        load(t, [](int to, const char* from, bool copy) { copy_or_clear(to, from, copy); });
    } else {
#pragma unroll 1
      for (int t = 0; t < kTurns; ++t)
        load(t, [&](int to, const char* from, bool copy) {
          if (!Way::kShifted)
            copy_parts_or_clear(to, from, copy, a.source.unit);
          else if (copy)
            copy_inside(to, from, a.source.begin, a.source.end);
          else
            shared<uint4>(to) = {};
        });
    }
    y_ += Way::kChunkRows, from_ += Way::kChunkRows * a.source.row_bytes;
  }

  // Begins to load what takes other places, of a chunk so many before the next one to load.
  __device__ void load_exchanged(const Strided& a, int before) {
    if constexpr (Way::kShifted) {
      const int y = y_ - before * Way::kChunkRows, step = kAtOnce * a.source.pixel_bytes;
      const bool any = exchanges_ && static_cast<uint32_t>(y) < static_cast<uint32_t>(a.source.height);
      const char* from = from_ - before * (Way::kChunkRows * a.source.row_bytes);
      from += is_behind(a) ? a.source.shift - Way::kOctets * kUnit : Way::kOctets * kUnit;
      visit_exchanged(a, [&](auto zero, int offset, uint32_t (&words)[kTurns]) {
        using Word = decltype(zero);
#pragma unroll
        for (int t = 0; t < kTurns; ++t) {
          const bool there = any && (inside_ >> t & 1) != 0 && (t + 1 < kTurns || last_);
          words[t] = there ? *reinterpret_cast<const Word*>(from + t * step + offset) : 0;
        }
      });
    }
  }

  // Puts it there, in a chunk whose units the thread has waited for.
  __device__ void exchange(const Strided& a, int chunk) {
    if constexpr (Way::kShifted) {
      const int place = to_ + chunk % 2 * Way::kChunkBytes + (is_behind(a) ? a.source.shift : 0);
      visit_exchanged(a, [&](auto zero, int offset, uint32_t (&words)[kTurns]) {
        using Word = decltype(zero);
#pragma unroll
        for (int t = 0; t < kTurns; ++t)
          if (exchanges_ && (t + 1 < kTurns || last_))
            shared<Word>(place + t * kAtOnce * Way::kOctets * kUnit + offset) = static_cast<Word>(words[t]);
      });
    }
  }

 private:
  static constexpr int kAtOnce = 32 * Way::kRowWarps / Way::kOctets, kTurns = (Way::kColumns - 1) / kAtOnce + 1;

  int y_, to_;
  const char* from_;
  bool last_;                              // whether the last turn has a pixel
  bool exists_;                            // whether the unit has channels
  bool exchanges_;                         // whether some of it take the places of others
  uint32_t inside_ = 0;                    // a bit for each pixel that is in the image, if its row is
  uint32_t pair_[kTurns], other_[kTurns];  // two channels that take other places; one more, or two

  // Whether what takes other places is of the first unit, and takes those of the unit behind the last one.
  static __device__ bool is_behind(const Strided& a) { return Way::kShifted && a.source.shift > kUnit / 2; }

  // Whether all of a row's units are the array's.
  __device__ bool is_inside(const Strided& a) const {
    return from_ >= a.source.begin && from_ + (kTurns - 1) * (kAtOnce * a.source.pixel_bytes) + kUnit <= a.source.end;
  }

  // Calls visit(type, offset of the first one's, its words) with the words that take other places.
  template <typename Visit>
  __device__ void visit_exchanged(const Strided& a, Visit&& visit) {
    const int channels = (is_behind(a) ? kUnit - a.source.shift : a.source.shift) / 2;
    if (channels % 2 != 0) visit(uint16_t{}, is_behind(a) ? 0 : 2 * (channels - 1), other_);
    if (channels >= 2) visit(uint32_t{}, is_behind(a) ? channels % 2 * 2 : 0, pair_);
    if (channels == 4) visit(uint32_t{}, 4, other_);
  }
};

// A thread's part in parting the channels of chunks.
template <class Way>
class Parting {
 public:
  __device__ Parting() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / Way::kRowWarps;
    const int copy = warp % Way::kRowWarps, octet = lane / 8 % Way::kOctets, first = lane / 8 / Way::kOctets;
    from_ = kept(shared_address(Way::place_of(row * Way::kColumns + 4 * copy + lane % 8, octet) + first * kGroupBytes));
    to_ = kept(shared_address(Way::kPlanes + copy * Way::kCopyBytes + (octet * 8 + lane % 8) * Way::kPlaneBytes +
                              row * Way::kRowBytes + first * kUnit));
    again_ = kept(first > (Way::kGroups - 1) % kAtOnce ? kGroupBytes : 0);
  }

  __device__ void part(int chunk) const {
    const uint32_t from = from_ + chunk % 2 * Way::kChunkBytes, to = to_ + chunk % 3 * Way::kChunkRows * Way::kRowBytes;
    uint32_t matrices[kTurns][4];  // all at once: no load waits for a store
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
      load_matrices_transposed(matrices[t], from + t * kAtOnce * kGroupBytes - (t + 1 < kTurns ? 0 : again_));
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
      store_matrices(to + t * kAtOnce * kUnit - (t + 1 < kTurns ? 0 : again_ * kUnit / kGroupBytes), matrices[t]);
  }

 private:
  static constexpr int kAtOnce = 4 / Way::kOctets, kGroupBytes = 8 * Way::kOctets * kUnit;  // groups of columns
  static constexpr int kTurns = (Way::kGroups - 1) / kAtOnce + 1;

  uint32_t from_, to_;
  uint32_t again_;  // bytes back to the group that the thread takes twice, where the last turn has none for it
};

// A thread's part in storing the outputs of steps: 8 channels of a pixel of some rows.
template <class Way>
class Target {
 public:
  __device__ Target(const Strided& a, const Place& b) {
    const int octet = threadIdx.x % Way::kOutOctets, column = threadIdx.x / Way::kOutOctets % Way::kOutColumns;
    const int first_row = threadIdx.x / (Way::kOutColumns * Way::kOutOctets);
    const int lead_h = Way::kSpread ? a.padding_h % 2 : 0, lead_w = Way::kSpread ? a.padding_w % 2 : 0;
    const int x = b.column * Way::kPair - lead_w + column, at = (b.slab * Way::kTargets + octet * 8) * 2;
    end_ = min((b.row + b.rows) * Way::kPair - lead_h, a.target.height);
    if (x < 0 || x >= a.target.width || at >= a.target.bytes) end_ = 0;
    y_ = b.row * Way::kPair - lead_h + first_row;
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      from_[i] =
          kept(shared_address(Way::out_of(column, octet * kUnit + i * Way::kOutPart)) + first_row * Way::kOutRowBytes);
    to_ = a.target.base + (b.image * a.target.image_bytes + y_ * a.target.row_bytes +
                           static_cast<int64_t>(x) * a.target.pixel_bytes + at);
  }

  // Stores those of the next step.
  __device__ void store(const Strided& a) {
    using Part = std::conditional_t<Way::kOutPart == 8, uint2, uint32_t>;
    uint32_t words[kTurns][4];
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
#pragma unroll
      for (int i = 0; i < kParts; ++i)
        reinterpret_cast<Part&>(words[t][i * Way::kOutPart / 4]) =
            shared_at<Part>(from_[i] + t * kAtOnce * Way::kOutRowBytes);
    const auto store = [&](auto&& put) {
#pragma unroll
      for (int t = 0; t < kTurns; ++t)
        if (const int y = y_ + t * kAtOnce; y >= 0 && y < end_) put(to_ + t * kAtOnce * a.target.row_bytes, words[t]);
    };
    if (a.target.unit == kUnit)
      store([](char* to, const uint32_t (&of)[4]) { *reinterpret_cast<uint4*>(to) = {of[0], of[1], of[2], of[3]}; });
    else
      store([](char* to, const uint32_t (&of)[4]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(of[i / 2] >> i % 2 * 16);
      });
    y_ += Way::kOutRows, to_ += Way::kOutRows * a.target.row_bytes;
  }

 private:
  static constexpr int kAtOnce = Way::kThreads / (Way::kOutColumns * Way::kOutOctets);  // rows
  static constexpr int kTurns = Way::kOutRows / kAtOnce, kParts = kUnit / Way::kOutPart;

  int y_, end_;            // rows, and the one behind the last, or none
  uint32_t from_[kParts];  // in shared memory
  char* to_;
};

// Computes the block's outputs that are not finite again.
template <typename T, class Way>
__device__ __noinline__ void outputs_by_taps(const Strided& a) {
  const Place b = place_of_block<Way>(a);
  const int lead_h = Way::kSpread ? a.padding_h % 2 : 0, lead_w = Way::kSpread ? a.padding_w % 2 : 0;
  const int y_begin = max(b.row * Way::kPair - lead_h, 0);
  const int y_end = min((b.row + b.rows) * Way::kPair - lead_h, a.target.height);
  const int x_begin = max(b.column * Way::kPair - lead_w, 0);
  const int x_end = min(b.column * Way::kPair - lead_w + Way::kOutColumns, a.target.width);
  const T* image = reinterpret_cast<const T*>(a.source.base + a.source.shift + b.image * a.source.image_bytes);
  for (int y = y_begin; y < y_end; ++y)
    for (int i = threadIdx.x; i < (x_end - x_begin) * Way::kTargets; i += Way::kThreads) {
      const int x = x_begin + i / Way::kTargets, channel = b.slab * Way::kTargets + i % Way::kTargets;
      if (channel * 2 >= a.target.bytes) continue;
      T& output = reinterpret_cast<T*>(a.target.base + b.image * a.target.image_bytes + y * a.target.row_bytes +
                                       static_cast<int64_t>(x) * a.target.pixel_bytes)[channel];
      if (is_finite(widen(output))) continue;
      float sum = a.bias ? widen(static_cast<const T*>(a.bias)[channel * a.bias_stride]) : 0.f;
      for (int q = 0; q < (Way::kSpread ? 2 : 1); ++q) {
        const int source = Way::kSpread ? channel * 2 + q : channel / 2;
        const int filter = Way::kSpread ? source : channel;
        const auto place_of = [](int target, int padding, int tap) {
          if (!Way::kSpread) return target * 2 - padding + tap;
          return (target + padding - tap) % 2 == 0 ? (target + padding - tap) / 2 : -1;
        };
        sum = sum_of_taps(
            sum, image + source, a.source.row_bytes, a.source.pixel_bytes, a.source.height, a.source.width,
            static_cast<const T*>(a.weight) + filter * a.weight_filter, a.weight_row, a.weight_column, kKernel, kKernel,
            [&](int i) { return place_of(y, a.padding_h, i); }, [&](int j) { return place_of(x, a.padding_w, j); });
      }
      output = narrow<T>(sum);
    }
}

// The taps of a slab's filters on their way to the band matrices, in words of two as these have them: forward, pairs of
// taps of a row; for grad_input, those of every other column, backwards, in pairs that begin with any of them. They lie
// where the outputs of the first step come later. A thread has a row of a filter.
template <class Way>
class Taps {
 public:
  static constexpr int kFilters = 32, kPairs = Way::kSpread ? 5 : 4, kWords = (Way::kSpread ? 2 : 1) * kPairs;
  static constexpr int kRowBytes = 4 * kWords;

  // Begins to load them; in a slab's place for filters that there are not, those of another one.
  __device__ Taps(const Strided& a, const Place& b) {
    const int number = min(static_cast<int>(threadIdx.x), kRows - 1);
    const int filters = (Way::kSpread ? a.source.bytes : a.target.bytes) / 2;
    const uint16_t* at =
        static_cast<const uint16_t*>(a.weight) +
        (min(b.slab * kFilters + number / kKernel, filters - 1) * a.weight_filter + number % kKernel * a.weight_row);
#pragma unroll
    for (int j = 0; j < kKernel; ++j, at += a.weight_column) taps_[j] = *at;
  }

  __device__ void store() {
    if (threadIdx.x >= kRows) return;
#pragma unroll
    for (uint32_t& tap : taps_) asm volatile("" : "+r"(tap));  // or else they would be waited for when they are loaded
    const auto tap = [&](int e, int r) {                       // the r-th one of those of grad_input
      const int j = 2 * (3 - r) + e;
      return r >= 0 && j >= 0 && j < kKernel ? taps_[j] : 0;
    };
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int e = i / kPairs, r = i % kPairs - 1;
      words[i] = Way::kSpread ? tap(e, r) | tap(e, r + 1) << 16 : taps_[2 * i] | taps_[2 * i + 1] << 16;
    }
#pragma unroll
    for (int i = 0; i < kWords; i += 2) shared<uint2>(at(0, threadIdx.x) + 4 * i) = {words[i], words[i + 1]};
  }

  // Where a row of a filter is.
  static __device__ int at(int filter, int row) { return Way::kOut + (filter * kKernel + row) * kRowBytes; }

 private:
  static constexpr int kRows = kFilters * kKernel;
  static_assert(kRows <= Way::kThreads);

  uint32_t taps_[kKernel + 1] = {};
};

// A warp's two source channels, or two target channels: the band matrices, the sums of a step, and where it reads.
template <typename T, class Way>
class Step {
 public:
  __device__ Step(const Strided& a, const Place& b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = lane % 8;
    row_ = lane / 8 % 2 * 2 * Way::kStep;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      // Of the channel, or of the filter; a slab's last ones come before the others.
      const int source = Way::kSpread ? 4 * warp + lane / 16 + 2 * c : 2 * warp + c;
      const int plane = Way::kShifted ? (source + a.source.shift / 2) % Way::kSources : source;
      from_[c] = Way::kPlanes + plane * Way::kPlaneBytes +
                 (Way::kSpread ? tile % 2 * Way::kCopyBytes + tile / 2 * kUnit : (tile + lane / 16) * kUnit);
    }
    const int column = lane * Way::kPair;
#pragma unroll
    for (int v = 0; v < Way::kPair; ++v) to_[v] = kept(shared_address(Way::out_of(column + v, warp * Way::kOutPart)));
    // The two targets of a thread's sums: of a pair of neighbouring channels, or both filters of a channel.
#pragma unroll
    for (int q = 0; q < kBiases; ++q) {
      const int target = b.slab * Way::kTargets + warp * 4 + q;
      if (a.bias && target * 2 < a.target.bytes)
        bias_[q] = widen(static_cast<const T*>(a.bias)[target * a.bias_stride]);
    }
  }

  // Makes the band matrices of taps in shared memory.
  __device__ void load_bands() {
    using Taps = dwconv::Taps<Way>;
    const int warp = threadIdx.x / 32, n = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int filter = 4 * warp + 2 * c + (Way::kSpread ? w : n % 2);
        const int pair = Way::kSpread ? 2 * t - n / 2 + 1 : 4 * w + t - n / 2;
        const bool any = pair >= 0 && pair < Taps::kPairs;
        const int at = Taps::at(filter, 0) + 4 * (pair + (Way::kSpread ? n % 2 * Taps::kPairs : 0));
#pragma unroll
        for (int i = 0; i < kKernel; ++i) bands_[c][i][w] = any ? shared<uint32_t>(at + i * Taps::kRowBytes) : 0;
      }
  }

  __device__ void run(int step) {
    // Of either channel, rows of either parity, either pair of rows of units: rows 0 and 2, or 1 and 3, which meet more
    // of the same pairs of rows of the source than neighbours would.
    float sum[2][kParities][2][4];
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int v = 0; v < 8 * kParities; ++v)
        sum[c][v / 8][v / 4 % 2][v % 4] = Way::kSpread ? 0.f : bias_[(2 * c + v % 2) % kBiases];
    const int first = step % 3 * Way::kChunkRows + row_, at = first * Way::kRowBytes;
    constexpr int kReach = Way::kSpread ? 4 : kKernel, kNext = Way::kStep;  // rows; to the next pair of rows
#pragma unroll
    for (int o = 0; o < kReach + kNext; ++o) {
      const int from = (o < Way::kRows - first ? at : at - Way::kRows * Way::kRowBytes) + o * Way::kRowBytes;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t x[4];
        // One from the other, where that is the same for all.
        const int plane = Way::kShifted ? from_[c] : from_[0] + c * (Way::kSpread ? 2 : 1) * Way::kPlaneBytes;
        load_matrices(x, shared_address(plane + from));
#pragma unroll
        for (int pair = 0; pair < 2; ++pair)
          if (const int reach = o - pair * kNext; reach >= 0 && reach < kReach)
#pragma unroll
            for (int e = 0; e < kParities; ++e)
              if (const int i = Way::kSpread ? 2 * (3 - reach) + e : reach; i < kKernel) {
                float (&into)[4] = sum[c][e][pair];
                multiply(into, std::as_const(into), x, bands_[c][i], T{});
              }
      }
    }
    const auto pair_of = [&](float low, float high) {
      const Pair<T> pair = narrow_pair(low, high, T{});
      add_zeros(zeros_, pair);
      return reinterpret_cast<const uint32_t&>(pair);
    };
#pragma unroll
    for (int e = 0; e < kParities; ++e)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = ((pair + 2 * h) * Way::kPair + e) * Way::kOutRowBytes;
          const float *low = sum[0][e][pair] + 2 * h, *high = sum[1][e][pair] + 2 * h;
          if constexpr (Way::kSpread)
#pragma unroll
            for (int v = 0; v < 2; ++v) shared_at<uint32_t>(to_[v] + row) = pair_of(low[v], high[v]);
          else
            shared_at<uint2>(to_[0] + row) = {pair_of(low[0], low[1]), pair_of(high[0], high[1])};
        }
  }

  // Whether all outputs were finite.
  __device__ bool is_finite() const { return (zeros_ & 0x7fff7fff) == 0; }

 private:
  static constexpr int kParities = Way::kSpread ? 2 : 1, kBiases = Way::kSpread ? 0 : 4;

  uint32_t bands_[2][kKernel][2];
  float bias_[kBiases > 0 ? kBiases : 1] = {};
  uint32_t zeros_ = 0;
  int row_, from_[2];
  uint32_t to_[Way::kPair];  // where the thread's outputs of the first row go
};

template <typename T, class Way>
__global__ void __launch_bounds__(Way::kThreads, 2) toeplitz_strided_channels_last(const __grid_constant__ Strided a) {
  const Place b = place_of_block<Way>(a);
  const int steps = (b.rows + Way::kStepRows - 1) / Way::kStepRows;  // chunks: one more
  settle_and_wait_for_kernel_before(a.band_steps);
  let_next_kernel_start();
  // A step takes two chunks. They are parted a step before, and asked for two steps before that.
  Source<Way> source(a, b);
  const auto load = [&](int chunk) {
    source.load(a, chunk, chunk <= steps);
    commit_copies();
  };
  // Waits for a chunk that is then parted.
  const auto wait = [&](int chunk) {
    wait_copies<1>();
    if (chunk <= steps) source.exchange(a, chunk);
    __syncthreads();
    if (chunk < steps) source.load_exchanged(a, 1);
  };
  Taps<Way> taps(a, b);
  load(0);
  load(1);
  source.load_exchanged(a, 2);
  Step<T, Way> work(a, b);
  Target<Way> target(a, b);
  const Parting<Way> parting;
  taps.store();
  for (int chunk = 0; chunk < 2; ++chunk) {
    wait(chunk);
    if (chunk == 0) work.load_bands();
    parting.part(chunk);
    __syncthreads();
    load(chunk + 2);
  }
  for (int step = 0; step < steps; ++step) {
    wait(step + 2);
    work.run(step);
    if (step + 2 <= steps) parting.part(step + 2);
    __syncthreads();
    load(step + 4);
    target.store(a);
  }
  if (__syncthreads_and(work.is_finite())) return;
  outputs_by_taps<T, Way>(a);
}

Side side_of(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  Side s{};
  s.base = static_cast<char*>(view.data);
  s.image_bytes = view.stride[0] * 2, s.row_bytes = view.stride[2] * 2;
  s.pixel_bytes = static_cast<int>((width == 1 ? channels : view.stride[3]) * 2);
  s.bytes = static_cast<int>(channels * 2);
  s.height = static_cast<int>(height), s.width = static_cast<int>(width);
  s.unit = alignment_of(view, 2, channels, height, width, batch);
  s.begin = s.base;
  s.end = s.base + (batch - 1) * s.image_bytes + (height - 1) * s.row_bytes + (width - 1) * s.pixel_bytes + s.bytes;
  return s;
}

// Where an array begins between units, and all its pixels lie as far behind one.
void shift_side(Side& s, const View& view, int64_t batch) {
  if (s.unit == kUnit || alignment_between(view, 2, s.bytes / 2, s.height, s.width, batch) < kUnit) return;
  s.shift = static_cast<int>(reinterpret_cast<uintptr_t>(s.base) % kUnit), s.base -= s.shift;
}

template <typename T, class Way>
void launch_way(const Problem& p, const Strided& arguments, cudaStream_t stream) {
  static_assert(Way::kSharedBytes <= kStridedBytes);
  const Mapping map(p);
  Strided a = arguments;
  a.target = side_of(map.target, p.batch, map.targets, map.out_height, map.out_width);
  a.weight = map.weight.data, a.weight_filter = map.weight.stride[0];
  a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  const auto units = [](int size, int padding) {
    return Way::kSpread ? (size - 1 + padding) / 2 - padding / 2 + 1 : size;
  };
  a.units_h = units(map.out_height, a.padding_h);
  const int64_t slabs = ceil_div(map.sources, Way::kSources);
  const int64_t spans = ceil_div(units(map.out_width, a.padding_w), Way::kSpan);
  // As many bands as blocks run at once, if these have at least a few steps each.
  const Device& device = current_device();
  const int64_t steps = ceil_div(a.units_h, Way::kStepRows), parts = slabs * spans * p.batch;
  const int64_t most = std::max<int64_t>(2 * device.multiprocessors / parts, 1);
  a.band_steps = static_cast<int>(std::max<int64_t>(ceil_div(steps, most), std::min<int64_t>(steps, 2)));
  const int64_t bands = ceil_div(steps, a.band_steps);
  a.by_slabs = Divider(slabs), a.by_spans = Divider(spans), a.by_bands = Divider(bands);
  const auto kernel = toeplitz_strided_channels_last<T, Way>;
  static thread_local int prepared = -1;
  if (prepared != device.id) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Way::kSharedBytes);
    prepared = device.id;
  }
  launch_early<Strided>(kernel, a, parts * bands, Way::kThreads, stream, {.shared_bytes = Way::kSharedBytes});
  check_launch("toeplitz_channels_last");
}

}  // namespace

void launch_toeplitz_strided_channels_last(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Strided a{};
  a.source = side_of(map.source, p.batch, map.sources, map.height, map.width);
  const bool spread = p.pass == Pass::kGradInput;
  if (spread) shift_side(a.source, map.source, p.batch);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (!spread)
        launch_way<T, Way<false, false>>(p, a, stream);
      else if (a.source.shift > 0)
        launch_way<T, Way<true, true>>(p, a, stream);
      else
        launch_way<T, Way<true, false>>(p, a, stream);
    }
  });
}

}  // namespace dwconv
