"""Masks beside what else hangs on modules: stock parametrizations, prune, RNNs, odd classes."""

import abc
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import parasparse as ps
from tests.helpers.cases import OddNames, Tied


class Half(nn.Module):
    def forward(self, tensor):
        return tensor * 0.5

    def right_inverse(self, tensor):
        return tensor * 2


@pytest.mark.parametrize("other", ["bias", "weight"])
def test_stock_registration_beside_ours_leaves_siblings_whole(other):
    one, two = (ps.sparsify(nn.Linear(4, 3), {"weight": 0.5}) for _ in range(2))
    x = torch.randn(2, 4)
    expected = two(x)
    own = one(x)
    if other == "bias":
        bias = one.bias.detach().clone()
        parametrize.register_parametrization(one, "bias", Half())
        assert torch.equal(one.bias, bias)  # Half's inverse doubled what is stored
        assert torch.equal(pickle.loads(pickle.dumps(one))(x), one(x))
        parametrize.remove_parametrizations(one, "bias")
        assert torch.equal(one.bias, bias)
    else:
        for register in (
            lambda: parametrize.register_parametrization(one, "weight", Half()),
            lambda: parametrizations.weight_norm(one),
            lambda: parametrizations.spectral_norm(one),
        ):
            with pytest.raises(RuntimeError, match="parasparse.unsparsify"):
                register()
        with pytest.raises(RuntimeError, match="parasparse.squash"):
            parametrize.remove_parametrizations(one, "weight")
    assert torch.equal(one(x), own)
    assert torch.equal(two(x), expected)
    two.bias = nn.Parameter(torch.zeros(3))
    assert not two.bias.any()
    assert torch.equal(copy.deepcopy(two)(x), two(x))
    ps.squash(one)
    ps.squash(two)
    assert type(one) is type(two) is nn.Linear
    assert [n for n, _ in one.named_parameters()] == ["weight", "bias"]


def delete_entry(layer):
    del layer.parametrizations["weight"]


def delete_mask(layer):
    del layer.parametrizations.weight[0]


def delete_container(layer):
    del layer.parametrizations


REFUSED = {
    "register": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "register below": lambda layer: parametrize.register_parametrization(
        layer.parametrizations.weight, "original", Half()
    ),
    "weight_norm below": lambda layer: parametrizations.weight_norm(
        layer.parametrizations.weight, "original"
    ),
    "orthogonal below": lambda layer: parametrizations.orthogonal(
        layer.parametrizations.weight, "original"
    ),
    "remove": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    "remove, leave original": lambda layer: parametrize.remove_parametrizations(
        layer, "weight", leave_parametrized=False
    ),
    "append": lambda layer: layer.parametrizations.weight.append(Half()),
    "extend": lambda layer: layer.parametrizations.weight.extend([Half()]),
    "pop": lambda layer: layer.parametrizations.weight.pop(0),
    "pop entry": lambda layer: layer.parametrizations.pop("weight"),
    "del entry": delete_entry,
    "del mask": delete_mask,
    "del container": delete_container,
    "del attribute": lambda layer: delattr(layer, "weight"),
}


@pytest.mark.parametrize("act", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("beside", [False, True], ids=["", "beside a stock one"])
def test_stock_functions_that_a_mask_refuses_change_nothing(act, beside):
    layer = nn.Linear(4, 4)
    if beside:
        parametrize.register_parametrization(layer, "bias", Half())
    ps.sparsify(layer, {"weight": 0.5})
    stored = ps.stored(layer, "weight")
    node = stored.expand_as(stored).grad_fn.next_functions[0][0]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="parasparse.unsparsify"):
        act(layer)
    assert {key: value.tolist() for key, value in layer.state_dict().items()} == {
        key: value.tolist() for key, value in before.items()
    }
    assert stored.expand_as(stored).grad_fn.next_functions[0][0] is node
    assert ps.stored(layer, "weight") is stored
    assert int((layer.weight != 0).sum()) == 8
    assert not parametrize.is_parametrized(layer.parametrizations.weight)
    ps.squash(layer)
    if beside:
        parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear


