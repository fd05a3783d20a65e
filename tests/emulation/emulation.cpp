// The kernels of camkit for a CPU, behind the functions of camkit/native/cuda/params.h.
#include "doei.cu"
#include "kernels.cu"

namespace camkit::emulated {
Block* block;
unsigned schedule;
const char* last_failure;
}  // namespace camkit::emulated

int camkit_mutant = 0;  // known to the mutants alone

extern "C" void camkit_schedule(unsigned number) { camkit::emulated::schedule = number; }
