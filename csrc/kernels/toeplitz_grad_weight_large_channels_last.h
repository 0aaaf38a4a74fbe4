// Another way to take what outer_grad_weight.cu serves: images in channels_last as they are.
#pragma once

#include "launch.h"

namespace dwconv {

// Takes a problem of outer_grad_weight whose images are in channels_last. Returns whether it can, and is worth it.
bool launch_toeplitz_grad_weight_large_channels_last(const Problem& problem, const Allocate& allocate,
                                                     cudaStream_t stream);

}  // namespace dwconv
