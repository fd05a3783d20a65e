// Gaussian filters on the permutohedral lattice of Adams, Baek and Davis 2010.
//
// Rounding follows from the order of operations below, and labels depend on it where a pixel lies
// on the border of two simplices: build without -ffast-math and without fused products.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace camkit {

constexpr int BLOCK = 64;  // pixels processed together; their data stays in L1

// Memory filled with zeros, in huge pages where the system has them: the lattice is read at random,
// and each small page would cost a fault and a miss.
template <class T>
class Zeros {
 public:
  explicit Zeros(size_t count = 0) : count_(count) {
    if (!count) return;
    const size_t page = bytes() < (size_t(1) << 21) ? 64 : size_t(1) << 21;
    data_ = static_cast<T*>(std::aligned_alloc(page, (bytes() + page - 1) / page * page));
    if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page > 64) madvise(data_, (bytes() + page - 1) / page * page, MADV_HUGEPAGE);
#endif
    clear();
  }
  Zeros(const Zeros&) = delete;
  Zeros(Zeros&& other) noexcept { swap(other); }
  Zeros& operator=(Zeros other) noexcept {
    swap(other);
    return *this;
  }
  ~Zeros() { std::free(data_); }
  void swap(Zeros& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
  }
  void clear() { std::memset(static_cast<void*>(data_), 0, bytes()); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }
  T& operator[](size_t index) { return data_[index]; }
  const T& operator[](size_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Numbers keys in the order in which they are first seen.
class Numbering {
 public:
  explicit Numbering(size_t expected) : slots_(0) {
    bits_ = 10;
    while ((size_t(1) << bits_) < expected) ++bits_;
    slots_ = Zeros<Slot>(size_t(1) << bits_);
  }
  void prefetch(int64_t key) const { __builtin_prefetch(&slots_[hash(key) >> (64 - bits_)]); }
  int32_t find(int64_t key) const {
    const uint64_t h = hash(key);
    for (size_t i = h >> (64 - bits_);; i = (i + 1) & mask()) {
      const Slot slot = slots_[i];
      if (!slot.next_id) return -1;
      if (slot.mark == uint32_t(h) && keys[slot.next_id - 1] == key) return slot.next_id - 1;
    }
  }
  int32_t add(int64_t key) {
    const int32_t found = find(key);
    if (found >= 0) return found;
    if (keys.size() * 5 > (mask() + 1) * 3) grow();
    keys.push_back(key);
    place(int32_t(keys.size() - 1));
    return int32_t(keys.size() - 1);
  }

  std::vector<int64_t> keys;

 private:
  struct Slot {
    uint32_t mark;    // bits of the hash, which differ for most other keys
    int32_t next_id;  // the number plus one; 0 is empty
  };
  static uint64_t hash(int64_t key) {
    uint64_t h = uint64_t(key) * 0x9E3779B97F4A7C15u;
    return (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
  }
  size_t mask() const { return (size_t(1) << bits_) - 1; }
  void place(int32_t id) {
    const uint64_t h = hash(keys[id]);
    size_t i = h >> (64 - bits_);
    while (slots_[i].next_id) i = (i + 1) & mask();
    slots_[i] = {uint32_t(h), id + 1};
  }
  void grow() {
    slots_ = Zeros<Slot>(0);
    slots_ = Zeros<Slot>(size_t(1) << ++bits_);
    for (size_t id = 0; id < keys.size(); ++id) place(int32_t(id));
  }

  int bits_;
  Zeros<Slot> slots_;
};

// A lattice over the pixels of one image, with the kernel's symmetric normalisation in its weights.
struct Lattice {
  Lattice(int corners, int64_t pixels)
      : blocks((pixels + BLOCK - 1) / BLOCK),
        simplex_of(blocks * BLOCK),
        weights(blocks * BLOCK * corners),
        total(blocks * BLOCK) {}
  size_t bytes() const {
    size_t sum = simplex_of.bytes() + weights.bytes() + total.bytes() + 4 * corner_ids.capacity();
    for (const auto& chain : chains) sum += 4 * chain.capacity();
    return sum;
  }

  int64_t blocks;
  int32_t vertices = 0;                      // behind their rows: one of zeros, one to write to
  Zeros<int32_t> simplex_of;                 // by pixel; the last block is padded with weight 0
  Zeros<float> weights;                      // [block][corner][pixel]
  Zeros<float> total;                        // by pixel: the filter's response to ones
  std::vector<int32_t> corner_ids;           // [simplex][corner]
  std::vector<std::vector<int32_t>> chains;  // by axis: vertices in order, the zero row after each
};

// Where the features of a block of pixels lie in the lattice of D dimensions.
template <int D>
class Embedding {
 public:
  explicit Embedding(const float (&largest)[D]) {
    const float width = std::sqrt(2.0 / 3.0) * (D + 1);  // brings the blur to a deviation of one
    for (int i = 0; i < D; ++i) scale_[i] = 1.0 / std::sqrt(double(i + 2) * (i + 1)) * width;
    // Coordinates are packed into one integer, digit by digit; a neighbour is a constant away.
    double reach = 0;
    double extent[D + 1];
    for (int j = D; j >= 1; --j) {
      extent[j] = reach + double(j) * largest[j - 1] * scale_[j - 1];
      reach += double(largest[j - 1]) * scale_[j - 1];
    }
    extent[0] = reach;
    int64_t step = 1;
    for (int i = 0; i < D; ++i) {
      stride[i] = step;
      step *= int64_t(extent[i]) + 8 * (D + 1);
    }
    stride[D] = 0;  // coordinates sum to zero, so the last needs no digit
    for (int i = 0; i <= D; ++i) stride_sum += stride[i];
  }

  void locate(const float (&feature)[D][BLOCK]) {
    alignas(64) float e[D + 1][BLOCK], coarse[D + 1][BLOCK], v[D + 1][BLOCK] = {};
    alignas(64) float total[BLOCK] = {};
    for (int j = D; j >= 1; --j)
      for (int p = 0; p < BLOCK; ++p) {
        const float f = feature[j - 1][p] * scale_[j - 1];
        e[j][p] = total[p] - float(j) * f;
        total[p] += f;
      }
    std::memcpy(e[0], total, sizeof total);
    // The nearest point whose coordinates are multiples of D + 1, and how far its sum is from zero.
    constexpr float down = 1.0f / (D + 1), up = D + 1;
    constexpr float magic = 12582912.f;  // adding and taking it off rounds to the nearest integer
    alignas(64) int32_t excess[BLOCK] = {};
    for (int i = 0; i <= D; ++i)
      for (int p = 0; p < BLOCK; ++p) {
        const float nearest = (e[i][p] * down + magic) - magic;
        coarse[i][p] = nearest * up;
        excess[p] += int32_t(nearest);
        rank[i][p] = 0;
      }
    for (int i = 0; i < D; ++i)
      for (int j = i + 1; j <= D; ++j)
        for (int p = 0; p < BLOCK; ++p) {
          const int32_t less = e[i][p] - coarse[i][p] < e[j][p] - coarse[j][p];
          rank[i][p] += less;
          rank[j][p] += 1 - less;
        }
    for (int i = 0; i <= D; ++i)
      for (int p = 0; p < BLOCK; ++p) {
        const int32_t moved = rank[i][p] + excess[p];
        const int32_t turn = (moved < 0) - (moved > D);
        rank[i][p] = moved + turn * (D + 1);
        coarse[i][p] += float(turn * (D + 1));
      }
    // Barycentric weights are differences of the offsets in order of rank.
    for (int i = 0; i <= D; ++i)
      for (int p = 0; p < BLOCK; ++p) {
        const float offset = (e[i][p] - coarse[i][p]) * down;
        for (int r = 0; r <= D; ++r) v[r][p] = rank[i][p] == r ? offset : v[r][p];
      }
    for (int p = 0; p < BLOCK; ++p) weight[0][p] = v[D][p] + (1.0f - v[0][p]);
    for (int r = 1; r <= D; ++r)
      for (int p = 0; p < BLOCK; ++p) weight[r][p] = v[D - r][p] - v[D + 1 - r][p];
    for (int p = 0; p < BLOCK; ++p) {
      int64_t packed = 0, ranks = 0;
      for (int i = 0; i < D; ++i) {
        packed += int64_t(coarse[i][p]) * stride[i];
        ranks += rank[i][p] * stride[i];
      }
      origin[p] = packed;
      simplex[p] = packed + ranks;  // ranks fit below the multiples of D + 1
    }
  }

  // The packed coordinates of the corners of pixel p's simplex.
  void corners(int p, int64_t (&keys)[D + 1]) const {
    int64_t by_rank[D + 1];
    for (int i = 0; i <= D; ++i) by_rank[rank[i][p]] = stride[i];
    keys[0] = origin[p];
    for (int r = 1; r <= D; ++r) keys[r] = keys[r - 1] + stride_sum - (D + 1) * by_rank[D + 1 - r];
  }

  int64_t stride[D + 1], stride_sum = 0;
  alignas(64) float weight[D + 1][BLOCK];
  int64_t origin[BLOCK], simplex[BLOCK];
  alignas(64) int32_t rank[D + 1][BLOCK];

 private:
  float scale_[D];
};

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <>
struct Lanes<1> {
  typedef float type;
};

// Operations on rows of R vectors of W floats, `stride` vectors apart. Rows that do not fit in the
// registers are processed in parts of R vectors.
template <int W, int R>
struct Rows {
  using Vec = typename Lanes<W>::type;

  // Adds the values of the lattice at the pixels of a block to the block's rows. The constant by
  // which the blur scales values cancels in the normalisation.
  template <int Corners>
  static void slice(const Lattice& lattice, int64_t block, float gain, const Vec* values,
                    int64_t stride, Vec* rows) {
    const int32_t* simplex_of = &lattice.simplex_of[block * BLOCK];
    const float* weights = &lattice.weights[block * BLOCK * Corners];
    for (int p = 0; p < BLOCK; ++p) {
      const int32_t* corner = &lattice.corner_ids[size_t(simplex_of[p]) * Corners];
      Vec sum[R] = {};
      for (int r = 0; r < Corners; ++r) {
        const Vec* row = values + corner[r] * stride;
        for (int i = 0; i < R; ++i) sum[i] += weights[r * BLOCK + p] * row[i];
      }
      for (int i = 0; i < R; ++i) rows[p * stride + i] += gain * sum[i];
    }
  }

  template <int Corners>
  static void splat(const Lattice& lattice, int64_t block, Vec* values, int64_t stride,
                    const Vec* rows) {
    const int32_t* simplex_of = &lattice.simplex_of[block * BLOCK];
    const float* weights = &lattice.weights[block * BLOCK * Corners];
    for (int p = 0; p < BLOCK; ++p) {
      const int32_t* corner = &lattice.corner_ids[size_t(simplex_of[p]) * Corners];
      Vec own[R];
      for (int i = 0; i < R; ++i) own[i] = rows[p * stride + i];
      for (int r = 0; r < Corners; ++r) {
        Vec* row = values + corner[r] * stride;
        for (int i = 0; i < R; ++i) row[i] += weights[r * BLOCK + p] * own[i];
      }
    }
  }

  static void blur(const Lattice& lattice, Vec* values, int64_t stride) {
    const int32_t zero = lattice.vertices, waste = zero + 1;
    for (const auto& chain : lattice.chains) {
      Vec before[R] = {}, own[R] = {};
      int32_t at = zero;
      for (const int32_t next : chain) {
        const Vec* row = values + next * stride;
        Vec* target = values + (at == zero ? waste : at) * stride;
        for (int i = 0; i < R; ++i) {
          const Vec after = row[i];
          target[i] = own[i] + 0.5f * (before[i] + after);
          before[i] = own[i];
          own[i] = after;
        }
        at = next;
      }
    }
  }
};

using One = Rows<1, 1>;

// Normalises the weights by the filter's response to ones; stores the new response in `total`.
template <int Corners>
void normalise(Lattice& lattice) {
  Zeros<float> values(lattice.vertices + 2);
  float block_rows[BLOCK];
  for (const bool first : {true, false}) {
    values.clear();
    std::fill_n(block_rows, BLOCK, 1.f);
    for (int64_t b = 0; b < lattice.blocks; ++b)
      One::splat<Corners>(lattice, b, values.data(), 1, block_rows);
    One::blur(lattice, values.data(), 1);
    for (int64_t b = 0; b < lattice.blocks; ++b) {
      std::fill_n(block_rows, BLOCK, 0.f);
      One::slice<Corners>(lattice, b, 1.f, values.data(), 1, block_rows);
      if (!first) {
        std::memcpy(&lattice.total[b * BLOCK], block_rows, sizeof block_rows);
        continue;
      }
      float* weights = &lattice.weights[b * BLOCK * Corners];
      for (int p = 0; p < BLOCK; ++p) block_rows[p] = 1.f / std::sqrt(block_rows[p] + 1e-20f);
      for (int r = 0; r < Corners; ++r)
        for (int p = 0; p < BLOCK; ++p) weights[r * BLOCK + p] *= block_rows[p];
    }
  }
}

template <int D>
void link(Lattice& lattice, const Numbering& vertices, const Embedding<D>& embedding) {
  constexpr int AHEAD = 16;
  const int32_t count = lattice.vertices = int32_t(vertices.keys.size());
  lattice.chains.resize(D + 1);
  std::vector<int32_t> next(count);
  std::vector<char> has_previous(count);
  for (int axis = 0; axis <= D; ++axis) {
    // one step along an axis: D down there, one up everywhere else
    const int64_t step = embedding.stride_sum - (D + 1) * embedding.stride[axis];
    std::fill(has_previous.begin(), has_previous.end(), 0);
    for (int32_t v = 0; v < count; ++v) {
      if (v + AHEAD < count) vertices.prefetch(vertices.keys[v + AHEAD] + step);
      next[v] = vertices.find(vertices.keys[v] + step);
      if (next[v] >= 0) has_previous[next[v]] = 1;
    }
    auto& chain = lattice.chains[axis];
    for (int32_t v = 0; v < count; ++v) {
      if (has_previous[v] || next[v] < 0) continue;
      for (int32_t at = v; at >= 0; at = next[at]) chain.push_back(at);
      chain.push_back(count);
    }
    chain.shrink_to_fit();
  }
}

// `fill(block, feature)` writes the features of a block of pixels.
template <int D, class Fill>
Lattice build(int64_t pixels, const float (&largest)[D], Fill fill) {
  Lattice lattice(D + 1, pixels);
  const size_t expected = std::max<int64_t>(1024, pixels / 2);
  Numbering simplices(expected), vertices(expected);
  auto embedding = std::make_unique<Embedding<D>>(largest);
  alignas(64) float feature[D][BLOCK];
  std::vector<int64_t> keys;
  for (int64_t b = 0; b < lattice.blocks; ++b) {
    fill(b, feature);
    embedding->locate(feature);
    for (int p = 0; p < BLOCK; ++p) simplices.prefetch(embedding->simplex[p]);
    const int count = int(std::min<int64_t>(BLOCK, pixels - b * BLOCK));
    float* weights = &lattice.weights[b * BLOCK * (D + 1)];
    for (int r = 0; r <= D; ++r)
      std::memcpy(weights + r * BLOCK, embedding->weight[r], count * sizeof(float));
    keys.clear();
    for (int p = 0; p < count; ++p) {
      const size_t known = simplices.keys.size();
      lattice.simplex_of[b * BLOCK + p] = simplices.add(embedding->simplex[p]);
      if (simplices.keys.size() == known) continue;
      int64_t corners[D + 1];
      embedding->corners(p, corners);
      keys.insert(keys.end(), corners, corners + D + 1);
    }
    for (const int64_t key : keys) vertices.prefetch(key);
    for (const int64_t key : keys) lattice.corner_ids.push_back(vertices.add(key));
  }
  link<D>(lattice, vertices, *embedding);
  normalise<D + 1>(lattice);
  return lattice;
}

}  // namespace camkit
