// What lanes_grad_weight.cu is compiled for: what plan.cpp asks before, and the launcher after.
#pragma once

#include <algorithm>
#include <iterator>

#include "../problem.h"

namespace dwconv {

// What code is compiled for: planes of up to `side` columns, taps that lie up to `reach` columns from the middle, and
// so many rows of them for each warp.
struct LanesForm {
  int side, reach, tap_rows;

  // Planes of a warp: images, or channels in channels_last.
  constexpr int units() const { return side == 14 ? 16 : side == 28 ? 8 : 4; }
};
constexpr LanesForm kLanesForms[] = {{14, 13, 2}, {28, 4, 3}, {28, 6, 3}, {28, 14, 2}, {56, 15, 1}, {56, 25, 1}};

// The number of the form that serves, of those that waste little; -1 for none.
inline int find_lanes_form(int64_t planes, int64_t width, int64_t out_width, int64_t kernel_w, int64_t padding_w) {
  const int64_t most = std::max(width, out_width), reach = std::max(padding_w, kernel_w - 1 - padding_w);
  for (int number = 0; number < static_cast<int>(std::size(kLanesForms)); ++number) {
    const LanesForm& form = kLanesForms[number];
    const int64_t idle = -planes & (form.units() - 1);
    if (most <= form.side && 8 * most >= 7 * form.side && reach <= form.reach &&
        4 * kernel_w >= 3 * (2 * form.reach + 1) && 3 * idle <= planes)
      return number;
  }
  return -1;
}

// Whether launch_lanes_grad_weight is sure to serve planes whose rows lie side by side.
inline bool is_sure_of_lanes(const Problem& p) {
  const int number = find_lanes_form(p.batch, p.width, p.out_width, p.kernel_w, p.padding_w);
  if (number < 0 || p.capability < 80 || p.kernel_h > 2 * p.kernel_w) return false;
  constexpr int64_t kBesidesStages = 12 << 10;
  const LanesForm& form = kLanesForms[number];
  constexpr int64_t kManyItems = 256;  // no device has more multiprocessors than twice that
  if (p.filters() * ((p.batch + form.units() - 1) / form.units()) < kManyItems) return false;
  const int64_t plane_bytes = 4 * form.side * (p.height + p.out_height) + 64;
  return 2 * form.units() * plane_bytes + kBesidesStages <= p.shared_memory;
}

}  // namespace dwconv
