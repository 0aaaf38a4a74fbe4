// The way of batch_grad_weight_nchw.cu for rows of whole words.
#pragma once

#include "launch.h"

namespace dwconv {

// Returns whether it serves the problem, of those that are claimed.
// `bulk`: by bulk copies and clusters of blocks, where the GPU has them.
bool launch_padded_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
