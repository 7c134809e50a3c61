"""Entropies of attention, the penalty on them, and models without norms and activations."""

import math
from pathlib import Path

import pytest
import torch

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.catalogue.registry import create
from lossworks.entries.losses.sequences.attention_entropy import entropy_penalty, mean_entropies
from lossworks.errors import UserError
from lossworks.models import build_model
from lossworks.models.huggingface import probability_entropies
from lossworks.models.layers import Attention, Block, Temperatures, make_norm, rotation
from lossworks.specs import ModelSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.optimizer import OBJECTIVE
from lossworks.training.planning.rehearsal import rehearse
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, prepared, run_several, run_training, tiny_spec

TINY = ModelSpec(layers=2, width=16, heads=4, kv_heads=2, hidden=24, qk_norm=True)
BARE = ModelSpec(layers=3, width=16, heads=2, norm="none", activation="none", attention_temperature="exp")
TOKENS = torch.randint(30, (3, 10), generator=torch.Generator().manual_seed(2))
PENALTY = {"name": "attention-entropy", "weight": 0.1, "margin": 0.01}
LOSSES = [{"name": "cross-entropy"}, PENALTY]


def dense_entropies(attention, x, seen):
    """Return the entropies (B, H, L) from probabilities that are written out in float64."""
    length = x.shape[1]
    parts = attention.qkv(x).split(attention.sizes, dim=-1)
    query, key, _ = (part.unflatten(-1, (-1, attention.head_features)).double() for part in parts)
    query, key = (
        norm.double()(part) for norm, part in ((attention.query_norm, query), (attention.key_norm, key))
    )
    angles = rotation(torch.arange(length, dtype=torch.float64), attention.head_features, 10000.0)
    turned = []
    for part in (query, key):
        first, second = part.chunk(2, dim=-1)
        cos, sin = angles
        turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    key = turned[1].repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", turned[0], key) / math.sqrt(attention.head_features)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.special.entr(p).sum(-1)


@pytest.mark.parametrize("isolated", [False, True])
def test_entropies_are_those_of_the_attention_and_change_nothing(isolated):
    """With grouped heads, documents apart, several answers to a prompt; features keep every bit."""
    model = build_model(TINY, vocab_size=30, seed=0)
    with torch.no_grad():
        for block in model.blocks():
            block.attention.qkv.weight.mul_(20.0)
    if isolated:
        model.isolate(int(TOKENS[0, 4]))
    document = TOKENS.eq(TOKENS[0, 4]).cumsum(1) if isolated else torch.zeros_like(TOKENS)
    seen = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(10, 10).bool().tril()
    plain = model.outputs(TOKENS)
    asked = plain.attention_entropies
    model.observe_attention()
    observed = model.outputs(TOKENS)
    first = model.layers[0]
    expected = dense_entropies(first.attention, first.attention_norm(model.embedding(TOKENS)), seen)

    assert observed.attention_entropies.shape == (3, 2, 4, 10)
    assert torch.equal(observed.hidden, plain.hidden)
    assert torch.equal(observed.attention_entropies, asked)
    torch.testing.assert_close(asked[:, 0].double(), expected, rtol=1e-4, atol=1e-5)
    several = model.outputs(TOKENS[:2].unflatten(0, (1, 2)))
    assert several.attention_entropies.shape == (1, 2, 2, 4, 10)


def test_uniform_causal_attention_and_one_hot_attention():
    """The mean of log n over 128 queries is log(128!)/128 = 3.878, where log T is 4.852."""
    model = build_model(ModelSpec(layers=1, width=8, heads=2), vocab_size=5, seed=0)
    tokens = torch.arange(128)[None] % 5
    weight = model.layers[0].attention.qkv.weight
    every = torch.ones(1, 128, dtype=torch.bool)

    def means():
        return mean_entropies(model.outputs(tokens).attention_entropies.detach(), every)

    with torch.no_grad():
        weight[:16].zero_()
        uniform, largest = means()
        assert uniform.flatten().tolist() == pytest.approx([math.lgamma(129) / 128] * 2, rel=1e-5)
        assert float(uniform[0, 0, 0]) == pytest.approx(3.878, abs=1e-3)
        assert float(largest) == pytest.approx(4.852, abs=1e-3)
        weight[:16].normal_(std=1e4, generator=torch.Generator().manual_seed(0))
        # Tokens repeat, so that a query finds equal keys only up to rotation.
        assert float(means()[0].max()) < 1e-2


def test_the_penalty_is_nothing_within_the_margin_and_the_square_beyond():
    means = torch.tensor([[[1.0, 2.0], [3.0, 3.9]]], dtype=torch.float64)
    largest = torch.tensor([4.0], dtype=torch.float64)
    thresholds = torch.tensor([[0.5, 0.5], [0.5, 0.75]], dtype=torch.float64)
    expected = torch.tensor([[[1.0, 0.0], [1.0, 0.9**2]]], dtype=torch.float64)

    torch.testing.assert_close(entropy_penalty(means, largest, thresholds, 0.2), expected)
    assert entropy_penalty(means, largest, thresholds, 0.26).tolist() == [[[0, 0], [0, 0]]]


