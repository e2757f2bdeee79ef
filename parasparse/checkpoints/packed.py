"""`save` and `load_packed`: dense state dicts on disk without their zeros."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from parasparse.checkpoints.dense import dense_state_dict
from parasparse.files.headers import FilePath, damage_named
from parasparse.files.packed_files import check_storable, entries_of, opened, write
from parasparse.files.packing import first_names, plain_state


def save(source: nn.Module | Mapping[str, Any], path: FilePath) -> None:
    """Write the dense state of `source` without its zeros; `load_packed` returns it bit for bit.

    The file is written beside `path` and renamed when it is whole and on disk: whatever happens on
    the way, the old file stays. Every tensor has a checksum. A safetensors file is written tensor
    by tensor; for a torch file, all packed tensors are in memory at once; a masked model's dense
    weights are made before any is written.

    Args:
        source: a model, of which `dense_state_dict` is written, or a state dict. What is no tensor
            in it must be plain JSON.
        path: a safetensors file if it ends in .safetensors, else a torch file.

    Raises:
        ValueError: a tensor is sparse, nested, quantized, distributed or on the meta device; `path`
            is there and is no file.
        TypeError: a name is no string, or what is under it neither a tensor nor plain JSON.

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
    """Return the dense state dict that `save` wrote, on the CPU; no code from the file is run.

    It loads into dense and into masked models: `model.load_state_dict(load_packed(path))`. Tensors
    that were tied are tied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no packed file, is damaged, or was written by a newer version.
        ImportError: it ends in .safetensors, and safetensors is not installed.
        NotImplementedError: it holds a dtype that this torch does not have.

    Examples:
        >>> load_packed("nowhere.pt")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt'
    """
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
