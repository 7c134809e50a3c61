"""Prompts with answers: records, chat templates, tokens of which the answers count, packing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lossworks.data import load_tokenizer
from lossworks.data.answers import AnswerCorpus, AnswerRecord, answered, facts, prepare_answers, records_of
from lossworks.data.answers.encoded import _packed
from lossworks.data.answers.generated import docstring_pairs, wrong_docstrings
from lossworks.data.answers.records import read_examples, read_preferences
from lossworks.data.answers.templates import ChatTemplate
from lossworks.data.batch import IGNORE_INDEX
from lossworks.errors import UserError
from lossworks.specs import DataSpec

PLAIN = ChatTemplate.find(None, None)


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def prepared(path: Path, records: list[dict[str, Any]], cache: Path, **data: Any) -> AnswerCorpus:
    file = written(path, records)
    spec = DataSpec.parse({"corpus": f"pairs:{file}", "vocab_size": 258, **data})
    return prepare_answers(records_of(spec), spec, packed=spec.packed, cache=cache)


def decoded(corpus: AnswerCorpus, tokens: list[int]) -> str:
    found = load_tokenizer(corpus.tokenizer_path).decode(tokens, skip_special_tokens=False)
    return str(found)


def test_the_answer_counts_and_the_prompt_does_not(tmp_path: Path) -> None:
    corpus = prepared(
        tmp_path / "a.jsonl",
        [{"prompt": "two and two", "answer": " is four"}, {"prompt": "", "answer": "no prompt"}],
        tmp_path,
        sequence_length=64,
    )
    batch = corpus.all().batch(np.array([0, 1]))
    assert batch["inputs"].shape == batch["targets"].shape
    assert batch["inputs"].shape[1] % 8 == 0
    first, second = ([token for token in row if token != IGNORE_INDEX] for row in batch["targets"].tolist())
    assert decoded(corpus, first) == " is four<|endoftext|>"
    assert decoded(corpus, second) == "no prompt<|endoftext|>"
    tokens, counted = corpus.sequence(0)
    assert decoded(corpus, tokens.tolist()) == "<|endoftext|>two and two is four<|endoftext|>"
    assert not counted[0]


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    records = [{"prompt": "ab" * n, "answer": "cd" * (n + 1)} for n in range(1, 6)]
    corpus = prepared(tmp_path / "a.jsonl", records, tmp_path, sequence_length=64)
    batch = corpus.all().batch(np.arange(5))
    inputs, targets = batch["inputs"][:, 1:], batch["targets"][:, :-1]
    there = (targets != IGNORE_INDEX) & (inputs != 0)
    assert bool((inputs[there] == targets[there]).all())


def test_records_too_long_are_left_out_counted_and_named(tmp_path: Path) -> None:
    records = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "a" * 50, "answer": "b"},
        {"prompt": "c", "answer": "d"},
    ]
    corpus = prepared(tmp_path / "a.jsonl", records, tmp_path, sequence_length=16)
    assert corpus.records == 2
    (note,) = corpus.notes
    assert "1 of 3 records" in note
    assert "a.jsonl, line 2" in note
    assert "sequence_length=16" in note


def test_nothing_that_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.sequence_length=4: no record fits"):
        prepared(tmp_path / "a.jsonl", [{"prompt": "a" * 50, "answer": "b"}], tmp_path, sequence_length=4)


def test_one_record_can_not_be_split(tmp_path: Path) -> None:
    corpus = prepared(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}], tmp_path)
    with pytest.raises(UserError, match="only 1 record"):
        corpus.split(DataSpec())


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "answer": " "}, "line 2: answer is empty"),
        ({"prompt": "a"}, "line 2: lacks answer; there are: prompt"),
        ({"prompt": 3, "answer": "b"}, "line 2: prompt holds a int; must hold text"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 2: messages hold none of the role assistant",
        ),
        ({"messages": "a"}, "line 2: messages must be a list"),
        ({"messages": [{"role": "assistant"}]}, "line 2: messages must be objects with role and content"),
        (
            {"messages": [{"role": "assistant", "content": ""}]},
            "line 2: message 1, of the assistant, is empty",
        ),
    ],
)
def test_wrong_records_are_named_by_line(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    file = written(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}, record])
    with pytest.raises(UserError, match=said):
        list(read_examples(file, PLAIN))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b"}, "lacks rejected"),
    ],
)
def test_wrong_preferences_are_named(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    file = written(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=f"a.jsonl, line 1: {said}"):
        list(read_preferences(file, PLAIN))


@pytest.mark.parametrize(("name", "said"), [("a.csv", "unknown suffix"), ("b.jsonl", "holds no record")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=said):
        list(read_examples(tmp_path / name, PLAIN))


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    lines = list(read_examples(written(tmp_path / "a.jsonl", records), PLAIN))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    rows = list(read_examples(tmp_path / "a.parquet", PLAIN))
    assert [record.candidates for record in lines] == [record.candidates for record in rows]
    assert rows[1].place.endswith("a.parquet, row 2")


def test_all_answers_of_a_conversation_count() -> None:
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
    example = PLAIN.example(messages, "here")
    assert "".join(span.text for span in example) == (
        "system: be short\nuser: one?\nassistant: 1\nuser: two?\nassistant: 2\n"
    )
    assert [span.text for span in example if span.counts] == ["1\n", "2\n"]


def test_the_template_beside_a_tokenizer_is_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<s>"},
                "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
                "{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% endif %}",
            }
        )
    )
    template = ChatTemplate.find(None, str(tmp_path / "tokenizer.json"))
    example = template.example(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "here"
    )
    assert [tuple(span) for span in example] == [("<s>[user]hi[assistant]", False), ("yo", True)]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for %}", "is no chat template"),
        ("{{ raise_exception('no system') }}", "can't write these messages: ValueError: no system"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can't write these messages: SecurityError"),
        ("{{ messages | length }}", "doesn't write messages one behind the other"),
    ],
)
def test_wrong_templates_are_refused(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "t.jinja").write_text(source)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with pytest.raises(UserError, match=said):
        ChatTemplate.find(str(tmp_path / "t.jinja"), None).example(messages, "here")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(8, 20))
def test_packing_keeps_every_answer_and_overfills_nothing(lengths: list[int], room: int) -> None:
    sequences = [
        (np.array([0, *range(10 * n, 10 * n + size - 2), 0]), np.array([False] * (size - 1) + [True]))
        for n, size in enumerate(lengths, start=1)
    ]
    packed = _packed(sequences, room)
    assert all(len(tokens) <= room + 1 for tokens, _ in packed)
    answers = [token for tokens, counted in packed for token in tokens[counted]]
    assert len(answers) == len(lengths)
    # Between texts the token that ends one stands once, and begins the next.
    texts = [token for tokens, _ in packed for token in tokens if token]
    assert texts == [token for tokens, _ in sequences for token in tokens if token]


def test_packed_answers_stand_in_fewer_sequences(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "answer": "cd"} for _ in range(10)]
    corpus = prepared(tmp_path / "a.jsonl", records, tmp_path, sequence_length=20, packed=True)
    assert corpus.records == 3
    batch = corpus.all().batch(np.arange(3))
    assert int((batch["targets"] != IGNORE_INDEX).sum()) == 10 * 3


def test_what_stands_in_the_cache_is_found_again(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "answer": "cd"}, {"prompt": "x", "answer": "y"}]
    first = prepared(tmp_path / "a.jsonl", records, tmp_path)
    again = prepared(tmp_path / "b.jsonl", records, tmp_path)
    assert first.folder == again.folder
    changed = prepared(tmp_path / "a.jsonl", records[::-1], tmp_path)
    assert changed.folder != first.folder
    assert changed.fingerprint != first.fingerprint


def test_candidates_are_an_axis_and_a_missing_one_counts_for_nothing(tmp_path: Path) -> None:
    records = [
        AnswerRecord("one", (answered("p", "a"), answered("p", "bb")), {"degrees": (0, 1)}),
        AnswerRecord("two", (answered("q", "c"), ()), {"degrees": (0, -100)}),
    ]
    corpus = prepare_answers(records, DataSpec(vocab_size=258), cache=tmp_path)
    batch = corpus.all().batch(np.array([0, 1]))
    assert batch["inputs"].shape[:2] == (2, 2)
    assert (batch["targets"] != IGNORE_INDEX).any(-1).tolist() == [[True, True], [True, False]]
    assert batch["degrees"].tolist() == [[0, 1], [0, -100]]


def test_generated_sets_are_what_they_say() -> None:
    found = facts(50)
    assert len({fact.subject for fact in found} | {fact.answer for fact in found}) == 100
    assert all(fact.subject in fact.prompt for fact in found)
    assert facts(50) == found
    assert facts(50, seed=1) != found
    right, wrong = docstring_pairs(), wrong_docstrings()
    assert len(right) == len(wrong) > 500
    assert all(record.candidates[0] != record.candidates[1] for record in wrong)
    assert [record.candidates[0] for record in wrong] == [record.candidates[0] for record in right]
    # Of a half, every docstring is chosen once and rejected once: only the signature tells.
    half = wrong[: len(wrong) // 4 * 2]
    chosen, rejected = ([record.candidates[place][-1] for record in half] for place in (0, 1))
    assert sorted(chosen) == sorted(rejected)
