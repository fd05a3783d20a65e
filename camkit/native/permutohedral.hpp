// Gaussian filters on the permutohedral lattice of Adams, Baek and Davis 2010.
//
// Rounding follows from the order of operations below, and labels depend on it where a pixel lies
// on the border of two simplices: build without -ffast-math and without fused products.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
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
    const size_t room = (bytes() + page() - 1) / page() * page();
    data_ = static_cast<T*>(::operator new(room, std::align_val_t(page())));
#ifdef MADV_HUGEPAGE
    if (page() > 64) madvise(data_, room, MADV_HUGEPAGE);
#endif
    clear();
  }
  Zeros(const Zeros&) = delete;
  Zeros(Zeros&& other) noexcept { swap(other); }
  Zeros& operator=(Zeros other) noexcept {
    swap(other);
    return *this;
  }
  ~Zeros() { ::operator delete(data_, std::align_val_t(page())); }
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
  size_t page() const { return bytes() < (size_t(1) << 21) ? 64 : size_t(1) << 21; }

  T* data_ = nullptr;
  size_t count_ = 0;
};

inline uint64_t scrambled(int64_t key) {
  const uint64_t h = uint64_t(key) * 0x9E3779B97F4A7C15u;
  return (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
}

// Numbers keys in the order in which they are first seen.
class Numbering {
 public:
  explicit Numbering(size_t expected) {
    while ((size_t(1) << bits_) < expected) ++bits_;
    slots_ = Zeros<Slot>(slots());
    keys_ = Zeros<int64_t>(slots() * 5 / 8 + 1);
  }
  int32_t size() const { return count_; }
  const int64_t* keys() const { return keys_.data(); }
  void prefetch(int64_t key) const { __builtin_prefetch(&slots_[scrambled(key) >> (64 - bits_)]); }
  int32_t find(int64_t key) const { return slots_[place(key, scrambled(key))].next_id - 1; }
  // Makes room for so many more keys.
  void reserve(size_t more) {
    if ((count_ + more) * 8 > slots() * 5) grow();
  }
  // Without a branch on whether the key is new, which no processor could predict.
  int32_t add(int64_t key) {
    const uint64_t h = scrambled(key);
    Slot& slot = slots_[place(key, h)];
    const int32_t added = !slot.next_id;
    keys_[count_] = key;  // overwritten unless the key is new
    count_ += added;
    slot = {uint32_t(h), added ? count_ : slot.next_id};
    return slot.next_id - 1;
  }

 private:
  struct Slot {
    uint32_t mark;    // bits of the hash, which differ for most other keys
    int32_t next_id;  // the number plus one; 0 is empty
  };
  size_t slots() const { return size_t(1) << bits_; }
  // The slot that holds the key, or the empty one where it belongs.
  size_t place(int64_t key, uint64_t h) const {
    size_t i = h >> (64 - bits_);
    for (;; i = (i + 1) & (slots() - 1)) {
      const Slot slot = slots_[i];
      if ((slot.next_id != 0) & (slot.mark != uint32_t(h))) continue;
      if (!slot.next_id || keys_[slot.next_id - 1] == key) return i;
    }
  }
  void grow() {
    ++bits_;
    slots_ = Zeros<Slot>(slots());
    Zeros<int64_t> keys(slots() * 5 / 8 + 1);
    std::copy_n(keys_.data(), count_, keys.data());
    keys_.swap(keys);
    for (int32_t id = 0; id < count_; ++id) {
      const uint64_t h = scrambled(keys_[id]);
      slots_[place(keys_[id], h)] = {uint32_t(h), id + 1};
    }
  }

  int bits_ = 11;
  int32_t count_ = 0;
  Zeros<Slot> slots_;
  Zeros<int64_t> keys_;
};

// Tells that a key is none of many, nearly always without a look at a larger table.
class Filter {
 public:
  Filter(const int64_t* keys, size_t count) {
    while ((size_t(8) << bits_) < count) ++bits_;  // eight bits for each key, or more
    words_ = Zeros<uint64_t>(size_t(1) << bits_);
    for (size_t i = 0; i < count; ++i)
      words_[scrambled(keys[i]) >> (64 - bits_)] |= marks(keys[i]);
  }
  bool excludes(int64_t key) const {
    return ~words_[scrambled(key) >> (64 - bits_)] & marks(key);
  }

 private:
  static uint64_t marks(int64_t key) {
    const uint64_t h = scrambled(key);
    return uint64_t(1) << (h & 63) | uint64_t(1) << (h >> 6 & 63);
  }
  int bits_ = 4;
  Zeros<uint64_t> words_;
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
    for (const auto& pair : pairs) sum += 4 * pair.capacity();
    return sum;
  }

  // Starts to load what is read in order, long before it is used.
  void prefetch(int64_t block, int corners) const {
    const float* const weight = weights.data() + block * BLOCK * corners;
    for (int i = 0; i < BLOCK * corners; i += 16) __builtin_prefetch(weight + i);
    for (int i = 0; i < BLOCK; i += 16) __builtin_prefetch(simplex_of.data() + block * BLOCK + i);
  }

  int64_t blocks;
  int32_t vertices = 0;                      // behind their rows: one of zeros, one to write to
  Zeros<int32_t> simplex_of;                 // by pixel; the last block is padded with weight 0
  Zeros<float> weights;                      // [block][corner][pixel]
  Zeros<float> total;                        // by pixel: the filter's response to ones
  std::vector<int32_t> corner_ids;           // [simplex][corner]
  std::vector<std::vector<int32_t>> pairs;   // by axis: vertices with one neighbour, and that one
  std::vector<std::vector<int32_t>> chains;  // by axis: longer chains, the zero row after each
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
      for (int p = 0; p < BLOCK; ++p) e[i][p] = (e[i][p] - coarse[i][p]) * down;
    for (int i = 0; i <= D; ++i)
      for (int r = 0; r <= D; ++r)  // pixels innermost, or compilers branch on the rank
        for (int p = 0; p < BLOCK; ++p) v[r][p] = rank[i][p] == r ? e[i][p] : v[r][p];
    for (int p = 0; p < BLOCK; ++p) weight[0][p] = v[D][p] + (1.0f - v[0][p]);
    for (int r = 1; r <= D; ++r)
      for (int p = 0; p < BLOCK; ++p) weight[r][p] = v[D - r][p] - v[D + 1 - r][p];
    // Ranks fit below the multiples of D + 1, so the sum with them names the simplex.
    for (int p = 0; p < BLOCK; ++p) simplex[p] = 0;
    for (int i = 0; i < D; ++i)
      for (int p = 0; p < BLOCK; ++p)
        simplex[p] += int64_t(int32_t(coarse[i][p]) + rank[i][p]) * stride[i];
  }

  // The packed coordinates of the corners of pixel p's simplex. From corner r to the next, and from
  // the last to the first, is one step along the axis `axes[r]`.
  void corners(int p, int64_t (&keys)[D + 1], uint8_t (&axes)[D + 1]) const {
    keys[0] = simplex[p];
    for (int i = 0; i <= D; ++i) {
      keys[0] -= rank[i][p] * stride[i];
      axes[D - rank[i][p]] = uint8_t(i);
    }
    for (int r = 0; r < D; ++r) keys[r + 1] = keys[r] + step(axes[r]);
  }

  // One step along an axis: D down there, one up everywhere else.
  int64_t step(int axis) const { return stride_sum - (D + 1) * stride[axis]; }

  int64_t stride[D + 1], stride_sum = 0;
  alignas(64) float weight[D + 1][BLOCK];
  alignas(64) int64_t simplex[BLOCK];
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

  // Adds up the values at the corners of pixel p of a block. The constant by which the blur scales
  // values cancels in the normalisation.
  template <int Corners>
  static void gather(const Lattice& lattice, int64_t block, int p, const Vec* values,
                     int64_t stride, Vec (&sum)[R]) {
    const int32_t simplex = lattice.simplex_of[block * BLOCK + p];
    const int32_t* const corner = &lattice.corner_ids[size_t(simplex) * Corners];
    const float* const weights = &lattice.weights[block * BLOCK * Corners];
    if (WIDE && Corners > 3 && p + PIXELS_AHEAD < BLOCK) {
      const int32_t later = lattice.simplex_of[block * BLOCK + p + PIXELS_AHEAD];
      const int32_t* const ids = &lattice.corner_ids[size_t(later) * Corners];
      for (int r = 0; r < Corners; ++r) fetch(values + ids[r] * stride);
    }
    for (int r = 0; r < Corners; ++r) {
      const Vec* const row = values + corner[r] * stride;
      for (int i = 0; i < R; ++i) sum[i] += weights[r * BLOCK + p] * row[i];
    }
  }

  // Adds the pixel's values to those of its corners.
  template <int Corners>
  static void scatter(const Lattice& lattice, int64_t block, int p, Vec* values, int64_t stride,
                      const Vec (&own)[R]) {
    const int32_t simplex = lattice.simplex_of[block * BLOCK + p];
    const int32_t* const corner = &lattice.corner_ids[size_t(simplex) * Corners];
    const float* const weights = &lattice.weights[block * BLOCK * Corners];
    for (int r = 0; r < Corners; ++r) {
      Vec* const row = values + corner[r] * stride;
      for (int i = 0; i < R; ++i) row[i] += weights[r * BLOCK + p] * own[i];
    }
  }

  static void blur(const Lattice& lattice, Vec* values, int64_t stride) {
    for (size_t axis = 0; axis < lattice.chains.size(); ++axis) {
      blur_pairs(lattice.pairs[axis], values, stride);
      blur_chains(lattice.chains[axis], lattice.vertices, values, stride);
    }
  }

 private:
  // Rows of a cache line or more do not stay in the caches and are fetched ahead. For smaller rows
  // that would only cost time, and so for the few rows of the Gaussian kernel.
  static constexpr bool WIDE = sizeof(Vec) * R >= 64;
  static constexpr size_t ROWS_AHEAD = 24;
  static constexpr int PIXELS_AHEAD = 8;

  static void fetch(const Vec* row) {
    if (!WIDE) return;
    __builtin_prefetch(row);
    if (sizeof(Vec) * R > 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + 64);
  }

  static void blur_pairs(const std::vector<int32_t>& pairs, Vec* values, int64_t stride) {
    for (size_t i = 0; i < pairs.size(); i += 2) {
      if (WIDE && i + 2 * ROWS_AHEAD < pairs.size())
        for (const size_t later : {i + 2 * ROWS_AHEAD, i + 2 * ROWS_AHEAD + 1})
          fetch(values + pairs[later] * stride);
      Vec* const one = values + pairs[i] * stride;
      Vec* const other = values + pairs[i + 1] * stride;
      for (int j = 0; j < R; ++j) {
        const Vec before = one[j];
        one[j] += 0.5f * other[j];
        other[j] += 0.5f * before;
      }
    }
  }

  static void blur_chains(const std::vector<int32_t>& chains, int32_t zero, Vec* values,
                          int64_t stride) {
    const int32_t waste = zero + 1;
    Vec before[R] = {}, own[R] = {};
    int32_t at = zero;
    for (size_t place = 0; place < chains.size(); ++place) {
      const int32_t next = chains[place];
      if (WIDE && place + ROWS_AHEAD < chains.size())
        fetch(values + chains[place + ROWS_AHEAD] * stride);
      const Vec* const row = values + next * stride;
      Vec* const target = values + (at == zero ? waste : at) * stride;
      for (int i = 0; i < R; ++i) {
        const Vec after = row[i];
        target[i] = own[i] + 0.5f * (before[i] + after);
        before[i] = own[i];
        own[i] = after;
      }
      at = next;
    }
  }
};

