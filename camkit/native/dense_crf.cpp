// Mean-field inference in a fully connected CRF with a Gaussian and a bilateral kernel.
//
// Kraehenbuehl and Koltun 2011, with filters on the permutohedral lattice. The same steps in plain
// torch are in camkit/ops/mean_field.py and camkit/ops/permutohedral.py. Reasons for its speed:
//
// * pixels in one simplex share its corners, so a hash table finds simplices first, and only new
//   simplices look up their vertices;
// * the vertices along one axis of the lattice form chains, and a chain is blurred in place;
//   a vertex without neighbours along an axis does not change and is left out;
// * the kernels are linear and probabilities sum to one, so the last label needs no channel;
// * slicing, softmax and splatting are one pass, and probabilities are not stored between steps;
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
void infer(const Problem& problem, const float* log_scores, const Lattice& gauss,
           const Lattice& bilateral, float* out) {
  using Row = Rows<W, R>;
  using Vec = typename Row::Vec;
  const int64_t pixels = problem.rows * problem.cols;
  const int channels = int(problem.labels) - 1;
  const int64_t parts = Parts ? (channels + W * R - 1) / (W * R) : 1;
  const int64_t stride = parts * R, floats = stride * W;
  const size_t gauss_size = (gauss.vertices + 2) * stride;
  const size_t bilateral_size = (bilateral.vertices + 2) * stride;
  Zeros<Vec> gauss_values(gauss_size), gauss_next(gauss_size);
  Zeros<Vec> bilateral_values(bilateral_size), bilateral_next(bilateral_size);
  Zeros<Vec> block_rows(BLOCK * stride);
  Zeros<float> planes(problem.labels * BLOCK);  // [label][pixel of the block]
  float* const row_floats = reinterpret_cast<float*>(block_rows.data());

  for (int step = 0; step <= problem.steps; ++step) {
    const bool last = step == problem.steps;
    for (int64_t b = 0; b < gauss.blocks; ++b) {
      const int count = int(std::min<int64_t>(BLOCK, pixels - b * BLOCK));
      float* const rest = &planes[channels * BLOCK];
      // Log odds of each label over the last label.
      alignas(64) float base[BLOCK] = {}, top[BLOCK] = {};
      std::memcpy(base, log_scores + channels * pixels + b * BLOCK, count * sizeof(float));
      if (step) {
        block_rows.clear();
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t at = part * R;
          Row::template slice<3>(gauss, b, problem.gauss_weight, gauss_values.data() + at, stride,
                                 block_rows.data() + at);
          Row::template slice<6>(bilateral, b, problem.bilateral_weight,
                                 bilateral_values.data() + at, stride,
                                 block_rows.data() + at);
        }
        const float* const gauss_total = &gauss.total[b * BLOCK];
        const float* const bilateral_total = &bilateral.total[b * BLOCK];
        for (int p = 0; p < BLOCK; ++p)
          base[p] += problem.gauss_weight * gauss_total[p] +
                     problem.bilateral_weight * bilateral_total[p];
        for (int c = 0; c < channels; ++c)
          for (int p = 0; p < BLOCK; ++p) base[p] -= row_floats[p * floats + c];
      }
      for (int c = 0; c < channels; ++c) {
        float* const plane = &planes[c * BLOCK];
        const float* const given = log_scores + c * pixels + b * BLOCK;
        if (count == BLOCK)
          for (int p = 0; p < BLOCK; ++p) plane[p] = given[p] - base[p];
        else
          for (int p = 0; p < count; ++p) plane[p] = given[p] - base[p];
        if (step)
          for (int p = 0; p < BLOCK; ++p) plane[p] += row_floats[p * floats + c];
        for (int p = 0; p < BLOCK; ++p) top[p] = plane[p] > top[p] ? plane[p] : top[p];
      }
      alignas(64) float sum[BLOCK];
      for (int p = 0; p < BLOCK; ++p) sum[p] = rest[p] = exponential(-top[p]);
      for (int c = 0; c < channels; ++c) {
        float* const plane = &planes[c * BLOCK];
        for (int p = 0; p < BLOCK; ++p) plane[p] = exponential(plane[p] - top[p]);
        for (int p = 0; p < BLOCK; ++p) sum[p] += plane[p];
      }
      for (int p = 0; p < BLOCK; ++p) sum[p] = 1.f / sum[p];
      if (last) {
        for (int64_t c = 0; c <= channels; ++c)
          for (int p = 0; p < count; ++p)
            out[c * pixels + b * BLOCK + p] = planes[c * BLOCK + p] * sum[p];
        continue;
      }
      for (int c = 0; c < channels; ++c)
        for (int p = 0; p < BLOCK; ++p) row_floats[p * floats + c] = planes[c * BLOCK + p] * sum[p];
      for (int64_t p = 0; p < BLOCK; ++p)
        for (int64_t c = channels; c < floats; ++c) row_floats[p * floats + c] = 0.f;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = part * R;
        Row::template splat<3>(gauss, b, gauss_next.data() + at, stride, block_rows.data() + at);
        Row::template splat<6>(bilateral, b, bilateral_next.data() + at, stride,
                               block_rows.data() + at);
      }
    }
    if (last) break;
    gauss_values.swap(gauss_next);
    bilateral_values.swap(bilateral_next);
    gauss_next.clear();
    bilateral_next.clear();
    for (int64_t part = 0; part < parts; ++part) {
      Row::blur(gauss, gauss_values.data() + part * R, stride);
      Row::blur(bilateral, bilateral_values.data() + part * R, stride);
    }
  }
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
