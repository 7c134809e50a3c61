"""Texts behind prompts, and how often they are right."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lossworks.cli import main
from lossworks.data.text.tokenizer import train_tokenizer
from lossworks.errors import UserError
from lossworks.models import Head, LanguageModel, TextGenerator, build_model, save_model
from lossworks.models.generation.checking import CheckerProgram, Judgement, PassRates, check_all, exact_match
from lossworks.models.generation.sampling import Sampling
from lossworks.models.generation.texts import Continuation, Writing
from lossworks.specs import DataSpec, ModelSpec

TEXT = "the naïve cat sat on the mat; the end of the mat was near. "
END = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return train_tokenizer(DataSpec(corpus=f"text:{path}", vocab_size=270))


class Recited(LanguageModel):
    """A model whose likeliest tokens are those of a text, whatever it reads."""

    def __init__(self, tokens, size):
        super().__init__()
        self.tokens, self.weight = tokens, nn.Parameter(100 * torch.eye(size))

    def hidden(self, inputs):
        raise NotImplementedError

    def head(self):
        return Head(self.weight)

    def blocks(self):
        return []

    def checkpoint_activations(self):
        pass

    def depth_and_width(self):
        return None

    def attention_shape(self):
        raise NotImplementedError

    def observed(self, tokens):
        raise NotImplementedError

    def reader(self, *_):
        left = iter(self.tokens)

        def read(tokens, valid):
            place = next(left)
            return nn.functional.one_hot(torch.tensor([place] * len(tokens)), len(self.weight)).float()

        return SimpleNamespace(read=read, keep=lambda rows: None)


def recited(tokenizer, text, **how):
    """Return the continuation of a model that says a text and then ends the document."""
    tokens = [*tokenizer.encode(text).ids, END]
    model = Recited(tokens, tokenizer.get_vocab_size())
    ((found,),) = TextGenerator(model, tokenizer, [END]).continuations(["so"], Writing(**how))
    return found


def test_a_continuation_ends_with_the_document_or_where_there_is_no_more_room(tokenizer):
    count = len(tokenizer.encode(TEXT).ids)

    assert recited(tokenizer, TEXT, tokens=100) == Continuation(TEXT, count + 1, "end")
    cut = recited(tokenizer, TEXT, tokens=2)
    assert (cut.tokens, cut.ended) == (2, "length")
    assert TEXT.startswith(cut.text)


@pytest.mark.parametrize("stop", ["naïve cat", "cat sat", " mat;", "t on the mat; the end", "ï", "he n", "."])
def test_a_stop_string_ends_a_text_wherever_tokens_begin(tokenizer, stop):
    """It appears within a token, over several, or ends in the middle of one; no more tokens are made."""
    found = recited(tokenizer, TEXT, tokens=100, stop=(stop, "never"))
    needed = next(
        count for count in range(1, 100) if stop in tokenizer.decode(tokenizer.encode(TEXT).ids[:count])
    )

    assert found == Continuation(TEXT[: TEXT.index(stop)], needed, "stop")


def test_the_first_of_several_stop_strings_counts(tokenizer):
    assert recited(tokenizer, TEXT, tokens=100, stop=("sat", "cat")).text == "the naïve "


def exported_to(folder, tokenizer, **data):
    """Export a model of random parameters that writes what the tokenizer knows."""
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = ModelSpec(layers=1, width=16, heads=2)
    save_model(
        folder / "model",
        spec=spec,
        state=build_model(spec, vocab_size=270, seed=0).state_dict(),
        vocab_size=270,
        tokenizer_path=folder / "tokenizer.json",
        provenance={"data": {"sequence_length": 16, **data}},
    )
    return folder / "model"


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    return exported_to(tmp_path_factory.mktemp("models"), tokenizer)


def test_a_model_that_was_trained_so_keeps_documents_apart(tokenizer, exported, tmp_path):
    assert TextGenerator.load(exported).model.separator is None
    assert TextGenerator.load(exported_to(tmp_path, tokenizer, isolate=True)).model.separator == END


def test_continuations_depend_on_prompt_seed_and_number_alone(exported):
    generator = TextGenerator.load(exported)

    def texts(prompts, **how):
        found = generator.continuations(prompts, Writing(tokens=12, **how))
        return [[one.text for one in of_one] for of_one in found]

    several = texts(["the", "a cat", "the"], samples=3, seed=4)
    assert several[0] == several[2]
    assert len({*several[0], *several[1]}) == 6
    assert texts(["a cat"], samples=3, seed=4, at_once=1)[0] == several[1]
    assert texts(["the"], samples=1, seed=4)[0] == several[0][:1]
    assert texts(["the"], samples=1, seed=5)[0] != several[0][:1]


def test_generate_prints_and_writes_what_it_was_asked_for(exported, tmp_path, capsys):
    file, lines = tmp_path / "all.json", tmp_path / "prompts.txt"
    lines.write_text("the\na cat\n", encoding="utf-8")
    assert main(["generate", str(exported), "--prompts", str(lines), "--samples", "2", "--tokens", "5",
                 "--json", str(file)]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    whole = json.loads(file.read_text(encoding="utf-8"))

    assert [row["prompt"] for row in whole["prompts"]] == ["the", "a cat"]
    assert {len(row["continuations"]) for row in whole["prompts"]} == {2}
    assert "--- prompt 2, sample 2: 5 tokens, as many as allowed" in shown
    for row in whole["prompts"]:
        for one in row["continuations"]:
            assert one["tokens"] == 5
    assert main(["generate", str(exported), "--prompt", "the", "--temperature", "0", "--tokens", "3"]) == 0
    ((one,),) = TextGenerator.load(exported).continuations(
        ["the"], Writing(tokens=3, sampling=Sampling(temperature=0.0))
    )
    assert capsys.readouterr().out.startswith("the" + one.text[:1])


def test_generate_reads_a_checkpoint_of_transformers(save_hf, tokenizer_path, capsys):
    folder = save_hf("llama")
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())

    assert main(["generate", f"hf:{folder}", "--prompt", "w1 w2", "--prompt", "w3", "--tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "--- prompt 2: 4 tokens" in shown
    assert main(["generate", str(folder), "--prompt", "w1"]) == 2
    assert "a folder of transformers is named hf:PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt TEXT, --prompts FILE and --tasks FILE"),
        (["--prompt", "a", "--tasks", "b"], "give one of"),
        (["--prompt", "a", "--tokens", "-1"], "tokens=-1: must be at least 0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5: must be above 0 and at most 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0: must be at least 0"),
        (["--prompt", "a", "--samples", "0"], "samples=0: must be at least 1"),
        (["--prompt", "a", "--stop", ""], "stop='': a stop string has at least one character"),
        (["--prompt", "a", "--pass-at", "1"], "--pass-at: has no effect without --tasks FILE"),
        (["--prompt", "a", "--json", "no/where.json"], "there is no folder"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--tasks", "TASKS", "--pass-at", "1,x"], "--pass-at 1,x: must be whole numbers"),
        (["--tasks", "TASKS", "--pass-at", "2"], "--pass-at 2: must be between 1 and --samples 1"),
        (["--tasks", "TASKS"], "line 2: has no answer that is a string; it has prompt"),
        (["--tasks", "TASKS", "--checker", "no-such-program x"], "there is no such program"),
        (["--tasks", "TASKS", "--checker", sys.executable, "--checker-seconds", "0"], "must be above 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(exported, tmp_path, arguments, message, capsys):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n', encoding="utf-8")
    given = [str(tasks) if text == "TASKS" else text for text in arguments]

    assert main(["generate", str(exported), *given]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_a_classifier_writes_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"format": "lossworks-classifier"}', encoding="utf-8")

    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds a classifier, no language model" in capsys.readouterr().err


def test_pass_rates_are_means_over_tasks():
    """Of two tasks with 1 and 2 right among 4: 1 − C(3, 2)/C(4, 2) = 1/2, and 1 − C(2, 2)/C(4, 2) = 5/6."""
    rates = PassRates([[Judgement(place < right) for place in range(4)] for right in (1, 2)])

    assert rates.at(1).value == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert rates.at(2).value == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert rates.at(4).value == 1.0
    with pytest.raises(UserError, match="there are no tasks"):
        PassRates([]).at(1)


def test_an_exact_match_is_one_after_stripping():
    assert exact_match({"answer": " 42\n"}, "\n42 ").right
    assert not exact_match({"answer": "42"}, "42!").right


CHECK = """
import json, sys, time
given = json.load(sys.stdin)
if given["completion"] == "sleep":
    time.sleep(60)
