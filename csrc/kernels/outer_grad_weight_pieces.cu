// The same as outer_grad_weight where two or four rows of a plane are 56 columns, multiplied by warpgroups: on sm_90,
// in code for sm_90a.
//
// Images are what is summed over, and rows that are 56 columns together a piece: all pairs of a piece of the gradient
// and one of the input that lies `shift` pieces further on go into the same products. A warpgroup has two shifts, which
// it multiplies by one instruction, with zeros where there is a piece for one of them only. Boxes bring pieces of all
// images of a stage as tensor cores read them, both factors from shared memory.
//
// At the end the products go through shared memory, to be added up along diagonals. Of rows of 28 columns, those of a
// shift, block by block: a warp has a row of the gradient and one of the input. Each warpgroup does so for itself,
// while others multiply; rows of the kernel that two of them have in part come an item later. Of rows of 14 columns,
// those of all shifts lie side by side, so that pixels as far apart are a diagonal: it has the sums of two taps, of
// columns that are a row apart.
//
// Planes of 14 columns begin within a unit of 16 bytes, every other one of them: its pixels have numbers that are a few
// higher, and pixels before it become zeros. Zeros meet others: sums that are not finite are taken again, product by
// product.
//
// Arrays that begin within a unit are read as they lie, too: boxes of pieces begin where units do. Of rows of 28
// columns, a box then has all of a piece, with pixels on either side whose products are left alone. Boxes never reach
// beyond the array: what is in its first unit comes pixel by pixel.
#include "outer_grad_weight_pieces.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "boxes.cuh"
#include "outer_grad_weight.h"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "turn.cuh"
#include "warpgroups.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kGroups = 4, kShifts = 2;        // warpgroups, and shifts of each
constexpr int kWarps = kGroups * kGroupWarps;  // that multiply; one more loads, one looks after edges and the bias
constexpr int kThreads = 32 * (kWarps + 2);
constexpr int kUnitPixels = kUnit / 2;
constexpr int kStepImages = 16, kStepBytes = kStepImages * kBoxPitch;  // that a multiplication sums over, of a piece
constexpr int kStep = kStepBytes / kUnit;
constexpr int kMaxStages = 8, kMaxSteps = 4;
constexpr int kMostParts = 4;                     // of the kernel's rows
constexpr int kTiles = kBoxPitch / 16;            // 8 columns each, of a piece: the last one is left alone
constexpr int kProductBytes = 4 * kLong * kLong;  // of a shift

// Rows of so many columns: those of a piece, and of the row before that it may begin with.
template <int kWidth>
struct Rows {
  static constexpr int kCount = kLong / kWidth;
  // Whether planes may begin within a unit.
  static constexpr bool kMayBeginBefore = kWidth < 16;
  static constexpr int kFirst = kMayBeginBefore ? -1 : 0;
};

struct Pieces {
  // Of channels with even numbers, and of the others; or of an array as one row of pixels, and by pieces.
  CUtensorMap source_boxes[2], grad_boxes[2];
  PlanePair planes;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;
  int first_row, last_row;                              // of the kernel, that meet the images: from and up to, less one
  int groups, group_rows;                               // parts of those rows for different blocks
  int first_shift[kMostParts], last_shift[kMostParts];  // of pieces, that those meet: from and up to, less one
  Divider by_groups, by_multiplier;
  bool all_meet;                 // whether all rows and columns of the kernel meet the images
  int before;                    // columns of pieces before the first pixel, of every other channel
  int plane;                     // pixels
  int source_begin, grad_begin;  // pixels from where a unit begins to where the arrays do
  int pieces;
  int images, filters, splits;
  int steps, stages;                // of a stage, and how many of them there are
  int sums, scratch, first_stage;   // places in shared memory
  int sum_left;                     // floats before those of the first shift
  static constexpr int kTurns = 2;  // places of sums that warpgroups have in part, with a barrier each
  static constexpr int kStored = 8 * 3 * kMaxStages, kSums = kStored + 8 * kTurns;

  __device__ int full(int stage) const { return 8 * stage; }
  __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __device__ int ready(int stage) const { return 8 * (2 * kMaxStages + stage); }
  bool is_flat() const { return source_begin > 0 || grad_begin > 0; }
  __host__ __device__ int piece_bytes() const { return steps * kStepBytes; }
  __host__ __device__ int factor_bytes() const { return pieces * piece_bytes(); }
  __host__ __device__ int stage_bytes() const { return 2 * factor_bytes(); }
  __host__ __device__ int stage_images() const { return steps * kStepImages; }
  __host__ __device__ int items() const { return filters * groups * splits; }
  __device__ int channel_of(int filter) const {
    uint32_t channel = filter;
    by_multiplier.split(channel);
    return static_cast<int>(channel);
  }
  // Columns of pieces before the first pixel of a channel.
  __device__ int source_before(int channel) const { return (source_begin + channel % 2 * before) % kUnitPixels; }
  __device__ int grad_before(int channel) const { return (grad_begin + channel % 2 * before) % kUnitPixels; }
};

