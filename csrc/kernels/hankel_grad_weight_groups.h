// Another way to take what hankel_grad_weight.cu serves: whole planes by warpgroups, which sm_90 alone has.
#pragma once

#include "launch.h"
#include "planes.cuh"

namespace dwconv {

// Takes a problem `p` whose rows and columns are exchanged or not. Returns whether it can, and is worth it.
bool launch_hankel_grad_weight_groups(const Problem& p, bool exchanged, const ImagePlanes& source,
                                      const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
