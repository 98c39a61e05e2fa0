#include "partition_ids.hpp"

#include <algorithm>
#include <utility>

#include "check_ids.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr int64_t kChunk = 1 << 14;     // ids below which another thread costs more than it gives
constexpr int64_t kCacheLine = 64 / 8;  // int64 counters
constexpr int kNeighbourhood = 9;       // log2 of the bytes of `out` that one thread owns together

// The part of a row that begins at `offset` bytes. Rows that begin close together share one, so that threads do not
// fight over cache lines; a hash, so that regular patterns of ids (all even, say) spread evenly too.
int64_t part_of(int64_t offset, int64_t parts) {
  const uint64_t hash = (uint64_t(offset) >> kNeighbourhood) * 0x9E3779B97F4A7C15u >> 32;
  return int64_t(hash * uint64_t(parts) >> 32);
}

// From how many ids of each chunk are in each part to where the first of them goes: part by part, and in each chunk by
// chunk; also where each part begins.
void counts_to_places(std::vector<int64_t>& place, int64_t chunks, int64_t pitch, std::vector<int64_t>& first) {
  int64_t next = 0;
  for (size_t part = 0; part + 1 < first.size(); ++part) {
    first[part] = next;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) next += std::exchange(place[chunk * pitch + part], next);
  }
  first.back() = next;
}

}  // namespace

Partition partition_ids(const char* name, const Vector& ids, int64_t C, int64_t row_bytes, int64_t parts, int threads) {
  const int64_t M = ids.size, chunks = std::clamp<int64_t>(M / kChunk, 1, threads);
  Partition result{std::unique_ptr<int64_t[]>(new int64_t[M]), std::unique_ptr<int64_t[]>(new int64_t[M]),
                   std::vector<int64_t>(parts + 1)};
  int64_t *const copy = result.ids.get(), *const order = result.order.get();
  const int64_t pitch = parts + kCacheLine;    // no line is written to by two threads
  std::vector<int64_t> place(chunks * pitch);  // of each chunk and part: how many ids, then where the next one goes
  std::vector<int64_t> bad(chunks, M);         // of each chunk: its first id out of range
  const auto begin = [&](int64_t chunk) { return M * chunk / chunks; };

  parallel_for(chunks, threads, [&](int64_t chunk, int) {
    int64_t* const count = &place[chunk * pitch];
    for (int64_t i = begin(chunk); i < begin(chunk + 1); ++i) {
      const int64_t id = copy[i] = ids.id(i);
      if (id >= 0 && id < C) {
        ++count[part_of(id * row_bytes, parts)];
      } else if (bad[chunk] == M) {
        bad[chunk] = i;
      }
    }
  });
  const int64_t first_bad = *std::min_element(bad.begin(), bad.end());
  if (first_bad < M) throw_bad_id(name, first_bad, copy[first_bad], C);

  counts_to_places(place, chunks, pitch, result.first);
  parallel_for(chunks, threads, [&](int64_t chunk, int) {
    int64_t* const to = &place[chunk * pitch];
    for (int64_t i = begin(chunk); i < begin(chunk + 1); ++i) order[to[part_of(copy[i] * row_bytes, parts)]++] = i;
  });
  return result;
}

}  // namespace fedss