if given["completion"] != given["task"]["wanted"]:
    sys.exit(f"wanted {given['task']['wanted']}")
"""


def test_a_checker_program_judges_by_its_exit_status_and_is_ended_in_time(tmp_path):
    program = tmp_path / "check it.py"
    program.write_text(CHECK, encoding="utf-8")
    checker = CheckerProgram(f"{sys.executable} '{program}'", limit_s=1.0)
    began = time.monotonic()
    rates = check_all(
        [{"wanted": "ja"}, {"wanted": "né"}], [["ja", "sleep"], ["né", "no"]], checker, at_once=4
    )

    assert time.monotonic() - began < 20
    assert [[one.right for one in of_one] for of_one in rates.judgements] == [[True, False], [True, False]]
    assert rates.judgements[0][1].note == "the checker took longer than 1 seconds"
    assert rates.judgements[1][1].note == "wanted né"


def test_generate_tells_how_often_answers_are_right(exported, tmp_path, capsys):
    """Tasks whose answers are what the model writes at temperature 0, but for one."""
    generator, prompts = TextGenerator.load(exported), ["the", "a cat", "near"]
    writing = Writing(tokens=4, sampling=Sampling(temperature=0.0))
    answers = [one.text for (one,) in generator.continuations(prompts, writing)]
    answers[2] += "?"
    tasks, file = tmp_path / "tasks.jsonl", tmp_path / "found.json"
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    tasks.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    asked = ["generate", str(exported), "--tasks", str(tasks), "--tokens", "4", "--temperature", "0"]

    assert main([*asked, "--samples", "2", "--pass-at", "1,2", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    whole = json.loads(file.read_text(encoding="utf-8"))
    assert "right completions: 4 of 6" in shown
    assert "pass@1: 0.6667" in shown
    assert whole["figures"]["pass@2"]["value"] == pytest.approx(2 / 3)
    assert [[one["right"] for one in row["continuations"]] for row in whole["prompts"]] == [
        [True, True],
        [True, True],
        [False, False],
    ]
