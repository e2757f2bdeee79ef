"""The laws that every model of the zoo must keep, and what a sparsity alone reaches in it."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parasparse as ps
from parasparse.targets.tensors import tensors_of
from parasparse.targets.weights import why_dense

SPARSITY = 0.5
LARGE = 0.01  # share of all entries
PRODUCTS = re.compile(r"mm|mv|conv|linear|lstm|gru|rnn|trilinear|\bdot\b")
Run = Callable[[nn.Module], list[Tensor]]


def plain(name: str) -> str:
    """Return the name of a tensor without the parts that parametrizations add."""
    return re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", name)


def reach(model: nn.Module) -> dict[str, object]:
    """Return how much of a model a sparsity alone reaches, and what the plan says of the rest.

    `reached` is the share of the entries of all parameters with two or more dimensions, without
    the embeddings. `dense` counts the other entries of such parameters by their reason, `silent`
    names the large ones that are neither reached nor listed by the plan, and `unlisted` is the
    share of all entries that the plan does not mention.
    """
    plan = ps.plan(model, SPARSITY)
    reached, listed = {row.name for row in plan}, {row.name for row in plan.dense}
    reasons = {target.names: why for target, why in why_dense(tensors_of(model)).items()}
    by_name = {name: why for names, why in reasons.items() for name in names}
    total = sum(parameter.numel() for parameter in model.parameters())
    entries: Counter[str] = Counter()
    silent, unlisted = [], 0
    for name, parameter in model.named_parameters():
        name, size = plain(name), parameter.numel()
        is_reached = name in reached
        if parameter.ndim > 1:
            entries["reached" if is_reached else by_name[name]] += size
        if not is_reached and name not in listed and parameter.ndim > 1:
            unlisted += size
        large = LARGE if parameter.ndim > 1 else 10 * LARGE
        if not is_reached and name not in listed and size >= large * total:
            silent.append(name)
    weights = sum(entries.values()) - entries["embedding"]
    return {
        "parameters": total,
        "reached": round(entries["reached"] / weights, 4) if weights else None,
        "dense": {why: size for why, size in entries.items() if why != "reached"},
        "silent": silent,
        "unlisted": round(unlisted / total, 4) if total else 0,
    }


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether all bits agree: NaN equals itself, -0.0 is not 0.0."""
    return len(one) == len(two) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(one, two, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def tensors_in(out: object) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns: in dicts, lists and dataclasses."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from tensors_in(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from tensors_in(value)
    elif hasattr(out, "__dict__") and not inspect.isclass(out):
        yield from tensors_in(vars(out))


class Products(TorchDispatchMode):
    """Collects the parameters that are multiplied with activations, and those that are used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.origins: dict[int, frozenset[str]] = {}
        for name, tensor in model.named_parameters():
            self.origins.setdefault(pointer(tensor), frozenset({plain(name)}))
        self.multiplied: set[str] = set()  # also with other parameters, such as learned tokens
        self.with_activations: set[str] = set()
        self.used: set[str] = set()
        self.alive: list[Tensor] = []  # so that no other tensor gets its memory

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = [t for t in given if t.is_floating_point() or t.is_complex()]
        origins = [self.origins.get(pointer(tensor), frozenset()) for tensor in given]
        every = frozenset().union(*origins)
        self.used |= every
        if PRODUCTS.search(str(operator)):
            matrices = frozenset().union(
                *(o for o, t in zip(origins, given, strict=True) if t.ndim > 1)
            )
            self.multiplied |= matrices
            if not all(origins):
                self.with_activations |= matrices
        elif given and all(origins) and "embedding" not in str(operator):
            # A copy of parameters, or numbers made of them alone.
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and pointer(tensor) not in self.origins:
                    self.origins[pointer(tensor)] = every
                    self.alive.append(tensor)
        return out


def pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def products(model: nn.Module, run: Run, plan: ps.Plan) -> dict[str, list[str]]:
    """Return the large tensors whose use in a forward pass contradicts what is reached.

    Tensors that stay dense though activations are multiplied with them, and tensors that are
    reached though nothing is.
    """
    seen = Products(model)
    with torch.no_grad(), seen:
        run(model)
    reached, reasons = {row.name for row in plan}, {row.name: row.reason for row in plan.dense}
    large = LARGE * sum(tensor.numel() for tensor in model.parameters())
    sizes = {plain(name): tensor.numel() for name, tensor in model.named_parameters()}
    dense = [n for n in seen.with_activations - reached if sizes[n] >= large]
    added = [n for n in (seen.used - seen.multiplied) & reached if sizes[n] >= large]
    return {
        "dense_products": sorted({f"{kind(n)} ({reasons.get(n)})" for n in dense}),
        "reached_unmultiplied": sorted({kind(name) for name in added}),
    }


def kind(name: str) -> str:
    """Return the last two parts of a name without numbers: the same in every layer."""
    return ".".join([part for part in name.split(".") if not part.isdecimal()][-2:])


def laws(model: nn.Module, run: Run | None) -> dict[str, object]:
    """Hold the laws on one model; return what was compared.

    Args:
        model: is changed.
        run: returns the outputs of a model on made-up inputs; None if it cannot be run.

    Raises:
        AssertionError: a law does not hold.
    """
    draw(model, run)
    template = copy.deepcopy(model)
    rows = ps.plan(model, SPARSITY)
    found: dict[str, object] = products(model, run, rows) if run else {}
    dense = outputs(model, run, grad=False)
    if not same(outputs(model, run, grad=False), dense):
        run, found["not_run"] = None, "its outputs differ from call to call"
    facts, state = facts_of(model), template.state_dict()
    originals = {row.name: value(template, row.name) for row in rows}
    ps.sparsify(model, SPARSITY)
    masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
    assert masks.keys() == originals.keys(), "other tensors are masked than planned"
    sparse = outputs(model, run)
    found["outputs"] = sum(tensor.numel() for tensor in sparse)
    found["moved"] = not same(sparse[: len(dense)], dense)
    states(template, model)
    ps.squash(model)
    assert same(outputs(model, run), sparse), "the squashed model differs"
    for name, original in originals.items():
        selected = torch.where(masks[name], original, torch.zeros_like(original))
        assert same([value(model, name)], [selected]), f"{name}: other bits"
    found["baked"] = any("parametrizations" in key for key in state)
    kept = facts_of(model) == facts
    assert found["baked"] or kept, "squash changed classes, keys, order or Parameters"
    return found


def fresh(template: nn.Module) -> nn.Module:
    """Return a model with other weights."""
    model = copy.deepcopy(template)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0) if parameter.ndim else parameter + 1)
    return model


def states(template: nn.Module, model: nn.Module) -> None:
    """State dicts go from model to model and come back, all of them strictly."""
    dense, masked = template.state_dict(), model.state_dict()
    other = fresh(template)
    ps.load_state_dict(other, masked)
    assert alike(other.state_dict(), masked), "masked state into a fresh model"
    other = ps.sparsify(fresh(template), SPARSITY)
    other.load_state_dict(masked)
    assert alike(other.state_dict(), masked), "masked state into a masked model"
    other.load_state_dict(dense)
    assert alike(ps.unsparsify(other).state_dict(), dense), "dense state into a masked model"
    folded = ps.dense_state_dict(model)
    if not any("parametrizations" in key for key in dense):
        assert list(folded) == list(dense), "the keys of dense_state_dict"
        other.load_state_dict(folded)
        assert alike(other.state_dict(), folded), "dense_state_dict into a fresh model"


def outputs(model: nn.Module, run: Run | None, *, grad: bool = True) -> list[Tensor]:
    """Return the outputs with gradients off, and also with gradients on."""
    if run is None:
        return []
    with torch.no_grad():
        off = run(model)
    return [*off, *run(model)] if grad else off


def facts_of(model: nn.Module) -> tuple[list[object], ...]:
    """Return what squash brings back: classes, keys, order, and the Parameters themselves."""
    return (
        [type(module) for module in model.modules()],
        list(model.state_dict()),
        [name for name, _ in model.named_parameters()],
        [id(parameter) for parameter in model.parameters()],
    )


def draw(model: nn.Module, run: Run | None) -> None:
    """Draw matrices that a model starts at 0, and all of them where its outputs are 0.

    Otherwise no mask would change an output, and nothing would be compared.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point() and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if not any(tensor.any() for tensor in outputs(model, run, grad=False)):
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                nn.init.kaiming_normal_(parameter)


def tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def alike(one: Mapping[str, object], two: Mapping[str, object]) -> bool:
    a, b = tensors(one), tensors(two)
    return list(a) == list(b) and same(list(a.values()), list(b.values()))


def value(model: nn.Module, name: str) -> Tensor:
    """Return a tensor of a model by its plain name, as its module reads it."""
    path, _, attr = name.rpartition(".")
    with torch.no_grad():
        return getattr(model.get_submodule(path), attr).detach()
