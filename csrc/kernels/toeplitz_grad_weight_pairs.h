// grad_weight of two filters a channel at stride 2, in 16 bits.
#pragma once

#include "launch.h"

namespace dwconv {

// By toeplitz_grad_weight_pairs.cu. Returns false, and launches nothing, where it does not fit.
bool launch_toeplitz_grad_weight_pairs(const Problem& p, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
