// Which of the compiled kernels this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fedss {

// The kernels in use: the widest that this machine has, or what the environment variable FEDSS_ISA names.
const Kernels& current_kernels();

// Names of those that this machine can run, the widest last.
std::vector<std::string> instruction_sets();

// Takes the named ones from here on. Throws std::invalid_argument for a name that is not in instruction_sets().
void use_instruction_set(const std::string& name);

// float32 operations per second of the register tile on `threads` threads that do nothing else.
double fma_peak(int threads);

}  // namespace fedss
