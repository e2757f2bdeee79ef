"""The contract of torch.ao.pruning's BaseDataSparsifier, held by ours."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import parasparse as ps
from parasparse import BaseDataSparsifier
from tests.helpers.data_sparsifiers import FirstRow


class Threshold(BaseDataSparsifier):
    def update_mask(self, name, data, threshold):
        self.get_mask(name)[data.abs() < threshold] = 0


class Table(nn.Embedding):
    """A subclass."""


KINDS = {
    "tensor": lambda: torch.randn(3, 4),
    "vector": lambda: torch.randn(5),
    "five dimensions": lambda: torch.randn(3, 2, 1, 4, 2),
    "half": lambda: torch.randn(3, 4).to(torch.bfloat16),
    "complex": lambda: torch.randn(3, 4, dtype=torch.complex64),
    "integers": lambda: torch.randint(1, 9, (3, 4)),
    "parameter": lambda: nn.Parameter(torch.randn(3, 4)),
    "embedding": lambda: nn.Embedding(5, 4),
    "bag": lambda: nn.EmbeddingBag(5, 4),
    "subclass": lambda: Table(5, 4),
}


all_kinds = pytest.mark.parametrize("kind", KINDS)


def weight_of(data):
    return data.weight if isinstance(data, nn.Module) else data


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@all_kinds
def test_data_goes_in_and_its_mask_is_all_ones(kind):
    data = KINDS[kind]()
    sparsifier = FirstRow([("x", data)], level=0.5)
    assert sparsifier.data_groups["x"] == {"level": 0.5}
    assert sparsifier.get_data("x") is weight_of(data)
    assert torch.equal(sparsifier.get_data("x", return_original=False), weight_of(data))
    mask = sparsifier.get_mask("x")
    assert mask.mean() == 1
    assert mask.dtype == weight_of(data).dtype or kind in ("complex", "integers")
    assert is_parametrized(sparsifier._container, "x")
    assert sparsifier._container.parametrizations.x[0].mask is mask is sparsifier.state["x"]["mask"]
    assert torch.equal(sparsifier._container.x, weight_of(data))
    assert sparsifier.before == "kept"


@all_kinds
def test_steps_change_masks_and_not_data(kind):
    data = KINDS[kind]()
    before = weight_of(data).detach().clone()
    sparsifier = FirstRow([("x", data)])
    for _ in range(3):
        sparsifier.step()
    masked = sparsifier.get_data("x", return_original=False)
    assert not masked[0].any()
    assert torch.equal(masked[1:], before[1:])
    assert torch.equal(weight_of(data), before)
    assert sparsifier.state["x"]["step_count"] == 3
    assert not sparsifier.state["x"]["mask"].requires_grad


@all_kinds
def test_squashing_writes_into_the_users_own_tensor(kind):
    data = KINDS[kind]()
    pointer, before = weight_of(data).data_ptr(), weight_of(data).detach().clone()
    sparsifier = FirstRow([("x", data), ("y", torch.ones(2, 2))])
    sparsifier.step()
    sparsifier.squash_mask(names=["x"])
    assert weight_of(data).data_ptr() == pointer
    assert not weight_of(data)[0].any()
    assert torch.equal(weight_of(data)[1:], before[1:])
    assert not is_parametrized(sparsifier._container, "x")
    assert is_parametrized(sparsifier._container, "y")
    with pytest.raises(ValueError, match="was squashed"):
        sparsifier.get_data("x")
    assert torch.equal(sparsifier.get_data("x", return_original=False), weight_of(data))
    assert "x" in sparsifier.data_groups
    assert sparsifier.get_mask("x")[0].sum() == 0
    sparsifier.step()  # of what is masked still
    assert (sparsifier.state["x"]["step_count"], sparsifier.state["y"]["step_count"]) == (1, 2)
    sparsifier.squash_mask()
    assert not sparsifier.get_data("y", return_original=False)[0].any()
    with pytest.raises(ValueError, match="was squashed"):
        sparsifier.squash_mask(names="x")


def test_squashing_may_leave_the_data_as_it_is():
    data = torch.ones(2, 2)
    sparsifier = FirstRow([("x", data)])
    sparsifier.step()
    sparsifier.squash_mask("ignored", leave_parametrized=False, also="ignored")
    assert data.all()


def test_a_failed_squash_changes_nothing():
    good, bad = torch.ones(2, 2), torch.ones(1, 2).expand(2, 2)
    sparsifier = FirstRow([("good", good), ("bad", bad)])
    sparsifier.step()
    for names, error in [(["good", "bad"], RuntimeError), (["good", "none"], ValueError)]:
        with pytest.raises(error):
            sparsifier.squash_mask(names=names)
        assert good.all()
        assert is_parametrized(sparsifier._container, "good")


@pytest.mark.parametrize("kind", ["tensor", "parameter", "embedding", "complex"])
def test_changes_outside_show_inside(kind):
    data = KINDS[kind]()
    sparsifier = FirstRow([("x", data)])
    weight = weight_of(data)
    weight.data = weight + 1
    assert torch.equal(sparsifier.get_data("x"), weight)
    assert sparsifier.get_data("x").data_ptr() == weight.data_ptr()
    assert torch.equal(sparsifier.get_data("x", return_original=False), weight)


def test_a_new_name_gets_the_defaults_and_what_is_given():
    sparsifier = FirstRow(level=0.5, shape=(1, 4))
    out = sparsifier.add_data("x", torch.ones(2), level=0.3, more="yes")
    assert out.tolist() == [1, 1]
    assert sparsifier.data_groups == {"x": {"level": 0.3, "shape": (1, 4), "more": "yes"}}
    sparsifier.step()
    assert sparsifier.state["x"]["seen"] == {"level": 0.3, "shape": (1, 4), "more": "yes"}


def test_a_known_name_keeps_its_configuration_and_mask():
    sparsifier = FirstRow(level=0.5)
    first = torch.ones(3, 2)
    sparsifier.add_data("x", first, level=0.3)
    sparsifier.step()
    mask = sparsifier.get_mask("x").clone()
    with pytest.warns(UserWarning, match="Replacing existing data of the same name"):
        out = sparsifier.add_data("x", torch.full((3, 2), 7.0))
    assert out.tolist() == [[0, 0], [7, 7], [7, 7]]
    assert first.all()
    assert torch.equal(sparsifier.get_mask("x"), mask)
    assert sparsifier.data_groups["x"] == {"level": 0.3}
    assert sparsifier.state["x"]["step_count"] == 1
    with pytest.warns(UserWarning, match="Replacing"):
        sparsifier.add_data("x", torch.ones(3, 2), reuse_mask=False, level=0.1, other=1)
    assert sparsifier.get_mask("x").all()
    assert sparsifier.data_groups["x"] == {"level": 0.1, "other": 1}
    assert "step_count" not in sparsifier.state["x"]


def test_a_smaller_last_batch_is_named():
    sparsifier = FirstRow([("batch", torch.ones(4, 2))])
    with pytest.raises(AssertionError, match=r"reuse_mask=False.*drop_last=True"):
        sparsifier.add_data("batch", torch.ones(3, 2))
    assert sparsifier.get_data("batch").shape == (4, 2)
    with pytest.warns(UserWarning, match="Replacing"):
        sparsifier.add_data("batch", torch.ones(3, 2), reuse_mask=False)


class Halves(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask / 2


def test_mask_and_parametrization_are_special():
    mask = torch.tensor([1.0, 0.0])
    sparsifier = FirstRow()
    out = sparsifier.add_data("x", torch.ones(2), mask=mask, parametrization=Halves, level=1)
    assert out.tolist() == [0.5, 0]
    assert sparsifier.get_mask("x") is mask
    assert sparsifier.data_groups["x"].keys() == {"mask", "parametrization", "level"}
    sparsifier.step()
    assert sparsifier.state["x"]["seen"] == {"level": 1}
    with pytest.raises(ValueError, match="`mask` must be a tensor of shape"):
        sparsifier.add_data("y", torch.ones(2), mask=torch.ones(3))
    assert "y" not in sparsifier.data_groups


def test_every_way_to_change_a_mask_in_place_acts():
    sparsifier = Threshold(threshold=0.2)
    x = torch.ones(20, 2)
    sparsifier.add_data("x", x)
    mask = sparsifier.get_mask("x")
    mask[:10] = torch.zeros(10, 2)
    assert sparsifier.get_data("x", return_original=False).sum() == 20
    mask *= torch.zeros(20, 2)
    assert sparsifier.get_data("x", return_original=False).sum() == 0
    for dtype in (torch.float, torch.int8, torch.bool, torch.double):
        mask.data = torch.ones(20, 2, dtype=dtype)
        out = sparsifier.get_data("x", return_original=False)
        assert out.dtype == x.dtype
        assert torch.equal(out, x)
    mask.data = torch.ones(2)
    with pytest.raises(ValueError, match="must keep the shape of its data"):
        sparsifier.get_data("x", return_original=False)


def test_what_is_no_data_or_no_name_is_refused():
    sparsifier = FirstRow()
    for data in (nn.Linear(2, 2), [1.0], 3, None):
        with pytest.raises(TypeError, match="`data` must be"):
            sparsifier.add_data("x", data)
    with pytest.raises(ValueError, match="must not be empty or contain a dot"):
        sparsifier.add_data("layer.weight", torch.ones(2))
    with pytest.raises(ValueError, match="must not be empty or contain a dot"):
        sparsifier.add_data("", torch.ones(2))
    with pytest.raises(TypeError, match="must be a string"):
        sparsifier.add_data(3, torch.ones(2))
    masked = ps.sparsify(nn.Embedding(4, 3), {"weight": 0.5})
    with pytest.raises(ValueError, match="must not be parametrized"):
        sparsifier.add_data("x", masked)
    for call in (sparsifier.get_mask, sparsifier.get_data):
        with pytest.raises(ValueError, match="there is no data named"):
            call("nothing")
    assert not sparsifier.data_groups
    with pytest.raises(NotImplementedError):
        sparsifier.prepare(nn.Linear(2, 2), None)
    with pytest.raises(TypeError, match="abstract"):
        BaseDataSparsifier()


@pytest.mark.parametrize("name", ["forward", "keys", "training", "mask", "parametrizations", "_x"])
def test_any_name_will_do(name):
    data = torch.ones(2, 2)
    sparsifier = FirstRow([(name, data)])
    sparsifier.step()
    assert sparsifier.get_data(name) is data
    assert sparsifier.get_data(name, return_original=False).tolist() == [[0, 0], [1, 1]]
    other = FirstRow()
    other.load_state_dict(sparsifier.state_dict())
    assert other.get_data(name, return_original=False).tolist() == [[0, 0], [1, 1]]
    sparsifier.squash_mask()
    assert data.tolist() == [[0, 0], [1, 1]]


def test_nothing_happens_while_updates_are_off():
    sparsifier = FirstRow([("x", torch.ones(2))])
    sparsifier.enable_mask_update = False
    sparsifier.step()
    assert sparsifier.get_mask("x").all()


def test_gradients_pass_through_what_is_kept():
    weight = nn.Parameter(torch.ones(3))
    sparsifier = FirstRow([("x", weight)])
    sparsifier.step()
    sparsifier.get_data("x", return_original=False).sum().backward()
    assert weight.grad.tolist() == [0, 1, 1]


def test_batches_leave_nothing_behind():
    sparsifier = FirstRow([("batch", torch.ones(4, 2))])
    gone = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(50):
            batch = torch.randn(4, 2)
            gone.append(weakref.ref(batch))
            sparsifier.add_data("batch", batch)
            sparsifier.step()
    del batch
    gc.collect()
    assert sum(ref() is not None for ref in gone) == 1
    assert sparsifier.state["batch"]["step_count"] == 50


def test_data_that_share_memory_are_squashed_one_by_one():
    table = nn.Embedding(4, 3)
    head = nn.Linear(3, 4)
    head.weight = table.weight
    sparsifier = FirstRow([("table", table), ("head", head.weight)])
    sparsifier.get_mask("table")[0] = 0
    sparsifier.get_mask("head")[3] = 0
    sparsifier.squash_mask()
    assert [bool(row.any()) for row in table.weight] == [False, True, True, False]


def test_a_default_mask_is_a_copy_for_each():
    sparsifier = FirstRow(mask=torch.tensor([1.0, 0.0]))
    for name in ("a", "b"):
        sparsifier.add_data(name, torch.ones(2))
    sparsifier.get_mask("a")[:] = 0
    assert sparsifier.get_mask("b").tolist() == [1, 0]
    assert sparsifier.defaults["mask"].tolist() == [1, 0]
    with pytest.warns(UserWarning, match="Replacing"):
        sparsifier.add_data("a", torch.ones(2), reuse_mask=False)
    assert sparsifier.get_mask("a").all()


class Mine(torch.Tensor):
    """A subclass."""


def test_subclasses_and_inference_mode_have_plain_masks():
    data = torch.ones(2, 2).as_subclass(Mine)
    with torch.inference_mode():
        sparsifier = FirstRow([("x", data)])
    assert type(sparsifier.get_mask("x")) is torch.Tensor
    sparsifier.step()
    sparsifier.state_dict()
    assert not sparsifier.get_data("x", return_original=False)[0].any()


def test_an_error_in_update_mask_names_the_data():
    class Broken(BaseDataSparsifier):
        def update_mask(self, name, data):
            raise KeyError("oops")

    with pytest.raises(KeyError) as caught:
        Broken([("x", torch.ones(2))]).step()
    assert 'while updating the mask of "x"' in caught.value.__notes__


def test_parametrizations_is_a_name_like_any_other():
    sparsifier = FirstRow([("parametrizations", torch.ones(2)), ("x", torch.ones(2))])
    for name in ("parametrizations", "x"):
        assert is_parametrized(sparsifier._container, name)


def test_a_mask_of_float8_acts():
    sparsifier = FirstRow([("x", torch.ones(2))])
    sparsifier.get_mask("x").data = torch.tensor([1.0, 0.0]).to(torch.float8_e4m3fn)
    assert sparsifier.get_data("x", return_original=False).tolist() == [1, 0]
