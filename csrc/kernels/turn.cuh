// A place in a ring of stages in shared memory, and the parity of the stage's barriers at that turn.
#pragma once

#include <cstdint>

namespace dwconv {

struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace dwconv
