// How the work of products with kept rows is divided, whatever the weights' type.
//
// The list of kept rows is cut into kParts parts, by the length of the list alone. A part is summed
// by itself, kGroup rows at a time that lie far apart in it: as many streams through memory, each of
// them nearly contiguous, which reach more bandwidth than one stream, and far more than kGroup
// neighbouring rows do, where every stream jumps at the end of a row. A thread takes parts, not
// columns, as long as there are enough of them, so its rows are whole. The sums of the parts are
// added in order. So an output depends neither on the number of threads nor on where they meet.

#pragma once

#include "common.h"

namespace wina {
namespace {

constexpr int64_t kParts = 4;
constexpr int64_t kFinishBytes = 131072;  // a thread gets at least this much of the parts' sums

// Rows of the list that are one part.
struct Part {
  int64_t first;   // stream r has the rows first + r * length + i, i < length
  int64_t length;
  int64_t tail;    // then, if it is the last part, what the streams leave over: fewer than kGroup
  int64_t tail_rows;
  int64_t after;       // what is likely to be read next: after + r * after_step, r < kGroup
  int64_t after_step;
};

inline Part part_of(int64_t count, int64_t p) {
  const int64_t groups = count / kGroup;
  const auto begin = [&](int64_t part) { return groups * part / kParts; };
  const int64_t tail = groups * kGroup;
  if (p + 1 == kParts)
    return {begin(p) * kGroup, groups - begin(p), tail, count % kGroup, tail, 1};
  const int64_t next = begin(p + 1), length = begin(p + 2) - next;
  return {begin(p) * kGroup, next - begin(p), tail, 0, next * kGroup, length};
}

// One product: the kept rows of a weight, and where the sums of its parts are kept.
template <class Weight>
struct Product {
  const KeptRows* rows;
  Weight weight;
  int64_t units = 0;        // of columns: Weight::kUnit each
  float* sums = nullptr;    // [kParts][tokens][stride()]

  int64_t stride() const { return units * Weight::kUnit; }
  float* part(int64_t p, int tokens) const { return sums + p * tokens * stride(); }
};

// Memory for the sums, of the calling thread: no allocation from the second call on.
inline float* scratch(int64_t floats) {
  static thread_local std::vector<float> memory;
  constexpr int64_t line = kLine / sizeof(float);
  if (static_cast<int64_t>(memory.size()) < floats + line) memory.resize(floats + line);
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kLine - at % kLine) % kLine / sizeof(float);
}

// Computes all parts of all products in one parallel region: weight.accumulate(rows, part, tokens,
// first unit, units, sums at the first column, stride).
template <class Weight>
void compute(std::vector<Product<Weight>>& products, int tokens) {
  int64_t floats = 0, total = 0;
  for (const auto& p : products) floats += kParts * tokens * p.stride();
  float* memory = scratch(floats);
  // Bytes of a unit in one part.
  const auto cost = [](const auto& p) {
    return std::max<int64_t>(1, p.rows->count / kParts) * Weight::kUnitBytes;
  };
  for (auto& p : products) {
    p.sums = memory;
    memory += kParts * tokens * p.stride();
    total += kParts * p.units * cost(p);
  }
  at::parallel_for(0, total, kSerialBytes, [&](int64_t begin, int64_t end) {
    int64_t before = 0;
    for (const auto& p : products) {
      const int64_t each = cost(p), all = kParts * p.units;
      const auto unit_at = [&](int64_t position) {
        return std::clamp<int64_t>((position - before) / each, 0, all);
      };
      const int64_t last = unit_at(end);
      for (int64_t u = unit_at(begin); u < last;) {
        const int64_t part = u / p.units, first = u % p.units;
        const int64_t tile = std::max<int64_t>(1, kTile / tokens / Weight::kUnit);
        const int64_t units = std::min({p.units - first, last - u, tile});
        p.weight.accumulate(*p.rows, part_of(p.rows->count, part), tokens, first, units,
                            p.part(part, tokens) + first * Weight::kUnit, p.stride());
        u += units;
      }
      before += all * each;
    }
  });
}

// Calls f(first column, width) over torch's threads for tiles of at most kTile columns that cover N.
template <class F>
void for_columns(int64_t N, int64_t bytes_per_column, const F& f) {
  constexpr int64_t unit = 128;  // a multiple of every weight's kUnit
  const int64_t units = (N + unit - 1) / unit;
  const int64_t grain = std::max<int64_t>(1, kFinishBytes / (bytes_per_column * unit));
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(N, end * unit);
    for (int64_t n = begin * unit; n < last; n += kTile) f(n, std::min(kTile, last - n));
  });
}

