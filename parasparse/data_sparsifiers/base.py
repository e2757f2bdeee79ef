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

_SPECIAL = ("mask", "parametrization")  # of `add_data`, not of `update_mask`


class BaseDataSparsifier(ABC):
    """Owns masks of tensors, Parameters and embeddings by name; a subclass says what they are.

    A subclass defines `update_mask(name, data, **config)`, which changes `self.get_mask(name)` in
    place. The tensors stay the user's own: changes outside show here, and `squash_mask` writes
    masked values into them.

    Args:
        data_list: (name, data) of what to add at once.
        **defaults: the configuration of data that says no other.

    Attributes:
        defaults: as given.
        data_groups: the configuration of each data, by name.
        state: by name what is remembered, the mask as `state[name]["mask"]`; `update_mask` may add
            to it.
        enable_mask_update: whether `step` does anything; schedulers set it.

    Examples:
        >>> class Threshold(BaseDataSparsifier):
        ...     def update_mask(self, name, data, threshold):
        ...         self.get_mask(name)[data.abs() < threshold] = 0
        >>> sparsifier = Threshold([("a", torch.tensor([0.1, -2.0, 0.4]))], threshold=0.2)
        >>> sparsifier.step()
        >>> sparsifier.get_data("a", return_original=False).tolist()
        [0.0, -2.0, 0.4000000059604645]

    Reference: torch.ao.pruning's BaseDataSparsifier, whose schedulers take this one and whose state
        this one loads. Differs: a tensor that is loaded goes into the user's own where one of its
        shape is there; with `strict=False` what is loaded wins; `step` passes over what was
        squashed; pickles and copies keep every attribute; masks of complex data are real.
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
        """Change the mask of `name` in place; `data` is the tensor without its mask."""

    def prepare(self, model: Any, config: Any) -> None:
        """Refuse: there is no model.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a data sparsifier has no model to prepare; use `add_data`.")

    def add_data(self, name: str, data: Any, reuse_mask: bool = True, **config: Any) -> Tensor:
        """Give data a mask, all ones at first; return the masked tensor.

        Args:
            name: what to call it, without dots. If there is data of that name, this takes its
                place: under the same configuration but for what `config` says, and the same mask.
            data: a Tensor, Parameter, Embedding or EmbeddingBag of any number of dimensions.
            reuse_mask: keep the mask of the data that is replaced, which must have this shape.
            **config: what `update_mask` gets, over the defaults. Two are none of its arguments:
                `mask`, the first mask, live from now on; `parametrization`, a class that makes of a
                mask the module that applies it.

        Raises:
            TypeError: data of another kind; a name that is no string.
            ValueError: a name with a dot; a mask of another shape; an embedding that is
                parametrized.
            AssertionError: the shape is not that of the mask to be reused.
        """
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string; got {name!r}.")
        if not name or "." in name:
            raise ValueError(f"`name` must have no dot, and a character at least; got {name!r}.")
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
                    f'to reuse the mask of "{name}", {tuple(mask.shape)}, data must have its '
                    f"shape; got {tuple(weight.shape)}. Pass `reuse_mask=False`, or let the loader "
                    "`drop_last=True` if it is a smaller last batch."
                )
            mask = mask.to(weight.device)
        if not isinstance(mask, Tensor) or mask.shape != weight.shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"`mask` must be a tensor of shape {tuple(weight.shape)}; got {got}.")
        stack = masked(weight, mask, group)
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
        """Return the tensor itself, or with `return_original=False` the masked one.

        Raises:
            ValueError: there is none of that name; it was squashed, so that there is no original.
        """
        self._check_known(name)
        if not return_original:
            return self._container.read(name)
        if not self._container.is_masked(name):
            raise ValueError(
                f'the mask of "{name}" was squashed: there is no original any more. What it has '
                "become is `get_data(name, return_original=False)`."
            )
        return self._container.plain(name)

    def get_mask(self, name: str) -> Tensor:
        """Return the mask, the live one: of the data's floating dtype until something changes it.

        Raises:
            ValueError: there is no data of that name.
        """
        self._check_known(name)
        mask: Tensor = self.state[name]["mask"]
        return mask

    def step(self) -> None:
        """Call `update_mask` for all data that is masked, without gradients."""
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
        self,
        *args: Any,
        leave_parametrized: bool = True,
        names: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the masked values into the user's own tensors, and let go of the originals.

        Groups and masks stay.

        Args:
            *args: not used.
            leave_parametrized: False: leave the tensors as they are.
            names: which; None: all that are masked.
            **kwargs: not used.

        Raises:
            ValueError: there is no data of that name, or it was squashed before.
            RuntimeError: a tensor cannot be written to. Nothing has changed.
        """
        data = self._masked_data() if names is None else {n: self.get_data(n) for n in _all(names)}
        wrong = [name for name, original in data.items() if not is_writable(original)]
        if leave_parametrized and wrong:
            raise RuntimeError(
                f"`squash_mask` must be able to write to {listed(wrong)}, made in inference mode "
                "or by `expand`. Add clones, or pass `leave_parametrized=False`."
            )
        with torch.no_grad():
            for name in data if leave_parametrized else ():
                self._container.read(name)  # what cannot be read raises now
            for name, original in data.items():
                if leave_parametrized:  # one by one: they may share memory
                    original.copy_(self._container.read(name))
                self._container.put(name, original)

    def state_dict(self) -> dict[str, Any]:
        """Return masks (sparse COO) and what else is remembered, configurations and tensors.

        The tensors are those themselves, not copies, as in `torch.nn.Module.state_dict`.
        `torch.load(weights_only=True)` loads it if the configurations hold plain values.
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
        """Take over a state; a tensor that is here already gets the loaded values.

        Args:
            state_dict: of `state_dict`, here or in torch.ao.pruning; not changed.
            strict: forget all data that it does not hold; else that stays.

        Raises:
            RuntimeError: "Error loading <name>": its three parts do not fit each other. Nothing has
                changed.
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
        # A scheduler replaces `step` by a function that is bound to this very object.
        bound = hasattr(self.__dict__.get("step"), "_with_counter")
        return {k: v for k, v in self.__dict__.items() if k != "step" or not bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        introduce(BaseDataSparsifier)
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for name in self.data_groups:  # torch copies no tensor that has been computed
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
        """Return the tensor that `data` is or holds."""
        return weight_of(data)

    def _masked_data(self) -> dict[str, Tensor]:
        """Return the originals of all data that was not squashed."""
        return {n: self.get_data(n) for n in self.data_groups if self._container.is_masked(n)}

    def _check_known(self, name: str) -> None:
        if name not in self.data_groups:
            raise ValueError(
                f'data with the name "{name}" does not exist{nearest(name, self.data_groups)}; '
                f"there is {listed(self.data_groups) or 'none'}."
            )

    def _ours(self, name: str, loaded: Tensor) -> Tensor:
        """Return what takes the values of `loaded`: the tensor that is here, or a new one."""
        here = self._container.plain(name) if name in self.data_groups else None
        if here is None or here.shape != loaded.shape or not is_writable(here):
            return loaded.clone()
        return here if torch.can_cast(loaded.dtype, here.dtype) else loaded.clone()


def _all(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
