// The kernels of camkit for a CPU, behind the functions of camkit/native/cuda/params.h.
#include "doei.cu"
#include "kernels.cu"

namespace camkit::emulated {
Block* block;
unsigned schedule;
const char* last_failure;
const char *readable, *readable_end;

const unsigned char *low, *high;

const char* fault_of(const unsigned char* at, int size, Access kind, int thread) {
  const auto offset = at - shared();
  if (offset < 0 || offset + size > block->bytes) return "shared memory has an end";
  const uint64_t now = block->barriers + 1;
  for (auto word = offset / 4; word * 4 < offset + size; ++word) {
    Shadow& shadow = block->shadow[word];
    if (kind == END_COPY) {
      shadow = {thread, -1, now, 0, true, false};
      continue;
    }
    if (shadow.pending) return "memory is used while a copy to it is on its way";
    if (shadow.writer != thread && shadow.written == now)
      return "two threads use what one has written, without a barrier";
    if (kind == READ) {
      if (!shadow.filled) return "what was never written is read";
      shadow.reader = shadow.read == now && shadow.reader != thread ? -2 : thread;
      shadow.read = now;
      continue;
    }
    if (shadow.reader != thread && shadow.read == now)
      return "what another thread reads is overwritten, without a barrier";
    shadow = {thread, -1, now, 0, kind == WRITE, kind == START_COPY};
  }
  return nullptr;
}
}  // namespace camkit::emulated

// The compiler calls these at every access (-fsanitize=thread), in place of its own runtime.
#define HOOK CAMKIT_UNSEEN __attribute__((used)) void
#define HOOKS(SIZE)                                                                    \
  HOOK __tsan_read##SIZE(void* at) { check(at, SIZE, READ); }                          \
  HOOK __tsan_write##SIZE(void* at) { check(at, SIZE, WRITE); }                        \
  HOOK __tsan_unaligned_read##SIZE(void* at) { check(at, SIZE, READ); }                \
  HOOK __tsan_unaligned_write##SIZE(void* at) { check(at, SIZE, WRITE); }
extern "C" {
using namespace camkit::emulated;
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* at, size_t size) { check(at, int(size), READ); }
HOOK __tsan_write_range(void* at, size_t size) { check(at, int(size), WRITE); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_vptr_read(void**) {}
CAMKIT_UNSEEN char __tsan_atomic8_load(const volatile char* at, int) { return *at; }
}

int camkit_mutant = 0;  // known to the mutants alone

extern "C" void camkit_schedule(unsigned number) { camkit::emulated::schedule = number; }
extern "C" void camkit_readable(const char* begin, size_t size) {
  camkit::emulated::readable = begin;
  camkit::emulated::readable_end = begin + size;
}
