// What the launcher of kernels/toeplitz_large.cu has to know of kernels/toeplitz_large_planes.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "toeplitz_large.h"

namespace dwconv {

// Launches a kernel for whole planes of images, if there is one that is faster than toeplitz_large. Returns whether.
bool launch_toeplitz_large_planes(const LargeProblem& problem, cudaStream_t stream);

// The same on multiplications that warps begin together, where there are such.
bool launch_toeplitz_large_groups(const LargeProblem& problem, cudaStream_t stream);

// The same for many images of planes so small that a multiplication leads to all rows of a target.
bool launch_toeplitz_large_images(const LargeProblem& problem, cudaStream_t stream);

}  // namespace dwconv
