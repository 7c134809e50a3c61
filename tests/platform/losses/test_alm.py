"""Approximate likelihood matching: chunks of two tokenizers, closed forms, and a run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lossworks.data.text.aligned_corpus import aligned, encoded, prepare_aligned, word_starts
from lossworks.data.text.tokenizer import load_tokenizer, token_bytes, train_on
from lossworks.entries.losses.distillation.alm import chunk_loss, log_one_minus, merged_chunks
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.models import Outputs
from lossworks.models.interface import Head
from lossworks.runs import RunFolder
from lossworks.specs import DataSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.weights.start import check_companions, settled
from lossworks_testing.training import last_evaluation, run_in_folder

TEXT = "def add(first, second):\n    return first + second  # söme ünicode → here\n\n" * 12


def tokenizer(size: int) -> Any:
    return train_on([TEXT], DataSpec(vocab_size=size))


def of_own(size: int) -> tuple[Any, str, str, Any]:
    """Return what encoding the text by a tokenizer of so many entries takes."""
    own = tokenizer(size)
    return own, TEXT, "own", token_bytes(own)


def test_a_chunk_is_what_both_ways_of_cutting_share() -> None:
    own = np.array([1, 2, 3, 4, 5]), np.array([2, 4, 5, 8, 9])
    teacher = np.array([6, 7, 8]), np.array([4, 8, 9])
    (row,), lost = aligned(own, teacher, 10)
    assert lost == 0
    assert row[0][1].tolist() == [0, 0, 1, 1, 2]
    assert row[1][1].tolist() == [0, 1, 2]


def test_equal_tokenizers_give_a_chunk_a_token() -> None:
    tokens, ends = encoded(*of_own(270))
    rows, lost = aligned((tokens, ends), (tokens, ends), 16)
    assert lost == 0
    for own, teacher in rows:
        assert own[1].tolist() == teacher[1].tolist() == list(range(len(own[0])))
    assert np.concatenate([own[0] for own, _ in rows]).tolist() == tokens.tolist()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.lists(st.integers(1, 5), max_size=30),
    st.integers(2, 9),
)
def test_rows_hold_whole_chunks_and_the_same_bytes(own: list[int], other: list[int], length: int) -> None:
    total = sum(own)
    ends = sorted({end for end in np.cumsum(other).tolist() if end < total} | {total})
    sides = [np.cumsum(own), np.array(ends)]
    cut = [(np.arange(len(side)), side) for side in sides]
    rows, lost = aligned(cut[0], cut[1], length)
    seen = 0
    for row in rows:
        assert all(0 < len(tokens) <= length for tokens, _ in row)
        assert set(row[0][1].tolist()) == set(row[1][1].tolist()) == set(range(int(row[0][1][-1]) + 1))
        # The last token of a row ends at the same byte both ways.
        assert sides[0][row[0][0][-1]] == sides[1][row[1][0][-1]]
        seen += len(row[0][0])
    assert seen + lost == len(own)


def test_bytes_are_counted_and_other_tokenizers_refused() -> None:
    tokens, ends = encoded(*of_own(300))
    assert ends[-1] == len(TEXT.encode())
    assert len(tokens) == len(ends)
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # noqa: S106 - no password
    with pytest.raises(UserError, match=r"data.teacher_tokenizer: doesn't give back the bytes"):
        encoded(words, "a b", "teacher", token_bytes(words))


def test_words_begin_with_white_space_or_a_texts_end() -> None:
    own = tokenizer(300)
    starts = word_starts(own)
    assert starts[own.token_to_id("<|endoftext|>")]
    assert starts[own.token_to_id("Ġ")]
    assert not starts[own.token_to_id("f")]


def test_log_of_one_minus_is_exact_at_both_ends() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.6931, -0.6932, -5.0, -80.0], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor(
        [math.log1p(-math.exp(v)) if v < -1 else math.log(-math.expm1(v)) for v in x.tolist()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(log_one_minus(x), expected, rtol=1e-12, atol=1e-300)
    (gradient,) = torch.autograd.grad(log_one_minus(x).sum(), x)
    torch.testing.assert_close(gradient, -x.exp() / -torch.expm1(x), rtol=1e-9, atol=0)


def test_the_loss_is_least_where_both_agree_and_its_gradient_vanishes_there() -> None:
    a = torch.tensor([-0.5, -2.0, -7.0], dtype=torch.float64)
    b = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(chunk_loss(b, a, 10.0, 1e-6).sum(), b)
    assert float(gradient.abs().max()) < 1e-12
    p = (a / 10 - 1e-6).exp()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(chunk_loss(a, a, 10.0, 1e-6), entropy)
    other = torch.tensor([-0.6, -1.0, -9.0], dtype=torch.float64)
    assert bool((chunk_loss(other, a, 10.0, 1e-6) > entropy).all())


def test_at_a_large_temperature_it_is_the_divergence_of_two_rates() -> None:
    tau, a, b = 1e6, torch.tensor(-3.0, dtype=torch.float64), torch.tensor(-4.0, dtype=torch.float64)
    p = (a / tau).exp()
    entropy = -(p * p.log() + (1 - p) * torch.log(-torch.expm1(a / tau)))
    limit = 4.0 - 3.0 - 3.0 * math.log(4.0 / 3.0)
    assert float(tau * (chunk_loss(b, a, tau, 0.0) - entropy)) == pytest.approx(limit, rel=1e-4)


def problem(seed: int = 0) -> tuple[Outputs, dict[str, Tensor]]:
    """Return three rows of five tokens in three chunks, of which the last row lacks its end."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    chunks = torch.tensor([[0, 0, 1, 2, 2]]).repeat(3, 1)
    targets[2, 3:], chunks[2, 3:] = -100, -1
    words = torch.arange(11) < 3
    batch = {
        "targets": targets,
        "chunks": chunks,
        "teacher_log_p": -4 * torch.rand(3, 5, dtype=torch.float64, generator=generator),
        "teacher_word_ends": -torch.rand(3, 5, dtype=torch.float64, generator=generator),
        "word_classes": words.expand(3, -1),
    }
    return Outputs(hidden, Head(weight)), batch


