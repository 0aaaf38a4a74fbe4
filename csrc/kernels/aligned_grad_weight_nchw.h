// The way of batch_grad_weight_nchw.cu for rows that begin with 16 bytes.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed.
bool launch_aligned_grad_weight_nchw(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
