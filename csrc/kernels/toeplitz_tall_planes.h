// What the launcher of kernels/toeplitz_large.cu has to know of kernels/toeplitz_tall_planes.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

// Launches a kernel for tall kernels of few columns, if there is one for this problem, whose rows and columns are
// exchanged. Returns whether.
bool launch_toeplitz_tall_planes(const Problem& exchanged, cudaStream_t stream);

// The same on multiplications that warps begin together, where there are such.
bool launch_toeplitz_tall_groups(const Problem& exchanged, cudaStream_t stream);

}  // namespace dwconv
