"""Training a local transformers checkpoint with our head."""

from types import SimpleNamespace

import pytest
import torch

from lossworks.errors import UserError
from lossworks.models import load_model
from lossworks.models.huggingface import HuggingFaceModel
from lossworks.tasks import parse_train_spec
from lossworks.training.distributed.split_head import split_head
from lossworks.training.weights.export import export_run
from lossworks.training.weights.start import settled
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import (
    VOCABULARY,
    losses,
    prepared,
    run_in_folder,
    run_training,
    tiny_spec,
)


@pytest.fixture
def llama(tmp_path, text):
    """A tiny random Llama with a tokenizer of its own, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = prepared(tiny_spec(text)).tokenizer_path
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def test_a_transformers_checkpoint_trains_with_its_own_tokenizer(llama, text, tmp_path):
    """model.source=hf:PATH needs nothing else; the loss falls and both heads give the same curve."""
    spec = tiny_spec(text).override([f"model={{source: 'hf:{llama}'}}", "steps=20", "optimizer.lr=0.02"])
    corpus = str(prepared(spec).folder)
    ours = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "ours"))
    dense = spec.override(["loss.impl=reference"])
    theirs = run_training(dense.model_dump(mode="json"), corpus, str(tmp_path / "theirs"))

    assert len(ours["rows"]) == 20
    assert losses(ours)[-1] < losses(ours)[0] - 0.5
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)


def test_a_transformers_checkpoint_trains_with_a_split_head(llama, text, tmp_path):
    """Two ranks that never gather the output embeddings follow the curve of one process."""
    spec = tiny_spec(text).override([f"model={{source: 'hf:{llama}'}}", "steps=4"])
    corpus = str(prepared(spec).folder)
    alone = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "alone"))
    split = spec.override(["workers=2", "sharding=fsdp", "sharding.vocab_parallel=true"])
    together = run_ranks(
        2, run_training, split.model_dump(mode="json"), corpus, str(tmp_path / "split"), folder=tmp_path
    )[0]

    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)


def test_a_transformers_checkpoint_with_one_matrix_for_both_can_not_be_split():
    """Its output embeddings are those of the input, which are looked up whole."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = HuggingFaceModel(transformers.LlamaForCausalLM(config))

    with pytest.raises(UserError, match="the model's head is its embedding"):
        split_head(model, SimpleNamespace(size=lambda: 2))


def test_a_missing_checkpoint_is_refused(text):
    """The error names the path."""
    spec = tiny_spec(text).override(["model={source: 'hf:/nowhere'}"])

    with pytest.raises(UserError, match="/nowhere"):
        prepared(spec)


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("language-model", {"lora": 2, "data": {"corpus": "facts:12", "sequence_length": 64}}),
        ("preferences", {"data": {"corpus": "docstrings", "sequence_length": 64}}),
        ("unlearning", {"data": {"corpus": "facts:8", "sequence_length": 64}}),
    ],
)
def test_a_transformers_checkpoint_goes_on_after_pretraining(llama, tmp_path, task, changes):
    """A run begins there; what is exported is read by transformers, and the next one begins there."""
    transformers = pytest.importorskip("transformers")
    base = {"workers": 1, "sharding": "none", "steps": 2, "batch_size": 4, "tracking": {"model": False}}
    base |= {"evaluation": {"every": 2, "sequences": 4}, "checkpoint": {"every": 2}}
    values = {**base, "task": task, **changes}
    folder = run_in_folder({**values, "start": f"hf:{llama}"})
    export_run(folder, tmp_path / "model", best=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not any("lora" in name for name in theirs.state_dict())
    ours, _ = load_model(tmp_path / "model")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(theirs(tokens).logits, ours.logits(tokens), rtol=1e-4, atol=1e-4)

    spec = settled(parse_train_spec({**values, "start": str(tmp_path / "model")}))
    assert spec.model.source == f"hf:{tmp_path / 'model'}"
    again = run_in_folder({**values, "start": str(tmp_path / "model"), "optimizer": {"lr": 1e-9}}, "again")
    export_run(again, tmp_path / "same", best=False)
    same, _ = load_model(tmp_path / "same")
    torch.testing.assert_close(same.logits(tokens), ours.logits(tokens), rtol=1e-4, atol=1e-4)
