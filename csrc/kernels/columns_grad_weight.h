#pragma once

#include "launch.h"

namespace dwconv {

// What generic_grad_weight.cu does in float64, where columns lie side by side. Returns false, and launches nothing,
// where it is not for it.
bool launch_columns_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
