"""`dense_state_dict`: the state dict that a masked model would have after `squash`."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from parasparse import names
from parasparse.attach import reading
from parasparse.attach.stack import original_names
from parasparse.targets.tensors import named_modules


def dense_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Return the `state_dict` that the squashed model would have, and leave `model` unchanged.

    Values are detached. As in `state_dict`, values without masks share memory with the model. Tied
    tensors stay tied.

    Raises:
        RuntimeError: a mask is not set.

    Examples:
        >>> list(dense_state_dict(sparsify(nn.Linear(2, 2), 0.5)))
        ['weight', 'bias']
    """
    state = model.state_dict()
    renamed: dict[str, Any] = {}
    tied: dict[tuple[int, ...], Tensor] = {}
    for plain, name, module, _ in named_modules(model):
        for attr, stack in reading.masked_stacks(module):
            own = (*reading.originals(module, attr), stack.mask)
            key = tuple(map(id, own))
            if key not in tied:
                tied[key] = reading.effective(module, attr).detach()
            for where in dict.fromkeys((name, plain)):  # some wrappers omit their name
                prefix = f"{where}." if where else ""
                inside = names.inside(f"{prefix}{attr}")
                if any(f"{inside}{held}" in state for held in original_names(stack)):
                    renamed[f"{prefix}{attr}"] = tied[key]
                for gone in [k for k in state if k.startswith(inside)]:
                    del state[gone]
    every = {**state, **renamed}
    first = [key for key in _dense_order(model) if key in every]
    # Keys that state_dict hooks have added or renamed come last.
    rest = [key for key in every if key not in set(first)]
    result: OrderedDict[str, Tensor] = OrderedDict((key, every[key]) for key in [*first, *rest])
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        kept = {k: v for k, v in metadata.items() if "parametrizations" not in k.split(".")}
        result._metadata = OrderedDict(kept)  # type: ignore[attr-defined]
    return result


def _dense_order(model: nn.Module) -> Iterable[str]:
    for plain, name, module, _ in named_modules(model):
        parameters, buffers = reading.tensor_names(module)
        held = [
            *parameters,
            *module._parameters.keys(),
            *buffers,
            *module._buffers.keys(),
            "_extra_state",
        ]
        if reading.stacks_of(module):  # other parametrizations are a submodule like any other
            inside = module.get_submodule("parametrizations").state_dict()
            held += [f"parametrizations.{own}" for own in inside]
        for own in held:
            yield from dict.fromkeys(f"{where}.{own}".lstrip(".") for where in (name, plain))
