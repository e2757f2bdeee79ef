"""What tensors and their masks are called, in models and in checkpoints. Strings only.

    a tensor            layer.weight   layer.weight_orig   layer.parametrizations.weight.original
    its mask            layer.weight_mask   layer.weight.mask   layer.parametrizations.weight.0.mask
    that of a "weight"  layer.mask as well
    a pair              w: w_re and w_im, or w_real and w_imag, or w.real and w.imag, under one mask
                        by the name of the pair, or under one each

The second spelling is that of torch.nn.utils.prune, the third that of torch's parametrizations and
ours, `layer.mask` and pairs of `.real` and `.imag` those of cplxmodule.
"""

import re
from collections.abc import Collection

# How the names of the real and of the imaginary tensor of a pair end.
PAIR_ENDINGS = (("_re", "_im"), ("_real", "_imag"), (".real", ".imag"))
_INSIDE = re.compile(r"((?:.+\.)?)parametrizations\.([^.]+)\.(.+)")


def ancestors(name: str) -> list[str]:
    """Return `name` and the names of the modules around it: a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def inside(name: str) -> str:
    """Return how the keys of what parametrizes `name` begin: a.w -> a.parametrizations.w. ."""
    layer, dot, attr = name.rpartition(".")
    return f"{layer}{dot}parametrizations.{attr}."


def parametrized(key: str) -> tuple[str, str] | None:
    """Return the tensor and the rest of the key, or None: a.parametrizations.w.x -> a.w, x."""
    match = _INSIDE.fullmatch(key)
    return None if match is None else (match[1] + match[2], match[3])


def is_own_mask(key: str) -> bool:
    """Whether `key` is that of a mask of ours: layer.parametrizations.weight.0.mask."""
    found = parametrized(key)
    return found is not None and re.fullmatch(r"\d+\.mask", found[1]) is not None


def mask_keys(name: str) -> list[str]:
    """Return what other libraries call the mask of tensor `name`, or of a pair of this name."""
    layer, dot, attr = name.rpartition(".")
    keys = [f"{name}_mask", f"{name}.mask"]
    return [*keys, f"{layer}{dot}mask"] if attr == "weight" else keys


def masked_names(key: str) -> list[str]:
    """Return the tensors whose mask a dict of masks may call `key`, the likeliest first.

    That is by any name above, or by their own; a layer alone names the mask of its weight.
    """
    found = parametrized(key)
    if found is not None and is_own_mask(key):
        return [found[0]]
    if not is_mask_key(key):
        return [key, f"{key}.weight".removeprefix(".")]
    stems = [key.removesuffix(end) for end in ("_mask", ".mask") if key.endswith(end)]
    layers = [*stems, key, *([""] if key == "mask" else [])]
    return [*stems, *(f"{layer}.weight".removeprefix(".") for layer in layers), key]


def is_mask_key(key: str) -> bool:
    """Whether `key` may be that of a mask; whether it is one, only what lies beside it tells."""
    return key == "mask" or key.endswith(("_mask", ".mask"))


def components(name: str) -> list[tuple[str, str]]:
    """Return what the real and the imaginary tensor of a pair called `name` may be called."""
    return [(name + real, name + imag) for real, imag in PAIR_ENDINGS]


def joints(name: str) -> list[tuple[str, str]]:
    """Return the pairs that `name` may be a component of: their names, and the other component."""
    return [
        (stem, stem + other)
        for endings in PAIR_ENDINGS
        for own, other in (endings, endings[::-1])
        if name.endswith(own) and (stem := name.removesuffix(own)) and not stem.endswith(".")
    ]


def stored_keys(name: str, keys: Collection[str]) -> tuple[str, ...]:
    """Return the key in `keys` of tensor `name`, or the two of a pair, or nothing."""
    for members in ((name,), *components(name)):
        for spelling in (
            tuple(f"{inside(member)}original" for member in members),
            tuple(f"{member}_orig" for member in members),
            members,
        ):
            if all(key in keys for key in spelling):
                return spelling
    return ()


def dense_name(key: str) -> str:
    """Return what the tensor under `key` is called when it is dense."""
    found = parametrized(key)
    return key.removesuffix("_orig") if found is None else found[0]
