"""The list at `module.parametrizations.weight` if its last module is a mask."""

import copy
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasparse.attach.inverses import right_inverse
from parasparse.masks import protocol
from parasparse.masks.apply import is_recorded, is_tracing


def stack_of(module: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """Return the parametrizations of tensor `name` of `module`, with or without a mask, or None."""
    modules = module._modules  # a ScriptModule has no `get` here
    if "parametrizations" not in modules:
        return None
    stacks = modules["parametrizations"]
    if not isinstance(stacks, nn.ModuleDict):  # programs that were exported have a plain module
        return None
    found = stacks._modules.get(name)
    return found if isinstance(found, parametrize.ParametrizationList) else None


def original_names(stack: parametrize.ParametrizationList) -> list[str]:
    """Return the names of the stored tensors of `stack`."""
    return ["original"] if stack.is_tensor else [f"original{i}" for i in range(stack.ntensors)]


def originals_in(stack: parametrize.ParametrizationList) -> tuple[Any, ...]:
    """Return the stored tensors of `stack`."""
    return tuple(getattr(stack, name) for name in original_names(stack))


class MaskedParametrizationList(parametrize.ParametrizationList):
    """A ParametrizationList whose last module is the mask. Its output is the masked tensor.

    Attributes:
        frozen: the masked tensor while the model is `frozen`, else None.
        probe: zeros that collect the dense gradient inside `dense_gradients`, else None.
        stand_in: the sparse weight that is read while the model is accelerated, else None.
        is_compact: whether only kept values are stored, so that what modules read is not dense.
    """

    # Not buffers. `frozen` and `probe` last for a `with` block, and are neither saved nor copied.
    frozen: Tensor | None = None
    probe: Tensor | None = None
    stand_in: Tensor | None = None
    is_compact: ClassVar[bool] = False
    _stood_for: list[tuple[int, int, int, bool]] | None = None

    def __init__(self, original: Tensor, mask: nn.Module, *, persistent: bool = True) -> None:
        # Not ParametrizationList's `__init__`: it reads the tensor, which fails without a mask, and
        # calls `set_`, which replaces the AccumulateGrad node (ddp_wrapped_before_sparsify).
        nn.ModuleList.__init__(self)
        self.add_module("0", mask)
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
        mask: Any = self._modules[str(len(self._modules) - 1)]
        return mask  # type: ignore[no-any-return]

    def replace_mask(self, module: nn.Module) -> None:
        """Mask with `module` from now on."""
        self._modules[str(len(self) - 1)] = module

    def stacks_read(self) -> tuple[nn.Module, ...]:
        """Return the stacks whose tensors this one reads."""
        return (self,)

    def below(self) -> list[nn.Module]:
        """Return the parametrizations below the mask, in order."""
        return list(self)[:-1]

    def stored(self) -> Tensor:
        """Return the tensor without its mask."""
        values = originals_in(self)
        for module in self.below():
            values = (module(*values),)
        value: Tensor = values[0]
        return value

    def received(self) -> Tensor:
        """Return the input of the mask."""
        return self.stored()

    def forward(self) -> Tensor:
        """Return what the module reads: the masked tensor, or one that multiplies like it."""
        if self.stand_in is not None:
            return self._value_of(self.stand_in)
        if self.frozen is not None:
            return self._frozen_value(self.frozen)
        if torch.is_grad_enabled() or not self._must_require_grad():
            return self._masked()
        with torch.inference_mode(False), torch.no_grad():
            value = self._masked()
            return value if value.requires_grad else value.requires_grad_()

    def sources(self) -> list[Tensor]:
        """Return the tensors that the masked tensor is computed from."""
        found = [t for stack in self.stacks_read() for t in _tensors_in(stack)]
        return found if self.probe is None else [*found, self.probe]

    def _masked(self) -> Tensor:
        # Runs for each masked tensor in each forward, so a lone mask is read without a list. The
        # attribute access lets torch.fx see the tensor (test_fx_keeps_masked_weights_as_they_are).
        plain = self.is_tensor and len(self._modules) == 1
        value: Tensor = self._modules["0"](self.original) if plain else self.mask(self.stored())
        return value if self.probe is None else value + self.probe

    def _must_require_grad(self) -> bool:
        """Whether what is read with grad mode off must require grad, as the stored tensor does.

        torch's matmul looks at this flag when it decides how to multiply, so a squashed model would
        differ in the last bit (test_masked_and_squashed_are_equal_in_every_layout_of_the_input).
        """
        originals = originals_in(self)
        return (
            not is_recorded(originals[0])
            and any(tensor.requires_grad for tensor in originals)
            and not torch._C._are_functorch_transforms_active()
            # Autocast keeps a copy of each tensor that requires grad until it ends.
            and not torch._C._is_any_autocast_enabled()
        )

    def _frozen_value(self, value: Tensor) -> Tensor:
        # Up to torch 2.10, torch.compiler.is_exporting() is also true under torch.compile
        # (test_frozen_compiles_and_lets_go).
        if torch.compiler._is_exporting_flag or is_tracing():
            raise RuntimeError(
                "a model must not be exported or traced inside `frozen`, because the masked "
                "weights would become constants. Leave the `with` block first, or `squash` the "
                "model."
            )
        return value

    def right_inverse(self, value: Tensor) -> None:
        """Copy `value` into the stored tensors where the mask keeps entries.

        See `check_assigned` for what it raises.
        """
        with torch.no_grad():
            stored = self.stored()
        self.check_assigned(value, stored.shape)
        with torch.no_grad():
            self.store(protocol.merged(self.mask, value, stored))

    def swap(self, value: Any) -> None:
        """Store `value`, either new or read earlier: `functional_call` assigns both."""
        if not protocol.is_told_by_its_values(self.mask):
            raise RuntimeError(
                "`functional_call` must not swap a tensor under a gate that draws noise or does "
                "not multiply, because its stored values could not be restored. Use the key "
                "'parametrizations.<name>.original'."
            )
        self.right_inverse(value)

    def check_assigned(self, value: Any, shape: torch.Size) -> None:
        """Raise if a tensor of `shape` cannot be assigned `value`, or would lose its gradient."""
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
        """Copy `value` into the stored tensors, so that `stored()` returns it."""
        originals = self.originals_of(value)
        try:
            for name, new in originals.items():
                getattr(self, name).copy_(new)
        except RuntimeError as error:
            if "transform" in str(error) or "vmap" in str(error):  # W of torch.func's grad or vmap
                raise RuntimeError(_NOT_DIFFERENTIABLE) from error
            raise

    def originals_of(self, value: Any) -> dict[str, Any]:
        """Return the tensors to store, by name, so that `stored()` returns `value`."""
        for module in reversed(self.below()):
            value = right_inverse(module, value)
        return dict(zip(original_names(self), [value] if self.is_tensor else value, strict=True))

    def retie(self, parameter: nn.Parameter) -> None:
        """Make `parameter` the stored tensor, as `module.weight = parameter` does when dense."""
        if len(self) == 1 and parameter is self.original:
            return
        if len(self) > 1:
            raise RuntimeError(
                "a Parameter cannot be tied to a tensor that has a parametrization below its mask "
                f"({type(self[0]).__name__}). `squash` it first, or assign a plain tensor."
            )
        if parameter.shape != self.original.shape:
            raise ValueError(
                f"a Parameter tied to a masked tensor must have its shape "
                f"{tuple(self.original.shape)}; got {tuple(parameter.shape)}. `squash` it first."
            )
        self._buffers.pop("original", None)
        self.register_parameter("original", parameter)
        self.replace_mask(copy.deepcopy(self.mask))  # tensors that were tied keep the old one

    def append(self, module: nn.Module) -> NoReturn:
        """Refuse, because another parametrization after the mask would fill its zeros."""
        self._refuse(type(module).__name__)

    def extend(self, modules: Iterable[nn.Module]) -> NoReturn:
        """Refuse, as `append` does."""
        self._refuse(", ".join(type(module).__name__ for module in modules))

    @property
    def parametrizations(self) -> NoReturn:
        """Refuse to be asked by torch's `register_parametrization`; else there is none."""
        # torch asks `is_parametrized` before it changes anything.
        caller = sys._getframe(1).f_back
        if caller and caller.f_code is parametrize.register_parametrization.__code__:
            self._refuse("a parametrization of the stored tensor")
        raise AttributeError

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{what} cannot be registered on a masked tensor, because the mask must stay last. "
            "Remove the mask with parasparse.unsparsify (or parasparse.squash), register, and call "
            "parasparse.sparsify again."
        )

    def __delitem__(self, key: int | slice) -> None:
        """Refuse, because the mask must stay."""
        raise RuntimeError(
            "a parametrization of a masked tensor cannot be deleted. Call parasparse.squash or "
            "parasparse.unsparsify first."
        )

    def _feeds_alone(self, value: Tensor) -> bool:
        """Whether the graph of `value` has no other leaves: `functional_call` puts it back."""
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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load, and report the mask as missing if the whole tensor is missing.

        safetensors leaves out all but one name of a tied tensor, and needs the others reported.
        """
        super()._load_from_state_dict(state_dict, prefix, *rest)
        _, _, missing_keys, _, _ = rest
        key = f"{prefix}{len(self) - 1}.mask"
        is_set = getattr(self.mask, "_buffers", {}).get("mask") is not None
        if f"{prefix}original" in missing_keys and is_set and key not in state_dict:
            missing_keys.append(key)

    def let_stand_in(self, weight: Tensor) -> None:
        """Read `weight`, a sparse copy of the masked tensor, from now on."""
        self.__dict__["stand_in"] = weight
        self._stood_for = self._fingerprint()

    def end_stand_in(self) -> None:
        """Read the masked tensor again."""
        for name in ("stand_in", "_stood_for"):
            self.__dict__.pop(name, None)

    def _value_of(self, stand_in: Tensor) -> Tensor:
        # torch.compile does not support versions, and the tensors do not change while it traces.
        if not torch.compiler.is_compiling() and self._stood_for != self._fingerprint():
            del self.stand_in
            try:
                with torch.no_grad():
                    stand_in.data = self()  # new values, mask or dtype
            finally:
                self.__dict__["stand_in"] = stand_in
            stand_in.requires_grad_(any(trained for *_, trained in self._fingerprint()))
            self._stood_for = self._fingerprint()
        return stand_in

    def _fingerprint(self) -> list[tuple[int, int, int, bool]]:
        """Return a list that differs if the masked tensor may have changed."""
        return [
            (id(t), t.data_ptr(), 0 if t.is_inference() else t._version, t.requires_grad)
            for t in self.sources()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("frozen", "probe")}


def _tensors_in(module: nn.Module) -> list[Tensor]:
    # `parameters` and `buffers` take four times as long.
    own = (*module._parameters.values(), *module._buffers.values())
    found = [tensor for tensor in own if tensor is not None]
    for inner in module._modules.values():
        if inner is not None:
            found += _tensors_in(inner)
    return found


_NOT_DIFFERENTIABLE = (
    "a masked tensor cannot be assigned a tensor that requires grad, because the copy would lose "
    "the gradient. Use the key 'parametrizations.<name>.original' instead of '<name>' in "
    "`functional_call`, or assign `value.detach()`."
)
