"""The base class of data sparsifiers."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from parasparse.data_sparsifiers.accepted import ones_like, weight_of
from parasparse.data_sparsifiers.container import Container, masked
from parasparse.data_sparsifiers.state import entries
from parasparse.data_sparsifiers.torch_ao import introduce
from parasparse.text import listed, nearest
from parasparse.verbs.writable import is_writable

_SPECIAL = ("mask", "parametrization")  # for `add_data`, not `update_mask`


class BaseDataSparsifier(ABC):
    """Owns masks of tensors, Parameters and embeddings by name; subclasses compute the masks.

    A subclass defines `update_mask(name, data, **config)`, which changes `self.get_mask(name)` in
    place. Tensors are not copied: your changes to them apply here, and `squash_mask` writes masked
    values into them.

    Args:
        data_list: pairs (name, data) to add.
        **defaults: default configuration of data.

    Attributes:
        defaults: as given.
        data_groups: configuration of each data, by name.
        state: state of each data, by name; `state[name]["mask"]` is its mask, and `update_mask` may
            add entries.
        enable_mask_update: whether `step` updates masks; schedulers set it.

    Examples:
        >>> class Threshold(BaseDataSparsifier):
        ...     def update_mask(self, name, data, threshold):
        ...         self.get_mask(name)[data.abs() < threshold] = 0
        >>> sparsifier = Threshold([("a", torch.tensor([0.1, -2.0, 0.4]))], threshold=0.2)
        >>> sparsifier.step()
        >>> sparsifier.get_data("a", return_original=False).tolist()
        [0.0, -2.0, 0.4000000059604645]

    Reference: torch.ao.pruning's BaseDataSparsifier; its schedulers work with this class, which
        also loads its state. Differs: loaded values are written into your tensors if shapes agree;
        with `strict=False`, loaded data replaces existing data; `step` skips squashed data; pickles
        and copies keep every attribute; masks of complex data are real.
    """

    def __init__(self, data_list: Iterable[tuple[str, Any]] | None = None, **defaults: Any) -> None:
        introduce(BaseDataSparsifier)
        self.defaults: dict[str, Any] = defaults
        self.data_groups: dict[str, dict[str, Any]] = {}
        self.state: dict[str, dict[str, Any]] = {}
        self.enable_mask_update = True
        self._container = Container()
        for name, data in data_list or ():
            self.add_data(name, data)

    @abstractmethod
    def update_mask(self, name: str, data: Tensor, *args: Any, **config: Any) -> None:
        """Change the mask of `name` in place; `data` is the unmasked tensor."""

    def prepare(self, model: Any, config: Any) -> None:
        """Raise NotImplementedError, because there is no model."""
        raise NotImplementedError("a data sparsifier has no model to prepare; use `add_data`.")

    def add_data(self, name: str, data: Any, reuse_mask: bool = True, **config: Any) -> Tensor:
        """Add data with a mask of ones and return the masked tensor.

        Args:
            name: its name, without dots. Existing data with this name is replaced; the new data
                gets its mask, and its configuration where `config` does not override it.
            data: a Tensor, Parameter, Embedding or EmbeddingBag with any number of dimensions.
            reuse_mask: whether replaced data passes on its mask, which must have this shape.
            **config: configuration for `update_mask`, overriding the defaults. Two entries are not
                passed on: `mask`, the first mask, which is not copied; `parametrization`, a class
                whose instance `parametrization(mask)` is a module that applies the mask.

        Raises:
            TypeError: `data` is of another kind, or `name` is not a string.
            ValueError: `name` has a dot, a mask has another shape, or an embedding is parametrized.
            AssertionError: the mask to be reused has another shape.
        """
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string; got {name!r}.")
        if not name or "." in name:
            raise ValueError(f"`name` must not be empty or contain a dot; got {name!r}.")
        weight = self._extract_weight(data)
        known = name in self.data_groups
        group = {**copy.deepcopy(self.data_groups[name] if known else self.defaults), **config}
        given = config.get("mask") if known else group.get("mask")
        mask = ones_like(weight) if given is None else given
        kept: dict[str, Any] = {}
        if known and reuse_mask and "mask" not in config:
            kept, mask = self.state[name], self.get_mask(name)
            if mask.shape != weight.shape:
                raise AssertionError(
                    f'`data` must have the shape of the mask of "{name}", {tuple(mask.shape)}, to '
                    f"reuse it; got {tuple(weight.shape)}. Pass `reuse_mask=False`, or "
                    "`drop_last=True` to the DataLoader if this is a smaller last batch."
                )
            mask = mask.to(weight.device)
        if not isinstance(mask, Tensor) or mask.shape != weight.shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"`mask` must be a tensor of shape {tuple(weight.shape)}; got {got}.")
        stack = masked(weight, mask, group, {})
        if known:
            warnings.warn(
                "Replacing existing data of the same name. - Did you mean a different name?",
                stacklevel=2,
            )
        self._container.put(name, stack)
        self.data_groups[name] = group
        self.state[name] = {**kept, "mask": mask}
        return self._container.read(name)

    def get_data(self, name: str, return_original: bool = True) -> Tensor:
        """Return the unmasked tensor, or the masked one with `return_original=False`.

        Raises:
            ValueError: the name is unknown, or the original was squashed.
        """
        self._check_known(name)
        if not return_original:
            return self._container.read(name)
        if not self._container.is_masked(name):
            raise ValueError(
                f'"{name}" was squashed, so its original no longer exists. Use '
                "`get_data(name, return_original=False)`."
            )
        return self._container.plain(name)

    def get_mask(self, name: str) -> Tensor:
        """Return the mask, not a copy; by default it has the floating-point dtype of the data.

        Raises:
            ValueError: the name is unknown.
        """
        self._check_known(name)
        mask: Tensor = self.state[name]["mask"]
        return mask

    def step(self) -> None:
        """Call `update_mask` for all masked data, without gradients."""
        if not self.enable_mask_update:
            return
        with torch.no_grad():
            for name, data in self._masked_data().items():
                config = self.data_groups[name].items()
                try:
                    self.update_mask(name, data, **{k: v for k, v in config if k not in _SPECIAL})
                except Exception as error:
                    error.add_note(f'while updating the mask of "{name}"')
                    raise

    def squash_mask(
        self, *args: Any, leave_parametrized: bool = True, names: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write the masked values into your tensors; configurations and masks stay.

        Args:
            *args: not used.
            leave_parametrized: False: leave the values of the tensors unchanged.
            names: names of the data; None: all masked data.
            **kwargs: not used.

        Raises:
            ValueError: a name is unknown, or its data was squashed before.
            RuntimeError: a tensor cannot be written to. Nothing has changed.
        """
        data = self._masked_data() if names is None else {n: self.get_data(n) for n in _all(names)}
        wrong = [name for name, original in data.items() if not is_writable(original)]
        if leave_parametrized and wrong:
            raise RuntimeError(
                f"`squash_mask` cannot write to {listed(wrong)}, created in inference mode or by "
                "`expand`. Add clones, or pass `leave_parametrized=False`."
            )
        with torch.no_grad():
            for name in data if leave_parametrized else ():
                self._container.read(name)  # raises now if it cannot be read
            for name, original in data.items():
                if leave_parametrized:  # one by one: they may share memory
                    original.copy_(self._container.read(name))
                self._container.put(name, original)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with masks as sparse COO tensors, the configurations and the tensors.

        As in `torch.nn.Module.state_dict`, tensors are not copied. `torch.load(weights_only=True)`
        loads it if the configurations contain only plain values.
        """
        state = {
            name: {
                key: value.detach().to_sparse_coo() if key == "mask" else copy.deepcopy(value)
                for key, value in held.items()
            }
            for name, held in self.state.items()
        }
        groups = copy.deepcopy(self.data_groups)
        return {"state": state, "data_groups": groups, "_container": self._container.tensors()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load a state; values are written into existing tensors of the same shape.

        Args:
            state_dict: from `state_dict` of this class or of torch.ao.pruning; not changed.
            strict: whether to remove data that is not in `state_dict`.

        Raises:
            RuntimeError: "Error loading <name>", if the parts of the state are inconsistent.
                Nothing has changed.
        """
        loaded = entries(state_dict)
        tensors = {name: self._ours(name, entry.tensor) for name, entry in loaded.items()}
        stacks = {
            name: masked(tensors[name], entry.state["mask"], entry.group, entry.own)
            for name, entry in loaded.items()
            if entry.is_masked
        }
        for name in self.data_groups.keys() - loaded.keys() if strict else ():
            for held in (self.state, self.data_groups):
                del held[name]
            self._container.forget(name)
        for name, entry in loaded.items():
            with torch.no_grad():
                tensors[name].copy_(entry.tensor)
            self._container.put(name, stacks.get(name, tensors[name]))
            self.state[name], self.data_groups[name] = entry.state, entry.group

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler replaces `step` by a function that is bound to this object.
        bound = hasattr(self.__dict__.get("step"), "_with_counter")
        return {k: v for k, v in self.__dict__.items() if k != "step" or not bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        introduce(BaseDataSparsifier)
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for name in self.data_groups:  # torch does not deep-copy computed tensors
            tensor = self._container.plain(name)
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __repr__(self) -> str:
        lines = [
            f"  {name}: " + ", ".join(f"{key}={value!r:.60}" for key, value in group.items())
            for name, group in self.data_groups.items()
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def _extract_weight(self, data: Any) -> Tensor:
        # torch.ao.pruning has this method, which subclasses may override.
        return weight_of(data)

    def _masked_data(self) -> dict[str, Tensor]:
        found = {n: self.get_data(n) for n in self.data_groups if self._container.is_masked(n)}
        for name, data in found.items():
            shape = self.get_mask(name).shape
            if data.shape != shape:  # `copy_` might broadcast
                raise ValueError(
                    f'the data "{name}" must keep its shape, {tuple(shape)}; it now has '
                    f"{tuple(data.shape)}, as after `shrink`. Call `add_data` again, with "
                    "`reuse_mask=False`."
                )
        return found

    def _check_known(self, name: str) -> None:
        if name not in self.data_groups:
            raise ValueError(
                f'there is no data named "{name}"{nearest(name, self.data_groups)}; known names: '
                f"{listed(self.data_groups) or 'none'}."
            )

    def _ours(self, name: str, loaded: Tensor) -> Tensor:
        """Return the tensor to load the values into: the existing one, or a new one."""
        here = self._container.plain(name) if name in self.data_groups else None
        if here is None or here.shape != loaded.shape or not is_writable(here):
            return loaded.clone()
        return here if torch.can_cast(loaded.dtype, here.dtype) else loaded.clone()


def _all(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
