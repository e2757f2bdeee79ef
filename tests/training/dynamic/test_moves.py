import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.training.dynamic import moves
from parasparse.training.dynamic.moves import shared_out


@st.composite
def layers(draw):
    """A view of some layers at a random sparsity, with ties in all that ranks."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    names = [f"layer{i}" for i in range(draw(st.integers(1, 4)))]
    shapes = {n: draw(st.sampled_from([(5,), (4, 6), (3, 2, 2, 2), (1, 7)])) for n in names}
    masks = {n: torch.rand(s) < draw(st.sampled_from([0, 0.3, 0.8, 1])) for n, s in shapes.items()}
    rate = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    few = {n: torch.randint(-3, 4, s).double() for n, s in shapes.items()}
    other = {n: torch.randint(-3, 4, s).double() for n, s in shapes.items()}
    weights = {n: few[n] * masks[n] for n in names}
    by_id = {id(weight): other[n] for n, weight in weights.items()}
    return SimpleNamespace(
        masks=masks,
        weights=weights,
        prune_rate=rate,
        name2prune_rate=dict.fromkeys(names, rate),
        name2nonzeros={n: int(mask.sum()) for n, mask in masks.items()},
        name2zeros={n: int((~mask).sum()) for n, mask in masks.items()},
        get_momentum_for_weight=lambda weight: by_id[id(weight)],
        get_gradient_for_weight=lambda weight: by_id[id(weight)],
        other=other,
    )


@pytest.mark.parametrize("prune", [moves.magnitude_prune, moves.set_prune])
@given(view=layers())
def test_prune_drops_its_number_within_the_mask(prune, view):
    for name, mask in view.masks.items():
        weight = view.weights[name]
        new = prune(view, mask.float(), weight, name) != 0
        assert not (new & ~mask).any()
        gone = mask & ~new
        number = math.ceil(view.prune_rate * int(mask.sum()))
        assert int(gone.sum()) == number
        if prune is moves.magnitude_prune and gone.any() and new.any():
            assert weight[gone].abs().max() <= weight[new].abs().min()
        if prune is moves.set_prune:
            for sign in (weight >= 0, weight < 0):
                if (gone & sign).any() and (new & sign).any():
                    assert weight[gone & sign].abs().max() <= weight[new & sign].abs().min()
            halves = int((gone & (weight >= 0)).sum()), int((gone & (weight < 0)).sum())
            there = int((mask & (weight >= 0)).sum()), int((mask & (weight < 0)).sum())
            short = min(there) < number // 2 + number % 2
            assert short or abs(halves[0] - halves[1]) <= 1


GROWTHS = [
    moves.random_growth,
    moves.momentum_growth,
    moves.gradient_growth,
    moves.momentum_neuron_growth,
]


@pytest.mark.parametrize("growth", GROWTHS)
@given(view=layers(), share=st.floats(0, 1))
def test_growth_adds_its_number_outside_the_mask(growth, view, share):
    for name, mask in view.masks.items():
        if growth is moves.momentum_neuron_growth and mask.ndim < 2:
            continue
        number = int(share * view.name2zeros[name])
        new = growth(view, name, mask.clone(), number, view.weights[name])
        assert new.dtype == torch.bool
        assert (new & mask).equal(mask)
        assert int((new & ~mask).sum()) == number
        if growth in (moves.momentum_growth, moves.gradient_growth) and number:
            rank = view.other[name].abs()
            rest = ~new
            if rest.any():
                assert rank[new & ~mask].min() >= rank[rest].max()


@given(view=layers())
def test_redistributions_are_their_formulas(view):
    for name, mask in view.masks.items():
        weight, momentum = view.weights[name], view.other[name]
        kept = mask.float()
        found = {
            moves.momentum_redistribution: momentum.abs()[mask].sum() / max(1, mask.sum()),
            moves.magnitude_redistribution: weight.abs()[mask].sum() / max(1, mask.sum()),
            moves.nonzero_redistribution: mask.sum(),
            moves.no_redistribution: math.ceil(view.prune_rate * int(mask.sum())),
        }
        for function, want in found.items():
            assert function(view, name, weight, kept) == pytest.approx(float(want))


@given(view=layers())
def test_global_moves_rank_all_layers_together(view):
    before = {name: mask.clone() for name, mask in view.masks.items()}
    every = sum(view.name2nonzeros.values())
    removed = moves.global_magnitude_prune(view)
    assert removed == math.ceil(view.prune_rate * every)
    gone = torch.cat([view.weights[n][before[n] & ~m].abs() for n, m in view.masks.items()])
    kept = torch.cat([view.weights[n][m].abs() for n, m in view.masks.items()])
    assert len(gone) == removed
    assert len(kept) == every - removed
    if len(gone) and len(kept):
        assert gone.max() <= kept.min()
    pruned = {name: mask.clone() for name, mask in view.masks.items()}
    assert moves.global_momentum_growth(view, removed) == every
    grown = torch.cat([view.other[n][m & ~pruned[n]].abs() for n, m in view.masks.items()])
    free = torch.cat([view.other[n][~m].abs() for n, m in view.masks.items()])
    if len(grown) and len(free):
        assert grown.min() >= free.max()


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0, 7.0]), st.integers(0, 20)), min_size=1),
    st.floats(0, 1),
)
def test_shares_add_up_within_their_room(parties, share):
    importance, room = ([p[0] for p in parties], [p[1] for p in parties])
    total = int(share * sum(room))
    shares = shared_out(total, importance, room)
    assert sum(shares) == total
    assert all(0 <= part <= space for part, space in zip(shares, room, strict=True))
    if not sum(importance):
        return
    wanted = [total * i / sum(importance) for i in importance]
    more = [part - want for part, want in zip(shares, wanted, strict=True)]
    open_ = [i for i in range(len(room)) if shares[i] < room[i]]
    # Who has room left got what it wanted, and as much of the rest as each other one.
    assert all(abs(more[i] - more[j]) <= 1 + 1e-9 for i in open_ for j in open_)
    assert all(more[i] > -1 for i in open_)
    assert all(more[i] <= max(more[j] for j in open_) + 1 for i in range(len(room)) if open_)


def test_room_decides_where_nobody_has_any_importance():
    assert shared_out(5, [0.0, 0.0], [3, 12]) == [1, 4]
    assert shared_out(0, [], []) == []


def test_random_growth_is_uniform():
    mask = torch.zeros(6, dtype=torch.bool)
    mask[0] = True
    counts = sum(moves.random_growth(None, "w", mask, 2, mask).double() for _ in range(3_000))
    assert counts[0] == 3_000
    assert ((counts[1:] - 1_200).abs() < 150).all()


def test_the_mean_of_a_layer_in_half_precision_does_not_overflow():
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8)).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)  # 262,144 entries: the sum of |w| is more than float16 holds
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    controller = ps.DynamicSparsity(
        model, 0.1, optimizer, growth="random", redistribution="magnitude", every=1
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    controller.step()
    assert len(controller.history) == 1
