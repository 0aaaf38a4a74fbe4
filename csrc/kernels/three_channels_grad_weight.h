// grad_weight of images of three channels.
#pragma once

#include "launch.h"

namespace dwconv {

// By three_channels_grad_weight.cu. Returns false, and launches nothing, where it does not fit.
bool launch_three_channels_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
