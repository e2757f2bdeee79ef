"""Checkpoints in torch files, read without holding them in memory."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.nested import check_dense, tensors_in
from parasparse.files.ties import first_names

_STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")


class TorchFile(Checkpoint):
    """A file of torch.save that holds a state dict, alone or under one of its usual keys."""

    def __init__(self, path: str, content: Any) -> None:
        super().__init__(path)
        self.content = content  # see `content_of`
        self.key = _state_key(self.content, path)  # None: the content is the state dict
        state = self._state()
        self.modules = getattr(state, "_metadata", None)
        for name, value in state.items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                self.not_tensors[name] = value
                continue
            check_dense(value, f'"{name}" of "{path}"')
            self.infos[name] = TensorInfo(value.dtype, tuple(value.shape))
        self.ties = first_names({name: state[name] for name in self.infos})
        if self.key is not None:
            self.beside_state_dict = [str(key) for key in self.content if key != self.key]

    def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.content if self.key is None else self.content[self.key]
        return state

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._state()[name]
        return tensor.detach()

    def rest(self, content: Any = None) -> Any:
        """Return the `beside_state_dict` and `not_tensors` entries of `content` or this file."""
        content = self.content if content is None else content
        state = content if self.key is None else content[self.key]
        beside = {} if self.key is None else {k: v for k, v in content.items() if k != self.key}
        return beside, {key: state[key] for key in self.not_tensors}

    def tensor_of_rest(self, number: int) -> Tensor:
        """Return one of the tensors in `rest()`."""
        self._about_to_read(tensors_in(self.rest())[number].nbytes)
        return tensors_in(self.rest())[number].detach()

    def _reopen(self) -> None:
        self.content = content_of(self.path)


def content_of(path: str) -> Any:
    """Return the content of the file at `path`, its tensors mapped, without running code in it."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():  # about tensors that are refused later
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read: {error.strerror}.') from error
    except Exception as error:  # damaged bytes can raise anything
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise CheckpointError(
                f'"{path}" holds more than tensors and plain values; code in it was not run. Save '
                "only its `state_dict()`."
            ) from error
        raise CheckpointError(
            f'"{path}" is not an intact checkpoint of torch.save: it was cut off, or is another '
            "kind of file."
        ) from error


def _state_key(content: Any, path: str) -> str | None:
    if isinstance(content, Mapping):
        if any(isinstance(v, Tensor) and "." in str(name) for name, v in content.items()):
            return None
        for key in _STATE_KEYS:  # first, because a tensor may lie beside it: the best accuracy
            held = content.get(key)
            if isinstance(held, Mapping) and any(isinstance(v, Tensor) for v in held.values()):
                return key
        if any(isinstance(value, Tensor) for value in content.values()):
            return None
    raise CheckpointError(
        f'"{path}" must hold a state dict, alone or as one of {", ".join(_STATE_KEYS)}; it holds '
        f"{type(content).__name__}. Save only the state dict."
    )
