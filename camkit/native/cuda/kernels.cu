// Launches of all kernels: how a call is divided into blocks.
#include <algorithm>

#include "attention.cuh"
#include "backward.cuh"
#include "launch.cuh"
#include "maps.cuh"

using namespace camkit;

namespace {

unsigned tiles_of(int64_t size, int tile) { return unsigned((size + tile - 1) / tile); }

template <typename T, int WIDTH> struct RunAttention {
  template <int M> static int with(const Params& p, void* stream) {
    using Work = Attention<T, WIDTH, M>;
    const dim3 blocks(tiles_of(p.queries, Work::QUERIES) * p.heads * p.images);
    return launch(attention<T, WIDTH, M>, blocks, Work::THREADS, Work::BYTES, stream, p);
  }
  static int run(const Params& p, void* stream) {
    if constexpr (two_fit<T, WIDTH>) {
      const unsigned large = tiles_of(p.queries, 128), small = tiles_of(p.queries, 64);
      const bool fills = int64_t(large) * p.heads * p.images >= CAMKIT_MANY_BLOCKS;
      if (fills && large * 128 <= small * 72) return with<2>(p, stream);
    }
    return with<1>(p, stream);
  }
};

template <typename T, int WIDTH> struct RunBackward {
  static int run(const Params& p, void* stream) {
    using Work = Backward<T, WIDTH>;
    const unsigned heads = p.heads * p.images;
    const dim3 rows(tiles_of(int64_t(heads) * p.queries, 4));
    if (const int error = launch(deltas<T, WIDTH>, rows, 128, 0, stream, p)) return error;
    const dim3 queries(tiles_of(p.queries, 64) * heads), keys(tiles_of(p.keys, 64) * heads);
    if (const int error = launch(to_queries<T, WIDTH>, queries, 128, Work::BYTES, stream, p))
      return error;
    return launch(to_keys<T, WIDTH>, keys, 128, Work::BYTES, stream, p);
  }
};

template <typename T, int WIDTH> struct RunColumns {
  static int run(const Params& p, void* stream) {
    const int64_t elements = int64_t(p.images) * p.heads * p.queries * p.columns;
    return launch(columns<T, WIDTH>, dim3(tiles_of(elements, 128)), 128, 0, stream, p);
  }
};

// Maps are cut into tiles of 128x128 where there are many of them, else into tiles of 64x64.
bool in_large_tiles(const Params& p) {
  const int64_t rows = tiles_of(p.queries - p.skip, 128), columns = tiles_of(p.keys - p.skip, 128);
  return p.type != FLOAT && p.width <= 80 && rows * columns * p.images >= CAMKIT_MANY_BLOCKS;
}

template <typename T, int WIDTH> struct RunAffinity {
  template <int M> static int with(const Params& p, void* stream) {
    using Work = HeadSum<T, WIDTH, M, M>;
    const dim3 blocks(tiles_of(p.keys - p.skip, Work::KEYS),
                      tiles_of(p.queries - p.skip, Work::QUERIES), p.images);
    return launch(affinity<T, WIDTH, M, M>, blocks, Work::THREADS, Work::BYTES, stream, p);
  }
  static int run(const Params& p, void* stream) {
    if constexpr (two_fit<T, WIDTH>)
      if (in_large_tiles(p)) return with<2>(p, stream);
    return with<1>(p, stream);
  }
};

template <typename T, int WIDTH> struct RunPropagate {
  template <int M> static int with(const Params& p, void* stream) {
    using Work = HeadSum<T, WIDTH, M, M>;
    const dim3 blocks(tiles_of(p.queries - p.skip, Work::QUERIES), p.parts / M, p.images);
    return launch(propagate<T, WIDTH, M, M>, blocks, Work::THREADS, Work::BYTES, stream, p);
  }
  static int run(const Params& p, void* stream) {
    if constexpr (two_fit<T, WIDTH>)
      if (in_large_tiles(p)) return with<2>(p, stream);
    return with<1>(p, stream);
  }
};

}  // namespace

int camkit_attention(const Params* p, void* stream) { return run<RunAttention>(*p, stream); }

int camkit_attention_backward(const Params* p, void* stream) {
  return run<RunBackward>(*p, stream);
}

int camkit_columns(const Params* p, void* stream) { return run<RunColumns>(*p, stream); }

int camkit_affinity(const Params* p, void* stream) { return run<RunAffinity>(*p, stream); }

int camkit_propagate_parts(const Params* p) {
  const int tile = in_large_tiles(*p) ? 128 : 64;
  const unsigned blocks = tiles_of(p->queries - p->skip, tile) * p->images;
  const unsigned wanted = tiles_of(CAMKIT_MANY_BLOCKS, blocks);
  return std::min(tiles_of(p->keys - p->skip, tile), wanted) * tile / 64;
}

int camkit_propagate(const Params* p, void* stream) {
  if (const int error = run<RunPropagate>(*p, stream)) return error;
  const int64_t elements = int64_t(p->images) * p->classes * (p->queries - p->skip);
  return launch(add_parts, dim3(tiles_of(elements, 128)), 128, 0, stream, *p);
}

const char* camkit_error(int code) {
  return code == NOT_BUILT ? "not compiled for this dtype and head width" : error_text(code);
}
