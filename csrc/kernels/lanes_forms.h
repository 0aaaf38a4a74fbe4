// What lanes.cu and lanes_grad_weight.cu are compiled for: what plan.cpp asks before, and the launchers after.
#pragma once

#include <algorithm>
#include <iterator>

#include "../problem.h"

namespace dwconv {

// Planes of up to `side` columns, and taps that lie up to `reach` columns from the middle.
struct RowForm {
  int side, reach;

  // Images of a warp of lanes.cu.
  constexpr int units() const { return side == 56 ? 8 : 16; }
  // Whether code for it wastes little.
  bool serves(int64_t planes, int64_t units, int64_t width, int64_t out_width, int64_t kernel_w,
              int64_t padding_w) const {
    const int64_t most = std::max(width, out_width), far = std::max(padding_w, kernel_w - 1 - padding_w);
    const int64_t idle = -planes & (units - 1);
    return most <= side && 8 * most >= 7 * side && far <= reach && 4 * kernel_w >= 3 * (2 * reach + 1) &&
           3 * idle <= planes;
  }
};

// What lanes.cu is compiled for.
constexpr RowForm kRowForms[] = {{28, 4}, {28, 6}, {28, 14}, {56, 15}, {56, 2}, {56, 25}};

// The number of the form that serves; -1 for none.
inline int find_row_form(int64_t batch, int64_t width, int64_t out_width, int64_t kernel_w, int64_t padding_w) {
  for (int number = 0; number < static_cast<int>(std::size(kRowForms)); ++number)
    if (kRowForms[number].serves(batch, kRowForms[number].units(), width, out_width, kernel_w, padding_w))
      return number;
  return -1;
}

// What lanes_grad_weight.cu is compiled for: rows of taps for each warp besides.
struct LanesForm : RowForm {
  int tap_rows;

  constexpr LanesForm(int side, int reach, int tap_rows) : RowForm{side, reach}, tap_rows(tap_rows) {}

  // Planes of a warp: images, or channels in channels_last.
  constexpr int units(bool channels_last) const { return side == 14 ? (channels_last ? 8 : 32) : side == 28 ? 8 : 4; }
};
constexpr LanesForm kLanesForms[] = {{14, 13, 2}, {28, 4, 3}, {28, 6, 3}, {28, 14, 2}, {56, 15, 1}, {56, 25, 1}};

// The number of the form that serves, of those that waste little; -1 for none.
inline int find_lanes_form(bool channels_last, int64_t planes, int64_t width, int64_t out_width, int64_t kernel_w,
                           int64_t padding_w) {
  for (int number = 0; number < static_cast<int>(std::size(kLanesForms)); ++number)
    if (kLanesForms[number].serves(planes, kLanesForms[number].units(channels_last), width, out_width, kernel_w,
                                   padding_w))
      return number;
  return -1;
}

// Whether launch_lanes_grad_weight is sure to serve planes whose rows lie side by side.
inline bool is_sure_of_lanes(const Problem& p) {
  const int number = find_lanes_form(false, p.batch, p.width, p.out_width, p.kernel_w, p.padding_w);
  if (number < 0 || p.capability < 80 || p.kernel_h > 2 * p.kernel_w) return false;
  constexpr int64_t kBesidesStages = 12 << 10;
  const LanesForm& form = kLanesForms[number];
  constexpr int64_t kManyItems = 256;  // no device has more multiprocessors than twice that
  if (p.filters() * ((p.batch + form.units(false) - 1) / form.units(false)) < kManyItems) return false;
  const int64_t plane_bytes = 4 * form.side * (p.height + p.out_height) + 64;
  return 2 * form.units(false) * plane_bytes + kBesidesStages <= p.shared_memory;
}

}  // namespace dwconv
