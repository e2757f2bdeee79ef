import json

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.cases import PairLinear, Tied


def pattern(mask, shape=(8, 8)):
    model = ps.sparsify(nn.Linear(shape[1], shape[0]), {"weight": mask})
    return ps.summary(model).rows[0].pattern


CHECKER = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1]).bool()


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (torch.tensor(1), "dense"),
        (torch.tensor(0), "empty"),
        (torch.tensor([1, 0, 1, 0, 0, 1, 0, 1])[:, None], "channel(0)"),
        (torch.tensor([1, 0, 1, 0, 0, 1, 0, 1])[None], "channel(1)"),
        (torch.stack([CHECKER, ~CHECKER] * 4), "1:2"),
        (torch.eye(8).roll(1, 0), "1:8"),
        (torch.eye(4).roll(1, 0).add(torch.eye(4)).repeat(2, 2), "2:4"),
        (torch.rand(8, 8).argsort().lt(7), "unstructured"),
        (torch.tensor(0.5), "real-valued"),
        (None, "unset"),
    ],
    ids=str,
)
def test_the_pattern_that_holds_is_named(mask, name):
    assert pattern(ps.Fixed(mask)) == name


def test_n_of_m_is_found_along_the_inputs_of_a_convolution():
    model = ps.sparsify(nn.Conv2d(8, 4, 3), {"*": ps.Prune(pattern=ps.patterns.n_of_m(2, 4))})
    assert ps.summary(model).rows[0].pattern == "2:4"


def test_tied_tensors_count_once_and_totals_are_those_of_the_parameters():
    model = ps.sparsify(Tied(), {"head.weight": 0.75})
    table = ps.summary(model)
    assert [row.name for row in table.rows] == ["embedding.weight"]
    assert table.model.numel == sum(p.numel() for p in model.parameters())
    assert table.masked.kept == 18
    assert table.model.kept == sum(p.numel() for p in model.parameters()) - 54
    assert table.masked.bytes_dense == 72 * 4
    assert table.masked.bytes_now == 72 * 5


def test_a_pair_counts_both_of_its_tensors():
    row = ps.summary(ps.sparsify(PairLinear(), 0.5)).rows[0]
    assert (row.numel, row.kept, row.bytes_dense, row.bytes_now) == (48, 24, 192, 216)
    assert ps.plan(PairLinear(), 0.5)[0].kept == 24
    half = ps.summary(ps.sparsify(PairLinear(), {"weight_re": 0.5}, pairs=False))
    assert (half.masked.numel, half.model.numel, half.model.kept) == (24, 48, 36)


def test_it_prints_and_goes_to_json_and_notebooks():
    model = ps.sparsify(nn.Sequential(nn.Linear(10, 10)), 0.9)
    table = ps.summary(model)
    text = repr(table)
    assert "0.weight" in text
    assert "90.00%" in text
    assert json.loads(json.dumps(table.to_dict()))["tensors"][0]["kept"] == 10
    assert table._repr_html_().count("<tr>") == 4


def test_gates_and_unset_masks_and_dense_models_have_their_rows():
    assert ps.summary(ps.sparsify(nn.Linear(4, 4), ps.Gate())).rows[0].pattern == "soft"
    unset = ps.summary(ps.sparsify(nn.Linear(4, 4), {"weight": ps.Fixed(None)}))
    assert unset.masked.kept is unset.model.sparsity is None
    assert "?" in repr(unset)
    assert ps.summary(nn.Linear(4, 4)).rows == ()
    assert ps.summary(nn.Linear(4, 4)).model.kept == 20
    assert ps.summary(nn.Linear(4, 4)).masked.sparsity == 0.0


class Positive(nn.Module):
    def forward(self, tensor):
        return tensor.clamp(min=0)


def test_a_module_of_the_users_own_is_reported_by_what_it_leaves():
    model = nn.Linear(4, 4)
    dense = model.weight.detach().clone()
    ps.sparsify(model, {"weight": lambda tensors: {n: Positive() for n in tensors}})
    assert ps.summary(model).rows[0].pattern == "custom"
    assert ps.summary(model).masked.kept == int((dense > 0).sum())
    assert torch.equal(ps.mask_of(model, "weight"), dense > 0)


def test_a_random_mask_is_not_called_n_of_m():
    assert ps.summary(ps.sparsify(nn.Linear(64, 64), 0.9)).rows[0].pattern == "unstructured"
