#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

// grad_input of kernels with a single tap at a stride, on an array without gaps.
void launch_scale_spread(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
