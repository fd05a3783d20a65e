// Runs CUDA kernels on a CPU: stands in for camkit/native/cuda/device.cuh.
//
// Every thread of a block has a stack of its own and runs until it must wait: at a barrier for the
// block, at a warp instruction for the other 31 lanes, whose registers are then exchanged as the
// hardware would. What hardware leaves open is made hostile: shared memory begins as NaN, copies
// land at once or only when waited for, and threads run in turn, one warp as far ahead as it can, or
// in a random order.
//
// Shared memory has a shadow, which every access is checked against (emulation.cpp): bounds, reads
// of what nobody wrote, and accesses of two threads that no barrier orders. A copy is unordered with
// everything from its start until its thread has waited for it and all have met at a barrier.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <vector>

#include "params.h"

#define CAMKIT_UNSEEN __attribute__((no_sanitize("thread")))
#define CAMKIT_DEVICE inline
#define CAMKIT_GLOBAL(threads) void
#define CAMKIT_SHARED(name) unsigned char* name = camkit::emulated::shared()
#define threadIdx (camkit::emulated::thread())
#define blockIdx (camkit::emulated::block->index)
#define __syncthreads() camkit::emulated::wait_for_block()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::min;

namespace camkit {

struct half { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

template <typename To, typename From> To same_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline const float* all_halves() {
  static const std::vector<float> values = [] {
    std::vector<float> found(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits)
      found[bits] = float(same_bits<_Float16>(uint16_t(bits)));
    return found;
  }();
  return values.data();
}
inline float to_float(half x) { static const float* all = all_halves(); return all[x.bits]; }
inline float to_float(bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }
inline float to_float(float x) { return x; }

namespace emulated {

struct Copy { void* to; const void* from; };
struct Thread {
  std::vector<char> stack = std::vector<char>(256 << 10);
  ucontext_t birth;
  jmp_buf place;
  bool born, done;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};
struct Warp {
  int arrived = 0, kind = 0;
  uint64_t round = 0;
  const void* in[32];
  void* out[32];
};
struct Shadow {  // of four bytes
  int writer = -1, reader = -1;  // the last; many: -2
  uint64_t written = 0, read = 0;  // number of barriers before
  bool filled = false, pending = false;
};
struct Block {
  std::vector<Shadow> shadow;
  int bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  std::function<void()> body;
  jmp_buf home;
  dim3 index{0, 0, 0};
  int current = 0, alive = 0, at_barrier = 0;
  uint64_t barriers = 0, exchanges = 0;
  bool eager = false;
  const char* failure = nullptr;
};
extern Block* block;
// 0: threads in turn; 1, 2: first or last warp ahead; + 3: eager copies; from 6 on: random
extern unsigned schedule;
extern const char* last_failure;
extern const char *readable, *readable_end;  // where copies may read; null: anywhere

inline dim3 thread() { return dim3(unsigned(block->current)); }
constexpr int GUARD = 4096;  // bytes before and behind shared memory
inline unsigned char* shared() {
  const uintptr_t begin = uintptr_t(block->memory.data()) + GUARD;
  return reinterpret_cast<unsigned char*>((begin + 127) & ~uintptr_t(127));
}
enum Access { READ, WRITE, START_COPY, END_COPY };
extern const unsigned char *low, *high;  // shared memory and its guards
const char* fault_of(const unsigned char* at, int size, Access kind, int thread);
inline void pause() {
  if (!_setjmp(block->threads[block->current].place)) _longjmp(block->home, 1);
}
inline void fail(const char* reason) {
  block->failure = reason;
  _longjmp(block->home, 1);
}
// Checks an access of the current thread, if it is one of shared memory.
CAMKIT_UNSEEN inline void check(const void* at, int size, Access kind) {
  static bool busy = false;  // what is called below is instrumented itself
  const auto* place = static_cast<const unsigned char*>(at);
  if (busy || place < low || place >= high || block->failure) return;
  busy = true;
  const char* fault = fault_of(place, size, kind, block->current);
  busy = false;
  if (fault) fail(fault);
}
CAMKIT_UNSEEN inline void move16(void* to, const void* from) {
  memcpy(to, from, 16);
}
inline void wait_for_block() {
  const uint64_t round = block->barriers;
  if (++block->at_barrier == int(block->threads.size())) {
    block->at_barrier = 0;
    ++block->barriers;
  }
  while (block->barriers == round) pause();
}

// All lanes bring `in`; the last computes every lane's `out`.
template <typename Compute> void exchange(int kind, const void* in, void* out, Compute compute) {
  const int lane = block->current % 32;
  Warp& warp = block->warps[block->current / 32];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp wait at different instructions");
  warp.in[lane] = in;
  warp.out[lane] = out;
  const uint64_t round = warp.round;
  if (++warp.arrived == 32) {
    compute(warp);
    warp.arrived = 0;
    ++warp.round;
    ++block->exchanges;
  }
  while (warp.round == round) pause();
}

inline void live() {
  block->body();
  block->threads[block->current].done = true;
  --block->alive;
  _longjmp(block->home, 1);
}
inline void step(int number) {
  Thread& thread = block->threads[number];
  if (thread.done || block->failure) return;
  block->current = number;
  if (_setjmp(block->home)) return;
  if (thread.born) _longjmp(thread.place, 1);
  thread.born = true;
  setcontext(&thread.birth);
}
inline void step_warp(int warp) {  // as far as it comes without the others
  for (;;) {
    const uint64_t before = block->exchanges, round = block->barriers;
    const int alive = block->alive;
    for (int lane = 0; lane < 32; ++lane) step(warp * 32 + lane);
    const bool moved = block->exchanges != before || block->alive != alive;
    if (!moved || block->barriers != round || block->failure) return;
  }
}

inline void run_block(dim3 index, int threads, int bytes, std::function<void()> body) {
  block->index = index;
  block->body = body;
  block->memory.assign(bytes + 128 + 2 * GUARD, 0xff);  // NaN in every type
  block->bytes = bytes;
  low = block->memory.data();
  high = low + block->memory.size();
  block->shadow.assign((bytes + 3) / 4, Shadow());
  block->threads.resize(threads);
  block->warps.assign(threads / 32, Warp());
  block->alive = threads;
  block->at_barrier = 0;
  block->eager = schedule % 6 >= 3;
  for (Thread& thread : block->threads) {
    thread.born = thread.done = false;
    thread.open.clear();
    thread.closed.clear();
    getcontext(&thread.birth);
    thread.birth.uc_stack.ss_sp = thread.stack.data();
    thread.birth.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.birth, live, 0);
  }
  uint64_t drawn = schedule;
  while (block->alive && !block->failure) {
    drawn = drawn * 6364136223846793005u + 1442695040888963407u;
    const uint64_t exchanges = block->exchanges, barriers = block->barriers;
    const int alive = block->alive, warps = threads / 32;
    if (schedule >= 6)
      for (int i = 0; i < warps; ++i) step_warp(int((i + (drawn >> 33)) % unsigned(warps)));
    else if (schedule % 3 == 0)
      for (int number = 0; number < threads; ++number) step(number);
    else
      for (int i = 0; i < warps && block->barriers == barriers; ++i)
        step_warp(schedule % 3 == 1 ? i : warps - 1 - i);
    if (exchanges == block->exchanges && barriers == block->barriers && alive == block->alive)
      block->failure = "threads wait for each other for ever";
  }
}

}  // namespace emulated

inline void copy16(void* to, const void* from) {
  emulated::Block* block = emulated::block;
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) emulated::fail("a copy is not aligned");
  emulated::check(to, 16, emulated::START_COPY);
  const auto* begin = static_cast<const char*>(from);
  if (emulated::readable && (begin < emulated::readable || begin + 16 > emulated::readable_end))
    emulated::fail("tensors have an end");
  if (block->eager) emulated::move16(to, from);
  block->threads[block->current].open.push_back({to, from});
}
inline void close_copies() {
  emulated::Thread& thread = emulated::block->threads[emulated::block->current];
  thread.closed.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int N> void wait_copies() {
  emulated::Block* block = emulated::block;
  auto& closed = block->threads[block->current].closed;
  for (; int(closed.size()) > N; closed.pop_front())
    for (const emulated::Copy& copy : closed.front()) {
      emulated::check(copy.to, 16, emulated::END_COPY);
      if (!block->eager) emulated::move16(copy.to, copy.from);
    }
}

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  emulated::check(row, 16, emulated::READ);
  emulated::exchange(1, row, m, [](emulated::Warp& warp) {
    uint16_t x[4][8][8];
    for (int lane = 0; lane < 32; ++lane) memcpy(x[lane / 8][lane % 8], warp.in[lane], 16);
    for (int k = 0; k < 4; ++k) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << (uintptr_t(warp.in[k * 8 + i]) / 16 % 8);
      if (banks != 0xff) emulated::fail("rows of a matrix lie in one bank");
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 4; ++k) {
        const uint16_t *pair = &x[k][lane / 4][lane % 4 * 2];
        static_cast<uint32_t*>(warp.out[lane])[k] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
}

struct Operands { const uint32_t* a; uint32_t b[2]; };
template <typename T> float element(uint32_t both, int i) {
  return to_float(T{uint16_t(i ? both >> 16 : both & 0xffff)});
}
template <typename T>
void product(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Operands own{a, {b0, b1}};
  emulated::exchange(3, &own, c, [](emulated::Warp& warp) {
    float a[16][16], b[8][16];  // b by columns
    for (int lane = 0; lane < 32; ++lane) {
      const auto* in = static_cast<const Operands*>(warp.in[lane]);
      for (int k = 0; k < 4; ++k)
        for (int e = 0; e < 2; ++e)
          a[lane / 4 + k % 2 * 8][lane % 4 * 2 + k / 2 * 8 + e] = element<T>(in->a[k], e);
      for (int k = 0; k < 2; ++k)
        for (int e = 0; e < 2; ++e) b[lane / 4][lane % 4 * 2 + k * 8 + e] = element<T>(in->b[k], e);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 4; ++k) {
        const int i = lane / 4 + k / 2 * 8, j = lane % 4 * 2 + k % 2;
        float& sum = static_cast<float*>(warp.out[lane])[k];
        for (int x = 0; x < 16; ++x) sum += a[i][x] * b[j][x];
      }
  });
}
struct Sent { float value; int lane; };
inline float from_lane(float x, int lane) {
  const Sent own{x, lane};
  float found;
  emulated::exchange(4, &own, &found, [](emulated::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      const int other = static_cast<const Sent*>(warp.in[lane])->lane;
      *static_cast<float*>(warp.out[lane]) = static_cast<const Sent*>(warp.in[other])->value;
    }
  });
  return found;
}
inline float from_partner(float x, int mask) {
  return from_lane(x, (emulated::block->current % 32) ^ mask);
}
inline float power_of_two(float x) { return exp2f(x); }

template <typename Kernel, typename Given>
int launch(Kernel kernel, dim3 blocks, int threads, int bytes, void*, const Given& params) {
  emulated::Block now;
  emulated::block = &now;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x && !now.failure; ++x)
        emulated::run_block(dim3(x, y, z), threads, bytes, [&] { kernel(params); });
  emulated::last_failure = now.failure;
  emulated::low = emulated::high = nullptr;
  return now.failure ? 1 : 0;
}
inline const char* error_text(int) { return emulated::last_failure; }

}  // namespace camkit