// What a block adds up: the images of a split, for a filter and some rows of the kernel.
struct Item {
  int filter, group, split, first, last;  // the latter of images
  int first_row, last_row;

  __device__ Item(const Pieces& a, int number) : split(0), first(0), last(a.images) {
    uint32_t rest = number;
    group = static_cast<int>(a.by_groups.split(rest)), filter = static_cast<int>(rest);
    first_row = a.first_row + group * a.group_rows, last_row = min(first_row + a.group_rows, a.last_row);
    if (a.splits == 1) return;
    split = filter / a.filters, filter %= a.filters;
    // Whole stages: a box has the images that follow in the array, whatever split they are of.
    const int all = (a.images + a.stage_images() - 1) / a.stage_images();
    first = static_cast<int>(int64_t{all} * split / a.splits) * a.stage_images();
    last = min(static_cast<int>(int64_t{all} * (split + 1) / a.splits) * a.stage_images(), a.images);
  }
};

// The shifts of pieces, from and up to, less one, that some rows of the kernel meet.
template <int kWidth>
struct ShiftsOf {
  int first, last;

  __host__ __device__ ShiftsOf(const Pieces& a, int first_row, int last_row) {
    using R = Rows<kWidth>;
    constexpr int kFar = 64;  // divides down
    const int low = first_row - a.padding_h + R::kFirst, high = last_row - 1 - a.padding_h + R::kCount - 1;
    first = (low + kFar * R::kCount) / R::kCount - kFar;
    last = (high + kFar * R::kCount) / R::kCount - kFar + 1 - R::kFirst;
    first = first > 1 - a.pieces ? first : 1 - a.pieces;
    last = last < a.pieces ? last : a.pieces;
  }
};

// Pixels of an array that its boxes leave out: those in its first unit, if it shares that with others.
__host__ __device__ constexpr int left_out(int begin) {
  return begin > 0 ? kUnitPixels - begin : 0;
}

// What a block loads of an array.
template <int kWidth, bool kFlat>
struct Boxes {
  const CUtensorMap (&maps)[2];
  int channel;
  bool in_one;  // whether a box has all pieces
  int first;    // where they begin in the array's pixels, as its boxes count them

  __device__ Boxes(const Pieces& a, const CUtensorMap (&maps)[2], int channel, int channels, int begin, int before)
      : maps(maps), channel(channel), in_one(!Rows<kWidth>::kMayBeginBefore), first(0) {
    if constexpr (kFlat) {
      in_one = in_one && channel > 0 && channel < channels - 1;
      first = channel * a.plane + begin - before - (begin > 0) * kUnitPixels;
    }
  }

  __device__ void load(const Pieces& a, int to, int image, int barrier) const {
    if (in_one) return copy_box(to, maps[kFlat], 0, image, 0, channel, barrier);
    for (int piece = 0; piece < a.pieces; ++piece, to += a.piece_bytes())
      if constexpr (kFlat)
        copy_box(to, maps[0], first + kLong * piece, image, 0, 0, barrier);
      else
        copy_box(to, maps[channel % 2], kLong * piece, image, channel / 2, 0, barrier);
  }
};

// Loads pieces, as stages become free.
template <int kWidth, bool kFlat>
__device__ void load_pieces(const Pieces& a, int stages) {
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const int channel = a.channel_of(item.filter);
    const Boxes<kWidth, kFlat> source(a, a.source_boxes, channel, a.channel_of(a.filters), a.source_begin,
                                      a.source_before(channel));
    const Boxes<kWidth, kFlat> grad(a, a.grad_boxes, item.filter, a.filters, a.grad_begin, a.grad_before(item.filter));
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      const int barrier = a.full(turn.stage), to = stages + turn.stage * a.stage_bytes();
      wait(a.empty(turn.stage), turn.parity ^ 1);
      expect_bytes(barrier, a.stage_bytes());
      source.load(a, to, image, barrier), grad.load(a, to + a.factor_bytes(), image, barrier);
      arrive(barrier);
    }
  }
}

// Where a unit of a line of a box is.
__device__ inline int unit_at(int line, int unit) {
  return line * kBoxPitch + (unit ^ line % 8) * kUnit;
}

// Makes zeros of a unit's pixels but those from `first` to `last`, less one.
__device__ inline void keep_pixels(int unit, int first, int last) {
  auto& pixels = shared<uint4>(unit);
  const auto mask = [&](int pair) { return last > first ? pair_mask(pair - first, last - first) : 0; };
  uint4 kept = pixels;
  kept.x &= mask(0), kept.y &= mask(2), kept.z &= mask(4), kept.w &= mask(6);
  pixels = kept;
}

