// Registers the kernels of the operators camkit/ops declares, through torch's stable ABI.
//
// camkit::reweighted_attention(Tensor q, Tensor k, Tensor v, Tensor? log_weights, float scale,
//   int gated_rows, int class_rows) -> (Tensor out, Tensor lse, Tensor rows)
// camkit::reweighted_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_rows,
//   Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rows, Tensor? log_weights,
//   float scale, int gated_rows, bool to_weights)
//   -> (Tensor to_q, Tensor to_k, Tensor to_v, Tensor to_log_weights)
// camkit::class_columns(Tensor q, Tensor k, Tensor lse, Tensor? log_weights, float scale,
//   int gated_rows, int columns) -> Tensor
// camkit::affinity_mean(Tensor q, Tensor k, Tensor lse, Tensor? log_weights, float scale,
//   int gated_rows, int skip) -> Tensor
// camkit::affinity_mean_(Tensor(a!) affinity, Tensor q, Tensor k, Tensor lse, Tensor? log_weights,
//   float scale, int gated_rows, int skip, float alpha, float beta) -> ()
// camkit::propagate_mean(Tensor q, Tensor k, Tensor lse, Tensor cam, Tensor? log_weights,
//   float scale, int gated_rows, int skip) -> Tensor
#include "binding.h"

#ifndef CAMKIT_NAMESPACE
#define CAMKIT_NAMESPACE camkit
#define CAMKIT_KEY CUDA
#endif

#include "doei_binding.h"

