"""How long does it take to compute all masks of a network, and to compute them again?

    python -m benchmarks.updates

90% of the weights of ResNet-18 by magnitude, in each tensor (local) or in all together (global).
*Fresh* is a network without masks, *again* one that has masks. *Again* does not mean the same
everywhere: parasparse ranks all stored weights, so dropped entries can come back.
torch.nn.utils.prune prunes 90% of the remaining tenth. WeightNormSparsifier ranks all entries,
dropped ones as 0. torch.ao.pruning makes masks only in two dimensions, so in that comparison the
weights of ResNet-18 are matrices of linear layers. It also checks that the masks are equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune
from torchvision.models import resnet18

import parasparse as ps
from benchmarks.timing import Timing, after, compare, own, show, threads, write

SPARSITY = 0.9
Results = Iterator[tuple[str, dict[str, Timing]]]
Choose = Callable[[nn.Module], object]


def weighted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def ours_local(model: nn.Module) -> None:
    ps.sparsify(model, SPARSITY)


def ours_global(model: nn.Module) -> None:
    ps.sparsify(model, ps.Prune(SPARSITY, scope="global"))


def prune_local(model: nn.Module) -> None:
    for module in weighted(model):
        prune.l1_unstructured(module, "weight", SPARSITY)


def prune_global(model: nn.Module) -> None:
    targets = [(module, "weight") for module in weighted(model)]
    prune.global_unstructured(targets, prune.L1Unstructured, amount=SPARSITY)


CHOOSERS: dict[str, dict[str, Choose]] = {
    "local": {"parasparse": ours_local, "torch.nn.utils.prune": prune_local},
    "global": {"parasparse": ours_global, "torch.nn.utils.prune": prune_global},
}


def against_prune(scope: str) -> Results:
    dense = resnet18(weights=None)

    def chosen(choose: Choose) -> nn.Module:
        model = copy.deepcopy(dense)
        choose(model)
        return model

    fresh, again = {}, {}
    for name, choose in CHOOSERS[scope].items():
        fresh[name] = after(lambda: copy.deepcopy(dense), choose)
        again[name] = after(lambda choose=choose: chosen(choose), choose)
    yield f"ResNet-18, {scope}, fresh", compare(fresh, repeats=5, warm_up=1, clock=own)
    yield f"ResNet-18, {scope}, again", compare(again, repeats=5, warm_up=1, clock=own)


def matrices() -> nn.Sequential:
    """Return linear layers with the weights of ResNet-18, which are matrices in them."""
    weights = [module.weight.detach() for module in weighted(resnet18(weights=None))]
    model = nn.Sequential()
    for weight in weights:
        layer = nn.Linear(weight[0].numel(), len(weight), bias=False)
        layer.weight = nn.Parameter(weight.flatten(1))
        model.append(layer)
    return model


def against_ao() -> Results:
    patterns = {
        (1, 1): ps.Prune(SPARSITY),
        (1, 4): ps.Prune(SPARSITY, pattern=ps.patterns.block((1, 4), norm=2)),
    }
    for shape, rule in patterns.items():
        ours = matrices()
        theirs = copy.deepcopy(ours)
        sparsifier = WeightNormSparsifier(SPARSITY, shape)
        sparsifier.prepare(theirs, [{"tensor_fqn": f"{i}.weight"} for i in range(len(ours))])
        calls: dict[str, Callable[[], object]] = {
            "parasparse": lambda ours=ours, rule=rule: ps.sparsify(ours, rule),
            "torch.ao WeightNormSparsifier": sparsifier.step,
        }
        timings = compare(calls, repeats=9, warm_up=1)
        for layer, other in zip(ours, theirs, strict=True):
            mask = other.parametrizations.weight[0].mask
            if not torch.equal(ps.mask_of(layer, "weight"), mask.bool()):
                raise AssertionError("the masks are not the same")
        yield f"matrices, blocks of {shape[0]} x {shape[1]}, again", timings


def main() -> None:
    torch.manual_seed(0)
    results = {}
    for number in (1, 2):
        with threads(number):
            for questions in (against_prune("local"), against_prune("global"), against_ao()):
                for question, timings in questions:
                    results[f"{question}, {number} thread(s)"] = timings
                    show(f"{question}, {number} thread(s)", timings)
    write("updates", results)


if __name__ == "__main__":
    main()
