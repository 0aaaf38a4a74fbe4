// The ways of the plan toeplitz_grad_weight_channels_last that have a file of their own. Each returns false, and
// launches nothing, where the problem is not for it.
#pragma once

#include "launch.h"

namespace dwconv {

bool launch_toeplitz_grad_weight_images(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
bool launch_toeplitz_grad_weight_rows(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
