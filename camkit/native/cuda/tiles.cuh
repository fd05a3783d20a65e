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

// A thread's part in copying ROWS tokens from `first` on; the last token (before `limit`) is
// repeated. The places are the same for every head and are worked out once.
template <typename T, int WIDTH, int ROWS, int THREADS> struct Copies {
  using Shape = Tile<T, WIDTH>;
  static constexpr int ALL = ROWS * Shape::CHUNKS, COUNT = (ALL + THREADS - 1) / THREADS;
  int from[COUNT];

  CAMKIT_DEVICE Copies(int64_t stride, int first, int limit) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int at = int(threadIdx.x) + i * THREADS;
      const int token = min(first + at / Shape::CHUNKS, limit - 1);
      from[i] = token * int(stride) + at % Shape::CHUNKS * Shape::CHUNK;
    }
  }
  CAMKIT_DEVICE void start(T* tile, const T* head) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int at = int(threadIdx.x) + i * THREADS;
      const int row = at / Shape::CHUNKS, place = at % Shape::CHUNKS * Shape::CHUNK;
      if (ALL % THREADS == 0 || at < ALL) copy16(tile + row * Shape::PITCH + place, head + from[i]);
    }
  }
};

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

// out (16 M rows, 8 N columns) += rows columns^T
template <typename T, int WIDTH, int M, int N>
CAMKIT_DEVICE void outer(float (&out)[M][N][4], const T* rows, const T* columns) {
  if constexpr (sizeof(T) == 4) outer_float<T, WIDTH>(out, rows, columns);
  else outer_cores<T, WIDTH>(out, rows, columns);
}

// Sum over the four lanes that share a row.
CAMKIT_DEVICE float sum_of_row(float x) {
  x += from_partner(x, 1);
  return x + from_partner(x, 2);
}

CAMKIT_DEVICE float2 pair_at(const float* from) { return *reinterpret_cast<const float2*>(from); }

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
