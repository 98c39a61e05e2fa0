#include "instruction_sets.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>

#include "thread_pool.hpp"

namespace fedss {
namespace {

// What this machine can run, the widest last.
std::vector<const Kernels*> usable() {
#if defined(__x86_64__)
  std::vector<const Kernels*> found{&baseline::kKernels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&avx512::kKernels);
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kKernels);
  }
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
