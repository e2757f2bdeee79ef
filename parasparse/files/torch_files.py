"""Checkpoints in torch files, read without holding them in memory."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.nested import check_dense, tensors_in
from parasparse.files.state_dicts import at, beside, names_beside, state_dict_place
from parasparse.files.ties import first_names


class TorchFile(Checkpoint):
    """A file of torch.save that holds a state dict, alone or under a key."""

    def __init__(self, path: str, content: Any, key: str | None = None) -> None:
        super().__init__(path)
        self.content = content  # see `content_of`
        self.place, self.other_state_dicts = state_dict_place(content, path, key)
        state = self._state()
        self.modules = getattr(state, "_metadata", None)
        for name, value in state.items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                self.not_tensors[name] = value
                continue
            check_dense(value, f'"{name}" of "{path}"')
            self.infos[name] = TensorInfo(value.dtype, tuple(value.shape))
        self.ties = first_names({name: state[name] for name in self.infos})
        self.beside_state_dict = names_beside(content, self.place)

    def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = at(self.content, self.place)
        return state

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._state()[name]
        return tensor.detach()

    def rest(self, content: Any = None) -> Any:
        """Return the `beside_state_dict` and `not_tensors` entries of `content` or this file."""
        content = self.content if content is None else content
        state = at(content, self.place)
        return beside(content, self.place), {key: state[key] for key in self.not_tensors}

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
