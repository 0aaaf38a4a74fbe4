// Forward and grad_input straight from memory, for windows_nchw.cu and windows_channels_last.cu: these hand over
// kernels of a few taps, and problems with little to do, of which to lay out pixels and weights in shared memory would
// be most.
#pragma once

#include "launch.h"

namespace dwconv {

void launch_few_taps(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
