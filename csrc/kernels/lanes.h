// The way of large_float32.cu for planes about as wide as code is compiled for.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed.
bool launch_lanes(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
