"""Which tensors a sparsity alone reaches: those that multiply activations.

These are the parameters with two or more dimensions, except those that a model looks up, adds or
scales with: embeddings and other tables, norms, biases, gains, scales, routers, positions and
learned tokens. The class of torch's own layers says what a tensor is. In other modules, its shape,
the class of the module and the words in its name do.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn

from parasparse.attach import reading
from parasparse.targets.tensors import Site, Target

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_MULTIPLY = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd, *_RECURRENT)
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
# Words in the name of a tensor, and the kind of tensor they stand for.
_KINDS = {
    word: kind
    for kind, words in {
        "bias": "bias",
        "scale": "scale scales gain gamma beta alpha log",
        "norm": "norm mean std",
        "position": "pos position positions positional ape",
        "embedding": "emb embed embedding embeddings table codebook",
        "learned token": "token tokens query queries latent latents prompt prompts pad",
    }.items()
    for word in words.split()
}
_STATE_SPACE = ("A", "D")  # in Mamba: decay rates, and a gain
_ROUTERS = ("gate", "gating", "wg")  # modules beside "experts"


def why_dense(targets: list[Target]) -> dict[Target, str]:
    """Return the targets that a sparsity alone does not reach, and why not."""
    names = [name for target in targets for name in target.names]
    with_experts = {m[1] for m in (re.match(r"(.*?)\bexperts\b", name) for name in names) if m}
    reasons = {target: _reason(target, with_experts) for target in targets}
    return {target: reason for target, reason in reasons.items() if reason is not None}


def is_companion(target: Target) -> bool:
    """Whether it belongs to a larger tensor of its module, whose name its own name extends.

    So do the scales of a quantized weight (`weight_scale`), and the gain of torch's older
    `weight_norm` (`weight_g` beside `weight_v`).
    """
    return any(_is_companion(site) for site in target.sites)


def _reason(target: Target, with_experts: set[str]) -> str | None:
    modules = [site.module for site in target.sites]
    words = set(_words(target))
    is_vector = sum(size > 1 for size in target.shape) < 2
    if words & {"query", "queries"} and any(_has_key(module) for module in modules):
        words -= {"query", "queries"}  # it projects, as its neighbours do
    if target.is_buffer:
        return "buffer"
    if any(isinstance(module, _LOOKED_UP) for module in modules):
        return "embedding"
    if len(target.shape) > 1 and _is_router(target, with_experts):
        return "router"
    if any(isinstance(module, _MULTIPLY) for module in modules):
        return "bias" if "bias" in words or len(target.shape) < 2 else None
    if is_companion(target):
        return "bias" if "bias" in words else "scale"
    classes = " ".join(base.__name__ for module in modules for base in type(module).__mro__)
    if re.search(r"Embedding\b", classes) and not any(_has_bias(module) for module in modules):
        return "embedding"
    if re.search(r"(Norm|GRN)(\dd)?\b", classes):
        return "norm"
    if target.sites[0].attr in _STATE_SPACE:
        return "state space"
    if len(target.shape) < 2:
        return _kind(words) or "one dimension"
    return _kind(words) or ("gain" if is_vector else None)


def _has_key(module: nn.Module) -> bool:
    return any("key" in name.lower() for name in reading.tensor_names(module)[0])


def _has_bias(module: nn.Module) -> bool:
    return "bias" in reading.tensor_names(module)[0]


def _scales(small: torch.Size, shape: torch.Size) -> bool:
    """Whether a tensor of shape `small` has one number per row, column or block of `shape`."""
    if len(small) != len(shape):
        return len(small) < len(shape)
    others_are_1 = sum(size > 1 for size in small) == 1
    return all(
        size == 1 or (size < full and full % size == 0) or (size == full and others_are_1)
        for size, full in zip(small, shape, strict=True)
    )


def _kind(words: set[str]) -> str | None:
    return next((kind for word, kind in _KINDS.items() if word in words), None)


def _words(target: Target) -> Iterator[str]:
    """Yield the words in the own names of a tensor; in a list, those in the names around it."""
    for name in target.names:
        path, _, own = name.rpartition(".")
        if own.isdecimal():
            own = "_".join(path.split(".")[-2:])
        if own.startswith("weight") or own.endswith("weight"):
            continue  # whatever else the name says
        yield from re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", own).lower())


def _is_router(target: Target, with_experts: set[str]) -> bool:
    if any(re.search(r"Router|TopKGate|MoEGate", type(s.module).__name__) for s in target.sites):
        return True
    for name in target.names:
        parent, _, module = name.rpartition(".")[0].rpartition(".")
        if "router" in module or (module in _ROUTERS and f"{parent}.".lstrip(".") in with_experts):
            return True
    return False


def _is_companion(site: Site) -> bool:
    if isinstance(site.module, _RECURRENT):  # weight_ih_l0 and weight_ih_l0_reverse
        return False
    own, gain_of = site.stored().shape, re.sub("_g$", "_v", site.attr)
    for name in reading.tensor_names(site.module)[0]:
        extends = site.attr.startswith(f"{name}_") or (name == gain_of and name != site.attr)
        if extends:
            shape = reading.stored(site.module, name).shape
            if own.numel() < shape.numel() and _scales(own, shape):
                return True
    return False
