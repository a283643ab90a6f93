// Causal random-feature attention with window and sinks: the plain C interface that Python calls. Needs no header of torch.
#include "backward.h"
#include "step.h"

template <class Kernel> static int status_of(Kernel kernel) {
  try {
    return kernel();
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

extern "C" {
int darkformer_call_size() { return sizeof(Call); }
int darkformer_step_call_size() { return sizeof(StepCall); }
int darkformer_forward(const Call* c) {
  return status_of([=] { return c->bf16 && HAS_BF16 ? forward<HAS_BF16>(*c) : forward<false>(*c); });
}
int darkformer_backward(const Call* c) {
  return status_of([=] { return c->bf16 && HAS_BF16 ? backward<HAS_BF16>(*c) : backward<false>(*c); });
}
int darkformer_step(StepCall* c) {
  return status_of([=] { return c->bf16 ? step<true>(*c) : step<false>(*c); });
}
void darkformer_release() { Scratch::release_all(); }
}
