"""Calibration: moments, balance, the search for scale and bias, and what it must leave alone."""

import copy
from dataclasses import replace

import pytest
import torch
from hf.families import DARK, left_mask, linear, logits, tiny, tokens
from tolerances import relative_error
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import (
    ConfigError,
    ConversionError,
    DarkConfig,
    FeatureMap,
    InputError,
    NonFiniteError,
    calibrate,
    convert,
    dark_layers,
)
from darkformer.calibration.moments import Moments
from darkformer.calibration.probe import SCALES
from darkformer.features.affine import key_log_features, query_log_features
from darkformer.features.proposals import oprf_covariance, optimal_covariance
from darkformer.features.transforms import regularise
from darkformer.ops.attention import attention
from train.capture import captured, keys_of, queries_of

BATCHES = [tokens(3, 60, seed=i) for i in range(3)]
PERFORMER = DarkConfig(method="performer", num_features=16, window=4, sinks=2)


def _converted(config: DarkConfig = DARK, family: str = "llama") -> PreTrainedModel:
    return convert(tiny(family), config)


def _covariance(rows: Tensor) -> Tensor:
    """(G, N, d) → (G, d, d), plainly."""
    return torch.stack([torch.cov(group.T, correction=0) for group in rows])


class TestMoments:
    def test_a_stream_equals_all_at_once(self) -> None:
        model = _converted()
        rows = torch.cat([queries_of(call) for call in captured(model, BATCHES[:2])[0]], dim=1)
        moments = Moments(2, 8)
        for call in captured(model, BATCHES[:2])[0]:
            query = call.query.unflatten(1, (2, -1)) * call.scaling**0.5
            moments.add("query", query, torch.ones(3, 60, dtype=torch.bool))
        assert moments.count["query"] == rows.shape[1] == 2 * 3 * 3 * 60
        assert relative_error(moments.mean("query"), rows.mean(1)) <= 1e-8
        assert relative_error(moments.covariance("query", centered=True), _covariance(rows)) <= 1e-8
        second = rows.mT @ rows / rows.shape[1]
        assert relative_error(moments.covariance("query", centered=False), second) <= 1e-8

    def test_far_from_zero(self) -> None:
        # Sums of float32 squares would lose a covariance of 1 beside a mean of 1000.
        x = 1000.0 + torch.randn(2, 1, 50, 4)
        moments = Moments(1, 4)
        moments.add("key", x, torch.ones(2, 50, dtype=torch.bool))
        expected = _covariance(x.movedim(1, 0).flatten(1, 2).double())
        assert relative_error(moments.covariance("key", centered=True), expected) <= 1e-6

    def test_memory_does_not_grow(self) -> None:
        def size(moments: Moments) -> int:
            tensors = [*moments.total.values(), *moments.square.values()]
            assert set(vars(moments)) == {"count", "total", "square"}
            return sum(x.numel() for x in tensors)

        moments = Moments(2, 4)
        before = size(moments)
        for _ in range(5):
            moments.add("key", torch.randn(3, 2, 100, 4), torch.ones(3, 100, dtype=torch.bool))
        assert size(moments) == before == 2 * (2 * 4 + 2 * 4 * 4)


