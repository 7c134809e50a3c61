"""A head whose classes stay split over FSDP's ranks trains as one that is gathered."""

import shutil

import pytest
import torch

from lossworks.data import TokenizedCorpus
from lossworks.errors import UserError
from lossworks.models import build_model
from lossworks.tasks.text.language_model import LanguageTask, TrainSpec
from lossworks.training.checkpoints.checkpoint import CheckpointStore, load_shards
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import evaluate
from lossworks.training.measure.head_memory import DENSE, OURS, head_peak, without_logits
from lossworks_testing.ranks import run_ranks
from lossworks_testing.split_head import everything
from lossworks_testing.training import VOCABULARY, losses, run_several, run_training, tiny_spec

GATHERED = {"sharding": {"kind": "fsdp"}}
SPLIT = {"sharding": {"kind": "fsdp", "vocab_parallel": True}}
REPLICAS = {"sharding": {"kind": "ddp"}}


def untied(text, **changes):
    """Seven sequences a step, so that ranks have unequal shares, and a norm that always clips."""
    model = {"layers": 2, "width": 16, "heads": 2, "tied": False}
    return tiny_spec(text, batch_size=7, model=model, optimizer={"clip_norm": 0.05}, **changes)


def several(workers, runs, corpus, tmp_path):
    """Train (spec, folder) on ranks, one after the other; return rank 0's results."""
    results = tmp_path / f"ranks-{workers}"
    results.mkdir()
    values = [
        (spec.override([f"workers={workers}"]).model_dump(mode="json"), str(folder)) for spec, folder in runs
    ]
    return run_ranks(workers, run_several, values, corpus, folder=results)[0]


