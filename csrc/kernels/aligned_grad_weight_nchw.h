// The way of batch_grad_weight_nchw.cu for rows of 48 columns and more, of whole units of 16 bytes above all.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed. `bulk`: by bulk copies, where the GPU has them.
bool launch_aligned_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
