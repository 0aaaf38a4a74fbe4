// Rows that begin anywhere within 16 bytes, moved to where 16 bytes begin when they are in shared memory: what plan.cpp
// asks before, and the launchers after.
#pragma once

#include "stream.h"

namespace dwconv {

// What a row takes up there.
inline int64_t moved_row_bytes(int64_t row_bytes) {
  return round_up(row_bytes + kUnit - 1, kUnit);
}

}  // namespace dwconv
