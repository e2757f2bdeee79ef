"""States and copies of data sparsifiers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tests.helpers.data_sparsifiers import FirstRow


def three():
    return FirstRow(
        [("x", torch.randn(3, 2)), ("y", nn.Parameter(torch.randn(4))), ("z", torch.ones(2, 2))],
        level=0.5,
    )


def check_equal(one, two):
    assert one.data_groups == two.data_groups
    assert one.state.keys() == two.state.keys()
    for name in one.state:
        assert torch.equal(one.get_mask(name), two.get_mask(name))
        read = [s.get_data(name, return_original=False) for s in (one, two)]
        assert torch.equal(*read)
        masked = [is_parametrized(s._container, name) for s in (one, two)]
        assert masked[0] == masked[1]
        if masked[0]:
            assert torch.equal(one.get_data(name), two.get_data(name))
            assert two._container.parametrizations[name][0].mask is two.get_mask(name)
        rest = [{k: v for k, v in s.state[name].items() if k != "mask"} for s in (one, two)]
        assert rest[0] == rest[1]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own
def test_the_state_goes_into_a_file_and_another_sparsifier(tmp_path):
    one = three()
    one.step()
    one.squash_mask(names=["z"])
    state = one.state_dict()
    assert state.keys() == {"state", "data_groups", "_container"}
    assert all(held["mask"].is_sparse for held in state["state"].values())
    torch.save(state, tmp_path / "state.pt")
    two = FirstRow([("x", torch.zeros(3, 2)), ("gone", torch.zeros(2))], other=1)
    mine = two.get_data("x")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    check_equal(one, two)
    assert two.get_data("x") is mine  # still the user's own
    two.step()
    assert one.state["x"]["step_count"] == 1  # nothing is shared
    assert state["state"]["x"]["step_count"] == 1


def test_loading_without_strict_merges_and_the_loaded_wins():
    one, two = three(), FirstRow([("x", torch.zeros(3, 2)), ("own", torch.zeros(2))])
    one.step()
    two.load_state_dict(one.state_dict(), strict=False)
    assert two.data_groups.keys() == {"x", "y", "z", "own"}
    assert torch.equal(two.get_data("x"), one.get_data("x"))
    assert torch.equal(two.get_mask("x"), one.get_mask("x"))
    assert two.get_mask("own").all()
    two.load_state_dict(one.state_dict())
    assert two.data_groups.keys() == {"x", "y", "z"}


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: s["data_groups"].pop("x"),
        lambda s: s["_container"].pop("parametrizations.x.original"),
        lambda s: s["state"].pop("x"),
        lambda s: s["state"]["x"].pop("mask"),
        lambda s: s["_container"].update(x2=torch.ones(2)),
    ],
)
def test_an_inconsistent_state_is_refused_and_changes_nothing(broken):
    one, two = three(), three()
    one.step()
    state = one.state_dict()
    broken(state)
    before = copy.deepcopy(two)
    with pytest.raises(RuntimeError, match="Error loading x"):
        two.load_state_dict(state)
    check_equal(before, two)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_keep_everything(duplicate):
    one = three()
    one.step()
    one.squash_mask(names=["z"])
    one.enable_mask_update = False
    two = duplicate(one)
    check_equal(one, two)
    assert (two.before, two.enable_mask_update, two.defaults) == ("kept", False, {"level": 0.5})
    two.enable_mask_update = True
    two.step()
    assert one.state["x"]["step_count"] == 1
    assert "x: level=0.5" in repr(two)


class Scaled(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.mask * self.scale


def test_loading_reaches_the_users_tensor_of_another_dtype_and_what_a_parametrization_holds():
    one = FirstRow([("x", torch.full((2, 2), 3.0))])
    one.add_data("y", torch.ones(2), parametrization=Scaled)
    one._container.parametrizations.y[0].scale.data.fill_(5.0)
    table = nn.Embedding(2, 2).double()
    two = FirstRow([("x", table), ("y", torch.zeros(2))])
    two.data_groups["y"]["parametrization"] = Scaled
    two.load_state_dict(one.state_dict())
    assert two.get_data("x") is table.weight
    assert (table.weight == 3).all()
    assert two.get_data("y", return_original=False).tolist() == [5, 5]


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: s.pop("state"),
        lambda s: s.pop("data_groups"),
        lambda s: s["state"]["x"].update(mask=torch.ones(5)),
        lambda s: s["_container"].update({"x": s["_container"].pop("parametrizations.x.original")}),
    ],
)
def test_other_inconsistent_states(broken):
    one = FirstRow([("x", torch.ones(2))])
    state = one.state_dict()
    state["state"]["x"]["mask"] = torch.ones(3)
    broken(state)
    with pytest.raises(RuntimeError, match="Error loading"):
        FirstRow().load_state_dict(state)


def test_copies_of_computed_data_and_bound_steps():
    weight = nn.Parameter(torch.ones(3, 2))
    sparsifier = FirstRow([("x", weight * 2)])
    sparsifier.step = lambda: "mine"
    other = copy.deepcopy(sparsifier)
    assert other.step() == "mine"
    assert other.get_data("x").tolist() == [[2, 2], [2, 2], [2, 2]]
