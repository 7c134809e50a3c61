"""Local checkpoints of the transformers library, with their head taken off."""

import inspect
import textwrap
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lossworks.adapters.transformers_private import eager_attention
from lossworks.errors import UserError
from lossworks.home import switch_off_usage_reports
from lossworks.models.interface import Head, LanguageModel
from lossworks.specs import ModelSpec

# Names under which architectures (Cohere, Granite, Falcon-H1) multiply or divide their logits.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
IDENTITY_GAIN = 2.0**20
"""Gain of a GPT-2's norms that are to take nothing away: over √(IDENTITY_GAIN² + var) it is 1."""


class HuggingFaceModel(LanguageModel):
    """A causal language model of the transformers library.

    The features come from its base model and the head from its output embeddings; the library's own loss and
    logits aren't used. Dropout stays as the checkpoint's configuration has it.

    Args:
        model: What ``AutoModelForCausalLM`` returns.

    Raises:
        UserError: The model has no linear head, no list of blocks, or scales its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._reads_alike = False  # until it was compared
        self._require_usable()

    @classmethod
    def from_spec(cls, spec: ModelSpec, *, vocab_size: int) -> Self:
        """Return the checkpoint of ``spec.source``, ``hf:PATH``.

        A field that was set to its default passes, so that a stored, fully resolved spec can be read again.

        Raises:
            UserError: ``spec`` sets a size that the checkpoint decides, or ``load`` refuses the folder.
        """
        for name in sorted(spec.model_fields_set - {"source"}):
            if getattr(spec, name) != ModelSpec.model_fields[name].default:
                raise UserError(f"model.{name} has no effect with model.source={spec.source}: leave it out")
        return cls.load(local_folder(spec), vocab_size=vocab_size)

    @classmethod
    def load(cls, folder: Path, *, vocab_size: int) -> Self:
        """Return the checkpoint in ``folder`` as float32, in eval mode; nothing is downloaded or executed.

        Args:
            folder: Holds ``config.json`` and weights as safetensors.
            vocab_size: Entries of the tokenizer; the model's vocabulary must be at least as large.

        Raises:
            UserError: The folder isn't such a checkpoint, its tensors don't fit its configuration, its
                vocabulary is too small, or its logits aren't those of a linear head.
        """
        _require_checkpoint(folder)
        model = cls(_from_pretrained(folder)).eval()
        entries = min(model.head().weight.shape[0], model.model.get_input_embeddings().weight.shape[0])
        if vocab_size > entries:
            raise UserError(
                f"{folder}: the tokenizer has {vocab_size} entries and the model only {entries}; "
                f"use the tokenizer that the model was trained with"
            )
        model._require_own_logits(folder)
        return model

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the features (B, L, D), after the final norm, of ``tokens`` (B, L) int64."""
        found: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return found

    def attention_shape(self) -> tuple[int, int]:
        """Return the configuration's ``num_hidden_layers`` and ``num_attention_heads``.

        Raises:
            UserError: It has none.
        """
        layers = getattr(self.config, "num_hidden_layers", None)
        heads = getattr(self.config, "num_attention_heads", None)
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise UserError(f"{self.config.model_type} model: its configuration has no attention heads")
        return layers, heads

    def observe_attention(self) -> None:
        """See :meth:`LanguageModel.observe_attention`; attention is the library's ``eager`` one from now on.

        Raises:
            UserError: The architecture has none that gives its probabilities, or drops some of them.
        """
        for name in ("attn_pdrop", "attention_dropout"):
            value = getattr(self.config, name, None)
            if value:
                raise UserError(
                    f"{self.config.model_type} model with {name}={value}: dropout changes the attention "
                    "probabilities in training, so that their entropies can't be a loss; set it to 0"
                )
        super().observe_attention()
        self.model.set_attn_implementation("eager")

    def observed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`LanguageModel.observed`; attention is the library's ``eager`` one meanwhile."""
        with eager_attention(self.model):
            found = self.model.base_model(input_ids=tokens, use_cache=False, output_attentions=True)
        layers, heads = self.attention_shape()
        given = found.attentions or ()
        wanted = (len(tokens), heads, tokens.shape[1], tokens.shape[1])
        if len(given) != layers or any(one is None or one.shape != wanted for one in given):
            raise UserError(
                f"{self.config.model_type} model: doesn't give the attention probabilities of all its layers"
            )
        hidden: Tensor = found.last_hidden_state
        return hidden, torch.stack([probability_entropies(one) for one in given], dim=1)

    def reader(self, rows: int, length: int) -> "HuggingFaceReader":
        """See :meth:`LanguageModel.reader`; the keys and values are in the library's own cache.

        Raises:
            UserError: The model has fewer positions than ``length``, keeps no such cache, or gives other
                features with it than without.
        """
        del rows
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise UserError(
                f"{length} tokens of prompt and continuation are more than the {most} positions of this "
                f"{self.config.model_type} model; give shorter prompts or fewer new tokens"
            )
        if not self._reads_alike:
            self._require_alike()
            self._reads_alike = True
        return HuggingFaceReader(self.model.base_model, self.config.model_type)

    @torch.no_grad()
    def _require_alike(self) -> None:
        """Compare features with the cache and filling with those without: not every architecture has them."""
        device = self.head().weight.device
        tokens = (torch.arange(10, device=device).reshape(2, 5) + 1) % self.head().weight.shape[0]
        valid = torch.ones_like(tokens, dtype=torch.bool)
        valid[1, :2] = False
        reader = HuggingFaceReader(self.model.base_model, self.config.model_type)
        reader.read(tokens[:, :4], valid[:, :4])
        found = reader.read(tokens[:, 4:], valid[:, 4:])
        alone = [self.hidden(row[own][None])[0, -1] for row, own in zip(tokens, valid, strict=True)]
        if not torch.allclose(found, torch.stack(alone), rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{self.config.model_type} model: can't generate: with the library's cache and prompts of "
                "unequal length it gives other features than without"
            )

    def head(self) -> Head:
        """Return the output embeddings, and the softcap that the configuration gives."""
        linear = self.model.get_output_embeddings()
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return Head(linear.weight, getattr(linear, "bias", None), softcap)

    def blocks(self) -> list[nn.Module]:
        """Return the modules of the base model's largest list, by parameters."""
        lists = [module for module in self.model.base_model.modules() if isinstance(module, nn.ModuleList)]
        largest = max(lists, key=_parameters, default=nn.ModuleList())
        return list(largest)

    def checkpoint_activations(self) -> None:
        """Switch on the library's activation checkpointing; it acts in training mode.

        Raises:
            UserError: The architecture doesn't support it.
        """
        if not self.model.supports_gradient_checkpointing:
            raise UserError(
                f"activation_checkpointing=true: {self.config.model_type} models don't support it"
            )
        # The library renamed the method, and warns of the old name.
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def depth_and_width(self) -> tuple[int, int] | None:
        """Return the configuration's ``num_hidden_layers`` and ``hidden_size``, or None without them."""
        layers = getattr(self.config, "num_hidden_layers", None)
        width = getattr(self.config, "hidden_size", None)
        return None if layers is None or width is None else (layers, width)

    def _require_usable(self) -> None:
        kind = self.config.model_type
        for name in LOGIT_SCALES:
            value = getattr(self.config, name, None)
            if value is not None and value != 1:
                raise UserError(
                    f"{kind} model with {name}={value}: models that scale their logits can't be used"
                )
        if not isinstance(getattr(self.model.get_output_embeddings(), "weight", None), Tensor):
            raise UserError(f"{kind} model: has no linear head")
        if not self.blocks():
            raise UserError(f"{kind} model: has no list of transformer blocks")

    @torch.no_grad()
    def _require_own_logits(self, folder: Path) -> None:
        """Compare with the library's logits, for architectures do more to them than a configuration tells."""
        tokens = torch.arange(4)[None] % self.head().weight.shape[0]
        expected = self.model(input_ids=tokens, use_cache=False).logits
        logits = self.logits(tokens)
        if logits.shape != expected.shape or not torch.allclose(
            logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            raise UserError(
                f"{folder}: {self.config.model_type} models compute their logits not by a linear head"
            )


class HuggingFaceReader:
    """A model of transformers that reads rows piece by piece, with the library's own cache.

    See :class:`lossworks.models.generation.decoding.Reader`.

    Args:
        base: The model without its head, in eval mode.
        kind: What messages call it.
    """

    def __init__(self, base: Any, kind: str) -> None:
        self._base, self._kind = base, kind
        self._positioned = "position_ids" in inspect.signature(base.forward).parameters
        self._cache: Any = None
        self._valid: Tensor | None = None

    def read(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`lossworks.models.generation.decoding.Reader.read`.

        Raises:
            UserError: The architecture keeps no keys and values.
        """
        self._valid = valid if self._valid is None else torch.cat((self._valid, valid), dim=1)
        positions = (self._valid.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        found = self._base(
            input_ids=tokens,
            attention_mask=self._valid.long(),
            past_key_values=self._cache,
            use_cache=True,
            **({"position_ids": positions} if self._positioned else {}),
        )
        self._cache = getattr(found, "past_key_values", None)
        if self._cache is None:
            raise UserError(f"{self._kind} model: can't generate: it keeps no keys and values")
        features: Tensor = found.last_hidden_state[:, -1]
        return features

    def keep(self, rows: Tensor) -> None:
        """See :meth:`lossworks.models.generation.decoding.Reader.keep`."""
        self._cache.batch_select_indices(rows)
        self._valid = None if self._valid is None else self._valid[rows]


def probability_entropies(p: Tensor) -> Tensor:
    """Return −Σ p·log p over the last axis of probabilities (…, K), in nats and float32 at least.

    Its gradient is finite where a probability is 0, other than that of ``torch.special.entr``.
    """
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


def local_folder(spec: ModelSpec) -> Path:
    """Return PATH of ``spec.source``, ``hf:PATH``."""
    return Path(spec.source.removeprefix("hf:")).expanduser()


def from_config(spec: ModelSpec, device: str = "meta") -> HuggingFaceModel:
    """Return the model of the ``config.json`` in the folder of ``spec.source`` with untrained parameters.

    Args:
        spec: Its folder's weights are not read. With ``norm=none`` the norms are those of a GPT-2 from which
            they were removed: the library has no GPT-2 without any.
        device: Where the parameters are; on the meta device they have shapes only.

    Raises:
        UserError: There is no usable configuration.
    """
    switch_off_usage_reports()
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = local_folder(spec)
    _require_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if spec.norm == "none":
            config.layer_norm_epsilon, config.tie_word_embeddings = IDENTITY_GAIN**2, False
        with torch.device(device):
            return HuggingFaceModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: has no usable config.json: {_one_line(error)}") from None


def _from_pretrained(folder: Path) -> nn.Module:
    switch_off_usage_reports()
    from transformers import AutoModelForCausalLM

    try:
        found: tuple[nn.Module, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # the library would raise without naming the tensor
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be loaded as a causal language model: {_one_line(error)}") from None
    model, info = found
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{folder}: a checkpoint of another shape: {name} is {tuple(stored)} in the file and "
            f"{tuple(expected)} in the model"
        )
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights lack {', '.join(sorted(info['missing_keys']))}")
    return model


def _require_config(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; transformers models are read from disk only")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json; it must be a folder that save_pretrained wrote")


def _require_checkpoint(folder: Path) -> None:
    _require_config(folder)
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder}: has its weights only as .bin (pickle), which can run code when loaded; "
            f"convert them to safetensors"
        )
    raise UserError(f"{folder}: has no weights (*.safetensors)")


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _one_line(error: Exception) -> str:
    """Return the start of a message; the library's run over many lines of advice on downloads."""
    return textwrap.shorten(str(error), width=240, placeholder=" …")
