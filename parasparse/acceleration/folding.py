"""Batch norms that become part of the convolutions before them, for `fuse`."""

from typing import Any

from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from parasparse.masks.hooks import is_hooked

_FOLDED: dict[Any, Any] = {
    nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d,
}  # fmt: skip


def fold_norms(fused: fx.GraphModule) -> None:
    """Replace each convolution that a batch norm follows by one that computes both."""
    graph = fused.graph
    modules = dict(fused.named_modules())
    for node in list(graph.nodes):
        norm: Any = modules.get(node.target) if node.op == "call_module" else None
        before = node.args[0] if node.args else None
        if type(norm) not in _FOLDED or not isinstance(before, fx.Node):
            continue
        layer: Any = modules.get(str(before.target)) if before.op == "call_module" else None
        if type(layer) is not _FOLDED[type(norm)] or not _is_used_once(graph, before):
            continue
        if _is_plain(layer) and _is_plain(norm) and norm.running_mean is not None:
            fused.set_submodule(str(before.target), fuse_conv_bn_eval(layer, norm))
            node.replace_all_uses_with(before)
            graph.erase_node(node)


def _is_plain(module: nn.Module) -> bool:
    return not (module.training or is_hooked(module))


def _is_used_once(graph: fx.Graph, call: fx.Node) -> bool:
    """Whether nothing else reads the output, calls the module or reads its parameters."""
    others = [n for n in graph.nodes if n is not call and n.op in ("call_module", "get_attr")]
    within = f"{call.target}."
    return len(call.users) == 1 and not any(f"{n.target}.".startswith(within) for n in others)