using One = Rows<1, 1>;

// Normalises the weights by the filter's response to ones; stores the new response in `total`.
template <int Corners>
void normalise(Lattice& lattice) {
  const float one[1] = {1.f};
  Zeros<float> values(lattice.vertices + 2);
  for (const bool first : {true, false}) {
    values.clear();
    for (int64_t b = 0; b < lattice.blocks; ++b)
      for (int p = 0; p < BLOCK; ++p)
        One::scatter<Corners>(lattice, b, p, values.data(), 1, one);
    One::blur(lattice, values.data(), 1);
    for (int64_t b = 0; b < lattice.blocks; ++b) {
      float* const total = &lattice.total[b * BLOCK];
      for (int p = 0; p < BLOCK; ++p) {
        float sum[1] = {};
        One::gather<Corners>(lattice, b, p, values.data(), 1, sum);
        total[p] = sum[0];
      }
      if (!first) continue;
      float* const weights = &lattice.weights[b * BLOCK * Corners];
      for (int p = 0; p < BLOCK; ++p) total[p] = 1.f / std::sqrt(total[p] + 1e-20f);
      for (int r = 0; r < Corners; ++r)
        for (int p = 0; p < BLOCK; ++p) weights[r * BLOCK + p] *= total[p];
    }
  }
}

