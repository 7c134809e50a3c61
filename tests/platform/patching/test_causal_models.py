"""Causal language models of the transformers library with the head's loss, beside themselves as they are."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lossworks
from lossworks.errors import UserError
from lossworks.losses import create

VOCAB = 96
COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 4, "tie_word_embeddings": True},
    "mistral": {**LLAMA_LIKE, "sliding_window": 8},
    "phi": {**LLAMA_LIKE, "num_key_value_heads": 4, "partial_rotary_factor": 1.0},  # a head with a bias
    "gemma": {**LLAMA_LIKE, "head_dim": 4},
    "gemma2": {**LLAMA_LIKE, "head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 0.5},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 0.7},
    "gpt2": {**COMMON, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "granite": {**LLAMA_LIKE, "logits_scaling": 3.0, "tie_word_embeddings": True},
    "cohere": {**LLAMA_LIKE, "logit_scale": 0.3},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4, **EXPERTS},
    "qwen2_moe": {
        **LLAMA_LIKE,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "decoder_sparse_step": 1,
        **EXPERTS,
    },
}


def tiny(kind, **changed):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    config = CONFIG_MAPPING[kind](**{**ARCHITECTURES[kind], **dropout, **changed})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():  # larger than as initialised, so that softcaps and scales show
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.train()


def both(kind, **changed):
    """Return a model as it is, and the same one patched."""
    stock = tiny(kind, **changed)
    return stock, lossworks.patch(copy.deepcopy(stock))


def batch(seed=0, rows=3, length=12):
    tokens = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :4] = -100  # a prompt
    labels[-1, -3:] = -100  # padding
    return {"input_ids": tokens, "labels": labels}


def assert_same_gradients(stock, patched, **tolerance):
    for (name, left), right in zip(stock.named_parameters(), patched.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            torch.testing.assert_close(
                right.grad, left.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )


class Largest(TorchDispatchMode):
    """Notes whether an operation returns a tensor of the size of the logits."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if type(tensor) is torch.Tensor and tensor.numel() >= self.numbers:
                self.found.append(f"{func} {tuple(tensor.shape)}")
        return out


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_logits_and_gradients_are_those_of_the_library(kind):
    stock, patched = both(kind)
    expected, found = stock(**batch()), patched(**batch())

    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits + 0, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    assert_same_gradients(stock, patched, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_updates_over_accumulated_batches_are_those_of_the_library(kind):
    stock, patched = both(kind)
    for model in (stock, patched):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3):
            parts = [batch(10 * step), batch(10 * step + 1, rows=1, length=5)]
            items = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
            for part in parts:
                model(**part, num_items_in_batch=items).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for left, right in zip(stock.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "phi"])
@pytest.mark.parametrize("items", [None, 20])
def test_the_library_s_label_smoother_gets_the_same_and_no_logits_are_formed(kind, items):
    from transformers.trainer_pt_utils import LabelSmoother

    stock, patched = both(kind)
    given = batch()
    labels = given.pop("labels")
    smoother = LabelSmoother(epsilon=0.2)
    expected = smoother(stock(**given), labels, shift_labels=True, num_items_in_batch=items)
    outputs = patched(**given)
    found = smoother(outputs, labels, shift_labels=True, num_items_in_batch=items)

    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    assert_same_gradients(stock, patched, rtol=1e-4, atol=1e-6)
    assert outputs.logits.formed is None


