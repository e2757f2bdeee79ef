"""`load_state_dict`: checkpoints of dense and masked models, ours and of other libraries."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parasparse.checkpoints.found_masks import attach_found
from parasparse.files.headers import FORMAT
from parasparse.sharding.dtensors import is_dtensor
from parasparse.sharding.fsdp import is_sharded
from parasparse.verbs.squash import unsparsify


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True, assign: bool = False
) -> Any:
    """Attach what `state_dict` has masks for, then load it; return the missing and unexpected keys.

    Reads dense checkpoints, ours, those of torch.nn.utils.prune (`weight_orig`, `weight_mask`) and
    of cplxmodule (`weight`, or `weight.real` and `weight.imag`, with `mask`; None unsets).

    Args:
        model: dense or with masks; changed in place.
        state_dict: not changed.
        strict: as for `torch.nn.Module.load_state_dict`.
        assign: likewise.

    Raises:
        TypeError, ValueError: it is no state dict; it is what a packed file holds.
        RuntimeError: keys or shapes do not match. Masks attached for the load are taken off again;
            values that torch had copied by then stay, as they do in its own `load_state_dict`.

    Examples:
        >>> from parasparse import sparsify
        >>> checkpoint = sparsify(nn.Linear(2, 2), 0.5).state_dict()
        >>> model = nn.Linear(2, 2)
        >>> load_state_dict(model, checkpoint), int((model.weight != 0).sum())
        (<All keys matched successfully>, 2)
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a state dict; got {type(state_dict).__name__}. Of a file: "
            "torch.load(path), or load_packed(path)."
        )
    if state_dict.get("format") == FORMAT:
        raise ValueError("`state_dict` must be a state dict; this is a packed file: load_packed.")
    state = dict(state_dict)
    values = [value for value in state.values() if isinstance(value, Tensor)]
    if is_sharded(model) and not any(is_dtensor(value) for value in values):
        raise RuntimeError(
            "`state_dict` must be sharded as the model is; this one is whole. Use "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict with "
            "StateDictOptions(full_state_dict=True), after `sparsify`."
        )
    attached = attach_found(model, state)
    try:
        return model.load_state_dict(state, strict=strict, assign=assign)
    except BaseException:
        if attached:
            unsparsify(model, attached)
        raise
