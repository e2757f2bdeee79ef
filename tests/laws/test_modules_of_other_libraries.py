"""Modules that behave as those of other libraries do: masked rightly, or refused by name."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import parasparse as ps

LAYOUTS = {
    "matrix": lambda: torch.randn(24, 32),
    "batch": lambda: torch.randn(2, 12, 32),
    "transposed": lambda: torch.randn(2, 12, 32).transpose(0, 1),
    "one_row": lambda: torch.randn(1, 1, 32),
    "every_second": lambda: torch.randn(2, 24, 32)[:, ::2],
    "expanded": lambda: torch.randn(1, 12, 32).expand(3, 12, 32),
    "images": lambda: torch.randn(2, 3, 4, 32).permute(0, 2, 1, 3),
}


def attention(batch_first):
    layer = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    return layer, lambda x: layer(x, x, x)[0]


LAYERS = {
    "linear": lambda: (layer := nn.Linear(32, 16), layer),
    "attention": partial(attention, True),
    "attention_length_first": partial(attention, False),
}


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("trained", [True, False])
def test_masked_and_squashed_are_equal_in_every_layout_of_the_input(kind, layout, off, trained):
    module, call = LAYERS[kind]()
    x = LAYOUTS[layout]()
    if kind != "linear" and x.ndim != 3:
        return
    module.requires_grad_(trained)
    ps.sparsify(module, 0.5)
    with off():
        masked = call(x)
    ps.squash(module)
    with off():
        assert torch.equal(call(x), masked)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("channels", [16, 256])
def test_masked_and_squashed_are_equal_in_every_layout_of_the_weight(size, channels):
    layer = nn.Conv2d(channels, channels, size).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    ps.sparsify(layer, {"weight": torch.rand(layer.weight.shape) < 0.5})  # in the default layout
    x = torch.randn(2, channels, 5, 5)
    with torch.no_grad():
        masked = layer(x)
    assert layer.weight.stride() == strides
    ps.squash(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), masked)


def test_what_is_read_says_that_it_is_trained_only_where_that_is_free():
    layer = ps.sparsify(nn.Linear(4, 4), 0.5)
    with torch.no_grad():
        assert layer.weight.requires_grad
        with torch.autocast("cpu", torch.bfloat16):  # it keeps copies of such tensors
            assert not layer.weight.requires_grad
    layer.requires_grad_(False)
    with torch.no_grad():
        assert not layer.weight.requires_grad


class Computed(nn.Linear):
    """Keeps a mask of its own, and reads its weight through it (sparse layers of modelopt)."""

    @property
    def weight(self):
        return self._parameters["weight"] * self.own


def computed():
    layer = nn.Linear(4, 4)
    layer.register_buffer("own", torch.rand(4, 4) > 0.5)
    layer.__class__ = Computed
    return layer


class Subclassed(nn.Module):
    """Wants arguments of its subclasses (tltorch)."""

    def __init_subclass__(cls, name, **kwargs):
        super().__init_subclass__(**kwargs)


class Factorized(Subclassed, name="dense"):
    def __init__(self):
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.tensor


def test_a_class_that_wants_arguments_of_its_subclasses_is_masked():
    model = ps.sparsify(nn.Sequential(Factorized()), 0.5)
    assert isinstance(model[0], Factorized)
    again = copy.deepcopy(model)
    x = torch.randn(2, 8)
    assert torch.equal(again(x), model(x))
    ps.squash(model)
    assert type(model[0]) is Factorized
    assert int((model[0].tensor == 0).sum()) == 32


class Double(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def nested():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.register_parametrization(layer.parametrizations.weight, "original", Double())
    return layer


REFUSED = {
    "computed": (computed, "by a property"),
    "nested": (nested, "parametrizations of its own stored tensor"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_masked_is_refused_by_name_and_stays(kind):
    build, text = REFUSED[kind]
    model = nn.Sequential(build(), nn.Linear(4, 4))
    kinds, weight = [type(m) for m in model.modules()], model[0].weight.clone()
    with pytest.raises(ValueError, match=f'"0.weight" .*{text}'):
        ps.sparsify(model, {"0.weight": 0.5})
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model[0].weight, weight)
    ps.sparsify(model, {"0.weight": None, "1.weight": 0.5})


def test_computed_weights_are_not_tied():
    model = nn.Sequential(computed(), computed(), computed())
    with pytest.raises(ValueError, match='"0.weight"'):
        ps.sparsify(model, 0.5)
    assert len(ps.plan(nn.Sequential(nn.Linear(4, 4), *model), {"0.weight": 0.5})) == 1


class Quantizer(nn.Module):
    """Reads its layer's weight while it loads (brevitas)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]
        self.scale = layer.weight.detach().abs().max()

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.scale = self.layer[0].weight.detach().abs().max()


def test_a_module_may_read_its_weight_while_it_loads():
    def build():
        layer = nn.Linear(8, 4)
        layer.quantizer = Quantizer(layer)
        return nn.Sequential(layer)

    trained, fresh, x = ps.sparsify(build(), 0.5), build(), torch.randn(2, 8)
    ps.load_state_dict(fresh, trained.state_dict())
    assert torch.equal(fresh(x), trained(x))


class Twice(nn.Linear):
    """Writes its weight into the state by itself (torch-geometric)."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach()


def test_a_state_that_holds_the_weight_twice_loads_what_is_stored():
    masked, dense = ps.sparsify(Twice(8, 4), 0.5), Twice(8, 4)
    stored, state = ps.stored(masked, "weight").clone(), copy.deepcopy(masked.state_dict())
    masked.load_state_dict(state)
    assert torch.equal(ps.stored(masked, "weight"), stored)
    ps.load_state_dict(dense, state)
    assert torch.equal(ps.stored(dense, "weight"), stored)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")

    def offloaded(model):
        accelerate.cpu_offload(model, execution_device="cpu")
        return model

    model = offloaded(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(RuntimeError, match='"0.weight" is offloaded'):
        ps.sparsify(model, 0.5)
    model = offloaded(ps.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5))
    for verb in (ps.squash, partial(ps.sparsify, rules=0.9)):
        with pytest.raises(RuntimeError, match="is offloaded"):
            verb(model)
    assert ps.is_sparse(model)


def test_a_masked_entry_of_a_parameter_dict_is_not_deleted():
    table = ps.sparsify(nn.ParameterDict({"a": torch.ones(4, 4), "b": torch.ones(4)}), {"a": 0.5})
    for delete in (lambda: table.pop("a"), lambda: table.__delitem__("a")):
        with pytest.raises(RuntimeError, match='"a" is masked'):
            delete()
    assert set(table) == {"a", "b"}
    del table["b"]
    assert set(table) == {"a"}
    assert int((table["a"] != 0).sum()) == 8
