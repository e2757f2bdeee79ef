"""The copy that is run is what `deepcopy` would make, whatever its modules hold."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.shrink.by_tensor import ByTensor
from parasparse.shrink.copies import shared_copy
from parasparse.shrink.late_values import LateValues
from parasparse.targets.tensors import tensors_of


class Layer(nn.Linear):
    """A layer with attributes of several kinds."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(2))
        self.values, self.none = [1, {"a": torch.ones(2)}], None
        self.empty = OrderedDict()


class OwnCopy(Layer):
    def __deepcopy__(self, memo):
        twin = memo[id(self)] = type(self)()
        twin.note = "its own copy"
        return twin


class OwnState(Layer):
    def __getstate__(self):
        return {**vars(self), "note": "its own state"}


class OwnReduce(Layer):
    def __reduce_ex__(self, protocol):
        return type(self), ()


@pytest.mark.parametrize(
    ("kind", "masked"),
    [(Layer, False), (Layer, True), (OwnState, False), (OwnState, True), (OwnCopy, False),
     (OwnReduce, False)],
)  # fmt: skip
def test_a_copy_is_what_deepcopy_makes(kind, masked):
    model = nn.Sequential(kind(), kind())
    model.layers = [model[0]]  # a module that is found in two ways
    object.__setattr__(model[1], "parent", model)
    object.__setattr__(model[1], "state", (model[0].values, model[0].empty))
    if masked:
        ps.sparsify(model, {"1": 0.5})
    torch.manual_seed(0)
    want = ps.squash(copy.deepcopy(model)).eval()
    torch.manual_seed(0)
    twin = shared_copy(model, tensors_of(model, pairs=False), LateValues())
    assert twin is not model
    for got, expected in zip(twin, want, strict=True):
        assert type(got) is type(expected) is kind
        assert list(vars(got)) == list(vars(expected))
        assert getattr(got, "note", "") == getattr(expected, "note", "")
        assert not got.training
    assert twin.layers[0] is twin[0]
    same = hasattr(want[1], "parent")
    assert hasattr(twin[1], "parent") == same
    if same:
        assert twin[1].parent is twin
        assert twin[1].state[0] is twin[0].values
        assert twin[1].state[1] is twin[0].empty
    names = [name for name, _ in want.named_parameters()]
    assert [name for name, _ in twin.named_parameters()] == names
    twin[0].seen.add_(1)
    twin[0].values[1]["a"].add_(1)
    twin[0].empty["a"] = 1
    assert model[0].seen.sum() == 0
    assert model[0].values[1]["a"].sum() == 2
    assert not model[0].empty


def test_a_dict_by_tensors_forgets_those_that_are_gone():
    held, kept = ByTensor(), torch.ones(1)
    held[kept] = "kept"
    places = set()
    for number in range(50):
        gone = torch.ones(1)
        assert gone not in held
        held[gone] = number
        places.add(id(gone))
        del gone
    assert [value for _, value in held.items()] == ["kept"]
    assert held.get(kept) == held[kept] == "kept"
    assert held.get(torch.ones(1)) is None
    del held[kept]
    assert kept not in held