class TestTransforms:
    def test_centres_are_the_means_of_all_but_the_last_batch(self) -> None:
        model = _converted()
        calls = captured(model, BATCHES[:2])
        calibrate(model, BATCHES)
        for layer, fm in enumerate(dark_layers(model)):
            queries = torch.cat([queries_of(call) for call in calls[layer]], dim=1)
            keys = torch.cat([keys_of(call, sinks=2) for call in calls[layer]], dim=1)
            assert relative_error(fm.query_center, queries.mean(1)) <= 1e-6
            assert relative_error(fm.key_center, keys.mean(1)) <= 1e-6

    @pytest.mark.parametrize("center", [True, False])
    def test_balanced_covariances_are_equal(self, center: bool) -> None:
        model = _converted(DarkConfig(num_features=16, window=4, sinks=2, center=center))
        calls = captured(model, BATCHES[:1])
        calibrate(model, BATCHES[:1])  # a single batch serves both purposes
        for layer, fm in enumerate(dark_layers(model)):
            queries, keys = queries_of(calls[layer][0]), keys_of(calls[layer][0], sinks=2)
            cov_q, cov_k = (_covariance(x) if center else x.mT @ x / x.shape[1] for x in (queries, keys))
            a, b = fm.query_balance.double(), fm.key_balance.double()
            after_q, after_k = a @ regularise(cov_q) @ a.mT, b @ regularise(cov_k) @ b.mT
            assert relative_error(after_q, after_k) <= 1e-4
            assert relative_error(cov_q, cov_k) > 0.1  # they were not equal before
            assert relative_error(a @ b.mT, torch.eye(8).expand(2, -1, -1)) <= 1e-4  # B = A⁻ᵀ: nothing was lost

    def test_the_kernel_is_still_that_of_softmax(self) -> None:
        # Centres and balance are a change of variables: with M = I, the features' mean is exp(q̃ᵀk̃) as before.
        model = _converted(DarkConfig(num_features=16, window=4, sinks=2, cold_start=False, far_bias=False))
        call = captured(model, BATCHES[:1])[0][0]
        calibrate(model, BATCHES)
        calibrated = next(dark_layers(model))
        many = DarkConfig(num_features=1 << 16, draw="iid", cold_start=False, far_bias=False, seed=3)
        wide = convert(tiny("llama"), many)
        fm = next(dark_layers(wide))
        fm.load_state_dict({**calibrated.state_dict(), "projection": fm.projection})
        # At half their size the mean over 65,536 draws is tight; the identity holds at any size.
        pairs = 0.5 * call.query[:1, :, 20:26], 0.5 * call.key[:1, :, 20:26], call.scaling
        assert _standard_errors(fm, *pairs) <= 4
        fm.key_center.data.zero_()
        assert _standard_errors(fm, *pairs) <= 4  # any centres will do …
        fm.query_balance.data.mul_(1.2)
        assert _standard_errors(fm, *pairs) > 10  # … but not any pair of maps

    def test_pads_are_not_counted(self) -> None:
        mask = left_mask([0, 7, 20], 60)
        model, other = _converted(), _converted()
        noisy = BATCHES[0].where(mask.bool(), tokens(3, 60, seed=9))
        calibrate(model, [{"input_ids": BATCHES[0], "attention_mask": mask}])
        calibrate(other, [{"input_ids": noisy, "attention_mask": mask}])
        for fm, expected in zip(dark_layers(model), dark_layers(other), strict=True):
            for name, p in fm.named_parameters():
                assert relative_error(p, expected.state_dict()[name]) <= 1e-5, name

    def test_right_padding_is_as_no_padding(self) -> None:
        model, other = _converted(), _converted()
        padded = torch.cat([BATCHES[0], tokens(3, 13, seed=5)], dim=1)
        calibrate(model, [BATCHES[0]])
        calibrate(other, [{"input_ids": padded, "attention_mask": left_mask([13] * 3, 73).flip(1)}])
        for fm, expected in zip(dark_layers(other), dark_layers(model), strict=True):
            for name, p in fm.named_parameters():
                assert relative_error(p, expected.state_dict()[name]) <= 1e-5, name


@torch.no_grad()
def _standard_errors(fm: FeatureMap, query: Tensor, key: Tensor, scaling: float) -> float:
    """How far the mean over draws of φ(q)φ(k) is from exp(q̃ᵀk̃), for the worst pair, in standard errors."""
    parameters = fm.parameters_for(torch.float64)
    q = (query.double() * scaling**0.5).unflatten(1, (2, -1))[:, :, 0]
    k = key.double() * scaling**0.5
    place, count = torch.arange(q.shape[2])[None], parameters.config.num_features
    draws = query_log_features(parameters, q, place)[:, :, :, None] + key_log_features(parameters, k, place)[:, :, None]
    draws = draws.exp() * count  # (1, G, T, T, m)
    error = draws.std(-1) / count**0.5
    return float(((draws.mean(-1) - (q @ k.mT).exp()).abs() / error).max())


