// Selects the kernel that is compiled for a call's dtype and width.
#pragma once
#include "device.cuh"

// Bits of what is compiled: bit width / 16 for a width, and its number in `Type` for a type.
#ifndef CAMKIT_WIDTHS
#define CAMKIT_WIDTHS 0x17c
#endif
#ifndef CAMKIT_TYPES
#define CAMKIT_TYPES 7
#endif
// Larger tiles move fewer bytes; used if there are enough for two rounds of a large GPU.
#ifndef CAMKIT_MANY_BLOCKS
#define CAMKIT_MANY_BLOCKS 264
#endif

namespace camkit {

// Whether registers and shared memory suffice for tiles of twice the side.
template <typename T, int WIDTH> constexpr bool two_fit = sizeof(T) == 2 && WIDTH <= 80;

template <template <typename, int> class Run, typename T, int WIDTH, int M>
int with_weights(const Params& p, void* stream) {
  using Found = Run<T, WIDTH>;
  return p.log_weights ? Found::template with<M, true>(p, stream)
                       : Found::template with<M, false>(p, stream);
}

template <template <typename, int> class Run, typename T, int WIDTH>
int try_width(const Params& p, bool large, void* stream) {
  if constexpr ((CAMKIT_WIDTHS >> (WIDTH / 16)) & 1) {
    if constexpr (two_fit<T, WIDTH>)
      if (large) return with_weights<Run, T, WIDTH, 2>(p, stream);
    return with_weights<Run, T, WIDTH, 1>(p, stream);
  }
  return NOT_BUILT;
}

template <template <typename, int> class Run, typename T, Type TYPE>
int try_type(const Params& p, bool large, void* stream) {
  if constexpr ((CAMKIT_TYPES >> TYPE) & 1) {
    switch (p.width) {
      case 32: return try_width<Run, T, 32>(p, large, stream);
      case 48: return try_width<Run, T, 48>(p, large, stream);
      case 64: return try_width<Run, T, 64>(p, large, stream);
      case 80: return try_width<Run, T, 80>(p, large, stream);
      case 96: return try_width<Run, T, 96>(p, large, stream);
      case 128: return try_width<Run, T, 128>(p, large, stream);
    }
  }
  return NOT_BUILT;
}

template <template <typename, int> class Run> int run(const Params& p, bool large, void* stream) {
  switch (p.type) {
    case HALF: return try_type<Run, half, HALF>(p, large, stream);
    case BFLOAT16: return try_type<Run, bfloat16, BFLOAT16>(p, large, stream);
    default: return try_type<Run, float, FLOAT>(p, large, stream);
  }
}

}  // namespace camkit