def test_sequences_are_averaged_before_the_penalty_and_filling_does_not_count():
    loss = create("attention-entropy", margin=0.0, reduction="none")
    entropies = torch.rand(2, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, 3, 4, 5], [-100, 2, 3, -100, -100]])
    whole = (entropies[0].mean(-1) - 0.5 * math.log(5)).square().mean()
    part = (entropies[1, :, :, 1:3].mean(-1) - 0.5 * math.log(3)).square().mean()
    longer = torch.cat((entropies, torch.full((2, 3, 2, 4), torch.nan)), dim=-1)
    filled = torch.cat((targets, torch.full((2, 4), -100)), dim=1)

    torch.testing.assert_close(loss(entropies, targets), torch.stack((whole, part)))
    torch.testing.assert_close(loss(longer, filled), torch.stack((whole, part)))
    assert int(loss.count(torch.cat((targets, torch.full((1, 5), -100))))) == 2


def test_gradients_are_finite_where_probabilities_are_nothing():
    """Of probabilities that a library gives, and of scores so far apart that they vanish."""
    scores = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    value = probability_entropies(scores.softmax(-1)).sum()
    value.backward()
    exact = torch.special.entr(torch.tensor([0.0, 1.0]).softmax(-1)).sum()
    torch.testing.assert_close(value, exact)
    assert scores.grad.isfinite().all()

    model = build_model(TINY, vocab_size=30, seed=0)
    with torch.no_grad():
        model.layers[0].attention.query_norm.weight.fill_(1e4)
    model.outputs(TOKENS).attention_entropies.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["exp", "softplus"])
