#pragma once

#include "launch.h"

namespace dwconv {

void launch_walk_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
