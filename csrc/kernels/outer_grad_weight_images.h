// Another way to take what outer_grad_weight.cu serves: planes of few columns as they are, in shared memory.
#pragma once

#include "launch.h"
#include "planes.cuh"

namespace dwconv {

// Takes what outer_grad_weight.cu has of a problem `p` whose rows and columns are exchanged or not. Returns whether it
// can, and is worth it.
bool launch_outer_grad_weight_images(const Problem& p, bool exchanged, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