class TestSearch:
    def test_scales_come_from_the_table(self) -> None:
        model = _converted()
        before = {fm.layer: fm.geometry.clone() for fm in dark_layers(model)}
        choices = calibrate(model, BATCHES)
        assert [choice.layer for choice in choices] == [0, 1, 2]
        for choice, fm in zip(choices, dark_layers(model), strict=True):
            assert all(min(abs(scale - s) for s in SCALES) < 1e-6 for scale in choice.scale)
            factor = torch.tensor(choice.scale)[:, None, None]
            torch.testing.assert_close(fm.geometry, factor * before[fm.layer])
            torch.testing.assert_close(fm.far_bias, torch.tensor(choice.far_bias))

    def test_the_choice_is_the_best_of_what_was_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("darkformer.calibration.calibrate.CAUTION", 0.0)
        for choice in calibrate(_converted(), BATCHES):
            assert all(e <= u for e, u in zip(choice.error, choice.error_unscaled, strict=True))
            assert any(e < u for e, u in zip(choice.error, choice.error_unscaled, strict=True))

    @pytest.mark.parametrize(
        "config",
        [
            DARK,
            PERFORMER,
            DarkConfig(method="lfk", num_features=16, window=4, sinks=2),
            DarkConfig(num_features=16, window=4, sinks=2, tied=False),
            DarkConfig(num_features=16, window=4, sinks=2, center=False, balance=False),
            DarkConfig(num_features=16, window=0, sinks=0),
            DarkConfig(method="random", num_features=16, window=4, sinks=2),
            DarkConfig(method="constant", num_features=16, window=4, sinks=2),
            DarkConfig(num_features=16, window=4, sinks=2, cold_start=False),
            DarkConfig(num_features=16, window=4, sinks=2, far_bias=False),
            DarkConfig(num_features=16, window=4, sinks=2, proposal="optimal"),
            DarkConfig(num_features=16, window=4, sinks=2, proposal="oprf", proposal_weights=False, center=False),
            DarkConfig(method="performer", num_features=16, window=4, sinks=2, proposal="optimal", balance=False),
        ],
        ids=lambda c: f"{c.method}-w{c.window}-{c.tied}-{c.center}-{c.cold_start}-{c.far_bias}-{c.proposal}",
    )
    @pytest.mark.parametrize("padded", [False, True])
    def test_the_measured_error_is_the_operators(self, config: DarkConfig, padded: bool) -> None:
        # The search computes quadratically, with its own arithmetic; the model will run the chunked operator.
        model = _converted(replace(config, drop_features=False))
        mask = left_mask([0, 7, 20], 60) if padded else torch.ones(3, 60, dtype=torch.int64)
        batches = [{"input_ids": ids, "attention_mask": mask} for ids in BATCHES]
        softmax = captured(model, batches[-1:])
        choices = calibrate(model, batches)
        assert len(choices) == 3
        for choice, fm in zip(choices, dark_layers(model), strict=True):
            (call,) = softmax[fm.layer]
            key_mask = mask if padded else None
            common = dict(scaling=call.scaling, key_mask=key_mask, backend="chunked")
            got = attention(call.query, call.key, call.value, fm, **common)
            measured = _residual_error(model, fm, got, call.output, mask)
            torch.testing.assert_close(torch.tensor(choice.error), measured, rtol=1e-3, atol=1e-5)

    def test_the_exact_parts_error_is_that_of_local(self) -> None:
        model, local = _converted(), _converted(DarkConfig(method="local", window=4, sinks=2))
        softmax = captured(model, BATCHES[-1:])
        for choice, fm in zip(calibrate(model, BATCHES), dark_layers(local), strict=True):
            (call,) = softmax[fm.layer]
            got = attention(call.query, call.key, call.value, fm, scaling=call.scaling)
            measured = _residual_error(local, fm, got, call.output, torch.ones(3, 60))
            torch.testing.assert_close(torch.tensor(choice.error_exact_part), measured, rtol=1e-4, atol=1e-6)

    def test_the_gemma_scaling_is_used(self) -> None:
        model = _converted(family="gemma3")
        (call,) = captured(model, BATCHES[-1:])[2]
        assert call.scaling == pytest.approx(10**-0.5)
        (choice,) = calibrate(model, BATCHES)
        got = attention(call.query, call.key, call.value, next(dark_layers(model)), scaling=call.scaling)
        measured = _residual_error(model, next(dark_layers(model)), got, call.output, torch.ones(3, 60))
        torch.testing.assert_close(torch.tensor(choice.error), measured, rtol=1e-3, atol=1e-5)

    def test_every_head_gets_a_bias_of_its_own(self) -> None:
        model = _converted(DarkConfig(method="constant", num_features=16, window=4, sinks=2))
        far_bias = [b for choice in calibrate(model, BATCHES) for b in choice.far_bias]
        assert len(set(far_bias)) == 6


