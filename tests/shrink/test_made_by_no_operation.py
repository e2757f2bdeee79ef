"""Tensors that no operation of torch makes are no constants: copies, other objects, memory."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import parasparse as ps


def through_data(x):
    other = torch.empty_like(x)
    other.data = x.detach()
    return other


def through_set(x):
    return x.new_empty(0).set_(x.detach().clone())


def through_thread(x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: 2 * x).result()


FOLLOWED = {
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "copy": lambda x: copy.copy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "subclass": lambda x: x.as_subclass(torch.Tensor),
    "data": through_data,
    "set": through_set,
    "parameter": nn.Parameter,
    "parameter of data": lambda x: nn.Parameter(data=2 * x.detach(), requires_grad=False),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "list": lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
}
NOT_FOLLOWED = {
    "dlpack": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())),
    "thread": through_thread,
}


class Through(nn.Module):
    """Its input, or what the first layer gives, goes through a function."""

    def __init__(self, function, *, hidden):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
        self.function, self.hidden = function, hidden
        self.double().eval()
        with torch.no_grad():
            self.first.weight[:4], self.first.bias[:4] = 0, 0

    def forward(self, x):
        if self.hidden:
            return self.last(self.function(self.first(x)).tanh())
        return self.last(self.first(self.function(x)).tanh())


def inputs():
    return torch.randn(1, 6, dtype=torch.double)


def assert_equal(small, model, x):
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize(
    "function", (FOLLOWED | NOT_FOLLOWED).values(), ids=FOLLOWED | NOT_FOLLOWED
)
def test_copies_of_the_input_are_no_constants(function):
    model, x = Through(function, hidden=False), inputs()
    small = ps.shrink(copy.deepcopy(model), inputs())
    assert small.first.out_features == 4
    assert_equal(small, model, x)


@pytest.mark.parametrize("function", FOLLOWED.values(), ids=FOLLOWED)
def test_channels_that_go_through_copies_stay_equal(function):
    model, x = Through(function, hidden=True), inputs()
    with torch.no_grad():
        model.last.weight[:, 6:] = 0
    small = copy.deepcopy(model)
    if ps.plan_shrink(small, inputs()).rows:
        ps.shrink(small, inputs())
    assert_equal(small, model, x)


@pytest.mark.parametrize("function", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_channels_that_cannot_be_followed_are_refused(function):
    model = Through(function, hidden=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the smaller network"):
        ps.shrink(model, inputs())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@dataclass
class Batch:
    images: torch.Tensor


CLONED = {
    "deepcopy": lambda layer, x: copy.deepcopy(layer)(x),
    "deepcopy of two": lambda layer, x: copy.deepcopy(nn.ModuleList([layer, layer]))[1](x),
    "deepcopy of a weight": lambda layer, x: x @ copy.deepcopy(layer.weight).mT,
    "copy": lambda layer, x: copy.copy(layer)(x),
    "copy of a copy": lambda layer, x: x @ copy.deepcopy(copy.copy(layer.weight)).mT,
    "other Parameter": lambda layer, x: x @ nn.Parameter(2 * layer.weight).mT,
    "data": lambda layer, x: x @ layer.weight.data.mT + layer.bias.data,
    "part of data": lambda layer, x: x @ layer.weight.data[:].mT,
}


class Clones(Through):
    """A layer between the two others is not called itself."""

    def __init__(self, clone):
        super().__init__(None, hidden=False)
        self.middle, self.clone = nn.Linear(8, 8).double(), clone
        with torch.no_grad():
            self.middle.weight[:2], self.middle.bias[:2] = 0, 0

    def forward(self, x):
        return self.last(self.clone(self.middle, self.first(x).tanh()).tanh())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clone", CLONED.values(), ids=CLONED)
def test_channels_go_through_copies_of_layers(clone, masked):
    model, x = Clones(clone), inputs()
    if masked:
        masks = {name: tensor != 0 for name, tensor in model.named_parameters()}
        ps.sparsify(model, {name: mask for name, mask in masks.items() if not mask.all()})
    small = ps.shrink(copy.deepcopy(model), x)
    assert (small.first.out_features, small.middle.out_features) == (4, 6)
    assert_equal(small, model, x)


def test_what_is_pickled_stays():
    model, x = Clones(lambda layer, x: pickle.loads(pickle.dumps(layer))(x)), inputs()
    plan = ps.plan_shrink(model, x)
    assert not plan.rows
    assert all("whose size stays" in row.reason for row in plan.kept_back)


class OfBatches(Through):
    def forward(self, batch):
        return super().forward(batch.images)


class Recurrent(Through):
    """Keeps its last output in an attribute, which the next call reads."""

    def forward(self, x):
        x = super().forward(x + self.last_output.repeat(1, 3))
        self.last_output = x.detach()
        return x


def test_tensors_in_objects_are_no_constants():
    model, x = OfBatches(lambda x: x, hidden=False), Batch(inputs())
    small = ps.shrink(copy.deepcopy(model), Batch(inputs()))
    assert small.first.out_features == 4
    assert_equal(small, model, x)


def test_attributes_that_are_tensors_are_no_constants():
    model, x = Recurrent(lambda x: 0 * x, hidden=False), inputs()
    model.last_output = torch.randn(1, 2, dtype=torch.double)
    small = ps.shrink(copy.deepcopy(model), inputs())
    for _ in range(3):
        assert_equal(small, model, x)


def replaces(module, value):
    module.state = value


CHANGES = {
    "copy_": lambda module, value: module.state.copy_(value),
    "in place": lambda module, value: module.state.mul_(0.5).add_(value),
    "data": lambda module, value: setattr(module.state, "data", value),
    "a part": lambda module, value: module.state[:, :1].copy_(value[:, :1]),
    "into data": lambda module, value: module.state.data.mul_(0.5).add_(value),
    "a part of data": lambda module, value: module.state.data[:, :1].copy_(value[:, :1]),
    "list": lambda module, value: torch._foreach_copy_([module.state], [value]),
    "array": lambda module, value: np.copyto(module.state.numpy(), value.numpy()),
    "replaced": replaces,
}


class WithState(nn.Module):
    """A buffer holds what the last call gave."""

    def __init__(self, change):
        super().__init__()
        self.first, self.again = nn.Linear(6, 8), nn.Linear(4, 8, bias=False)
        self.last, self.change = nn.Linear(8, 4), change
        self.register_buffer("state", torch.randn(1, 4))
        self.double().eval()
        with torch.no_grad():
            self.first.weight[:4] = 0  # what is left of these units depends on the state alone
            self.first.bias[:2], self.again.weight[:2] = 0, 0

    def forward(self, x):
        x = self.last((self.first(x) + self.again(self.state)).tanh())
        self.change(self, x.detach())
        return x


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_buffers_that_each_call_changes_are_no_constants(change):
    model = WithState(change)
    small = ps.shrink(copy.deepcopy(model), inputs())
    assert small.first.out_features == 6
    with torch.no_grad():
        for x in (inputs(), inputs(), inputs()):
            torch.testing.assert_close(small(x), model(x))


class Remembers(nn.Module):
    """Adds hidden channels to those of the last call, and keeps the sum in the place of them."""

    def __init__(self, *, buffer):
        super().__init__()
        self.first, self.again = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 2)
        self.register_buffer("state", None)
        if not buffer:
            del self.state
        self.state = torch.zeros(1, 8)
        self.double().eval()
        with torch.no_grad():
            self.first.weight[:4], self.first.bias[:4], self.again.weight[:4] = 0, 0, 0

    def forward(self, x):
        self.state = self.first(x) + self.again(self.state.to(x))
        return self.last(self.state.tanh())


@pytest.mark.parametrize("buffer", [True, False])
def test_channels_that_the_next_call_reads_stay(buffer):
    model = Remembers(buffer=buffer)
    assert not ps.plan_shrink(model, inputs()).rows
    units = ps.coupled(model, inputs())
    assert not any(units.reaches(name, model, each) for name, each in model.named_parameters())


class Caches(nn.Module):
    """Attention over the keys and values of earlier calls, which buffers hold."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("keys", torch.zeros(1, 10, 2, 4))
        self.register_buffer("values", torch.zeros(1, 10, 2, 4))
        self.double().eval()

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)) for layer in (self.q, self.k, self.v))
        self.keys[:, : k.shape[1]], self.values[:, : v.shape[1]] = k, v
        q, k, v = (t.transpose(1, 2) for t in (q, self.keys, self.values))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


def test_heads_stay_whose_keys_a_buffer_holds():
    model, x = Caches(), torch.randn(1, 5, 8, dtype=torch.double)
    units = ps.coupled(model, x)
    assert not any(units.reaches(name, model, each) for name, each in model.named_parameters())
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[:4], layer.bias[:4] = 0, 0
        model.out.weight[:, :4] = 0
    plan = ps.plan_shrink(model, x)
    assert not plan.rows
    reasons = {row.name: row.reason for row in plan.kept_back}
    assert reasons["k.weight"] == '"keys" holds what the last call has put there'
    assert reasons["v.weight"].endswith("holds what the last call has put there")


class Shows(Through):
    """Keeps its hidden channels for whoever wants to look at them."""

    def forward(self, x):
        self.seen = self.first(x).detach()
        return self.last(self.seen.tanh())


def test_activations_that_a_model_keeps_for_others_may_go():
    model = Shows(None, hidden=True)
    model(inputs())
    assert ps.shrink(model, inputs()).first.out_features == 4
