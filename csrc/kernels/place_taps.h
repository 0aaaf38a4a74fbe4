// The gradient of a kernel of whose taps only some in the middle meet the images.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

// Contiguous kernels of taps of `bytes` each: `whole` becomes zeros around `middle`, which begins `first_h` rows and
// `first_w` columns into it.
struct PlacedTaps {
  const void* middle;
  void* whole;
  int64_t bytes, filters;
  int64_t middle_h, middle_w, whole_h, whole_w;

  int64_t first_h() const { return (whole_h - middle_h) / 2; }
  int64_t first_w() const { return (whole_w - middle_w) / 2; }
};

void launch_place_taps(const PlacedTaps& taps, cudaStream_t stream);

}  // namespace dwconv
