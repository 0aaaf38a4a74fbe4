// What lanes.cu, lanes_channels_last.cu and lanes_grad_weight.cu are compiled for: what claims ask before, and the
// launchers after.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "../problem.h"

namespace dwconv {

// Planes of up to `side` columns, and taps that lie up to `reach` columns from the middle.
struct RowForm {
  int side, reach;

  // Whether few lanes are idle that lie on so many of them.
  static constexpr bool fills(int64_t planes, int64_t units) { return 3 * (-planes & (units - 1)) <= planes; }
  // Whether of a row's products enough are of taps that meet the image: code for any size multiplies half as fast.
  bool wastes_few_products(int64_t width, int64_t out_width, int64_t kernel_w, int64_t padding_w) const {
    int64_t all = 0, useful = 0;
    for (int64_t shift = -reach; shift <= reach; ++shift) {
      all += side - std::abs(shift);
      if (shift >= -padding_w && shift < kernel_w - padding_w)
        useful += std::max<int64_t>(std::min(width, out_width + shift) - std::max<int64_t>(shift, 0), 0);
    }
    return 10 * all <= 19 * useful;
  }
  // Whether it is made for about as many taps.
  bool is_for(int64_t kernel_w) const { return 4 * kernel_w >= 3 * (2 * reach + 1); }
  // Whether code for it wastes little, if so many planes are computed together.
  bool serves(int64_t planes, int64_t units, int64_t width, int64_t out_width, int64_t kernel_w,
              int64_t padding_w) const {
    const int64_t most = std::max(width, out_width), far = std::max(padding_w, kernel_w - 1 - padding_w);
    return most <= side && 8 * most >= 7 * side && far <= reach && fills(planes, units) &&
           wastes_few_products(width, out_width, kernel_w, padding_w);
  }
};

// What lanes.cu is compiled for: what a lane has, images and neighbouring rows of outputs of each, and how many lanes
// lie side by side, on images, at least and at most; others lie on rows.
struct RowsForm : RowForm {
  int images, rows, least_lanes, lanes;
  bool staged;  // whether outputs go out through shared memory
  int parts;    // of a plane's columns, of which a lane has one

  constexpr RowsForm(RowForm form, int images, int rows, int least_lanes, int lanes, bool staged, int parts = 1)
      : RowForm(form),
        images(images),
        rows(rows),
        least_lanes(least_lanes),
        lanes(lanes),
        staged(staged),
        parts(parts) {}
};
constexpr RowsForm kRowsForms[] = {
    {{14, 13}, 2, 2, 32, 32, true},  {{28, 4}, 2, 1, 8, 8, true},      {{28, 6}, 2, 1, 8, 8, true},
    {{28, 14}, 2, 1, 8, 16, false},  {{56, 2}, 1, 1, 8, 8, true},      {{56, 6}, 1, 1, 8, 8, true},
    {{56, 8}, 1, 1, 8, 8, false},    {{56, 10}, 1, 1, 8, 8, false},    {{56, 12}, 1, 1, 8, 8, false},
    {{56, 15}, 1, 1, 8, 8, false},   {{56, 18}, 1, 1, 8, 8, false, 2}, {{56, 25}, 1, 1, 4, 8, false, 2},
    {{56, 31}, 1, 1, 4, 8, false, 2}};

// The number of the form that serves; -1 for none.
inline int find_rows_form(int64_t batch, int64_t width, int64_t out_width, int64_t kernel_w, int64_t padding_w) {
  for (int number = 0; number < static_cast<int>(std::size(kRowsForms)); ++number) {
    const RowsForm& form = kRowsForms[number];
    if (form.serves(batch, form.images * form.least_lanes, width, out_width, kernel_w, padding_w)) return number;
  }
  return -1;
}

// Whether launch_lanes is sure to serve planes whose rows lie side by side.
inline bool is_sure_of_rows(const Problem& p) {
  const int number = find_rows_form(p.batch, p.width, p.out_width, p.kernel_w, p.padding_w);
  if (number < 0 || p.capability < 80) return false;
  const RowsForm& form = kRowsForms[number];
  if (!form.is_for(p.kernel_w)) return false;
  const int64_t units = form.images * form.least_lanes, rows = 32 / form.least_lanes * form.rows;
  constexpr int64_t kManyItems = 512;  // no device has more multiprocessors than a third of that
  if (p.filters() * ((p.batch + units - 1) / units) < kManyItems) return false;
  const int64_t height = std::max(p.height, p.out_height);
  constexpr int64_t kStages = 2, kWarps = 12, kKernel = 8 << 10, kBesidesStages = 64 << 10;
  return kStages * std::min(p.height, p.out_height) >= kWarps * rows &&
         kStages * (units * 4 * form.side * (height + 1) + kKernel) + kBesidesStages <= p.shared_memory;
}

// What lanes_channels_last.cu is compiled for.
struct ChannelsForm : RowForm {
  constexpr int units() const { return side == 56 ? 8 : side == 28 && reach > 6 ? 16 : 32; }  // channels of a warp
  // The images of all groups of channels, as many as can be shared out among any device's multiprocessors.
  constexpr int many_group_images() const { return units() == 32 ? 256 : 512; }
};
constexpr ChannelsForm kChannelForms[] = {{{14, 13}}, {{28, 4}},  {{28, 6}},  {{28, 14}}, {{56, 6}}, {{56, 8}},
                                          {{56, 10}}, {{56, 12}}, {{56, 15}}, {{56, 18}}, {{56, 25}}};

// Whether launch_lanes_channels_last is sure to serve a square kernel.
inline bool is_sure_of_lanes_channels_last(const Problem& p) {
  constexpr int64_t kUnit = 4, kMostHeight = 64;  // of planes that are sure to fit; kUnit: elements of 16 bytes
  const bool forward = p.pass == Pass::kForward;
  const View &source = forward ? p.input : p.output, &target = forward ? p.output : p.input;
  const int64_t width = forward ? p.width : p.out_width, out_width = forward ? p.out_width : p.width;
  const int64_t padding = forward ? p.padding_w : p.kernel_w - 1 - p.padding_w;
  if (p.capability < 90 || p.shared_memory < 227 << 10 || p.kernel_h != p.kernel_w || p.multiplier > 1) return false;
  if (source.stride[1] != 1 || target.stride[1] != 1 || std::max(p.height, p.out_height) > kMostHeight) return false;
  if (target.stride[3] >= 1 << 29) return false;
  for (const int64_t stride : {source.stride[0], source.stride[2], source.stride[3]})
    if (stride % kUnit != 0 || stride <= 0 || stride >= int64_t{1} << 38) return false;
  for (const ChannelsForm& form : kChannelForms)
    if (form.is_for(p.kernel_w) && form.serves(p.channels, form.units(), width, out_width, p.kernel_w, padding))
      return p.batch * ((p.channels + form.units() - 1) / form.units()) >= form.many_group_images();
  return false;
}

// What lanes_grad_weight.cu is compiled for: rows of taps for each warp besides.
struct LanesForm : RowForm {
  int tap_rows;

