"""Per-sample gradients of a converted model by torch.func are those of a loop of ordinary autograd."""

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

from darkformer import DarkConfig, convert


def test_gradients_of_each_sample() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = convert(LlamaForCausalLM(config).eval(), DarkConfig(num_features=8, window=4, sinks=1))
    ids = torch.randint(3, 61, (3, 20))
    masks = torch.ones_like(ids)
    masks[1, 15:] = 0
    every = {name: p.detach() for name, p in model.named_parameters()}
    added = {name: p for name, p in every.items() if ".dark." in name}

    def loss(weights: dict[str, Tensor], row: Tensor, mask: Tensor) -> Tensor:
        kwargs = {"labels": row[None], "attention_mask": mask[None], "use_cache": False}
        return functional_call(model, weights, (row[None],), kwargs).loss

    for weights in (every, added, {n: p for n, p in every.items() if n not in added}):  # some, or no, wrapped maps
        found = vmap(grad(loss), (None, 0, 0))(weights, ids, masks)
        for i, (row, mask) in enumerate(zip(ids, masks, strict=True)):
            model.zero_grad()
            model(row[None], labels=row[None], attention_mask=mask[None], use_cache=False).loss.backward()
            for name, parameter in model.named_parameters():
                if name in weights:
                    torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-3, atol=1e-5)