// Makes zeros of what is before the first pixels, and behind the last ones if planes follow one another, in planes of
// an array from `planes` on in a stage.
template <int kWidth, bool kFlat>
__device__ void clear_edges(const Pieces& a, int planes, int before) {
  const int lane = threadIdx.x % 32;
  if constexpr (Rows<kWidth>::kMayBeginBefore) {
    const int end = a.plane + before - kLong * (a.pieces - 1), last = planes + (a.pieces - 1) * a.piece_bytes();
    for (int line = lane; line < a.stage_images(); line += 32) {
      if (before > 0) keep_pixels(planes + unit_at(line, 0), before, kUnitPixels);
      if constexpr (kFlat)
        for (int unit = max(end, 0) / kUnitPixels; unit < kLong / kUnitPixels; ++unit)
          keep_pixels(last + unit_at(line, unit), 0, end - unit * kUnitPixels);
    }
  }
}

// The pixels of a stage's planes that boxes leave out: of the first channel of an array.
template <typename T>
class LeftOut {
 public:
  __device__ LeftOut(const char* array, int64_t image_bytes, int begin, bool is_first)
      : array_(array), image_bytes_(image_bytes), begin_(begin), count_(is_first ? left_out(begin) : 0) {}

  // Of so many images: ahead of when they are needed.
  __device__ void load(int image, int images) {
    if (count_ == 0) return;
#pragma unroll
    for (int m = 0; m < kLines; ++m) {
      const int line = threadIdx.x % 32 + 32 * m;
      const auto* from = reinterpret_cast<const T*>(array_ + (image + line) * image_bytes_);
#pragma unroll
      for (int k = 0; k < kMost; ++k)
        if (line < images && k < count_) pixels_[m][k] = from[k];
    }
  }
  __device__ void store(int planes, int images) const {
#pragma unroll
    for (int m = 0; m < kLines; ++m)
#pragma unroll
      for (int k = 0; k < kMost; ++k)
        if (const int line = threadIdx.x % 32 + 32 * m; line < images && k < count_)
          shared<T>(planes + unit_at(line, 0) + 2 * (begin_ + k)) = pixels_[m][k];
  }

 private:
  static constexpr int kLines = kMaxSteps * kStepImages / 32, kMost = kUnitPixels - 1;
  const char* array_;
  int64_t image_bytes_;
  int begin_, count_;
  T pixels_[kLines][kMost];
};

// Mends edges, and adds up the gradient for the bias.
template <typename T, int kWidth, bool kFlat>
__device__ void look_after_edges(const Pieces& a, int stages) {
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  constexpr bool kLeavesOut = !Rows<kWidth>::kMayBeginBefore;  // columns on both sides of a piece
  const int lane = threadIdx.x % 32;
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const int channel = a.channel_of(item.filter);
    const int source_before = a.source_before(channel), grad_before = a.grad_before(item.filter);
    // Of the first unit of a piece and of the last one, which have pixels of other pieces as well.
    const uint32_t of_last = kLeavesOut ? pair_mask(2 * (lane % 4), grad_before) : 0,
                   of_first = kLeavesOut ? ~of_last : ~0u;
    LeftOut<T> of_source(a.planes.source, a.planes.source_image, a.source_begin, channel == 0);
    LeftOut<T> of_grad(a.planes.grad, a.planes.grad_image, a.grad_begin, item.filter == 0);
    float sums[4] = {};
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      const int stage = stages + turn.stage * a.stage_bytes(), grad = stage + a.factor_bytes();
      const int images = min(a.stage_images(), a.images - image);
      if constexpr (kFlat) of_source.load(image, images), of_grad.load(image, images);
      wait(a.full(turn.stage), turn.parity);
      if constexpr (kFlat || Rows<kWidth>::kMayBeginBefore) {
        clear_edges<kWidth, kFlat>(a, stage, source_before), clear_edges<kWidth, kFlat>(a, grad, grad_before);
        if constexpr (kFlat) of_source.store(stage, images), of_grad.store(grad, images);
        before_bulk_copies();
        arrive_together(a.ready(turn.stage), lane == 0);
      }
      if (a.result.with_bias()) {
        for (int at = 0; at < a.factor_bytes(); at += 32 * kUnit) {
          uint32_t g[4];
          load_matrices(g, shared_address(grad + at + kUnit * lane));
#pragma unroll
          for (int k = 0; k < 4; ++k) {  // a line
            const int unit = (lane / 4 ^ (at / kBoxPitch + k)) % 8;
            if (unit == 0) g[k] &= of_first;
            if (unit == kTiles - 1) g[k] &= of_last;
          }
          multiply(sums, sums, g, {kOne, kOne}, T{});
        }
      }
      arrive_together(a.empty(turn.stage), lane == 0);
    }
    if (!a.result.with_bias()) continue;
    float total = lane % 4 == 0 ? sums[0] + sums[2] : 0;
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane == 0 && item.first_row == a.first_row)
      a.result.put<T>(item.filter, item.split, a.kernel_h * a.kernel_w, total);
  }
}

// The products of a warpgroup: of a shift, and of the next one. Pieces may have pixels of their own in all tiles.
template <bool kInAll>
struct Products {
  static constexpr int kAllTiles = kShifts * kTiles - !kInAll;
  float sum[kAllTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kAllTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = 0;
  }

