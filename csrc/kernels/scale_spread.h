// The part of scale.cu that has a stride: grad_input of a single tap writes zeros, and between them a gradient times
// its channel's weight, to an array without gaps.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

void launch_scale_spread(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
