// Columns, head means and products of an attention map whose normaliser is known.
#pragma once
#include "bias.cuh"

namespace camkit {

// The attention of 64 M queries to 64 K keys, summed over heads, in registers: 4 K warps, each with
// 16 M queries and 64 keys. With two STAGES the next head is loaded meanwhile.
template <typename T, int WIDTH, int M, int K> struct HeadSum {
  static constexpr int THREADS = 128 * K, QUERIES = 64 * M, KEYS = 64 * K, N = 8;
  static constexpr int STAGES = sizeof(T) == 2 && WIDTH <= 80 ? 2 : 1;
  using Shape = Tile<T, WIDTH>;
  static constexpr int STAGE = (QUERIES + KEYS) * Shape::PITCH;
  static constexpr int BYTES =
      STAGES * Shape::bytes(QUERIES + KEYS) + int(sizeof(KeyBias<KEYS>));

  float sum[M][N][4];

  // This lane's first query and first key, counted from those of the block.
  static CAMKIT_DEVICE int query() {
    return (threadIdx.x >> 5) % 4 * 16 * M + ((threadIdx.x & 31) >> 2);
  }
  static CAMKIT_DEVICE int key() { return (threadIdx.x >> 7) * 64 + (threadIdx.x & 3) * 2; }

  static CAMKIT_DEVICE void load(const Params& p, T* stage, int image, int head, int first_query,
                                 int first_key) {
    const T* q = head_of<T>(p.q, p.q_strides, image, head);
    const T* k = head_of<T>(p.k, p.k_strides, image, head);
    load_tile<T, WIDTH, QUERIES, THREADS>(stage, q, p.q_strides.token, first_query, p.queries);
    load_tile<T, WIDTH, KEYS, THREADS>(stage + QUERIES * Shape::PITCH, k, p.k_strides.token,
                                       first_key, p.keys);
  }

  CAMKIT_DEVICE void add(const Params& p, const T* stage, const KeyBias<KEYS>& bias, int image,
                         int head, int first_query) {
    constexpr int PART = N / 2;  // half of the keys at a time: the logits need registers too
    const T* queries = stage + (threadIdx.x >> 5) % 4 * 16 * M * Shape::PITCH;
    const T* keys = stage + (QUERIES + (threadIdx.x >> 7) * 64) * Shape::PITCH;
    const float scale = p.scale * LOG2_E;
    const float* lse = p.lse + (int64_t(image) * p.heads + head) * p.queries;
#pragma unroll
    for (int part = 0; part < N; part += PART) {
      float logits[M][PART][4];
      clear(logits);
      outer<T, WIDTH>(logits, queries, keys + part * 8 * Shape::PITCH);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = first_query + query() + m * 16 + r * 8;
          const float level = row < p.queries ? level_of(lse[row]) : 0.f;
          const float* of_row = bias.of_row(p, row) + key() + part * 8;
#pragma unroll
          for (int n = 0; n < PART; ++n) {
            const float2 added = pair_at(of_row + n * 8);
            const float left = logits[m][n][r * 2] * scale + added.x;
            const float right = logits[m][n][r * 2 + 1] * scale + added.y;
            sum[m][part + n][r * 2] += power_of_two(left + level);
            sum[m][part + n][r * 2 + 1] += power_of_two(right + level);
          }
        }
    }
  }

  CAMKIT_DEVICE void run(const Params& p, unsigned char* shared, int image, int first_query,
                         int first_key) {
    T* stages = reinterpret_cast<T*>(shared);
    auto& bias = *reinterpret_cast<KeyBias<KEYS>*>(stages + STAGES * STAGE);
    clear(sum);
    if (STAGES == 2) load(p, stages, image, 0, first_query, first_key);
    close_copies();
    for (int head = 0; head < p.heads; ++head) {
      const int next = head + STAGES - 1;
      if (next < p.heads)
        load(p, stages + next % STAGES * STAGE, image, next, first_query, first_key);
      close_copies();
      bias.load(p, image, head, first_key);
      wait_copies<STAGES - 1>();
      __syncthreads();  // this head and its bias are there
      add(p, stages + head % STAGES * STAGE, bias, image, head, first_query);
      __syncthreads();  // and done with
    }
  }
};