class ReadsItsList(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.parametrizations["weight"].original.sum()


def test_a_module_that_reads_its_list_compiles():
    layer, x = ps.sparsify(ReadsItsList(4, 4), 0.5), torch.randn(2, 4)
    assert not hasattr(layer.parametrizations.weight, "parametrizations")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


class AsksSubclasses(nn.Linear):
    def __init_subclass__(cls, *, kind):
        super().__init_subclass__()


@pytest.mark.parametrize("build", [nn.Linear, AsksSubclasses])
def test_the_type_before_parametrizations_is_that_of_the_dense_module(build):
    layer = ps.sparsify(build(4, 4), 0.5)
    assert parametrize.type_before_parametrizations(layer) is build
    assert type(layer).__mro__[1] is build


def test_the_logits_of_a_gate_can_be_parametrized():
    layer = ps.sparsify(nn.Linear(4, 4), ps.Gate(init=1.0))
    gate = layer.parametrizations.weight[0]
    parametrize.register_parametrization(gate, "logits", Half())
    weight = layer.weight.detach().clone()
    assert ps.penalty(layer) > 8
    assert torch.equal(ps.squash(layer).weight, weight)


def test_a_stored_tensor_that_is_swapped_is_read():
    layer = ps.sparsify(nn.Linear(4, 4), 0.5)
    mask = ps.mask_of(layer, "weight")
    torch.utils.swap_tensors(
        layer.parametrizations.weight.original, nn.Parameter(torch.full((4, 4), 7.0))
    )
    assert torch.equal(layer.weight, 7.0 * mask)


def test_a_stock_parametrization_of_the_bias_stays_when_ours_goes():
    model = nn.Linear(4, 3)
    parametrize.register_parametrization(model, "bias", Half())
    ps.squash(ps.sparsify(model, {"weight": 0.5}))
    assert parametrize.is_parametrized(model, "bias")
    parametrize.remove_parametrizations(model, "bias")
    assert type(model) is nn.Linear


def test_parametrizing_a_copy_leaves_the_original_alone():
    model = ps.sparsify(nn.Linear(4, 3), {"weight": 0.5})
    twin = copy.deepcopy(model)
    ps.sparsify(twin, {"bias": 0.5})
    assert model.bias.all()
    parametrize.register_parametrization(copy.deepcopy(model), "bias", Half())
    assert model.bias.all()


def test_the_fast_path_of_attention_is_still_taken_and_right():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    ps.sparsify(layer, 0.5)
    x = torch.randn(2, 3, 8)
    fast = operators(layer, x)
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, layer(x).detach())  # with gradients it is the slow one
    ps.squash(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), found)
    assert operators(layer, x) <= fast  # those of the dense layer, and masks


def operators(layer, x):
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    return {event.name for event in profile.events()}


@pytest.mark.parametrize(
    "normalise", [parametrizations.weight_norm, parametrizations.orthogonal], ids=["norm", "orth"]
)
def test_squash_bakes_what_lies_underneath_into_one_parameter(normalise):
    model = normalise(nn.Linear(4, 4))
    ps.sparsify(model, 0.5)
    expected = model.weight.detach().clone()
    assert torch.equal(ps.stored(model, "weight") * ps.mask_of(model, "weight"), expected)
    ps.squash(model)
    assert type(model) is nn.Linear
    assert torch.equal(model.weight, expected)
    assert isinstance(model.weight, nn.Parameter)
    assert model.weight.requires_grad


def test_unsparsify_leaves_what_lies_underneath_to_torch():
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    dense = model.weight.detach().clone()
    ps.unsparsify(ps.sparsify(model, 0.5))
    assert torch.equal(model.weight, dense)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is nn.Linear
    torch.testing.assert_close(model.weight, dense)


