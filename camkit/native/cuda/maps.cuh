// Parts, head means and products of an attention map whose normaliser is known.
//
// Keys and queries beyond the last repeat the last one; what is computed for them is not stored.
#pragma once
#include "tiles.cuh"

namespace camkit {

// Negated normaliser in base 2. A row that attends to nothing gets 0: its logits are all -inf.
CAMKIT_DEVICE float level_of(float lse) { return lse == NOTHING ? 0.f : -lse * LOG2_E; }

// The log-weights of one head of one image, a number per key; null if there are none.
CAMKIT_DEVICE const float* weights_of(const Params& p, int image, int head) {
  return p.log_weights ? head_of<float>(p.log_weights, p.weight_strides, image, head) : nullptr;
}

// The attention of 64 M queries to 64 K keys, summed over heads, in registers: 4 K warps, each with
// 16 M queries and 64 keys. With two STAGES the next head is loaded meanwhile.
template <typename T, int WIDTH, int M, int K, bool WEIGHTED> struct HeadSum {
  static constexpr int THREADS = 128 * K, QUERIES = 64 * M, KEYS = 64 * K, N = 8;
  static constexpr int STAGES = sizeof(T) == 2 && WIDTH <= 80 ? 2 : 1;
  using Shape = Tile<T, WIDTH>;
  static constexpr int STAGE = (QUERIES + KEYS) * Shape::PITCH;
  static constexpr int OUT_PITCH = KEYS + 8;  // four rows of a half-warp lie in different banks
  static constexpr int IN = STAGES * Shape::bytes(QUERIES + KEYS);
  static constexpr int OUT = QUERIES * OUT_PITCH * int(sizeof(float));
  static constexpr int TILES = IN > OUT ? IN : OUT;
  static constexpr int BYTES = TILES + (WEIGHTED ? KEYS * int(sizeof(float)) : 0);

  float sum[M][N][4];

  // This lane's first query and first key, counted from those of the block.
  static CAMKIT_DEVICE int query() {
    return (threadIdx.x >> 5) % 4 * 16 * M + ((threadIdx.x & 31) >> 2);
  }
  static CAMKIT_DEVICE int key() { return (threadIdx.x >> 7) * 64 + (threadIdx.x & 3) * 2; }

  CAMKIT_DEVICE void add(const Params& p, const T* stage, const float* bias, const float* lse,
                         int first_query) {
    constexpr int PART = N / 2;  // half of the keys at a time: the logits need registers too
    const T* queries = stage + (threadIdx.x >> 5) % 4 * 16 * M * Shape::PITCH;
    const T* keys = stage + (QUERIES + (threadIdx.x >> 7) * 64) * Shape::PITCH;
    const float scale = p.scale * LOG2_E;
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
          const float level = level_of(lse[min(row, p.queries - 1)]);
          const bool gated = WEIGHTED && row < p.gated_rows;
#pragma unroll
          for (int n = 0; n < PART; ++n) {
            float2 added = make_float2(level, level);
            if (gated) {
              const float2 more = pair_at(bias + key() + (part + n) * 8);
              added = make_float2(level + more.x, level + more.y);
            }
            sum[m][part + n][r * 2] += power_of_two(logits[m][n][r * 2] * scale + added.x);
            sum[m][part + n][r * 2 + 1] += power_of_two(logits[m][n][r * 2 + 1] * scale + added.y);
          }
        }
    }
  }

  CAMKIT_DEVICE void run(const Params& p, unsigned char* shared, int image, int first_query,
                         int first_key) {
    T* stages = reinterpret_cast<T*>(shared);
    float* bias = reinterpret_cast<float*>(shared + TILES);
    const Copies<T, WIDTH, QUERIES, THREADS> of_q(p.q_strides.token, first_query, p.queries);
    const Copies<T, WIDTH, KEYS, THREADS> of_k(p.k_strides.token, first_key, p.keys);
    const T* q = head_of<T>(p.q, p.q_strides, image, 0);
    const T* k = head_of<T>(p.k, p.k_strides, image, 0);
    const float* lse = p.lse + int64_t(image) * p.heads * p.queries;
    const auto load = [&](T* stage) {
      of_q.start(stage, q);
      of_k.start(stage + QUERIES * Shape::PITCH, k);
      q += p.q_strides.head;
      k += p.k_strides.head;
    };
    clear(sum);
    if (STAGES == 2) load(stages);
    close_copies();
    for (int head = 0; head < p.heads; ++head, lse += p.queries) {
      const int next = head + STAGES - 1;
      if (next < p.heads) load(stages + next % STAGES * STAGE);
      close_copies();
      if (WEIGHTED && int(threadIdx.x) < KEYS) {
        const int key = min(first_key + int(threadIdx.x), p.keys - 1);
        bias[threadIdx.x] = weights_of(p, image, head)[key] * LOG2_E;
      }
      wait_copies<STAGES - 1>();
      __syncthreads();  // this head and its bias are there
      add(p, stages + head % STAGES * STAGE, bias, lse, first_query);
      __syncthreads();  // and done with
    }
  }
};

