// A small pool of std::thread. Not OpenMP: torch brings an OpenMP runtime of its own, and race detectors cannot see
// through it.
#pragma once

#include <cstdint>
#include <functional>

namespace fedss {

// Calls body(task, worker) once for every task in [0, tasks), on at most `threads` threads, the caller's among them;
// worker is in [0, threads) and no two running bodies share one. Which worker gets which task is not fixed, so results
// must not depend on it. A call made while another is running (from another thread of Python, say) runs on its
// own thread alone. Usable after fork: the child starts a pool of its own. All threads compute in the caller's
// floating-point environment (rounding, denormals). The first exception of a body is thrown again once all have ended.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t task, int worker)>& body);

// While one exists, threads without work look for more instead of going to sleep: for a kernel of many short steps,
// where waking would take longer than most of them. Not beyond it: other libraries' threads need the cores.
class KeepThreadsAwake {
 public:
  KeepThreadsAwake();
  ~KeepThreadsAwake();
  KeepThreadsAwake(const KeepThreadsAwake&) = delete;
  KeepThreadsAwake& operator=(const KeepThreadsAwake&) = delete;
};

}  // namespace fedss