def test_a_large_vocabulary_s_logits_are_never_formed():
    from transformers.trainer_pt_utils import LabelSmoother

    stock, patched = both("llama", vocab_size=2048)
    tokens = torch.randint(2048, (64, 60))
    sizes = {}
    for name, model in (("stock", stock), ("patched", patched)):
        with Largest(tokens.numel() // 2 * 2048) as seen:
            model(input_ids=tokens, labels=tokens).loss.backward()
            LabelSmoother()(model(input_ids=tokens), tokens, shift_labels=True).backward()
        sizes[name] = seen.found

    assert sizes["stock"]
    assert sizes["patched"] == []


def test_logits_that_are_read_are_right_and_have_their_gradient():
    stock, patched = both("gemma2")
    for model in (stock, patched):
        logits = model(**batch()).logits
        (logits[:, 2:5].square().mean() + logits.softmax(-1)[..., 7].sum()).backward()

    assert_same_gradients(stock, patched, rtol=1e-4, atol=1e-6)


def test_logits_can_be_gathered_and_summed_as_tensors_that_are_not_log_probabilities():
    stock, patched = both("cohere")
    index = torch.randint(VOCAB, (3, 12, 2))
    expected, found = stock(**batch()).logits, patched(**batch()).logits

    torch.testing.assert_close(found.gather(-1, index), expected.gather(-1, index))
    torch.testing.assert_close(found.sum(-1), expected.sum(-1))
    torch.testing.assert_close(found[0, 1], expected[0, 1])
    torch.testing.assert_close(found[..., 3], expected[..., 3])
    torch.testing.assert_close(found.log_softmax(-1).log_softmax(-1), expected.log_softmax(-1))
    torch.testing.assert_close((-found).log_softmax(-1), (-expected).log_softmax(-1))
    torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype


def test_outputs_as_a_tuple_and_of_evaluation():
    stock, patched = both("llama")
    stock.eval()
    patched.eval()
    with torch.no_grad():
        expected = stock(**batch(), return_dict=False)
        found = patched(**batch(), return_dict=False)

        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1] + 0, expected[1])
        tokens = batch()["input_ids"]
        assert type(patched(input_ids=tokens).logits) is torch.Tensor
        torch.testing.assert_close(patched(input_ids=tokens).logits, expected[1])
        assert torch.equal(
            patched.generate(tokens, max_new_tokens=4, do_sample=False),
            stock.generate(tokens, max_new_tokens=4, do_sample=False),
        )


def test_sequences_of_one_token_have_no_loss():
    _, patched = both("llama")
    found = patched(input_ids=torch.tensor([[5]]), labels=torch.tensor([[5]])).loss
    found.backward()

    assert found.item() == 0
    summed = patched(input_ids=torch.tensor([[5]]), labels=torch.tensor([[5]]), num_items_in_batch=7).loss
    assert summed.item() == 0


def test_labels_that_are_shifted_already():
    stock, patched = both("llama")
    given = batch()
    shifted = nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:].contiguous()

    for model in (stock, patched):
        loss = model(**given, shift_labels=shifted).loss
        torch.testing.assert_close(loss, model(**given).loss)


def test_bfloat16_and_autocast_are_as_near_as_the_library_s():
    exact, _ = both("llama")
    expected = exact(**batch()).loss
    stock, patched = both("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(patched(**batch()).loss, expected, rtol=2e-2, atol=2e-2)
        assert patched(**batch()).logits.dtype == torch.float32
    half = lossworks.patch(stock.to(torch.bfloat16))
    found = half(**batch())
    torch.testing.assert_close(found.loss.float(), expected, rtol=5e-2, atol=5e-2)
    assert found.logits.dtype == torch.bfloat16
    found.loss.backward()


def test_any_row_loss_of_the_catalogue():
    stock = tiny("llama")
    expected = create("ldr", temperature=0.5)(
        stock(**batch()).logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten()
    )
    patched = lossworks.patch(stock, "ldr", temperature=0.5)
    torch.testing.assert_close(patched(**batch()).loss, expected)

    again = lossworks.patch(patched, "cross-entropy", label_smoothing=0.1)
    assert again is patched
    assert patched(**batch()).loss.item() != pytest.approx(expected.item())


def test_a_patched_model_is_saved_copied_and_read_like_any_other(tmp_path):
    from transformers import AutoModelForCausalLM

    _, patched = both("gemma2")
    patched(**batch()).loss.backward()
    patched.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    twin = copy.deepcopy(patched)
    with torch.no_grad():
        twin.lm_head.weight.zero_()

    assert read.config.architectures == ["Gemma2ForCausalLM"]
    assert read.config.final_logit_softcapping == 0.5
    torch.testing.assert_close(read(**batch()).loss, patched(**batch()).loss)
    torch.testing.assert_close(twin(**batch()).loss, torch.tensor(VOCAB, dtype=torch.float32).log())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_library_s_trainer_ends_at_the_same_weights(smoothing, tmp_path):
    """With accumulated gradients, unequal numbers of labels, evaluation, and label smoothing."""
    from transformers import Trainer, TrainingArguments

    models = both("llama")
    rows = [
        {name: value[row] for name, value in batch(seed).items()} for seed in range(6) for row in range(3)
    ]
    found = []
    for place, model in enumerate(models):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(place)),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            label_smoothing_factor=smoothing,
            learning_rate=0.01,
            optim="sgd",
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        found.append(trainer.evaluate()["eval_loss"])

    assert found[1] == pytest.approx(found[0], rel=1e-4)
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)


