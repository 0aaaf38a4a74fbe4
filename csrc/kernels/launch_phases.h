#pragma once

#include "launch.h"

namespace dwconv {

// `launch`: what launches the problem that the phases make.
void launch_phases(const Problem& problem, const Allocate& allocate, const std::function<void(const Problem&)>& launch,
                   cudaStream_t stream);

}  // namespace dwconv