class TestProposals:
    @pytest.mark.parametrize("center", [True, False])
    @pytest.mark.parametrize("weights", [True, False])
    @pytest.mark.parametrize("proposal", ["oprf", "optimal"])
    def test_the_proposal_is_that_of_the_chosen_scale(self, proposal: str, weights: bool, center: bool) -> None:
        """Σ* of E[zzᵀ] over all pairs of the features' own inputs: scaled, balanced, centred."""
        config = DarkConfig(
            num_features=16, window=4, sinks=2, proposal=proposal, proposal_weights=weights, center=center
        )
        model = _converted(config)
        calls = captured(model, BATCHES[:2])
        choices = calibrate(model, BATCHES)
        for layer, fm in enumerate(dark_layers(model)):
            queries = torch.cat([queries_of(call) for call in calls[layer]], dim=1)
            keys = torch.cat([keys_of(call, sinks=2) for call in calls[layer]], dim=1)
            if center:
                queries, keys = queries - queries.mean(1, True), keys - keys.mean(1, True)
            maps = fm.geometry.double() @ fm.query_balance.double(), fm.geometry.double() @ fm.key_balance.double()
            queries, keys = queries @ maps[0].mT, keys @ maps[1].mT
            pairs = torch.stack([_pairs(q, k) for q, k in zip(queries, keys, strict=True)])
            function = {"oprf": oprf_covariance, "optimal": optimal_covariance}[proposal]
            root = fm.proposal_root.double()
            assert relative_error(root @ root, function(pairs)) <= 1e-4
            assert relative_error(root, torch.eye(8).expand(2, -1, -1)) > 0.01
        assert len({s for choice in choices for s in choice.scale}) > 1  # scales differ, so the rule was tested

    def test_without_a_search_it_is_that_of_scale_one(self) -> None:
        model = _converted(DarkConfig(num_features=16, cold_start=False, far_bias=False, proposal="optimal"))
        assert calibrate(model, BATCHES) == []
        assert all(fm.proposal_root.sub(torch.eye(8)).abs().max() > 0.01 for fm in dark_layers(model))

    def test_theorem32_names_layer_and_heads(self) -> None:
        config = DarkConfig(num_features=16, window=4, sinks=2, proposal="theorem32")
        model = _converted(config)
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.mul_(1000)
        with pytest.raises(
            ConfigError, match=r"layer 1: proposal='theorem32' .* at scale 0\.25 .* not: head 0: .*head 1"
        ):
            calibrate(model, BATCHES)

    def test_theorem32_takes_a_scale_that_is_cold_enough(self) -> None:
        model = _converted(DarkConfig(num_features=16, window=4, sinks=2, proposal="theorem32"))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.weight.mul_(8)
        choices = calibrate(model, BATCHES)
        for fm in dark_layers(model):
            root = fm.proposal_root.double()
            assert root.isfinite().all() and (torch.linalg.eigvalsh(root) >= 1 - 1e-5).all()
        config = DarkConfig(num_features=16, window=4, sinks=2, proposal="theorem32", cold_start=False)
        with pytest.raises(ConfigError, match=r"at scale 1\.0 these are not"):
            hot = _converted(config)
            with torch.no_grad():
                for layer in hot.model.layers:
                    layer.self_attn.k_proj.weight.mul_(8)
            calibrate(hot, BATCHES)
        assert max(s for choice in choices for s in choice.scale) < 1


def _pairs(query: Tensor, key: Tensor) -> Tensor:
    """E[(q + k)(q + k)ᵀ] over all pairs of rows, plainly."""
    totals = [(row + key).T @ (row + key) / len(key) for row in query]
    return torch.stack(totals).mean(0)


