// From tensors to `Params`: checks, strides, copies of what kernels cannot read, and the stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "params.h"

#ifndef CAMKIT_EMULATION
#include <dlfcn.h>
#endif

namespace camkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr auto FLOAT_32 = ScalarType::Float;

#ifdef CAMKIT_EMULATION
struct Place {
  explicit Place(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// Selects the device of a tensor for its own lifetime, and finds its current stream.
class Place {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;

 public:
  explicit Place(const Tensor& q) : guard(q.get_device_index()), device(q.get_device_index()) {}
  void* stream() const {
    // looked up, not linked: the library must also load with a torch without CUDA
    using Find = int32_t (*)(int32_t, void**);
    static const Find find = [] {
      void* torch = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return torch ? Find(dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* found = nullptr;
    STD_TORCH_CHECK(find && find(device, &found) == 0, "camkit: torch gave no CUDA stream");
    return found;
  }
};
#endif

inline void check(int code) {
  STD_TORCH_CHECK(code == 0, "camkit: kernel failed: ", camkit_error(code));
}

// A pointer of another device would crash the process, not the call.
inline void check_beside(const Tensor& x, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(),
                  "camkit: ", name, " must be on the device of the other tensors");
}

// The tensor itself, or a copy whose rows are dense and begin at multiples of 16 bytes.
inline Tensor readable(const Tensor& x) {
  const auto fits = [](const Tensor& x) {
    const int64_t chunk = 16 / int64_t(x.element_size());
    bool good = x.stride(x.dim() - 1) == 1 && uintptr_t(x.const_data_ptr()) % 16 == 0;
    for (int64_t axis = 0; axis + 1 < x.dim(); ++axis)
      good = good && (x.stride(axis) % chunk == 0 || x.size(axis) == 1);
    // places within a head are counted in 32 bits
    return good && x.size(2) * x.stride(2) <= INT32_MAX;
  };
  if (fits(x)) return x;
  const Tensor dense = torch::stable::contiguous(x);
  return fits(dense) ? dense : torch::stable::clone(dense);
}

inline Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return HALF;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Float: return FLOAT;
    default: break;
  }
  STD_TORCH_CHECK(false, "camkit: expected float16, bfloat16 or float32");
}

// A call: its parameters, and the tensors that must live until it is launched.
struct __attribute__((visibility("hidden"))) Call {
  Params p{};
  std::vector<Tensor> kept;  // the queries are the first

  const void* keep(const Tensor& x, const char* name) {
    kept.push_back(x);
    check_beside(x, kept[0], name);
    return x.const_data_ptr();
  }
  const float* keep_float(const Tensor& x, std::initializer_list<int64_t> sizes, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == FLOAT_32, "camkit: ", name, " must be float32");
    bool good = x.dim() == int64_t(sizes.size());
    int64_t axis = 0;
    for (const int64_t size : sizes) good = good && x.size(axis++) == size;
    STD_TORCH_CHECK(good, "camkit: ", name, " does not fit q and k");
    return static_cast<const float*>(keep(torch::stable::contiguous(x), name));
  }
  const void* keep_heads(const Tensor& x, int64_t tokens, Strides& strides, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == p.images && x.size(1) == p.heads &&
                        x.size(2) == tokens && x.size(3) == p.width && type_of(x) == p.type,
                    "camkit: ", name, " does not fit q");
    const Tensor found = readable(x);
    strides = strides_of(found);
    return keep(found, name);
  }

  Call(const Tensor& q, const Tensor& k, const Tensor& lse, const MaybeTensor& log_weights,
       double scale, int64_t gated_rows) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "camkit: q and k must be (b, a, t, d)");
    p.images = int(q.size(0));
    p.heads = int(q.size(1));
    p.queries = int(q.size(2));
    p.keys = int(k.size(2));
    p.width = int(q.size(3));
    p.type = type_of(q);
    p.scale = float(scale);
    p.q = keep_heads(q, p.queries, p.q_strides, "q");
    p.k = keep_heads(k, p.keys, p.k_strides, "k");
    p.lse = keep_float(lse, {p.images, p.heads, p.queries}, "lse");
    if (!log_weights.has_value()) return;
    const Tensor& weights = *log_weights;
    const bool by_head = weights.dim() == 3;
    p.log_weights = by_head
        ? keep_float(weights, {p.images, p.heads, p.keys}, "log_weights")
        : keep_float(weights, {p.images, p.keys}, "log_weights");
    const int64_t heads = by_head ? p.heads : 1;
    p.weight_strides = {heads * p.keys, by_head ? p.keys : 0, 1};
    p.gated_rows = int(gated_rows < 0 || gated_rows > p.queries ? p.queries : gated_rows);
  }

  bool empty() const { return p.images == 0 || p.heads == 0 || p.queries == 0 || p.keys == 0; }
  void limit(int64_t count, int64_t most, const char* name) const {
    STD_TORCH_CHECK(count >= 0 && count <= most, "camkit: ", name, " must be 0 to ", most);
  }
};

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace camkit