// The vertices of a lattice and, along each axis, the next vertex of each, or -1.
template <int D>
class Vertices {
 public:
  explicit Vertices(size_t expected) : numbers_(expected) { enlarge(expected / 2); }
  int32_t size() const { return numbers_.size(); }
  void prefetch(int64_t key) const { numbers_.prefetch(key); }
  // Makes room for so many more vertices.
  void reserve(size_t more) {
    numbers_.reserve(more);
    if (size() + more > room_) enlarge((size() + more) * 2);
  }
  // Adds the corners of a simplex. Along its edges, vertices are linked without a search.
  void add(const int64_t (&corners)[D + 1], const uint8_t (&axes)[D + 1], int32_t* ids) {
    for (int r = 0; r <= D; ++r) ids[r] = numbers_.add(corners[r]);
    for (int r = 0; r <= D; ++r) links_[ids[r]].next[axes[r]] = ids[r < D ? r + 1 : 0];
  }
  // Returns the next vertex of each by axis, also where no common simplex holds a pixel.
  std::vector<Zeros<int32_t>> link(const Embedding<D>& embedding) {
    constexpr int32_t AHEAD = 16;
    const int64_t* const keys = numbers_.keys();
    const Filter filter(keys, size());
    std::vector<Zeros<int32_t>> linked;
    std::vector<int32_t> unsure(size() + 1);
    for (int axis = 0; axis <= D; ++axis) {
      const int64_t step = embedding.step(axis);
      linked.emplace_back(size());
      int32_t* const next = linked.back().data();
      int32_t count = 0;
      for (int32_t v = 0; v < size(); ++v) {
        next[v] = links_[v].next[axis];
        unsure[count] = v;
        count += (next[v] < 0) & !filter.excludes(keys[v] + step);
      }
      for (int32_t i = 0; i < count; ++i) {
        if (i + AHEAD < count) numbers_.prefetch(keys[unsure[i + AHEAD]] + step);
        next[unsure[i]] = numbers_.find(keys[unsure[i]] + step);
      }
    }
    return linked;
  }

