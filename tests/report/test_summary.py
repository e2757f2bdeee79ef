import json
import re
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.patterns.recognise import recognised
from tests.helpers.cases import PairLinear, Tied


def pattern(mask):
    rows, columns = mask.shape if mask is not None and mask.ndim else (8, 8)
    model = ps.sparsify(nn.Linear(columns, rows), {"weight": ps.Fixed(mask)})
    return ps.summary(model).rows[0].pattern


ROWS = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1]).bool()[:, None].expand(8, 8)
MESH = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (torch.tensor(1), "dense"),
        (torch.tensor(0), "empty"),
        (ROWS, "channel(0)"),
        (ROWS.T, "channel(1)"),
        (ROWS[:5].repeat_interleave(3, 0), "channel(0) in runs of 3"),
        (torch.eye(8).roll(1, 0), "unstructured"),
        (torch.eye(8).roll(1, 0).repeat(1, 2), "1:8"),
        (torch.eye(4).roll(1, 0).add(torch.eye(4)).repeat(2, 2), "2:4, 2:4 along 0"),
        (torch.rand(8, 2, 8).argsort().lt(7).flatten(1), "7:8"),
        (
            torch.rand(9, 2, 8).argsort().lt(3).flatten(1) & (torch.arange(9) % 3 > 0)[:, None],
            "3:8",
        ),
        (MESH, "unstructured"),
        (MESH.repeat_interleave(2, 0).repeat_interleave(3, 1), "block(2 x 3)"),
        (MESH.repeat_interleave(3, 1)[:, :-1], "block(1 x 3)"),
        (torch.ones(5, 7).triu(-1).tril(1), "nearly_diagonal(3)"),
        (torch.ones(7, 5).triu(-2).tril(2), "nearly_diagonal(5)"),
        (torch.ones(5, 7).triu(-1).tril(2), "unstructured"),
        (torch.tensor(0.5), "real-valued"),
        (None, "unset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_patterns_that_hold_are_named(mask, name):
    assert pattern(mask) == name


@pytest.mark.parametrize(
    ("made", "shape", "name"),
    [
        (ps.patterns.n_of_m(2, 4), (16, 32, 3, 3), "2:4"),
        (ps.patterns.n_of_m(1, 3, 0), (24, 8), "1:3 along 0"),
        (ps.patterns.block((4, 8)), (64, 64), "block(4 x 8)"),
        (ps.patterns.block((1, 1, -1, -1)), (16, 16, 3, 3), "block(1 x 1 x 3 x 3)"),
        (ps.patterns.channel(1), (7, 64), "channel(1)"),
        (ps.patterns.channel(0), (31, 4, 3), "channel(0)"),
        (ps.patterns.head(8, fused=3), (3 * 8 * 5, 40), "channel(0) in runs of 5"),
        (ps.patterns.nearly_diagonal(5), (30, 20, 3), "nearly_diagonal(5)"),
        (ps.patterns.chain(ps.patterns.channel(0), ps.patterns.n_of_m(2, 4)), (63, 32), "2:4"),
    ],
    ids=str,
)
def test_the_summary_names_the_pattern_that_made_the_mask(made, shape, name):
    torch.manual_seed(0)
    sparsity = [0.6] if ps.patterns.takes_sparsity(made) else []
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    ps.sparsify(module, ps.Prune(*sparsity, pattern=made))
    assert name in ps.summary(module).rows[0].pattern.split(", ")


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


def test_a_pattern_holds_only_if_its_last_group_does():
    mask = torch.tensor([1, 0, 0, 1]).bool().repeat(64, 64)
    mask[0, :4] = mask[0, :4].flip(0).roll(1)
    assert "2:4" in recognised(mask)
    mask[-1, -1] = False
    assert recognised(mask) == ["unstructured"]


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_groups_are_found_along_every_dimension(dim):
    shape = [6, 6, 6, 6]
    shape[dim] = 16
    mask = ps.patterns.n_of_m(1, 4, dim)(torch.rand(shape))
    assert "1:4" + (f" along {dim}" if dim != 1 else "") in recognised(mask)


@pytest.mark.parametrize("dim", [0, 1])
def test_dropped_channels_do_not_hide_groups(dim):
    shape = [(32, 21), (21, 32)][dim]
    made = ps.patterns.chain(ps.patterns.channel(1 - dim), ps.patterns.n_of_m(2, 4, dim))
    assert "2:4" + (" along 0" if dim == 0 else "") in recognised(made(torch.rand(shape), 0.5))


def keeps_to(mask, name):
    """Check a pattern that `summary` names, by brute force."""
    if name in ("dense", "empty"):
        return bool(mask.all() if name == "dense" else not mask.any())
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    if name.startswith("channel"):
        run = numbers[1] if "runs" in name else 1
        rows = mask.movedim(numbers[0], 0).flatten(1)
        whole = all(len(set(row.tolist())) == 1 for row in rows)
        return whole and all(len(set(some.flatten().tolist())) == 1 for some in rows.split(run))
    if name.startswith("block"):
        parts = [mask]
        for dim, size in enumerate(numbers):
            parts = [piece for part in parts for piece in part.split(size, dim)]
        return all(len(set(part.flatten().tolist())) == 1 for part in parts)
    if name.startswith("nearly"):
        return torch.equal(ps.patterns.nearly_diagonal(numbers[0])(mask.float()), mask)
    n, m, *along = numbers
    dim = along[0] if along else 1
    for other in [d for d in (0, 1) if d != dim and mask.ndim > 1]:
        mask = mask.index_select(other, mask.movedim(other, 0).flatten(1).any(1).nonzero()[:, 0])
    rows = mask.movedim(dim, -1).reshape(-1, mask.shape[dim])
    return all(int(group.sum()) == n for row in rows for group in row.split(m))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([0.1, 0.5, 0.9]),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_what_is_named_holds(shape, seed, share, repeats):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < share
    for dim in range(mask.ndim):
        mask = mask.repeat_interleave(repeats[dim], dim)
    names = recognised(mask)
    assert names
    assert names == ["unstructured"] or all(keeps_to(mask, name) for name in names)


class Every(nn.Module):
    """A layer of each kind, and how often each entry of its weight is multiplied."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv2d(6, 4, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True)
        self.other = nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens):
        x = self.linear(self.embedding(tokens))  # 2 x 49
        x = self.up(self.conv(x.view(2, 7, 7, 6).permute(0, 3, 1, 2)))  # 2 x 3 x 3, 2 x 4 x 4
        x = x.flatten(2).mT
        x = self.attention(x, x, x)[0]
        return self.lstm(x)[0] @ self.other

    rows: ClassVar = {
        "embedding.weight": 0,
        "linear.weight": 98,
        "conv.weight": 18,
        "up.weight": 18,
        "attention.in_proj_weight": 32,
        "attention.out_proj.weight": 32,
        "lstm.weight_ih_l0": 32,
        "lstm.weight_hh_l0": 32,
        "lstm.weight_ih_l1": 32,
        "lstm.weight_hh_l1": 32,
        "other": None,
    }


def test_multiply_adds_are_those_of_each_layer():
    model = Every()
    ps.sparsify(model, {"*": 0.75})
    report = ps.summary(model, torch.randint(10, (2, 49)))
    assert {row.name for row in report.rows} == set(Every.rows)
    for row in report.rows:
        rows = Every.rows[row.name]
        if rows is None:
            assert (row.multiply_adds_dense, row.multiply_adds) == (None, None)
        else:
            assert row.multiply_adds_dense == rows * row.numel, row.name
            assert row.multiply_adds == rows * row.kept, row.name
    assert report.model.multiply_adds is None
    text = repr(report)
    assert "mult-adds dense" in text
    assert "dense ms" not in text
    assert "mult-adds" not in repr(ps.summary(model))
    assert model.training


def test_a_part_of_a_fused_projection_counts_as_a_part():
    q, k = torch.randn(1, 5, 16), torch.randn(1, 9, 16)
    for other in (k, k.clone()):
        model = ps.sparsify(nn.MultiheadAttention(16, 2, batch_first=True), {"*": 0.5})

        class Call(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, q, k, v):
                return self.inner(q, k, v)[0]

        report = ps.summary(Call(model), (q, k, other))
        in_proj, out_proj = report.rows
        assert in_proj.multiply_adds_dense == 16 * 16 * (5 + 9 + 9)
        assert in_proj.multiply_adds == 16 * 16 * (5 + 9 + 9) // 2
        assert out_proj.multiply_adds_dense == 16 * 16 * 5


def test_parameters_that_are_added_multiply_nothing():
    vision = pytest.importorskip("torchvision")
    vit = vision.models.VisionTransformer(16, 8, 1, 2, 32, 64)
    report = ps.summary(ps.sparsify(vit, 0.5), torch.randn(1, 3, 16, 16))
    # patches; four projections, two linear layers, at 4 patches and the class token; the head
    dense = 4 * 3 * 64 * 32 + 5 * 32 * 32 * 4 + 5 * 32 * 64 * 2 + 32 * 1000
    assert report.model.multiply_adds_dense == dense


def test_layers_that_are_called_with_names_count_as_well():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 2, 2))

        def forward(self, x):
            return nn.functional.conv_transpose2d(x, self.weight, stride=2)

    report = ps.summary(ps.sparsify(Up(), 0.5), torch.randn(1, 2, 4, 4))
    assert report.rows[0].multiply_adds_dense == 16 * 24


def test_packed_bytes_are_those_of_pack():
    model = ps.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), {"0": 0.9})
    report = ps.summary(model, torch.randn(2, 64))
    packed = ps.pack(ps.dense_state_dict(model))
    assert report.rows[0].bytes_packed == packed["0.weight"].nbytes < 64 * 64 * 4 * 0.14
    assert report.model.bytes_packed == sum(one.nbytes for one in packed.values())


def test_a_pair_counts_both_its_parts():
    model = ps.sparsify(PairLinear(), 0.5)
    before = ps.summary(model).rows[0]
    row = ps.summary(model, torch.randn(3, 6)).rows[0]
    assert row.kept == before.kept
    assert row.bytes_packed > 0


def test_latency_is_measured_when_asked():
    model = ps.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 0.9)
    report = ps.summary(model, {"input": torch.randn(2, 64)}, latency=True)
    assert 0 < report.rows[0].sparse_ms <= report.rows[0].dense_ms
    assert report.masked.dense_ms == report.rows[0].dense_ms
    assert report.model.dense_ms is None
    assert "sparse ms" in report._repr_html_()
    json.dumps(report.to_dict())
    with pytest.raises(ValueError, match="must come with `example_inputs`"):
        ps.summary(model, latency=True)
