// The bias added to the logits of each key, in base 2.
#pragma once
#include "tiles.cuh"

namespace camkit {

// Two versions: for gated rows the log weight of the key, for other rows zero. Keys that do not
// exist get minus infinity in both.
template <int KEYS> struct KeyBias {
  float gated[KEYS], plain[KEYS];

  CAMKIT_DEVICE void load(const Params& p, int image, int head, int first_key) {
    if (int(threadIdx.x) >= KEYS) return;
    const int key = first_key + threadIdx.x;
    const bool exists = key < p.keys;
    const float* weights = p.log_weights;
    float weight = 0.f;
    if (weights && exists)
      weight = head_of<float>(weights, p.weight_strides, image, head)[key] * LOG2_E;
    gated[threadIdx.x] = exists ? weight : NOTHING;
    plain[threadIdx.x] = exists ? 0.f : NOTHING;
  }
  CAMKIT_DEVICE const float* of_row(const Params& p, int row) const {
    return row < p.gated_rows ? gated : plain;
  }
};

// Negated normaliser in base 2. A row that attends to nothing gets 0: its logits are all -inf.
CAMKIT_DEVICE float level_of(float lse) { return lse == NOTHING ? 0.f : -lse * LOG2_E; }

}  // namespace camkit
