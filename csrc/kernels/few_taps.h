#pragma once

#include "launch.h"

namespace dwconv {

// What windows_nchw.cu and windows_channels_last.cu do where there are few taps or there is little to do.
void launch_few_taps(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
