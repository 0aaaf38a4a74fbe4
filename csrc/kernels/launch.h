// The kernels' host side. A launcher trusts the plan that chose it; it checks its launch and throws
// std::runtime_error where CUDA refuses.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

// Bytes of scratch memory that launch_generic needs in problem.workspace.
int64_t generic_workspace_bytes(const Problem& problem);
void launch_generic(const Problem& problem, cudaStream_t stream);

void launch_window_nchw(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
