// The way of large_float32_grad_weight.cu for planes about as wide as code is compiled for.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed.
bool launch_lanes_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
