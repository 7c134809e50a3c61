"""How much nearer to the voice a separation comes than the mixture, by the threshold of its mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer
from lossworks.data.audio.separation import THRESHOLDS, gnsdr, ideal_mask, separated, swept
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Curve, Finding, NumberedRows, Probe
from lossworks.tasks.interface import Mode, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossworks.tasks.separation import SeparationTask


class SeparationGain(Analysis):
    """GNSDR of held-out songs: the gain in signal-to-distortion over the mixture, by length, in dB.

    Every frame of a song is masked by the middle of its own patch, with the phases of the mixture. The figure
    is that at the best threshold θ of 0, 0.05, …, 0.5 for the voice, which is said as well; the ideal mask's
    is what no mask of bins can exceed by much.
    """

    slug = "separation-gain"
    formula = "GNSDR = Σ n (SDR(estimate) - SDR(mixture)) / Σ n"
    paper = Paper(
        "Singing Voice Separation Using a Deep Convolutional Neural Network Trained by Ideal Binary Mask and "
        "Cross Entropy",
        "Lin, Balamurali, Koh, Lui, Herremans",
        2018,
        "evaluation",
    )
    example = "lossworks train jobs/specs/voices.yaml analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/gnsdr": "max", "eval/accompaniment_gnsdr": "max"}

    songs: int = integer(4, "held-out songs that are separated at most", ge=1)
    taps: int = integer(64, "length of the filter by which an estimate may differ for nothing", ge=1, le=4096)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Analysis.check`."""
        super().check(task, spec)
        if "bins" not in task.kinds:
            raise UserError(f"analyses: {self.slug} is of songs, task=separation, not of task={task.slug}")

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        task = cast("SeparationTask", probe.task)
        frames, front, songs = task.run.data.frames, task.front, task.songs[: self.songs]
        rows = task.whole(self.songs)
        chosen = np.arange(len(rows))
        table = probe.over(_Middles(len(chosen), frames), NumberedRows(rows), chosen)
        ends = np.cumsum([front.spectra(song.mixture).shape[1] for song in songs])[:-1]
        parts = np.split(table.reshape(len(chosen), -1).numpy().T, ends, axis=1)
        by_threshold = swept(songs, parts, front, self.taps)
        best = max(THRESHOLDS, key=lambda threshold: by_threshold[threshold][0])
        masks = [ideal_mask(front.spectra(s.voice), front.spectra(s.accompaniment)) for s in songs]
        pairs = zip(songs, masks, strict=True)
        ideal = gnsdr(
            songs, [separated(s.mixture, mask.astype(float), front, 0.0) for s, mask in pairs], self.taps
        )
        figures = {
            "gnsdr": by_threshold[best][0],
            "accompaniment_gnsdr": by_threshold[best][1],
            "ideal_gnsdr": ideal[0],
            "threshold": best,
        }
        curves = [list(column) for column in zip(*by_threshold.values(), strict=True)]
        return Finding(figures, {"thresholds": list(THRESHOLDS), "curves": curves, "ideal": list(ideal)})

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """Draw the gains over the threshold, beside those of the ideal mask."""
        del curves
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from lossworks.reporting.picture_style import BLUE, ORANGE, STYLE

        with rc_context(STYLE):
            figure = Figure(figsize=(10, 6), dpi=100, layout="constrained", facecolor="white")
            axes = figure.add_subplot()
            parts = zip(
                ("voice", "accompaniment"), (BLUE, ORANGE), pictured["curves"], pictured["ideal"], strict=True
            )
            for name, colour, values, ideal in parts:
                axes.plot(pictured["thresholds"], values, color=colour, marker="o", label=name)
                axes.axhline(ideal, color=colour, linestyle="--", linewidth=1.2, label=f"{name}, ideal mask")
            axes.set_title("Gain over the mixture, held-out songs")
            axes.set(xlabel="threshold θ of the mask", ylabel="GNSDR, dB")
            axes.legend()
        return figure


@dataclass(frozen=True)
class _Middles:
    """Measures the probabilities of each patch's middle frame at the place of its number: (rows·F)."""

    rows: int
    frames: int

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        known = ~batch["targets"].isnan().all(1, keepdim=True)
        p = outputs.logits.double().sigmoid().unflatten(1, (self.frames, -1))[:, self.frames // 2] * known
        table: Tensor = p.new_zeros(self.rows, p.shape[1]).index_add_(0, batch["numbers"], p)
        return table.flatten()
