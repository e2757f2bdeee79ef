"""Checkpoints of dense, masked and compact models load into each other."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import parasparse as ps
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl


def dense(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).double()


def masked(sparsity=0.5, seed=0):
    return ps.sparsify(dense(seed), sparsity)


def compact(sparsity=0.5, seed=0):
    return ps.compact(masked(sparsity, seed))


def pruned():
    model = dense(1)
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.8)
    return model


def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


# Each of the same network, with 80 % zeros. Models that they load into have 50 %.
SAVED = {
    "compact": lambda: compact(0.8, 1),
    "masked": lambda: masked(0.8, 1),
    "torch prune": pruned,
    "dense": lambda: ps.squash(masked(0.8, 1)),
}
MODELS = {"compact": compact, "masked": masked, "dense": dense}


def load(model, state, by, assign):
    if by == "torch":
        return model.load_state_dict(state, assign=assign)
    return ps.load_state_dict(model, state, assign=assign)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("by", ["torch", "parasparse"])
@pytest.mark.parametrize("into", MODELS)
@pytest.mark.parametrize("saved", SAVED)
def test_every_checkpoint_loads_strictly_into_every_model(saved, into, by, assign):
    source, model = SAVED[saved](), MODELS[into]()
    if by == "torch" and into == "dense" and saved != "dense":
        pytest.skip("torch does not know masks")
    state = source.state_dict()
    before = copy.deepcopy(state)
    load(model, state, by, assign)
    assert all(value.equal(before[key]) for key, value in state.items())
    mask = dict(ps.named_masks(MODELS[into]()))
    for number in (0, 2):
        want = source[number].weight.detach() * 1
        if saved == "dense" and into != "dense":  # the places stay
            want = torch.where(mask[f"{number}.weight"], want, 0)
        assert (model[number].weight.detach() * 1).equal(want)
    model(x()).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    if into == "compact":
        values = model[0].parametrizations.weight.original
        kept = 54 if saved == "dense" else 22
        assert values.shape == (kept,)
        assert ps.expand(model)[0].parametrizations.weight.original.shape == (4, 3, 3, 3)


def test_a_loaded_model_shares_nothing_with_its_checkpoint():
    model, other = compact(0.8, 1), compact()
    other.load_state_dict(model.state_dict())
    own = {t.data_ptr() for t in (*other.parameters(), *other.buffers())}
    assert not own & {t.data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_the_parameter_stays_the_same_object():
    model = compact()
    values = model[0].parametrizations.weight.original
    model(x()).sum().backward()
    model.load_state_dict(SAVED["masked"]().state_dict())
    assert model[0].parametrizations.weight.original is values
    assert values.shape == (22,)
    assert values.grad is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def tied(share, seed):
    torch.manual_seed(seed)
    return ps.compact(ps.sparsify(Tied(), {"embedding.weight": share}))


def test_ties_stay_one_parameter_with_one_set_of_places():
    model, source = tied(0.5, 0), tied(0.8, 1)
    model.load_state_dict(source.state_dict())
    for each in (model, copy.deepcopy(model)):
        one, two = each.embedding.parametrizations.weight, each.head.parametrizations.weight
        assert one.original is two.original
        assert one[0] is two[0]
        assert one[1] is two[1]
        assert len(list(ps.named_masks(each))) == 1
        tokens = torch.tensor([1, 5])
        assert each(tokens).equal(source(tokens))
        saved = {(t.data_ptr(), t.shape) for t in each.state_dict().values()}
        assert len(saved) == 3


def test_it_moves_to_meta_and_comes_back_with_the_values_of_a_checkpoint():
    model, want = compact(), compact(0.8, 1)
    for assign in (True, False):
        empty = copy.deepcopy(model).to("meta")
        assert empty(x().to("meta")).shape == (2, 5)
        if not assign:
            empty = empty.to_empty(device="cpu")
        empty.load_state_dict(want.state_dict(), assign=assign)
        assert empty(x()).equal(want(x()))


def test_an_optimizer_resumes_by_name():
    model = compact()
    optimizer = torch.optim.Adam(model.parameters())
    model(x()).sum().backward()
    optimizer.step()
    saved = ps.optim.named_state(model, optimizer)
    resumed = compact(0.8, 1)
    resumed.load_state_dict(model.state_dict())
    again = torch.optim.Adam(resumed.parameters())
    ps.optim.load_named_state(resumed, again, saved)
    for each, o in ((model, optimizer), (resumed, again)):
        o.zero_grad()
        each(x()).square().sum().backward()
        o.step()
    assert resumed(x()).equal(model(x()))


def test_packed_files_have_dense_values(tmp_path):
    model = compact()
    ps.save(model, tmp_path / "model.pt")
    state = ps.load_packed(tmp_path / "model.pt")
    assert state.keys() == dense().state_dict().keys()
    other = compact(seed=0)
    other.load_state_dict(state)
    assert other(x()).equal(model(x()))


INSIDE = "2.parametrizations.weight."
DAMAGED = {
    "another shape": {"2.weight": torch.zeros(5, 15)},
    "a value too few": {f"{INSIDE}original": torch.zeros(39)},
    "columns outside": {f"{INSIDE}0.columns": torch.full((40,), 16)},
    "columns twice": {f"{INSIDE}0.columns": torch.zeros(40, dtype=torch.int32)},
    "starts of another shape": {f"{INSIDE}0.starts": torch.zeros(7, dtype=torch.int32)},
    "starts that end early": {f"{INSIDE}0.starts": torch.zeros(6, dtype=torch.int32)},
}


@pytest.mark.parametrize("into", MODELS)
@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_an_error_and_the_weight_stays(name, into):
    model = MODELS[into]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = compact(0.5, 1).state_dict()
    if name == "another shape":
        state = {key: value for key, value in state.items() if not key.startswith(INSIDE)}
    with pytest.raises(RuntimeError, match=r"2\.(weight|parametrizations\.weight)"):
        ps.load_state_dict(model, {**state, **DAMAGED[name]})
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(now[key].equal(value) for key, value in before.items() if key.startswith("2.p"))


@pytest.mark.parametrize("mask", [None, torch.full((5, 16), 0.5)], ids=["unset", "real"])
def test_only_bool_masks_load_into_a_compact_model(mask):
    state = {**masked().state_dict(), f"{INSIDE}0.mask": mask}
    with pytest.raises(RuntimeError, match=r'"2.weight".*must be set and bool.*expand'):
        compact().load_state_dict(state)


def test_masks_are_not_multiplied_into_values_without_a_shape():
    with pytest.raises(ValueError, match=r'"2.weight" is compact.*dense_state_dict'):
        ps.binarize_masks(compact().state_dict(), {"2": torch.ones(5, 16)})
