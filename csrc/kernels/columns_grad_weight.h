#pragma once

#include "launch.h"

namespace dwconv {

void launch_columns_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
