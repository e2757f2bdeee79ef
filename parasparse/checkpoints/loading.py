"""`load_state_dict`: load checkpoints of dense and masked models, of several libraries."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parasparse import names
from parasparse.checkpoints.found_masks import attach_found, mask_compact_entries
from parasparse.files.headers import FORMAT
from parasparse.sharding.dtensors import is_dtensor
from parasparse.sharding.fsdp import is_sharded
from parasparse.verbs.squash import unsparsify


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True, assign: bool = False
) -> Any:
    """Attach the masks of `state_dict` and load it; return the missing and unexpected keys.

    Reads dense, masked and compact checkpoints, also of torch.nn.utils.prune (`weight_orig`,
    `weight_mask`) and cplxmodule (`weight`, or `weight.real` and `weight.imag`, with `mask`; None
    unsets). The prefixes of torch.compile, FSDP and activation checkpointing do not matter, and
    neither does DDP's `module.` if all keys, of the checkpoint or of the model, start with it.

    Args:
        model: dense or with masks; changed in place. Weights that are compact stay so.
        state_dict: not changed.
        strict: see `torch.nn.Module.load_state_dict`.
        assign: see `torch.nn.Module.load_state_dict`.

    Raises:
        TypeError: `state_dict` is not a mapping.
        ValueError: `state_dict` is the content of a packed file.
        RuntimeError: keys or shapes do not match, or only the model is sharded. Masks attached for
            the load are removed again. As in torch, values copied before the error remain.

    Examples:
        >>> checkpoint = sparsify(nn.Linear(2, 2), 0.5).state_dict()
        >>> model = nn.Linear(2, 2)
        >>> load_state_dict(model, checkpoint), int((model.weight != 0).sum())
        (<All keys matched successfully>, 2)
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a state dict; got {type(state_dict).__name__}. Load a file with "
            "torch.load(path) or load_packed(path)."
        )
    if state_dict.get("format") == FORMAT:
        raise ValueError("`state_dict` is a packed file. Load it with load_packed(path).")
    state = dict(state_dict)
    values = [value for value in state.values() if isinstance(value, Tensor)]
    if is_sharded(model) and not any(is_dtensor(value) for value in values):
        raise RuntimeError(
            "the model is sharded, and `state_dict` is not. Use "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict with "
            "StateDictOptions(full_state_dict=True), after `sparsify`."
        )
    spelled = names.spelled_like(state, model.state_dict())
    state = {spelled[key]: value for key, value in state.items()}
    mask_compact_entries(model, state)
    attached = attach_found(model, state)
    try:
        return model.load_state_dict(state, strict=strict, assign=assign)
    except BaseException:
        if attached:
            unsparsify(model, attached)
        raise
