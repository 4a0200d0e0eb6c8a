"""Time ``robust`` against the default rule, in training and inference: ``python -m qmf_examples.benchmarks.robust``.

A training step is what a loop pays for: ``QMFLoss`` with its checks, the statistics that ``robust`` gathers, and the
backward to the logits. Inference is the layer alone, with those statistics. The rules take turns in one process; the
table shows medians, in the processor's time, which other work on the machine does not lengthen, and how many times as
long as the default rule's ``robust``'s is.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from qmf_fusion import QMFLoss, QualityAwareFusion

# Batch, classes, and at most how many times the default rule's training step and inference.
TARGETS = {(64, 10): (2.5, 4), (128, 101): (4, 8), (128, 1000): (6, 12), (16, 100_000): (20, 20)}
_WARM_UP = 5


def time_shape(batch: int, classes: int, repeats: int, modalities: int = 2) -> dict[str, tuple[float, float]]:
    """Median processor seconds of a training step and of inference, by rule."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(batch, classes, generator=generator).requires_grad_() for _ in range(modalities)]
    target = torch.randint(classes, (batch,), generator=generator)
    rules = {"default": QualityAwareFusion(modalities), "robust": QualityAwareFusion.robust(modalities, classes)}
    criteria = {name: QMFLoss(fusion, 1000) for name, fusion in rules.items()}

    def step(name: str) -> None:
        index = torch.randperm(1000, generator=generator)[:batch]
        criteria[name](logits, target, index).loss.backward()

    def infer(name: str) -> None:
        with torch.no_grad():
            rules[name](logits)

    train = _medians(step, list(rules), repeats)
    for fusion in rules.values():
        fusion.eval()
    inference = _medians(infer, list(rules), repeats)
    return {name: (train[name], inference[name]) for name in rules}


def _medians(call: Callable[[str], None], names: Sequence[str], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(_WARM_UP + repeats):
        for name in names:
            start = time.process_time()
            call(name)
            if repeat >= _WARM_UP:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.benchmarks.robust", description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=int, default=len(TARGETS), help="how many of the shapes, from the smallest")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print("| B, K | step, default | robust | ratio (target) | inference, default | robust | ratio (target) |")
    print("|---|---|---|---|---|---|---|")
    for (batch, classes), targets in list(TARGETS.items())[: options.shapes]:
        times = time_shape(batch, classes, options.repeats)
        cells = [f"{batch}, {classes}"]
        for plain, ours, most in zip(times["default"], times["robust"], targets, strict=True):
            cells += [f"{plain * 1e3:.2f} ms", f"{ours * 1e3:.2f} ms", f"{ours / plain:.1f}x ({most}x)"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
