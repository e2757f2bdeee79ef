"""The list at `module.parametrizations.weight` when the last of its modules is a mask."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasparse.attach.any_names import AnyNames
from parasparse.masks import protocol
from parasparse.masks.apply import is_tracing


def stack_of(module: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """Return what parametrizes tensor `name` of `module`, ours or torch's own, or None."""
    modules = module._modules  # of a ScriptModule, which knows no `get`
    stacks = modules["parametrizations"] if "parametrizations" in modules else None  # noqa: SIM401
    found = None if stacks is None else stacks._modules.get(name)
    return found if isinstance(found, parametrize.ParametrizationList) else None


def original_names(stack: parametrize.ParametrizationList) -> list[str]:
    """Return the attributes of `stack` that hold its tensors."""
    return ["original"] if stack.is_tensor else [f"original{i}" for i in range(stack.ntensors)]


def put_stack(module: nn.Module, name: str, stack: parametrize.ParametrizationList) -> None:
    """Make `stack` what parametrizes tensor `name` of `module`."""
    if "parametrizations" not in module._modules:
        module.add_module("parametrizations", nn.ModuleDict())
    stacks = module._modules["parametrizations"]
    assert stacks is not None
    if hasattr(nn.ModuleDict, name):
        stacks.__class__ = AnyNames  # ModuleDict itself refuses such a name
    stacks._modules[name] = stack


