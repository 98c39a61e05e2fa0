#include "partition_ids.hpp"

#include <algorithm>
#include <utility>

#include "check_ids.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr int64_t kChunk = 1 << 14;  // ids below which another thread costs more than it gives
constexpr int kNeighbourhood = 9;    // log2 of the bytes that one part owns together

// The part of a row that begins at `offset` bytes. Rows that begin close together share one, so that threads do not
// fight over cache lines; a hash, so that regular patterns of ids (all even, say) spread evenly too.
int64_t part_of(int64_t offset, int64_t parts) {
  const uint64_t hash = (uint64_t(offset) >> kNeighbourhood) * 0x9E3779B97F4A7C15u >> 32;
  return int64_t(hash * uint64_t(parts) >> 32);
}

}  // namespace

Partition partition_ids(const char* name, const Vector& ids, int64_t C, int64_t row_bytes, int64_t parts, int threads) {
  const int64_t M = ids.size, chunks = std::clamp<int64_t>(M / kChunk, 1, threads);
  Partition partition(chunks);
  std::vector<Entry> bad(chunks, {M, 0});  // of each chunk: the first that is out of range
  parallel_for(chunks, threads, [&](int64_t chunk, int) {
    const int64_t begin = M * chunk / chunks, end = M * (chunk + 1) / chunks;
    std::vector<std::vector<Entry>> of_part(parts);
    for (auto& entries : of_part) entries.reserve((end - begin) / parts * 5 / 4 + 8);
    for (int64_t i = begin; i < end; ++i) {
      const Entry entry{i, ids.id(i)};
      if (entry.id < 0 || entry.id >= C) {
        bad[chunk] = entry;
        return;
      }
      of_part[part_of(entry.id * row_bytes, parts)].push_back(entry);
    }
    partition[chunk] = std::move(of_part);
  });
  for (const Entry& entry : bad) {
    if (entry.i < M) throw_bad_id(name, entry.i, entry.id, C);
  }
  return partition;
}

}  // namespace fedss
