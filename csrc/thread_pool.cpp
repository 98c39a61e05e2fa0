#include "thread_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace fedss {
namespace {

using Body = std::function<void(int64_t, int)>;

class Pool {
 public:
  std::mutex in_use;  // held by the caller for the length of one parallel_for

  void run(int64_t tasks, int threads, const Body& body) {
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      tasks_ = tasks;
      std::fegetenv(&environment_);
      next_.store(0, std::memory_order_relaxed);
      helpers_ = running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    work(body, tasks, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    body_ = nullptr;
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  std::mutex mutex_;  // guards everything below but next_
  std::condition_variable wake_, done_;
  const Body* body_ = nullptr;
  int64_t tasks_ = 0;
  int workers_ = 0, helpers_ = 0, running_ = 0;
  uint64_t generation_ = 0;
  std::fenv_t environment_;
  std::exception_ptr failure_;
  std::atomic<int64_t> next_{0};

  void grow(int workers) {
    for (; workers_ < workers; ++workers_) {
      std::thread(&Pool::serve, this, workers_ + 1, generation_).detach();
    }
  }

  void work(const Body& body, int64_t tasks, int worker) {
    try {
      for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, worker);
    } catch (...) {
      next_.store(tasks, std::memory_order_relaxed);  // the others need not begin another task
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void serve(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > helpers_) continue;  // a call on fewer threads than the pool has
      const Body& body = *body_;
      const int64_t tasks = tasks_;
      std::fesetenv(&environment_);
      lock.unlock();
      work(body, tasks, worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
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

void parallel_for(int64_t tasks, int threads, const Body& body) {
  threads = int(std::min<int64_t>(threads, tasks));
  if (threads > 1) {
    Pool& shared = current_pool();
    std::unique_lock<std::mutex> lock(shared.in_use, std::try_to_lock);
    if (lock.owns_lock()) return shared.run(tasks, threads, body);
  }
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace fedss
