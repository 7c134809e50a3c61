"""Losses on preferences and for unlearning: closed forms in float64, and the head that builds no logits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.models import Outputs
from lossworks.models.interface import Head

B, L, D, V = 5, 6, 8, 23


def batch_of(candidates: int, seed: int = 0) -> tuple[Outputs, dict[str, Tensor]]:
    """Return features with a head, and a batch whose second row lacks its last tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, candidates, L, D, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (B, candidates, L), generator=generator)
    targets[:, :, 0] = -100  # a prompt
    targets[1, :, 4:] = -100
    reference = torch.randn(B, candidates, dtype=torch.float64, generator=generator) - 12
    batch = {
        "targets": targets,
        "reference": reference,
        "mismatched": torch.zeros(B, candidates),
        "masked_classes": torch.tensor([[3, 5, -100]]).expand(B, -1),
    }
    return Outputs(hidden, Head(weight)), batch


def sums(outputs: Outputs, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of whole answers and their tokens, by the definition."""
    log_p = outputs.logits.log_softmax(-1)
    valid = batch["targets"] != -100
    index = batch["targets"].clamp(min=0)
    picked = log_p.gather(-1, index[..., None])[..., 0]
    return (picked * valid).sum(-1), valid.sum(-1).double()


def dense(slug: str, s: Tensor, r: Tensor, n: Tensor) -> Tensor:
    """Return the losses (B,) by the papers' formulas."""
    chosen, rejected, mean = s[:, 0], s[:, 1], s / n
    margin = (chosen - r[:, 0]) - (rejected - r[:, 1])
    if slug == "dpo":
        return -F.logsigmoid(0.1 * margin)
    if slug == "ipo":
        return (margin - 1 / 0.2) ** 2
    if slug == "simpo":
        return -F.logsigmoid(2.0 * (mean[:, 0] - mean[:, 1]) - 1.0)
    if slug == "orpo":
        odds = mean - torch.log(1 - mean.exp())
        return -mean[:, 0] - 0.1 * F.logsigmoid(odds[:, 0] - odds[:, 1])
    if slug == "cpo":
        return -F.logsigmoid(0.1 * (chosen - rejected)) - mean[:, 0]
    z = (s[:, 2] - r[:, 2]).mean().clamp(min=0).detach()
    gained = 1 - torch.sigmoid(0.1 * (chosen - r[:, 0] - z))
    return gained + 1 - torch.sigmoid(0.1 * (z - (rejected - r[:, 1])))


@pytest.mark.parametrize("slug", ["dpo", "ipo", "simpo", "orpo", "cpo", "kto"])
@pytest.mark.parametrize("without_logits", [True, False])
def test_values_and_gradients_are_those_of_the_formula(slug: str, without_logits: bool) -> None:
    outputs, batch = batch_of(3 if slug == "kto" else 2)
    loss = create(slug, reduction="none")
    seen = outputs if without_logits else Outputs(outputs.hidden, None, dense=outputs.logits)
    actual = loss.of(seen, batch)
    s, n = sums(outputs, batch)
    expected = dense(slug, s, batch["reference"], n)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    parameters = (outputs.hidden, outputs.head.weight)  # type: ignore[union-attr]
    upstream = torch.randn(B, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad((v * upstream).sum(), parameters, retain_graph=True) for v in (actual, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_label_smoothing_of_dpo_mixes_both_ways_round() -> None:
    outputs, batch = batch_of(2)
    swapped = {**batch, "targets": batch["targets"].flip(1), "reference": batch["reference"].flip(1)}
    other = Outputs(outputs.hidden.flip(1), outputs.head)
    plain = create("dpo", reduction="none")
    mixed = create("dpo", label_smoothing=0.2, reduction="none").of(outputs, batch)
    expected = 0.8 * plain.of(outputs, batch) + 0.2 * plain.of(other, swapped)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)


def test_at_the_reference_dpo_is_log_two() -> None:
    outputs, batch = batch_of(2)
    s, _ = sums(outputs, batch)
    at_start = {**batch, "reference": s.detach()}
    values = create("dpo", reduction="none").of(outputs, at_start)
    torch.testing.assert_close(values, torch.full_like(values, math.log(2)), rtol=1e-9, atol=1e-9)


def test_a_pair_without_an_answer_counts_for_nothing() -> None:
    outputs, batch = batch_of(2)
    batch["targets"][2, 1] = -100
    loss = create("dpo", reduction="sum")
    rest = [0, 1, 3, 4]
    fewer = {name: value[rest] for name, value in batch.items()}
    expected = loss.of(Outputs(outputs.hidden[rest], outputs.head), fewer)
    torch.testing.assert_close(loss.of(outputs, batch), expected)
    assert loss.elements(batch) == 4


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"dpo: logits .* must be \(B, C, L, V\)"):
        create("dpo")(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), reference=torch.zeros(2, 2))
    with pytest.raises(UserError, match="dpo: needs the input reference"):
        create("dpo")(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, dtype=torch.int64))


def nll(outputs: Outputs, batch: dict[str, Tensor], candidate: int) -> Tensor:
    s, n = sums(outputs, batch)
    return -s[:, candidate].sum() / n[:, candidate].sum()


