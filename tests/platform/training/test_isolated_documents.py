"""Documents that follow one another in a sequence, and don't see each other."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from lossworks.data import prepare
from lossworks.errors import UserError
from lossworks.models import build_model
from lossworks.models.layers import isolation
from lossworks.specs import ModelSpec
from lossworks.tasks.text.language_model import LanguageTask
from lossworks.tracking.journal import read_all
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_several, run_training, tiny_spec

VOCABULARY, END = 40, 0
SPECS = [
    ModelSpec(layers=2, width=16, heads=4, kv_heads=2, qk_norm=True),
    ModelSpec(layers=2, width=16, heads=2, tied=False, norm="layernorm", activation="gelu"),
]


def documents():
    """Return three documents, each with the token before it that ends the one before."""
    g = torch.Generator().manual_seed(0)
    bodies = [torch.randint(1, VOCABULARY, (length,), generator=g) for length in (7, 1, 12)]
    return [torch.cat((torch.tensor([END]), body)) for body in bodies]


def nats(model, tokens):
    """Return the loss of each token (T,) but the first, float64 (T - 1,)."""
    logits = model.head().logits(model.hidden(tokens[None, :-1])[0]).double()
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_packed_document_has_the_loss_that_it_has_alone(spec, dtype, error):
    """Its first token and its end among them, forward and backward; without isolation it has another."""
    model = build_model(spec, vocab_size=VOCABULARY, seed=0).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)  # so that attention matters
    parts = documents()
    packed = torch.cat([*parts, torch.tensor([END])])
    ended = [torch.cat((part, torch.tensor([END]))) for part in parts]
    leaking = nats(model, packed)
    alone = torch.cat([nats(model, part) for part in ended])
    model.isolate(END)
    found = nats(model, packed)

    torch.testing.assert_close(found, alone, rtol=error, atol=error)
    torch.testing.assert_close(
        torch.cat([nats(model, part) for part in ended]), alone, rtol=error, atol=error
    )
    assert (leaking - alone)[8:].abs().max() > 0.01
    one, other = (torch.autograd.grad(value.sum(), list(model.parameters())) for value in (found, alone))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e3 * error, atol=10 * error)


def test_what_is_seen():
    """The separator begins a document; a sequence may begin in the midst of one, and end so."""
    seen = isolation(torch.tensor([[5, 6, END, 7, END, END, 8]]), END)[0, 0]

    documents = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    expected = [[bool(i >= j and documents[i] == documents[j]) for j in range(7)] for i in range(7)]
    assert seen.tolist() == expected


def test_how_it_is_computed_changes_nothing():
    """Recomputed, compiled, and roughly in bfloat16."""
    tokens = torch.cat(documents())[None].repeat(2, 1)

    def hidden(change=lambda model: None, **how):
        model = build_model(SPECS[0], vocab_size=VOCABULARY, seed=0).train()
        model.isolate(END)
        change(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(how)):
            found = model.hidden(tokens)
        found.float().square().sum().backward()
        return found.detach(), model.embedding.weight.grad

    plain, gradient = hidden()
    again, recomputed = hidden(lambda model: model.checkpoint_activations())
    assert torch.equal(again, plain)
    torch.testing.assert_close(recomputed, gradient)
    half, _ = hidden(bf16=True)
    torch.testing.assert_close(half.float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_compiled_block_gives_the_same():
    """As one graph."""
    tokens = torch.cat(documents())[None]
    model = build_model(SPECS[0], vocab_size=VOCABULARY, seed=0)
    model.isolate(END)
    plain = model.hidden(tokens)
    for block in model.blocks():
        block.compile(fullgraph=True)
    torch.testing.assert_close(model.hidden(tokens), plain, rtol=1e-5, atol=1e-5)


@pytest.fixture
def lines(tmp_path):
    """A folder of short documents, of which several follow one another in a sequence."""
    folder = tmp_path / "lines"
    folder.mkdir()
    g = torch.Generator().manual_seed(1)
    for index in range(60):
        words = torch.randint(0, 26, (int(torch.randint(2, 14, (1,), generator=g)), 3), generator=g)
        (folder / f"{index:02d}.txt").write_text(
            " ".join("".join(chr(97 + int(letter)) for letter in word) for word in words)
        )
    return folder


def isolating(folder, **changes):
    data = {"corpus": f"text:{folder}", "isolate": True, "sequence_length": 32}
    return tiny_spec(folder, **{"data": data, **changes})


def test_a_run_trains_so_and_all_ranks_alike(lines, tmp_path):
    """ddp and fsdp with recomputed blocks follow one process; the curve is another than without."""
    spec = isolating(lines)
    corpus = str(prepare(spec.text()).folder)
    alone = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "alone"))
    leaking = run_training(
        spec.override(["data.isolate=false"]).model_dump(mode="json"), corpus, str(tmp_path / "leaking")
    )
    split = [["workers=2", "sharding=ddp"], ["workers=2", "sharding=fsdp", "activation_checkpointing=true"]]
    runs = [
        (spec.override(how).model_dump(mode="json"), str(tmp_path / str(place)))
        for place, how in enumerate(split)
    ]
    (tmp_path / "ranks").mkdir()
    for found in run_ranks(2, run_several, runs, corpus, folder=tmp_path / "ranks")[0]:
        assert losses(found) == pytest.approx(losses(alone), rel=2e-5)
        assert found["metrics"]["eval/loss"] == pytest.approx(alone["metrics"]["eval/loss"], rel=2e-5)
    assert losses(leaking)[0] != losses(alone)[0]


def test_an_exported_model_is_measured_as_it_was_trained(lines, tmp_path, monkeypatch):
    """With documents apart, which its folder says."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    spec = isolating(lines, evaluation={"every": 3, "sequences": 10_000})
    folder = run_in_folder(spec.model_dump(mode="json"))
    export_run(folder, tmp_path / "model", best=False)
    apart, joined = (
        evaluate_folder(tmp_path / "model", overrides=[f"data.isolate={how}"]).loss
        for how in ("true", "false")
    )

    assert evaluate_folder(tmp_path / "model").loss == apart
    assert read_all(folder.journal)[-1]["metrics"]["eval/loss"] == pytest.approx(apart, rel=1e-6)
    assert abs(apart - joined) > 1e-6


def test_what_cannot_keep_documents_apart_is_refused(lines, tmp_path):
    """A checkpoint of transformers, as a model and as a companion, and a tokenizer that ends no document."""
    with pytest.raises(UserError, match=r"data\.isolate=true can't be combined with model\.source=hf:/x"):
        isolating(lines, model={"source": "hf:/x"})
    task = LanguageTask.open_blank(isolating(lines))
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "hf"
    )
    with pytest.raises(UserError, match=r"data\.isolate=true: needs model\.source=transformer"):
        task.build_model({"source": f"hf:{tmp_path / 'hf'}"})
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1}, unk_token="?"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    data = {"corpus": f"text:{lines}", "isolate": True, "tokenizer": str(tmp_path / "words.json")}
    with pytest.raises(
        UserError, match=r"data\.isolate=true: .*words\.json has no token that ends documents"
    ):
        LanguageTask.prepare(tiny_spec(lines, data=data))
