"""Which layers of a language model hold a fact, found by damaging and restoring its states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, integer, number, text
from lossworks.data.answers.facts import Fact, facts_of
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.text.tokenizer import end_of_text_id, load_tokenizer
from lossworks.errors import UserError
from lossworks.models import LanguageModel, Outputs
from lossworks.models.pretrained import TOKENIZER
from lossworks.patching.decoder_parts import decoder_parts
from lossworks.specs import ModelSpec, RunSpec
from lossworks.tasks.analyses import Analysis, Curve, Finding, Probe
from lossworks.tasks.interface import Mode, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATES = ("residual stream", "MLP", "attention")
TOKENS = ("first subject token", "last subject token", "last token")
_NAMED = 8  # facts that a sentence names

Rerun = Callable[[Tensor], Outputs]


@dataclass(frozen=True)
class TracedFact:
    """A fact as tokens.

    Attributes:
        prompt: (T,) int64.
        answer: (A,) int64.
        subject: Positions of the subject in the prompt.
    """

    prompt: Tensor
    answer: Tensor
    subject: range

    @property
    def places(self) -> list[int | None]:
        """Positions of :data:`TOKENS`; a subject of one token has no first one besides its last."""
        first = self.subject[0] if len(self.subject) > 1 else None
        return [first, self.subject[-1], len(self.prompt) - 1]


def tokenized(fact: Fact, tokenizer: Any, before: Sequence[int]) -> TracedFact:
    """Return a fact as tokens.

    Args:
        fact: The fact.
        tokenizer: Of the model.
        before: Tokens that every text begins with.
    """
    encoded = tokenizer.encode(fact.prompt, add_special_tokens=False)
    start = fact.prompt.rindex(fact.subject)
    end = start + len(fact.subject)
    inside = [place for place, (a, b) in enumerate(encoded.offsets) if a < end and b > start]
    subject = range(len(before) + inside[0], len(before) + inside[-1] + 1)
    answer = tokenizer.encode(fact.answer, add_special_tokens=False).ids
    return TracedFact(torch.tensor([*before, *encoded.ids]), torch.tensor(answer), subject)


class Tracer:
    """Runs of a decoder with damaged and restored states.

    Args:
        model: Ours or a GPT-2, in evaluation mode.
        rerun: From tokens (N, L) to the model's outputs.

    Attributes:
        layers: How many blocks it has.

    Raises:
        UserError: It is another model.
    """

    def __init__(self, model: LanguageModel, rerun: Rerun) -> None:
        parts = decoder_parts(model, "analyses: causal-tracing")
        self._rerun, self._embedding = rerun, parts.embeddings[0]
        self._modules: Mapping[str, list[nn.Module]] = {
            "residual stream": model.blocks(),
            "MLP": [block.feed_forward_output for block in parts.blocks],
            "attention": [block.attention_output for block in parts.blocks],
        }
        self.layers = len(parts.blocks)

    def deviation(self, facts: Sequence[TracedFact]) -> float:
        """Return the standard deviation of the embeddings of all subjects' tokens."""
        tokens = torch.cat([fact.prompt[list(fact.subject)] for fact in facts])
        weight = self._embedding.weight
        if not isinstance(weight, Tensor):
            raise TypeError("the embedding has no weight")
        return float(weight[tokens.to(weight.device)].double().std(correction=0))

    def clean(self, fact: TracedFact) -> tuple[float, bool, dict[nn.Module, Tensor]]:
        """Return the probability that the answer begins, whether all is given, and states (1, T, D)."""
        states: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module) -> Callable[[Tensor], Tensor]:
            def kept(state: Tensor) -> Tensor:
                states[module] = state
                return state

            return kept

        modules = [module for of in self._modules.values() for module in of]
        with _changing({module: keep(module) for module in modules}):
            p = float(self._begun(fact, 1))
        return p, self._answered(fact), states

    def damaged(
        self,
        fact: TracedFact,
        noise: Tensor,
        clean: Mapping[nn.Module, Tensor],
        restored: Sequence[tuple[str, Sequence[int], Sequence[int | None]]] = (),
    ) -> Tensor:
        """Return the probability that the answer begins, (R,), in R runs with noise on the subject.

        Args:
            fact: The fact.
            noise: (R, tokens of the subject, D).
            clean: States of the run without noise.
            restored: What is as without noise: one of :data:`STATES`, its layers, and the position in each
                of the R runs; None for all positions.
        """
        subject = slice(fact.subject[0], fact.subject[-1] + 1)

        def disturbed(state: Tensor) -> Tensor:
            state = state.clone()
            state[:, subject] += noise.to(state)
            return state

        changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {self._embedding: disturbed}
        for kind, layers, positions in restored:
            for layer in layers:
                module = self._modules[kind][layer]
                changes[module] = _restoring(clean[module], positions)
        with _changing(changes):
            return self._begun(fact, len(noise))

    def _begun(self, fact: TracedFact, runs: int) -> Tensor:
        """Return the probability of the answer's first token, float64 (runs,)."""
        logits = self._logits(fact.prompt.expand(runs, -1), len(fact.prompt) - 1)
        return logits[:, 0].double().softmax(-1)[:, int(fact.answer[0])]

    def _answered(self, fact: TracedFact) -> bool:
        """Return whether greedy choice gives all of the answer."""
        read = torch.cat((fact.prompt, fact.answer[:-1]))
        found = self._logits(read[None], len(fact.prompt) - 1)[0].argmax(-1)
        return bool((found.cpu() == fact.answer).all())

    def _logits(self, tokens: Tensor, start: int) -> Tensor:
        """Return the logits behind tokens (N, L) from a position on, (N, L − start, V)."""
        outputs = self._rerun(tokens.to(next(self._embedding.parameters()).device))
        if outputs.head is None:
            raise ValueError("outputs must have their head")
        return outputs.head.logits(outputs.hidden[:, start:])


