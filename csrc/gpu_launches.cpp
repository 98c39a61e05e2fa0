#include "gpu_launches.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fedss {
namespace {

template <class Function>
void find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) throw std::runtime_error(std::string("the GPU's driver has no ") + name);
}

}  // namespace

GpuDriver::GpuDriver(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL);  // never closed: others use it too
  if (handle == nullptr) throw std::runtime_error(std::string("no GPU driver: ") + dlerror());
  find(handle, "cuFuncGetParamInfo", &parameter_info);
  find(handle, "cuLaunchKernel", &launch);
  find(handle, "cuGetErrorString", &error_string);
}

void GpuLaunches::add(uint64_t function, const std::array<unsigned, 3>& grid, unsigned threads, unsigned shared,
                      const std::vector<Parameter>& parameters) {
  Launch added{reinterpret_cast<void*>(function), grid, threads, shared, parameters, {}, {}};
  size_t end = 0;  // of the parameters so far, in the kernel's block of them
  size_t offset = 0, bytes = 0;
  for (size_t i = 0; driver_.parameter_info(added.function, i, &offset, &bytes) == 0; ++i) {
    const bool given = i < parameters.size();
    const size_t expected = given ? static_cast<size_t>(parameters[i].bytes) : sizeof(void*);
    if (bytes != expected || offset != (end + expected - 1) / expected * expected) {
      throw std::invalid_argument("parameter " + std::to_string(i) + " of a kernel is another than expected");
    }
    end = offset + bytes;
    added.values.push_back(given ? static_cast<uint64_t>(parameters[i].value) : 0);
  }
  if (added.values.size() < parameters.size()) {
    throw std::invalid_argument("a kernel takes fewer parameters than expected");
  }
  for (const Parameter& parameter : parameters) {
    memories_ = std::max(memories_, static_cast<size_t>(std::max(parameter.source, -1) + 1));
  }
  launches_.push_back(std::move(added));
  Launch& launch = launches_.back();
  for (uint64_t& value : launch.values) launch.addresses.push_back(&value);  // little-endian: 4 bytes come first
}

void GpuLaunches::run(uint64_t stream, double factor, const std::vector<uint64_t>& memories) {
  if (memories.size() < memories_) {
    throw std::invalid_argument("expected " + std::to_string(memories_) + " memories, got " +
                                std::to_string(memories.size()));
  }
  for (Launch& launch : launches_) {
    if (launch.grid[0] == 0 || launch.grid[1] == 0 || launch.grid[2] == 0) continue;
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      const Parameter& parameter = launch.parameters[i];
      if (parameter.source == Parameter::kFactor) {
        std::memcpy(&launch.values[i], &factor, sizeof factor);
      } else if (parameter.source >= 0) {
        launch.values[i] = memories[static_cast<size_t>(parameter.source)] + static_cast<uint64_t>(parameter.value);
      }
    }
    const auto [x, y, z] = launch.grid;
    const int error = driver_.launch(launch.function, x, y, z, launch.threads, 1, 1, launch.shared,
                                     reinterpret_cast<void*>(stream), launch.addresses.data(), nullptr);
    if (error != 0) {
      const char* text = nullptr;
      driver_.error_string(error, &text);
      throw std::runtime_error(std::string("launching a kernel: ") + (text == nullptr ? "unknown error" : text));
    }
  }
}

}  // namespace fedss
