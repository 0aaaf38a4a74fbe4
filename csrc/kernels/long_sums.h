// How long the sums of float32 may be that make up a gradient of the weight.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dwconv {

// Products that may be summed one after the other where a weight has so many of a batch's pixels: as many as a thread
// of PyTorch's kernel has, which gives 32 of them to each image, up to 256. What such runs make up is added up
// pairwise, or is short; then it is no less exact.
inline int64_t products_of_run(int64_t batch, int64_t pixels) {
  return std::max<int64_t>(batch * pixels / (32 * std::min<int64_t>(batch, 8)), 1);
}

}  // namespace dwconv