@pytest.mark.parametrize("debias", [False, True])
def test_values_and_gradients_are_those_of_the_definition(debias: bool) -> None:
    outputs, batch = problem()
    loss = create("alm", reduction="sum", temperature=7.0, merge=0.0, debias=debias)
    log_p = outputs.logits.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        for chunk in range(3 if row < 2 else 2):
            places = [t for t in range(5) if batch["chunks"][row, t] == chunk]
            b = torch.stack([log_p[row, t, batch["targets"][row, t]] for t in places]).sum()
            a = batch["teacher_log_p"][row, chunk]
            follows = places[-1] + 1
            if debias and follows < 5 and batch["chunks"][row, follows] > chunk:
                b = b + log_p[row, follows, :3].logsumexp(0)
            if debias:
                a = a + batch["teacher_word_ends"][row, chunk]
            total = total + chunk_loss(b, a, 7.0, 1e-6)
    actual = loss.of(outputs, batch)
    torch.testing.assert_close(actual, total)
    assert loss.elements(batch) == 8
    parameters = (outputs.hidden, outputs.head.weight)  # type: ignore[union-attr]
    ours, theirs = (torch.autograd.grad(v, parameters, retain_graph=True) for v in (actual, total))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_chunks_are_merged_where_no_word_ends() -> None:
    chunks = torch.tensor([[0, 1, 1, 2, 3]])
    ends = torch.log(torch.tensor([[0.05, 0.9, 0.1, 0.01]]))
    assert merged_chunks(chunks, ends, 0.1).tolist() == [[0, 0, 1, 1]]
    # The last chunk ends its row, whatever the teacher says.
    assert merged_chunks(chunks, torch.full((1, 4), -9.0), 0.1).tolist() == [[0, 0, 0, 0]]
    outputs, batch = problem()
    never = {**batch, "teacher_word_ends": torch.full((3, 5), -9.0, dtype=torch.float64)}
    found = create("alm", reduction="none", merge=0.1).of(outputs, never)
    log_p = outputs.logits.log_softmax(-1).gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    valid = batch["targets"] >= 0
    own = (log_p * valid).sum(1)
    theirs = torch.stack([batch["teacher_log_p"][row, : 3 if row < 2 else 2].sum() for row in range(3)])
    torch.testing.assert_close(found, chunk_loss(own, theirs, 100.0, 1e-6))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a small trained model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.py").write_text(TEXT * 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(folder))
        return run_in_folder(
            {
                "workers": 1,
                "sharding": "none",
                "steps": 60,
                "batch_size": 8,
                "optimizer": {"lr": 0.01},
                "data": {"corpus": f"text:{folder}/text.py", "vocab_size": 300, "sequence_length": 32},
                "model": {"layers": 1, "width": 32, "heads": 2},
                "evaluation": {"every": 60},
                "tracking": {"model": False},
            },
            "teacher",
        )


