// Another way to take what outer_grad_weight.cu serves: tall kernels by warpgroups, which sm_90 alone has.
#pragma once

#include "launch.h"
#include "planes.cuh"

namespace dwconv {

// Takes what outer_grad_weight.cu has of a problem `p` whose rows and columns are exchanged, but not those of its
// planes. Returns whether it can, and is worth it.
bool launch_outer_grad_weight_tall(const Problem& p, const ImagePlanes& source, const ImagePlanes& grad,
                                   const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