  // Adds those of `count` steps, which follow one another: without branches in between, so that none waits.
  template <typename T, int kCount>
  __device__ void add_steps(uint64_t& g, uint64_t& x) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) multiply_columns<kAllTiles>(sum, g + k * kStep, x + k * kStep, T{});
    g += kCount * kStep, x += kCount * kStep;
  }
  template <typename T>
  __device__ void add_steps(uint64_t g, uint64_t x, int count) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (; count >= kAtOnce; count -= kAtOnce) add_steps<T, kAtOnce>(g, x);
    if (count & 2) add_steps<T, 2>(g, x);
    if (count & 1) add_steps<T, 1>(g, x);
  }

  // Adds those of a stage. Where there is a piece for one of the shifts only, the other one's are zeros.
  template <typename T>
  __device__ void add(const Pieces& a, uint32_t source, uint32_t grad, uint32_t zeros_before, uint32_t zeros_behind,
                      int shift) {
    const int bytes = a.piece_bytes(), first = max(-shift, 0), last = min(a.pieces, a.pieces - shift);
    const bool has_end = shift >= 0, has_begin = shift < 0;  // a piece for the first shift only, or for the next one
    before_multiplications();
    const uint64_t g = swizzled_columns(grad + first * bytes, 0);
    if (has_begin)
      add_steps<T>(swizzled_columns(grad + (first - 1) * bytes, 0),
                   swizzled_columns(zeros_before, source - zeros_before), a.steps);
    add_steps<T>(g, swizzled_columns(source + (first + shift) * bytes, bytes), (last - first - has_end) * a.steps);
    if (has_end) {
      const uint32_t from = source + (a.pieces - 1) * bytes;
      add_steps<T>(swizzled_columns(grad + (last - 1) * bytes, 0), swizzled_columns(from, zeros_behind - from),
                   a.steps);
    }
    commit_multiplications();
    wait_multiplications<0>();
  }

  // To shared memory, as a matrix of the gradient's columns by the input's: of so many from some on.
  template <int kShift>
  __device__ void store(uint32_t to, int pitch, int first_grad, int first_source) const {
    const int warp = threadIdx.x / 32 % kGroupWarps, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int grad = 16 * warp + 8 * h + g - (kInAll ? first_grad : 0);
      if (grad < 0 || grad >= kLong) continue;
      const uint32_t row = to + 4 * (grad * pitch + 2 * t - (kInAll ? first_source : 0));
#pragma unroll
      for (int n = 0; n < kTiles - !kInAll; ++n) {
        const float (&pair)[4] = sum[kShift * kTiles + n];
        if constexpr (!kInAll) {
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + 32 * n), "f"(pair[2 * h]), "f"(pair[2 * h + 1])
                       : "memory");
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int source = 8 * n + 2 * t + e - first_source;
            if ((n > 0 || source >= 0) && (n < kTiles - 1 || source < kLong))
              shared_at<float>(row + 32 * n + 4 * e) = pair[2 * h + e];
          }
        }
      }
    }
  }
};

template <typename T>
__device__ void put_tap(const Pieces& a, const Item& item, int i, int j, float sum) {
  if (i < item.first_row || i >= item.last_row || j < 0 || j >= a.kernel_w) return;
  if (!is_finite(sum)) sum = a.planes.sum_by_products<T>(item, i - a.padding_h, j - a.padding_w);
  a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, sum);
}

// A warpgroup's sums of an item, from products of rows of kHalfColumns columns: of rows of the kernel from a row before
// its first shift on. The first one and the last one of them meet another warpgroup's pieces as well.
template <typename T>
class RowSums {
 public:
  static constexpr int kRows = kShifts, kMost = 2;  // rows of a piece, and columns of a lane

  static int bytes(const Pieces& a) { return 4 * a.kernel_w * kGroups * (kAll + kPartial * Pieces::kTurns); }