def test_masks_of_torch_prune_are_taken_over():
    model = nn.Linear(4, 4)
    weight = model.weight
    prune.l1_unstructured(model, "weight", amount=0.5)
    mask = model.weight_mask.bool()
    before = weight.detach().clone()
    ps.sparsify(model, "zeros")
    assert torch.equal(ps.mask_of(model, "weight"), mask)
    assert ps.stored(model, "weight") is weight
    assert torch.equal(weight, before)
    assert not model._forward_pre_hooks
    ps.sparsify(model, 0.25)
    assert int(ps.mask_of(model, "weight").sum()) == 12
    ps.squash(model)
    assert set(model.state_dict()) == {"weight", "bias"}
    assert model.weight is weight


def test_ema_models_follow_and_their_masks_are_their_own():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        ps.stored(model, "weight").add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    mask = ps.mask_of(average, "weight")
    assert mask is not ps.mask_of(model, "weight")
    assert not average.module.weight[~mask].any()
    ps.squash(average)
    assert type(average.module) is nn.Linear


def test_a_parameter_called_keys_can_be_masked():
    model = ps.sparsify(OddNames(), {"keys": 0.5, "values": 0.5})
    assert parametrize.is_parametrized(model, "keys")
    assert set(dict(ps.squash(model).named_parameters())) >= {"keys"}


class WithCustomCopies(nn.Linear):
    """As many libraries write __deepcopy__ and __reduce__."""

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce__(self):
        return _rebuild, (self.in_features, self.out_features), self.__dict__


def _rebuild(*args):
    return WithCustomCopies(*args)


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class Concrete(Abstract):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("build", [lambda: WithCustomCopies(4, 4), Concrete], ids=["custom", "abc"])
def test_classes_that_copy_and_build_their_own_way_work(build):
    model = ps.sparsify(build(), 0.5)
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert type(twin) is type(model)
        ps.squash(twin)
    assert int((model.weight != 0).sum()) == 8


def test_a_class_put_on_top_stays():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    model.__class__ = type("Noted", (type(model),), {"note": "kept"})
    expected = model.weight.detach().clone()
    ps.squash(model)
    assert type(model).__name__ == "Noted"
    assert type(model).__mro__[1] is nn.Linear
    assert model.note == "kept"
    assert torch.equal(model.weight, expected)


class Delegating(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x @ self.weight)


class ReadOnly(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["sealed"] = True

    def __setattr__(self, name, value):
        if "sealed" in self.__dict__:
            raise AttributeError(f"read only: {name}")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "build", [Delegating, lambda: ReadOnly(4, 4)], ids=["delegating", "sealed"]
)
def test_classes_with_attribute_access_of_their_own_work(build):
    model, x = build(), torch.randn(2, 4)
    weight = model.weight
    ps.sparsify(model, {"weight": 0.5})
    expected = model(x)
    ps.squash(model)
    assert model.weight is weight
    assert torch.equal(model(x), expected)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in build().named_parameters()]


def test_a_stock_registration_leaves_siblings_whose_attribute_is_plain():
    class Maybe(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.bias = nn.Parameter(torch.zeros(4)) if bias else None

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    one, two = (ps.sparsify(Maybe(bias), {"weight": 0.5}) for bias in (True, False))
    x = torch.randn(2, 4)
    expected = two(x)
    parametrize.register_parametrization(one, "bias", Half())
    assert torch.equal(two(x), expected)
    two.bias = None
    assert torch.equal(two(x), expected)


def test_prune_at_one_place_of_a_tie_is_refused():
    model = Tied()
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    with pytest.raises(ValueError, match="prune.remove"):
        ps.sparsify(model, {"head.weight": "zeros"})
    assert prune.is_pruned(model)


def test_a_submodule_called_parametrizations_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.parametrizations = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

    model = Own()
    with pytest.raises(ValueError, match="parametrizations"):
        ps.sparsify(model, {"weight": 0.5})
    assert not ps.is_sparse(model)
