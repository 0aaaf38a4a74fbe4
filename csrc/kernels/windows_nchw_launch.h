// The launcher of the plan windows_nchw.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

void launch_windows_nchw(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
