// Mean-field inference in a fully connected CRF with a Gaussian and a bilateral kernel.
//
// Kraehenbuehl and Koltun 2011, with filters on the permutohedral lattice. The same steps in plain
// torch are in camkit/ops/mean_field.py and camkit/ops/permutohedral.py. Reasons for its speed:
//
// * pixels in one simplex share its corners, so a hash table finds simplices first, and only new
//   simplices look up their vertices, which then know each other as neighbours;
// * neighbours that share no occupied simplex need a search, of which a small filter spares most;
// * the vertices along one axis of the lattice form chains, and a chain is blurred in place;
//   a vertex without neighbours along an axis does not change and is left out;
// * the kernels are linear and probabilities sum to one, so the last label needs no channel;
// * slicing, softmax and splatting are one pass, and probabilities are not stored between steps;
// * loops over many vertices have no branches on their data, and memory is prefetched;
// * the lattice of the Gaussian kernel depends only on the size of the image, and is cached.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "permutohedral.hpp"

namespace {

using namespace camkit;

constexpr float LEAST_LOG = -40.f;  // smaller odds count as zero; they would become denormals
constexpr size_t CACHED_LATTICES = 8;
constexpr size_t CACHED_BYTES = size_t(48) << 20;

struct Problem {
  const float* log_scores;  // [image][label][row][col]
  const uint8_t* rgb;       // [image][row][col][3]
  float* out;               // as log_scores
  int64_t images, labels, rows, cols;
  float gauss_sxy, gauss_weight, bilateral_sxy, bilateral_srgb, bilateral_weight;
  int steps;
};

Lattice build_gauss(int64_t rows, int64_t cols, float sxy) {
  const float largest[2] = {(cols - 1) / sxy, (rows - 1) / sxy};
  return build<2>(rows * cols, largest, [=](int64_t block, float(&feature)[2][BLOCK]) {
    for (int p = 0; p < BLOCK; ++p) {
      const int64_t at = std::min(block * BLOCK + p, rows * cols - 1);
      feature[0][p] = float(at % cols) / sxy;
      feature[1][p] = float(at / cols) / sxy;
    }
  });
}

Lattice build_bilateral(const Problem& problem, const uint8_t* rgb) {
  const int64_t cols = problem.cols, pixels = problem.rows * cols;
  const float sxy = problem.bilateral_sxy, srgb = problem.bilateral_srgb;
  const float largest[5] = {(cols - 1) / sxy, (problem.rows - 1) / sxy, 255 / srgb, 255 / srgb,
                            255 / srgb};
  return build<5>(pixels, largest, [=](int64_t block, float(&feature)[5][BLOCK]) {
    for (int p = 0; p < BLOCK; ++p) {
      const int64_t at = std::min(block * BLOCK + p, pixels - 1);
      feature[0][p] = float(at % cols) / sxy;
      feature[1][p] = float(at / cols) / sxy;
      for (int c = 0; c < 3; ++c) feature[2 + c][p] = float(rgb[at * 3 + c]) / srgb;
    }
  });
}

// Cache of lattices of the Gaussian kernel, the most recently used first.
class LatticeCache {
 public:
  std::shared_ptr<const Lattice> get(int64_t rows, int64_t cols, float sxy) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry)
        if (entry->rows == rows && entry->cols == cols && entry->sxy == sxy) {
          entries_.splice(entries_.begin(), entries_, entry);
          return entry->lattice;
        }
    }
    // Built outside the lock: two threads may build the same lattice, but none has to wait.
    auto lattice = std::make_shared<const Lattice>(build_gauss(rows, cols, sxy));
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_front({rows, cols, sxy, lattice});
    size_t count = 0, bytes = 0;
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      bytes += entry->lattice->bytes();
      entry = ++count > CACHED_LATTICES || bytes > CACHED_BYTES ? entries_.erase(entry) : ++entry;
    }
    return lattice;
  }

 private:
  struct Entry {
    int64_t rows, cols;
    float sxy;
    std::shared_ptr<const Lattice> lattice;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
};

LatticeCache& lattice_cache() {
  static LatticeCache* const cache = new LatticeCache;  // not deleted: threads may outlive static objects
  return *cache;
}

// e^x for x <= 0, to one unit in the last place; zero below LEAST_LOG.
inline float exponential(float x) {
  constexpr float magic = 12582912.f;
  const float clipped = x > LEAST_LOG ? x : LEAST_LOG;
  const float n = (clipped * 1.44269504f + magic) - magic;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x > LEAST_LOG ? y * scale : 0.f;
}

// All steps for one image; rows hold R vectors of W floats, or many of them if `Parts`.
template <int W, int R, bool Parts = false>
class Inference {
 public:
  Inference(const Problem& problem, const float* log_scores, const Lattice& gauss,
            const Lattice& bilateral, float* out)
      : problem_(problem),
        log_scores_(log_scores),
        gauss_(gauss),
        bilateral_(bilateral),
        out_(out),
        pixels_(problem.rows * problem.cols),
        channels_(int(problem.labels) - 1),
        parts_(Parts ? (channels_ + W * R - 1) / (W * R) : 1),
        gauss_values_((gauss.vertices + 2) * stride()),
        gauss_next_((gauss.vertices + 2) * stride()),
        bilateral_values_((bilateral.vertices + 2) * stride()),
        bilateral_next_((bilateral.vertices + 2) * stride()),
        rows_(BLOCK * stride()),
        planes_(std::max(problem.labels, stride() * W) * BLOCK) {}

