"""torch's profiler over some steps of rank 0."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lossworks.specs import ProfileSpec
from lossworks.training.measure.phases import PhaseClock

TRACE = "trace.json.gz"


class StepProfiler:
    """Records the steps that a spec asks for, with the phases of its clock as named ranges.

    Nothing is recorded, and nothing costs time, outside those steps. A profiler reads no random number and
    changes no result; it does slow its steps down, Python code most.

    Args:
        spec: Which steps.
        folder: Where ``trace.json.gz`` goes, a Chrome trace; None for no profile.
        clock: Of the run.
        notify: Told if the trace can't be written.
    """

    def __init__(
        self, spec: ProfileSpec, folder: Path | None, clock: PhaseClock, notify: Callable[[str], object]
    ) -> None:
        self._left = spec.steps if folder is not None else 0
        self._start, self._folder, self._clock, self._notify = spec.start, folder, clock, notify
        self._profile: Any = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record what happens inside if ``step``, from 1, is one of those asked for."""
        if not self._left or step < self._start:
            yield
            return
        if self._profile is None:
            with self._apart():
                self._begin()
        with record_function(f"step {step}"):
            yield
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also of a run that ends before all the steps were."""
        if self._profile is None:
            return
        self._clock.name_ranges(enabled=False)
        finished, self._profile, self._left = self._profile, None, 0
        with self._apart():
            finished.stop()
            try:
                self._write(finished)
            except (OSError, RuntimeError) as error:
                self._notify(f"the profile can't be written to {self._folder}: {error}")

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Keep what a profiler takes to start and to write out of the run's phases."""
        self._clock.settle()
        with self._clock("other"):
            yield
            self._clock.skip()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, with_stack=True)
        self._profile.start()
        self._clock.name_ranges(enabled=True)

    def _write(self, finished: Any) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self._folder / TRACE))