def test_adapters_on_the_body_get_the_same_gradients():
    from peft import LoraConfig, get_peft_model

    def adapted(**changes):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **changes)
        return get_peft_model(tiny("llama"), config)

    stock = adapted(target_modules=["q_proj", "v_proj"])
    patched = lossworks.patch(copy.deepcopy(stock))
    expected, found = stock(**batch()).loss, patched(**batch()).loss
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    assert_same_gradients(stock, patched, rtol=1e-4, atol=1e-6)
    assert sum(parameter.grad is not None for parameter in patched.parameters()) == 8

    with pytest.raises(UserError, match="leave the head out of target_modules"):
        lossworks.patch(adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match="must be plain LoRA"):
        lossworks.patch(adapted(target_modules=["lm_head"], use_dora=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("patched_first", [False, True])
def test_adapters_on_the_head_get_the_same_gradients(name, patched_first):
    """With dropout, with a softcap, with a scale of the logits, under an update; and C + B·A isn't formed."""
    from peft import LoraConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(0)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], lora_dropout=0.3, init_lora_weights=False
        )
        return get_peft_model(model, config)

    stock = adapted(tiny(name))
    patched = adapted(lossworks.patch(tiny(name))) if patched_first else lossworks.patch(adapted(tiny(name)))
    patched.load_state_dict(stock.state_dict())
    for step in range(2):
        found = []
        for model in (stock, patched):
            torch.manual_seed(step)
            loss = model.train()(**batch()).loss
            loss.backward()
            found.append(loss)
        torch.testing.assert_close(*found)
        assert_same_gradients(stock, patched, rtol=1e-4, atol=1e-6)
        for model in (stock, patched):
            torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.5).step()
            model.zero_grad()
    assert [x.grad is not None for x in patched.parameters()].count(True) == 0
    wanted, got = (model.eval()(**batch()) for model in (stock, patched))
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.logits + 0, wanted.logits, rtol=1e-4, atol=1e-3)
    with stock.disable_adapter(), patched.disable_adapter():
        torch.testing.assert_close(patched(**batch()).loss, stock(**batch()).loss)
    copied = pickle.loads(pickle.dumps(patched))  # noqa: S301 - our own
    torch.testing.assert_close(copied(**batch()).loss, wanted.loss)
    for model in (stock, patched):
        model.merge_adapter()
    torch.testing.assert_close(patched(**batch()).loss, stock(**batch()).loss)


