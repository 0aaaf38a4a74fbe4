#pragma once

#include "launch.h"

namespace dwconv {

// What generic.cu does for forward and grad_input in float64, where the kernel has many rows and the stride is 1.
// Returns false, and launches nothing, where it is not for it.
bool launch_columns(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