 private:
  struct Links {
    int32_t next[D + 1];
  };
  void enlarge(size_t room) {
    Zeros<Links> links(room);
    std::copy_n(links_.data(), size(), links.data());
    std::memset(links.data() + size(), 0xff, (room - size()) * sizeof(Links));  // all -1
    links_.swap(links);
    room_ = room;
  }

  Numbering numbers_;
  size_t room_ = 0;
  Zeros<Links> links_;
};

// Sorts the vertices of each axis into pairs and longer chains. Selections have no branches, which
// would be mispredicted.
template <int D>
void chain_up(Lattice& lattice, const std::vector<Zeros<int32_t>>& links) {
  const int32_t count = lattice.vertices;
  lattice.pairs.resize(D + 1);
  lattice.chains.resize(D + 1);
  std::vector<char> has_previous(count + 1);
  std::vector<int32_t> heads(count + 1), pairs(count + 2);
  for (int axis = 0; axis <= D; ++axis) {
    const int32_t* const next = links[axis].data();
    std::fill(has_previous.begin(), has_previous.end(), 0);
    for (int32_t v = 0; v < count; ++v) has_previous[next[v] + 1] = 1;
    int32_t found = 0, longer = 0, paired = 0, edges = 0;
    for (int32_t v = 0; v < count; ++v) {
      heads[found] = v;
      found += (next[v] >= 0) & !has_previous[v + 1];
      edges += next[v] >= 0;
    }
    for (int32_t i = 0; i < found; ++i) {
      const int32_t head = heads[i], second = next[head], is_pair = next[second] < 0;
      pairs[paired] = head;
      pairs[paired + 1] = second;
      paired += 2 * is_pair;
      heads[longer] = head;
      longer += !is_pair;
    }
    lattice.pairs[axis].assign(pairs.begin(), pairs.begin() + paired);
    auto& chain = lattice.chains[axis];
    chain.reserve(edges - paired / 2 + 2 * longer);
    for (int32_t i = 0; i < longer; ++i) {
      for (int32_t at = heads[i]; at >= 0; at = next[at]) chain.push_back(at);
      chain.push_back(count);
    }
  }
}

