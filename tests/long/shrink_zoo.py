"""Shrink on four zoos: `python -m tests.long.shrink_zoo ZOO [name ...]`.

The zoos are torchvision, timm, transformers and others (see `tests/long/other_libraries.py`).

Each model is built with random weights, in float64. Half of its channels are pruned by random
scores, once as `coupled` units and once as filters alone; it is shrunk, and compared with the
masked model on the example and on other inputs: another batch, and another size where the model
takes one. The results go to tests/long/results/shrink_zoo_<zoo>.jsonl, a line for each model.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import parasparse as ps
from parasparse.shrink.running import call, tensors_in
from tests.long.zoo import processes
from tests.long.zoo.page import RESULTS

SPARSITY = 0.5
TOLERANCE = 1e-6  # relative to the largest output, in float64: constants may come from float32
SECONDS, GIBIBYTES = 150, 20  # for one mode of one model
MODES = ("units", "filters")
# Models of timm beside one of each module: how many, and their size.
MORE, MOST_PARAMETERS = 120, 30_000_000
Inputs = Any
# In the errors of a model without units, or without dead channels that can go.
NOTHING = (
    "nothing can be removed",
    "no channel of the model",
    "at least one rule",
    "reaches none of",
)


class InDouble(TorchFunctionMode):
    """Makes float64 of the float32 that a program asks for, so that nothing is rounded to it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(self._double, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _double(self, value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value


def prepared(model: nn.Module) -> nn.Module:
    """Give norms and biases values that are not 0 or 1, so that what they add is seen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif not parameter.any():
                nn.init.normal_(parameter, 0, 0.1)
    return model.double().eval()


def in_double(inputs: Inputs) -> Inputs:
    return tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )


def prune(model: nn.Module, example: Inputs, mode: str) -> None:
    """Prune half of the coupled units, or of the filters of each layer but the last one."""
    torch.manual_seed(2)

    def score(tensor: Tensor, name: str) -> Tensor:
        return torch.rand(tensor.shape)

    if mode == "units":
        ps.sparsify(model, ps.coupled(model, example).rules(SPARSITY, score=score))
        return
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [
        name for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Linear"  # of torch-geometric
    ]  # fmt: skip
    rule = ps.Prune(SPARSITY, pattern=ps.patterns.channel(0), score=score)
    ps.sparsify(model, dict.fromkeys(names[:-1], rule))


@contextmanager
def head_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the heads of a detector return: the order of its boxes may be a tie."""
    found: list[Tensor] = []
    heads = [m for n, m in model.named_modules() if n in ("head", "rpn.head")]
    detects = type(model).__module__.startswith("torchvision.models.detection")
    hooks = [
        head.register_forward_hook(lambda *given: found.extend(tensors_in(given[-1])))
        for head in heads * detects
    ]
    yield found
    for hook in hooks:
        hook.remove()


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the outputs; of a detector those of its heads."""
    torch.manual_seed(0)
    with torch.no_grad(), InDouble(), head_outputs(model) as found:
        out = tensors_in(call(model, inputs))
    return [t.clone() for t in found or out]


def error(want: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest difference relative to the largest number of its tensor."""
    if [t.shape for t in want] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if a.numel() and not a.equal(b):
            a, b = (torch.view_as_real(t) if t.is_complex() else t.double() for t in (a, b))
            scale = float(a.abs().nan_to_num(0, 0).max())
            difference = (a - b).abs()[~((a == b) | (a.isnan() & b.isnan()))]
            worst = max(worst, float(difference.nan_to_num(torch.inf).max()) / (scale + 1e-300))
    return worst


def pruned(
    model: nn.Module, example: Inputs, mode: str
) -> tuple[nn.Module, nn.Module] | dict[str, Any]:
    """Prune and shrink a model; return the masked model and it, or why there is no smaller one.

    The model has run before, as one does whose accuracy is known.
    """
    try:
        run(model, copy.deepcopy(example))
        prune(model, example, mode)
        masked = ps.squash(copy.deepcopy(model))
        return masked, ps.shrink(model, example, check=False)
    except Exception as problem:
        nothing = any(text in str(problem) for text in NOTHING)
        reasons = Counter(re.findall(r"dimension \d stay: (.*)", str(problem)))
        return {
            "result": "kept" if nothing else "refused",
            "why": reasons.most_common(5) or first_line(problem),
        }


def compared(masked: nn.Module, small: nn.Module, inputs: list[Inputs]) -> dict[str, Any]:
    """Return whether two models compute the same from all inputs that the first one takes."""
    found: dict[str, Any] = {"error": 0.0, "compared": 0}
    for each in inputs:
        try:
            want = run(masked, each)
        except Exception:  # the model takes no such input
            continue
        try:
            found["error"] = max(found["error"], error(want, run(small, each)))
        except Exception as problem:
            return {"result": "wrong", "why": first_line(problem), **found}
        found["compared"] += 1
    return {"result": "equal" if found["error"] < TOLERANCE else "wrong", **found}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def first_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:300]


def check(
    build: Callable[[str, dict[str, object]], tuple[nn.Module, Inputs, list[Inputs]]],
) -> processes.Check:
    """Return the check of one model of a zoo, which `build` makes with its inputs."""

    def checked(name: str, found: dict[str, object]) -> None:
        torch.set_num_threads(1)
        for mode in MODES:
            for surroundings in (nullcontext(), InDouble()):
                torch.manual_seed(0)
                model, example, others = build(name, found)
                model, given = prepared(model), (in_double(example), in_double(others))
                found["parameters"] = size(model)
                with surroundings:
                    small = pruned(model, given[0], mode)
                if isinstance(small, dict):
                    found[mode] = small
                else:
                    left = round(size(small[1]) / size(small[0]), 3)
                    found[mode] = {"left": left, **compared(*small, [given[0], *given[1]])}
                if "Double but found Float" not in str(small):
                    break  # else it makes float32 itself

    return checked


def from_torchvision(name: str, found: dict[str, object]) -> tuple[nn.Module, Inputs, list[Inputs]]:
    from torchvision import models

    from tests.long.torchvision_models import OPTIONS, SHAPES, matching

    found["kind"] = models.get_model_builder(name).__module__.split(".")[2]
    model = models.get_model(name, weights=None, **matching(OPTIONS, name))
    shape = matching(SHAPES, name)
    others = [(2, *shape[1:]), (1, *shape[1:-2], shape[-2] + 32, shape[-1] + 32)]
    if name.startswith("raft"):
        return model, (torch.randn(shape),) * 2, [(torch.randn(other),) * 2 for other in others]
    return model, torch.randn(shape), [torch.randn(other) for other in others]


def from_timm(module: str, found: dict[str, object]) -> tuple[nn.Module, Inputs, list[Inputs]]:
    import timm

    from tests.long.zoo_timm import OPTIONS, smallest, takes

    name = module if module in timm.list_models() else smallest(module)
    found["class"], found["kind"] = name, "timm"
    model = timm.create_model(name, **OPTIONS.get(module, {})).eval()
    sides = [64, 96, 128, *model.default_cfg["input_size"][-1:]]
    side = next(side for side in sides if takes(model, torch.randn(1, 3, side, side)))
    others = [torch.randn(2, 3, side, side), torch.randn(1, 3, side + 32, side + 32)]
    return model, torch.randn(1, 3, side, side), others


def from_transformers(
    name: str, found: dict[str, object]
) -> tuple[nn.Module, Inputs, list[Inputs]]:
    from transformers import CONFIG_MAPPING

    from tests.long.zoo.small_configs import default
    from tests.long.zoo_transformers import kind, model_class, smallest

    cls = model_class(CONFIG_MAPPING[name])
    config = default(CONFIG_MAPPING[name])
    found["class"] = cls.__name__
    found["small"], model, inputs = smallest(cls, config, found)
    found["kind"] = kind(model, config)
    if inputs is None:
        raise LookupError("no inputs are known")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default is not there in float64
    twice = {n: torch.cat([t, t.flip(-1)]) if t.ndim > 1 else t for n, t in inputs.items()}
    longer = {n: torch.cat([t, t], 1) if t.ndim == 2 else t for n, t in inputs.items()}
    return model, inputs, [twice, longer]


def from_others(name: str, found: dict[str, object]) -> tuple[nn.Module, Inputs, list[Inputs]]:
    from tests.long.other_libraries import LIBRARIES, NAMES

    found["kind"] = NAMES[name]
    build, _ = LIBRARIES[NAMES[name]]
    return build(name)


def more_of_timm(taken: set[str]) -> list[str]:
    """Return further models of timm, which are the same ones whatever else timm has."""
    import timm

    def small(name: str) -> bool:
        with torch.device("meta"):
            return size(timm.create_model(name)) < MOST_PARAMETERS

    # The models named test_* are the smallest ones of their modules, and taken.
    names = [name for name in timm.list_models(exclude_filters="test_*") if name not in taken]
    names.sort(key=lambda name: zlib.crc32(name.encode()))
    return list(islice(filter(small, names), MORE))


ZOOS = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "transformers": from_transformers,
    "others": from_others,
}


