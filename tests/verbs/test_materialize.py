"""Models on the meta device get memory for what is kept, and values as their modules would."""

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parasparse as ps
from parasparse.masks.random_places import random_positions
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl
CPU = torch.device("cpu")
RANDOM = functools.partial(ps.Prune, score=ps.scores.random)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Conv1D(nn.Module):
    """As in transformers: multiplies from the right."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 30)
        self.head = nn.Linear(30, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def rows(mask):
    return mask.flatten(1).sum(1, keepdim=True).view(-1, *[1] * (mask.ndim - 1)).expand_as(mask)


def columns(mask):
    return rows(mask.transpose(0, 1)).transpose(0, 1)


def columns_of_two_groups(mask):
    each = [m.sum((0, 2, 3), keepdim=True).expand_as(m) for m in mask.chunk(2)]
    return torch.cat(each)


x = torch.ones
mha = {"embed_dim": 24, "num_heads": 4}
# The module, its input, the inputs of each entry's output, and rules.
CASES = {
    "linear": (lambda: nn.Linear(40, 30), [x(2, 40)], rows, 0.8),
    "linear, no bias": (lambda: nn.Linear(40, 30, bias=False), [x(2, 40)], rows, 0.8),
    "dense": (lambda: nn.Linear(40, 30), [x(2, 40)], rows, RANDOM(0.0)),
    "nearly dense": (lambda: nn.Linear(40, 30), [x(2, 40)], rows, RANDOM(0.2)),
    "bfloat16": (lambda: nn.Linear(40, 30).bfloat16(), [x(2, 40).bfloat16()], rows, 0.8),
    "complex": (
        lambda: nn.Linear(40, 30, dtype=torch.complex64),
        [x(2, 40, dtype=torch.complex64)],
        rows,
        0.8,
    ),
    "conv": (lambda: nn.Conv2d(8, 16, 3, groups=2), [x(2, 8, 5, 5)], rows, 0.7),
    "transposed": (lambda: nn.ConvTranspose1d(16, 8, 3), [x(2, 16, 5)], columns, 0.7),
    "transposed, groups": (
        lambda: nn.ConvTranspose2d(16, 8, 3, groups=2),
        [x(2, 16, 5, 5)],
        columns_of_two_groups,
        0.7,
    ),
    "bilinear": (lambda: nn.Bilinear(6, 7, 8), [x(2, 6), x(2, 7)], rows, 0.7),
    "Conv1D": (lambda: Conv1D(40, 30), [x(2, 30)], columns, 0.8),
    "lstm": (lambda: nn.LSTM(12, 16, 2), [x(5, 2, 12)], rows, 0.6),
    "attention": (lambda: nn.MultiheadAttention(**mha), [x(5, 2, 24)] * 3, rows, 0.8),
    "encoder": (lambda: nn.TransformerEncoderLayer(24, 4, 48), [x(5, 2, 24)], rows, 0.8),
    "tied": (Tied, [torch.arange(9)], rows, {"head.weight": 0.7}),
    "norms": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)),
        [x(2, 3, 5, 5)],
        rows,
        {"0": RANDOM(0.5)},
    ),
}


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", CASES)
def test_a_model_from_meta_is_compact_and_trains(name):
    build, inputs, inputs_of, rules = CASES[name]
    model = on_meta(build)
    dense = build()
    assert ps.materialize(model, rules, generator=seeded()) is model
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    wanted = ps.plan(dense, rules)
    assert {n: int(m.sum()) for n, m in ps.named_masks(model)} == {r.name: r.kept for r in wanted}
    for row in wanted:
        mask, values = ps.mask_of(model, row.name), ps.stored(model, row.name)
        bound = mask / inputs_of(mask).clamp(min=1).sqrt()
        assert (values.real.abs() <= bound * 1.01).all()
        assert (values[mask] != 0).float().mean() > 0.98
    assert [n for n, _ in ps.squash(ps.expand(copy.deepcopy(model))).named_parameters()] == [
        n for n, _ in dense.named_parameters()
    ]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    outputs = [t for t in tree_leaves(model(*inputs)) if t is not None]
    assert all(t.isfinite().all() for t in outputs)
    sum(t.abs().square().sum() for t in outputs).backward()
    optimizer.step()
    assert not all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_values_have_the_variance_of_a_dense_layer_with_as_many_inputs():
    model = on_meta(lambda: nn.Linear(1_000, 300))
    ps.materialize(model, 0.97, generator=seeded())
    mask, weight = ps.mask_of(model, "weight"), ps.stored(model, "weight").detach()
    scaled = (weight * mask.sum(1, keepdim=True).sqrt())[mask]
    assert scaled.abs().max() <= 1.0001
    assert math.isclose(scaled.square().mean(), 1 / 3, rel_tol=0.03)  # 9,000 draws from U(-1, 1)
    assert abs(scaled.mean()) < 0.03


def test_what_is_dense_is_as_its_module_makes_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(400, 300)
            self.norm = nn.BatchNorm1d(300)
            self.attention = nn.MultiheadAttention(300, 3)
            self.last = nn.Linear(300, 10)
            self.last.weight.requires_grad_(False)

    model = on_meta(Net)
    token = model.attention.token = nn.Parameter(torch.ones(3))
    ps.materialize(model, {"last.weight": None, "*": 0.9}, generator=seeded())
    assert (model.norm.weight == 1).all()
    assert (model.norm.running_var == 1).all()
    assert model.norm.num_batches_tracked == 0
    assert (model.attention.out_proj.bias == 0).all()
    assert (model.attention.in_proj_bias == 0).all()
    assert model.attention.token is token
    for values, inputs in ((model.first.bias.detach(), 400), (model.last.weight, 300)):
        assert math.isclose(values.square().mean() * inputs, 1 / 3, rel_tol=0.2)
    assert not model.last.weight.requires_grad
    assert model.first.parametrizations.weight.original.requires_grad


def test_a_parent_initializes_what_is_below_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3))
            self.layer = nn.Linear(8, 3)

        def reset_parameters(self):
            self.scale = nn.Parameter(torch.full((3,), 2.0))  # another object
            self.layer.bias.data.fill_(5.0)

    model = ps.materialize(on_meta(Net), 0.5)
    assert (model.scale == 2).all()
    assert (model.layer.bias == 5).all()


def test_ties_of_dense_tensors_stay():
    model = on_meta(Tied)
    model.other = nn.Linear(30, 20, device="meta")
    ps.materialize(model, {"other": 0.5})
    assert model.head.weight is model.embedding.weight
    assert not model.head.weight.is_meta


def test_a_dense_lstm_reads_its_new_weights():
    lstm = on_meta(lambda: nn.LSTM(6, 8))
    model = nn.ModuleDict({"lstm": lstm, "linear": nn.Linear(8, 4, device="meta")})
    ps.materialize(model, {"linear": 0.5})
    output, _ = lstm(torch.ones(3, 2, 6))
    output.sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())


def test_everything_is_drawn_from_the_generator():
    def drawn(seed):
        model = on_meta(lambda: nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30)))
        with torch.device("meta"):  # which a user may not have left
            return ps.materialize(model, 0.8, generator=seeded(seed)).state_dict()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.get_rng_state().equal(state)
    assert all(first[key].equal(again[key]) for key in first)
    assert not any(first[k].shape == other[k].shape and first[k].equal(other[k]) for k in first)
    biases = []
    for _ in range(2):
        torch.manual_seed(5)
        model = ps.materialize(on_meta(lambda: nn.Linear(50, 40)), 0.8)
        biases.append(model.bias)
        biases.append(model.parametrizations.weight.original)
    assert biases[0].equal(biases[2])
    assert biases[1].equal(biases[3])


@given(st.integers(0, 2**32), st.integers(0, 40), st.one_of(st.integers(40, 99), st.just(2**61)))
def test_positions_are_sorted_and_different(seed, count, numel):
    found = random_positions(count, numel, CPU, seeded(seed))
    assert found.dtype == torch.int64
    assert len(found) == count
    assert (found.diff() > 0).all()
    assert ((found >= 0) & (found < numel)).all()


def test_each_set_of_positions_is_equally_likely():
    generator, draws, wanted = seeded(), 5_600, math.comb(8, 3)
    for count in (3, 5):  # drawn, and left out
        seen = {}
        for _ in range(draws // 2):
            key = tuple(random_positions(count, 8, CPU, generator).tolist())
            seen[key] = seen.get(key, 0) + 1
        mean = draws / 2 / wanted
        assert len(seen) == wanted
        chi_square = sum((n - mean) ** 2 / mean for n in seen.values())
        assert chi_square < 110  # 55 degrees of freedom: once in 100,000


def test_no_position_is_preferred_where_32_random_bits_do_not_suffice():
    numel = int(2**28 * 0.97)
    found = random_positions(200_000, numel, CPU, seeded())
    share = (2**32 % numel) / numel  # the numbers that come up once more among 2**32
    assert abs((found < share * numel).float().mean() - share) < 0.006


def test_nothing_of_the_dense_size_is_ever_allocated():
    numel, largest = 200_000**2, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor) and not t.is_meta and not t.is_sparse_csr:
                    largest = max(largest, t.untyped_storage().nbytes())
            return result

    model = on_meta(lambda: nn.Linear(200_000, 200_000))
    with Largest():
        ps.materialize(model, 1 - 400_000 / numel)
        model(torch.ones(2, 200_000)).sum().backward()
    assert 0 < largest <= 16 * 400_000
    assert model.parametrizations.weight.original.grad.shape == (400_000,)


def test_a_layer_of_a_million_rows_takes_memory_for_what_is_kept():
    def peak():
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # lowers the peak to the present memory
    except OSError:
        pytest.skip("needs Linux's /proc")
    before = peak()
    layer = on_meta(lambda: nn.Linear(1_000_000, 1_000_000))
    ps.materialize(layer, 1 - 1e-6)
    assert peak() - before < 300 * 10**6  # the dense layer has 4 * 10**12 bytes


def linear():
    return on_meta(lambda: nn.Linear(8, 6))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("causal", torch.ones(2, 2, dtype=torch.bool))


def with_values():
    model = linear()
    model.weight = nn.Parameter(torch.ones(6, 8))
    return model


REFUSED = {
    "magnitude": (linear, ps.Prune(0.5), ValueError, "no weights to rank yet"),
    "other score": (linear, ps.Prune(0.5, score=ps.scores.lamp), ValueError, "scores.random"),
    "pattern": (linear, {"*": RANDOM(0.5, pattern=ps.patterns.block((2, 2)))}, ValueError, '"\\*"'),
    "global": (linear, RANDOM(0.5, scope="global"), ValueError, "no weights to rank"),
    "zeros": (linear, "zeros", ValueError, "no weights to rank"),
    "mask": (linear, {"weight": torch.ones(6, 8)}, ValueError, "no weights to rank"),
    "gate": (linear, ps.Gate(), ValueError, "no weights to rank"),
    "no target": (linear, {"wieght": 0.5}, ValueError, "nearest"),
    "nothing kept": (linear, 1.0, ValueError, "each of its 6 outputs"),
    "too few kept": (linear, 0.9, ValueError, "keeps 5"),
    "bias": (linear, {"bias": 0.5}, ValueError, "not a matrix"),
    "left on meta": (lambda: on_meta(Odd), 0.5, RuntimeError, '"scale", "causal" would be left'),
    "values": (with_values, 0.5, ValueError, "has values already"),
    "masked": (lambda: ps.sparsify(linear(), 0.5), 0.5, ValueError, "has a mask already"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(linear()),
        {"weight": 0.5},
        ValueError,
        "parametrization",
    ),
    "embedding": (
        lambda: on_meta(lambda: nn.Embedding(9, 8)), {"weight": 0.5}, ValueError, "looked up",
    ),
    "stack": (
        lambda: on_meta(lambda: nn.ParameterDict({"weight": torch.ones(2, 3, 4)})),
        {"weight": 0.5},
        ValueError,
        "stack of matrices",
    ),
    "buffer": (
        lambda: on_meta(lambda: nn.BatchNorm1d(8)), {"running_mean": 0.5}, ValueError, "a buffer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_is_refused_and_unchanged(name):
    build, rules, error, message = REFUSED[name]
    model = build()
    before = repr(model), [id(t) for t in (*model.parameters(), *model.buffers())]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        ps.materialize(model, rules, generator=seeded())
    assert (repr(model), [id(t) for t in (*model.parameters(), *model.buffers())]) == before
    assert torch.get_rng_state().equal(state)


def test_the_meta_device_is_no_place_to_be():
    with pytest.raises(ValueError, match="`device` must not be"):
        ps.materialize(linear(), 0.5, device="meta")


def test_what_has_no_memory_is_named():
    model = on_meta(lambda: nn.Sequential(nn.Linear(10**8, 8), nn.Linear(10**8, 10**8)))
    with pytest.raises(RuntimeError) as caught:
        ps.materialize(model, {"0": 0.99999})
    assert '"1.weight" (100000000, 100000000), which no rule makes sparse' in str(
        caught.value.__notes__
    )
    with pytest.raises(RuntimeError, match="is on the meta device.*`materialize`"):
        ps.compact(ps.sparsify(linear(), 0.5))