def student(teacher: RunFolder, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "task": "cross-tokenizer",
        "workers": 1,
        "sharding": "none",
        "steps": 60,
        "batch_size": 8,
        "optimizer": {"lr": 0.01},
        "roles": {"teacher": str(teacher.path)},
        "data": {
            "corpus": f"text:{teacher.path.parent.parent}/text.py",
            "vocab_size": 262,
            "sequence_length": 48,
        },
        "model": {"layers": 1, "width": 24, "heads": 2},
        "evaluation": {"every": 60},
        "tracking": {"model": False},
    }
    return {**values, **changes}


def test_a_model_of_other_tokens_comes_near_its_teacher(teacher: RunFolder) -> None:
    trained = last_evaluation(run_in_folder(student(teacher), "student"))
    barely = last_evaluation(run_in_folder(student(teacher, steps=1, evaluation={"every": 1}), "barely"))
    assert trained["eval/bits_per_byte"] < 0.5 * barely["eval/bits_per_byte"]
    assert trained["eval/chunk_gap"] < 0.5 * barely["eval/chunk_gap"]
    assert trained["eval/teacher_bits_per_byte"] == pytest.approx(barely["eval/teacher_bits_per_byte"])


def test_the_teachers_tokenizer_is_taken_from_its_run(teacher: RunFolder, tmp_path: Path) -> None:
    spec = settled(parse_train_spec(student(teacher)))
    data: Any = spec.data  # type: ignore[attr-defined]
    assert data.teacher_tokenizer == str((teacher.learnt / "tokenizer.json").absolute())
    corpus = prepare_aligned(data, data.teacher_tokenizer, cache=tmp_path)
    assert (corpus.vocab_size, corpus.teacher_vocab_size) == (262, 300)
    assert load_tokenizer(corpus.tokenizer_path).get_vocab_size() == 262


def test_plain_distillation_from_other_tokens_names_it(teacher: RunFolder) -> None:
    from lossworks.tasks.registry import task_of

    values = student(teacher, task="language-model", loss="distillation")
    values["data"] = {**values["data"], "tokenizer": None}
    spec = parse_train_spec(values)
    with pytest.raises(UserError, match="alm"):
        check_companions(spec, task_of(spec).open(spec, None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"roles": {}}, "learns from a companion named teacher"),
        ({"roles": {"teacher": "start"}}, "learns from a companion named teacher"),
        ({"data": {"corpus": "docstrings"}}, "can't be combined with task=cross-tokenizer"),
        ({"loss": "dpo"}, "loss.name=dpo can't train task=cross-tokenizer"),
    ],
)
def test_wrong_specs_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_train_spec({"task": "cross-tokenizer", **changes})
