// Forward and grad_input of small kernels in channels_last (march_channels_last.cuh). A thread owns one channel, or two
// neighbouring ones, or all three of an image that has three, of a strip of columns. It marches down the image: each
// source row, read once, is added to all the output rows that it reaches, whose sums are in registers; the oldest of
// them is then complete. Outputs go to memory directly, or, where they are many to a source row, by way of shared
// memory, from which bulk copies take them.
#include "launch.h"
#include "mapping.h"
#include "march_channels_last.cuh"
#include "march_channels_last_cut.cuh"
#include "small_kernels.h"
#include "three_channels.h"

namespace dwconv {
namespace {

template <typename T, class Tile>
void launch(March a, cudaStream_t stream) {
  if (Tile::kHalves) {
    a.rows = a.height, a.height = (a.height + 1) / 2;
    a.source.row_bytes *= 2, a.target_row_bytes *= 2;
    const int images = a.all_units / a.units;
    a.units = (a.units + 1) / 2, a.all_units = 2 * images * a.units;
  }
  constexpr TileSize kTile{Tile::kKernelH, Tile::kKernelW, Tile::kChannels,
                           Tile::kFan,     Tile::kPair,    Tile::kStep,
                           Tile::kStrip,   Tile::kLive,    Tile::kExtentH,
                           Tile::kExtentW, Tile::kLeaves,  Tile::kSkips,
                           Tile::kJoins,   Tile::kHalves,  Tile::kBoxes,
                           Tile::kShifts,  Tile::kLoading, {Tile::kMaxThreads, Tile::kBulkThreads}};
  const Device& device = current_device();
  const bool shifted = Tile::kShifts && a.source.shift > 0, joined = Tile::kJoins && a.source.joined;
  const auto kernel_for = [&](bool bulk) {
    constexpr Way kBulk = Tile::kBulk ? Way::kBulk : Way::kThreads, kShifted = Tile::kShifts ? Way::kShifted : kBulk;
    constexpr Way kJoined = Tile::kJoins ? Way::kJoined : kBulk;
    if (!bulk) return march_channels_last<T, Tile, Way::kThreads>;
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
