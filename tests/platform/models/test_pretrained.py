"""Model folders: written in one step, read back bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lossworks.errors import UserError
from lossworks.models import build_model, load_model, save_model
from lossworks.specs import ModelSpec

TINY = ModelSpec(layers=2, width=16, heads=2, hidden=24)
TOKENS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))


def trained(spec, vocab_size=32):
    """Return a model whose parameters differ from every initial value."""
    model = build_model(spec, vocab_size=vocab_size, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(folder, model, spec, tokenizer_path, **changes):
    arguments = {
        "spec": spec,
        "state": model.state_dict(),
        "vocab_size": 32,
        "tokenizer_path": tokenizer_path,
        "provenance": {"step": 7},
    }
    save_model(folder, **(arguments | changes))


def assert_same(loaded, model):
    expected, found = model.state_dict(), loaded.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(loaded.logits(TOKENS), model.logits(TOKENS))


@pytest.fixture
def saved(tmp_path, tokenizer_path):
    """Return the folder of a saved model."""
    folder = tmp_path / "saved"
    save(folder, trained(TINY), TINY, tokenizer_path)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_own_model_survives_bit_for_bit(tied, tmp_path, tokenizer_path):
    spec = TINY.model_copy(update={"tied": tied, "qk_norm": True, "norm": "layernorm"})
    model = trained(spec)
    save(tmp_path / "deep" / "first", model, spec, tokenizer_path)
    loaded, tokenizer = load_model(tmp_path / "deep" / "first")

    assert_same(loaded, model)
    assert loaded.spec == spec
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert tokenizer.encode("w3 w1").ids == [3, 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi"])
def test_transformers_model_survives_and_the_library_reads_it(kind, tmp_path, tokenizer_path, save_hf):
    from transformers import AutoModelForCausalLM

    spec = ModelSpec(source=f"hf:{save_hf(kind)}")
    model = trained(spec)
    save(tmp_path / "first", model, spec, tokenizer_path)
    loaded, _ = load_model(tmp_path / "first")
    by_library = AutoModelForCausalLM.from_pretrained(tmp_path / "first", local_files_only=True)

    assert_same(loaded, model)
    assert not loaded.training
    assert torch.equal(by_library(input_ids=TOKENS).logits, model.model(input_ids=TOKENS).logits)
    assert json.loads((tmp_path / "first" / "lossworks.json").read_text())["provenance"] == {"step": 7}


def test_transformers_model_loads_after_its_source_is_gone(tmp_path, tokenizer_path, save_hf):
    source = save_hf("llama")
    spec = ModelSpec(source=f"hf:{source}")
    save(tmp_path / "first", trained(spec), spec, tokenizer_path)
    source.rename(tmp_path / "elsewhere")

    load_model(tmp_path / "first")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_one_name_of_tied_tensors_is_enough(kind, tmp_path, tokenizer_path, save_hf):
    spec = ModelSpec(source=f"hf:{save_hf(kind)}")
    model = trained(spec)
    save(tmp_path / "first", model, spec, tokenizer_path, state=dict(model.named_parameters()))
    loaded, _ = load_model(tmp_path / "first")

    assert_same(loaded, model)
    assert loaded.head().weight is loaded.model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_copies_of_tied_tensors_are_stored_once(kind, tmp_path, tokenizer_path, save_hf):
    spec = ModelSpec(source=f"hf:{save_hf(kind)}")
    model = trained(spec)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(tmp_path / "first", model, spec, tokenizer_path, state=state)

    assert "lm_head.weight" not in load_file(tmp_path / "first" / "model.safetensors")


def test_saving_a_transformers_model_needs_its_configuration(tmp_path, tokenizer_path, save_hf):
    source = save_hf("llama")
    spec = ModelSpec(source=f"hf:{source}")
    model = trained(spec)

    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"hf-llama: has no usable config\.json"):
        save(tmp_path / "first", model, spec, tokenizer_path)
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"hf-llama: has no config\.json"):
        save(tmp_path / "first", model, spec, tokenizer_path)


def test_a_tied_matrix_is_stored_once(saved):
    names = load_file(saved / "model.safetensors")

    assert sum(tensor.shape[0] == 32 for tensor in names.values()) == 1


def test_configuration_tells_format_spec_and_provenance(saved):
    assert json.loads((saved / "config.json").read_text()) == {
        "format": "lossworks-model",
        "format_version": 1,
        "model": TINY.model_dump(mode="json"),
        "vocab_size": 32,
        "provenance": {"step": 7},
    }
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_dozen_lines_load_a_model_and_continue_a_text(saved):
    model, tokenizer = load_model(saved)
    prompt = tokenizer.encode("w1 w2 w3").ids
    (tokens,) = model.generate([prompt], new_tokens=5, temperature=0.8)

    assert tokenizer.decode(tokens).startswith("w")


def test_a_full_folder_is_refused_and_an_empty_one_is_used(saved, tmp_path, tokenizer_path):
    model = trained(TINY)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", model, TINY, tokenizer_path)
    load_model(tmp_path / "empty")

    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="saved: exists and isn't an empty folder"):
        save(saved, trained(TINY, vocab_size=32), TINY, tokenizer_path)
    assert (saved / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="exists and isn't an empty folder"):
        save(tokenizer_path, model, TINY, tokenizer_path)


def test_a_failed_save_leaves_nothing_behind(tmp_path, tokenizer_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("lossworks.models.pretrained.save_file", full_disk)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "first", trained(TINY), TINY, tokenizer_path)

    assert set(tmp_path.iterdir()) == before


def test_a_folder_filled_meanwhile_is_kept(tmp_path, tokenizer_path, monkeypatch):
    from lossworks.models import pretrained

    def overtaken(state, path):
        save_file(state, path)
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "theirs").touch()

    monkeypatch.setattr(pretrained, "save_file", overtaken)
    with pytest.raises(UserError, match="first: can't be put in place"):
        save(tmp_path / "first", trained(TINY), TINY, tokenizer_path)

    assert [path.name for path in (tmp_path / "first").iterdir()] == ["theirs"]
    assert not list(tmp_path.glob(".first*"))


def test_a_state_that_does_not_fit_is_never_written(tmp_path, tokenizer_path):
    model = trained(TINY)
    state = model.state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "final_norm.weight"}

    for wrong, message in [
        (lacking, "state: lacks final_norm.weight"),
        (state | {"extra": torch.zeros(1)}, "state: holds extra, which the model doesn't have"),
        (
            state | {"final_norm.weight": torch.zeros(3)},
            "state: a checkpoint of another shape: final_norm.weight",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            save(tmp_path / "first", model, TINY, tokenizer_path, state=wrong)
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_provenance_must_be_json(value, tmp_path, tokenizer_path):
    with pytest.raises(UserError, match="provenance: can't be written as JSON"):
        save(tmp_path / "first", trained(TINY), TINY, tokenizer_path, provenance={"value": value})


def test_tokenizer_is_checked_before_anything_is_written(tmp_path, tokenizer_path):
    (tmp_path / "broken.json").write_text("{}")

    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        save(tmp_path / "first", trained(TINY), TINY, tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"broken\.json: isn't a tokenizer"):
        save(tmp_path / "first", trained(TINY), TINY, tmp_path / "broken.json")
    assert not (tmp_path / "first").exists()


def test_loading_names_the_missing_file(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (saved / name).unlink()
        with pytest.raises(UserError, match=rf"{name}: no such file"):
            load_model(saved)


def test_truncated_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(UserError, match=r"model\.safetensors: is truncated, or not a safetensors file"):
        load_model(saved)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_weights_of_another_shape_are_named(saved):
    change_config(saved, vocab_size=40)

    with pytest.raises(
        UserError,
        match=r"another shape: embedding\.weight is \(32, 16\) in the file and \(40, 16\) in the model",
    ):
        load_model(saved)


def test_unknown_versions_and_foreign_folders(saved, save_hf):
    change_config(saved, format_version=99)
    with pytest.raises(UserError, match="format_version=99 is unknown; this Lossworks reads 1"):
        load_model(saved)
    with pytest.raises(UserError, match=r"isn't a Lossworks model.*model\.source=hf:PATH"):
        load_model(save_hf("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size='many' must be a whole number"),
        ({"model": {"layers": 0}}, "layers=0: input should be greater than or equal to 1"),
        ({"model": {"layer": 2}}, "layer: unknown key; did you mean layers?"),
    ],
)
def test_damaged_configuration(changes, message, saved):
    change_config(saved, **changes)

    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load_model(saved)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_unreadable_configuration(content, saved):
    (saved / "config.json").write_bytes(content)

    with pytest.raises(UserError, match=r"config\.json: (can't be read|isn't a Lossworks model)"):
        load_model(saved)
