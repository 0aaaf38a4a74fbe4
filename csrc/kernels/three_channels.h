// Forward and grad_input of images of three channels.
#pragma once

#include "launch.h"

namespace dwconv {

// By three_channels.cu. Returns false, and launches nothing, where it does not fit.
bool launch_three_channels(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
