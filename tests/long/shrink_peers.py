"""Two other libraries on the zoos of `tests.long.shrink_zoo`, by their defaults.

    python -m tests.long.shrink_peers torch_pruning|kirigami ZOO [name ...]

The models and inputs are those of parasparse's check. Each library removes half of the channels
that it finds, at random, with its defaults.
The weights are then replaced by the numbers of their entries, so that the small model tells which
entries are left. All others are set to 0 in a copy of the model, which must compute what the small
one does. The results go to tests/long/results/shrink_<library>_<zoo>.jsonl, a line for each model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.shrink.running import call, tensors_in
from tests.long.shrink_zoo import (
    GIBIBYTES,
    SECONDS,
    SPARSITY,
    ZOOS,
    InDouble,
    Inputs,
    compared,
    first_line,
    head_outputs,
    in_double,
    names_of,
    prepared,
    size,
    table,
)
from tests.long.zoo import processes
from tests.long.zoo.page import RESULTS

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Cut = Callable[[], None]


def torch_pruning(model: nn.Module, example: Inputs) -> Cut:
    """Find what Torch-Pruning removes.

    As its README says, the layers that outputs come from are ignored.
    """
    import torch_pruning

    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=SPARSITY,
        ignored_layers=output_layers(model, example),
        output_transform=tensors_in,
    )
    return pruner.step


def kirigami(model: nn.Module, example: Inputs) -> Cut:
    """Find what torch-kirigami removes: half of each axis, where it finds no conflict.

    The axes are those that its rules declare. Its own search looks at each channel alone, which
    takes minutes for most models, so a random half of each axis is given to `plan_remove`.
    """
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    if isinstance(example, dict):
        graph = DependencyGraph.build(model, kwargs=example)
    else:
        args = example if isinstance(example, tuple) else (example,)
        graph = DependencyGraph.build(model, args=args)
    pruner = Pruner(model, graph=graph)
    specs = filter(None, map(graph.operator_spec, graph.operations()))
    domains = {domain.axis: domain for spec in specs for domain in spec.candidates}
    chosen: list[Any] = []
    impact = pruner.impact([])
    for axis, domain in domains.items():
        if impact.selection(axis.tensor).fully_selected_indices(axis.dim):
            continue  # removed together with an earlier axis
        blocks = torch.arange(axis.tensor.shape[axis.dim]).view(-1, domain.block_size)
        half = blocks[torch.randperm(len(blocks))[: round(SPARSITY * len(blocks))]]
        more = [*chosen, axis.select(half.flatten().tolist())]
        trial = graph.propagate(remove=more, constraints=pruner.constraints)
        if trial.status == "resolved":
            chosen, impact = more, trial
    plan = pruner.plan_remove(chosen)
    return lambda: pruner.apply(plan)


LIBRARIES = {"torch_pruning": torch_pruning, "kirigami": kirigami}


def output_layers(model: nn.Module, example: Inputs) -> list[nn.Module]:
    """Return the layers whose products reach an output without another layer between them."""
    owners = {module.weight: module for module in model.modules() if isinstance(module, MATRICES)}
    with torch.enable_grad(), head_outputs(model) as outputs:
        outputs += tensors_in(call(model, example))
    left = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    found, seen = [], set(left)
    while left:
        node = left.pop()
        behind = [each for each, _ in node.next_functions if each is not None]
        ahead = [each for one in behind for each, _ in one.next_functions if each is not None]
        # a Linear transposes its weight
        weights = [getattr(each, "variable", None) for each in (*behind, *ahead)]
        layers = [owners[weight] for weight in weights if weight in owners]
        if layers and is_product(node):
            found += layers
            continue
        left += [each for each in behind if each not in seen]
        seen.update(behind)
    return found


def is_product(node: Any) -> bool:
    return any(word in node.name().lower() for word in ("mm", "conv", "linear"))


def law(model: nn.Module, example: Inputs, others: list[Inputs], plan: Any) -> dict[str, Any]:
    """Let a library cut a copy of a model; return what came of it."""
    small, before = copy.deepcopy(model), size(model)
    torch.manual_seed(2)
    try:
        with numbers(model, example):
            cut = plan(small, example)
            fill(small)
            cut()
    except Exception as problem:
        return {"result": "refused", "why": first_line(problem)}
    if shapes(small) == shapes(model):
        return {"result": "kept"}
    masked = copy.deepcopy(model)
    set_values(small, model, masked)
    found = {"left": round(size(small) / before, 3)}
    return found | compared(masked, small, [example, *others])


def numbers(model: nn.Module, example: Inputs) -> contextlib.AbstractContextManager[Any]:
    """Return what a model in float64 needs to run: nothing, or no constants in float32."""
    try:
        with torch.no_grad():
            call(model, example)
    except Exception:
        return InDouble()
    return contextlib.nullcontext()


def real_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, under each of their names."""
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            if tensor.is_floating_point():
                yield name, tensor.data


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in real_tensors(model)}


def fill(model: nn.Module) -> None:
    """Replace values by the numbers of their entries."""
    for _, tensor in real_tensors(model):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))


def set_values(small: nn.Module, model: nn.Module, masked: nn.Module) -> None:
    """Give the small model its values, and set to 0 what it lost in the masked model."""
    dense, under_mask = dict(real_tensors(model)), dict(real_tensors(masked))
    for name, tensor in real_tensors(small):
        entries = tensor.long().flatten()
        lost = torch.ones(dense[name].numel(), dtype=torch.bool)
        lost[entries] = False
        under_mask[name].masked_fill_(lost.view(dense[name].shape), 0)
        tensor.copy_(dense[name].flatten()[entries].view(tensor.shape))


def check(library: str, zoo: str) -> processes.Check:
    """Return the check of one model of a zoo with a library."""

    def checked(name: str, found: dict[str, object]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model, example, others = ZOOS[zoo](name, found)
        model = prepared(model)
        found["parameters"] = size(model)
        found["units"] = law(model, in_double(example), in_double(others), LIBRARIES[library])

    return checked


def main(library: str, zoo: str, names: list[str]) -> int:
    warnings.simplefilter("ignore")
    importlib.import_module({"kirigami": "torch_kirigami"}.get(library, library))
    results = RESULTS / f"shrink_{library}_{zoo}.jsonl"
    if zoo == "transformers":
        importlib.import_module("transformers").logging.set_verbosity(50)
    limits = {"seconds": SECONDS, "gibibytes": GIBIBYTES}
    processes.run(names or names_of(zoo), check(library, zoo), results, **limits)
    print(table(list(processes.read(results).values()), ("units",)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
