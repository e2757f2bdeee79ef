"""`materialize`: give a model on the meta device memory, with sparse weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.acceleration.compact.stack import CompactParametrizationList
from parasparse.attach import attaching
from parasparse.attach.container import put_stack
from parasparse.attach.reading import masked_stacks
from parasparse.attach.stack import stack_of
from parasparse.attach.undo import restored_on_error
from parasparse.counts import bounded, num_kept
from parasparse.masks.places import Kept, Places
from parasparse.masks.random_places import random_positions
from parasparse.patterns import unstructured
from parasparse.rules.assignments import as_pairs, assignments
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment
from parasparse.rules.types import Rules
from parasparse.rules.warn import warn_left_dense
from parasparse.scores.weights_alone import random
from parasparse.sharding.dtensors import PLAIN
from parasparse.targets.outputs import num_outputs, outputs_of
from parasparse.targets.reach import Spec
from parasparse.targets.tensors import Target
from parasparse.text import described
from parasparse.verbs.reset_parameters import Device, initial_values


def materialize(
    model: nn.Module,
    rules: Rules,
    *,
    device: Device = "cpu",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give a model on the meta device memory, with compact weights at random places.

    No dense weight or mask ever exists, so the model may be far larger than memory: time and memory
    are proportional to what is kept. Afterwards the model is as `compact` leaves it. All other
    tensors that are on the meta device get values by `reset_parameters` of their modules. Tensors
    that are not on the meta device stay as they are.

    The kept values of an output that has k inputs are drawn from U(-1/sqrt(k), 1/sqrt(k)), as
    torch initializes a dense layer of k inputs. The places are a uniform draw, so an output may
    have no input if few are kept.

    Args:
        model: built under `torch.device("meta")`; changed in place. Parameters are replaced, so
            build the optimizer afterwards.
        rules: as in `sparsify`. Treatments are a sparsity, `Prune(sparsity, score=scores.random)`,
            which may have a `distribution`, and None.
        device: where the tensors will be.
        generator: random generator for everything that is drawn, on the CPU or on another device;
            None: torch's global one.

    Raises:
        RuntimeError: `reset_parameters` leaves a tensor without values. The model is unchanged, as
            after any error.
        TypeError: see `sparsify`.
        ValueError: a treatment ranks weights or is not one of these; a tensor keeps fewer entries
            than it has outputs, is not on the meta device, or is not the weight of a layer; or see
            `sparsify`.

    Warns:
        UserWarning: see `sparsify`.

    Examples:
        >>> layer = nn.Linear(1_000_000, 1_000_000, device="meta")
        >>> materialize(layer, 0.999999).parametrizations.weight.original.shape
        torch.Size([1000000])
        >>> layer.bias.shape
        torch.Size([1000000])

    Reference: Evci, Ioannou, Keskin, Dauphin, "Gradient Flow in Sparse Neural Networks and How
        Lottery Tickets Win", 2022, arXiv:2010.03533: initialization by the number of inputs that
        each output really has. Differs: U(-1/sqrt(k), 1/sqrt(k)), which torch uses for Linear and
        convolutions, instead of N(0, 2/k).
    """
    if torch.device(device).type == "meta":
        raise ValueError(
            '`device` must not be "meta", which has no memory. Give the one to train on.'
        )
    generator = torch.default_generator if generator is None else generator
    counts = _counts(model, rules)
    # Their modules reset the rest as if they were dense, which costs nothing on the meta device.
    sparse = {id(target.originals()[0]) for target in counts}
    values = initial_values(model, sparse, device, generator)
    layers = [_drawn(target, count, device, generator) for target, count in counts.items()]
    with restored_on_error(model.modules()):
        _put_values(model, values)
        for layer in layers:
            _put_layer(layer)
    return model


@dataclass(frozen=True)
class _Layer:
    """A weight that has been drawn."""

    target: Target
    values: nn.Parameter
    places: Places


@dataclass(frozen=True)
class _Counting:
    """A treatment that counts the entries to be kept, by name, and returns masks without memory.

    `Prune` itself would score the weights, for which torch imports much on the meta device.
    """

    prune: Prune
    kept: dict[str, int] = field(default_factory=dict, repr=False)

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, share in self.prune.shares(tensors).items():
            numel = tensors[name].numel()
            self.kept[name] = num_kept(numel, bounded(numel, share, self.prune.max_sparsity))
        return {
            n: torch.empty(t.shape, dtype=torch.bool, device="meta") for n, t in tensors.items()
        }


