"""`fuse`: a network with fewer steps, for inference."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from parasparse.acceleration.folding import fold_norms
from parasparse.acceleration.weight.convolution import convolution_then
from parasparse.acceleration.weight.following import Following
from parasparse.acceleration.weight.layers import is_strided, is_transformed
from parasparse.attach.accelerated import is_accelerated
from parasparse.masks.apply import is_tracing
from parasparse.masks.hooks import is_hooked

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_SUMS = operator.add, operator.iadd, torch.add
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), "hardsigmoid"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
}


def fuse(model: nn.Module) -> fx.GraphModule:
    """Return a copy of `model` for inference that computes the same in fewer steps.

    Batch norms are folded into the convolutions before them. A convolution computes the sum and the
    activation (ReLU, ReLU6, Hardsigmoid or Hardswish) that follow it. After `accelerate` with
    `compile_kernel=True`, its kernel computes them, and writes the sum to the memory of the other
    operand if that is the output of a convolution that nothing reads later. Max pooling of images
    computes in channels_last, which is faster on a CPU. The zeros of weights stay. The last bits of
    outputs change, and so do classes and keys. Norms after layers that are called twice, and layers
    with hooks, stay as they are. Hooks that are added to the copy do not run where a call has
    become part of another.

    Args:
        model: in evaluation mode, and without Python code that torch.fx cannot trace. Masked layers
            are copied as they are, so call `squash` first.

    Raises:
        RuntimeError: the model is in training mode, or accelerated, or has forward hooks of its
            own, not of its layers, or sets `.data` of a tensor. torch.fx raises its own errors.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.allclose(fuse(network.eval())(x), network(x), atol=1e-6)
        True
    """
    if model.training or is_accelerated(model):
        raise RuntimeError(
            "`model` must be in evaluation mode and not accelerated yet. Call `model.eval()`, and "
            "`fuse` before `accelerate`."
        )
    if model._forward_hooks or model._forward_pre_hooks:
        raise RuntimeError(
            "`model` must have no forward hooks, because torch.fx leaves them out. Remove them, or "
            "fuse `nn.Sequential(model).eval()`, whose graph has what they compute."
        )
    with torch.inference_mode(False):
        model = copy.deepcopy(model)
        fused = fx.GraphModule(model, _Tracer().trace(model))
        fold_norms(fused)
    modules = dict(fused.named_modules())
    for node in list(fused.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None or is_hooked(module) or node.kwargs:
            continue
        if type(module) in _CONVOLUTIONS and module.padding_mode == "zeros":
            _with_what_follows(fused.graph, node, module, modules)
        elif type(module) is nn.MaxPool2d and not module.return_indices:
            sizes = module.kernel_size, module.stride, module.padding, module.dilation
            _replace(fused.graph, [node], _max_pool2d, (*node.args, *sizes, module.ceil_mode))
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused


class _Proxy(fx.Proxy):
    """A proxy for which `y += x` changes y; torch.fx would record `y = y + x`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # what a proxy is made of
            raise RuntimeError(
                f"`forward` must not set `.{name}` of a tensor, because torch.fx leaves that "
                "out. Use an operation instead, such as `y.add_(x)` for `y.data += x`."
            )
        super().__setattr__(name, value)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


for _name in (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
    "lshift", "rshift",
):  # fmt: skip
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _with_what_follows(
    graph: fx.Graph, node: fx.Node, layer: Any, modules: dict[str, nn.Module]
) -> None:
    """Let a convolution compute the sum and the activation that come directly after it."""
    chain, added, in_place, last = [node], _summand(node, modules), False, False
    if added is not None:
        chain.append(node.next)
        in_place = node.next.target is operator.iadd and node.next.args[0] is node
        last = _is_output(added, modules) and all(
            user is node.next or (user < node and _is_output(user, modules)) for user in added.users
        )
    activation = _activation(chain[-1].next, modules) if _is_next(chain[-1]) else None
    if activation is not None:
        chain.append(chain[-1].next)
    if len(chain) > 1:
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{node.target}.weight")
            bias = None if layer.bias is None else graph.get_attr(f"{node.target}.bias")
        following = Following(added, in_place, last, activation)
        more = layer.stride, layer.padding, layer.dilation, layer.groups
        _replace(graph, chain, convolution_then, (*node.args, weight, bias, following, *more))


def _is_next(node: fx.Node) -> bool:
    """Whether only the next operation reads the output: then it need not exist."""
    return list(node.users) == [node.next]


def _summand(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Return what the next operation adds to the output of `node`."""
    after = node.next
    if not _is_next(node) or after.kwargs or after.target not in _SUMS:
        return None
    others = [each for each in after.args if each is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    if after.target is operator.iadd and after.args[0] is not node:  # it changes the other operand
        return others[0] if _can_be_swapped(others[0], node, modules) else None
    return others[0]


def _can_be_swapped(first: fx.Node, second: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether `first += second` may be `second += first`, because both are convolutions."""
    if first.op != "call_module" or len(first.users) > 1 or not _is_output(first, modules):
        return False
    one, other = (modules[str(node.target)].weight for node in (first, second))
    return one.dtype == other.dtype


def _is_output(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether `node` is the output of a convolution, which shares no memory with anything."""
    module: Any = modules.get(str(node.target)) if node.op == "call_module" else None
    return node.target is convolution_then or (
        type(module) in _CONVOLUTIONS and not is_hooked(module)
    )


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op != "call_module":
        return _ACTIVATIONS.get(node.target)
    module = modules[str(node.target)]
    return None if is_hooked(module) else _ACTIVATIONS.get(type(module))


def _replace(
    graph: fx.Graph, chain: list[fx.Node], call: Callable[..., Any], arguments: Any
) -> None:
    """Replace the nodes of `chain`, each the input of the next, by a single call."""
    with graph.inserting_before(chain[0]):
        chain[-1].replace_all_uses_with(graph.call_function(call, arguments))
    for node in reversed(chain):
        graph.erase_node(node)


def _max_pool2d(x: Tensor, *sizes: Any) -> Any:
    """Pool in channels_last, which on a CPU is vectorized, and return the memory format of x."""
    if has_torch_function((x,)):  # a proxy of torch.fx, for example
        return handle_torch_function(_max_pool2d, (x,), x, *sizes)
    images = is_strided(x) and x.ndim == 4 and x.is_cpu and x.is_contiguous()
    if not images or is_transformed():
        return F.max_pool2d(x, *sizes)
    if torch.compiler.is_compiling() or is_tracing() or len(x) == 1:
        return _in_channels_last(x, *sizes)  # a traced graph is for batches of any size
    # One image at a time, whose copies stay in the caches.
    return torch.cat([_in_channels_last(image, *sizes) for image in x.split(1)])


def _in_channels_last(x: Tensor, *sizes: Any) -> Any:
    return F.max_pool2d(x.contiguous(memory_format=torch.channels_last), *sizes).contiguous()