  void run() {
    for (int64_t b = 0; b < gauss_.blocks; ++b) {
      start(b);
      soften();
      splat(b);
    }
    for (int step = 1; step < problem_.steps; ++step) {
      blur();
      for (int64_t b = 0; b < gauss_.blocks; ++b) {
        slice(b);
        soften();
        splat(b);
      }
    }
    blur();
    for (int64_t b = 0; b < gauss_.blocks; ++b) {
      slice(b);
      finish(b);
    }
  }

 private:
  using Row = Rows<W, R>;
  using Vec = typename Row::Vec;
  int64_t stride() const { return Parts ? parts_ * R : R; }
  float* plane(int64_t channel) { return &planes_[channel * BLOCK]; }
  int count(int64_t b) const { return int(std::min<int64_t>(BLOCK, pixels_ - b * BLOCK)); }

  // Log odds of each label over the last, without a message. What stays the same over the steps,
  // these and the response to ones, is kept in the output until the last step.
  void start(int64_t b) {
    const float* const last = log_scores_ + channels_ * pixels_ + b * BLOCK;
    for (int c = 0; c < channels_; ++c) {
      const float* const given = log_scores_ + c * pixels_ + b * BLOCK;
      float* const kept = out_ + c * pixels_ + b * BLOCK;
      for (int p = 0; p < count(b); ++p) {
        plane(c)[p] = given[p] - last[p];
        kept[p] = plane(c)[p] - (problem_.gauss_weight * gauss_.total[b * BLOCK + p] +
                                 problem_.bilateral_weight * bilateral_.total[b * BLOCK + p]);
      }
    }
  }

  // Log odds with the messages of all pixels.
  void slice(int64_t b) {
    prefetch(b + 1);
    for (int64_t part = 0; part < stride(); part += R)
      for (int p = 0; p < BLOCK; ++p) {
        Vec near[R] = {}, alike[R] = {};
        Row::template gather<3>(gauss_, b, p, gauss_values_.data() + part, stride(), near);
        Row::template gather<6>(bilateral_, b, p, bilateral_values_.data() + part, stride(), alike);
        for (int i = 0; i < R; ++i)
          rows_[p * stride() + part + i] =
              problem_.gauss_weight * near[i] + problem_.bilateral_weight * alike[i];
      }
    unpack();
    alignas(64) float sum[BLOCK];
    std::memcpy(sum, plane(0), sizeof sum);
    for (int c = 1; c < channels_; ++c)
      for (int p = 0; p < BLOCK; ++p) sum[p] += plane(c)[p];
    for (int c = 0; c < channels_; ++c) {
      const float* const kept = out_ + c * pixels_ + b * BLOCK;
      float* const odds = plane(c);
      if (count(b) == BLOCK)
        for (int p = 0; p < BLOCK; ++p) odds[p] += kept[p] + sum[p];
      else
        for (int p = 0; p < count(b); ++p) odds[p] += kept[p] + sum[p];
    }
  }

  // Starts to load what is read in order, before it is used.
  void prefetch(int64_t b) const {
    if (b == gauss_.blocks) return;
    gauss_.prefetch(b, 3);
    bilateral_.prefetch(b, 6);
    for (int c = 0; c < channels_; ++c)
      for (int p = 0; p < BLOCK; p += 16) __builtin_prefetch(out_ + c * pixels_ + b * BLOCK + p);
  }

  // Turns log odds into the probabilities of all labels.
  void soften() {
    alignas(64) float top[BLOCK], total[BLOCK];
    for (int p = 0; p < BLOCK; ++p) top[p] = std::max(0.f, plane(0)[p]);
    for (int c = 1; c < channels_; ++c)
      for (int p = 0; p < BLOCK; ++p) top[p] = std::max(top[p], plane(c)[p]);
    for (int p = 0; p < BLOCK; ++p) total[p] = rest_[p] = exponential(-top[p]);
    for (int c = 0; c < channels_; ++c) {
      float* const likely = plane(c);
      for (int p = 0; p < BLOCK; ++p) likely[p] = exponential(likely[p] - top[p]);
      for (int p = 0; p < BLOCK; ++p) total[p] += likely[p];
    }
    for (int p = 0; p < BLOCK; ++p) total[p] = 1.f / total[p];
    for (int c = 0; c < channels_; ++c)
      for (int p = 0; p < BLOCK; ++p) plane(c)[p] *= total[p];
    for (int p = 0; p < BLOCK; ++p) rest_[p] *= total[p];
  }

