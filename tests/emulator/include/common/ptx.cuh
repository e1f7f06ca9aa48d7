// Instructions for the emulator: none, so that kernels take the path of devices without them.
#pragma once

#include "common/types.cuh"

namespace pymoe::ptx {

inline void launch_dependents() {}
inline void wait_for_previous() {}

}  // namespace pymoe::ptx