  __device__ RowSums(const Pieces& a, uint32_t memory) : a_(a), memory_(memory), lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32 % kGroupWarps;
    group_ = threadIdx.x / kGroupThreads, row_ = warp % kRows, source_row_ = warp / kRows;
  }

  // Adds up products of a shift along diagonals, one for each column of the kernel: a warp those of two rows.
  template <int kShift>
  __device__ void add(uint32_t products) {
    constexpr int kWidth = kHalfColumns;
    const int place = source_row_ - row_ + kRows * kShift;  // row of the kernel
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const int j = lane_ + 32 * k;
      if (j >= a_.kernel_w) break;
      const int dx = j - a_.padding_w, first = max(0, -dx), last = min(kWidth, kWidth - dx);  // of the gradient
      const uint32_t mask = first < last ? ((1u << last) - 1) & ~((1u << first) - 1) : 0;
      const int distance = min(max(dx, -kWidth), kWidth);
      const uint32_t from = products + 4 * (kWidth * (row_ * kLong + source_row_) + distance);
      float total[2] = {};
      // Others' products are loaded as well, and left alone: there is no branch to wait for.
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        uint32_t at = from + 4 * w * (kLong + 1);
        if (w == 0) at = max(at, products);
        if (w == kWidth - 1) at = min(at, products + kProductBytes - 4);
        const float product = __uint_as_float(load_word(at));
        if (mask & 1u << w) total[w % 2] += product;
      }
      if (place < 0 || place > kRows)
        partial_[k] = total[0] + total[1];
      else
        shared_at<float>(memory_ + at(kRows * place + row_) + 4 * j) = total[0] + total[1];
    }
  }

  // Puts rows that this warpgroup has all of.
  __device__ void put_whole(const Item& item, int shift, bool has_next) const {
    const int rows = has_next ? kRows + 1 : kRows;
    for (int k = threadIdx.x % kGroupThreads; k < rows * a_.kernel_w; k += kGroupThreads) {
      const int row = (k >= a_.kernel_w) + (k >= 2 * a_.kernel_w), j = k - row * a_.kernel_w;
      float sum = load(at(kRows * row) + 4 * j);
      if (has_next || row == 0) sum += load(at(kRows * row + 1) + 4 * j);
      put_tap<T>(a_, item, kRows * shift + row + a_.padding_h, j, sum);
    }
  }

  // For the others.
  __device__ void store_partial(int turn, bool has_next) const {
    const bool is_last = row_ < source_row_;
    if (row_ == source_row_ || (is_last && !has_next)) return;
#pragma unroll
    for (int k = 0; k < kMost; ++k)
      if (const int j = lane_ + 32 * k; j < a_.kernel_w)
        shared_at<float>(memory_ + partial_at(turn, group_, is_last) + 4 * j) = partial_[k];
  }

  // Puts what this warpgroup and the one before have in part, and the last one what is behind it.
  __device__ void put_partial(const Item& item, int shift, int shifts, int turn) const {
    const int j = threadIdx.x % (32 * kMost), left = shifts - kShifts * group_;
    if (j >= a_.kernel_w || left <= 0) return;
    if (threadIdx.x % kGroupThreads < 32 * kMost) {
      float sum = load(partial_at(turn, group_, false) + 4 * j);
      if (group_ > 0) sum += load(partial_at(turn, group_ - 1, true) + 4 * j);
      put_tap<T>(a_, item, kRows * shift - 1 + a_.padding_h, j, sum);
    } else if (left == kShifts) {
      put_tap<T>(a_, item, kRows * (shift + kShifts) - 1 + a_.padding_h, j,
                 load(partial_at(turn, group_, true) + 4 * j));
    }
  }

 private:
  static constexpr int kAll = kRows * (kRows + 1), kPartial = 2;  // rows of sums

  const Pieces& a_;
  uint32_t memory_;
  int lane_, group_, row_, source_row_;
  float partial_[kMost];

  __device__ float load(int at) const { return __uint_as_float(load_word(memory_ + at)); }
  __device__ int at(int number) const { return a_.sums + 4 * a_.kernel_w * (kAll * group_ + number); }
  __device__ int partial_at(int turn, int group, bool is_last) const {
    return a_.sums + 4 * a_.kernel_w * (kAll * kGroups + (turn * kGroups + group) * kPartial + is_last);
  }
};

// The same of rows of kQuarterColumns columns, by all warpgroups: products of all shifts lie side by side, so that
// those of pixels as far apart are a diagonal: of two taps, one that is so many rows and columns further, and one a row
// more and a row of columns to the left.
template <typename T>
class DistanceSums {
 public:
  static constexpr int kPitch = (kGroups * kShifts + 1) * kLong / 32 * 32 + 32 + 8;  // floats: in all banks
  static __host__ __device__ int bytes(const Pieces&) { return 4 * kLong * kPitch; }

  __device__ DistanceSums(const Pieces& a, uint32_t memory) : a_(a), memory_(memory) {}

  // Where the products of a shift go, counted from the first one on.
  __device__ uint32_t place(int number) const { return memory_ + a_.sums + 4 * (a_.sum_left + number * kLong); }

  __device__ void put(const Item& item, int first_shift) const {
    constexpr int kWidth = kQuarterColumns, kRows = Rows<kWidth>::kCount, kAtOnce = kWidth / 2;  // loads: none waits
    const int before = a_.grad_before(item.filter), begins = a_.source_before(a_.channel_of(item.filter)) - before;
    const int first_row = item.first_row - 1;
    const uint32_t first = place(0) + 4 * ((first_row - a_.padding_h) * kWidth + begins - first_shift * kLong);
    for (int k = threadIdx.x; k < (item.last_row - first_row) * kWidth; k += 32 * kWarps) {
      const int row = k / kWidth, rest = k - row * kWidth, i = first_row + row, j = rest + a_.padding_w;
      // Columns of the gradient for which the input's are in the same row.
      const uint32_t columns = (1u << (kWidth - rest)) - 1;
      const uint32_t here = columns << before | columns >> (kWidth - before);
      const uint32_t from = first + 4 * k;
      float sum = 0, next = 0;
#pragma unroll
      for (int begin = 0; begin < kWidth; begin += kAtOnce) {
        float values[kAtOnce][kRows];
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            values[c][r] = __uint_as_float(load_word(from + 4 * (r * kWidth + begin + c) * (kPitch + 1)));
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
          const float total = (values[c][0] + values[c][1]) + (values[c][2] + values[c][3]);
          (here & 1u << (begin + c) ? sum : next) += total;
        }
      }
      put_tap<T>(a_, item, i, j, sum), put_tap<T>(a_, item, i + 1, j - kWidth, next);
    }
  }

 private:
  const Pieces& a_;
  uint32_t memory_;
};