  constexpr LanesForm(int side, int reach, int tap_rows) : RowForm{side, reach}, tap_rows(tap_rows) {}

  // Filters and images that the lanes of a warp lie on; what is left of them lies on rows.
  constexpr int filters(bool channels_last) const { return side == 14 ? 4 : !channels_last ? 1 : side == 28 ? 8 : 4; }
  constexpr int images(bool channels_last) const { return side == 14 ? 8 : channels_last ? 1 : side == 28 ? 8 : 4; }
  // Whether no tap that lies farther meets an image.
  constexpr bool has_all_taps() const { return reach == side - 1; }
  // Whether planes and kernels fit.
  bool fits(int64_t width, int64_t out_width, int64_t kernel_w, int64_t padding_w) const {
    return std::max(width, out_width) <= side &&
           (has_all_taps() || std::max(padding_w, kernel_w - 1 - padding_w) <= reach);
  }
  bool serves(int64_t width, int64_t out_width, int64_t kernel_w, int64_t padding_w) const {
    return fits(width, out_width, kernel_w, padding_w) && wastes_few_products(width, out_width, kernel_w, padding_w);
  }
};
constexpr LanesForm kLanesForms[] = {{14, 13, 1}, {28, 4, 3},  {28, 6, 3},  {28, 14, 2}, {56, 6, 1},
                                     {56, 10, 1}, {56, 15, 1}, {56, 18, 1}, {56, 25, 1}};

// The number of the form that serves, of those that waste little; -1 for none.
inline int find_lanes_form(bool channels_last, int64_t batch, int64_t filters, int64_t width, int64_t out_width,
                           int64_t kernel_w, int64_t padding_w) {
  for (int number = 0; number < static_cast<int>(std::size(kLanesForms)); ++number) {
    const LanesForm& form = kLanesForms[number];
    if (form.fills(batch, form.images(channels_last)) && form.fills(filters, form.filters(channels_last)) &&
        form.serves(width, out_width, kernel_w, padding_w))
      return number;
  }
  return -1;
}

// Whether launch_lanes_grad_weight is sure to serve planes whose rows lie side by side, and wastes few columns.
inline bool is_sure_of_lanes(const Problem& p) {
  const int number = find_lanes_form(false, p.batch, p.filters(), p.width, p.out_width, p.kernel_w, p.padding_w);
  if (number < 0 || p.capability < 80 || p.kernel_h > 2 * p.kernel_w) return false;
  constexpr int64_t kBesidesStages = 12 << 10;
  const LanesForm& form = kLanesForms[number];
  if (8 * std::max(p.width, p.out_width) < 7 * form.side || !form.is_for(p.kernel_w)) return false;
  constexpr int64_t kManyItems = 256;  // no device has more multiprocessors than twice that
  const int64_t images = form.images(false), filters = form.filters(false);
  if ((p.filters() + filters - 1) / filters * ((p.batch + images - 1) / images) < kManyItems) return false;
  const int64_t plane_bytes = 4 * form.side * (p.height + p.out_height) + 64;
  return 2 * images * filters * plane_bytes + kBesidesStages <= p.shared_memory;
}

}  // namespace dwconv
