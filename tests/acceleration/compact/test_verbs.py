"""Every verb treats a compact model as it treats the masked one, or names the way out."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()


def masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return ps.sparsify(model, 0.75)


def compact():
    return ps.compact(masked())


def facts(model):
    """Return what must not change when a call fails."""
    return repr(model), {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one, two):
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert all(value.equal(two[1][key]) for key, value in one[1].items())


def test_masks_are_read_as_from_the_masked_model():
    model, want = compact(), masked()
    read, wanted = dict(ps.named_masks(model)), dict(ps.named_masks(want))
    assert list(read) == list(wanted)
    assert all(mask.equal(wanted[name]) for name, mask in read.items())
    assert ps.mask_of(model, "0.weight").equal(wanted["0.weight"])
    assert ps.stored(model, "0.weight").equal(want[0].weight)
    assert ps.is_sparse(model)


def test_the_dense_state_is_that_of_the_masked_model():
    state, want = ps.dense_state_dict(compact()), ps.dense_state_dict(masked())
    assert list(state) == list(want)
    assert all(value.equal(want[key]) for key, value in state.items())


def test_the_summary_counts_the_bytes_that_there_are():
    model = compact()
    report, want = ps.summary(model, X), ps.summary(masked(), X)
    for row, other, layer in zip(report.rows, want.rows, (model[0], model[2]), strict=True):
        held = [*layer.parametrizations.parameters(), *layer.parametrizations.buffers()]
        assert row.bytes_now == sum(tensor.nbytes for tensor in held)
        same = "name shape pattern numel kept sparsity bytes_dense multiply_adds".split()  # noqa: SIM905
        assert [getattr(row, each) for each in same] == [getattr(other, each) for each in same]
    assert report.masked.kept == want.masked.kept == 18


def test_plots_show_the_masks():
    pytest.importorskip("matplotlib").use("Agg")
    assert len(ps.plot(compact()).axes) == len(ps.plot(masked()).axes)


@pytest.mark.parametrize("keep", [False, True])
def test_squash_gives_plain_weights_in_the_same_parameters(keep):
    model, want = compact(), ps.squash(masked())
    kept = [id(parameter) for parameter in model.parameters()]
    assert ps.squash(model, keep_parametrizations=keep) is model
    assert_same(facts(model), facts(want))
    assert sorted(map(id, model.parameters())) == sorted(kept)


def test_unsparsify_leaves_zeros_where_nothing_is_stored():
    model = ps.unsparsify(compact())
    assert_same(facts(model), facts(ps.squash(masked())))
    model(X).sum().backward()
    assert bool((model[2].weight.grad != 0).all())


def test_targets_choose_what_is_squashed():
    model = ps.squash(compact(), "0")
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in ps.named_masks(model)] == ["2.weight"]
    assert model[2].parametrizations.weight.is_compact


def test_binarize_has_nothing_to_do():
    model, want = compact(), facts(compact())
    assert ps.binarize(model) is model
    assert_same(facts(model), want)


def test_frozen_reads_the_same_weight_again():
    model = compact()
    with torch.no_grad(), ps.frozen(model):
        assert model[0].weight is model[0].weight
        torch.testing.assert_close(model(X), masked()(X))
        with pytest.raises(RuntimeError, match="must not be exported or traced"):
            torch.export.export(model, (X,))
    assert model(X).requires_grad


def collect(model):
    with ps.dense_gradients(model):
        model(X).sum().backward()


REFUSED = {
    "deploy_masks": lambda model: ps.deploy_masks(model, dict(ps.named_masks(masked()))),
    "sparsify": lambda model: ps.sparsify(model, 0.9),
    "plan": lambda model: ps.plan(model, 0.9),
    "a gate": lambda model: ps.sparsify(model, {"0": ps.Gate()}),
    "dense_gradients": collect,
    "accelerate": lambda model: ps.accelerate(model, X),
    "coupled": lambda model: ps.coupled(model, X),
    "plan_shrink": lambda model: ps.plan_shrink(model, X),
    "shrink": lambda model: ps.shrink(model, X),
    "a Parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(6, 8))),
    "a tie": lambda model: setattr(model[0], "weight", model[2].parametrizations.weight.original),
    "functional_call": lambda model: torch.func.functional_call(
        model, {"0.weight": torch.ones(6, 8).double()}, (X,)
    ),
    "in place": lambda model: model[0].weight.mul_(2),
    "DataParallel": lambda model: ps.squash(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_dense_weights_names_the_way_out(name):
    model = compact()
    before = facts(model)
    way_out = r"\.module" if name == "DataParallel" else "expand"
    with pytest.raises((RuntimeError, ValueError), match=way_out):
        REFUSED[name](model)
    assert_same(facts(model), before)
    torch.testing.assert_close(model(X), masked()(X))


def test_other_tensors_of_a_compact_model_can_be_masked_and_gated():
    model = ps.compact(masked(), "0")
    ps.sparsify(model, {"0.weight": None, "2": 0.5})
    ps.deploy_masks(model, {"2": torch.ones(4, 6)})
    assert int(ps.mask_of(model, "2.weight").sum()) == 24
    assert ps.stored(model, "0.weight").count_nonzero() == 12


def test_assigning_writes_to_the_kept_values():
    model, other, value = compact(), masked(), torch.randn(6, 8).double()
    model[0].weight = value
    other[0].weight = value
    assert (model[0].weight * 1).equal(other[0].weight)
    model[0].weight = model[0].weight
    assert (model[0].weight * 1).equal(other[0].weight)
    with pytest.raises(ValueError, match="must keep its shape"):
        model[0].weight = torch.ones(8, 6)
    with pytest.raises(RuntimeError, match="cannot be assigned a tensor that requires grad"):
        model[0].weight = torch.ones(6, 8).double().requires_grad_()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_re = nn.Parameter(torch.randn(4, 5))
        self.w_im = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return nn.functional.linear(x, self.w_re) - nn.functional.linear(x, self.w_im)


def test_a_real_and_an_imaginary_tensor_become_compact_together():
    torch.manual_seed(0)
    pair, x = ps.sparsify(Pair(), {"w": 0.5}), torch.randn(3, 5)
    model = ps.compact(copy.deepcopy(pair))
    assert [(name, int(mask.sum())) for name, mask in ps.named_masks(model)] == [("w", 10)]
    assert ps.stored(model, "w").equal(ps.stored(pair, "w") * ps.mask_of(pair, "w"))
    assert ps.summary(model).rows[0].kept == 20
    torch.testing.assert_close(model(x), pair(x))
    again = ps.compact(ps.sparsify(Pair(), {"w": 0.8}))
    again.load_state_dict(model.state_dict())
    assert again(x).equal(model(x))
    again.load_state_dict(pair.state_dict())
    assert again(x).equal(model(x))
    for way_back in (ps.expand, ps.squash):
        torch.testing.assert_close(way_back(copy.deepcopy(model))(x), pair(x))


OPTIMIZERS = {
    "one": lambda model: torch.optim.Adam(model.parameters()),
    "a list": lambda model: [
        torch.optim.Adam(layer.parameters()) for layer in (model[0], model[2])
    ],
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_keep_the_state_of_kept_entries(kind):
    models = [masked(), masked()]
    optimizers = [OPTIMIZERS[kind](model) for model in models]
    for step in range(3):
        for model, given in zip(models, optimizers, strict=True):
            for optimizer in given if isinstance(given, list) else [given]:
                optimizer.zero_grad()
                model(X).square().sum().backward()
                optimizer.step()
        if not step:
            ps.compact(models[1], optimizer=optimizers[1])
    torch.testing.assert_close(models[1](X), models[0](X))


def test_the_optimizer_of_a_copy_is_an_error():
    model, other = masked(), masked()
    before = facts(model)
    with pytest.raises(ValueError, match=r"model.parameters\(\)"):
        ps.compact(model, optimizer=torch.optim.Adam(other.parameters()))
    assert_same(facts(model), before)
