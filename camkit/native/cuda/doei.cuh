// DOEI's scores: one block computes one row, from attention to amplified scores.
#pragma once
#include "device.cuh"
#include "doei.h"

namespace camkit {

constexpr int ROW_THREADS = 128;

enum Fold { SUM, LEAST, MOST };

CAMKIT_DEVICE float fold(Fold how, float x, float y) {
  return how == SUM ? x + y : (how == LEAST) == (x < y) ? x : y;
}

// Fold the values of all threads; all get the result. `room` holds a float per warp.
CAMKIT_DEVICE float fold_block(Fold how, float x, float* room) {
  for (int mask = 16; mask; mask /= 2) x = fold(how, x, from_partner(x, mask));
  __syncthreads();  // a thread may still read the previous result
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  float all = room[0];
  for (int warp = 1; warp < ROW_THREADS / 32; ++warp) all = fold(how, all, room[warp]);
  return all;
}

CAMKIT_DEVICE float head_mean_of(const float* at, int64_t head, int heads) {
  float sum = 0.f;
  for (int a = 0; a < heads; ++a) sum += at[a * head];
  return sum / float(heads);
}

CAMKIT_DEVICE float joined(float mine, const float* cue, int64_t at, float share) {
  return cue ? mine + share * (cue[at] - mine) : mine;
}

// How much class `i` attends to class `j`.
CAMKIT_DEVICE float among_classes(const Scores& p, int image, int i, int j) {
  const float* at = p.rows + image * p.row_image + i * p.row_class + j;
  const int64_t cue = (int64_t(image) * p.classes + i) * p.classes + j;
  return joined(head_mean_of(at, p.row_head, p.heads), p.cue_classes, cue, p.share);
}

CAMKIT_DEVICE float between(const Scores& p, int image, int patch, int j) {
  const float* row = p.rows + image * p.row_image + j * p.row_class + p.skip + patch;
  const float* column =
      p.columns + image * p.column_image + int64_t(p.skip + patch) * p.column_token + j;
  const int64_t row_cue = (int64_t(image) * p.classes + j) * p.patches + patch;
  const int64_t column_cue = (int64_t(image) * p.patches + patch) * p.classes + j;
  return joined(head_mean_of(column, p.column_head, p.heads), p.cue_columns, column_cue, p.share) +
         joined(head_mean_of(row, p.row_head, p.heads), p.cue_rows, row_cue, p.share);
}

CAMKIT_DEVICE float kept(const Scores& p, int image, int j) {
  return p.present ? p.present[int64_t(image) * p.classes + j] : 1.f;
}

// Rows of one image: first among classes, then classes over patches or patches over classes.
CAMKIT_GLOBAL(ROW_THREADS) doei_scores(const Scores p) {
  CAMKIT_SHARED(memory);
  float* room = reinterpret_cast<float*>(memory);
  const int image = blockIdx.y, first = blockIdx.x, thread = threadIdx.x;
  const bool mutual = first < p.classes;
  const int row = mutual ? first : first - p.classes;
  const bool over_patches = !mutual && !p.across;
  const int length = over_patches ? p.patches : p.classes;
  const Soft soft = mutual ? p.among : p.between;
  // where element e of the row is written: offset + e * stride
  const int64_t size = mutual ? p.classes : p.patches, stride = over_patches ? p.classes : 1;
  const int64_t offset = image * size * p.classes + (over_patches ? row : int64_t(row) * p.classes);
  float* out = (mutual ? p.mutual : p.weights) + offset;
  float* gains = (mutual ? p.mutual_gain : p.weight_gain) + offset;

  float least = INFINITY, most = -INFINITY;
  for (int e = thread; e < length; e += ROW_THREADS) {
    float x;
    if (mutual)
      x = (among_classes(p, image, row, e) + among_classes(p, image, e, row)) *
          kept(p, image, row) * kept(p, image, e);
    else if (over_patches)
      x = between(p, image, e, row) * kept(p, image, row);
    else
      x = between(p, image, row, e) * kept(p, image, e);
    out[e * stride] = x;  // read again by the same thread
    least = fold(LEAST, least, x);
    most = fold(MOST, most, x);
  }
  least = fold_block(LEAST, least, room);
  const float span = fold_block(MOST, most, room) - least;
  const bool flat = span == 0.f;
  const float unit = flat ? 1.f : span;

  float sum = 0.f;
  for (int e = thread; e < length; e += ROW_THREADS) sum += (out[e * stride] - least) / unit;
  const float mean = fold_block(SUM, sum, room) / float(length);
  sum = 0.f;
  for (int e = thread; e < length; e += ROW_THREADS) {
    const float distance = (out[e * stride] - least) / unit - mean;
    sum += distance * distance;
  }
  const float found = sqrtf(fold_block(SUM, sum, room) / float(length));
  const float spread = found == 0.f ? 1.f : found;

  float before = 0.f, after = 0.f;
  for (int e = thread; e < length; e += ROW_THREADS) {
    const float x = out[e * stride], place = ((x - least) / unit - mean) / spread;
    const float sure = flat ? 0.f : tanhf((place - soft.shift) / soft.temperature);
    const float gain = 1.f + soft.strength * sure;
    gains[e * stride] = gain;
    before += x;
    after += x * gain;
  }
  before = fold_block(SUM, before, room);
  after = fold_block(SUM, after, room);
  const float scale = soft.strength == 0.f || after == 0.f ? 1.f : before / after;
  for (int e = thread; e < length; e += ROW_THREADS) {
    gains[e * stride] *= scale;
    out[e * stride] *= gains[e * stride];
  }
}

}  // namespace camkit
