// Another way to take what outer_grad_weight.cu serves: from whole planes in shared memory.
#pragma once

#include "launch.h"
#include "planes.cuh"

namespace dwconv {

// Takes what outer_grad_weight.cu has of a problem `p` whose rows and columns are exchanged or not: its planes, which
// `tall` says are not exchanged. Returns whether it can, and is worth it.
bool launch_outer_grad_weight_planes(const Problem& p, bool exchanged, bool tall, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
