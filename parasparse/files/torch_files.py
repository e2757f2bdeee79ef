"""Checkpoints in torch files, read without holding them in memory."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.files.checkpoint import Checkpoint, CheckpointError, info_of
from parasparse.files.nested import check_dense, identity, tensors_in

_STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")


class TorchFile(Checkpoint):
    """A file of torch.save that holds a state dict, alone or under one of its usual keys.

    Attributes:
        content: all that the file holds; its tensors are mapped.
        key: where the state dict is in it; None: it is the content itself.

    Args:
        path: as the user wrote it.
        content: `content_of(path)`.
    """

    def __init__(self, path: str, content: Any) -> None:
        super().__init__(path)
        self.content = content
        self.key = _state_key(self.content, path)
        self.modules = getattr(self.state(), "_metadata", None)
        first: dict[tuple[Any, ...], str] = {}
        for name, value in self.state().items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                self.not_tensors[name] = value
                continue
            check_dense(value, f'"{name}" of "{path}"')
            self.infos[name] = info_of(value)
            known = first.setdefault(identity(value), name)
            if known != name:
                self.ties[name] = known
        if self.key is not None:
            self.beside_state_dict = [str(key) for key in self.content if key != self.key]

    def state(self) -> Mapping[str, Any]:
        """Return the state dict, its tensors mapped."""
        state: Mapping[str, Any] = self.content if self.key is None else self.content[self.key]
        return state

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self.state()[name]
        return tensor.detach()

    def rest(self, content: Any = None) -> Any:
        """Return what is not among `infos`: around the state dict, and in it.

        Args:
            content: of a file that is laid out as this one; None: this one.
        """
        content = self.content if content is None else content
        state = content if self.key is None else content[self.key]
        around = {} if self.key is None else {k: v for k, v in content.items() if k != self.key}
        return around, {key: state[key] for key in self.not_tensors}

    def tensor_of_rest(self, number: int) -> Tensor:
        """Return one of the tensors in `rest()`."""
        self._about_to_read(tensors_in(self.rest())[number].nbytes)
        return tensors_in(self.rest())[number].detach()

    def _reopen(self) -> None:
        self.content = content_of(self.path)


def content_of(path: str) -> Any:
    """Return what the file at `path` holds, its tensors mapped; no code in it is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():  # of what is refused later
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read: {error.strerror}.') from error
    except Exception as error:  # over damaged bytes torch raises all kinds
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise CheckpointError(
                f'"{path}" holds more than tensors and plain values; code in it was not run. Save '
                "its `state_dict()` alone."
            ) from error
        raise CheckpointError(
            f'"{path}" is no whole checkpoint of torch.save: it was cut off, or is another kind '
            "of file."
        ) from error


def _state_key(content: Any, path: str) -> str | None:
    if isinstance(content, Mapping):
        if any(isinstance(v, Tensor) and "." in str(name) for name, v in content.items()):
            return None
        for key in _STATE_KEYS:  # first: there may be a tensor beside it, such as the best accuracy
            held = content.get(key)
            if isinstance(held, Mapping) and any(isinstance(v, Tensor) for v in held.values()):
                return key
        if any(isinstance(value, Tensor) for value in content.values()):
            return None
    raise CheckpointError(
        f'"{path}" must hold a state dict, alone or as one of {", ".join(_STATE_KEYS)}; it holds '
        f"{type(content).__name__}. Save the state dict alone."
    )
