// Forward and grad_input in channels_last, of any kernel size, stride, dilation and dtype.
#pragma once

#include "launch.h"

namespace dwconv {

void launch_windows_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
