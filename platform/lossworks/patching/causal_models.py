"""The head in causal language models of the transformers library: their loss without the logits."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.home import switch_off_usage_reports
from lossworks.losses import create
from lossworks.losses.interface import RowLoss
from lossworks.patching.deferred_logits import deferred_logits
from lossworks.patching.linear_heads import classifier_of, defer, why_not_linear

Model = TypeVar("Model", bound=nn.Module)
_FUSED_BY_TRL = "fused_lm_head"  # what the forward takes that TRL puts in place of a model's own


def patch(model: Model, loss: str = "cross-entropy", **hyperparameters: Any) -> Model:
    """Change a causal language model of transformers so that it computes its loss without the logits.

    The model is used as before, by ``transformers.Trainer``, by TRL or by a loop of one's own: given
    ``labels`` it returns the same loss and has the same gradients. ``logits`` in its outputs are computed
    when something reads them, and cost nothing otherwise; without labels in eval mode, as in generation,
    nothing changes. Label smoothing of ``transformers.Trainer`` is recognised and forms no logits, either.
    Under ``torch.compile`` outputs with a loss hold no logits. Trainers of TRL that take log-probabilities by
    a fused head of their own (SFTTrainer from 1.0) go past the model's loss: with the cross-entropy they
    train the same, and another loss is refused there.

    Args:
        model: Any model of transformers with a linear head and the library's loss of causal language models,
            with or without bias, softcap or a scale of the logits, tied or not; or a model of PEFT, with LoRA
            on the head as well, where C + B·A is never formed. It is changed in place, on whichever device it
            is; patch it before it is wrapped for several processes. Patched again, it takes the loss of the
            last call.
        loss: A row loss of the catalogue, in place of the cross-entropy.
        hyperparameters: Of the loss, such as ``label_smoothing`` of the cross-entropy.

    Returns:
        ``model``. Where no label counts its loss is 0; the library's is not a number there.

    Raises:
        UserError: The model isn't such a model, or its logits or its loss aren't those of a linear head: both
            are compared on a few tokens.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, vocab_size=32)
        >>> model = patch(LlamaForCausalLM(config))
        >>> tokens = torch.arange(8)[None]
        >>> model(input_ids=tokens, labels=tokens).loss.shape
        torch.Size([])
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"patch takes a model, not a {type(model).__name__}: load it with transformers first")
    chosen = create(loss, **hyperparameters)
    if not isinstance(chosen, RowLoss) or next(chosen.parameters(), None) is not None:
        raise UserError(
            f"loss={loss}: must be a row loss without parameters of its own; see `lossworks losses`"
        )
    inner: Any = _causal_model(model)
    if not isinstance(inner, _Patched):
        _require_linear_head(inner)
        before = _probed(inner)
        stock: Any = type(inner)
        inner.__class__ = _patched_class(stock)
        head = inner.get_output_embeddings()
        own_class = type(head)
        defer(head, type(inner).__name__)
        _set_loss(inner, create("cross-entropy"))
        try:
            _require_equal(before, _probed(inner), stock.__name__)
        except BaseException:
            head.__class__ = own_class
            inner.__class__ = stock
            raise
    _set_loss(inner, chosen)
    return model


def _set_loss(model: Any, loss: RowLoss) -> None:
    """Give a patched model its loss, reduced in both ways that it is asked for."""
    model.head_loss, model.head_sum = (loss.with_reduction(how) for how in ("mean", "sum"))