def names_of(zoo: str) -> list[str]:
    """Return the names of all models of a zoo, or of its modules."""
    if zoo == "torchvision":
        from torchvision import models

        names = models.list_models()
        return [name for name in names if not name.startswith("quantized")]
    if zoo == "timm":
        timm = importlib.import_module("timm")
        modules = [module for module in timm.list_modules() if timm.list_models(module=module)]
        return modules + more_of_timm(set(modules))
    if zoo == "others":
        return list(importlib.import_module("tests.long.other_libraries").NAMES)
    return sorted(importlib.import_module("transformers").CONFIG_MAPPING)


def table(lines: list[dict[str, Any]], modes: tuple[str, ...] = MODES) -> str:
    """Return how many models of each kind came out how, as Markdown."""
    results = ("equal", "kept", "refused", "wrong", "not finished")
    text = ["| models | mode | " + " | ".join(results) + " |", "|---|---|" + "---:|" * len(results)]
    for kind in sorted({line.get("kind", "not built") for line in lines}):
        for mode in modes:
            counts = Counter(
                line.get(mode, {"result": "not finished"})["result"]
                for line in lines
                if line.get("kind", "not built") == kind
            )
            numbers = " | ".join(str(counts[result]) for result in results)
            text.append(f"| {kind} | {mode} | {numbers} |")
    return "\n".join(text)


def main(zoo: str, names: list[str]) -> int:
    warnings.simplefilter("ignore")
    results = RESULTS / f"shrink_zoo_{zoo}.jsonl"
    if zoo == "transformers":
        importlib.import_module("transformers").logging.set_verbosity(50)
    processes.run(
        names or names_of(zoo), check(ZOOS[zoo]), results, seconds=2 * SECONDS, gibibytes=GIBIBYTES
    )
    lines = list(processes.read(results).values())
    print(table(lines))
    return int(any(line.get(mode, {}).get("result") == "wrong" for line in lines for mode in MODES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
