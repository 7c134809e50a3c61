"""Singing-voice separation: each bin of a few frames of spectra is the voice's, or it is not."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from lossworks.data.audio.patches import cut_patches, magnitudes_of, middles, patches_of
from lossworks.data.audio.separation import separated
from lossworks.data.audio.songs import Song, draw_songs, read_songs
from lossworks.data.audio.spectra import FrontEnd
from lossworks.data.audio.wav_files import as_wav, read_wav
from lossworks.data.batch import Batch
from lossworks.data.example_sources import existing_folder
from lossworks.data.examples import Examples
from lossworks.data.learnt import Learnt
from lossworks.data.values import split
from lossworks.errors import UserError
from lossworks.models import HeadedModel, Outputs
from lossworks.models.audio import MaskNet, build_mask_net
from lossworks.models.folders import CONFIG, fill_model, read_config, write_model
from lossworks.models.operations import count_step_flops
from lossworks.specs import AnalysisSpec, LossSpec, RunSpec
from lossworks.specs.tasks.separation import MaskNetSpec, SongsSpec
from lossworks.tasks.examples import require_whole_head
from lossworks.tasks.interface import Mode, Predictions, Simplest, Task, as_sums

_FORMAT = "lossworks-mask-net"
_AT_ONCE = 256  # patches


class SeparationSpec(RunSpec):
    """Training of a network that finds voices."""

    task: Literal["separation"] = Field("separation", description="what is trained")
    data: SongsSpec = SongsSpec()
    model: MaskNetSpec = MaskNetSpec()
    loss: LossSpec = LossSpec(name="ibm-mask")
    analyses: tuple[AnalysisSpec, ...] = Field(
        (AnalysisSpec(name="separation-gain"),),
        description="what is measured with each evaluation; `lossworks analyses` lists them",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_head(self)
        SeparationTask.require_entries(self)
        return self


class SeparationTask(Task):
    """Patches of songs with the ideal binary mask of each bin, split by song.

    Args:
        spec: The run.
        learnt: How sound becomes spectra, of a model that was trained before.

    Raises:
        UserError: The songs can't be read, or there are fewer than two.
    """

    slug = "separation"
    title = "which bins of a song's spectra are the voice's"
    unit = "patches"
    element = "bin"
    spec: ClassVar[type[RunSpec]] = SeparationSpec
    kinds = ("bins",)
    provides = ("inputs", "targets", "voice")
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/bin_accuracy": "max",
        "eval/cross_entropy": "min",
        "eval/brier": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out bins that are right", "eval/bin_accuracy", "{:.4f}"),
        ("held-out cross-entropy", "eval/cross_entropy", "{:.4f} nats a bin"),
        ("Brier score of bins", "eval/brier", "{:.4f}"),
        ("gain of the voice (GNSDR)", "eval/gnsdr", "{:.2f} dB"),
        ("gain by the ideal mask", "eval/ideal_gnsdr", "{:.2f} dB"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out bins",
        {"eval/bin_accuracy": "share that is right", "eval/brier": "Brier score"},
    )

    def __init__(self, spec: SeparationSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec, learnt)
        self.run, data = spec, spec.data
        self.front = _front_of(data)
        songs, self.notes = _songs(data, spec.seed)
        if len(songs) < 2:
            raise UserError(f"data.source={data.source}: holds {len(songs)} song; two are the least")
        held_out = split(len(songs), data.held_out_fraction, spec.seed)
        self.songs = [song for song, chosen in zip(songs, held_out, strict=True) if chosen]
        own = [song for song, chosen in zip(songs, held_out, strict=True) if not chosen]
        self.train = self._patches(own, data.patch_hop)
        self.held_out = self._patches(self.songs, data.patch_hop)

    def _patches(self, songs: Sequence[Song], hop: int) -> Examples:
        """Return the patches of songs, with the mask and the voice's magnitudes of each."""
        # The mask is hard: the loss softens it.
        found = patches_of(songs, self.front, self.run.data.frames, hop, softness=0.0)
        inputs, labels, voice = (torch.from_numpy(array) for array in found)
        return Examples(inputs, labels.flatten(1), further={"voice": voice.flatten(1)})

    def whole(self, songs: int) -> Examples:
        """Return a patch for each frame of the first held-out songs, one song after the other."""
        return self._patches(self.songs[:songs], 1)

    @property
    def data_bytes(self) -> int:
        """See :attr:`Task.data_bytes`."""
        return cast("Examples", self.train).nbytes + cast("Examples", self.held_out).nbytes

    def build_model(self, model: Mapping[str, Any] | None = None) -> MaskNet:
        """See :meth:`Task.build_model`."""
        spec = self.run.model if model is None else MaskNetSpec.parse(model, source="model")
        return build_mask_net(spec, frames=self.run.data.frames, bins=self.front.bins, seed=self.run.seed)

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many patches have a bin that counts, and nothing further."""
        return float((~batch["targets"].isnan()).any(1).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return bins, those that are right, their cross-entropies and Brier scores, float64 (4,)."""
        del own
        known = ~batch["targets"].isnan()
        y, mask = outputs.logits[known].double(), batch["targets"][known].double()
        right = (y > 0) == (mask > 0.5)
        nats = functional.binary_cross_entropy_with_logits(y, mask, reduction="sum")
        brier = (y.sigmoid() - mask).square().sum()
        return as_sums(known.sum(), right.sum(), nats, brier, like=outputs.logits)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        bins, right, nats, brier = sums.tolist()
        names = ("eval/bin_accuracy", "eval/cross_entropy", "eval/brier")
        return {
            name: value / max(bins, 1) for name, value in zip(names, (right, nats, brier), strict=True)
        }, {}

    def simplest(self) -> Simplest:
        """Return what the share of the voice's bins in training gets, said of every bin."""
        share = cast("Examples", self.train).labels.mean().clamp(1e-6, 1 - 1e-6)
        labels = cast("Examples", self.held_out).labels
        outputs = Outputs(labels, None, dense=torch.logit(share).expand_as(labels))
        figures, _ = self.figures(self.measure(outputs, {"targets": labels}, labels))
        return Simplest("the voice's share alone", figures)

    def flops_per_unit(self, model: HeadedModel) -> float:
        """Return the operations a patch, counted on one of them."""
        return count_step_flops(model, self.train.batch(np.zeros(1, dtype=np.int64))["inputs"])

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return voice and accompaniment of a WAV file as two WAV files; see :meth:`Task.predict`."""
        config = read_config(folder / CONFIG)
        if config.get("format") != _FORMAT:
            raise UserError(f"{folder}: is no exported model of voices")
        data = SongsSpec.parse(config["data"], source=str(folder))
        spec = MaskNetSpec.parse(config["model"], source=str(folder))
        front = _front_of(data)
        model = build_mask_net(spec, frames=data.frames, bins=front.bins, seed=0)
        fill_model(model, folder)
        sound = read_wav(file, data.rate)
        p = voice_probabilities(model.eval(), sound.samples, front, data.frames)
        found = separated(sound.samples, p, front, spec.threshold)
        parts = {"voice.wav": found.voice, "accompaniment.wav": found.accompaniment}
        columns: dict[str, Sequence[Any]] = {
            "part": list(parts),
            "seconds": [len(sound.samples) / data.rate] * 2,
            "loudness": [float(np.sqrt(np.square(part).mean())) for part in parts.values()],
        }
        files: dict[str, Callable[[], bytes]] = {
            name: partial(as_wav, part, data.rate) for name, part in parts.items()
        }
        return Predictions(columns, notes=sound.notes, files=files)

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights, and how sound becomes spectra; see :meth:`Task.save`."""
        del learnt
        own = cast("SeparationSpec", spec)
        front = _front_of(own.data)
        config = {
            "format": _FORMAT,
            "format_version": 1,
            "data": own.data.model_dump(mode="json"),
            "model": own.model.model_dump(mode="json"),
            "provenance": dict(provenance),
        }
        model = build_mask_net(own.model, frames=own.data.frames, bins=front.bins, seed=0)
        write_model(to, config, model, state)


@torch.no_grad()
def voice_probabilities(model: MaskNet, samples: np.ndarray, front: FrontEnd, frames: int) -> np.ndarray:
    """Return the probability that each bin is the voice's, float32 (F, T), by the middles of patches.

    Args:
        model: In eval mode.
        samples: Of the mixture, (n,).
        front: How they become spectra.
        frames: Of a patch.
    """
    patches = torch.from_numpy(cut_patches(magnitudes_of(samples, front), frames, 1).astype(np.float32))
    found = torch.cat([model.logits(part).sigmoid() for part in patches.split(_AT_ONCE)])
    return middles(found.reshape(len(patches), frames, -1).numpy())


def _front_of(data: SongsSpec) -> FrontEnd:
    return FrontEnd(data.rate, data.window, data.fft, data.hop)


def _songs(data: SongsSpec, seed: int) -> tuple[list[Song], tuple[str, ...]]:
    kind, _, name = data.source.partition(":")
    if kind == "songs":
        return draw_songs(int(name), data.seconds, data.rate, seed), ()
    found = read_songs(existing_folder(name), data.rate)
    return found.songs, found.notes