def _counts(model: nn.Module, rules: Rules) -> dict[Target, int]:
    """Return how many entries of each sparse tensor are kept; raise as `materialize`."""
    counting = [(spec, _at_random(spec, right)) for spec, right in as_pairs(rules)]
    alone = counting[0][0] is None
    assigned = assignments(model, counting[0][1] if alone else counting, pairs=True)
    warn_left_dense(assigned, stacklevel=3)
    counts = {each.target: each.treatment.kept[each.target.name] for each in assigned}
    for target, count in counts.items():
        _check(target)
        outputs = num_outputs(target)
        if count < outputs:
            raise ValueError(
                f'"{target.name}" {tuple(target.shape)} must keep an entry for each of its '
                f"{outputs:,} outputs, or some are constant; its rule keeps {count:,}. Lower the "
                "sparsity, or give it None to leave it dense."
            )
    return counts


def _at_random(spec: Spec | None, right: Any) -> _Counting | None:
    """Return a treatment that draws places at random, or None; raise ValueError for others."""
    treatment = as_treatment(right)
    if treatment is None:
        return None
    if isinstance(treatment, Prune):
        is_number = treatment is not right  # which does not say what is ranked
        plain = treatment.pattern is unstructured and treatment.scope == "local"
        if plain and (is_number or treatment.score is random):
            return _Counting(treatment)
    rule = "" if spec is None else f' for "{described(spec)}"'
    raise ValueError(
        f"`rules` must draw places at random, because there are no weights to rank yet; got "
        f"{described(right)}{rule}. Use a sparsity, `Prune(sparsity, score=scores.random)`, with a "
        "`distribution` or not, or None for tensors that stay dense."
    )


def _check(target: Target) -> None:
    """Raise ValueError if a tensor cannot be drawn."""
    stored = [tensor for site in target.sites for tensor in site.originals()]
    if not all(tensor.is_meta for tensor in stored):
        what = "has values already. Call `sparsify` and `compact` for it afterwards"
    elif target.masks():
        what = "has a mask already. Give rules to `materialize` instead of `sparsify`"
    elif any(stack_of(site.module, site.attr) is not None for site in target.sites):
        what = "is computed by a parametrization. Register it afterwards"
    elif target.is_pair or not all(type(tensor) in PLAIN for tensor in stored):
        what = "is a pair or sharded. Leave it dense with None"
    elif target.is_buffer:
        what = "is a buffer. Leave it out of `rules`"
    else:
        return
    raise ValueError(f'"{target.name}" must be a plain Parameter on the meta device; it {what}.')


def _drawn(target: Target, count: int, device: Device, generator: torch.Generator) -> _Layer:
    """Draw the places and the values of a weight."""
    positions = random_positions(count, target.shape.numel(), generator.device, generator)
    (weight,) = target.originals()
    values = _values(target, positions, weight.dtype, generator)
    parameter = nn.Parameter(values.to(device), weight.requires_grad)
    return _Layer(target, parameter, Places.at(positions.to(device), target.shape))


def _values(
    target: Target, positions: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Draw the values at `positions` by the number of inputs that each output has."""
    outputs = outputs_of(target, positions)
    bounds = outputs.bincount().rsqrt()
    values = torch.empty(len(positions), dtype=dtype, device=positions.device)
    return values.uniform_(-1, 1, generator=generator).mul_(bounds[outputs])


def _put_values(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({n: values[id(t)] for n, t in held.items() if id(t) in values})  # type: ignore[misc]
        if isinstance(module, nn.RNNBase) and not any(True for _ in masked_stacks(module)):
            module._init_flat_weights()


def _put_layer(layer: _Layer) -> None:
    mask = Kept(layer.places)  # one for all sites
    for site in layer.target.sites:
        attaching.keep_order(site.module)
        del site.module._parameters[site.attr]
        stack = CompactParametrizationList(layer.values, layer.places, mask)
        stack.train(site.module.training)
        put_stack(site.module, site.attr, stack)
        attaching.reclass(site.module)