@pytest.fixture(scope="module")
def trained(text, corpus, tmp_path_factory):
    """Runs on two ranks by name: results and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    half = {"precision": "bf16"}
    specs = {
        "gathered": untied(text, **GATHERED),
        "split": untied(text, **SPLIT),
        "micro": untied(text, micro_batch_size=2, **SPLIT),
        "one by one": untied(text, micro_batch_size=1, activation_checkpointing=True, **SPLIT),
        "gathered half": untied(text, **GATHERED, **half),
        "split half": untied(text, **SPLIT, **half),
        "replicas": untied(text, **REPLICAS),
    }
    results = several(2, [(spec, folder / name) for name, spec in specs.items()], corpus, folder)
    return dict(zip(specs, results, strict=True)), folder


@pytest.mark.parametrize(
    ("name", "like", "tolerance"),
    [
        ("split", "gathered", 2e-6),
        ("micro", "gathered", 2e-6),
        ("one by one", "gathered", 2e-6),
        # Sums of numbers with eight bits, in another order.
        ("split half", "gathered half", 5e-4),
    ],
)
def test_a_split_head_gives_the_curve_of_a_gathered_one(trained, name, like, tolerance):
    """Losses, norms, held-out losses and bits agree, with unequal shares, micro-batches and clipping."""
    found, expected = trained[0][name], trained[0][like]

    assert found["status"] == "finished"
    for (_, ours), (_, theirs) in zip(found["rows"], expected["rows"], strict=True):
        for metric in ("train/loss", "train/grad_norm", "train/bits_per_byte"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=tolerance)
    for metric in ("eval/loss", "eval/bits_per_byte"):
        assert found["metrics"][metric] == pytest.approx(expected["metrics"][metric], rel=tolerance)


def test_one_process_reads_the_checkpoint_of_a_split_head(trained, text, corpus):
    """A plain model filled as by export has the held-out loss that the run recorded, and generates."""
    results, _ = trained
    spec, tokens = untied(text, **SPLIT), TokenizedCorpus.open(corpus)
    model = build_model(spec.model, vocab_size=tokens.vocab_size, seed=1)
    checkpoint = CheckpointStore(trained[1] / "split", keep=2).newest()[0]
    state = {"model": model.state_dict()}
    load_shards(state, checkpoint.folder)
    model.load_state_dict(state["model"])
    found = evaluate(
        model,
        LanguageTask(spec, tokens),
        World.current(),
        limit=spec.evaluation.sequences,
        micro_batch_size=None,
        bf16=False,
    )

    assert found.loss == pytest.approx(results["split"]["metrics"]["eval/loss"], rel=2e-6)
    assert len(model.generate([[1]], 3)[0]) == 3


def test_going_on_with_other_workers_and_sharding(trained, text, corpus, tmp_path):
    """Runs cut off after step 3 go on, on three ranks, from and to a split head, on one curve."""
    runs = []
    for name, before, after in (("a", "split", SPLIT), ("b", "split", REPLICAS), ("c", "replicas", SPLIT)):
        shutil.copytree(trained[1] / before, tmp_path / name)
        # The schedule is that of six steps: the run is cut off by its files, as a crash would.
        (tmp_path / name / "step-00000006" / "manifest.json").unlink()
        runs.append((untied(text, **after), tmp_path / name))

    for result in several(3, runs, corpus, tmp_path):
        assert [step for step, _ in result["rows"]] == [4, 5, 6]
        assert losses(result) == pytest.approx(losses(trained[0]["gathered"])[3:], rel=1e-5)


def test_ranks_of_unequal_many_rows(tmp_path):
    """Shares sum to the loss of all, gradients are one process's, and what can't be split is refused."""
    for rank, found in enumerate(run_ranks(3, everything, folder=tmp_path)):
        (loss,), gradients = found["shares"]
        assert loss < 1e-12
        assert max(gradients) < 1e-12
        assert found["logits"] < 1e-5
        assert found["placement"] == [("lm_head.weight", (6, 6, 5)[rank])]
        tied, few = found["refusals"]
        assert "the model's head is its embedding" in tied
        assert "the 4 classes of the head don't give each of 3 workers one" in few


def test_the_head_memory_counts_own_classes_and_all_rows(trained):
    """Four sequences of 16 tokens on each of two ranks, and half of 300 classes; logits would be whole."""
    cpu, split = torch.device("cpu"), trained[0]["split"]["head_memory"]

    assert split[OURS] == head_peak((2 * 4 * 16, VOCABULARY // 2, 16), without_logits, cpu)
    assert split[DENSE] == trained[0]["gathered"]["head_memory"][DENSE]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sharding.vocab_parallel=true"], "sharding.vocab_parallel=true needs sharding=fsdp, not none"),
        (["sharding.vocab_parallel=true", "sharding=ddp"], "needs sharding=fsdp, not ddp"),
        (["sharding=fsdp", "sharding.vocab_parallel=true"], "set model.tied=false"),
        (
            ["sharding=fsdp", "sharding.vocab_parallel=true", "model.tied=false", "loss.impl=reference"],
            "loss.impl=reference can't be combined with sharding.vocab_parallel=true",
        ),
        (["sharding=dpp"], "sharding.kind='dpp': input should be 'none', 'ddp' or 'fsdp'"),
    ],
)
def test_what_can_not_be_split_is_refused(text, overrides, message):
    """The message names the field to change."""
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        tiny_spec(text).override(overrides)


def test_a_plain_value_is_short_for_the_kind(text):
    """YAML and overrides may say sharding=fsdp, in any order with its other field; specs survive YAML."""
    split = tiny_spec(text, model={"tied": False}, **SPLIT)
    overrides = ["model.tied=false", "sharding=fsdp", "sharding.vocab_parallel=true"]

    assert tiny_spec(text).override(overrides) == split
    assert tiny_spec(text).override(overrides[::-1]) == split
    assert tiny_spec(text, sharding="ddp").sharding.kind == "ddp"
    assert TrainSpec.parse(split.model_dump(mode="json")) == split
    assert split.override(["steps=7"]).sharding == split.sharding
    assert str(split.sharding) == "fsdp, vocabulary-parallel head"
    assert split.flat()["sharding.kind"] == "fsdp"


def test_a_world_of_one_may_split_its_head(text, corpus, tmp_path):
    """So that it can be tried anywhere."""
    whole = run_training(untied(text).model_dump(mode="json"), corpus, str(tmp_path / "whole"))
    (split,) = several(1, [(untied(text, **SPLIT), tmp_path / "split")], corpus, tmp_path)

    assert losses(split) == pytest.approx(losses(whole), rel=2e-6)