def _restoring(clean: Tensor, positions: Sequence[int | None]) -> Callable[[Tensor], Tensor]:
    def restored(state: Tensor) -> Tensor:
        state = state.clone()
        for run, position in enumerate(positions):
            where = slice(None) if position is None else position
            state[run, where] = clean[0, where]
        return state

    return restored


@contextmanager
def _changing(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change what modules give, inside; of several outputs the first."""

    def hook_of(change: Callable[[Tensor], Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return hook

    with ExitStack() as stack:
        for module, change in changes.items():
            handle = module.register_forward_hook(hook_of(change))
            stack.callback(handle.remove)
        yield


def window(layer: int, size: int, layers: int) -> range:
    """Return the layers of a window about one, cut off at the first and the last layer."""
    return range(max(0, layer - size // 2), min(layers, layer - size // 2 + size))


class _FactRows:
    """Facts as rows of data; each row's target is its number."""

    def __init__(self, facts: Sequence[TracedFact]) -> None:
        self._facts = facts

    def __len__(self) -> int:
        return len(self._facts)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the prompts of rows, padded, and their numbers."""
        prompts = [self._facts[row].prompt for row in rows]
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        return {"inputs": padded, "targets": torch.from_numpy(np.asarray(rows, dtype=np.int64))}


class CausalTracing(Analysis):
    """Causal tracing: which layers' states bring an answer back after noise on the subject's embeddings.

    Each fact is run as it is, with Gaussian noise on the embeddings of its subject, and with noise but one
    state as it was without: the residual stream behind a block, or what a window of MLPs or attentions adds
    to it, at the first or last token of the subject or at the last token. The indirect effect is by how much
    that raises the probability of the answer's first token. Only facts that the model answers, greedily and
    to the end, are traced.

    When to use it: to choose the layers that unlearning or editing may change, as papers on both do. When
    not: as proof that a fact is nowhere else; a state that brings it back need not be the only one that holds
    it. Facts told in a few words leave little between subject and answer, and effects that are spread out.

    ``facts:N`` are the made-up ones that ``data.corpus=facts:N`` trains.
    """

    slug = "causal-tracing"
    formula = "P(answer | noise, one state restored) - P(answer | noise)"
    paper = Paper(
        "Locating and Editing Factual Associations in GPT",
        "Meng, Bau, Andonian, Belinkov",
        2022,
        "section 2; for unlearning: arXiv 2504.12996",
    )
    example = "lossworks analyse {slug} RUN facts=facts:40"
    flags = ("random",)
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/known_facts": "max"}

    facts: str | None = text(
        None, "facts:N, or a JSONL file of prompt, subject and answer, the answer with the space before it"
    )
    noise: float = number(3.0, "deviation of the noise, over that of the subjects' embeddings", ge=0)
    samples: int = integer(10, "draws of the noise for each fact", ge=1, le=1000)
    window: int | None = integer(
        None,
        "MLPs or attentions restored at once; null for a fifth of the layers, as the paper's 10 of 48",
        ge=1,
        optional=True,
    )
    seed: int = integer(0, "of the noise", ge=0)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse all but whole language models, and a run without facts.

        Raises:
            UserError: Naming the field.
        """
        who = f"analyses: {self.slug}"
        if not isinstance(getattr(spec, "model", None), ModelSpec):
            raise UserError(f"{who} traces language models, not models of task={task.slug}")
        if spec.sharding.kind == "fsdp" or spec.compile:
            raise UserError(f"{who} looks into blocks: sharding must be ddp or none, and compile false")
        if self.facts is None:
            raise UserError(
                f"{who}: facts is not set; give a JSONL file, or facts:N for those of data.corpus=facts:N"
            )

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`.

        Raises:
            UserError: The facts can't be read, or the model's parts are not known.
        """
        told = facts_of(str(self.facts))
        tokenizer = load_tokenizer(probe.task.learnt.files[TOKENIZER])
        end = end_of_text_id(tokenizer)
        facts = [tokenized(fact, tokenizer, [] if end is None else [end]) for fact in told]
        model = next(module for module in probe.model.modules() if isinstance(module, LanguageModel))

        def traced(outputs: Outputs, batch: Batch) -> Tensor:
            if outputs.rerun is None:
                raise ValueError("outputs must be able to run the model again")
            tracer = Tracer(model, outputs.rerun)
            sums = _Sums(len(facts), tracer.layers)
            deviation = self.noise * tracer.deviation(facts)
            for number_of in batch["targets"].tolist():
                if number_of != IGNORE_INDEX:
                    self._trace(tracer, facts[number_of], number_of, deviation, sums)
            return sums.flat().to(outputs.hidden.device)

        found = probe.over(traced, _FactRows(facts), np.arange(len(facts)))
        return self._finding(told, _Sums.of(found, len(facts)))

    def _trace(self, tracer: Tracer, fact: TracedFact, place: int, deviation: float, sums: "_Sums") -> None:
        clean, right, states = tracer.clean(fact)
        if not right:
            return
        sums.known[place] = 1
        features = states[next(iter(states))].shape[-1]
        drawn = torch.Generator().manual_seed(self.seed * 2**20 + place)
        noise = deviation * torch.randn(self.samples, len(fact.subject), features, generator=drawn)
        corrupted = float(tracer.damaged(fact, noise, states).mean())
        sums.clean += clean
        sums.corrupted += corrupted
        places = [(kind, at) for kind, at in enumerate(fact.places) if at is not None]
        positions = [at for _, at in places for _ in range(self.samples)]
        for kind, _ in places:
            sums.counts[kind] += 1
        size = self.window or max(1, round(tracer.layers / 5))
        for state, name in enumerate(STATES):
            for layer in range(tracer.layers):
                layers = [layer] if state == 0 else window(layer, size, tracer.layers)
                p = tracer.damaged(fact, noise.repeat(len(places), 1, 1), states, [(name, layers, positions)])
                effects = p.reshape(len(places), self.samples).mean(1) - corrupted
                for (kind, _), effect in zip(places, effects.tolist(), strict=True):
                    sums.effects[state, kind, layer] += effect

    def _finding(self, told: Sequence[Fact], sums: "_Sums") -> Finding:
        known = int(sums.known.sum())
        lacking = [fact.subject for fact, right in zip(told, sums.known.tolist(), strict=True) if not right]
        notes = []
        if lacking:
            more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
            named = ", ".join(lacking[:_NAMED])
            notes.append(f"The model does not answer {len(lacking)} of {len(told)} facts: {named}{more}.")
        if not known:
            return Finding({"known_facts": 0.0}, notes=(*notes, "It knows none, so that nothing is traced."))
        effects = sums.effects / sums.counts.clamp(min=1)[:, None]
        mlp = effects[1, 1]
        strong = (mlp >= mlp.max() / 2).nonzero().flatten().tolist() if mlp.max() > 0 else []
        if strong:
            notes.append(
                f"MLPs that matter: {_range(strong)}, counted from 0; at the last subject token they bring "
                "back at least half of what the best one does."
            )
        figures = {
            "known_facts": float(known),
            "answer_probability": sums.clean / known,
            "answer_probability_under_noise": sums.corrupted / known,
        }
        for state, name in enumerate(("stream", "mlp", "attention")):
            figures[f"effect_{name}"] = float(effects[state, 1].max())
        if strong:
            figures |= {"mlp_layers_from": float(strong[0]), "mlp_layers_to": float(strong[-1])}
        pictured = {
            "effects": effects.tolist(),
            "seen": sums.counts.tolist(),
            "clean": sums.clean / known,
            "corrupted": sums.corrupted / known,
            "known": known,
            "facts": len(told),
            "layers": strong,
        }
        return Finding(figures, pictured, tuple(notes))

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """Return heat maps of the indirect effects: tokens over layers, for each kind of state."""
        from matplotlib.figure import Figure

        del curves
        effects = np.array(pictured["effects"])
        rows = [kind for kind, seen in enumerate(pictured["seen"]) if seen]
        layers = effects.shape[-1]
        figure = Figure(figsize=(11, 1.9 + 0.42 * len(rows)), layout="constrained", dpi=150)
        axes = figure.subplots(1, len(STATES), sharey=True)
        top = max(float(effects.max()), 1e-9)
        for place, (panel, name) in enumerate(zip(axes, STATES, strict=True)):
            image = panel.imshow(effects[place][rows], aspect="auto", cmap="Purples", vmin=0.0, vmax=top)
            panel.set_title(f"{name} restored", fontsize=10)
            panel.set_xlabel("layer, from 0")
            panel.set_xticks(sorted({*range(0, layers, max(1, layers // 8)), layers - 1}))
        axes[0].set_yticks(range(len(rows)), [TOKENS[kind] for kind in rows])
        figure.colorbar(image, ax=axes, label="indirect effect")
        strong = pictured["layers"]
        says = f"; MLPs that matter: {_range(strong)}" if strong else ""
        figure.suptitle(
            f"{pictured['known']} of {pictured['facts']} facts: P(answer) {pictured['clean']:.2f}, under "
            f"noise {pictured['corrupted']:.2f}{says}",
            fontsize=11,
        )
        return figure


def _range(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


class _Sums:
    """What is added up over facts.

    Args:
        facts: How many there are.
        layers: Of the model.
    """

    def __init__(self, facts: int, layers: int) -> None:
        self.clean = self.corrupted = 0.0
        self.known = torch.zeros(facts, dtype=torch.float64)
        self.counts = torch.zeros(len(TOKENS), dtype=torch.float64)
        self.effects = torch.zeros(len(STATES), len(TOKENS), layers, dtype=torch.float64)

    def flat(self) -> Tensor:
        """Return all of it as numbers that add up, float64 (S,)."""
        head = torch.tensor([self.clean, self.corrupted], dtype=torch.float64)
        return torch.cat((head, self.known, self.counts, self.effects.flatten()))

    @classmethod
    def of(cls, flat: Tensor, facts: int) -> "_Sums":
        """Return what :meth:`flat` gave."""
        rest = len(flat) - 2 - facts - len(TOKENS)
        found = cls(facts, rest // (len(STATES) * len(TOKENS)))
        head, found.known, found.counts, effects = flat.split([2, facts, len(TOKENS), rest])
        found.clean, found.corrupted = head.tolist()
        found.effects = effects.reshape(found.effects.shape)
        return found
