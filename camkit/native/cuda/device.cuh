// The instructions that the kernels need beyond C++, as functions.
//
// With CAMKIT_EMULATION, tests/emulation/emulation.h replaces them and runs the same kernels on a
// CPU.
#pragma once
#include "params.h"
#ifdef CAMKIT_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CAMKIT_DEVICE __device__ __forceinline__
// Two blocks at a time are enough: more would leave too few registers per thread.
#define CAMKIT_GLOBAL(threads) __global__ void __launch_bounds__(threads, 256 / (threads))
#define CAMKIT_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace camkit {

using half = __half;
using bfloat16 = __nv_bfloat16;

CAMKIT_DEVICE float to_float(half x) { return __half2float(x); }
CAMKIT_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
CAMKIT_DEVICE float to_float(float x) { return x; }

CAMKIT_DEVICE uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

// Start copying 16 bytes to shared memory.
CAMKIT_DEVICE void copy16(void* to, const void* from) {
  const uint32_t at = shared_address(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(at), "l"(from) : "memory");
}
CAMKIT_DEVICE void close_copies() { asm volatile("cp.async.commit_group;\n" ::); }
// Wait until all but the last N groups of this thread's copies have landed.
template <int N> CAMKIT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
CAMKIT_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row)) : "memory");
}

// c (16x8) += a (16x16) b (16x8)
#define CAMKIT_PRODUCT(TYPE, NAME)                                                              \
  CAMKIT_DEVICE void product(TYPE, float(&c)[4], const uint32_t(&a)[4], uint32_t b0,            \
                             uint32_t b1) {                                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                         \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"                 \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));               \
  }
CAMKIT_PRODUCT(half, "f16")
CAMKIT_PRODUCT(bfloat16, "bf16")
#undef CAMKIT_PRODUCT

CAMKIT_DEVICE float from_partner(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
CAMKIT_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename Kernel, typename Given>
int launch(Kernel kernel, dim3 blocks, int threads, int bytes, void* stream, const Given& params) {
  if (bytes > 48 * 1024) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, most, bytes)) return error;
  }
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}
inline const char* error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace camkit
#endif