@torch.no_grad()
def _residual_error(model: PreTrainedModel, fm: FeatureMap, got: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    """Relative error per kv head of what it adds to the residual stream, over the real tokens of the rows held back.

    Brute force: other heads are zeroed, and the model's own output projection is called. got, expected (B, H, L, d).
    """
    attention_module = next(m for m in model.modules() if getattr(m, "dark", None) is fm)
    held = len(mask) // 2
    real = mask[held:].bool()[..., None]
    group = got.shape[1] // fm.num_kv_heads
    errors = []
    for g in range(fm.num_kv_heads):
        alone = torch.zeros(got.shape[1])
        alone[g * group : (g + 1) * group] = 1
        difference, size = (
            (attention_module.o_proj((x * alone[:, None, None])[held:].transpose(1, 2).flatten(2)) * real)
            .square()
            .sum()
            for x in (got - expected, expected)
        )
        errors.append((difference / size).sqrt())
    return torch.stack(errors)


class TestWhatIsLeftAlone:
    @pytest.mark.parametrize("method", ["dark", "performer", "lfk"])
    def test_the_papers_form(self, method: str) -> None:
        model = _converted(DarkConfig.paper(num_features=16, method=method))
        before = copy.deepcopy(model.state_dict())
        assert calibrate(model, BATCHES) == []
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_the_models_own_weights(self) -> None:
        model = _converted()
        before = copy.deepcopy(model.state_dict())
        calibrate(model, BATCHES)
        changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        assert changed
        assert all(".dark." in name for name in changed)
        assert not any(name.endswith("projection") for name in changed)

    def test_mode_gradients_and_hooks(self) -> None:
        model = _converted().train()
        calibrate(model, BATCHES)
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        modules = [layer.self_attn for layer in model.model.layers]
        assert not any("dark_observer" in module.__dict__ or "dark_cache" in module.__dict__ for module in modules)

    def test_it_helps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The reason it exists: the calibrated model is nearer to the softmax model than the uncalibrated one.
        # (With random weights most of attention is far, and to take less of the features than the best does not pay.)
        monkeypatch.setattr("darkformer.calibration.calibrate.CAUTION", 0.0)
        ids = tokens(3, 60, seed=11)
        expected, model = logits(tiny("llama"), ids), _converted()
        before = (logits(model, ids) - expected).norm()
        calibrate(model, BATCHES)
        assert (logits(model, ids) - expected).norm() < 0.9 * before


class TestRefusals:
    def test_not_converted(self) -> None:
        with pytest.raises(ConversionError, match=r"not converted: call darkformer\.convert"):
            calibrate(tiny("llama"), BATCHES)

    def test_no_batches(self) -> None:
        with pytest.raises(InputError, match="no calibration batches"):
            calibrate(_converted(), iter(()))

    @pytest.mark.parametrize("batch", ["text", {"labels": BATCHES[0]}, [1, 2]])
    def test_something_else_than_a_batch(self, batch: object) -> None:
        with pytest.raises(InputError, match="give input_ids"):
            calibrate(_converted(), [batch])

    def test_the_mode_is_put_back(self) -> None:
        model = _converted().train()
        with pytest.raises(InputError, match="needs 16"):
            calibrate(model, [tokens(1, 10)])
        assert model.training

    def test_too_few_tokens(self) -> None:
        # head_dim 8 needs 16 keys; the two sinks of a row are none.
        with pytest.raises(InputError, match=r"saw 15 tokens per head, .* dimension 8 needs 16"):
            calibrate(_converted(), [tokens(1, 17)])
        calibrate(_converted(), [tokens(1, 18)])

    def test_a_model_that_diverged(self) -> None:
        model = _converted()
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
        with pytest.raises(NonFiniteError, match="layer 1: key hold NaN"):
            calibrate(model, BATCHES)


def test_progress_counts_the_batches() -> None:
    seen: list[tuple[int, int]] = []
    calibrate(_converted(), BATCHES, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_generators_and_dicts_of_batches() -> None:
    model, other = _converted(), _converted()
    calibrate(model, BATCHES)
    calibrate(other, ({"input_ids": ids, "labels": ids} for ids in BATCHES))
    for fm, expected in zip(dark_layers(model), dark_layers(other), strict=True):
        assert all(torch.equal(x, expected.state_dict()[name]) for name, x in fm.state_dict().items())


def test_a_linear_model_is_calibrated_on_softmax_activations() -> None:
    # Whatever the feature maps hold, the statistics are those of the softmax model.
    model, other = linear("llama"), _converted()
    calibrate(model, BATCHES), calibrate(other, BATCHES)
    for fm, expected in zip(dark_layers(model), dark_layers(other), strict=True):
        assert torch.equal(fm.query_center, expected.query_center)
        assert torch.equal(fm.key_balance, expected.key_balance)
