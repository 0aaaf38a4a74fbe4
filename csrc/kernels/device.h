// What plans and launchers have to know of a device.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <stdexcept>

namespace dwconv {

struct Device {
  int id, multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes
  int capability;                                   // 10 * major + minor
};

// Asked of CUDA once for each thread and device, since it does not change.
inline const Device& device_of(int id) {
  static thread_local std::array<Device, 64> known{};
  Device& device = known[id % known.size()];
  if (device.multiprocessors == 0 || device.id != id) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      if (cudaDeviceGetAttribute(&value, attribute, id) != cudaSuccess)
        throw std::runtime_error("dwconv: CUDA does not say what the device can do");
      return value;
    };
    device = {id, ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
              ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
              10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor)};
  }
  return device;
}

inline const Device& current_device() {
  int id = 0;
  cudaGetDevice(&id);
  return device_of(id);
}

}  // namespace dwconv
