"""DataNormSparsifier and DataPruner, against loops in Python, and torch.ao.pruning on ours."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import parasparse as ps
from parasparse import BaseDataSparsifier, DataNormSparsifier, DataPruner
from parasparse.counts import num_kept


def by_hand(data, level, zeros, block, norm):
    """The mask of 2-D data, block by block."""
    rows, columns = data.shape
    power = 1 if norm == "L1" else 2
    blocks = [
        [(i, j) for i in range(r, min(r + block[0], rows))
         for j in range(c, min(c + block[1], columns))]
        for r in range(0, rows, block[0]) for c in range(0, columns, block[1])
    ]  # fmt: skip
    means = [sum(abs(data[i][j].item()) ** power for i, j in b) / len(b) for b in blocks]
    order = sorted(range(len(blocks)), key=lambda n: (-means[n], n))
    mask = torch.ones(rows, columns)
    for number in order[num_kept(len(blocks), level) :]:
        entries = sorted(blocks[number], key=lambda at: (-abs(data[at].item()), at))
        for at in entries[max(0, len(entries) - zeros) :]:
            mask[at] = 0
    return mask


@given(
    st.integers(1, 7), st.integers(1, 9), st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (3, 5)]),
    st.floats(0, 1), st.integers(0, 15), st.sampled_from(["L1", "L2"]), st.integers(0, 100),
)  # fmt: skip
def test_it_is_what_a_loop_over_blocks_does(rows, columns, block, level, zeros, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-9, 10, (rows, columns), generator=generator).float()
    zeros = min(zeros, math.prod(block))
    sparsifier = DataNormSparsifier([("x", data)], level, zeros, block, norm)
    sparsifier.step()
    assert torch.equal(sparsifier.get_mask("x"), by_hand(data, level, zeros, block, norm))
    assert sparsifier.get_mask("x").dtype == torch.float


def test_any_number_of_dimensions_is_blocks_along_the_last():
    data = torch.randn(3, 4, 6)
    sparsifier = DataNormSparsifier([("x", data)], 0.5, sparse_block_shape=(2, 3))
    sparsifier.add_data("row", data[0, 0], sparsity_level=0.5, sparse_block_shape=(1, 3))
    sparsifier.add_data("column", data[0, :, :1])
    sparsifier.add_data("number", data[0, 0, 0], sparsity_level=1.0)
    sparsifier.add_data("complex", data.to(torch.cfloat))
    sparsifier.step()
    mask = sparsifier.get_mask("x")
    assert mask.mean() == 0.5
    means = data.abs().view(3, 2, 2, 2, 3).mean((2, 4))
    kept = mask.view(3, 2, 2, 2, 3).mean((2, 4))
    assert set(kept.unique().tolist()) == {0, 1}
    assert means[kept == 1].min() >= means[kept == 0].max()
    assert torch.equal(sparsifier.get_mask("complex"), mask)
    row = sparsifier.get_mask("row").view(2, 3).mean(1)
    assert row[data[0, 0].abs().view(2, 3).mean(1).argmax()] == 1
    assert row.sum() == 1
    assert sparsifier.get_mask("column").mean() == 0.5
    assert sparsifier.get_mask("number").item() == 0


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([2e-4, 1e-4, 1.5e-4, 1e-5], torch.half), ([300, 600, 400, 1000], torch.half),
        ([1e-30, 3e-30, 2e-30, 4e-30], torch.float), ([1, 16, 15, 3], torch.int8),
        ([70000, 1, 2, 131072], torch.int32), ([-128, 1, 2, 3], torch.int8),
        ([-32768, 1, 2, 3], torch.int16), ([1, 0, 1, 0], torch.bool),
        ([1, 0.5, 0.25, 4], torch.float8_e4m3fn),
    ],
)  # fmt: skip
@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_no_square_vanishes_and_every_dtype_is_ranked(values, dtype, norm):
    data = torch.tensor(values).to(dtype)
    sparsifier = DataNormSparsifier([("x", data)], 0.5, norm=norm)
    pruner = DataPruner(ps.Prune(0.5), [("x", data)])
    order = sorted(range(4), key=lambda i: (-abs(values[i]), i))
    for each in (sparsifier, pruner):
        each.step()
        assert each.get_mask("x").nonzero().flatten().tolist() == sorted(order[:2])


def test_half_of_each_block_can_go():
    sparsifier = DataNormSparsifier(
        [("x", torch.randn(8, 16))], 1.0, zeros_per_block=2, sparse_block_shape=(1, 4)
    )
    sparsifier.step()
    data, mask = (t.view(-1, 4) for t in (sparsifier.get_data("x"), sparsifier.get_mask("x")))
    for values, kept in zip(data.abs(), mask, strict=True):
        assert kept.sum() == 2
        assert values[kept == 1].min() >= values[kept == 0].max()


def test_bad_input_is_refused():
    for keywords, text in [
        ({"sparsity_level": -0.1}, "`sparsity_level` must be in"),
        ({"sparsity_level": 1.1}, "`sparsity_level` must be in"),
        ({"zeros_per_block": 5, "sparse_block_shape": (2, 2)}, "`zeros_per_block` must be between"),
        ({"zeros_per_block": -1}, "`zeros_per_block` must be between"),
        ({"sparse_block_shape": (0, 2)}, "`sparse_block_shape` must hold"),
        ({"norm": "L3"}, '`norm` must be "L1" or "L2"'),
    ]:
        with pytest.raises(ValueError, match=text):
            DataNormSparsifier(**keywords)
    sparsifier = DataNormSparsifier([("x", torch.ones(2, 2))])
    sparsifier.data_groups["x"]["sparsity_level"] = 2.0
    with pytest.raises(ValueError, match="`sparsity_level` must be in"):
        sparsifier.step()
    sparsifier = DataNormSparsifier([("x", torch.full((2,), math.nan))])
    with pytest.raises(ValueError, match="NaN"):
        sparsifier.step()
    with pytest.raises(TypeError, match="`prune` must be a `Prune`"):
        DataPruner(0.5)


PRUNES = {
    "unstructured": ps.Prune(0.7),
    "2:4": ps.Prune(pattern=ps.patterns.n_of_m(2, 4)),
    "channel": ps.Prune(0.5, pattern=ps.patterns.channel(0)),
    "global": ps.Prune(0.7, scope="global"),
    "erk": ps.Prune(0.5, distribution=ps.distributions.erk),
}


@pytest.mark.parametrize("prune", PRUNES.values(), ids=PRUNES.keys())
def test_a_pruner_does_what_prune_does(prune):
    tensors = {"a": torch.randn(8, 12), "b": 3 * torch.randn(16, 4)}
    pruner = DataPruner(prune, tensors.items())
    pruner.step()
    want = prune(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, mask in want.items():
        assert torch.equal(pruner.get_mask(name), mask.float())
    pruner.squash_mask()
    for name, mask in want.items():
        assert torch.equal(tensors[name], before[name] * mask)


def scheduler_of(sparsifier, parameter):
    module = pytest.importorskip("torch.ao.pruning._experimental.data_scheduler")

    class Growing(module.BaseDataScheduler):
        def get_schedule_param(self):
            if self.last_epoch == 0:
                return dict(self.base_param)
            return {n: min(1.0, v + 0.25) for n, v in self.get_last_param().items()}

    return Growing(sparsifier, parameter)


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda data: DataNormSparsifier(data, 0.25), "sparsity_level"),
        (lambda data: DataPruner(ps.Prune(0.25), data), "sparsity"),
    ],
)
def test_torchs_own_schedulers_run_on_ours(make, parameter):
    sparsifier = make([("x", torch.randn(4, 4)), ("y", torch.randn(8))])
    scheduler = scheduler_of(sparsifier, parameter)
    for sparsity in (0.25, 0.5, 0.75, 1.0, 1.0):
        sparsifier.step()
        assert sparsifier.get_mask("x").mean() == 1 - sparsity
        assert sparsifier.get_mask("y").mean() == 1 - sparsity
        scheduler.step()
    import copy

    other = copy.deepcopy(sparsifier)  # whose `step` is its own, not that of the first
    other.get_mask("x").fill_(1)
    other.step()
    assert other.get_mask("x").mean() == 0


def test_torchs_own_norm_sparsifier_runs_on_our_base():
    module = pytest.importorskip("torch.ao.pruning._experimental.data_sparsifier")
    theirs = {k: v for k, v in vars(module.DataNormSparsifier).items() if callable(v)}
    theirs.pop("__init__")  # it calls its own base class by name
    mixed = type("Mixed", (BaseDataSparsifier,), theirs)
    block = {"sparse_block_shape": (1, 4), "zeros_per_block": 2}
    for level in (0.0, 0.25, 0.5, 1.0):
        data = torch.randn(8, 16)
        one = mixed([("x", data)], sparsity_level=level, **block)
        one.norm = "L1"
        two = DataNormSparsifier([("x", data)], sparsity_level=level, **block)
        original = module.DataNormSparsifier([("x", data)], sparsity_level=level, **block)
        for sparsifier in (one, two, original):
            sparsifier.step()
        for sparsifier in (one, two):
            assert torch.equal(sparsifier.get_mask("x").float(), original.get_mask("x").float())
            out = sparsifier.get_data("x", return_original=False)
            assert torch.equal(out, original.get_data("x", return_original=False))


def test_states_of_torchs_sparsifier_load_and_ours_load_there():
    module = pytest.importorskip("torch.ao.pruning._experimental.data_sparsifier")
    data = {"x": torch.randn(4, 4), "y": torch.randn(2, 6)}
    theirs, ours = module.DataNormSparsifier(list(data.items())), DataNormSparsifier(data.items())
    theirs.data_groups = {n: dict(g) for n, g in theirs.data_groups.items()}
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    back = module.DataNormSparsifier()
    back.load_state_dict(ours.state_dict())
    for name in data:
        want = theirs.get_data(name, return_original=False)
        for sparsifier in (ours, back):
            assert torch.equal(sparsifier.get_data(name, return_original=False), want)


# The code of torch's tutorial on data sparsifiers, as printed; its Model lacked the first line.
class ImplementedDataSparsifier(BaseDataSparsifier):
    def __init__(self, threshold):
        super().__init__(threshold=threshold)

    def update_mask(self, name, data, threshold):
        mask = self.get_mask(name)
        mask[torch.abs(data) < threshold] = 0.0


class Model(nn.Module):
    def __init__(self, feature_dim, emb_dim, num_classes):
        super().__init__()
        self.emb = nn.EmbeddingBag(feature_dim, emb_dim)
        self.linear1 = nn.Linear(emb_dim, 32)
        self.linear2 = nn.Linear(32, num_classes)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.emb(x)
        out = self.relu(self.linear1(out))
        out = self.linear2(out)
        return out  # noqa: RET504


def test_the_tutorials_simple_example():
    tensor1 = torch.randn(100, 100)
    param1 = nn.Parameter(torch.randn(200, 32))
    before = tensor1.clone(), param1.detach().clone()

    my_sparsifier = ImplementedDataSparsifier(threshold=0.2)
    my_sparsifier.add_data(name="tensor1", data=tensor1, threshold=0.5)
    my_sparsifier.add_data(name="param1", data=param1)

    my_sparsifier.step()  # computes mask

    my_sparsifier.squash_mask()  # applies and removes mask

    for now, then, threshold in zip((tensor1, param1), before, (0.5, 0.2), strict=True):
        assert torch.equal(now, torch.where(then.abs() < threshold, 0.0, then))


def test_the_tutorials_embeddings():
    model = Model(100, 32, 10)
    my_sparsifier = ImplementedDataSparsifier(threshold=0.5)
    my_sparsifier.add_data(name="emb", data=model.emb)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(100, (8, 5))).square().sum().backward()
        optimizer.step()
    trained = model.emb.weight.detach().clone()

    my_sparsifier.step()  # creates mask for embeddings

    my_sparsifier.squash_mask()  # applies and removes mask

    assert torch.equal(model.emb.weight, torch.where(trained.abs() < 0.5, 0.0, trained))
    assert model(torch.randint(100, (8, 5))).isfinite().all()


@pytest.mark.filterwarnings("ignore:Replacing existing data")
def test_the_tutorials_training_data():
    model = nn.Linear(6, 2)
    train_data_loader = DataLoader(TensorDataset(torch.randn(12, 6), torch.zeros(12)), 4)

    data_sparsifier = ImplementedDataSparsifier(threshold=0.2)

    data_name = "train_data"

    masks = []
    for x, _y in train_data_loader:
        original = x
        x = data_sparsifier.add_data(name=data_name, data=x)
        model(x)
        masks.append((x == original).float())
        data_sparsifier.step()
        small = original.abs() < 0.2
        assert not data_sparsifier.get_mask(data_name)[small].any()

    # Each batch is masked by what the ones before it dropped.
    assert masks[0].all()
    for one, two in itertools.pairwise(masks):
        assert (one >= two).all()
    assert not masks[-1].all()


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("kind", [lambda data: DataPruner(ps.Prune(0.5), data), DataNormSparsifier])
def test_data_that_was_shrunk_is_to_be_added_again(kind, kept):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    sparsifier = kind([("x", model[0].weight)])
    before = sparsifier.get_mask("x").clone()
    ps.sparsify(model, {"0": ps.Prune(1 - kept / 6, pattern=ps.patterns.channel(0))})
    ps.shrink(model, torch.randn(1, 4))
    with pytest.raises(ValueError, match="must keep its shape"):
        sparsifier.step()
    assert torch.equal(sparsifier.get_mask("x"), before)
    with pytest.warns(UserWarning, match="Repl"):
        sparsifier.add_data("x", model[0].weight, reuse_mask=False)
    sparsifier.step()
    assert sparsifier.get_mask("x").shape == (kept, 4)
