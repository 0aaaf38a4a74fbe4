// The way of batch_grad_weight_nchw.cu for planes of few pixels, and of 28 columns.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed. `bulk`: by bulk copies, where the GPU has them.
bool launch_flat_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
