// grad_input at a stride on planes, by kernels/spread.cu, to which windows_nchw.cu hands over what fits_spread().
#pragma once

#include "launch.h"
#include "windows_nchw.h"

namespace dwconv {

void launch_spread(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
