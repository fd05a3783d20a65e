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
  // the host's attention: A = softmax over keys of scale * q k^T + log_weights, per image and head
  const void *q, *k, *v;     // [image][head][token][width]
  const float* log_weights;  // [image][head][key], natural logarithms; null: none
  void* out;                 // A v, as q
  float* lse;                // [image][head][query], natural logarithm of the sum A was divided by
  float* rows;               // [image][head][class_rows][key]: A of the first queries
  Strides q_strides, k_strides, v_strides, out_strides;
  Strides weight_strides;  // the token's is 1
  int images, heads, queries, keys, width, type;
  int gated_rows;  // log_weights are added to the logits of the first queries only
  int class_rows;
  float scale;
  // maps: columns [image][head][query][columns]; affinity [image][query - skip][key - skip]
  float* map;
  int columns, skip;
  float alpha, beta;  // affinity = beta * affinity + alpha * A averaged over heads
  // propagation: out [image][class][query - skip] from cam [image][class][key - skip]
  const float* cam;
  float* partial;  // [part][image][class][query - skip]; summed in this order
  int classes, parts;
  // backward
  const void* grad_out;
  const float *grad_rows, *grad_lse;   // as rows and lse; may be null
  float* delta;                        // [image][head][query]
  void *to_q, *to_k, *to_v;            // dense [image][head][token][width]
  float* to_log_weights;               // [image][head][key]; null: not wanted
  Strides grad_strides;
};

constexpr int NOT_BUILT = -1;  // this width or type was left out when the library was compiled

}  // namespace camkit

// Each returns 0, NOT_BUILT or the cudaError_t of the launch.
extern "C" {
int camkit_attention(const camkit::Params*, void* stream);
int camkit_attention_backward(const camkit::Params*, void* stream);
int camkit_columns(const camkit::Params*, void* stream);
int camkit_affinity(const camkit::Params*, void* stream);
int camkit_propagate(const camkit::Params*, void* stream);
int camkit_propagate_parts(const camkit::Params*);  // how many parts `partial` must have
const char* camkit_error(int code);
}
