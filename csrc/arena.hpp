// Scratch memory for one call of a kernel. A thread keeps its block for its next call: memory fresh from the system
// costs a page fault every 4 KiB, which is more than the arithmetic on it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace fedss {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  ~Arena() {
    Kept& kept = kept_block();
    if (more_.empty()) return;
    for (void* block : more_) std::free(block);
    if (taken_ > kMostKept) return;
    std::free(kept.block);
    kept.block = std::aligned_alloc(kAlignment, taken_);  // null is a block of no bytes: take() asks again
    kept.bytes = kept.block ? taken_ : 0;
  }

  // n uninitialised elements, aligned for any vector.
  template <class T>
  T* take(int64_t n) {
    const size_t bytes = (size_t(n) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment, begin = taken_;
    taken_ += bytes;
    const Kept& kept = kept_block();
    if (more_.empty() && taken_ <= kept.bytes) return reinterpret_cast<T*>(static_cast<char*>(kept.block) + begin);
    void* block = std::aligned_alloc(kAlignment, bytes ? bytes : kAlignment);
    if (block == nullptr) throw std::bad_alloc();
    more_.push_back(block);
    return static_cast<T*>(block);
  }

 private:
  static constexpr size_t kAlignment = 64, kMostKept = size_t(64) << 20;

  struct Kept {
    void* block = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(block); }
  };
  static Kept& kept_block() {
    static thread_local Kept kept;
    return kept;
  }

  std::vector<void*> more_;  // where the kept block was too small
  size_t taken_ = 0;
};

}  // namespace fedss
