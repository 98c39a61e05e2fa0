#include "thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace fedss {
namespace {

using Body = std::function<void(int64_t, int)>;

constexpr int kMostThreads = 256;
// How long a thread without work looks for more before it sleeps: while a kernel wants that, and otherwise. A kernel is
// often called again soon; until then whoever else wants the core gets it at once.
constexpr std::chrono::microseconds kLongPatience{1000}, kPatience{200};

std::atomic<int> kernels_running{0};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Tasks are dealt out in contiguous ranges, one for each thread, so that a thread meets in the next step what it left
// in its cache in the last one; who is done takes from the others. A range is one atomic word, (job << 32 | next task):
// a thread that wakes up late cannot take a task of a job that it knows nothing of.
class Pool {
 public:
  std::mutex in_use;  // held by the caller for the length of one parallel_for

  void run(int64_t tasks, int threads, const Body& body) {
    grow(threads - 1);
    const uint64_t job = (job_.load(std::memory_order_relaxed) + 1) & 0xffffffff;
    // Before anything of the last job changes, its ranges do: whoever reads a new field no longer gets an old task.
    for (int i = 0; i < kMostThreads && i < workers_ + 1; ++i) range_[i].word.store(job << 32 | kNone);
    std::fegetenv(&environment_);
    failed_.store(false, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    body_.store(&body, std::memory_order_release);
    tasks_.store(tasks, std::memory_order_release);
    threads_.store(threads, std::memory_order_release);
    for (int i = 0; i < threads; ++i) range_[i].word.store(job << 32 | uint64_t(first(i, tasks, threads)));
    job_.store(job);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(job, 0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins < 4096) {
        pause();
      } else {
        sched_yield();
      }
    }
    if (failed_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

 private:
  static constexpr uint64_t kNone = 0xffffffff;

  struct alignas(64) Range {
    std::atomic<uint64_t> word{kNone};
  };

  Range range_[kMostThreads];
  std::atomic<uint64_t> job_{0};
  std::atomic<const Body*> body_{nullptr};
  std::atomic<int64_t> tasks_{0};
  std::atomic<int> threads_{0};
  std::fenv_t environment_;  // read only while a task of the job is unfinished
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  int workers_ = 0;

  std::mutex mutex_;  // guards failure_ and sleeping
  std::exception_ptr failure_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};

  static int64_t first(int range, int64_t tasks, int threads) { return tasks * range / threads; }

  void grow(int workers) {
    for (; workers_ < workers; ++workers_) {
      std::thread(&Pool::serve, this, workers_ + 1, job_.load()).detach();
    }
  }

  void work(uint64_t job, int worker) {
    const int threads = threads_.load(std::memory_order_acquire);
    if (worker >= threads) return;  // a call on fewer threads than the pool has
    bool prepared = worker == 0;
    for (int i = 0; i < threads; ++i) {
      const int range = (worker + i) % threads;
      for (int64_t task; (task = take(job, range, threads)) >= 0;) {
        if (!prepared) prepare();
        prepared = true;
        run_task(task, worker);
      }
    }
  }

  // A task of the range, or -1.
  int64_t take(uint64_t job, int range, int threads) {
    const int64_t end = first(range + 1, tasks_.load(std::memory_order_acquire), threads);
    uint64_t word = range_[range].word.load(std::memory_order_acquire);
    while (word >> 32 == job && int64_t(word & kNone) < end) {
      if (range_[range].word.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) {
        return int64_t(word & kNone);
      }
    }
    return -1;
  }

  // Rounding and denormals as the caller has them; setting them is slow, so only if they differ.
  void prepare() const {
    std::fenv_t now;
    std::fegetenv(&now);
    if (std::memcmp(&now, &environment_, sizeof now) != 0) std::fesetenv(&environment_);
  }

  void run_task(int64_t task, int worker) {
    try {
      if (!failed_.load(std::memory_order_relaxed)) (*body_.load(std::memory_order_relaxed))(task, worker);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
  }

  void serve(int worker, uint64_t seen) {
    for (;;) {
      wait_for_job(seen);
      seen = job_.load();
      work(seen, worker);
    }
  }

  void wait_for_job(uint64_t seen) {
    const auto begin = std::chrono::steady_clock::now();
    for (int spins = 0; job_.load(std::memory_order_relaxed) == seen; ++spins) {
      const bool awake = kernels_running.load(std::memory_order_relaxed) > 0;
      if (awake) {
        pause();
      } else {
        sched_yield();
      }
      if (spins % 16 == 15 && std::chrono::steady_clock::now() - begin > (awake ? kLongPatience : kPatience)) break;
    }
    if (job_.load(std::memory_order_relaxed) != seen) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return job_.load() != seen; });
    --sleepers_;
  }
};

// Never destroyed: its threads sleep until the process ends, and a destructor at exit would have to wait for them.
std::atomic<Pool*> pool{nullptr};

// A fork copies the pool but none of its threads, and its locks in whatever state they were: the child starts afresh.
void forget_pool() { pool.store(nullptr); }

Pool& current_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* existing = pool.load();
  if (existing == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;  // another thread was first; no worker was started yet
  }
  return *existing;
}

}  // namespace

KeepThreadsAwake::KeepThreadsAwake() { kernels_running.fetch_add(1); }
KeepThreadsAwake::~KeepThreadsAwake() { kernels_running.fetch_sub(1); }

void parallel_for(int64_t tasks, int threads, const Body& body) {
  threads = int(std::min<int64_t>({threads, tasks, kMostThreads}));
  if (threads > 1) {
    Pool& shared = current_pool();
    std::unique_lock<std::mutex> lock(shared.in_use, std::try_to_lock);
    if (lock.owns_lock()) return shared.run(tasks, threads, body);
  }
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace fedss