namespace camkit {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor> reweighted_attention(Tensor q, Tensor k, Tensor v,
                                                        MaybeTensor log_weights, double scale,
                                                        int64_t gated_rows, int64_t class_rows) {
  const Place place(q);
  Call call(q, k, log_weights, scale, gated_rows);
  Params& p = call.p;
  p.v = call.keep_heads(v, p.keys, p.v_strides, "v");
  call.limit(class_rows, p.queries, "class_rows");
  call.limit(class_rows * p.keys, INT32_MAX, "class_rows times keys");
  p.class_rows = int(class_rows);
  // stored token by token, heads side by side: the projection that follows needs no copy
  Tensor stored = new_empty(q, {p.images, p.queries, p.heads, p.width});
  Tensor out = torch::stable::transpose(stored, 1, 2);
  Tensor lse = new_empty(q, {p.images, p.heads, p.queries}, FLOAT_32);
  Tensor rows = new_empty(q, {p.images, p.heads, class_rows, p.keys}, FLOAT_32);
  p.out = out.mutable_data_ptr();
  p.out_strides = strides_of(out);
  p.lse = floats(lse);
  p.rows = floats(rows);
  if (!call.empty()) check(camkit_attention(&p, place.stream()));
  return {out, lse, rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reweighted_attention_backward(
    MaybeTensor grad_out, MaybeTensor grad_lse, MaybeTensor grad_rows, Tensor q, Tensor k, Tensor v,
    Tensor out, Tensor lse, Tensor rows, MaybeTensor log_weights, double scale, int64_t gated_rows,
    bool to_weights) {
  const Place place(q);
  Call call(q, k, log_weights, scale, gated_rows);
  Params& p = call.p;
  call.know(lse);
  const int64_t class_rows = rows.size(2);
  call.limit(class_rows * p.keys, INT32_MAX, "class_rows times keys");
  p.class_rows = int(class_rows);
  p.v = call.keep_heads(v, p.keys, p.v_strides, "v");
  p.out = const_cast<void*>(call.keep_heads(out, p.queries, p.out_strides, "out"));
  if (!grad_out.has_value()) {
    Tensor none = new_empty(q, {p.images, p.heads, p.queries, p.width});
    grad_out = torch::stable::zero_(none);
  }
  p.grad_out = call.keep_heads(*grad_out, p.queries, p.grad_strides, "grad_out");
  if (grad_lse.has_value())
    p.grad_lse = call.keep_float(*grad_lse, {p.images, p.heads, p.queries}, "grad_lse");
  if (grad_rows.has_value()) {
    const auto sizes = {int64_t(p.images), int64_t(p.heads), class_rows, int64_t(p.keys)};
    p.grad_rows = call.keep_float(*grad_rows, sizes, "grad_rows");
    p.rows = const_cast<float*>(call.keep_float(rows, sizes, "rows"));
  }
  const Tensor delta = new_empty(q, {p.images, p.heads, p.queries}, FLOAT_32);
  Tensor to_q = new_empty(q, {p.images, p.heads, p.queries, p.width});
  Tensor to_k = new_empty(q, {p.images, p.heads, p.keys, p.width});
  Tensor to_v = new_empty(q, {p.images, p.heads, p.keys, p.width});
  const bool weighted = to_weights && log_weights.has_value();
  Tensor to_log_weights = new_empty(q, {0});
  if (weighted) {
    to_log_weights = new_empty(q, {p.images, p.heads, p.keys}, FLOAT_32);
    p.to_log_weights = floats(to_log_weights);
  }
  p.delta = floats(delta);
  p.to_q = to_q.mutable_data_ptr();
  p.to_k = to_k.mutable_data_ptr();
  p.to_v = to_v.mutable_data_ptr();
  if (!call.empty()) check(camkit_attention_backward(&p, place.stream()));
  if (weighted && log_weights->dim() == 2)
    to_log_weights = torch::stable::sum(to_log_weights, std::vector<int64_t>{1});
  return {to_q, to_k, to_v, to_log_weights};
}

Tensor class_columns(Tensor q, Tensor k, Tensor lse, MaybeTensor log_weights, double scale,
                     int64_t gated_rows, int64_t columns) {
  const Place place(q);
  Call call(q, k, log_weights, scale, gated_rows);
  Params& p = call.p;
  call.know(lse);
  call.limit(columns, p.keys, "columns");
  p.columns = int(columns);
  Tensor found = new_empty(q, {p.images, p.heads, p.queries, columns}, FLOAT_32);
  p.map = floats(found);
  if (!call.empty() && columns) check(camkit_columns(&p, place.stream()));
  return found;
}

void affinity_mean_(Tensor affinity, Tensor q, Tensor k, Tensor lse, MaybeTensor log_weights,
                    double scale, int64_t gated_rows, int64_t skip, double alpha, double beta) {
  const Place place(q);
  Call call(q, k, log_weights, scale, gated_rows);
  Params& p = call.p;
  call.know(lse);
  call.limit(skip, p.queries < p.keys ? p.queries : p.keys, "skip");
  p.skip = int(skip);
  p.alpha = float(alpha);
  p.beta = float(beta);
  STD_TORCH_CHECK(affinity.is_contiguous(), "camkit: affinity must be contiguous");
  call.keep_float(affinity, {p.images, p.queries - skip, p.keys - skip}, "affinity");
  p.map = floats(affinity);
  if (!call.empty() && affinity.numel()) check(camkit_affinity(&p, place.stream()));
}

Tensor affinity_mean(Tensor q, Tensor k, Tensor lse, MaybeTensor log_weights, double scale,
                     int64_t gated_rows, int64_t skip) {
  Tensor found = new_empty(q, {q.size(0), q.size(2) - skip, k.size(2) - skip}, FLOAT_32);
  affinity_mean_(found, q, k, lse, log_weights, scale, gated_rows, skip, 1.0, 0.0);
  return found;
}

Tensor propagate_mean(Tensor q, Tensor k, Tensor lse, Tensor cam, MaybeTensor log_weights,
                      double scale, int64_t gated_rows, int64_t skip) {
  const Place place(q);
  Call call(q, k, log_weights, scale, gated_rows);
  Params& p = call.p;
  call.know(lse);
  call.limit(skip, p.queries < p.keys ? p.queries : p.keys, "skip");
  p.skip = int(skip);
  p.classes = int(cam.size(1));
  const auto dtype = cam.scalar_type();
  if (dtype != FLOAT_32) cam = torch::stable::to(cam, FLOAT_32);
  p.cam = call.keep_float(cam, {p.images, p.classes, p.keys - skip}, "cam");
  Tensor found = new_empty(q, {p.images, p.classes, p.queries - skip}, FLOAT_32);
  if (call.empty() || found.numel() == 0 || p.keys == skip) {
    torch::stable::zero_(found);
  } else {
    p.parts = camkit_propagate_parts(&p);
    Tensor partial = new_empty(q, {p.parts, p.images, p.classes, p.queries - skip}, FLOAT_32);
    p.partial = floats(partial);
    p.out = floats(found);
    check(camkit_propagate(&p, place.stream()));
  }
  return dtype == FLOAT_32 ? found : torch::stable::to(found, dtype);
}

}  // namespace
}  // namespace camkit

STABLE_TORCH_LIBRARY_IMPL(CAMKIT_NAMESPACE, CAMKIT_KEY, library) {
  library.impl("reweighted_attention", TORCH_BOX(&camkit::reweighted_attention));
  library.impl("reweighted_attention_backward", TORCH_BOX(&camkit::reweighted_attention_backward));
  library.impl("class_columns", TORCH_BOX(&camkit::class_columns));
  library.impl("affinity_mean", TORCH_BOX(&camkit::affinity_mean));
  library.impl("affinity_mean_", TORCH_BOX(&camkit::affinity_mean_));
  library.impl("propagate_mean", TORCH_BOX(&camkit::propagate_mean));
}