// `fill(block, feature)` writes the features of a block of pixels.
template <int D, class Fill>
Lattice build(int64_t pixels, const float (&largest)[D], Fill fill) {
  Lattice lattice(D + 1, pixels);
  const size_t expected = std::max<int64_t>(2048, pixels);
  Numbering simplices(expected);
  Vertices<D> vertices(expected);
  auto embedding = std::make_unique<Embedding<D>>(largest);
  alignas(64) float feature[D][BLOCK];
  struct Simplex {
    int64_t corners[D + 1];
    uint8_t axes[D + 1];
  };
  std::vector<Simplex> found(BLOCK);
  int first[BLOCK + 1];  // pixels in new simplices
  for (int64_t b = 0; b < lattice.blocks; ++b) {
    fill(b, feature);
    embedding->locate(feature);
    for (int p = 0; p < BLOCK; ++p) simplices.prefetch(embedding->simplex[p]);
    const int count = int(std::min<int64_t>(BLOCK, pixels - b * BLOCK));
    float* weights = &lattice.weights[b * BLOCK * (D + 1)];
    for (int r = 0; r <= D; ++r)
      std::memcpy(weights + r * BLOCK, embedding->weight[r], count * sizeof(float));
    const int32_t known = simplices.size();
    simplices.reserve(BLOCK);
    for (int p = 0; p < count; ++p) {
      const int32_t before = simplices.size();
      lattice.simplex_of[b * BLOCK + p] = simplices.add(embedding->simplex[p]);
      first[before - known] = p;  // overwritten unless the simplex is new
    }
    const int32_t added = simplices.size() - known;
    for (int32_t s = 0; s < added; ++s) {
      embedding->corners(first[s], found[s].corners, found[s].axes);
      for (const int64_t key : found[s].corners) vertices.prefetch(key);
    }
    lattice.corner_ids.resize(size_t(simplices.size()) * (D + 1));
    vertices.reserve(added * (D + 1));
    for (int32_t s = 0; s < added; ++s)
      vertices.add(found[s].corners, found[s].axes,
                   &lattice.corner_ids[size_t(known + s) * (D + 1)]);
  }
  lattice.vertices = vertices.size();
  chain_up<D>(lattice, vertices.link(*embedding));
  normalise<D + 1>(lattice);
  return lattice;
}

}  // namespace camkit