// affinity = beta * affinity + alpha * head mean; each element is owned by one lane.
template <typename T, int WIDTH, int M, int K> CAMKIT_GLOBAL(128 * K) affinity(const Params p) {
  using Work = HeadSum<T, WIDTH, M, K>;
  CAMKIT_SHARED(shared);
  const int first_key = p.skip + blockIdx.x * Work::KEYS, image = blockIdx.z;
  const int first_query = p.skip + blockIdx.y * Work::QUERIES;
  Work work;
  work.run(p, shared, image, first_query, first_key);
  const int rows = p.queries - p.skip, columns = p.keys - p.skip;
  const int row = first_query - p.skip + Work::query(), column = first_key - p.skip + Work::key();
  float* to = p.map + (int64_t(image) * rows + row) * columns + column;
  const float share = p.alpha / p.heads;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + m * 16 + r * 8 >= rows) return;
      float* of_row = to + int64_t(m * 16 + r * 8) * columns;
#pragma unroll
      for (int n = 0; n < Work::N; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (column + n * 8 + c >= columns) continue;
          const float x = share * work.sum[m][n][r * 2 + c];
          of_row[n * 8 + c] = p.beta == 0.f ? x : x + p.beta * of_row[n * 8 + c];
        }
    }
}

// Products with class maps. A block takes every `splits`-th tile of keys; the warps of a block that
// have other keys, and the blocks of the other splits, write parts of their own.
template <typename T, int WIDTH, int M, int K> CAMKIT_GLOBAL(128 * K) propagate(const Params p) {
  using Work = HeadSum<T, WIDTH, M, K>;
  CAMKIT_SHARED(shared);
  const int rows = p.queries - p.skip, columns = p.keys - p.skip, splits = p.parts / K;
  const int first_query = p.skip + blockIdx.x * Work::QUERIES, image = blockIdx.z;
  const int part = blockIdx.y * K + (threadIdx.x >> 7);
  const float* cam = p.cam + int64_t(image) * p.classes * columns;
  float* to = p.partial + (int64_t(part) * p.images + image) * p.classes * rows;
  Work work;
  for (int tile = blockIdx.y; tile * Work::KEYS < columns; tile += splits) {
    work.run(p, shared, image, first_query, p.skip + tile * Work::KEYS);
    const int column = tile * Work::KEYS + Work::key();
    for (int index = 0; index < p.classes; ++index) {
      float found[M][2] = {};
#pragma unroll
      for (int n = 0; n < Work::N; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = column + n * 8 + c;
          const float value = at < columns ? cam[int64_t(index) * columns + at] : 0.f;
#pragma unroll
          for (int m = 0; m < M; ++m) {
            found[m][0] += work.sum[m][n][c] * value;
            found[m][1] += work.sum[m][n][2 + c] * value;
          }
        }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float total = sum_of_row(found[m][r]);
          const int row = first_query - p.skip + Work::query() + m * 16 + r * 8;
          if ((threadIdx.x & 3) || row >= rows) continue;
          float& x = to[int64_t(index) * rows + row];
          x = total + (tile == int(blockIdx.y) ? 0.f : x);
        }
    }
  }
}

// Adds the parts of a product in a fixed order.
CAMKIT_GLOBAL(128) add_parts(const Params p) {
  const int64_t size = int64_t(p.images) * p.classes * (p.queries - p.skip);
  const int64_t at = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (at >= size) return;
  float total = 0.f;
  for (int part = 0; part < p.parts; ++part) total += p.partial[part * size + at];
  static_cast<float*>(p.out)[at] = total / p.heads;
}

// The columns of the first keys, one element per thread.
template <typename T, int WIDTH> CAMKIT_GLOBAL(128) columns(const Params p) {
  const int64_t at = int64_t(blockIdx.x) * 128 + threadIdx.x;
  const int key = at % p.columns, query = at / p.columns % p.queries;
  const int64_t both = at / p.columns / p.queries;
  if (both >= int64_t(p.images) * p.heads) return;
  const int image = both / p.heads, head = both % p.heads;
  const T* q = head_of<T>(p.q, p.q_strides, image, head) + query * p.q_strides.token;
  const T* k = head_of<T>(p.k, p.k_strides, image, head) + key * p.k_strides.token;
  float dot = 0.f;
  for (int d = 0; d < WIDTH; d += Tile<T, WIDTH>::CHUNK) {
    const Chunk<T> a = load_chunk(q + d), b = load_chunk(k + d);
#pragma unroll
    for (int i = 0; i < Tile<T, WIDTH>::CHUNK; ++i) dot += to_float(a.x[i]) * to_float(b.x[i]);
  }
  float bias = level_of(p.lse[both * p.queries + query]);
  if (p.log_weights && query < p.gated_rows)
    bias += head_of<float>(p.log_weights, p.weight_strides, image, head)[key] * LOG2_E;
  p.map[at] = power_of_two(dot * (p.scale * LOG2_E) + bias);
}

}  // namespace camkit
