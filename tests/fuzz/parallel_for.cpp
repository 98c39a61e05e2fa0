// parallel_for, which is under all the others: every task once, no worker in two bodies, an exception thrown again.
#include <array>
#include <atomic>

#include "draw.hpp"
#include "thread_pool.hpp"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  const int64_t tasks = draw.below(40);
  const int threads = int(draw.below(8)) - 1;
  const int64_t failing = draw.seldom() ? draw.below(40) : -1;
  std::array<std::atomic<int>, 40> runs{};
  std::array<std::atomic<bool>, 8> busy{};
  const auto body = [&](int64_t task, int worker) {
    promise(task >= 0 && task < tasks, "a task of this call");
    promise(worker >= 0 && worker < std::max(threads, 1), "a worker of this call");
    promise(!busy[size_t(worker)].exchange(true), "a worker has one body at a time");
    ++runs[size_t(task)];
    busy[size_t(worker)] = false;
    if (task == failing) throw std::out_of_range("task " + std::to_string(task));
  };
  std::string expected;
  if (failing >= 0 && failing < tasks) expected = "out of range: task " + std::to_string(failing);
  promise_refusal(refusal([&] { parallel_for(tasks, threads, body); }), expected);
  for (int64_t task = 0; task < tasks; ++task) {
    promise(runs[size_t(task)] == 1 || (!expected.empty() && runs[size_t(task)] == 0), "every task once");
  }
  return 0;
}
