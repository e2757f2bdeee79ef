"""Whether the values of masked tensors can be written back to where they are stored."""

from torch import Tensor, nn

from parasparse.targets.tensors import Target, masked_tensors_of
from parasparse.text import listed


def check_foldable(model: nn.Module, chosen: list[Target]) -> None:
    """Raise RuntimeError if the values of a target cannot be written back to where they are."""
    holders: dict[int, list[Target]] = {}  # of each stored tensor
    for target in masked_tensors_of(model):
        for original in _originals(target):
            holders.setdefault(id(original), []).append(target)
    for target in chosen:
        for original in _originals(target):
            names = {holder.name for holder in holders[id(original)]}
            if len(names) > 1:
                raise RuntimeError(
                    "a tied tensor must have one mask at all its places to be squashed; "
                    f"{listed(sorted(names))} are one Parameter and read differently. Call "
                    "`sparsify` on the whole model to give them one mask, or `unsparsify`."
                )
        check_writable(target, "squash")


def check_writable(target: Target, verb: str) -> None:
    """Raise RuntimeError if `verb` cannot write to what `target` stores."""
    for original in _originals(target):
        if not is_writable(original):
            raise RuntimeError(
                f'`{verb}` must be able to write to "{target.name}", which was made in '
                "inference mode or by `expand`. Give its module a Parameter of its own first."
            )


def is_writable(tensor: Tensor) -> bool:
    """Whether `tensor` takes values in place."""
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return not tensor.is_inference() and not any(s == 0 and n > 1 for s, n in strides)


def _originals(target: Target) -> list[Tensor]:
    """Return the tensors that hold the values of `target`, each once."""
    found = [t for site in target.sites for t in site.originals()]
    return list({id(t): t for t in found}.values())
