"""Whether the stored tensors of a target can be changed in place."""

from torch import Tensor

from parasparse.attach.offloading import check_not_offloaded
from parasparse.targets.tensors import Target


def check_writable(target: Target, verb: str) -> None:
    """Raise RuntimeError if a stored tensor of `target` is not writable."""
    for site in target.sites:
        check_not_offloaded(site.module, site.attr, target.name)
    for original in target.originals():
        if not is_writable(original):
            raise RuntimeError(
                f'`{verb}` cannot write to "{target.name}", which was made in inference mode or by '
                "`expand`. Replace it by a new Parameter first."
            )


def is_writable(tensor: Tensor) -> bool:
    """Whether `tensor` can be changed in place."""
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return not tensor.is_inference() and not any(s == 0 and n > 1 for s, n in strides)