def test_temperatures_divide_the_scores_of_their_head_and_position(kind):
    """All 1 changes nothing; a position beyond the last has the last's."""
    torch.manual_seed(0)
    spec = ModelSpec(
        layers=1, width=8, heads=2, attention_temperature=kind, temperature_init=0.7, temperature_positions=3
    )
    temperatures = Temperatures(spec)
    assert temperatures(torch.arange(5)).flatten().tolist() == pytest.approx([0.7] * 10)

    one = spec.model_copy(update={"temperature_init": 1.0})
    attention, plain = Attention(one).double(), Attention(ModelSpec(layers=1, width=8, heads=2)).double()
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if k != "temperatures.raw"})
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    angles = rotation(torch.arange(5, dtype=torch.float64), 4, 10000.0)
    torch.testing.assert_close(attention(x, *angles), plain(x, *angles))

    with torch.no_grad():
        attention.temperatures.raw.normal_()
        t = attention.temperatures(torch.arange(5))[..., 0]
        _, entropies = attention(x, *angles, observed=True)
        parts = attention.qkv(x).split(8, dim=-1)[:2]
        query, key = (part.unflatten(-1, (2, 4)) for part in parts)
        cos, sin = angles
        query, key = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
            for a, b in (part.chunk(2, -1) for part in (query, key))
        )
        scores = torch.einsum("bihd,bjhd->bhij", query, key) / (2.0 * t.T[None, :, :, None])
        p = scores.masked_fill(torch.ones(5, 5).bool().triu(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(entropies.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(t[4], t[2])
    assert (t[1] - t[2]).abs().min() > 1e-3


def test_a_block_without_norm_and_activation_is_its_formula():
    """β·x + (1/α)·x·W after attention, whose input is x itself; α and β are learnt."""
    torch.manual_seed(0)
    block = Block(ModelSpec(layers=1, width=8, heads=2, norm="none", activation="none")).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    angles = rotation(torch.arange(5, dtype=torch.float64), 4, 10000.0)
    with torch.no_grad():
        block.scales.copy_(torch.tensor([0.5, 3.0]))
    read = x + block.attention(x, *angles)

    torch.testing.assert_close(
        block(x, *angles), 3.0 * read + (read @ block.feed_forward.down.weight.T) / 0.5
    )
    assert block.scales.requires_grad
    assert isinstance(make_norm(BARE), torch.nn.Identity)
    model = build_model(BARE, vocab_size=30, seed=0)
    assert [tuple(one.scales.tolist()) for one in model.layers] == [(1.0, 1.0)] * 3
    # 3·(qkv, output and the merged layer), the scales, the temperatures, and the embedding.
    assert sum(p.numel() for p in model.parameters()) == 3 * (5 * 256 + 2 + 2 * 256) + 30 * 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def values_of(text, **changes):
    changes = {"loss": LOSSES, "analyses": ["head-entropies"], **changes}
    return tiny_spec(text, model={"layers": 2, "width": 16, "heads": 2}, **changes).model_dump(mode="json")


def own(result):
    (thresholds,) = tensors_in(Path(result["checkpoint"]), f"model.{OBJECTIVE}.").values()
    return thresholds


def test_a_weight_of_nothing_trains_as_without(text, tmp_path):
    """Every bit of every loss, and of the model in the checkpoint."""
    runs = [
        (values_of(text, loss=loss, optimizer={"clip_norm": None}), str(tmp_path / name))
        for name, loss in (("plain", "cross-entropy"), ("zero", ["cross-entropy", {**PENALTY, "weight": 0}]))
    ]
    plain, zero = run_several(runs, None)
    weights = [tensors_in(Path(run["checkpoint"]), "model.") for run in (plain, zero)]

    assert losses(plain) == losses(zero)
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert plain["metrics"]["eval/mean_entropy"] == zero["metrics"]["eval/mean_entropy"]
    assert torch.equal(own(zero), torch.full((2, 2), 0.5))


def test_it_is_exact_in_micro_batches_and_goes_on_to_the_last_bit(text, tmp_path):
    runs = [
        (values_of(text), str(tmp_path / "whole")),
        (values_of(text, micro_batch_size=4), str(tmp_path / "micro")),
    ]
    whole, micro = run_several(runs, None)
    stopped = run_training(values_of(text), None, str(tmp_path / "parts"), stop_after=3)
    rest = run_training(values_of(text), None, str(tmp_path / "parts"))

    assert losses(micro) == pytest.approx(losses(whole), rel=1e-5)
    torch.testing.assert_close(own(micro), own(whole), rtol=1e-4, atol=1e-6)
    assert (own(whole) != 0.5).all()
    assert losses(stopped) + losses(rest) == losses(whole)
    assert torch.equal(own(rest), own(whole))
    assert 0 <= whole["metrics"]["eval/uniform_heads"] <= 1
    assert whole["rows"][0][1]["train/loss/attention-entropy"] > 0


@pytest.mark.slow
def test_it_is_the_same_split_over_ranks(text, tmp_path):
    """As replicas and with split parameters, its thresholds among them."""
    bare = {"layers": 2, "width": 16, "heads": 2, "norm": "none", "activation": "none",
            "attention_temperature": "softplus"}  # fmt: skip
    values = {**values_of(text), "model": bare}
    corpus = str(prepared(parse_train_spec(values)).folder)
    alone = run_training(values, corpus, str(tmp_path / "alone"))
    runs = [
        ({**values, "workers": 2, "sharding": {"kind": kind}, "activation_checkpointing": kind == "fsdp"},
         str(tmp_path / kind))
        for kind in ("ddp", "fsdp")
    ]  # fmt: skip

    for result in run_ranks(2, run_several, runs, corpus, folder=tmp_path)[0]:
        assert losses(result) == pytest.approx(losses(alone), rel=1e-4)
        torch.testing.assert_close(own(result), own(alone), rtol=1e-3, atol=1e-5)
        for figure in ("eval/mean_entropy", "eval/mean_deviation"):
            assert result["metrics"][figure] == pytest.approx(alone["metrics"][figure], rel=1e-4)


def test_figures_of_heads_are_those_of_the_model_and_drawn(text):
    """Half of the heads read everything alike, the others a single token."""
    from lossworks.tasks.registry import task_of
    from lossworks.training.distributed.world import World
    from lossworks.training.evaluation import analysed

    spec = parse_train_spec(values_of(text, loss="cross-entropy"))
    task = task_of(spec).open(spec, None)
    model = task.build_model()
    with torch.no_grad():
        for block in model.layers:
            block.attention.qkv.weight[:32].zero_()
    analysis = create("head-entropies", threshold=0.25)
    found = analysed(model, task, World.current(), analysis, limit=7, micro_batch_size=3, bf16=False)
    share = math.lgamma(17) / 16 / math.log(16)
    curves = {"uniform_heads": ([3, 6], [1.0, 0.5]), "loss": ([3, 6], [9.0, 8.0])}
    picture = analysis.draw(found.pictured, curves)

    assert found.pictured["share"] == [pytest.approx([share] * 2)] * 2
    assert found.figures["mean_entropy"] == pytest.approx(share)
    assert found.figures["mean_deviation"] == pytest.approx((share - 0.25) * math.log(16))
    assert found.figures["uniform_heads"] == float(share > 0.75)
    assert [len(axes.lines) for axes in picture.axes] == [0, 0, 1]


def test_a_plan_follows_it(text):
    """Before anything starts: the pass with its entropies takes memory that the plan knows of."""
    plain, penalised = (parse_train_spec(values_of(text, loss=loss)) for loss in ("cross-entropy", LOSSES))

    assert rehearse(penalised).peak_bytes > rehearse(plain).peak_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "attention-entropy"}, "attention-entropy says nothing of the targets: put a loss of those"),
        ({"telemetry": 2}, "telemetry looks at the losses of single tokens, and attention-entropy has none"),
        ({"sharding": {"kind": "fsdp", "vocab_parallel": True}, "model": {"tied": False}},
         "loss.name=attention-entropy can't be combined with sharding.vocab_parallel=true"),
        ({"model": {"attention_temperature": "exp", "temperature_positions": 8}},
         "model.temperature_positions=8 must be at least data.sequence_length=16"),
        ({"model": {"activation": "none", "hidden": 8}}, "hidden=8 has no effect with activation=none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(text, changes, message):
    values = {**tiny_spec(text).model_dump(mode="json"), "loss": ["cross-entropy", PENALTY]}
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change

    with pytest.raises(UserError) as caught:
        parse_train_spec(values)
    assert message in str(caught.value)
