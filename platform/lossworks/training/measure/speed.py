"""How fast a run is, in its own units and of what the hardware could do."""

from dataclasses import dataclass

from lossworks.training.measure.hardware import Peak

MFU, MFU_MEASURED = "train/mfu", "train/mfu_of_measured_peak"


@dataclass(frozen=True)
class Speed:
    """What a step's seconds mean.

    Attributes:
        unit: What is counted: tokens or examples.
        flops_per_unit: Floating-point operations of a training step a unit; None if not known.
        peak: The most operations a second of all ranks together.
    """

    unit: str
    flops_per_unit: float | None
    peak: Peak

    def metrics(self, units: float, seconds: float) -> dict[str, float]:
        """Return duration, throughput and model FLOPs utilisation (MFU) of a step.

        MFU is the operations that the model needs over those that the peak would have done meanwhile
        (Chowdhery et al. 2022, appendix B); activations computed again don't count as needed. Its name says
        whether the peak is the maker's or was measured.

        Args:
            units: Over all ranks.
            seconds: Of the step.
        """
        rate = units / seconds
        found = {"train/step_seconds": seconds, f"train/{self.unit}_per_second": rate}
        if self.flops_per_unit is not None:
            name = MFU_MEASURED if self.peak.measured else MFU
            found[name] = self.flops_per_unit * rate / self.peak.flops
        return found
