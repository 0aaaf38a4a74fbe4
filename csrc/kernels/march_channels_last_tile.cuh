// What march_channels_last.cu is asked for, and what its kernels are compiled for.
#pragma once

#include <algorithm>

#include "boxes.cuh"
#include "march_channels_last_rows.cuh"

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

  // Whether it is compiled for bulk copies of pixels of whole units: three channels are never so many bytes.
  static constexpr bool kBulk = kChannels == 2 || kFan == 2 || kKernelH > 3;
  // Whether it is compiled for bulk copies of pixels that fit no units, too.
  static constexpr bool kJoins = kFan == 1 && !kTwins && kDilation == 1 && kKernelH > 1 && kKernelW > 1 &&
                                 kKernelH <= 7 && !(kSpread && kChannels == 2);
  // Whether bulk copies are those of boxes: where a thread takes so many registers that a block has 8 warps at most,
  // none of which can be spared, nor are they as many as all channels have.
  static constexpr bool kBoxes = kBulk && kKernelH > 7 && kKernelW > 7;
  // Whether it is compiled for bulk copies of shifted pixels, too: not where they would cost registers of too many
  // threads.
  static constexpr bool kShifts = kBulk && !kBoxes && kRowDilation == 1;
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

// How rows come to shared memory: by all threads; or by bulk copies, of pixels of whole units, of shifted ones, or of
// pixels that fit no units. Each is a kernel of its own: none pays for what another one masks, or for its instructions.
enum class Way { kThreads, kBulk, kShifted, kJoined };

}  // namespace
}  // namespace dwconv
