"""Building a model from a spec."""

import pytest
import torch

from lossworks.models import HuggingFaceModel, Transformer, build_model
from lossworks.specs import ModelSpec

TINY = ModelSpec(layers=2, width=16, heads=2, hidden=24, tied=False)


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (build_model(TINY, vocab_size=40, seed=seed).state_dict() for seed in (3, 3, 4))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_parameters_do_not_depend_on_the_global_random_state():
    torch.manual_seed(0)
    first = build_model(TINY, vocab_size=40, seed=3).state_dict()
    torch.manual_seed(1)
    again = build_model(TINY, vocab_size=40, seed=3).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("source", ["transformer", "llama"])
def test_global_random_state_is_left_as_it_was(source, save_hf):
    spec = TINY if source == "transformer" else ModelSpec(source=f"hf:{save_hf(source)}")
    state = torch.get_rng_state()
    build_model(spec, vocab_size=40, seed=3)

    assert torch.equal(torch.get_rng_state(), state)


def test_models_come_in_float32_and_training_mode(save_hf):
    own = build_model(TINY, vocab_size=40, seed=0)
    foreign = build_model(ModelSpec(source=f"hf:{save_hf('llama')}"), vocab_size=40, seed=0)

    assert isinstance(own, Transformer)
    assert isinstance(foreign, HuggingFaceModel)
    for model in (own, foreign):
        assert model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
