// camkit::doei_scores(Tensor rows, Tensor columns, Tensor? cue_classes, Tensor? cue_rows,
//   Tensor? cue_columns, Tensor? present, int skip, float share, float class_strength,
//   float class_shift, float class_temperature, float patch_strength, float patch_shift,
//   float patch_temperature, bool across_classes)
//   -> (Tensor mutual, Tensor weights, Tensor mutual_gain, Tensor weight_gain)
#pragma once
#include "binding.h"
#include "doei.h"

namespace camkit {

// In float32 with a dense last axis; other axes as they come.
inline Tensor dense_floats(const Tensor& x) {
  const Tensor wide = x.scalar_type() == FLOAT_32 ? x : torch::stable::to(x, FLOAT_32);
  return wide.stride(wide.dim() - 1) == 1 ? wide : torch::stable::contiguous(wide);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> doei_scores_of(
    Tensor rows, Tensor columns, MaybeTensor cue_classes, MaybeTensor cue_rows,
    MaybeTensor cue_columns, MaybeTensor present, int64_t skip, double share,
    double class_strength, double class_shift, double class_temperature, double patch_strength,
    double patch_shift, double patch_temperature, bool across_classes) {
  const Place place(rows);
  std::vector<Tensor> held;
  using Sizes = std::vector<int64_t>;
  const auto hold = [&](const Tensor& x, bool whole, const Sizes& sizes, const char* name) {
    check_beside(x, rows, name);
    bool good = x.dim() == int64_t(sizes.size());
    for (int64_t axis = 0; good && axis < x.dim(); ++axis) good = x.size(axis) == sizes[axis];
    STD_TORCH_CHECK(good, "camkit: ", name, " does not fit rows");
    const Tensor floats = dense_floats(x);
    held.push_back(whole ? torch::stable::contiguous(floats) : floats);
    return static_cast<const float*>(held.back().const_data_ptr());
  };
  STD_TORCH_CHECK(rows.dim() == 4, "camkit: rows must be (b, a, c, t)");
  const int64_t images = rows.size(0), heads = rows.size(1), classes = rows.size(2);
  const int64_t tokens = rows.size(3), patches = tokens - skip;
  STD_TORCH_CHECK(classes <= skip && skip <= tokens, "camkit: skip must be ", classes, " to ",
                  tokens);
  Scores p{};
  p.rows = hold(rows, false, {images, heads, classes, tokens}, "rows");
  const Tensor from = held.back();
  p.columns = hold(columns, false, {images, heads, tokens, classes}, "columns");
  const Tensor to = held.back();
  p.row_image = from.stride(0), p.row_head = from.stride(1), p.row_class = from.stride(2);
  p.column_image = to.stride(0), p.column_head = to.stride(1), p.column_token = to.stride(2);
  if (cue_classes.has_value() && cue_rows.has_value() && cue_columns.has_value()) {
    p.cue_classes = hold(*cue_classes, true, {images, classes, classes}, "cue_classes");
    p.cue_rows = hold(*cue_rows, true, {images, classes, patches}, "cue_rows");
    p.cue_columns = hold(*cue_columns, true, {images, patches, classes}, "cue_columns");
  }
  if (present.has_value()) p.present = hold(*present, true, {images, classes}, "present");
  p.images = int(images);
  p.heads = int(heads);
  p.classes = int(classes);
  p.patches = int(patches);
  p.skip = int(skip);
  p.across = across_classes;
  p.share = float(share);
  p.among = {float(class_strength), float(class_shift), float(class_temperature)};
  p.between = {float(patch_strength), float(patch_shift), float(patch_temperature)};
  const auto make = [&](int64_t size) {
    return torch::stable::new_empty(from, {p.images, size, p.classes}, FLOAT_32);
  };
  Tensor mutual = make(p.classes), weights = make(p.patches);
  Tensor mutual_gain = make(p.classes), weight_gain = make(p.patches);
  p.mutual = floats(mutual), p.weights = floats(weights);
  p.mutual_gain = floats(mutual_gain), p.weight_gain = floats(weight_gain);
  if (p.images && p.classes) check(camkit_doei_scores(&p, place.stream()));
  return {mutual, weights, mutual_gain, weight_gain};
}

}  // namespace camkit

STABLE_TORCH_LIBRARY_IMPL(CAMKIT_NAMESPACE, CAMKIT_KEY, library) {
  library.impl("doei_scores", TORCH_BOX(&camkit::doei_scores_of));
}
