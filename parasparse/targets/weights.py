"""Which tensors a sparsity alone reaches: those that multiply activations.

These are the parameters with two or more dimensions, except those that a model looks up, adds or
scales with: embeddings and other tables, norms, biases, gains, scales, routers, positions and
learned tokens. The class of torch's own layers says what a tensor is. In other modules, the last
word of its name does if that is a word for a matrix. Otherwise, its shape, the class of the module,
the bias beside it and all words in its name do.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn

from parasparse.attach import reading
from parasparse.names import ancestors
from parasparse.targets.tensors import Site, Target

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_MULTIPLY = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd, *_RECURRENT)
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
# Words in the name of a tensor, and the kind of tensor they stand for.
_KINDS = {
    word: kind
    for kind, words in {
        "bias": "bias biases",
        "scale": "scale scales scaler gain gamma beta alpha log",
        "norm": "norm mean std",
        "position": "pos position positions positional ape",
        "embedding": "emb embed embedding embeddings table codebook codebooks",
        "learned token": "token tokens query queries latent latents prompt prompts pad",
    }.items()
    for word in words.split()
}
# "scale_proj" is a projection, "proj_scale" a scale.
_MATRICES = {
    "proj", "projection", "kernel", "matrix", "linear", "dense", "fc", "conv", "mixing", "mixer",
    "down", "up",
}  # fmt: skip
# What the name of a scale adds to that of its weight: "weight_scale_inv", "weight_g".
_SCALES = {
    "scale", "scales", "inv", "zero", "zeros", "point", "points", "zp", "absmax", "amax", "gain",
    "g", "s", "magnitude", "bias",
}  # fmt: skip
# In a state space model, the decay rates and a gain; a module with A and B alone is low-rank.
_STATE_SPACE = {"A": {"C", "D"}, "D": {"A", "A_log"}}
# Modules, or parameters, beside "experts": "gate", "gates.0.wg", "shared_expert_gate", "w_gate".
_ROUTER = re.compile(r"(w_|expert_|shared_expert_)?(gate|gates|gating|wg)(_network)?")


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
    if not _is_matrix(target):
        if re.search(r"Embedding(Bag|Table)?s?\b", classes):
            return "embedding"
        if any(hasattr(module, "num_embeddings") for module in modules):
            return "embedding"
        if re.search(r"(Norm|GRN)(\dd)?\b", classes):
            return "norm"
    if _is_of_state_space(target.sites[0]):
        return "state space"
    if len(target.shape) < 2:
        return _kind(words) or "one dimension"
    # A matrix of means or deviations belongs to a random weight.
    return _kind(words - {"mean", "std"}) or ("gain" if is_vector else None)


def _is_matrix(target: Target) -> bool:
    """Whether its name or the bias beside it says that it is a matrix, whatever its class says."""
    if len(target.shape) < 2:
        return False
    own = [re.findall("[a-z]+", _spaced(name.rpartition(".")[2])) for name in target.names]
    named = any(words and words[-1] in _MATRICES for words in own)
    return named or any(_has_bias_of_outputs(site) for site in target.sites)


def _has_bias_of_outputs(site: Site) -> bool:
    """Whether a bias beside a matrix has one number for each of its rows or columns.

    The bias of a norm has the shape of its gain. The gain of a complex norm has two dimensions
    more, 2 x 2 for real and imaginary part, and its bias may be complex.
    """
    if "bias" not in reading.tensor_names(site.module)[0]:
        return False
    bias, shape = reading.stored(site.module, "bias"), site.shape()
    if bias.ndim != 1 or bias.dtype != site.originals()[0].dtype or shape[-2:] == (2, 2):
        return False
    return bias.shape[0] in (*shape[:2], shape[-1])


def _is_of_state_space(site: Site) -> bool:
    beside = reading.tensor_names(site.module)[0]
    return not _STATE_SPACE.get(site.attr, set()).isdisjoint(beside)


def _has_key(module: nn.Module) -> bool:
    return any("key" in name.lower() for name in reading.tensor_names(module)[0])


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
        words = re.findall("[a-z]+", _spaced(own))
        is_weight = own.startswith("weight") or own.lower().endswith("weight")
        if is_weight or (words and words[-1] in _MATRICES):
            continue  # whatever else the name says
        yield from words


def _spaced(name: str) -> str:
    """Return a name in lower case, with _ between the words of camel case."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _is_router(target: Target, with_experts: set[str]) -> bool:
    if any(re.search(r"Router|TopKGate|MoEGate", type(s.module).__name__) for s in target.sites):
        return True
    for name in target.names:
        for place in ancestors(name):
            parent, dot, own = place.rpartition(".")
            if ("router" in own and place != name) or (
                _ROUTER.fullmatch(own) and f"{parent}{dot}" in with_experts
            ):
                return True
    return False


def _is_companion(site: Site) -> bool:
    if isinstance(site.module, _RECURRENT):  # weight_ih_l0 and weight_ih_l0_reverse
        return False
    own, gain_of = site.shape(), re.sub("_g$", "_v", site.attr)
    for name in reading.tensor_names(site.module)[0]:
        extends = site.attr.startswith(f"{name}_") or (name == gain_of and name != site.attr)
        if extends:
            shape = reading.shape(site.module, name)
            added = set(re.findall("[a-z]+", site.attr.removeprefix(name)))
            is_scale = bool(added & _SCALES) or sum(size > 1 for size in own) < 2
            if is_scale and own.numel() < shape.numel() and _scales(own, shape):
                return True
    return False
