// How the work of toeplitz_channels_last.cuh is cut into slabs of channels, spans of columns, and shares of rows.
#pragma once

#include <algorithm>

#include "mapping.h"
#include "toeplitz_channels_last_rows.cuh"

namespace dwconv {
namespace {

Rows rows_of(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  Rows r{};
  r.shift = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
  r.base = static_cast<char*>(view.data) - r.shift;
  r.image_bytes = view.stride[0] * 2, r.row_bytes = view.stride[2] * 2;
  r.pixel_bytes = static_cast<int>((width == 1 ? channels : view.stride[3]) * 2);
  r.bytes = static_cast<int>(channels * 2);
  r.height = static_cast<int>(height), r.width = static_cast<int>(width);
  return r;
}

// Pixels that a block copies together: 32 threads for the channels of each warp.
template <class Shape>
constexpr int kPixelsAtOnce = 16 / Shape::kChannels * kUnit;

// Fills in what a block has of an array.
template <class Shape>
void cut_rows(Rows& r, const Toeplitz& a, int columns, bool apart = false) {
  r.columns = columns;
  // From one image to the next as from one tile to the next.
  const int bytes = Shape::place_of(columns) + kUnit - 1 & -kUnit, next = a.tiles * kUnit % 128;
  r.stream_bytes = apart ? Shape::kImagePitch : bytes + (next - bytes % 128 + 128) % 128;
  r.warp_bytes = apart ? static_cast<int>(round_up(a.streams, 2)) * Shape::kImagePitch + kUnit : Shape::kWord;
  constexpr int at_once = kPixelsAtOnce<Shape>;
  const int there = std::min(columns, r.width);  // pixels
  r.columns_at_once = std::min(at_once, there), r.streams_at_once = at_once / r.columns_at_once;
  r.step = there > at_once ? int64_t{at_once} * r.pixel_bytes : r.streams_at_once * r.image_bytes;
  r.place_step = there > at_once ? Shape::place_of(at_once) : r.streams_at_once * r.stream_bytes;
  r.copies = there > at_once ? ceil_div(there, at_once) : ceil_div(a.streams, r.streams_at_once);
  const int units = 2 * a.slab / kUnit;
  r.by_units = Divider(units), r.by_columns = Divider(r.columns_at_once);
  r.by_all_units = Divider(units + (Shape::kShifted ? 1 : 0)), r.by_all_columns = Divider(there);
}

// Cuts a problem into slabs and spans, for blocks of at most `most_streams` images. Returns the bytes of shared memory
// that a block needs.
template <class Shape>
int cut(Toeplitz& a, int64_t room, int most_streams) {
  // Slabs begin at a multiple of a sector of 32 bytes.
  constexpr int kChannels = Shape::kChannels;
  const int64_t warps = ceil_div(a.channels, kChannels), slabs = ceil_div(warps, kMaxWarps);
  a.slab = static_cast<int>(slabs == 1 ? warps : round_up(ceil_div(warps, slabs), 16 / kChannels)) * kChannels;
  a.by_slabs = Divider(ceil_div(a.channels, a.slab));
  const int64_t tiles = ceil_div(a.target.width, Shape::kColumns);
  for (int most = kTiles;; --most) {  // as many tiles as fit
    a.spans = static_cast<int>(ceil_div(tiles, most)), a.tiles = static_cast<int>(ceil_div(tiles, a.spans));
    a.streams = std::min({(Shape::kSplit ? 2 : 1) * most / a.tiles, a.batch, most_streams});
    if (a.source.width > kPixelsAtOnce<Shape>) a.streams = 1;  // see Rows
    cut_rows<Shape>(a.source, a, a.tiles * Shape::kColumns + Shape::kReach);
    cut_rows<Shape>(a.target, a, a.tiles * Shape::kColumns, Shape::kApart);
    a.slot_bytes = Shape::kSourceRows * a.streams * a.source.stream_bytes;
    a.stage_bytes = Shape::kApart ? a.slab / kChannels * a.target.warp_bytes : a.streams * a.target.stream_bytes;
    a.ring_bytes = Shape::kDepth * a.slot_bytes, a.stages_bytes = Shape::kStages * a.stage_bytes;
    a.stage_at = kRing + a.ring_bytes;
    a.rows = static_cast<int>(ceil_div(a.batch, a.streams) * a.target.height);
    a.whole_rows = a.batch / a.streams * a.target.height;
    a.by_ring_rows = Divider(Shape::kDepth * Shape::kSourceRows * a.streams);
    const int groups = a.source.columns / 8;
    a.by_groups = Divider(groups), a.matrices = a.streams * groups;
    const int64_t octets = ceil_div(a.slab, 8) + (Shape::kShifted ? 1 : 0);  // of channels
    a.turns = static_cast<int>(ceil_div(a.matrices, 4) * octets);
    // Rows of tiles that are side by side, also from one image to the next, are read from all banks.
    a.stream_units = (groups + 1) / 2;
    if (a.streams > 1)
      while (a.stream_units % (2 * a.tiles) != a.tiles) ++a.stream_units;
    a.odd_bytes = a.streams * a.stream_units * kUnit;
    a.plane_bytes = static_cast<int>(round_up(2 * a.odd_bytes, 128)) + kUnit;
    a.planes_bytes = static_cast<int>(8 * octets) * a.plane_bytes;
    a.clear = a.batch % a.streams != 0 || a.channels % a.slab != 0 || a.padding_w > 0 ||
              a.source.width < tiles * Shape::kColumns + Shape::kReach;
    const int weights = a.slab * Shape::kBandRows * Shape::kBandBytes;
    a.bands_at = a.stage_at + (Shape::kKept ? 0 : a.stages_bytes);
    a.planes_at = std::max(a.stage_at + a.stages_bytes, a.bands_at + weights);
    const int bytes = a.planes_at + (Shape::kParted ? 2 * a.planes_bytes : 0);
    if (bytes <= room || most == 1) return bytes;
  }
}

// The number of images for which whole groups of them make even shares, if these cost less than shares cut anywhere,
// which load the rows around a cut twice; or else 0. The costs are estimates in steps of a block with all its images; a
// quarter of a step does not depend on how many there are.
template <class Shape>
int even_streams(const Toeplitz& a) {
  const double part = static_cast<double>(a.rows) * a.spans / a.workers;
  const int groups = a.rows / a.target.height * a.spans, share = static_cast<int>(ceil_div(groups, a.workers));
  const int streams = static_cast<int>(ceil_div(a.batch, std::max(a.workers * share / a.spans, 1)));
  if (streams > a.streams || ceil_div(a.batch, streams) * a.spans > int64_t{a.workers} * share) return 0;
  const double behind = (Shape::kRows - 1) / 2.;  // rows that complete an image
  const double whole = share * (a.target.height + behind) * (0.25 + 0.75 * streams / a.streams);
  const double any = part * (1 + behind / a.target.height) + Shape::kRows - 1;
  return Shape::kWhole || whole < any ? streams : 0;
}

// What does not depend on how a problem is cut. `lead`: see Toeplitz.
inline Toeplitz arguments_of(const Problem& p, int lead) {
  const Mapping map(p);
  Toeplitz a{};
  a.batch = static_cast<int>(p.batch), a.channels = map.sources;
  a.source = rows_of(map.source, p.batch, map.sources, map.height, map.width);
  a.target = rows_of(map.target, p.batch, map.targets, map.out_height, map.out_width);
  if (a.target.shift > 0) throw std::runtime_error("dwconv: an output of toeplitz_channels_last begins between units");
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.weight = map.weight.data, a.weight_filter = map.weight.stride[0];
  a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.lead = lead, a.first_tap = a.padding_w - lead;
  a.by_height = Divider(map.out_height), a.by_kernel_w = Divider(p.kernel_w);
  return a;
}

}  // namespace
}  // namespace dwconv
