// Gradients of attention, its normaliser and its class rows, without a map.
//
// With A recomputed tile by tile from the normaliser, dA = grad_out v^T, plus grad_rows for class
// rows, and the gradient at the logits is dS = A * (dA - delta), delta being the sum of A * dA over
// the row less grad_lse. Queries and keys have a kernel each: weights are computed twice, but
// each result is owned by one block and added in a fixed order.
#pragma once
#include "bias.cuh"

namespace camkit {

// Four warps with 16 owned tokens each; STEP tokens of the other side at a time.
template <typename T, int WIDTH> struct Backward {
  static constexpr int THREADS = 128, OWNED = 64, D = WIDTH / 8;
  static constexpr int STEP = sizeof(T) == 4 ? (WIDTH <= 96 ? 32 : 16) : (WIDTH <= 64 ? 64 : 32);
  static constexpr int N = STEP / 8;
  using Shape = Tile<T, WIDTH>;
  struct Small {
    KeyBias<STEP> bias;
    float level[STEP], delta[STEP];
  };
  static constexpr int BYTES = Shape::bytes(2 * (OWNED + STEP)) + int(sizeof(Small));

  T *owned[2], *moving[2];
  Small* small;
  const T *q, *k, *v, *grad;
  const float *lse, *delta, *grad_rows;
  int first, image, head;

  CAMKIT_DEVICE Backward(const Params& p, unsigned char* shared, int tokens) {
    owned[0] = reinterpret_cast<T*>(shared);
    owned[1] = owned[0] + OWNED * Shape::PITCH;
    moving[0] = owned[1] + OWNED * Shape::PITCH;
    moving[1] = moving[0] + STEP * Shape::PITCH;
    small = reinterpret_cast<Small*>(moving[1] + STEP * Shape::PITCH);
    const int tiles = blocks_of(tokens, OWNED), both = blockIdx.x / tiles;
    first = blockIdx.x % tiles * OWNED;
    image = both / p.heads;
    head = both % p.heads;
    q = head_of<T>(p.q, p.q_strides, image, head);
    k = head_of<T>(p.k, p.k_strides, image, head);
    v = head_of<T>(p.v, p.v_strides, image, head);
    grad = head_of<T>(p.grad_out, p.grad_strides, image, head);
    lse = p.lse + int64_t(both) * p.queries;
    delta = p.delta + int64_t(both) * p.queries;
    grad_rows = p.grad_rows ? p.grad_rows + int64_t(both) * p.class_rows * p.keys : nullptr;
  }
  // This lane's first owned token, and its first moving token.
  static CAMKIT_DEVICE int own() { return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2); }
  static CAMKIT_DEVICE int other() { return (threadIdx.x & 3) * 2; }
  static CAMKIT_DEVICE int of_warp() { return (threadIdx.x >> 5) * 16 * Shape::PITCH; }

  // Products of owned and moving tokens: first with first, second with second.
  CAMKIT_DEVICE void products(float (&logits)[1][N][4], float (&to_map)[1][N][4]) const {
    clear(logits);
    clear(to_map);
    outer<T, WIDTH>(logits, owned[0] + of_warp(), moving[0]);
    outer<T, WIDTH>(to_map, owned[1] + of_warp(), moving[1]);
  }

  // Add the gradient at the class rows, if they are among the queries of this tile.
  template <bool OWN_QUERIES>
  CAMKIT_DEVICE void add_class_rows(const Params& p, float (&to_map)[1][N][4], int others) const {
    if (!grad_rows || (OWN_QUERIES ? first : others) >= p.class_rows) return;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int owned = first + own() + i / 2 * 8, moving = others + n * 8 + other() + i % 2;
        const int query = OWN_QUERIES ? owned : moving, key = OWN_QUERIES ? moving : owned;
        const bool asked = query < p.class_rows && key < p.keys;
        if (asked) to_map[0][n][i] += grad_rows[query * p.keys + key];
      }
  }

  CAMKIT_DEVICE void store(void* to, const float (&x)[1][D][4], float scale, int tokens,
                           int heads) const {
    T* of_head = static_cast<T*>(to) + (int64_t(image) * heads + head) * tokens * WIDTH;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = first + own() + r * 8;
      if (token >= tokens) continue;
#pragma unroll
      for (int d = 0; d < D; ++d)
        store_pair(of_head + int64_t(token) * WIDTH + d * 8 + other(), x[0][d][r * 2] * scale,
                   x[0][d][r * 2 + 1] * scale);
    }
  }
};

template <typename T, int WIDTH> CAMKIT_GLOBAL(128) to_queries(const Params p) {
  using Work = Backward<T, WIDTH>;
  CAMKIT_SHARED(shared);
  Work work(p, shared, p.queries);
  load_tile<T, WIDTH, 64, 128>(work.owned[0], work.q, p.q_strides.token, work.first, p.queries);
  load_tile<T, WIDTH, 64, 128>(work.owned[1], work.grad, p.grad_strides.token, work.first,
                               p.queries);
  const float scale = p.scale * LOG2_E;
  float found[1][Work::D][4], logits[1][Work::N][4], to_map[1][Work::N][4], level[2], delta[2];
  clear(found);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = min(work.first + Work::own() + r * 8, p.queries - 1);
    level[r] = level_of(work.lse[query]);
    delta[r] = work.delta[query];
  }
  for (int first = 0; first < p.keys; first += Work::STEP) {
    load_tile<T, WIDTH, Work::STEP, 128>(work.moving[0], work.k, p.k_strides.token, first, p.keys);
    load_tile<T, WIDTH, Work::STEP, 128>(work.moving[1], work.v, p.v_strides.token, first, p.keys);
    close_copies();
    work.small->bias.load(p, work.image, work.head, first);
    wait_copies<0>();
    __syncthreads();  // keys, values and bias are there
    work.products(logits, to_map);
    work.template add_class_rows<true>(p, to_map, first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.first + Work::own() + r * 8;
      const float* bias = work.small->bias.of_row(p, query) + Work::other();
#pragma unroll
      for (int n = 0; n < Work::N; ++n) {
        const float2 added = pair_at(bias + n * 8);
        float(&x)[4] = logits[0][n];
        const float left = x[r * 2] * scale + added.x, right = x[r * 2 + 1] * scale + added.y;
        x[r * 2] = power_of_two(left + level[r]) * (to_map[0][n][r * 2] - delta[r]);
        x[r * 2 + 1] = power_of_two(right + level[r]) * (to_map[0][n][r * 2 + 1] - delta[r]);
      }
    }
    inner<T, WIDTH>(found, logits, work.moving[0]);
    __syncthreads();  // and done with
  }
  work.store(p.to_q, found, p.scale, p.queries, p.heads);
}

