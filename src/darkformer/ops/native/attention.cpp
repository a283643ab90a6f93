// Causal random-feature attention with window and sinks. A plain C interface: no header of torch is needed.
#include "backward.h"
#include "step.h"

extern "C" {
int darkformer_call_size() { return sizeof(Call); }
int darkformer_bf16() { return HAS_BF16; }
void darkformer_forward(const Call* c) { c->bf16 && HAS_BF16 ? forward<HAS_BF16>(*c) : forward<false>(*c); }
void darkformer_backward(const Call* c) { c->bf16 && HAS_BF16 ? backward<HAS_BF16>(*c) : backward<false>(*c); }
void darkformer_release() { Scratch::release(); }
int darkformer_step_size() { return sizeof(StepCall); }
int darkformer_step(StepCall* c) { return c->bf16 ? step<true>(*c) : step<false>(*c); }
}
