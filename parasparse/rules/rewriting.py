"""Whether a treatment can give a tensor new stored weights."""

from torch import Tensor

from parasparse.attach.stack import stack_of
from parasparse.sharding.dtensors import is_dtensor
from parasparse.targets.tensors import Target


def check_can_be_written(target: Target, weights: Tensor) -> None:
    """Raise ValueError or RuntimeError if the stored values of `target` cannot become `weights`."""
    stored = target.stored()
    if target.is_pair or (weights.shape, weights.dtype) != (stored.shape, stored.dtype):
        raise ValueError(
            f'new weights of "{target.name}" must be {stored.dtype} {tuple(stored.shape)}; got '
            f"{weights.dtype} {tuple(weights.shape)}."
        )
    if is_dtensor(stored) or any(is_dtensor(original) for original in target.originals()):
        raise RuntimeError(
            f'"{target.name}" is sharded, so its weights cannot be replaced. Prune before '
            "`fully_shard` or `parallelize_module`."
        )
    for site in target.sites:
        stack = stack_of(site.module, site.attr)
        if stack is not None and len(stack) > (site.mask_module() is not None):
            raise ValueError(
                f'"{target.name}" is computed by another parametrization than a mask, so its '
                "weights cannot be replaced. Call `squash` or "
                "torch.nn.utils.parametrize.remove_parametrizations first."
            )
