"""Synaptic flow: gradients of a network with |w| for all its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from parasparse.attach.evaluating import evaluating
from parasparse.scores.products import product


def flows_of(
    model: Any, parameters: Mapping[str, str], inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return |w| dR/d|w| by name, where R sums the outputs of `model` with |w| for all its w.

    The model runs in float64 and evaluation mode. `parameters` maps names in the result to names in
    `named_parameters`. Raises RuntimeError if the flow is 0 everywhere.
    """
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            linear = {name: _magnitude(buffer) for name, buffer in model.named_buffers()}
            for name, parameter in model.named_parameters():
                linear[name] = _magnitude(parameter).requires_grad_()
            leaves = {name: linear[own] for name, own in parameters.items()}
            ones = tree_map(_in_float64, (inputs, keywords))
            out = torch.func.functional_call(model, linear, *ones)
            outputs = [value for value in tree_leaves(out) if _is_number(value)]
            flow = sum((value.abs() if value.is_complex() else value).sum() for value in outputs)
            grads = torch.autograd.grad(flow, list(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        error.add_note("while the model ran in float64, with |w| for w, for the synaptic flow")
        raise
    flows = {
        name: product(leaf.detach(), torch.zeros_like(leaf) if grad is None else grad)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    # Without biases, the flow through each layer equals the flow out of the network.
    flow_out = sum(float(value.detach().abs().sum()) for value in outputs)
    if all(float(values.sum().abs()) <= 1e-9 * flow_out for values in flows.values()):
        raise RuntimeError(
            "the synaptic flow is 0 everywhere. A LayerNorm at the end causes this, because its "
            "outputs always have the same sum. Use another score."
        )
    return flows


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _in_float64(value: Any) -> Any:
    if not _is_number(value):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _magnitude(tensor: Tensor) -> Tensor:
    if not _is_number(tensor):
        return tensor
    size = tensor.detach().abs().double()
    return size + 0j if tensor.is_complex() else size
