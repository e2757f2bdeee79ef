"""`save` and `load_packed`: dense state dicts in files without zeros."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from parasparse.checkpoints.dense import dense_state_dict
from parasparse.files.bitmask_files import bitmask_checkpoint
from parasparse.files.headers import FilePath, damage_named
from parasparse.files.packed_files import check_storable, entries_of, opened, write
from parasparse.files.packing import plain_state
from parasparse.files.ties import first_names


def save(source: nn.Module | Mapping[str, Any], path: FilePath) -> None:
    """Write the dense state of `source` without its zeros; `load_packed` returns it bit for bit.

    The file is written next to `path` and renamed at the end, so an error leaves the old file as it
    was. Every tensor has a checksum. The dense weights of a masked model are all in memory at once,
    and so are the packed tensors of a torch file; a safetensors file is written tensor by tensor,
    small ones several at a time.

    Args:
        source: a model, whose `dense_state_dict` is written, or a state dict of tensors and plain
            JSON.
        path: a safetensors file if it ends in .safetensors, else a torch file.

    Raises:
        ValueError: a tensor is sparse, nested, quantized, distributed or on the meta device, or
            `path` exists and is not a regular file.
        TypeError: a name is not a string, or a value is neither a tensor nor plain JSON.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"weight": torch.eye(64)}, f"{folder}/eye.pt")
        ...     load_packed(f"{folder}/eye.pt")["weight"].equal(torch.eye(64))
        True
    """
    given = dense_state_dict(source) if isinstance(source, nn.Module) else source
    state = {str(name): value for name, value in plain_state(given).items()}
    check_storable(state, given)
    header = {
        "entries": entries_of(state, first_names(state)),
        "modules": getattr(given, "_metadata", None),
    }
    write(path, state.__getitem__, header)


def load_packed(path: FilePath) -> dict[str, Any]:
    """Return the dense state dict that `save` wrote, on the CPU, without running code in the file.

    It loads into dense and masked models: `model.load_state_dict(load_packed(path))`. Tied tensors
    stay tied. `path` may also be a checkpoint of compressed-tensors in its formats `sparse-bitmask`
    and `sparse-24-bitmask`: a .safetensors file, or a folder of them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a packed file, is damaged, or was written by a newer version; or
            compressed-tensors has quantized its values.
        ImportError: `path` ends in .safetensors, and safetensors is not installed.
        NotImplementedError: a tensor has a dtype that this torch does not have.

    Examples:
        >>> load_packed("nowhere.pt")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt'
    """
    bitmasks = bitmask_checkpoint(path)
    if bitmasks is not None:
        return OrderedDict((name, tensor.clone()) for name, tensor in bitmasks.tensors())
    header, read = opened(path)
    state: OrderedDict[str, Any] = OrderedDict()
    for name, entry in header["entries"].items():
        with damage_named(path, f'has no intact "{name}"'):
            if "same" in entry:
                state[name] = state[entry["same"]]
            else:
                state[name] = entry["value"] if "value" in entry else read(name)
    if header["modules"] is not None:
        state._metadata = OrderedDict(header["modules"])  # type: ignore[attr-defined]
    return state
