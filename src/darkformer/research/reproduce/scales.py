"""The two scales: what fits in a working day of two cores, and the paper's own size."""

from __future__ import annotations

from ...train.data import PYTHON
from . import figure2, figure3, figure4, figure5
from .plan import Base, Scale

#: 5.6 million parameters with a vocabulary of 4,096: Gemma's form (one kv head, gated MLP, tied embeddings).
SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip

LAPTOP = Scale(
    name="laptop",
    data=(PYTHON,),
    bases={
        "small": Base("small", seq_len=256, batch_size=2, num_features=64, save_every=200),
        "grown": Base("grown", seq_len=256, batch_size=2, num_features=64, save_every=200),
        "smollm2": Base("smollm2", seq_len=256, batch_size=1, num_features=128, save_every=100),
        "gemma3": Base("gemma3-270m", seq_len=256, batch_size=1, num_features=128),
    },
    # Most evidence first: what the other figures start from, then the claims, then second opinions.
    experiments=(
        figure2.TOP, figure2.BOTTOM, figure4.SMOLLM2, figure5.GROWN, figure3.GROWN, figure3.SMOLLM2,
        figure2.BOTTOM_GEMMA,
    ),
    lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    small=SMALL,
)  # fmt: skip

FULL = Scale(
    name="full",
    data=("allenai/c4:en",),
    bases={
        "scratch": Base("random:google/gemma-2b", seq_len=1024, batch_size=64, num_features=256, save_every=500),
        "gemma": Base("google/gemma-2b", seq_len=1024, batch_size=64, num_features=256, save_every=500),
    },
    experiments=(figure2.FULL_TOP, figure2.FULL_BOTTOM, figure4.FULL, figure5.FULL, figure3.FULL),
    documents=2_000_000,
    least_text=500_000_000,
    eval_tokens=262_144,
    dtype="bfloat16",
)

SCALES = {scale.name: scale for scale in (LAPTOP, FULL)}
