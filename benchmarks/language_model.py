"""What does it cost to prune a language model in one shot, and what does the calibration text do?

    python -m benchmarks.language_model

Runs examples/prune_language_model.py, whose models stay in `out/`: three small character models,
each with a calibration text of its own. After that, other texts calibrate the same models at 70%.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import parasparse as ps
from benchmarks.timing import QUICK, write_content
from examples import prune_language_model as example

OUT = Path("out")
SEEDS, TRAINING, STEPS, SEQUENCES = (1, 2, 2, 8) if QUICK else (3, 1400, 200, 128)
CALIBRATED = ("Wanda", "SparseGPT", "least squares", "ADMM")
NUMBERS = (2, 8, 32, 128, 512)
Rows = dict[str, dict[str, list[float]]]


def texts(training: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield calibration texts by what they are."""
    for number in NUMBERS:
        yield f"{number} sequences", example.calibration_text(training, number, seed)
    prose = example.tokens("\n".join(pydoc_data.topics.topics.values()))
    yield f"{SEQUENCES} of English prose", example.calibration_text(prose, SEQUENCES, seed)
    shape, generator = (SEQUENCES, example.CONTEXT), torch.Generator().manual_seed(seed)
    random = torch.randint(example.CHARACTERS, shape, generator=generator)
    yield f"{SEQUENCES} of random characters", random


def calibrated(dense: nn.Module, training: Tensor, validation: Tensor, seed: int) -> Iterator:
    """Yield text, method and perplexity at 70%."""
    for what, text in texts(training, seed):
        for method in CALIBRATED:
            model = copy.deepcopy(dense)
            ps.prune_blocks(model, text.split(32), example.METHODS[method](0.7))
            yield what, method, example.perplexity(model, validation)


def main() -> None:
    torch.set_num_threads(1)
    training, validation = example.text()
    perplexities: Rows = {}
    calibration: Rows = {}
    seconds = 0.0

    def add(rows: Rows, row: str, column: str, found: float) -> None:
        print(f"{row}, {column}: {found:.3f}", flush=True)
        rows.setdefault(row, {}).setdefault(column, []).append(found)

    for seed in range(SEEDS):
        start = time.process_time()
        dense = example.trained(training, TRAINING, seed, OUT)
        add(perplexities, "dense", "", example.perplexity(dense, validation))
        text = example.calibration_text(training, SEQUENCES, seed)
        choice = (example.METHODS, example.SPARSITIES, STEPS)
        for found in example.compare(dense, text, validation, *choice):
            add(perplexities, *found)
        seconds += time.process_time() - start
        for found in calibrated(dense, training, validation, seed):
            add(calibration, *found)
    content = {"perplexities": perplexities, "calibration": calibration, "seconds": seconds}
    write_content("language_model", content)


if __name__ == "__main__":
    main()
