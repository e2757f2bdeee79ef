"""How good is a LeNet with 5% of its weights, trained by sparse momentum, and a dense one?

    python -m benchmarks.mnist FOLDER

FOLDER holds MNIST. Runs examples/mnist_sparse_momentum.py for each setting and seed; what has ended
in out/mnist is not run again.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import write_content

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist_sparse_momentum.py"
THREE, FOUR = range(17, 20), range(17, 21)
LENET300, LENET5 = ["--model", "lenet300-100"], ["--model", "lenet5"]
SETTINGS = {
    "LeNet-300-100, 20 epochs": (THREE, LENET300),
    "LeNet-5, 20 epochs": (FOUR, LENET5),
    "LeNet-300-100, 100 epochs": (THREE, [*LENET300, "--epochs", "100"]),
}  # fmt: skip
KINDS = ("sparse", "dense")
DIVERGED = 0.5  # of the test images wrong


def errors(out: Path) -> dict[str, dict[int, float]]:
    """Return the test errors that the logs in `out` end with, by kind of network and seed."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(out.glob("*.log")):
        ended = re.findall(r"^test: accuracy (\S+),", path.read_text(), re.MULTILINE)
        if ended:
            *_, kind, seed = path.stem.split("-")
            found.setdefault(kind, {})[int(seed[4:])] = round(1 - float(ended[0]), 4)
    return found


def outcome(values: list[float]) -> dict[str, object]:
    """Return the errors seed by seed, how many diverged, and the mean of the others."""
    good = [value for value in values if value < DIVERGED]
    mean = round(statistics.mean(good), 5) if good else None
    return {"errors": values, "diverged": len(values) - len(good), "mean of the others": mean}


def main(folder: Path) -> None:
    results = {}
    for name, (seeds, arguments) in SETTINGS.items():
        out = Path("out") / "mnist" / name.replace(" ", "_").replace(",", "")
        command = [sys.executable, str(EXAMPLE), "--data", str(folder), "--out", str(out)]
        for seed in seeds:
            if any(seed not in errors(out).get(kind, {}) for kind in KINDS):
                run = [*command, "--seed", str(seed), "--dense", *arguments]
                subprocess.run(run, check=True)
        found = errors(out)
        outcomes = {kind: outcome([found[kind][seed] for seed in seeds]) for kind in KINDS}
        results[name] = {"seeds": [*seeds], "arguments": arguments, **outcomes}
        print(name, outcomes, flush=True)
        write_content("mnist", {"results": results})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