template <typename T, int WIDTH> CAMKIT_GLOBAL(128) to_keys(const Params p) {
  using Work = Backward<T, WIDTH>;
  CAMKIT_SHARED(shared);
  Work work(p, shared, p.keys);
  load_tile<T, WIDTH, 64, 128>(work.owned[0], work.k, p.k_strides.token, work.first, p.keys);
  load_tile<T, WIDTH, 64, 128>(work.owned[1], work.v, p.v_strides.token, work.first, p.keys);
  const float scale = p.scale * LOG2_E;
  float to_k[1][Work::D][4], to_v[1][Work::D][4], weights[1][Work::N][4], to_map[1][Work::N][4];
  float bias[2] = {}, to_bias[2] = {};
  clear(to_k);
  clear(to_v);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = min(work.first + Work::own() + r * 8, p.keys - 1);
    if (!p.log_weights) continue;
    const auto* of_head = head_of<float>(p.log_weights, p.weight_strides, work.image, work.head);
    bias[r] = of_head[key] * LOG2_E;
  }
  for (int first = 0; first < p.queries; first += Work::STEP) {
    load_tile<T, WIDTH, Work::STEP, 128>(work.moving[0], work.q, p.q_strides.token, first,
                                         p.queries);
    load_tile<T, WIDTH, Work::STEP, 128>(work.moving[1], work.grad, p.grad_strides.token, first,
                                         p.queries);
    close_copies();
    if (threadIdx.x < Work::STEP) {
      const int query = first + threadIdx.x;  // those that do not exist have no weights
      work.small->level[threadIdx.x] = query < p.queries ? level_of(work.lse[query]) : NOTHING;
      work.small->delta[threadIdx.x] = query < p.queries ? work.delta[query] : 0.f;
    }
    wait_copies<0>();
    __syncthreads();  // queries, gradients and what belongs to them are there
    work.products(weights, to_map);
    work.template add_class_rows<false>(p, to_map, first);
#pragma unroll
    for (int n = 0; n < Work::N; ++n) {
      const float2 levels = pair_at(work.small->level + n * 8 + Work::other());
      const float2 deltas = pair_at(work.small->delta + n * 8 + Work::other());
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool gated = first + n * 8 + Work::other() + i % 2 < p.gated_rows;
        const float level = (i % 2 ? levels.y : levels.x) + (gated ? bias[i / 2] : 0.f);
        float &weight = weights[0][n][i], &x = to_map[0][n][i];
        weight = power_of_two(weight * scale + level);
        x = weight * (x - (i % 2 ? deltas.y : deltas.x));
        if (gated) to_bias[i / 2] += x;
      }
    }
    inner<T, WIDTH>(to_v, weights, work.moving[1]);
    inner<T, WIDTH>(to_k, to_map, work.moving[0]);
    __syncthreads();  // and done with
  }
  work.store(p.to_k, to_k, p.scale, p.keys, p.heads);
  work.store(p.to_v, to_v, 1.f, p.keys, p.heads);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = sum_of_row(to_bias[r]);
    const int key = work.first + Work::own() + r * 8;
    if (p.to_log_weights && (threadIdx.x & 3) == 0 && key < p.keys)
      p.to_log_weights[(int64_t(work.image) * p.heads + work.head) * p.keys + key] = total;
  }
}

// The delta of each row, by one warp.
template <typename T, int WIDTH> CAMKIT_GLOBAL(128) deltas(const Params p) {
  const int lane = threadIdx.x & 31, query_of_all = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (query_of_all >= p.images * p.heads * p.queries) return;
  const int both = query_of_all / p.queries, query = query_of_all % p.queries;
  const int image = both / p.heads, head = both % p.heads;
  const T* grad = head_of<T>(p.grad_out, p.grad_strides, image, head);
  const T* out = head_of<T>(p.out, p.out_strides, image, head);
  grad += query * p.grad_strides.token;
  out += query * p.out_strides.token;
  float total = 0.f;
  for (int d = lane; d < WIDTH; d += 32) total += to_float(grad[d]) * to_float(out[d]);
  if (p.grad_rows && query < p.class_rows) {
    const int64_t row = (int64_t(both) * p.class_rows + query) * p.keys;
    for (int key = lane; key < p.keys; key += 32)
      total += p.grad_rows[row + key] * p.rows[row + key];
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) total += from_partner(total, mask);
  if (p.grad_lse) total -= p.grad_lse[query_of_all];
  // a row that attends to nothing has no gradient, whatever the gradient at its normaliser
  if (lane == 0) p.delta[query_of_all] = p.lse[query_of_all] == NOTHING ? 0.f : total;
}

}  // namespace camkit