// Taps that never meet the images: of rows of the kernel, and of columns.
template <typename T, int kWidth>
__device__ void put_others(const Pieces& a, const Item& item, int warp) {
  for (int i = warp; i < a.kernel_h; i += kWarps) {
    const bool meets = i >= a.first_row && i < a.last_row;
    if (meets ? i < item.first_row || i >= item.last_row || !Rows<kWidth>::kMayBeginBefore
              : item.first_row > a.first_row)
      continue;
    for (int j = threadIdx.x % 32; j < a.kernel_w; j += 32)
      if (!meets || j - a.padding_w < -kWidth || j - a.padding_w >= kWidth)
        a.result.put<T>(item.filter, item.split, i * a.tap_row + j * a.tap_column, 0);
  }
}

template <typename T, int kWidth, bool kFlat>
__global__ void __launch_bounds__(launch_threads(kThreads), 1) outer_pieces(const __grid_constant__ Pieces a) {
  if (!kHasWarpgroups) return;
  constexpr bool kSideBySide = Rows<kWidth>::kMayBeginBefore, kHasEdges = kFlat || kSideBySide;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool looks_after = kHasEdges || a.result.with_bias();
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; ++s) {
      init_barrier(a.full(s), 1), init_barrier(a.ready(s), kWarpArrivals);
      init_barrier(a.empty(s), (kWarps + looks_after) * kWarpArrivals);
    }
    for (int t = 0; t < Pieces::kTurns; ++t) init_barrier(Pieces::kStored + 8 * t, kWarps * kWarpArrivals);
  }
  // Where stages begin, as a multiple of an address, with zeros before and behind.
  const int stages = a.first_stage + static_cast<int>(-shared_address(a.first_stage) % kBoxAlignment) + a.piece_bytes();
  for (int at = kUnit * threadIdx.x; at < a.piece_bytes(); at += kUnit * kThreads)
    shared<uint4>(stages - a.piece_bytes() + at) = shared<uint4>(stages + a.stages * a.stage_bytes() + at) = uint4{};
  if constexpr (kSideBySide)  // and beside the products
    for (int at = kUnit * threadIdx.x; at < DistanceSums<T>::bytes(a); at += kUnit * kThreads)
      shared<uint4>(a.sums + at) = uint4{};
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  if (warp == kWarps) {
    if (is_elected()) load_pieces<kWidth, kFlat>(a, stages);
    return;
  }
  if (warp > kWarps) {
    if (looks_after) look_after_edges<T, kWidth, kFlat>(a, stages);
    return;
  }

  const uint32_t memory = kept_shared_address();
  const int group = warp / kGroupWarps, number_of_shift = group * kShifts;
  const uint32_t scratch = memory + a.scratch + group * kProductBytes;
  const uint32_t zeros_before = memory + stages - a.piece_bytes();
  const uint32_t zeros_behind = memory + stages + a.stages * a.stage_bytes();
  std::conditional_t<kSideBySide, DistanceSums<T>, RowSums<T>> sums(a, memory);
  // Warpgroups go from item to item as they can, where each has sums of its own. What two of them have in part is added
  // up an item later, when both have stored it.
  Turn turn, sum_turn;
  int number_before = -1;
  const auto put_partial = [&] {
    if constexpr (!kSideBySide) {
      if (number_before < 0) return;
      const Item item(a, number_before);
      wait_at(memory + Pieces::kStored + 8 * (sum_turn.stage ^ 1), sum_turn.parity ^ (sum_turn.stage == 0));
      const int first = a.first_shift[item.group];
      sums.put_partial(item, first + number_of_shift, a.last_shift[item.group] - first, sum_turn.stage ^ 1);
    }
  };
#pragma unroll 1
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const int first_shift = a.first_shift[item.group], last_shift = a.last_shift[item.group];
    const int shift = first_shift + number_of_shift;
    const bool is_needed = shift < last_shift, has_next = shift + 1 < last_shift;
    const bool is_mended = kSideBySide || (kFlat && a.channel_of(item.filter) == 0);
    Products<kFlat && !kSideBySide> products;
    products.clear();
