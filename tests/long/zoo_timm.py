"""The smallest model of each module of timm: `python -m tests.long.zoo_timm [module ...]`.

The models are built as they are and hold the laws of `tests/long/zoo/checks.py`. The results go to
tests/long/results/zoo_timm.jsonl, and from there, with `python -m tests.long.zoo.page`, into
docs/zoo.md.
"""

from __future__ import annotations

import sys
import warnings

import timm
import torch
from torch import Tensor, nn

from tests.long.zoo import checks, processes
from tests.long.zoo.page import RESULTS, report

# What is too large as it is.
OPTIONS = {"deepseek_vit": {"depth": 4}}


def smallest(module: str) -> str:
    """Return the name of the model of a module that has the fewest parameters."""

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())

    names = timm.list_models(module=module)
    tiny = [name for name in names if name.startswith("test_")]
    return min(tiny or names, key=parameters)


def check(module: str, found: dict[str, object]) -> None:
    """Add to `found` what is true of the smallest model of a module."""
    name = smallest(module)
    torch.manual_seed(0)
    options = OPTIONS.get(module, {})
    model = timm.create_model(name, **options).eval()
    found["class"], found["kind"] = name, "timm"
    found.update(checks.reach(model))
    images = [torch.randn(1, 3, side, side) for side in (96, *model.default_cfg["input_size"][-1:])]

    def run(model: nn.Module, image: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        return [tensor.clone() for tensor in checks.tensors_in(model(image))]

    image = next(image for image in images if takes(model, image))
    found["small"] = str(options) if options else "as it is"
    found["inputs"] = list(image.shape)
    found.update(checks.laws(model, lambda module: run(module, image)))
    found["held"] = True


def takes(model: nn.Module, image: Tensor) -> bool:
    """Whether the model takes images of this size."""
    try:
        with torch.no_grad():
            model(image)
    except Exception:
        return False
    return True


def main(names: list[str]) -> int:
    results = RESULTS / "zoo_timm.jsonl"
    warnings.simplefilter("ignore")
    modules = [module for module in timm.list_modules() if timm.list_models(module=module)]
    processes.run(names or modules, check, results)
    return report(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