// affinity = beta * affinity + alpha * head mean. The result goes through shared memory, so that
// neighbouring threads read and write neighbouring elements.
template <typename T, int WIDTH, int M, int K, bool WEIGHTED>
CAMKIT_GLOBAL(128 * K) affinity(const Params p) {
  using Work = HeadSum<T, WIDTH, M, K, WEIGHTED>;
  CAMKIT_SHARED(shared);
  const int first_column = blockIdx.x * Work::KEYS, first_row = blockIdx.y * Work::QUERIES;
  const int image = blockIdx.z;
  Work work;
  work.run(p, shared, image, p.skip + first_row, p.skip + first_column);
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < Work::N; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* to = tile + (Work::query() + m * 16 + r * 8) * Work::OUT_PITCH + Work::key() + n * 8;
        *reinterpret_cast<float2*>(to) =
            make_float2(work.sum[m][n][r * 2], work.sum[m][n][r * 2 + 1]);
      }
  __syncthreads();  // all sums are in the tile
  const int64_t rows = p.queries - p.skip, columns = p.keys - p.skip;
  const int column = threadIdx.x % Work::KEYS;
  if (first_column + column >= columns) return;
  float* map = p.map + (image * rows + first_row) * columns + first_column + column;
  const float share = p.alpha / p.heads;
  for (int row = threadIdx.x / Work::KEYS; row < Work::QUERIES; row += Work::THREADS / Work::KEYS) {
    if (first_row + row >= rows) return;
    const float x = share * tile[row * Work::OUT_PITCH + column];
    map[row * columns] = p.beta == 0.f ? x : x + p.beta * map[row * columns];
  }
}

// Products with class maps. A block takes every `splits`-th tile of keys; the warps of a block that
// have other keys, and the blocks of the other splits, write parts of their own.
template <typename T, int WIDTH, int M, int K, bool WEIGHTED>
CAMKIT_GLOBAL(128 * K) propagate(const Params p) {
  using Work = HeadSum<T, WIDTH, M, K, WEIGHTED>;
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
          if (at >= columns) continue;
          const float value = cam[int64_t(index) * columns + at];
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
  p.out[at] = total / p.heads;
}

// How much a query attends to a key, from the dot product that four lanes have parts of.
CAMKIT_DEVICE float weight_at(const Params& p, float dot, const float* weights, float lse,
                              int query, int key) {
  const float bias = weights && query < p.gated_rows ? weights[key] * LOG2_E : 0.f;
  return power_of_two(sum_of_row(dot) * (p.scale * LOG2_E) + (bias + level_of(lse)));
}

template <typename T> CAMKIT_DEVICE float dot_of_chunks(const T* a, const T* b) {
  const Chunk<T> x = load_chunk(a), y = load_chunk(b);
  float dot = 0.f;
#pragma unroll
  for (int i = 0; i < int(16 / sizeof(T)); ++i) dot += to_float(x.x[i]) * to_float(y.x[i]);
  return dot;
}

// Four lanes for each token: what the first tokens attend to there, and how much it attends to
// them. Any width that is a multiple of 16 bytes.
template <typename T> CAMKIT_GLOBAL(128) rows_and_columns(const Params p) {
  constexpr int CHUNK = 16 / int(sizeof(T));
  const int tokens = p.queries > p.keys ? p.queries : p.keys, lane = threadIdx.x & 3;
  const int64_t at = (int64_t(blockIdx.x) * 128 + threadIdx.x) / 4;
  const int64_t last = int64_t(p.images) * p.heads - 1;
  const int64_t both = at / tokens < last ? at / tokens : last;
  const int token = int(at % tokens), image = int(both / p.heads), head = int(both % p.heads);
  const bool writes = lane == 0 && at / tokens <= last;
  const int query = min(token, p.queries - 1), key = min(token, p.keys - 1);
  const T* q = head_of<T>(p.q, p.q_strides, image, head);
  const T* k = head_of<T>(p.k, p.k_strides, image, head);
  const float *lse = p.lse + both * p.queries, *weights = weights_of(p, image, head);
  const int most = p.row_count > p.column_count ? p.row_count : p.column_count;
  for (int first = 0; first < most; ++first) {
    float of_row = 0.f, of_column = 0.f;
    for (int d = lane * CHUNK; d < p.width; d += 4 * CHUNK) {
      if (first < p.row_count)
        of_row += dot_of_chunks(q + first * p.q_strides.token + d, k + key * p.k_strides.token + d);
      if (first < p.column_count)
        of_column +=
            dot_of_chunks(q + query * p.q_strides.token + d, k + first * p.k_strides.token + d);
    }
    if (first < p.row_count) {
      const float x = weight_at(p, of_row, weights, lse[first], first, key);
      if (writes && token < p.keys) p.rows[(both * p.row_count + first) * p.keys + key] = x;
    }
    if (first < p.column_count) {
      const float x = weight_at(p, of_column, weights, lse[query], query, first);
      if (writes && token < p.queries)
        p.columns[(both * p.queries + query) * p.column_count + first] = x;
    }
  }
}

}  // namespace camkit
