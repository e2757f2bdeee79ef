"""Finds the masks of a model, also those that torch has put into lists of its own."""

from torch import nn

from parasparse.attach.attaching import keep_order, reclass
from parasparse.attach.reading import masked_stacks, stacks_of
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask


def all_masked_stacks(model: nn.Module) -> list[MaskedParametrizationList]:
    """Return the stacks of all masked tensors of `model`, tied ones once for each use."""
    found = []
    for module in model.modules():
        take_over(module)
        found += [stack for _, stack in masked_stacks(module)]
    return found


def take_over(module: nn.Module) -> None:
    """Take over masks of `module` that torch has put into lists of its own.

    `prepare_qat` does so with the masks of a layer that it replaces, and so does
    `register_parametrization` with a mask that a user registers.

    Raises:
        ValueError: a mask is not the last parametrization of its tensor.
    """
    if "parametrizations" not in module._modules:
        return
    found = []
    for name, stack in stacks_of(module).items():
        if isinstance(stack, MaskedParametrizationList):
            continue
        masks = [isinstance(each, Mask | SoftMask) for each in stack.children()]
        if any(masks) and not masks[-1]:
            after = [type(each).__name__ for each in stack.children()][masks.index(True) + 1 :]
            raise ValueError(
                f'the mask of "{name}" must be its last parametrization; got {", ".join(after)} '
                "after it. Remove all of them with torch.nn.utils.parametrize."
                "remove_parametrizations, register the others again, and then call `sparsify`."
            )
        if any(masks):
            found.append(stack)
    if found:
        keep_order(module)
        for stack in found:
            stack.__class__ = MaskedParametrizationList
        reclass(module)