#pragma unroll 1
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      wait_at(memory + (is_mended ? a.ready(turn.stage) : a.full(turn.stage)), turn.parity);
      const uint32_t source = memory + stages + turn.stage * a.stage_bytes();
      if (is_needed) products.template add<T>(a, source, source + a.factor_bytes(), zeros_before, zeros_behind, shift);
      arrive_together_at(memory + a.empty(turn.stage), lane == 0);
    }
    if constexpr (kSideBySide) {
      if (is_needed) products.template store<0>(sums.place(number_of_shift), sums.kPitch, 0, 0);
      if (has_next) products.template store<1>(sums.place(number_of_shift + 1), sums.kPitch, 0, 0);
      meet<1>(32 * kWarps);
      sums.put(item, first_shift);
      meet<1>(32 * kWarps);
    } else {
      if (is_needed) {
        meet_group(2 + group);
        products.template store<0>(scratch, kLong, a.grad_begin, a.source_begin);
        meet_group(2 + group);
        sums.template add<0>(scratch);
        meet_group(2 + group);
        if (has_next) {
          products.template store<1>(scratch, kLong, a.grad_begin, a.source_begin);
          meet_group(2 + group);
          sums.template add<1>(scratch);
          meet_group(2 + group);
        }
        sums.put_whole(item, shift, has_next);
      }
      put_partial();
      if (is_needed) sums.store_partial(sum_turn.stage, has_next);
      arrive_together_at(memory + Pieces::kStored + 8 * sum_turn.stage, lane == 0);
      number_before = number, sum_turn.next(Pieces::kTurns);
    }
    if (!a.all_meet) put_others<T, kWidth>(a, item, warp);
  }
  put_partial();
}

template <typename T, int kWidth, bool kFlat>
void launch(const Problem& p, const Pieces& a, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = outer_pieces<T, kWidth, kFlat>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = std::min<int64_t>(a.items(), current_device().multiprocessors);
  launch_early(kernel, a, blocks, kThreads, stream, {.shared_bytes = shared_bytes});
  check_launch("outer_pieces");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

// Into how many parts the images are divided.
int splits_for(const Pieces& a, int multiprocessors) {
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int units = static_cast<int>(ceil_div(a.images, a.stage_images()));
  const int fewest = static_cast<int>(std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.pieces, kLongest), 1, units));
  const double unit = 24. * kShifts * kGroups * a.pieces * a.steps;  // cycles of multiplications
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(units, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(int64_t{a.filters} * a.groups * splits, multiprocessors));
    const double cost = rounds * (static_cast<double>(ceil_div(units, splits)) * unit + 2500) + (splits > 1 ? 5000 : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

// Fills in what depends on the columns of a plane.
template <int kWidth>
bool arrange(Pieces& a, const Problem& p, const ImagePlanes& source, const ImagePlanes& grad) {
  using R = Rows<kWidth>;
  const int plane = 2 * source.height * source.width;
  const auto begin_of = [](const ImagePlanes& v) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(v.base) % kUnit / 2);
  };
  a.plane = plane / 2, a.source_begin = begin_of(source), a.grad_begin = begin_of(grad);
  const bool is_flat = a.is_flat();
  if (R::kMayBeginBefore) {
    a.before = plane % kUnit / 2;
    if (plane % (kUnit / 2) > 0 || (a.before > 0 && (a.planes.multiplier > 1 || a.filters % 2 > 0))) return false;
  } else if (source.height % R::kCount > 0 || a.kernel_w > 32 * RowSums<__half>::kMost) {
    return false;
  }
  const int most_before = !R::kMayBeginBefore ? 0 : is_flat ? kUnitPixels - 1 : a.before;
  a.pieces = static_cast<int>(ceil_div(a.plane + most_before, kLong));
  a.images = static_cast<int>(p.batch);
  constexpr int kMostGroups = R::kMayBeginBefore ? 1 : kMostParts;
  for (a.groups = 1; a.groups <= kMostGroups; ++a.groups) {
    a.group_rows = static_cast<int>(ceil_div(a.last_row - a.first_row, a.groups));
    int most = 0, group = 0;
    for (int row = a.first_row; row < a.last_row; row += a.group_rows, ++group) {
      const ShiftsOf<kWidth> shifts(a, row, std::min(row + a.group_rows, a.last_row));
      a.first_shift[group] = shifts.first, a.last_shift[group] = shifts.last;
      most = std::max(most, shifts.last - shifts.first);
    }
    if (most <= kGroups * kShifts) break;
  }
  if (a.groups > kMostGroups) return false;
  a.groups = static_cast<int>(ceil_div(a.last_row - a.first_row, a.group_rows));
  a.by_groups = Divider(a.groups), a.by_multiplier = Divider(p.multiplier);
  a.all_meet = a.last_row - a.first_row == a.kernel_h &&
               (!R::kMayBeginBefore || (a.padding_w <= kWidth && a.kernel_w - a.padding_w <= kWidth));
  a.sums = Pieces::kSums;
  if constexpr (R::kMayBeginBefore) {
    // The distances that there may be, as the kernel goes through them.
    const int beside = is_flat ? kUnitPixels : 0;  // where planes begin differently
    const int least = (a.first_row - 1 - a.padding_h) * kWidth - beside;
    const int most = (a.last_row - a.padding_h) * kWidth - 1 + kLong + beside, first = a.first_shift[0] * kLong;
    a.sum_left = static_cast<int>(round_up(std::max(first - least, 0), 2));  // pairs are stored
    if (a.sum_left + most - first > DistanceSums<__half>::kPitch) return false;
    a.first_stage = a.sums + DistanceSums<__half>::bytes(a);
  } else {
    a.scratch = a.sums + static_cast<int>(round_up(RowSums<__half>::bytes(a), kUnit));
    a.first_stage = a.scratch + kGroups * kProductBytes;
  }
  const auto stages = [&] {
    const int64_t room = current_device().shared_per_block - a.first_stage - (kBoxAlignment - 1) - 2 * a.piece_bytes();
    return static_cast<int>(std::min<int64_t>(room / a.stage_bytes(), kMaxStages));
  };
  // As many steps as leave three stages, and not more images that there are not.
  a.steps = 1;
  for (int steps = 2; steps <= kMaxSteps; ++steps) {
    const int before = std::exchange(a.steps, steps);
    if (stages() < 3 || ceil_div(a.images, steps * kStepImages) * steps > ceil_div(a.images, kStepImages))
      a.steps = before;
  }
  a.stages = stages();
  if (a.stages < 2) return false;

  const auto describe = [&](CUtensorMap(&maps)[2], const ImagePlanes& v, int64_t channels, int begin) {
    const int images = a.stage_images();
    if (v.row_bytes != 2 * v.width) return false;
    const auto describe_pieces = [&](CUtensorMap& map, int columns) {
      return describe_boxes(map, const_cast<char*>(v.base) - 2 * begin, 2, {columns, a.images, a.pieces, channels},
                            {v.image_bytes, 2 * kLong, v.channel_bytes}, {kBoxPitch / 2, images, a.pieces, 1},
                            CU_TENSOR_MAP_SWIZZLE_128B);
    };
    if (is_flat) {
      if (channels > 1 && v.channel_bytes != plane) return false;
      return describe_boxes(maps[0], const_cast<char*>(v.base) + 2 * left_out(begin), 2,
                            {channels * a.plane - left_out(begin), a.images, 1, 1},
                            {v.image_bytes, v.image_bytes, v.image_bytes}, {kBoxPitch / 2, images, 1, 1},
                            CU_TENSOR_MAP_SWIZZLE_128B) &&
             (R::kMayBeginBefore || describe_pieces(maps[1], kBoxPitch / 2));
    }
    if constexpr (R::kMayBeginBefore) {
      if (channels > 1 && v.channel_bytes != plane) return false;
      for (int k = 0; k < 2 && k < channels; ++k) {
        const int before = k * a.before;
        if (!describe_boxes(maps[k], const_cast<char*>(v.base) + k * v.channel_bytes - 2 * before, 2,
                            {plane / 2 + before, a.images, (channels + 1 - k) / 2, 1},
                            {v.image_bytes, 2 * v.channel_bytes, v.image_bytes}, {kBoxPitch / 2, images, 1, 1},
                            CU_TENSOR_MAP_SWIZZLE_128B))
          return false;
      }
      return true;
    } else {
      return describe_pieces(maps[0], kLong);
    }
  };
  return describe(a.source_boxes, source, p.channels, a.source_begin) &&
         describe(a.grad_boxes, grad, p.filters(), a.grad_begin);
}

}  // namespace