  void splat(int64_t b) {
    pack();
    for (int64_t part = 0; part < stride(); part += R)
      for (int p = 0; p < BLOCK; ++p) {
        Vec own[R];
        for (int i = 0; i < R; ++i) own[i] = rows_[p * stride() + part + i];
        Row::template scatter<3>(gauss_, b, p, gauss_next_.data() + part, stride(), own);
        Row::template scatter<6>(bilateral_, b, p, bilateral_next_.data() + part, stride(), own);
      }
  }

  void blur() {
    gauss_values_.swap(gauss_next_);
    bilateral_values_.swap(bilateral_next_);
    gauss_next_.clear();
    bilateral_next_.clear();
    for (int64_t part = 0; part < stride(); part += R) {
      Row::blur(gauss_, gauss_values_.data() + part, stride());
      Row::blur(bilateral_, bilateral_values_.data() + part, stride());
    }
  }

  void finish(int64_t b) {
    soften();
    for (int c = 0; c < channels_; ++c)
      std::memcpy(out_ + c * pixels_ + b * BLOCK, plane(c), count(b) * sizeof(float));
    std::memcpy(out_ + channels_ * pixels_ + b * BLOCK, rest_, count(b) * sizeof(float));
  }

  // From rows to planes and back; channels that only fill a row stay zero.
  void unpack() {
    const float* const from = reinterpret_cast<const float*>(rows_.data());
    if constexpr (R == 1 && !Parts) {  // a fixed number of channels, which compilers vectorise
      for (int p = 0; p < BLOCK; ++p)
        for (int c = 0; c < W; ++c) planes_[c * BLOCK + p] = from[p * W + c];
    } else {
      for (int c = 0; c < channels_; ++c)
        for (int p = 0; p < BLOCK; ++p) plane(c)[p] = from[p * stride() * W + c];
    }
  }

  void pack() {
    float* const to = reinterpret_cast<float*>(rows_.data());
    if constexpr (R == 1 && !Parts) {
      for (int p = 0; p < BLOCK; ++p)
        for (int c = 0; c < W; ++c) to[p * W + c] = planes_[c * BLOCK + p];
    } else {
      for (int c = 0; c < channels_; ++c)
        for (int p = 0; p < BLOCK; ++p) to[p * stride() * W + c] = plane(c)[p];
    }
  }

  const Problem& problem_;
  const float* const log_scores_;
  const Lattice& gauss_;
  const Lattice& bilateral_;
  float* const out_;
  const int64_t pixels_;
  const int channels_;
  const int64_t parts_;
  Zeros<Vec> gauss_values_, gauss_next_, bilateral_values_, bilateral_next_;
  Zeros<Vec> rows_;      // [pixel of the block][channel]
  Zeros<float> planes_;  // [channel][pixel of the block]
  alignas(64) float rest_[BLOCK];
};

template <int W, int R, bool Parts = false>
void infer(const Problem& problem, const float* log_scores, const Lattice& gauss,
           const Lattice& bilateral, float* out) {
  Inference<W, R, Parts>(problem, log_scores, gauss, bilateral, out).run();
}

void infer_image(const Problem& problem, int64_t image) {
  const int64_t pixels = problem.rows * problem.cols;
  const float* log_scores = problem.log_scores + image * problem.labels * pixels;
  float* out = problem.out + image * problem.labels * pixels;
  const auto gauss = lattice_cache().get(problem.rows, problem.cols, problem.gauss_sxy);
  const Lattice bilateral = build_bilateral(problem, problem.rgb + image * pixels * 3);
  const auto run = [&](auto infer_rows) {
    infer_rows(problem, log_scores, *gauss, bilateral, out);
  };
  const int64_t channels = problem.labels - 1;
  if (channels == 1) return run(infer<1, 1>);
  if (channels == 2) return run(infer<2, 1>);
  if (channels <= 4) return run(infer<4, 1>);
  if (channels <= 8) return run(infer<8, 1>);
  if (channels <= 12) return run(infer<4, 3>);
  if (channels <= 16) return run(infer<8, 2>);
  if (channels <= 20) return run(infer<4, 5>);
  if (channels <= 24) return run(infer<8, 3>);
  return run(infer<8, 2, true>);
}

}  // namespace

// Computes the probabilities of every image after `steps` updates; threads take image by image.
// Returns 0, or 1 if memory ran out or an image has too many pixels.
extern "C" int camkit_mean_field(const float* log_scores, const uint8_t* rgb, int64_t images,
                                 int64_t labels, int64_t rows, int64_t cols, const float* kernels,
                                 int steps, int threads, float* out) {
  if (rows * cols > (int64_t(1) << 28)) return 1;  // eight numbers of 32 bits for each pixel
  const Problem problem{log_scores, rgb,        out,        images,     labels,     rows, cols,
                        kernels[0], kernels[1], kernels[2], kernels[3], kernels[4], steps};
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&]() noexcept {
    try {
      for (int64_t image; !failed && (image = next++) < images;) infer_image(problem, image);
    } catch (const std::exception&) {  // out of memory, or a size beyond what a vector can hold
      failed = true;
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, images); ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {  // no more threads available: the existing ones do the work
  }
  work();
  for (auto& helper : helpers) helper.join();
  return failed ? 1 : 0;
}