def test_the_weight_of_what_stays_follows_the_paper() -> None:
    from lossworks.entries.losses.unlearning.constrained import retain_weight

    rises = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    weights = retain_weight(rises, 0.3, 6.0, 0.8, 1.2, 2.8)
    expected = torch.tensor([1.2, 1.2, 0.3 * math.sqrt(6) + 0.8, 2.8], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert round(float(weights[2]), 3) == 1.535


def test_constrained_unlearning_climbs_one_set_and_descends_on_the_other() -> None:
    outputs, batch = batch_of(2)
    loss = create("constrained-unlearning", reduction="mean", baseline_steps=1)
    expected = -nll(outputs, batch, 0) + 1.2 * nll(outputs, batch, 1)
    torch.testing.assert_close(loss.of(outputs, batch), expected)
    # Its baseline is the mean over the first steps; then the weight follows the rise.
    sums_ = loss.sums(outputs, batch).detach()
    loss.advance(sums_ * torch.tensor([1, 1, 0.5, 1.0], dtype=torch.float64))
    rise = 0.5 * nll(outputs, batch, 1).item()
    weight = min(0.3 * 6**rise + 0.8, 2.8)
    expected = -nll(outputs, batch, 0) + weight * nll(outputs, batch, 1)
    torch.testing.assert_close(loss.of(outputs, batch), expected, rtol=1e-6, atol=1e-6)


def test_what_is_to_be_forgotten_alone_gives_minus_the_gradient_of_cross_entropy() -> None:
    outputs, batch = batch_of(2)
    batch["targets"][:, 1] = -100
    weight = outputs.head.weight  # type: ignore[union-attr]
    (ours,) = torch.autograd.grad(
        create("constrained-unlearning", reduction="mean").of(outputs, batch), weight
    )
    (plain,) = torch.autograd.grad(nll(outputs, batch, 0), weight)
    torch.testing.assert_close(ours, -plain)


def test_equal_sets_with_a_weight_of_one_cancel() -> None:
    outputs, batch = batch_of(2)
    same = Outputs(outputs.hidden[:, :1].expand(-1, 2, -1, -1), outputs.head)
    batch["targets"] = batch["targets"][:, :1].expand(-1, 2, -1)
    loss = create("constrained-unlearning", reduction="mean", least=1.0, most=1.0)
    (gradient,) = torch.autograd.grad(loss.of(same, batch), outputs.hidden)
    assert float(gradient.abs().max()) < 1e-12


def test_ascent_ends_at_the_ceiling() -> None:
    outputs, batch = batch_of(2)
    loss = create("constrained-unlearning", reduction="mean", least=0.0, most=0.0, ceiling=0.5)
    value = loss.of(outputs, batch)
    assert value.item() == -0.5
    (gradient,) = torch.autograd.grad(value, outputs.hidden)
    assert float(gradient.abs().max()) == 0.0


def masked_kl_of(p: Tensor, q: Tensor, masked: list[int]) -> Tensor:
    kept = torch.ones(p.shape[-1], dtype=torch.bool)
    kept[masked] = False
    return (p * (p.log() - q.log()))[..., kept].sum(-1)


def siu(outputs: Outputs, teacher: Outputs, batch: dict[str, Tensor], **values: Any) -> Tensor:
    loss = create("siu", reduction="mean", **values)
    value: Tensor = loss.of(outputs.with_roles({"reference": teacher}), batch)
    return value


def test_siu_is_its_formula_with_gradients() -> None:
    outputs, batch = batch_of(3)
    teacher, _ = batch_of(3, seed=7)
    actual = siu(outputs, teacher, batch)
    valid = batch["targets"][:, 1] != -100
    p, q = (one.logits[:, 1].softmax(-1)[valid] for one in (teacher, outputs))
    s, n = sums(outputs, batch)
    ce = -(s[:, 1:].sum()) / n[:, 1:].sum()
    expected = 0.9 * ce + 0.75 * masked_kl_of(p.detach(), q, [3, 5]).mean()
    torch.testing.assert_close(actual, expected)
    parameters = (outputs.hidden, outputs.head.weight)  # type: ignore[union-attr]
    ours, theirs = (torch.autograd.grad(v, parameters, retain_graph=True) for v in (actual, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_siu_asks_for_the_model_before() -> None:
    outputs, batch = batch_of(3)
    with pytest.raises(UserError, match="siu: needs the outputs of a companion named reference"):
        create("siu", reduction="mean").of(outputs, batch)


def test_masked_divergence_has_its_bound_and_gradient() -> None:
    from lossworks.entries.losses.unlearning.siu import masked_kl

    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 3, V, dtype=torch.float64, generator=generator)
    z.requires_grad_()
    same, targets = Head(torch.eye(V, dtype=torch.float64)), torch.zeros(3, dtype=torch.int64)
    masked = torch.tensor([2, 9])
    p, kept = t.softmax(-1), torch.ones(V, dtype=torch.float64).index_fill(0, masked, 0)
    (gradient,) = torch.autograd.grad(masked_kl((z, same), (t, same), targets, masked, "auto").sum(), z)
    share = (p * kept).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, z.softmax(-1) * share - kept * p)
    # The least value: the old model's shares of what is kept, and nothing of what is masked.
    best = (t.masked_fill(kept == 0, -60.0)).requires_grad_()
    value = masked_kl((best, same), (t, same), targets, masked, "auto")
    torch.testing.assert_close(value, (share * share.log())[:, 0], rtol=1e-9, atol=1e-9)
    # Where nothing has changed the value is 0, and the masked classes still go down.
    at_start = t.clone().requires_grad_()
    value = masked_kl((at_start, same), (t, same), targets, masked, "auto")
    assert float(value.abs().max()) < 1e-12
    (gradient,) = torch.autograd.grad(value.sum(), at_start)
    assert bool((gradient[:, masked] > 0).all())


def test_no_masked_class_is_the_divergence() -> None:
    from lossworks.entries.losses.unlearning.siu import masked_kl

    z, t = torch.randn(2, 3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same, targets = Head(torch.eye(V, dtype=torch.float64)), torch.tensor([0, -100, 1])
    found = masked_kl((z, same), (t, same), targets, torch.empty(0, dtype=torch.int64), "auto")
    expected = F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found, expected * torch.tensor([1.0, 0.0, 1.0]))
