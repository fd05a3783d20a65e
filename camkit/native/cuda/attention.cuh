// Attention with weights on the keys, its normaliser, and the rows of the first queries.
//
// One pass over the keys with the running maximum of each row, as in FlashAttention (Dao et al.
// 2022). Weights on the keys and the rows of the class tokens are ours: a weight is added to the
// logit as its logarithm, and the block that owns a class row writes its logits while it passes
// them and divides them when the normaliser is known.
#pragma once
#include "bias.cuh"

namespace camkit {

// Four warps, each with 16 M queries; KEYS keys at a time.
template <typename T, int WIDTH, int M> struct Attention {
  static constexpr int THREADS = 128, QUERIES = 64 * M, KEYS = sizeof(T) == 4 ? 32 : 64;
  static constexpr int N = KEYS / 8, D = WIDTH / 8;
  using Shape = Tile<T, WIDTH>;
  struct Small {
    KeyBias<KEYS> bias;
    float lse[QUERIES];
  };
  static constexpr int BYTES = Shape::bytes(QUERIES + 2 * KEYS) + int(sizeof(Small));

  float out[M][D][4], logits[M][N][4], most[M][2], sum[M][2];

  CAMKIT_DEVICE void start() {
    clear(out);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        most[m][r] = NOTHING;
        sum[m][r] = 0.f;
      }
  }

  // Base-2 logits; those of class rows are kept in `row_out`, which is null for other rows.
  CAMKIT_DEVICE void tilt(int m, int r, const float* bias, float scale, float* row_out, int keys) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 added = pair_at(bias + n * 8 + column);
      float &left = logits[m][n][r * 2], &right = logits[m][n][r * 2 + 1];
      left = left * scale + added.x;
      right = right * scale + added.y;
      if (row_out && n * 8 + column < keys) row_out[n * 8 + column] = left;
      if (row_out && n * 8 + column + 1 < keys) row_out[n * 8 + column + 1] = right;
    }
  }

  // Logits to weights, relative to the largest logit of the row so far.
  CAMKIT_DEVICE void weigh(int m, int r) {
    float found = most[m][r];
#pragma unroll
    for (int n = 0; n < N; ++n)
      found = fmaxf(found, fmaxf(logits[m][n][r * 2], logits[m][n][r * 2 + 1]));
    found = fmaxf(found, from_partner(found, 1));
    found = fmaxf(found, from_partner(found, 2));
    const float level = found == NOTHING ? 0.f : found;
    const float shrink = power_of_two(most[m][r] - level);
    most[m][r] = found;
    sum[m][r] *= shrink;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = logits[m][n][r * 2 + c];
        x = power_of_two(x - level);
        sum[m][r] += x;
      }
#pragma unroll
    for (int d = 0; d < D; ++d) {
      out[m][d][r * 2] *= shrink;
      out[m][d][r * 2 + 1] *= shrink;
    }
  }

  // Divide by the sum; returns the normaliser in base 2.
  CAMKIT_DEVICE float finish(int m, int r, T* to) {
    const float total = sum_of_row(sum[m][r]);
    const float share = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
    for (int d = 0; d < D; ++d)
      if (to) store_pair(to + d * 8, out[m][d][r * 2] * share, out[m][d][r * 2 + 1] * share);
    return total > 0.f ? most[m][r] + log2f(total) : NOTHING;
  }
};

template <typename T, int WIDTH, int M> CAMKIT_GLOBAL(128) attention(const Params p) {
  using Work = Attention<T, WIDTH, M>;
  using Shape = Tile<T, WIDTH>;
  constexpr int QUERIES = Work::QUERIES, KEYS = Work::KEYS, THREADS = Work::THREADS;
  CAMKIT_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* k_tile = q_tile + QUERIES * Shape::PITCH;
  T* v_tile = k_tile + KEYS * Shape::PITCH;
  auto& small = *reinterpret_cast<typename Work::Small*>(v_tile + KEYS * Shape::PITCH);

  const int tiles = blocks_of(p.queries, QUERIES), tile = blockIdx.x % tiles;
  const int both = blockIdx.x / tiles, image = both / p.heads, head = both % p.heads;
  const int first = tile * QUERIES, lane = threadIdx.x & 31;
  const int of_warp = (threadIdx.x >> 5) * 16 * M, of_lane = of_warp + (lane >> 2);
  const T* q = head_of<T>(p.q, p.q_strides, image, head);
  const T* k = head_of<T>(p.k, p.k_strides, image, head);
  const T* v = head_of<T>(p.v, p.v_strides, image, head);
  float* rows = p.rows + int64_t(both) * p.class_rows * p.keys;
  const bool owns_class_rows = first < p.class_rows;

  Work work;
  work.start();
  load_tile<T, WIDTH, QUERIES, THREADS>(q_tile, q, p.q_strides.token, first, p.queries);
  load_tile<T, WIDTH, KEYS, THREADS>(k_tile, k, p.k_strides.token, 0, p.keys);
  close_copies();
  for (int key = 0; key < p.keys; key += KEYS) {
    wait_copies<0>();
    __syncthreads();  // keys are there; the values and the bias before them are done with
    load_tile<T, WIDTH, KEYS, THREADS>(v_tile, v, p.v_strides.token, key, p.keys);
    close_copies();
    small.bias.load(p, image, head, key);
    clear(work.logits);
    outer<T, WIDTH>(work.logits, q_tile + of_warp * Shape::PITCH, k_tile);
    wait_copies<0>();
    __syncthreads();  // values and bias are there; the keys are done with
    load_tile<T, WIDTH, KEYS, THREADS>(k_tile, k, p.k_strides.token, key + KEYS, p.keys);
    close_copies();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first + of_lane + m * 16 + r * 8;
        float* row_out = row < p.class_rows ? rows + (row * p.keys + key) : nullptr;
        work.tilt(m, r, small.bias.of_row(p, row), p.scale * LOG2_E, row_out, p.keys - key);
        work.weigh(m, r);
      }
    inner<T, WIDTH>(work.out, work.logits, v_tile);
  }
  wait_copies<0>();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = of_lane + m * 16 + r * 8, row = first + at;
      T* to = static_cast<T*>(p.out) + image * p.out_strides.image + head * p.out_strides.head;
      to = row < p.queries ? to + row * p.out_strides.token + (lane & 3) * 2 : nullptr;
      const float lse = work.finish(m, r, to);
      if ((lane & 3) == 0) {
        small.lse[at] = lse;
        if (row < p.queries) p.lse[int64_t(both) * p.queries + row] = lse * LN_2;
      }
    }
  if (!owns_class_rows) return;
  __syncthreads();  // all logits of class rows are written, and their normalisers
  const int own = p.class_rows - first < QUERIES ? p.class_rows - first : QUERIES;
  for (int at = 0; at < own; ++at) {
    float* row = rows + int64_t(first + at) * p.keys;
    const float level = small.lse[at] == NOTHING ? 0.f : small.lse[at];
    for (int key = threadIdx.x; key < p.keys; key += THREADS)
      row[key] = power_of_two(row[key] - level);
  }
}

}  // namespace camkit
