// A table of rows that coast on their velocity, drawn for the fuzz targets of lazy_momentum.hpp.
#pragma once

#include "draw.hpp"
#include "lazy_momentum.hpp"

namespace fuzz {

struct LazyTable {
  Tensor weight, velocity, stepped;
  double lr, momentum;
  int64_t now, M;
  int threads;

  explicit LazyTable(Draw& draw) {
    threads = draw.threads();
    lr = draw.scalar(), momentum = draw.one_of({0.0, 0.9, 0.5, 0x1.fffffffffffffp-1, 0x1p-1074});
    now = draw.one_of<int64_t>({0, 1, 100, int64_t(1) << 40});
    M = draw.below(10);
    int64_t C = draw.below(12), D = draw.below(40);
    if (draw.one_in(1024)) M = 200, C = 256, D = 260;  // shared out to threads
    weight = draw.dense_rows(DType::float32, C, D), velocity = draw.dense_rows(DType::float32, C, D);
    stepped = draw.ids(C, now + 1);
    for (int64_t c = 0; c < C; ++c) stepped.at<int64_t>(c) = std::clamp<int64_t>(stepped.id(c), 0, now);
  }

  LazyMomentum view() const { return {weight.matrix(), velocity.matrix(), stepped.vector(), lr, momentum, now}; }
  bool same(const LazyTable& other) const {
    return weight.same(other.weight) && velocity.same(other.velocity) && stepped.same(other.stepped);
  }

  // What the steps since its last one made of row c: the closed form of lazy_momentum.hpp, in float64.
  double move(int64_t c) const { return lr * momentum * -std::expm1(log_decay(c)) / (1 - momentum); }
  double decay(int64_t c) const { return std::exp(log_decay(c)); }

 private:
  double log_decay(int64_t c) const {
    const int64_t steps = now - stepped.id(c);
    return steps == 0 ? 0.0 : double(steps) * std::log(momentum);
  }
};

}  // namespace fuzz
