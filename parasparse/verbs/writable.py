"""Whether masked values can be written to the stored tensors."""

from torch import Tensor, nn

from parasparse.targets.tensors import Target, masked_tensors_of
from parasparse.text import listed


def check_foldable(model: nn.Module, chosen: list[Target]) -> None:
    """Raise RuntimeError if the masked values of a target cannot be written to its tensors."""
    holders: dict[int, list[Target]] = {}  # by id of the stored tensor
    for target in masked_tensors_of(model):
        for original in _originals(target):
            holders.setdefault(id(original), []).append(target)
    for target in chosen:
        for original in _originals(target):
            names = {holder.name for holder in holders[id(original)]}
            if len(names) > 1:
                raise RuntimeError(
                    f"{listed(sorted(names))} are one Parameter but masked differently, so they "
                    "cannot be squashed. Call `sparsify` on the whole model to give them one mask, "
                    "or `unsparsify`."
                )
        check_writable(target, "squash")


def check_writable(target: Target, verb: str) -> None:
    """Raise RuntimeError if a stored tensor of `target` is not writable."""
    for original in _originals(target):
        if not is_writable(original):
            raise RuntimeError(
                f'`{verb}` cannot write to "{target.name}", which was made in inference mode or by '
                "`expand`. Replace it by a new Parameter first."
            )


def is_writable(tensor: Tensor) -> bool:
    """Whether `tensor` can be changed in place."""
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return not tensor.is_inference() and not any(s == 0 and n > 1 for s, n in strides)


def _originals(target: Target) -> list[Tensor]:
    """Return the stored tensors of `target`, each once."""
    found = [t for site in target.sites for t in site.originals()]
    return list({id(t): t for t in found}.values())
