"""How good is a LeNet with 5 % of its weights, by sparse momentum, next to the dense one?

    python -m benchmarks.mnist FOLDER

FOLDER holds MNIST. Runs examples/mnist_sparse_momentum.py for each setting, three seeds each.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks._timing import write_content

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist_sparse_momentum.py"
SETTINGS = {
    "LeNet-300-100, 20 epochs": ["--model", "lenet300-100"],
    "LeNet-300-100, 100 epochs": [
        "--model", "lenet300-100", "--epochs", "100", "--lr-drops", "0.46", "0.93",
    ],
    "LeNet-5, 20 epochs, learning rate 0.05": ["--model", "lenet5", "--lr", "0.05"],
    "LeNet-5, 20 epochs": ["--model", "lenet5"],
}  # fmt: skip


def errors(out: Path) -> dict[str, list[float]]:
    """Return the test errors that the logs in `out` end with, sparse and dense, seed by seed."""
    found: dict[str, list[float]] = {}
    for path in sorted(out.glob("*.log")):
        kind = path.stem.split("-")[-2]
        (accuracy,) = re.findall(r"^test: accuracy (\S+),", path.read_text(), re.MULTILINE)
        found.setdefault(kind, []).append(round(1 - float(accuracy), 4))
    return found


def main(folder: Path) -> None:
    results = {}
    for name, arguments in SETTINGS.items():
        out = Path("out") / "mnist" / name.replace(" ", "_").replace(",", "")
        command = [sys.executable, str(EXAMPLE), "--data", str(folder), "--out", str(out)]
        subprocess.run([*command, "--iters", "3", "--dense", *arguments], check=True)
        found = errors(out)
        means = {kind: statistics.mean(values) for kind, values in found.items()}
        results[name] = {"arguments": arguments, "test errors": found, "means": means}
        print(name, found, means, flush=True)
    write_content("mnist", {"seeds": [17, 18, 19], "results": results})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
