#include "instruction_sets.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>

#include "thread_pool.hpp"

namespace fedss {
namespace {

// What this machine can run, the widest last.
#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false, bf16 = false;
};

// Asked of the CPU itself: __builtin_cpu_supports says no to everything where clang's runtime library is another's.
// Besides the instructions the operating system has to save their registers, which XCR0 tells.
Cpu read_cpu() {
  constexpr uint32_t kAvxState = 0x06, kAvx512State = 0xe6, kBf16 = 1u << 5;
  constexpr uint32_t kAvx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE) || !(ecx & bit_FMA)) return {};
  uint32_t saved = 0, high = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return {};
  Cpu cpu;
  cpu.avx2 = (saved & kAvxState) == kAvxState && (ebx & bit_AVX2);
  cpu.avx512 = (saved & kAvx512State) == kAvx512State && (ebx & kAvx512) == kAvx512;
  cpu.bf16 = cpu.avx512 && eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kBf16);
  return cpu;
}
#endif

std::vector<const Kernels*> usable() {
#if defined(__x86_64__)
  std::vector<const Kernels*> found{&baseline::kKernels};
  const Cpu cpu = read_cpu();
  if (cpu.avx2) found.push_back(&avx2::kKernels);
  if (cpu.avx512) found.push_back(&avx512::kKernels);
  if (cpu.bf16) found.push_back(&avx512_bf16::kKernels);
  return found;
#elif defined(__aarch64__)
  return {&neon::kKernels};
#else
  return {&baseline::kKernels};
#endif
}

const Kernels& named(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : usable()) {
    if (name == kernels->name) return *kernels;
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("FEDSS_ISA: expected an instruction set of this machine (" + known + "), got " + name);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& current_kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* forced = std::getenv("FEDSS_ISA");
    kernels = forced && *forced ? &named(forced) : usable().back();
    chosen.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable()) names.emplace_back(kernels->name);
  return names;
}

void use_instruction_set(const std::string& name) { chosen.store(&named(name), std::memory_order_release); }

double fma_peak(int threads) {
  constexpr int64_t kSteps = 1 << 20;
  constexpr int kRepeats = 30;
  const Kernels& kernels = current_kernels();
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t, int) { kernels.multiply_in_registers(kSteps); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, threads * double(kSteps) * kernels.operations_a_step / seconds.count());
  }
  return best;
}

}  // namespace fedss
