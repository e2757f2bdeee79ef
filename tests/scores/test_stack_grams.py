"""Gram matrices of stacks of matrices, from the products that use them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import parasparse as ps

EXPERTS, INPUTS, OUTPUTS = 4, 16, 8  # grouped products need rows of 16 bytes


class Stack(nn.Module):
    """Multiplies the rows of each expert with its matrix, as `product` does."""

    def __init__(self, product, is_transposed):
        super().__init__()
        shape = (INPUTS, OUTPUTS) if is_transposed else (OUTPUTS, INPUTS)
        self.matrices = nn.Parameter(torch.randn(EXPERTS, *shape))
        self.product, self.plain = product, nn.Linear(INPUTS, INPUTS)

    def forward(self, rows):
        """`rows`: a list, rows of each expert."""
        return self.product([self.plain(x) for x in rows], self.matrices)


def one_by_one(multiply):
    return lambda rows, w: [multiply(x, w[n]) for n, x in enumerate(rows) if len(x)]


def by_number(rows, w):
    return [x @ w[torch.tensor(n)] for n, x in enumerate(rows) if len(x)]


def grouped(is_transposed):
    def product(rows, w):
        if not hasattr(F, "grouped_mm"):
            pytest.skip("torch has grouped_mm in nn.functional from 2.10 on")
        ends = torch.tensor([len(x) for x in rows]).cumsum(0).int()
        return F.grouped_mm(torch.cat(rows).to(w.dtype), w if is_transposed else w.mT, offs=ends)

    return product


def batched(rows, w):
    return torch.bmm(torch.stack([F.pad(x, (0, 0, 0, 9 - len(x))) for x in rows]), w)


PRODUCTS = {
    "F.linear": (one_by_one(F.linear), False),
    "with bias": (one_by_one(lambda x, w: F.linear(x, w, w.new_ones(OUTPUTS))), False),
    "@": (one_by_one(torch.matmul), True),
    "@ of three dimensions": (one_by_one(lambda x, w: x[None] @ w), True),
    "@ of the transposed": (one_by_one(lambda x, w: x @ w.T), False),
    "addmm": (one_by_one(lambda x, w: torch.addmm(w.new_ones(OUTPUTS), x, w)), True),
    "einsum": (one_by_one(lambda x, w: torch.einsum("ni,io->no", x, w)), True),
    "by a tensor": (by_number, True),
    "bmm": (batched, True),
    "einsum of all": (lambda rows, w: torch.einsum("eni,eoi->eno", torch.stack(
        [F.pad(x, (0, 0, 0, 9 - len(x))) for x in rows]), w), False),
    "grouped": (grouped(is_transposed=False), False),
    "grouped and transposed": (grouped(is_transposed=True), True),
}  # fmt: skip


def inputs(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, INPUTS, generator=generator) for count in counts]


def seen(model, *batches, targets="*", mode=torch.no_grad):
    with mode(), ps.scores.collect(model, targets, grams=True) as statistics:
        for rows in batches:
            model(rows)
    return statistics


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_each_matrix_has_the_gram_of_the_rows_that_meet_it(name, masked, mode):
    torch.manual_seed(0)
    model = Stack(*PRODUCTS[name])
    if masked:
        ps.sparsify(model, {"matrices": 0.5})
    batches = inputs(3, 0, 5, 1), inputs(2, 0, 9, 0, seed=1)
    statistics = seen(model, *batches, mode=mode)
    with torch.no_grad():
        for expert, parts in enumerate(zip(*batches, strict=True)):
            x = model.plain(torch.cat(parts)).double()
            found = statistics.gram("matrices")[expert]
            torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-5)
    counts = 72 if name in ("bmm", "einsum of all") else 20  # padding is an input too
    assert statistics.count("matrices") == counts
    layout = statistics.layout("matrices")
    assert (layout.groups, layout.is_stack) == (EXPERTS, True)
    assert layout.is_transposed == PRODUCTS[name][1]
    assert statistics.count("plain.weight") == 20


@pytest.mark.parametrize("way", ["autocast", "autocast at each batch", "bfloat16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_half_precision_are_seen_too(name, way):
    torch.manual_seed(0)
    model = Stack(*PRODUCTS[name])
    batches = inputs(3, 0, 5, 1), inputs(2, 0, 9, 0, seed=1)

    def autocast(enabled=True):
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    if way == "bfloat16":
        model.bfloat16()
        batches = [[x.bfloat16() for x in rows] for rows in batches]
    with torch.no_grad(), autocast(way == "autocast"):
        with ps.scores.collect(model, grams=True) as statistics:
            for rows in batches:
                with autocast(way != "bfloat16"):
                    model(rows)
        for expert, parts in enumerate(zip(*batches, strict=True)):
            with autocast(way != "bfloat16"):
                x = model.plain(torch.cat(parts)).double()
            found = statistics.gram("matrices")[expert]
            torch.testing.assert_close(found, x.T @ x, rtol=0.05, atol=0.05)
    assert torch.is_autocast_cache_enabled()


def test_what_is_not_a_product_of_whole_matrices_has_none():
    for product in (
        lambda rows, w: [x @ w[n, :, :2] for n, x in enumerate(rows)],
        lambda rows, w: [x @ (2 * w[n]) for n, x in enumerate(rows)],
        lambda rows, w: w.sum(),
    ):
        statistics = seen(Stack(product, is_transposed=True), inputs(3, 1, 5, 1))
        with pytest.raises(RuntimeError, match="no Gram matrix"):
            statistics.gram("matrices")


def test_inputs_that_are_not_finite_and_products_from_both_sides_are_refused():
    model = Stack(*PRODUCTS["@"])
    rows = inputs(3, 1, 5, 1)
    rows[2][0] = float("nan")
    with pytest.raises(RuntimeError, match='"matrices" in this block has NaN'):
        seen(model, rows, targets="matrices")
    both = Stack(
        lambda rows, w: (rows[0] @ w[0], rows[0][:, :OUTPUTS] @ w[1].T), is_transposed=True
    )
    with pytest.raises(RuntimeError, match="from both"):
        seen(both, inputs(3, 1, 5, 1))
    model(inputs(3, 1, 5, 1))  # the hooks are gone


@pytest.mark.parametrize("update", ["none", "obs", "least_squares", "admm"])
@pytest.mark.parametrize("name", ["F.linear", "@"])
def test_experts_are_pruned_as_layers_of_their_own_and_without_tokens_by_magnitude(name, update):
    torch.manual_seed(0)
    product, is_transposed = PRODUCTS[name]
    model, rows = Stack(product, is_transposed), inputs(20, 0, 30, 15)
    statistics, before = seen(model, rows), model.matrices.detach().clone()
    history = []
    rule = ps.OneShot(0.5, statistics, update=update, history=history)
    with pytest.warns(UserWarning, match=r'matrices of "matrices" had no input.*: "1" of 4'):
        ps.sparsify(model, {"matrices": rule})
    assert (history[0].unseen, history[0].samples) == (1, 65)
    by_expert = [w.T if is_transposed else w for w in model.matrices.detach()]
    for expert, (found, dense) in enumerate(zip(by_expert, before, strict=True)):
        dense = dense.T if is_transposed else dense
        if expert == 1:
            assert torch.equal(found, torch.where(found != 0, dense, 0.0))
            kept = dense.abs().topk(INPUTS // 2).indices.sort().values
            assert torch.equal(found.nonzero()[:, 1].view(-1, INPUTS // 2), kept)
            continue
        layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
        layer.weight.data = dense.clone()
        with torch.no_grad(), ps.scores.collect(layer, grams=True) as own:
            layer(model.plain(rows[expert]))
        ps.sparsify(layer, ps.OneShot(0.5, own, update=update))
        assert (found.count_nonzero(1) == INPUTS // 2).all()
        if update != "admm":  # which takes its steps for all experts together
            torch.testing.assert_close(found, layer.weight, rtol=1e-3, atol=1e-4)
