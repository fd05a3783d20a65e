// Parameters of a launch: numbers and pointers without torch, shared by kernels and binding.
#pragma once
#include <stdint.h>

namespace camkit {

enum Type { HALF, BFLOAT16, FLOAT };

// In elements. The last axis, the channels of a head, is dense; rows begin at 16-byte borders.
struct Strides {
  int64_t image, head, token;
};

struct Params {
  // the host's attention: A = exp(scale * q k^T + log_weights - lse), per image and head
  const void *q, *k;         // [image][head][token][width]
  const float* log_weights;  // [image][head][key], natural logarithms; null: none
  const float* lse;          // [image][head][query], natural logarithm of the sum A is divided by
  Strides q_strides, k_strides;
  Strides weight_strides;  // the token's is 1
  int images, heads, queries, keys, width, type;
  int gated_rows;  // log_weights are added to the logits of the first queries only
  float scale;
  // rows and columns of the first tokens
  float* rows;     // [image][head][row][key]
  float* columns;  // [image][head][query][column]
  int row_count, column_count;
  // affinity [image][query - skip][key - skip] = beta * affinity + alpha * A averaged over heads
  float* map;
  int skip;
  float alpha, beta;
  // propagation: out [image][class][query - skip] from cam [image][class][key - skip]
  const float* cam;
  float *partial, *out;  // partial [part][image][class][query - skip]; summed in this order
  int classes, parts;
};

constexpr int NOT_BUILT = -1;  // this width or type was left out when the library was compiled

}  // namespace camkit

// Each returns 0, NOT_BUILT or the cudaError_t of the launch.
extern "C" {
int camkit_rows_and_columns(const camkit::Params*, void* stream);
int camkit_affinity(const camkit::Params*, void* stream);
int camkit_propagate(const camkit::Params*, void* stream);
int camkit_propagate_parts(const camkit::Params*);  // how many parts `partial` must have
const char* camkit_error(int code);
}