bool launch_outer_grad_weight_pieces(const Problem& p, bool exchanged, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream) {
  if (!has_warpgroups(outer_pieces<__half, kHalfColumns, false>)) return false;
  const Device& device = current_device();
  if (source.height != grad.height || source.width != grad.width || !has_pieces(source.width)) return false;
  // Too few images to be worth to add up all products: as many as those of more pixels each.
  const int few_images = source.width == kHalfColumns ? kStepImages : 2 * kStepImages;
  if (p.batch < few_images) return false;
  const OuterSizes sizes = OuterSizes::of(p, false);
  Pieces a{};
  a.filters = static_cast<int>(p.filters());
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = exchanged ? 1 : a.kernel_w, a.tap_column = exchanged ? a.kernel_h : 1;
  a.first_row = static_cast<int>(sizes.first_row()), a.last_row = static_cast<int>(sizes.last_row());
  a.planes = pair_of(source, grad, p.multiplier);
  const bool is_half = source.width == kHalfColumns;
  if (!(is_half ? arrange<kHalfColumns>(a, p, source, grad) : arrange<kQuarterColumns>(a, p, source, grad)))
    return false;
  a.splits = splits_for(a, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  int64_t shared_bytes = a.first_stage + kBoxAlignment - 1 + 2 * a.piece_bytes() + int64_t{a.stages} * a.stage_bytes();
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto launch_by = [&](auto is_flat) {
        if (is_half) return launch<T, kHalfColumns, is_flat>(p, a, shared_bytes, stream);
        launch<T, kQuarterColumns, is_flat>(p, a, shared_bytes, stream);
      };
      a.is_flat() ? launch_by(std::true_type{}) : launch_by(std::false_type{});
    }
  });
  return true;
}

}  // namespace dwconv
