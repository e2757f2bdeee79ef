"""The flow through a network with |w| for all its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from parasparse.scores.products import product


def flows_of(
    model: Any, parameters: Mapping[str, str], inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return |w| dR/d|w| by name, where R sums the outputs of `model` with |w| for all its w.

    Args:
        model: runs in float64 and evaluation mode, and stays as it is.
        parameters: its own name of each weight that is asked for.
        inputs: of the model.
        keywords: the same.

    Raises:
        RuntimeError: the flow is 0 everywhere.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode(False), torch.enable_grad():
            linear = {name: _magnitude(buffer) for name, buffer in model.named_buffers()}
            for name, parameter in model.named_parameters():
                linear[name] = _magnitude(parameter).requires_grad_()
            leaves = {name: linear[own] for name, own in parameters.items()}
            ones = tree_map(_in_float64, (inputs, keywords))
            out = torch.func.functional_call(model, linear, *ones)
            flow = [_magnitude_sum(value) for value in tree_leaves(out)]
            grads = torch.autograd.grad(sum(flow), list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError as error:
        error.add_note("while the model ran in float64, with |w| for w, for the synaptic flow")
        raise
    finally:
        for module in training:
            module.training = True
    flows = {
        name: product(leaf.detach(), torch.zeros_like(leaf) if grad is None else grad)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    # Of a network without shifts, what flows through each layer is what comes out.
    out_of_all = sum(float(_magnitude_sum(_size(value))) for value in tree_leaves(out))
    if all(float(values.sum().abs()) <= 1e-9 * out_of_all for values in flows.values()):
        raise RuntimeError(
            "the synaptic flow must not be 0 everywhere; it is. A LayerNorm at the end, whose "
            "outputs always have the same sum, does this: take another score."
        )
    return flows


def _in_float64(value: Any) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _magnitude(tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    size = tensor.detach().abs().double()
    return size + 0j if tensor.is_complex() else size


def _magnitude_sum(value: Any) -> Tensor | float:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    return (value.abs() if value.is_complex() else value).sum()


def _size(value: Any) -> Any:
    return value.detach().abs() if isinstance(value, Tensor) else value