class _Patched:
    """What :func:`patch` mixes into the class of a model."""

    config: Any
    training: bool
    get_output_embeddings: Callable[[], Any]
    head_loss: RowLoss
    head_sum: RowLoss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a further model of the class, as ``from_pretrained`` does, with the cross-entropy."""
        super().__init__(*args, **kwargs)
        _set_loss(self, create("cross-entropy"))

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a forward that would pass over another loss than the cross-entropy."""
        takes = inspect.signature(value, follow_wrapped=False).parameters if name == "forward" else {}
        if _FUSED_BY_TRL in takes and self.head_loss.slug != "cross-entropy":
            raise UserError(
                f"loss={self.head_loss.slug}: this trainer computes a cross-entropy of its own and never "
                "asks the model for its loss; use transformers.Trainer, or the trainer's compute_loss_func"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle it as a model of the library's class that is patched again where it is read."""
        return _blank, (type(self).__mro__[2],), vars(self)

    @property
    def loss_function(self) -> Any:
        """The loss of the features, while they stand in the logits' place; the library's otherwise."""
        stock = super().loss_function  # type: ignore[misc]
        return self._loss_of_features if getattr(self.get_output_embeddings(), "deferring", False) else stock

    @loss_function.setter
    def loss_function(self, _: Any) -> None:
        raise UserError(
            "loss_function of a patched model can't be set: call lossworks.patch(model, loss) again"
        )

    def _deferred_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, with the features in place of the logits where that may save them."""
        forward: Any = super().forward  # type: ignore[misc]
        # What is compiled can't defer logits: they are there, or nobody asks for them.
        if kwargs.get("labels") is None and not (self.training and not torch.compiler.is_compiling()):
            return forward(*args, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
        head = defer(self.get_output_embeddings(), type(self).__name__)  # it may be new, as after resizing
        text = self.config.get_text_config()
        softcap = getattr(text, "final_logit_softcapping", None)
        head.deferring = True
        if softcap is not None:
            text.final_logit_softcapping = None
        try:
            self._softcap = softcap
            outputs = forward(*args, return_dict=True, **kwargs)
        finally:
            head.deferring = False
            if softcap is not None:
                text.final_logit_softcapping = softcap
        if torch.compiler.is_compiling():
            outputs.logits = None
        else:
            outputs.logits = deferred_logits(*classifier_of(outputs.logits, head), softcap)
        return outputs if as_dict else outputs.to_tuple()

    def _loss_of_features(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return what the library's loss of causal language models returns, of features in place of logits.

        Args:
            logits: Features (B, L, D); the name is the library's.
            labels: (B, L) int64; position t is compared with label t + 1.
            vocab_size: Ignored.
            num_items_in_batch: What the sum of losses is divided by; None for the labels that count.
            ignore_index: Label that counts for nothing.
            shift_labels: (B, L) int64, labels in their places already.
        """
        del vocab_size
        head = self.get_output_embeddings()
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.to(logits.device).reshape(-1)
        loss = self.head_loss if num_items_in_batch is None else self.head_sum
        if ignore_index != loss.ignore_index:  # whose own ignored label is then as wrong as any below 0
            targets = targets.masked_fill(targets == loss.ignore_index, -1)
            targets = targets.masked_fill(targets == ignore_index, loss.ignore_index)
        features, classifier, bias = classifier_of(logits.reshape(-1, logits.shape[-1]), head)
        found = loss.linear(features, classifier, targets, bias, softcap=self._softcap)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(found.device)
        return found if num_items_in_batch is None else found / num_items_in_batch


@functools.cache
def _patched_class(stock: Any) -> type[nn.Module]:
    """Return ``stock`` with the head's loss, under its own name, which configurations hold."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._deferred_forward(*args, **kwargs)

    names = {"__module__": stock.__module__, "__doc__": stock.__doc__, "forward": forward}
    return type(stock.__name__, (_Patched, stock), names)


def _blank(stock: Any) -> nn.Module:
    """Return a patched model without anything in it, to be filled."""
    kind: Any = _patched_class(stock)
    found: nn.Module = kind.__new__(kind)
    return found


def _causal_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers that has the head: ``model``, or what it wraps."""
    switch_off_usage_reports()
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return cast("nn.Module", module)
    raise UserError(
        f"{type(model).__name__}: holds no causal language model of transformers: nothing in it has output "
        "embeddings, one row for each entry of a vocabulary"
    )


def _require_linear_head(model: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    name, reason = type(model).__name__, why_not_linear(model.get_output_embeddings())
    if reason is not None:
        raise UserError(f"{name}: {reason}")
    if "forward" in vars(model):
        raise UserError(
            f"{name}: its forward has been replaced: patch the model before anything else wraps it"
        )
    if model.loss_function is not ForCausalLMLoss:
        raise UserError(f"{name}: its loss isn't the library's loss of causal language models")


@torch.no_grad()
def _probed(model: Any) -> tuple[Tensor, Tensor] | None:
    """Return the loss and the logits of four tokens in eval mode; None of a model without values."""
    weight = model.get_output_embeddings().weight
    if weight.is_meta:
        return None
    training = model.training
    model.eval()
    try:
        tokens = (torch.arange(4, device=weight.device) % len(weight))[None]
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
        return outputs.loss, outputs.logits + 0
    except (TypeError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(f"{type(model).__name__}: can't be asked for a loss of tokens: {error}") from error
    finally:
        model.train(training)


def _require_equal(
    before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor] | None, name: str
) -> None:
    if before is None or after is None:
        return
    rtol = 1e-3 if before[1].dtype in (torch.float32, torch.float64) else 3e-2
    for stock, own in zip(before, after, strict=True):
        if stock.shape != own.shape or not torch.allclose(
            stock.float(), own.float(), rtol=rtol, atol=rtol, equal_nan=True
        ):
            raise UserError(f"{name}: computes its logits or its loss not by a linear head alone")
