// Parameters of the kernel of DOEI's scores, which camkit/ops/doei_tail.py specifies.
#pragma once
#include <stdint.h>

namespace camkit {

struct Soft { float strength, shift, temperature; };

struct Scores {
  // attention of class tokens, [image][head][class][token], and to them, [image][head][token][class]
  const float *rows, *columns;
  int64_t row_image, row_head, row_class, column_image, column_head, column_token;
  // dense; null: no cues, no labels
  const float *cue_classes, *cue_rows, *cue_columns;  // [class][class], [class][patch], [patch][class]
  const float* present;                               // [image][class]
  float *mutual, *weights, *mutual_gain, *weight_gain;  // [image][class][class], [image][patch][class]
  int images, heads, classes, patches, skip;
  int across;  // a row is a patch over classes, not a class over patches
  float share;
  Soft among, between;
};

}  // namespace camkit

extern "C" int camkit_doei_scores(const camkit::Scores*, void* stream);
