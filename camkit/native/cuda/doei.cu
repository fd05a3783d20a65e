// The launch of DOEI's scores.
#include "doei.cuh"

int camkit_doei_scores(const camkit::Scores* p, void* stream) {
  using namespace camkit;
  const dim3 blocks(p->classes + (p->across ? p->patches : p->classes), p->images);
  const int bytes = ROW_THREADS / 32 * sizeof(float);
  return launch(doei_scores, blocks, ROW_THREADS, bytes, stream, *p);
}
