// The way of large_float32.cu for channels_last, on planes about as wide as code is compiled for.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed.
bool launch_lanes_channels_last(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
