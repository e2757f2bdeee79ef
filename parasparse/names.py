"""The names of tensors and masks in models and checkpoints. Strings only.

    tensor            layer.weight   layer.weight_orig   layer.parametrizations.weight.original
    mask              layer.weight_mask   layer.weight.mask   layer.parametrizations.weight.0.mask
    mask of "weight"  also layer.mask
    pair w            w_re and w_im, w_real and w_imag, or w.real and w.imag, with one mask under
                      the name of the pair, or one for each component

torch.nn.utils.prune writes `_orig` and `_mask`, torch's parametrizations and parasparse write
`parametrizations`, and cplxmodule writes `layer.mask` and pairs of `.real` and `.imag`.

torch.compile, FSDP, activation checkpointing and DDP put a prefix before the names of the module
that they wrap. A plain name has none of these.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# The endings of the real and the imaginary name of a pair.
PAIR_ENDINGS = (("_re", "_im"), ("_real", "_imag"), (".real", ".imag"))
# The submodule in which torch.compile, FSDP and activation checkpointing keep what they wrap. DDP
# calls it "module", as any module may call a submodule.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INSIDE = re.compile(r"((?:.+\.)?)parametrizations\.([^.]+)\.(.+)")


def ancestors(name: str) -> list[str]:
    """Return `name` and the names of the modules around it: a.b.c -> [a.b.c, a.b, a]."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def plain(key: str, depth: int = 0) -> str:
    """Return `key` without the prefixes of wrappers, `depth` of which are "module"."""
    parts = [part for part in key.split(".") if part not in WRAPPED]
    return ".".join(parts[depth:])


def depth_of(keys: Iterable[str]) -> int:
    """Return the number of "module" with which all `keys` start, as those of DDP do."""
    starts = [re.match(r"(module\.)*", plain(key)) for key in keys]
    return min((start[0].count(".") for start in starts if start), default=0)


def spelled_like(keys: Collection[str], like: Collection[str]) -> dict[str, str]:
    """Return for each of `keys` how a model with the keys `like` spells it: with its wrappers.

    If no name matches, "module" is removed or added where all keys start with it.
    """
    spelling: dict[str, str] = {}
    for key in like:
        for path in ancestors(key):
            spelling.setdefault(plain(path), path)
    known = {dense_name(plain(key)) for key in like}
    named = {key: plain(key) for key in keys}
    if not any(dense_name(name) in known for name in named.values()):
        more = depth_of(like) - depth_of(keys)
        named = {key: "module." * more + plain(key, max(0, -more)) for key in keys}
    found = {}
    for key, name in named.items():
        place = next((path for path in (*ancestors(name), "") if path in spelling), None)
        if place is not None:
            name = join(spelling[place], name.removeprefix(place).removeprefix("."))
        found[key] = name
    return found if len(set(found.values())) == len(found) else {key: key for key in keys}


def join(prefix: str, name: str) -> str:
    """Return `name` in the module `prefix`, which may be ""."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def flat(masks: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested masks by one name each: {"a": {"weight": x}} -> {"a.weight": x}.

    NNI writes such masks, with None for a bias that has none, which is left out.

    Raises:
        ValueError: a name comes twice.
    """
    found: dict[str, Any] = {}
    for name, held in masks.items():
        inner = {name: held}
        if isinstance(held, Mapping):
            own = {k: v for k, v in held.items() if k != "bias" or v is not None}
            inner = {join(name, key): value for key, value in flat(own).items()}
        twice = [key for key in inner if key in found]
        if twice:
            raise ValueError(f'each mask must have one name; "{twice[0]}" comes twice.')
        found |= inner
    return found


def inside(name: str) -> str:
    """Return the prefix of the keys of a parametrized tensor: a.w -> "a.parametrizations.w."."""
    layer, dot, attr = name.rpartition(".")
    return f"{layer}{dot}parametrizations.{attr}."


def parametrized(key: str) -> tuple[str, str] | None:
    """Return the tensor and the rest of `key`, or None: a.parametrizations.w.x -> (a.w, x)."""
    match = _INSIDE.fullmatch(key)
    return None if match is None else (match[1] + match[2], match[3])


def is_own_mask(key: str) -> bool:
    """Whether `key` is a mask of parasparse: layer.parametrizations.weight.0.mask."""
    found = parametrized(key)
    return found is not None and re.fullmatch(r"\d+\.mask", found[1]) is not None


def mask_keys(name: str) -> list[str]:
    """Return the keys of other libraries for the mask of the tensor or pair `name`."""
    layer, dot, attr = name.rpartition(".")
    keys = [f"{name}_mask", f"{name}.mask"]
    return [*keys, f"{layer}{dot}mask"] if attr == "weight" else keys


def masked_names(key: str) -> list[str]:
    """Return the tensors whose mask `key` may be in a dict of masks, the most likely first.

    `key` may be any name above, the name of the tensor, or a layer, for the mask of its weight.
    """
    found = parametrized(key)
    if found is not None and is_own_mask(key):
        return [found[0]]
    if not is_mask_key(key):
        return [key, f"{key}.weight".removeprefix(".")]
    stems = [key.removesuffix(end) for end in ("_mask", ".mask") if key.endswith(end)]
    layers = [*stems, key, *([""] if key == "mask" else [])]
    return [*stems, *(f"{layer}.weight".removeprefix(".") for layer in layers), key]


def masked_beside(key: str) -> list[str]:
    """Return the tensors that the mask `key` of a state dict may belong to; none if it is no mask.

    These are fewer than `masked_names`: a buffer of a module may happen to be called `x_mask`.
    """
    found = parametrized(key)
    if found is not None:
        return [found[0]] if is_own_mask(key) else []
    if key.endswith("_mask"):
        return [key.removesuffix("_mask")]
    layer, dot, own = key.rpartition(".")
    return [*([layer] if layer else []), f"{layer}{dot}weight"] if own == "mask" else []


def is_mask_key(key: str) -> bool:
    """Whether `key` may be a mask. Only the other keys tell whether it is."""
    return key == "mask" or key.endswith(("_mask", ".mask"))


def components(name: str) -> list[tuple[str, str]]:
    """Return the possible names of the real and the imaginary tensor of the pair `name`."""
    return [(name + real, name + imag) for real, imag in PAIR_ENDINGS]


def joints(name: str) -> list[tuple[str, str]]:
    """Return the pairs of which `name` may be a component: joint name and other component."""
    return [
        (stem, stem + other)
        for endings in PAIR_ENDINGS
        for own, other in (endings, endings[::-1])
        if name.endswith(own) and (stem := name.removesuffix(own)) and not stem.endswith(".")
    ]


def stored_keys(name: str, keys: Collection[str]) -> tuple[str, ...]:
    """Return the key in `keys` of tensor `name`, or the two keys of a pair, or ()."""
    for members in ((name,), *components(name)):
        originals = tuple(f"{inside(member)}original" for member in members)
        for spelling in (originals, tuple(f"{member}_orig" for member in members), members):
            if all(key in keys for key in spelling):
                return spelling
    return ()


def dense_name(key: str) -> str:
    """Return the dense name of the tensor under `key`."""
    found = parametrized(key)
    return key.removesuffix("_orig") if found is None else found[0]
