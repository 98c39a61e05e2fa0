// use_instruction_set: takes the names in instruction_sets() and no others.
#include "draw.hpp"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string name(reinterpret_cast<const char*>(data), size);
  const std::vector<std::string> sets = instruction_sets();
  const bool known = std::find(sets.begin(), sets.end(), name) != sets.end();
  const std::string before = current_kernels().name;
  promise_refusal(refusal([&] { use_instruction_set(name); }), known ? "" : "invalid: FEDSS_ISA: expected");
  promise(current_kernels().name == (known ? name : before), "the named one in use, or the one before");
  return 0;
}