class MaskedParametrizationList(parametrize.ParametrizationList):
    """A ParametrizationList whose last module is the mask; reading it gives the masked tensor.

    Attributes:
        frozen: the value while the model is `frozen`, else None.
        probe: zeros that collect the dense gradient while `dense_gradients` is on, else None.
        stand_in: what multiplies sparsely in its place while the model is accelerated, else None.
    """

    # None is a buffer. The first two live for the length of a `with` block: not saved or copied.
    frozen: Tensor | None = None
    probe: Tensor | None = None
    stand_in: Tensor | None = None
    _stood_for: list[tuple[int, int, int, bool]] | None = None

    def __init__(self, original: Tensor, mask: nn.Module, *, persistent: bool = True) -> None:
        # Not ParametrizationList's: it reads the tensor, which an unset mask refuses, and calls
        # `set_` on it, which replaces its AccumulateGrad node (ddp_wrapped_before_sparsify).
        nn.ModuleList.__init__(self, [mask])
        self.is_tensor = True
        self.ntensors = 1
        self.unsafe = False
        if isinstance(original, nn.Parameter):
            self.register_parameter("original", original)
        else:
            self.register_buffer("original", original, persistent=persistent)

    @property
    def mask(self) -> nn.Module:
        """The module that masks."""
        return self[-1]

    def replace_mask(self, module: nn.Module) -> None:
        """Put `module` in the place of the module that masks."""
        self._modules[str(len(self) - 1)] = module

    def stacks_read(self) -> tuple[nn.Module, ...]:
        """Return the stacks that are computed when this one is read."""
        return (self,)

    def below(self) -> list[nn.Module]:
        """Return the parametrizations under the mask, the first one first."""
        return list(self)[:-1]

    def stored(self) -> Tensor:
        """Return the tensor without its mask."""
        if self.is_tensor:
            value = self.original
        for index, module in enumerate(self.below()):
            if index == 0 and not self.is_tensor:
                value = module(*(getattr(self, f"original{i}") for i in range(self.ntensors)))
            else:
                value = module(value)
        return value

    def received(self) -> Tensor:
        """Return what the mask receives: `stored()`, unless it sees other stacks as well."""
        return self.stored()

    def forward(self) -> Tensor:
        """Return the masked tensor."""
        if self.stand_in is not None:
            return self._value_of(self.stand_in)
        if self.frozen is not None:
            return self._frozen_value(self.frozen)
        # Each masked tensor comes by here in each forward: no list of modules is made for one. But
        # as an attribute torch.fx sees the tensor (test_fx_keeps_masked_weights_as_they_are).
        plain = self.is_tensor and len(self._modules) == 1
        value: Tensor = self._modules["0"](self.original) if plain else self.mask(self.stored())
        return value if self.probe is None else value + self.probe

    def _frozen_value(self, value: Tensor) -> Tensor:
        if _is_exporting() or is_tracing():
            raise RuntimeError(
                "a model must not be exported or traced inside `frozen`: the masked weights would "
                "be baked in as constants. Leave the `with` block first, or `squash` the model."
            )
        return value

    def right_inverse(self, value: Tensor) -> None:
        """Store `value` so that kept entries read as it says; dropped ones keep what they store.

        Copies into the tensors that are stored now. Their identity and storage stay.

        Raises:
            TypeError: `value` is no tensor.
            ValueError: `value` has another shape.
            RuntimeError: `value` carries a gradient, which the copy would lose.
        """
        with torch.no_grad():
            stored = self.stored()
        self.check_assigned(value, stored.shape)
        with torch.no_grad():
            self.store(protocol.merged(self.mask, value, stored))

    def swap(self, value: Any) -> None:
        """Store `value`, or what was read before: `functional_call` does it both ways.

        Raises:
            RuntimeError: what was read before does not tell what was stored.
        """
        if not protocol.is_told_by_its_values(self.mask):
            raise RuntimeError(
                "`functional_call` must not swap a tensor under a gate that draws noise or does "
                "not multiply, as it could not be put back. Use the key "
                "'parametrizations.<name>.original'."
            )
        self.right_inverse(value)

    def check_assigned(self, value: Any, shape: torch.Size) -> None:
        """Raise if `value` cannot be what the tensor, of this shape, reads as."""
        if not isinstance(value, Tensor):
            raise TypeError(f"a masked tensor must be assigned a tensor; got {value!r:.60}.")
        if torch.is_grad_enabled() and value.requires_grad and not self._feeds_alone(value):
            raise RuntimeError(_NOT_DIFFERENTIABLE)
        if value.shape != shape:
            raise ValueError(
                f"a masked tensor must keep its shape {tuple(shape)}; got {tuple(value.shape)}. "
                "`squash` the model before changing shapes."
            )

    def store(self, value: Tensor) -> None:
        """Make `stored()` return `value`: copy it back through what lies under the mask."""
        inverse: Any = value
        for module in reversed(self.below()):
            inverse = module.right_inverse(inverse)  # type: ignore[operator]
        values = [inverse] if self.is_tensor else list(inverse)
        try:
            for name, new in zip(original_names(self), values, strict=True):
                getattr(self, name).copy_(new)
        except RuntimeError as error:
            if "transform" in str(error) or "vmap" in str(error):  # W of torch.func's grad or vmap
                raise RuntimeError(_NOT_DIFFERENTIABLE) from error
            raise

    def retie(self, parameter: nn.Parameter) -> None:
        """Make `parameter` the stored tensor, as `module.weight = parameter` does when dense.

        Raises:
            ValueError: it has another shape.
            RuntimeError: other parametrizations lie under the mask.
        """
        if len(self) == 1 and parameter is self.original:
            return
        if len(self) > 1:
            raise RuntimeError(
                "a Parameter cannot be tied to a tensor that is parametrized under its mask "
                f"({type(self[0]).__name__}). `squash` it first, or assign a plain tensor."
            )
        if parameter.shape != self.original.shape:
            raise ValueError(
                f"a Parameter tied to a masked tensor must match its mask's shape "
                f"{tuple(self.original.shape)}; got {tuple(parameter.shape)}. `squash` first."
            )
        self._buffers.pop("original", None)
        self.register_parameter("original", parameter)
        self.replace_mask(copy.deepcopy(self.mask))  # tensors that were tied to it keep theirs

    def append(self, module: nn.Module) -> NoReturn:
        """Refuse: the mask must stay last, or what follows would fill its zeros."""
        raise RuntimeError(
            f"{type(module).__name__} cannot be registered on a masked tensor: the mask must stay "
            "last. Take it off with parasparse.unsparsify (or parasparse.squash), register, and "
            "call parasparse.sparsify again."
        )

    def _feeds_alone(self, value: Tensor) -> bool:
        """Whether no leaf but our own parameters feeds `value`.

        So it is when `functional_call` puts back what it had read.
        """
        own = {id(parameter) for stack in self.stacks_read() for parameter in stack.parameters()}
        todo, seen = [value.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in own:
                return False
            todo += [function for function, _ in node.next_functions]
        return value.grad_fn is not None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load; a mask counts as missing where the whole tensor is, else an absent mask stays.

        safetensors leaves out all but one name of a tied tensor, and wants the others reported.
        """
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}{len(self) - 1}.mask"
        is_set = getattr(self.mask, "_buffers", {}).get("mask") is not None
        if f"{prefix}original" in missing_keys and is_set and key not in state_dict:
            missing_keys.append(key)

    def let_stand_in(self, weight: Tensor) -> None:
        """Let `weight`, which holds the masked values, be what is read from now on."""
        self.__dict__["stand_in"] = weight
        self._stood_for = self._fingerprint()

    def _value_of(self, stand_in: Tensor) -> Tensor:
        # While torch.compile looks on, nothing changes; it has no word for versions either.
        if not torch.compiler.is_compiling() and self._stood_for != self._fingerprint():
            del self.stand_in
            try:
                with torch.no_grad():
                    stand_in.data = self()  # other values, another mask, or another dtype
            finally:
                self.__dict__["stand_in"] = stand_in
            stand_in.requires_grad_(any(trained for *_, trained in self._fingerprint()))
            self._stood_for = self._fingerprint()
        return stand_in

    def _fingerprint(self) -> list[tuple[int, int, int, bool]]:
        """Return what tells whether the value may have changed."""
        tensors = [
            tensor
            for module in self.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        return [
            (id(t), t.data_ptr(), 0 if t.is_inference() else t._version, t.requires_grad)
            for t in tensors
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("frozen", "probe")}


_NOT_DIFFERENTIABLE = (
    "a masked tensor cannot be assigned a tensor that requires grad: the copy would lose the "
    "gradient. Use the key 'parametrizations.<name>.original' instead of '<name>' in "
    "`functional_call`, or assign `value.detach()`."
)


def _is_exporting() -> bool:
    # Not torch.compiler.is_exporting(): up to torch 2.10 it is true under torch.compile as well
    # (test_frozen_compiles_and_lets_go).
    return bool(torch.compiler._is_exporting_flag)