def test_adapters_wider_than_the_model_train_in_their_own_precision():
    """PEFT keeps adapters of a bfloat16 model in float32."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], init_lora_weights=False)
    stock = get_peft_model(tiny("llama").bfloat16(), config)
    patched = lossworks.patch(copy.deepcopy(stock))
    expected, found = stock(**batch()).loss, patched(**batch()).loss
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
    expected.backward()
    found.backward()
    assert_same_gradients(stock, patched, rtol=5e-2, atol=5e-3)


def test_a_trainer_that_passes_over_the_loss_is_refused_unless_it_trains_the_same():
    """As SFTTrainer of TRL, which puts a forward in place that takes the log-probabilities itself."""

    def fused(self, *args, fused_lm_head=False, **kwargs):
        del fused_lm_head
        return type(self).forward(self, *args, **kwargs)

    plain, other = lossworks.patch(tiny("llama")), lossworks.patch(tiny("llama"), "ldr")
    plain.forward = fused.__get__(plain)
    assert plain(**batch()).loss.isfinite()
    with pytest.raises(UserError, match="loss=ldr: this trainer computes a cross-entropy of its own"):
        other.forward = fused.__get__(other)


def test_a_patched_model_is_pickled_and_patched_where_it_is_read():
    _, patched = both("gemma2")
    read = pickle.loads(pickle.dumps(patched))  # noqa: S301 - our own

    assert type(read) is type(patched)
    torch.testing.assert_close(read(**batch()).loss, patched(**batch()).loss)
    assert read(**batch()).logits.formed is None


def test_a_head_that_is_replaced_is_taken_or_refused():
    stock, patched = both("llama")
    for model in (stock, patched):
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCAB + 8)
    torch.testing.assert_close(patched(**batch()).loss, stock(**batch()).loss)

    patched.lm_head = nn.Sequential(patched.lm_head)
    with pytest.raises(UserError, match=r"head is a torch\.Sequential"):
        patched(**batch())


def test_logits_of_weights_that_have_changed_are_not_given():
    _, patched = both("llama")
    with torch.no_grad():
        early, late = patched(**batch()).logits, patched(**batch()).logits
        assert early.tolist()
        patched.lm_head.weight.zero_()
        assert early.abs().sum() > 0
        with pytest.raises(RuntimeError, match="weights have changed since"):
            late.sum()


def test_inference_mode():
    stock, patched = both("llama")
    with torch.inference_mode():
        expected, found = stock(**batch()), patched(**batch())
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.logits + 0, expected.logits)


def test_another_ignored_label_is_the_only_one():
    stock, patched = both("llama")
    given = batch()
    given["labels"] = given["labels"].masked_fill(given["labels"] == -100, 5)
    torch.testing.assert_close(patched(**given, ignore_index=5).loss, stock(**given, ignore_index=5).loss)
    with pytest.raises(UserError, match="-100"):
        patched(**batch(), ignore_index=5)


def test_features_in_another_dtype_than_the_head_s():
    """Mamba's go on in float32 where its weights are bfloat16, and are cast before the head."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2)
    stock = MambaForCausalLM(config).bfloat16()
    patched = lossworks.patch(copy.deepcopy(stock))
    expected, found = stock(**batch()), patched(**batch())
    torch.testing.assert_close(found.loss.float(), expected.loss.float(), rtol=2e-2, atol=2e-2)
    found.loss.backward()


def test_what_is_no_model_with_a_linear_head_is_refused():
    with pytest.raises(UserError, match="patch takes a model, not a str"):
        lossworks.patch("folder")
    from transformers import BertConfig, BertModel

    with pytest.raises(UserError, match="holds no causal language model of transformers"):
        lossworks.patch(nn.Linear(2, 2))
    with pytest.raises(UserError, match="holds no causal language model of transformers"):
        lossworks.patch(
            BertModel(
                BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
            )
        )
    model = tiny("llama")
    with pytest.raises(UserError, match="must be a row loss"):
        lossworks.patch(model, "batch-dice")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match=r"head is a torch\.Sequential and must be a plain torch\.nn\.Linear"):
        lossworks.patch(model)


def test_a_model_that_does_more_to_its_logits_is_refused_and_left_as_it_was():
    model = tiny("llama")
    stock = type(model)

    class Squared(stock):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss, outputs.logits = outputs.loss * 2, outputs.logits**2
            return outputs

    model.__class__ = Squared
    with pytest.raises(UserError, match="not by a linear head alone"):
        lossworks.patch(model)
    assert type(model) is Squared
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_patched_model_is_one_graph(kind):
    """With labels it gives the loss and its gradients; without any, the logits, as the library's does."""
    stock, patched = both(kind)
    inputs = batch()
    torch.compiler.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    expected, found = stock(**inputs), compiled(**inputs)
    for loss in (expected.loss, found.loss):
        loss.backward()
    patched.train()
    plain = compiled(input_ids=inputs["input_ids"])

    torch.testing.assert_close(found.loss, expected.loss)
    assert_same_gradients(stock, patched)
    torch.testing.assert_close(plain.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_the_class_of_a_patched_model_reads_others(tmp_path):
    """As code does that keeps ``type(model)``."""
    _, patched = both("llama")
    patched.save_pretrained(tmp_path)
    again = type(patched).from_pretrained(tmp_path)

    assert torch.equal(again(**batch()).loss, patched(**batch()).loss)
