// GPU kernels that are launched one after the other, again and again, each time on other memory.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fedss {

// The driver's functions, by the types of its header, which is not needed to build: handles are pointers.
struct GpuDriver {
  explicit GpuDriver(const std::string& library);  // throws std::runtime_error where there is none
  int (*parameter_info)(void* function, size_t index, size_t* offset, size_t* bytes);
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                void* stream, void** parameters, void** extra);
  int (*error_string)(int error, const char** text);
};

class GpuLaunches {
 public:
  // A kernel's parameter: `value`, the call's factor, or `value` bytes into one of the call's memories.
  struct Parameter {
    static constexpr int kValue = -1, kFactor = -2;
    int bytes;   // 4 or 8
    int source;  // kValue, kFactor or which memory
    int64_t value;
  };

  explicit GpuLaunches(const std::string& library) : driver_(library) {}
  GpuLaunches(const GpuLaunches&) = delete;  // launches hold addresses of their own values

  // Throws std::invalid_argument unless the kernel takes these, and after them addresses alone, which will be null.
  void add(uint64_t function, const std::array<unsigned, 3>& grid, unsigned threads, unsigned shared,
           const std::vector<Parameter>& parameters);

  // Throws std::runtime_error with the driver's words.
  void run(uint64_t stream, double factor, const std::vector<uint64_t>& memories);

 private:
  struct Launch {
    void* function;
    std::array<unsigned, 3> grid;
    unsigned threads, shared;
    std::vector<Parameter> parameters;
    std::vector<uint64_t> values;  // of the parameters and then null
    std::vector<void*> addresses;  // of the values
  };

  GpuDriver driver_;
  std::vector<Launch> launches_;
  size_t memories_ = 0;  // that a call brings, at least
};

}  // namespace fedss
