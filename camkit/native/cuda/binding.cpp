// Registers the kernels of the operators camkit/ops declares, through torch's stable ABI.
//
// camkit::rows_and_columns(Tensor q, Tensor k, Tensor lse, Tensor? log_weights, float scale,
//   int gated_rows, int rows, int columns) -> (Tensor rows, Tensor columns)
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

std::tuple<Tensor, Tensor> rows_and_columns(Tensor q, Tensor k, Tensor lse,
                                            MaybeTensor log_weights, double scale,
                                            int64_t gated_rows, int64_t rows, int64_t columns) {
  const Place place(q);
  Call call(q, k, lse, log_weights, scale, gated_rows);
  Params& p = call.p;
  STD_TORCH_CHECK(p.width * q.element_size() % 16 == 0, "camkit: heads must be rows of 16 bytes");
  call.limit(rows, p.queries, "rows");
  call.limit(columns, p.keys, "columns");
  p.row_count = int(rows);
  p.column_count = int(columns);
  Tensor of_rows = new_empty(q, {p.images, p.heads, rows, p.keys}, FLOAT_32);
  Tensor of_columns = new_empty(q, {p.images, p.heads, p.queries, columns}, FLOAT_32);
  p.rows = floats(of_rows);
  p.columns = floats(of_columns);
  if (!call.empty() && rows + columns) check(camkit_rows_and_columns(&p, place.stream()));
  return {of_rows, of_columns};
}

void affinity_mean_(Tensor affinity, Tensor q, Tensor k, Tensor lse, MaybeTensor log_weights,
                    double scale, int64_t gated_rows, int64_t skip, double alpha, double beta) {
  const Place place(q);
  Call call(q, k, lse, log_weights, scale, gated_rows);
  Params& p = call.p;
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
  Call call(q, k, lse, log_weights, scale, gated_rows);
  Params& p = call.p;
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
  library.impl("rows_and_columns", TORCH_BOX(&camkit::rows_and_columns));
  library.impl("affinity_mean", TORCH_BOX(&camkit::affinity_mean));
  library.impl("affinity_mean_", TORCH_BOX(&camkit::affinity_mean_));
  library.impl("propagate_mean", TORCH_BOX(&camkit::propagate_mean));
}
