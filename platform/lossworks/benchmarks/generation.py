"""``lossworks bench generate``: new tokens with keys and values kept, and with all computed anew at each.

Both take the likeliest token, in one process, in turns, with the model's parameters as they are drawn: time
does not depend on what the tokens are.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product

from pydantic import Field

from lossworks.benchmarks.command import Benchmark
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.specs import ModelSpec, Spec

_ANEW = "all computed anew"

Tokens = list[list[int]]


class GenerationSpec(Spec):
    """What ``lossworks bench generate`` measures."""

    model: ModelSpec = ModelSpec()
    vocab_size: int = Field(16384, ge=2, description="entries of the vocabulary")
    rows: int = Field(16, ge=1, description="prompts at once")
    prompt: int = Field(32, ge=1, description="tokens of a prompt")
    new_tokens: int = Field(256, ge=1, description="tokens that are added to each")
    threads: int = Field(2, ge=1, le=1024, description="threads of the CPU")
    seed: int = Field(0, ge=0, description="seed of parameters and prompts")


def run(overrides: Sequence[str], repeats: int) -> Iterator[BenchmarkRow]:
    """Measure both ways; progress goes to standard error.

    Yields:
        For each: seconds and new tokens a second, medians over the repeats; how many times faster it is than
        computing all anew; and how many tokens are the same.
    """
    import torch
    from rich.console import Console

    spec = GenerationSpec().override(overrides)
    ways, threads = _ways(spec), torch.get_num_threads()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Tokens] = {}
    torch.set_num_threads(spec.threads)
    try:
        with Console(stderr=True).status("generating") as status:
            for turn, (name, way) in product(range(repeats), ways.items()):
                status.update(f"generating, {name}, {turn + 1} of {repeats}")
                began = time.perf_counter()
                found[name] = way()
                seconds[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    anew = found[_ANEW]
    case = (
        f"{spec.rows} prompts of {spec.prompt} tokens, {spec.new_tokens} new, {spec.model.layers} layers of "
        f"{spec.model.width}, vocabulary {spec.vocab_size}, {spec.threads} threads"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        yield BenchmarkRow(case, name, "time", median, "s")
        yield BenchmarkRow(case, name, "speed", spec.rows * spec.new_tokens / median, "tokens/s")
        yield BenchmarkRow(case, name, "faster than anew", medians[_ANEW] / median, "x")
        pairs = zip(chain(*found[name]), chain(*anew), strict=True)
        same = sum(one == other for one, other in pairs)
        yield BenchmarkRow(case, name, "same tokens", 100 * same / (spec.rows * spec.new_tokens), "%")


def _ways(spec: GenerationSpec) -> dict[str, Callable[[], Tokens]]:
    import torch

    from lossworks.models import build_model

    model = build_model(spec.model, vocab_size=spec.vocab_size, seed=spec.seed).eval()
    generator = torch.Generator().manual_seed(spec.seed)
    prompts = torch.randint(spec.vocab_size, (spec.rows, spec.prompt), generator=generator)

    def kept() -> Tokens:
        return model.generate(prompts.tolist(), spec.new_tokens, temperature=0.0)

    @torch.no_grad()
    def anew() -> Tokens:
        tokens = prompts
        for _ in range(spec.new_tokens):
            logits = model.head().logits(model.hidden(tokens)[:, -1])
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
        return [[int(token) for token in row] for row in tokens[:, spec.prompt :]]

    return {"keys and values kept": kept, _ANEW: anew}


GENERATION = Benchmark("text with keys and values kept between tokens, and without", run, repeats=3)
