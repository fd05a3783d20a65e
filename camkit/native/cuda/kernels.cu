// Launches of all kernels: how a call is divided into blocks.
#include <algorithm>

#include "launch.cuh"
#include "maps.cuh"

using namespace camkit;

namespace {

unsigned tiles_of(int64_t size, int tile) { return unsigned((size + tile - 1) / tile); }

template <typename T> int run_rows_and_columns(const Params& p, void* stream) {
  const int64_t tokens = int64_t(p.images) * p.heads * std::max(p.queries, p.keys);
  return launch(rows_and_columns<T>, dim3(tiles_of(tokens, 32)), 128, 0, stream, p);
}

// Maps are cut into tiles of 128x128 where there are many of them, else into tiles of 64x64.
bool in_large_tiles(const Params& p) {
  const int64_t rows = tiles_of(p.queries - p.skip, 128), columns = tiles_of(p.keys - p.skip, 128);
  return p.type != FLOAT && p.width <= 80 && rows * columns * p.images >= CAMKIT_MANY_BLOCKS;
}

template <typename T, int WIDTH> struct RunAffinity {
  template <int M, bool WEIGHTED> static int with(const Params& p, void* stream) {
    using Work = HeadSum<T, WIDTH, M, M, WEIGHTED>;
    const dim3 blocks(tiles_of(p.keys - p.skip, Work::KEYS),
                      tiles_of(p.queries - p.skip, Work::QUERIES), p.images);
    const auto kernel = affinity<T, WIDTH, M, M, WEIGHTED>;
    return launch(kernel, blocks, Work::THREADS, Work::BYTES, stream, p);
  }
};

template <typename T, int WIDTH> struct RunPropagate {
  template <int M, bool WEIGHTED> static int with(const Params& p, void* stream) {
    using Work = HeadSum<T, WIDTH, M, M, WEIGHTED>;
    const dim3 blocks(tiles_of(p.queries - p.skip, Work::QUERIES), p.parts / M, p.images);
    const auto kernel = propagate<T, WIDTH, M, M, WEIGHTED>;
    return launch(kernel, blocks, Work::THREADS, Work::BYTES, stream, p);
  }
};

}  // namespace

int camkit_rows_and_columns(const Params* p, void* stream) {
  switch (p->type) {
    case HALF: return run_rows_and_columns<half>(*p, stream);
    case BFLOAT16: return run_rows_and_columns<bfloat16>(*p, stream);
    default: return run_rows_and_columns<float>(*p, stream);
  }
}

int camkit_affinity(const Params* p, void* stream) {
  return run<RunAffinity>(*p, in_large_tiles(*p), stream);
}

int camkit_propagate_parts(const Params* p) {
  const int tile = in_large_tiles(*p) ? 128 : 64;
  const unsigned blocks = tiles_of(p->queries - p->skip, tile) * p->images;
  const unsigned wanted = tiles_of(CAMKIT_MANY_BLOCKS, blocks);
  return std::min(tiles_of(p->keys - p->skip, tile), wanted) * tile / 64;
}

int camkit_propagate(const Params* p, void* stream) {
  if (const int error = run<RunPropagate>(*p, in_large_tiles(*p), stream)) return error;
  const int64_t elements = int64_t(p->images) * p->classes * (p->queries - p->skip);
  return launch(add_parts, dim3(tiles_of(elements, 128)), 128, 0, stream, *p);
}

const char* camkit_error(int code) {
  return code == NOT_BUILT ? "not compiled for this dtype and head width" : error_text(code);
}