// acc[0 .. width) = columns [first, first + width) of token t, in column order; acc has room for kTile.
template <class Weight>
void add_parts(const Product<Weight>& p, int tokens, int t, int64_t first, int64_t width,
               float* acc) {
  const float* sums = p.sums + t * p.stride() + first;
  const int64_t step = tokens * p.stride();
  // Whole units, whose columns may be out of order; there is room for them.
  const int64_t whole = (width + Weight::kUnit - 1) / Weight::kUnit * Weight::kUnit;
  for (int64_t n = 0; n < whole; ++n) {
    float s = sums[n];
    for (int64_t part = 1; part < kParts; ++part) s += sums[part * step + n];
    acc[n] = s;
  }
  p.weight.reorder(acc, first, width);
}

// y[t][n] of one product, T its type: the sums, bias and residual, rounded once.
template <class T, class Weight>
void finish(const Product<Weight>& p, int tokens, const Tensor& bias, const T* residual, T* y) {
  const int64_t N = p.weight.columns;
  for_columns(N, kParts * tokens * sizeof(float), [&](int64_t first, int64_t width) {
    alignas(kLine) float acc[kTile];
    for (int t = 0; t < tokens; ++t) {
      add_parts(p, tokens, t, first, width, acc);
      add_bias<T>(acc, 1, width, bias, first, width);
      add_residual(acc, 1, width, residual ? residual + t * N : nullptr, N, first, width);
      for (int64_t n = 0; n < width; ++n) y[t * N + first + n] = static_cast<T>(acc[n]);
    }
  });
}

// h[t][n] = activation(gate) * up.
template <class T, class Weight>
void finish_gated(const Product<Weight>& gate, const Product<Weight>& up, int tokens,
                  Activation activation, const Tensor& gate_bias, const Tensor& up_bias, T* h) {
  const int64_t N = gate.weight.columns;
  for_columns(N, kParts * tokens * 16 * sizeof(float), [&](int64_t first, int64_t width) {
    alignas(kLine) float g[kTile];
    alignas(kLine) float u[kTile];
    for (int t = 0; t < tokens; ++t) {
      add_parts(gate, tokens, t, first, width, g);
      add_parts(up, tokens, t, first, width, u);
      add_bias<T>(g, 1, width, gate_bias, first, width);
      add_bias<T>(u, 1, width, up_bias, first, width);
      activate(activation, g, width);
      for (int64_t n = 0; n < width; ++n) h[t * N + first + n] = static_cast<T>(g[n] * u[n]);
    }
  });
}

// The kept rows of several projections of one x [tokens][K]: those that share thresholds and scales
// share a list.
template <class T>
class Lists {
 public:
  Lists(const T* x, int64_t K, int tokens) : x_(x), K_(K), tokens_(tokens) {}

  const KeptRows* of(const float* threshold, const float* scale) {
    for (size_t i = 0; i < made_.size(); ++i)
      if (made_[i].first == threshold && made_[i].second == scale) return &kept_rows(i);
    KeptRows& rows = kept_rows(made_.size());
    made_.emplace_back(threshold, scale);
    select_rows(rows, x_, K_, tokens_, threshold, scale);
    return &rows;
  }

 private:
  const T* x_;
  int64_t K_;
  int tokens_;
  std::vector<std::pair<const float*, const float*>> made_;
};

// Calls f(first token, tokens) for the passes over the weights that all tokens take.
template <class F>
void for_passes(int64_t tokens, const F& f) {
  for (int64_t t = 0; t < tokens; t += kMaxTokens)
    f(t, static_cast<int>(std::min(kMaxTokens, tokens - t)));
}

}  // namespace
}  // namespace wina
