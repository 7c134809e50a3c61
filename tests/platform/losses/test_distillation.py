"""Distillation: divergences from a teacher's head are those of their definitions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.losses.objective import Objective
from lossworks.models.interface import Head, Outputs
from lossworks.specs import LossSpec
from lossworks.tasks.analyses import Probe

KINDS = ("forward-kl", "reverse-kl", "jensen-shannon", "total-variation")
SETTINGS = [
    *({"divergence": kind, "temperature": 1.7, "beta": 0.3} for kind in KINDS),
    *({"divergence": kind, "top_k": 3, "scaled": False, "temperature": 0.8} for kind in KINDS),
    {"top_k": 100},  # more than there are classes
    {},
]
by_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


class NoLogits(Outputs):
    """Outputs whose logits must not be asked for."""

    @property
    def logits(self) -> Tensor:
        raise AssertionError("the logits were built")


def problem(dtype=torch.float64, softcap=None):
    """Return features (2, 3, 5) and head of a model, those of a wider teacher, and targets, one ignored."""
    g = torch.Generator().manual_seed(0)
    e, c, b = (torch.randn(s, dtype=dtype, generator=g) for s in ((2, 3, 5), (11, 5), (11,)))
    teacher = [torch.randn(s, dtype=dtype, generator=g) for s in ((2, 3, 8), (11, 8), (11,))]
    own = [x.requires_grad_() for x in (e, c, b)]
    theirs = NoLogits(teacher[0], Head(teacher[1], teacher[2], 3.0))
    y = torch.randint(0, 11, (2, 3), generator=g)
    y[0, 1] = -100
    return own, NoLogits(e, Head(c, b, softcap), roles={"teacher": theirs}), y


def capped(outputs: Outputs) -> Tensor:
    """Return the dense logits, float64."""
    head = outputs.head
    z = outputs.hidden.double() @ head.weight.double().T + head.bias.double()
    return z if head.softcap is None else head.softcap * (z / head.softcap).tanh()


def by_definition(z: Tensor, t: Tensor, divergence="forward-kl", temperature=1.0, beta=0.5, **settings):
    """The sums over classes, as papers write them, of logits (..., K)."""
    p, q = (z / temperature).softmax(-1), (t / temperature).softmax(-1)
    k = settings.get("top_k")
    if k is not None and k < z.shape[-1]:
        best = q.topk(k, dim=-1).indices
        p, q = (x.gather(-1, best) for x in (p, q))
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    m = beta * q + (1 - beta) * p
    value = {
        "forward-kl": (q * (q / p).log()).sum(-1),
        "reverse-kl": (p * (p / q).log()).sum(-1),
        "jensen-shannon": (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1),
        "total-variation": (p - q).abs().sum(-1) / 2,
    }[divergence]
    return value * (temperature**2 if settings.get("scaled", True) else 1)


@by_setting
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_are_those_of_the_definition(settings, softcap):
    """Without logits and with them, weighted, under every reduction."""
    own, outputs, y = problem(softcap=softcap)
    z, t = capped(outputs), capped(outputs.roles["teacher"])
    weight = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[1, 2] = 0
    expected = torch.where(y == -100, 0, weight * by_definition(z, t, **settings))
    batch = {"targets": y, "weight": weight}
    for reduction in ("none", "sum", "mean"):
        loss = create("distillation", reduction=reduction, **settings)
        right = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / weight[y != -100].sum()}
        upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(2, 3)
        upstream = upstream if reduction == "none" else upstream[1, 1]
        for found in (loss.of(outputs, batch), loss(z, y, teacher=t, weight=weight)):
            torch.testing.assert_close(found, right[reduction], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(
                torch.autograd.grad((found * upstream).sum(), own, retain_graph=True),
                torch.autograd.grad((right[reduction] * upstream).sum(), own, retain_graph=True),
                rtol=1e-8,
                atol=1e-10,
            )


@by_setting
def test_gradients_are_those_of_finite_differences(settings):
    own, outputs, y = problem()
    loss = create("distillation", reduction="none", **settings)
    theirs = {"teacher": outputs.roles["teacher"]}

    def of(e, c, b):
        return loss.of(NoLogits(e, Head(c, b), roles=theirs), {"targets": y})

    assert torch.autograd.gradcheck(of, tuple(own))


def test_what_an_ignored_row_holds_reaches_nothing():
    """Of the model or the teacher, with all classes and with the best."""
    for settings in ({}, {"top_k": 3}):
        found = []
        for blank in (0.0, torch.nan):
            own, outputs, y = problem()
            with torch.no_grad():
                outputs.hidden[0, 1] = outputs.roles["teacher"].hidden[0, 1] = blank
            value = create("distillation", **settings).of(outputs, {"targets": y})
            found.append((value.detach(), *torch.autograd.grad(value, own)))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        assert all(tensor.isfinite().all() for tensor in found[0])


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"divergence": "jensen-shannon"}], ids=str)
def test_narrow_inputs_are_read_in_float32(settings):
    """Under autocast, too, as near to the rounded inputs' truth as float32 allows."""
    _, outputs, y = problem()
    narrow = [
        NoLogits(
            o.hidden.detach().bfloat16(), Head(o.head.weight.detach().bfloat16(), o.head.bias.bfloat16())
        )
        for o in (outputs, outputs.roles["teacher"])
    ]
    loss = create("distillation", reduction="none", **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.of(narrow[0].with_roles({"teacher": narrow[1]}), {"targets": y})
    expected = by_definition(*(capped(o) for o in narrow), **settings)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.where(y == -100, 0, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_it_is_the_loss_of_gkd_where_definitions_agree(beta):
    """As TRL and Liger have it: batch means of KL divergences from the mixture, plain ones at its ends."""
    _, outputs, y = problem()
    student, teacher = (
        (capped(o) / 1.3).log_softmax(-1)[y != -100] for o in (outputs, outputs.roles["teacher"])
    )
    shares = torch.tensor([1 - beta, beta], dtype=torch.float64).log()
    mixture = torch.logsumexp(torch.stack([student + shares[0], teacher + shares[1]]), dim=0)

    def kl(log_q, log_p):
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    mixed = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    expected = {0.0: kl(teacher, student), 1.0: kl(student, teacher)}.get(beta, mixed)
    settings = {0.0: {}, 1.0: {"divergence": "reverse-kl"}}.get(
        beta, {"divergence": "jensen-shannon", "beta": beta}
    )
    found = create("distillation", temperature=1.3, scaled=False, **settings).of(outputs, {"targets": y})

    torch.testing.assert_close(found, expected)


def test_at_a_large_temperature_it_compares_logits():
    """τ²·KL → Σ ((z − z̄) − (t − t̄))²/2K for zero-mean logits (Hinton, Vinyals, Dean 2015, equation 4)."""
    _, outputs, y = problem()
    z, t = (capped(o) for o in (outputs, outputs.roles["teacher"]))
    gap = (z - z.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    found = create("distillation", reduction="none", temperature=1e4).of(outputs, {"targets": y})

    torch.testing.assert_close(found[y != -100], (gap.square().sum(-1) / 22)[y != -100], rtol=1e-3, atol=1e-5)


def test_the_teacher_s_logits_must_fit():
    z, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="distillation: needs the teacher's logits: teacher="):
        create("distillation")(z, y)
    with pytest.raises(UserError, match=r"distillation: teacher \(2, 4\) must be \(2, 3\)"):
        create("distillation")(z, y, teacher=torch.zeros(2, 4))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_sum_with_cross_entropy_shares_the_pass(softcap):
    """Each term has its own value; the gradient is theirs, weighted, for one more product than one takes."""
    own, outputs, y = problem(softcap=softcap)
    terms = [
        {"name": "distillation", "weight": 0.4, "temperature": 2.0},
        {"name": "cross-entropy", "weight": 0.5},
        {"name": "comp-sum", "weight": -0.1, "tau": 1.7},
    ]
    objective = Objective(LossSpec.parse({**terms[0], "plus": terms[1:]}))
    with FlopCounterMode(display=False) as counter:
        sums = objective(outputs, {"targets": y})
        total = objective.total(sums, [5.0] * 3)
        total.backward()
    flops = counter.get_total_flops()
    found = [x.grad.clone() for x in own]
    z, t = capped(outputs), capped(outputs.roles["teacher"])
    valid = y != -100
    expected = [
        by_definition(z, t, temperature=2.0)[valid].sum(),
        F.cross_entropy(z[valid], y[valid], reduction="sum"),
        create("comp-sum", reduction="sum", tau=1.7)(z, y),
    ]
    right = sum(w * value / 5 for w, value in zip((0.4, 0.5, -0.1), expected, strict=True))

    torch.testing.assert_close(list(sums), expected)
    torch.testing.assert_close(total, right)
    torch.testing.assert_close(found, list(torch.autograd.grad(right, own)))
    if softcap is None:
        with FlopCounterMode(display=False) as counter:
            create("cross-entropy").of(outputs, {"targets": y}).backward()
        assert flops - counter.get_total_flops() == 2 * 5 * 11 * 8


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_entropy_of_tokens_is_that_of_the_logits(softcap):
    """With a head and of logits that are there, of the rows that count."""
    _, outputs, y = problem(softcap=softcap)
    log_p = capped(outputs).log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1)[y != -100].mean()
    for seen in (outputs, Outputs(outputs.hidden, None, dense=capped(outputs))):

        def over(measure, data, rows, seen=seen):
            return measure(seen, {"targets": y})

        probe = Probe(SimpleNamespace(held_out=None), over, None, torch.nn.Identity())
        found = create("token-entropy").measure(probe).figures

        assert found["token_entropy"] == pytest.approx(expected.item(), rel=1e-12)
