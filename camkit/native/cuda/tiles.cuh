// Tiles in shared memory, and products of tiles.
//
// A product is spread over the lanes of a warp as the tensor cores leave it, for float32 as well:
// of each 16x8 block, lane l holds rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next, as
// [first row, column 0], [first row, column 1], [second row, column 0], [second row, column 1].
// float32 is plain multiply and add; TF32 is never used.
#pragma once
#include "device.cuh"

namespace camkit {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float NOTHING = -__builtin_huge_valf();

// [row][WIDTH], rows an odd number of 16-byte chunks apart: eight rows lie in different banks.
template <typename T, int WIDTH> struct Tile {
  static constexpr int CHUNK = 16 / int(sizeof(T)), CHUNKS = WIDTH / CHUNK;
  static constexpr int PITCH = (CHUNKS | 1) * CHUNK;
  static constexpr int bytes(int rows) { return rows * PITCH * int(sizeof(T)); }
};

CAMKIT_DEVICE int blocks_of(int size, int block) { return (size + block - 1) / block; }

// Start copying ROWS tokens from `first` on; the last token (before `limit`) is repeated.
template <typename T, int WIDTH, int ROWS, int THREADS>
CAMKIT_DEVICE void load_tile(T* tile, const T* from, int64_t stride, int first, int limit) {
  using Shape = Tile<T, WIDTH>;
  constexpr int ALL = ROWS * Shape::CHUNKS;
#pragma unroll
  for (int i = 0; i < (ALL + THREADS - 1) / THREADS; ++i) {
    const int at = int(threadIdx.x) + i * THREADS;
    if (ALL % THREADS == 0 || at < ALL) {
      const int row = at / Shape::CHUNKS, place = at % Shape::CHUNKS * Shape::CHUNK;
      const int token = min(first + row, limit - 1);
      copy16(tile + row * Shape::PITCH + place, from + token * stride + place);
    }
  }
}

template <int M, int N> CAMKIT_DEVICE void clear(float (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) x[m][n][0] = x[m][n][1] = x[m][n][2] = x[m][n][3] = 0.f;
}

template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void outer_cores(float (&out)[M][N][4], const T* rows, const T* columns) {
  constexpr int PITCH = Tile<T, WIDTH>::PITCH;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < WIDTH; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
      load_matrices(a[m], rows + (m * 16 + (lane & 15)) * PITCH + k + (lane >> 4) * 8);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];  // two blocks of eight columns, each in two halves of k
      const int column = n * 8 + (lane & 7) + (lane >> 4) * 8;
      load_matrices(b, columns + column * PITCH + k + ((lane >> 3) & 1) * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        product(T(), out[m][n], a[m], b[0], b[1]);
        product(T(), out[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void outer_float(float (&out)[M][N][4], const float* rows, const float* columns) {
  constexpr int PITCH = Tile<float, WIDTH>::PITCH;
  const int lane = threadIdx.x & 31;
  rows += (lane >> 2) * PITCH;
  columns += (lane & 3) * 2 * PITCH;
#pragma unroll 2
  for (int k = 0; k < WIDTH; k += 4) {
    float4 a[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        a[m][r] = *reinterpret_cast<const float4*>(rows + (m * 16 + r * 8) * PITCH + k);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float4 b = *reinterpret_cast<const float4*>(columns + (n * 8 + c) * PITCH + k);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            out[m][n][r * 2 + c] += a[m][r].x * b.x + a[m][r].y * b.y + a[m][r].z * b.z +
                                    a[m][r].w * b.w;
      }
  }
}

template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void inner_cores(float (&out)[M][WIDTH / 8][4], const float (&weights)[M][N][4],
                               const T* values) {
  constexpr int PITCH = Tile<T, WIDTH>::PITCH;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&block)[4] = weights[m][n + i / 2];
        a[m][i] = pack(T(), block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int d = 0; d < WIDTH / 8; d += 2) {
      uint32_t b[4];
      load_transposed(b, values + (n * 8 + (lane & 15)) * PITCH + d * 8 + (lane >> 4) * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        product(T(), out[m][d], a[m], b[0], b[1]);
        product(T(), out[m][d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void inner_float(float (&out)[M][WIDTH / 8][4], const float (&weights)[M][N][4],
                               const float* values) {
  constexpr int PITCH = Tile<float, WIDTH>::PITCH;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int owner = 0; owner < 4; ++owner)  // of the four lanes that share these rows
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float* value = values + (n * 8 + owner * 2 + c) * PITCH + (lane & 3) * 2;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float first = from_lane(weights[m][n][c], (lane & 28) | owner);
          const float second = from_lane(weights[m][n][2 + c], (lane & 28) | owner);
#pragma unroll
          for (int d = 0; d < WIDTH / 8; ++d) {
            const float2 x = *reinterpret_cast<const float2*>(value + d * 8);
            out[m][d][0] += first * x.x;
            out[m][d][1] += first * x.y;
            out[m][d][2] += second * x.x;
            out[m][d][3] += second * x.y;
          }
        }
      }
}

// out (16 M rows, 8 N columns) += rows columns^T
template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void outer(float (&out)[M][N][4], const T* rows, const T* columns) {
  if constexpr (sizeof(T) == 4) outer_float<T, WIDTH>(out, rows, columns);
  else outer_cores<T, WIDTH>(out, rows, columns);
}

// out (16 M rows, WIDTH columns) += weights (16 M rows, 8 N columns) values (8 N rows)
template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void inner(float (&out)[M][WIDTH / 8][4], const float (&weights)[M][N][4],
                         const T* values) {
  if constexpr (sizeof(T) == 4) inner_float<T, WIDTH>(out, weights, values);
  else inner_cores<T, WIDTH>(out, weights, values);
}

// Sum over the four lanes that share a row.
CAMKIT_DEVICE float sum_of_row(float x) {
  x += from_partner(x, 1);
  return x + from_partner(x, 2);
}

CAMKIT_DEVICE float2 pair_at(const float* from) { return *reinterpret_cast<const float2*>(from); }

// Two neighbouring elements, in the type of `to`.
template <typename T> CAMKIT_DEVICE void store_pair(T* to, float first, float second) {
  if constexpr (sizeof(T) == 4) *reinterpret_cast<float2*>(to) = make_float2(first, second);
  else *reinterpret_cast<uint32_t*>(to) = pack(T(), first, second);
}

template <typename T> struct alignas(16) Chunk {
  T x[16 / sizeof(T)];
};
template <typename T> CAMKIT_DEVICE Chunk<T> load_chunk(const T* from) {
  return *reinterpret_cast<const Chunk<T>*>(from);
}

// The first element of one head of one image.
template <typename T>
CAMKIT_DEVICE const T* head_of(const void* tensor, const Strides& strides, int image, int head) {
  return static_cast<const T*>(tensor) + image * strides.image + head * strides.head;
}

}  // namespace camkit
