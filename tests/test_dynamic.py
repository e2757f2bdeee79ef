import copy
import functools
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.schedules import Constant, Cosine

SPEC = importlib.util.spec_from_file_location(
    "extensions", Path(__file__).parent.parent / "examples" / "extensions.py"
)
extensions = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(extensions)


def build():
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 5))


def sgd(model, **keywords):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **keywords})


def train(model, optimizer, dst, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        dst.step()


def masks_of(model):
    return {name: mask.clone() for name, mask in ps.named_masks(model)}


def total(masks):
    return sum(int(mask.sum()) for mask in masks.values())


MOVES = [
    {},
    {"growth": "random", "redistribution": "magnitude"},
    {"growth": "gradient", "redistribution": "none"},
    {"growth": "momentum_neuron", "redistribution": "nonzero", "prune": "SET"},
    {"prune": "SET", "growth": "random", "redistribution": "none"},
    {"prune": "global_magnitude", "growth": "global_momentum_growth"},
    {"prune": "global_magnitude"},
    {"growth": "global_momentum_growth"},
    {"growth": "gradient", "redistribution": "momentum", "init": "erk"},
]


@pytest.mark.parametrize("moves", MOVES, ids=lambda moves: "-".join(moves.values()) or "default")
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.95])
def test_the_network_keeps_exactly_as_many_connections(moves, sparsity):
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(
        model, sparsity, optimizer, **moves, every=1, prune_rate=lambda step: step % 11 / 10
    )
    assert dst.baseline_nonzero == total(masks_of(model))
    for step in range(1, 121):
        before = masks_of(model)
        train(model, optimizer, dst)
        after = masks_of(model)
        assert total(after) == dst.baseline_nonzero
        assert dst.history[-1].missing == 0
        for name, mask in after.items():
            stored = ps.stored(model, name)
            state = optimizer.state[stored]["momentum_buffer"]
            dropped, grown = before[name] & ~mask, mask & ~before[name]
            assert not stored[~mask].any()
            assert not stored[grown].any()
            assert not state[dropped].any()
            if moves.get("growth") in ("random", "gradient"):
                assert not state[grown].any()
            if moves.get("redistribution") == "none":
                assert mask.sum() == before[name].sum()
                if step % 11 and "init" not in moves:
                    rate = min(
                        step % 11 / 10,
                        1,
                    )
                    assert int(dropped.sum()) <= math.ceil(rate * int(before[name].sum()))


def reference(weights, momenta, masks, rate):
    """One update of sparse momentum, from SEEDS.md's words, by sorting."""
    names = list(weights)
    importance = {n: momenta[n].abs()[masks[n]].mean().item() for n in names}
    share = {n: importance[n] / sum(importance.values()) for n in names}
    pruned, removed = {}, 0
    for n in names:
        zeros = 1 - masks[n].float().mean().item()
        own = min(zeros, rate) if zeros < 0.2 and share[n] > 1 / len(names) else rate
        kept, size = masks[n].flatten().nonzero().flatten().tolist(), weights[n].flatten().abs()
        gone = math.ceil(own * len(kept))
        smallest = sorted((size[i].item(), -i) for i in kept)[:gone]
        pruned[n] = masks[n].clone()
        pruned[n].view(-1)[[-i for _, i in smallest]] = False
        removed += gone
    room = {n: int(0.99 * int((~pruned[n]).sum())) for n in names}
    wanted = {n: removed * share[n] for n in names}
    while any(wanted[n] > room[n] for n in names):  # what a full layer cannot take, others share
        excess = sum(max(wanted[n] - room[n], 0) for n in names)
        others = [n for n in names if wanted[n] < room[n]]
        wanted = {n: min(wanted[n], room[n]) + (n in others) * excess / len(others) for n in names}
    number = {n: math.floor(wanted[n] + 1e-9) for n in names}
    odd = sorted((n for n in names if number[n] < room[n]), key=lambda n: number[n] - wanted[n])
    for n in odd[: removed - sum(number.values())]:
        number[n] += 1
    for n in names:
        free, size = (~pruned[n]).flatten().nonzero().flatten().tolist(), momenta[n].flatten().abs()
        largest = sorted((-size[i].item(), i) for i in free)[: number[n]]
        pruned[n].view(-1)[[i for _, i in largest]] = True
    return pruned


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sparse_momentum_is_its_description(optimizer):
    torch.manual_seed(3)
    model = build().double()
    made = sgd(model) if optimizer == "sgd" else torch.optim.Adam(model.parameters())
    dst = ps.DynamicSparsity(model, 0.8, made, prune_rate=0.4, every=5)
    for _ in range(6):
        for _ in range(4):
            made.zero_grad()
            model(torch.randn(8, 12).double()).square().mean().backward()
            made.step()
            dst.step()
        made.zero_grad()
        model(torch.randn(8, 12).double()).square().mean().backward()
        made.step()
        masks = masks_of(model)
        weights = {n: (ps.stored(model, n) * masks[n]).detach() for n in masks}
        state = {n: made.state[ps.stored(model, n)] for n in masks}
        if optimizer == "sgd":
            momenta = {n: s["momentum_buffer"].clone() for n, s in state.items()}
        else:
            momenta = {n: s["exp_avg"] / (s["exp_avg_sq"].sqrt() + 1e-8) for n, s in state.items()}
        want = reference(weights, momenta, masks, 0.4)
        dst.step()
        got = masks_of(model)
        assert all(got[n].equal(want[n]) for n in want)


def test_momentum_is_that_of_a_dense_network_masked_after_each_step():
    model, dense = build(), build()
    dense.load_state_dict(model.state_dict())
    keywords = {"weight_decay": 1e-2, "nesterov": True}
    optimizer, other = sgd(model, **keywords), sgd(dense, **keywords)
    dst = ps.DynamicSparsity(model, 0.7, optimizer)
    masks = masks_of(model)
    for name, parameter in dense.named_parameters():
        parameter.data *= masks.get(name, 1)
    for _ in range(10):
        x = torch.randn(8, 12)
        for net, opt in ((model, optimizer), (dense, other)):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
        dst.step()
        for name, parameter in dense.named_parameters():
            parameter.data *= masks.get(name, 1)
    for name, mask in masks.items():
        ours, theirs = ps.stored(model, name), dict(dense.named_parameters())[name]
        torch.testing.assert_close(ours, theirs)
        momenta = optimizer.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"]
        torch.testing.assert_close(*momenta)
        assert momenta[0][~mask].any()


def test_moves_that_need_no_optimizer_state_leave_gradients_masked():
    model = build()
    optimizer = sgd(model)
    dst = ps.sparse_evolutionary_training(model, 0.8, optimizer, every=3)
    train(model, optimizer, dst, 5)
    for name, mask in masks_of(model).items():
        assert not ps.stored(model, name).grad[~mask].any()
    assert len(dst.history) == 1


def test_rigl_grows_the_largest_dense_gradients_and_asks_for_them_at_updates_only():
    model = build()
    optimizer = sgd(model, momentum=0.0)
    dst = ps.rigl(model, 0.8, optimizer, stop=12, every=4, prune_rate=0.3, init="constant")
    for step in range(1, 16):
        before = masks_of(model)
        with_probe = any("probe" in vars(stack) for stack in model.modules())
        assert with_probe == (step in (4, 8, 12))
        optimizer.zero_grad()
        x = torch.randn(8, 12)
        dense = build()
        dense.load_state_dict(ps.dense_state_dict(model))
        for net in (model, dense):  # two backward passes: gradients add up
            net(x).square().mean().backward()
            net(2 * x).square().mean().backward()
        optimizer.step()
        weights = {n: ps.stored(model, n).detach().clone() for n in before}
        dst.step()
        after = masks_of(model)
        for name, mask in before.items():
            if step not in (4, 8, 12):
                assert after[name].equal(mask)
                assert not ps.stored(model, name).grad[~mask].any()
                continue
            number = math.ceil(Cosine(0.3, 0.0, stop=12)(step) * int(mask.sum()))
            size = torch.where(mask, weights[name].abs(), math.inf).flatten()
            kept = mask.clone()
            kept.view(-1)[size.argsort(stable=True)[:number]] = False
            grad = dict(dense.named_parameters())[name].grad.abs()
            rank = torch.where(kept, -1, grad).flatten()
            kept.view(-1)[rank.argsort(stable=True, descending=True)[:number]] = True
            assert after[name].equal(kept)
    assert [update.step for update in dst.history] == [4, 8, 12]


def test_a_gradient_that_is_not_finite_postpones_the_update():
    model = build()
    optimizer = sgd(model)
    dst = ps.rigl(model, 0.8, optimizer, stop=100, every=2)
    train(model, optimizer, dst)
    (model(torch.randn(8, 12)).sum() * math.inf).backward()  # as under a GradScaler: no step
    dst.step()
    assert not dst.history
    train(model, optimizer, dst)
    assert [update.step for update in dst.history] == [3]
    train(model, optimizer, dst)
    assert [update.step for update in dst.history] == [3, 4]


def test_the_tutorials_functions_run_unchanged():
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    dst = ps.DynamicSparsity(
        model,
        0.8,
        optimizer,
        prune=extensions.magnitude_variance_pruning,
        redistribution=extensions.variance_redistribution,
        prune_rate=0.3,
    )
    for _ in range(20):
        train(model, optimizer, dst, 5)
        before = masks_of(model)
        variance = {
            n: optimizer.state[ps.stored(model, n)]["exp_avg_sq"].sqrt()[m].mean()
            for n, m in before.items()
        }
        dst.at_end_of_epoch()
        after = masks_of(model)
        assert total(after) == dst.baseline_nonzero
        most = max(variance, key=variance.get)
        assert after[most].float().mean() >= min(before[most].float().mean(), 0.7)
    assert dst.steps == 100
    assert len(dst.history) == 20


def test_functions_of_ones_own_see_what_they_are_promised():
    model = build()
    optimizer = sgd(model)
    seen = []

    def redistribution(masking, name, weight, mask):
        assert weight is ps.stored(model, name)
        assert not weight[mask == 0].any()
        assert mask.dtype == torch.float32
        momentum = masking.optimizer.state[weight]["momentum_buffer"]
        assert momentum is masking.get_momentum_for_weight(weight)
        assert momentum[mask == 0].any()
        assert masking.name2nonzeros[name] + masking.name2zeros[name] == mask.numel()
        return len(seen) + 1

    def prune(masking, mask, weight, name):
        assert mask.dtype == torch.float32
        assert sum(masking.name2variance.values()) == pytest.approx(1)
        assert masking.name2prune_rate[name] == masking.prune_rate == 0.25
        first = mask.flatten().nonzero()[0]
        mask.view(-1)[first] = 0.0
        return mask

    def growth(masking, name, new_mask, total_regrowth, weight):
        seen.append((name, total_regrowth))
        assert new_mask.dtype == torch.bool
        assert type(total_regrowth) is int
        assert masking.total_removed == 3
        assert masking.name2removed[name] == 1
        assert masking.total_nonzero == masking.baseline_nonzero == dst.baseline_nonzero
        assert masking.total_zero == 12 * 30 + 30 * 20 + 20 * 5 - dst.baseline_nonzero
        (inside,) = masking.modules
        names = [n for n, _ in inside.named_parameters() if n in masking.masks]
        assert names == ["0.weight", "2.weight", "3.weight"]
        assert inside.training
        free = (~new_mask).flatten().nonzero().flatten()[:total_regrowth]
        new_mask.view(-1)[free] = True
        return new_mask

    dst = ps.DynamicSparsity(
        model,
        0.8,
        optimizer,
        prune=prune,
        growth=growth,
        redistribution=redistribution,
        prune_rate=0.25,
    )
    train(model, optimizer, dst)
    dst.update()
    assert sum(number for _, number in seen) == 3
    assert total(masks_of(model)) == dst.baseline_nonzero


def test_growth_by_momentum_goes_on_with_the_momentum_of_what_it_grows():
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(model, 0.8, optimizer)
    train(model, optimizer, dst, 3)
    before = masks_of(model)
    momenta = {n: optimizer.state[ps.stored(model, n)]["momentum_buffer"] for n in before}
    held = {n: momentum.clone() for n, momentum in momenta.items()}
    dst.update()
    for name, mask in masks_of(model).items():
        grown, dropped = mask & ~before[name], before[name] & ~mask
        assert momenta[name][grown].equal(held[name][grown])
        assert momenta[name][grown].all()
        assert not momenta[name][dropped].any()


def test_what_growth_falls_short_of_is_made_up_for_later():
    model = build()
    optimizer = sgd(model)
    lazy = [True]

    @ps.moves.needs("weights")
    def growth(masking, name, new_mask, total_regrowth, weight):
        number = total_regrowth // 2 if lazy[0] else total_regrowth
        return ps.moves.random_growth(masking, name, new_mask, number, weight)

    for redistribution in ("magnitude", "none"):
        model = build()
        optimizer, lazy[0] = sgd(model), True
        dst = ps.DynamicSparsity(
            model, 0.8, optimizer, growth=growth, redistribution=redistribution, every=1
        )
        train(model, optimizer, dst)
        short = dst.baseline_nonzero - total(masks_of(model))
        assert dst.history[-1].missing == short > 0
        lazy[0] = False
        train(model, optimizer, dst)
        assert dst.history[-1].missing == 0
        assert total(masks_of(model)) == dst.baseline_nonzero


def test_no_layer_is_emptied_or_filled_while_others_have_room():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 2))
    optimizer = sgd(model)

    @ps.moves.needs("weights")
    def to_the_last(masking, name, weight, mask):
        return float(name == "2.weight")

    dst = ps.DynamicSparsity(
        model, 0.9, optimizer, growth="random", redistribution=to_the_last, prune_rate=1.0
    )
    dst.update()
    masks = masks_of(model)
    assert total(masks) == dst.baseline_nonzero == 160 + 160 + 8
    assert int(masks["2.weight"].sum()) == math.floor(0.99 * 80)
    assert all(mask.any() for mask in masks.values())


def test_the_cap_yields_where_the_budget_needs_it():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(
        model, 0.0, optimizer, growth="random", redistribution="magnitude", prune_rate=0.5
    )
    dst.update()
    assert total(masks_of(model)) == dst.baseline_nonzero == 200


@pytest.mark.parametrize("growth", ["random", "momentum", "gradient"])
@pytest.mark.parametrize(
    "pattern",
    [
        ps.patterns.n_of_m(2, 4),
        ps.patterns.n_of_m(1, 5, dim=0),
        ps.patterns.n_of_m(2, 7, remainder="keep"),
        ps.patterns.channel(0),
        ps.patterns.channel(1, norm=2),
        ps.patterns.block((4, 5)),
    ],
    ids=str,
)
def test_patterns_are_kept(pattern, growth):
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5))
    optimizer = sgd(model)
    takes = ps.patterns.takes_sparsity(pattern)
    rules = {
        "0.weight": ps.Prune(*[0.5] * takes, pattern=pattern),
        "2.weight": 0.5,
    }
    dst = ps.DynamicSparsity(
        model, rules, optimizer, growth=growth, redistribution="none", every=2, prune_rate=0.4
    )

    def held(mask):
        """The mask that the pattern makes of it, and how many groups or units it keeps."""
        if not takes:
            return pattern(mask.float()), int(mask.sum())
        units = pattern.pool(mask.float())
        return pattern.spread(units == 1, mask.shape), int((units == 1).sum())

    _, first = held(masks_of(model)["0.weight"])
    changed = 0
    for _ in range(12):
        before = masks_of(model)["0.weight"]
        train(model, optimizer, dst, 2)
        mask = masks_of(model)["0.weight"]
        made, kept = held(mask)
        assert made.equal(mask)
        assert kept == first
        changed += int((mask ^ before).sum())
    assert changed
    assert dst.baseline_nonzero == first + 75  # of the Linear(30, 5) at 50 %


def test_first_masks():
    def first(init, rules=0.9):
        model = build()
        with torch.no_grad():
            model[0].weight[:15] = 0
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        ps.DynamicSparsity(model, rules, sgd(model), growth="random", init=init)
        masks = masks_of(model)
        for name, mask in masks.items():
            assert torch.equal(ps.stored(model, name), weights[name] * mask)
        return masks, weights

    masks, _ = first("constant")
    assert [int(mask.sum()) for mask in masks.values()] == [36, 60, 10]
    again, _ = first("constant")
    assert not masks["0.weight"].equal(again["0.weight"])  # drawn, not by magnitude
    shapes = {name: mask.shape for name, mask in masks.items()}
    for init, distribution in (("linear", "erdos_renyi"), ("erk", "erk")):
        shares = getattr(ps.distributions, distribution)(shapes, 0.9)
        for name, mask in first(init)[0].items():
            assert int(mask.sum()) == round((1 - shares[name]) * mask.numel())
    masks, weights = first("resume")
    assert all(mask.equal(weights[name] != 0) for name, mask in masks.items())
    given = {name: torch.rand(shape) < 0.3 for name, shape in shapes.items()}
    masks, _ = first(given)
    assert all(mask.equal(given[name]) for name, mask in masks.items())
    masks, weights = first("constant", {"0.weight": None, "*": ps.Prune(0.5)})
    assert list(masks) == ["2.weight", "3.weight"]
    assert masks["3.weight"].equal(ps.patterns.unstructured(weights["3.weight"].abs(), 0.5))


def test_a_masked_model_goes_on_from_its_masks():
    model = ps.sparsify(build(), 0.9)
    before = masks_of(model)
    dst = ps.DynamicSparsity(model, 0.9, sgd(model), init="resume")
    assert all(mask.equal(before[name]) for name, mask in masks_of(model).items())
    assert dst.baseline_nonzero == total(before)


@ps.moves.needs("weights")
def nan_importance(masking, name, weight, mask):
    return math.nan


@ps.moves.needs("weights")
def other_shape(masking, mask, weight, name):
    return mask[1:]


@ps.moves.needs("weights")
def adds(masking, mask, weight, name):
    return torch.ones_like(mask)


@ps.moves.needs("weights")
def drops(masking, name, new_mask, total_regrowth, weight):
    return torch.zeros_like(new_mask)


@ps.moves.needs("weights")
def grows_too_much(masking, name, new_mask, total_regrowth, weight):
    return torch.ones_like(new_mask)


PLAIN = {"growth": "random", "redistribution": "magnitude"}


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"redistribution": nan_importance}, 'a finite number; got nan for "0.weight"'),
        ({"redistribution": lambda *_: math.inf}, "a finite number; got inf"),
        ({"redistribution": lambda *_: "3"}, "a finite number; got '3'"),
        ({"redistribution": lambda *_: [1]}, r"must return a number; got \[1\]"),
        ({"prune": other_shape}, r'shape \(30, 12\) for "0.weight"; got \(29, 12\)'),
        ({"prune": lambda *_: None}, "got NoneType"),
        ({"prune": adds}, 'keep a part of the mask; it adds entries to "0.weight"'),
        ({"growth": drops}, 'must keep the mask that it gets; it drops from "0.weight"'),
        ({"growth": grows_too_much}, r"must add \d+ connections at most"),
        ({"prune_rate": lambda step: 1.5 * (step > 0)}, r"`prune_rate\(2\)` must be in \[0, 1\]"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_a_failed_update_leaves_masks_budget_and_count(keywords, text):
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(model, 0.8, optimizer, every=2, **{**PLAIN, **keywords})
    train(model, optimizer, dst)
    before, state = masks_of(model), dst.state_dict()
    with pytest.raises((ValueError, TypeError), match=text):
        train(model, optimizer, dst)
    after = masks_of(model)
    assert all(after[name].equal(mask) for name, mask in before.items())
    assert dst.steps == state["steps"] == 1
    assert not dst.history


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"growth": "momentum", "redistribution": "none"}, "must keep a momentum.*SGD keeps none"),
        ({"redistribution": "momentum"}, "must keep a momentum"),
        ({"growth": "fastest"}, "`growth` must be one of .* or a function; got 'fastest'"),
        ({"prune": 3}, "`prune` must be a name or a function; got 3"),
        ({"prune_rate": 1.5}, r"`prune_rate` must be in \[0, 1\]"),
        ({"prune_rate": lambda step: math.nan}, r"`prune_rate\(0\)` must be in"),
        ({"every": 0}, "`n` must be at least 1"),
        ({"init": "ones"}, "`init` must be one of"),
        ({"init": {"0.weight": torch.ones(30, 12)}}, '"2.weight", "3.weight" have none'),
        ({"init": {"nowhere": torch.ones(2)}}, "`init` must hold a mask for each"),
        ({"every": 2.0}, "`every` must be a whole number of steps, or a function"),
        ({"every": "2"}, "`every` must be a whole number"),
        ({"prune_rate": "much"}, r"`prune_rate` must be a number in \[0, 1\]; got 'much'"),
        ({"rules": {"*": None}}, "`rules` must give one tensor a mask or more"),
        (
            {"growth": lambda masking, name, mask: None},
            r"must take \(masking, name, new_mask.*got \(m",
        ),
        ({"prune": lambda: None}, r"`prune` must take \(masking, mask, weight, name\) or"),
        (
            {
                "redistribution": "none",
                "growth": lambda *_: None,
                "rules": {"0.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0))},
            },
            "pairs and patterns of units",
        ),
        ({"rules": 1.0}, "must leave each tensor a connection or more"),
        ({"rules": ps.Gate()}, "must give each tensor a bool mask"),
        ({"rules": {"0.weight": torch.rand(30, 12)}}, "must give each tensor a bool mask"),
        ({"rules": {"0.weight": ps.Fixed(None)}}, "must give each tensor a bool mask"),
        (
            {"rules": {"0.weight": ps.Prune(pattern=ps.patterns.nearly_diagonal(3))}},
            "unstructured, of units or n_of_m",
        ),
        (
            {"rules": {"0.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0))}},
            '`redistribution` must be "none"',
        ),
        ({"growth": "gradient"}, "`every` must say when updates are"),
        ({"rules": {"nowhere": 0.5}}, "must each reach a tensor"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_bad_input_is_refused_and_changes_nothing(keywords, text):
    model = build()
    optimizer = sgd(model, momentum=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=text):
        ps.DynamicSparsity(model, keywords.pop("rules", 0.8), optimizer, **{**PLAIN, **keywords})
    assert not ps.is_sparse(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_growth_within_groups_is_by_a_score():
    model = build()
    rules = {"0.weight": ps.Prune(pattern=ps.patterns.n_of_m(2, 4))}
    for growth in ("momentum_neuron", grows_too_much):
        with pytest.raises(ValueError, match='`growth` must be "random", "momentum" or "gradient"'):
            ps.DynamicSparsity(model, rules, sgd(model), growth=growth, redistribution="none")


def test_weights_that_are_not_trained_or_parametrized_are_refused():
    model = build()
    with pytest.raises(ValueError, match='must hold the parameters.*"2.weight"'):
        ps.DynamicSparsity(model, 0.5, sgd(model[0]))
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.9)
    with pytest.raises(ValueError, match='must hold the parameters.*"2.weight"'):
        ps.DynamicSparsity(model, 0.5, optimizer)
    model = build()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match='not be parametrized underneath; "0.weight" is'):
        ps.DynamicSparsity(model, 0.5, sgd(model))
    assert not ps.is_sparse(model)


@pytest.mark.parametrize("growth", ["momentum", "gradient"])
def test_an_update_before_the_first_backward_is_refused(growth):
    model = build()
    dst = ps.DynamicSparsity(model, 0.8, sgd(model), growth=growth, redistribution="none", every=1)
    before = masks_of(model)
    with pytest.raises(RuntimeError, match="must come after a backward"):
        dst.step()
    assert dst.steps == 0
    assert all(mask.equal(before[name]) for name, mask in masks_of(model).items())


def test_an_update_by_hand_has_no_dense_gradient():
    model = build()
    optimizer = sgd(model)
    dst = ps.rigl(model, 0.8, optimizer, stop=100, every=10)
    train(model, optimizer, dst)
    with pytest.raises(RuntimeError, match="`update` must be left to `step`"):
        dst.update()


def test_a_step_after_squash_says_what_happened():
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(model, 0.8, optimizer)
    ps.squash(model)
    with pytest.raises(RuntimeError, match="must stay where it is; it was taken off"):
        dst.step()


def test_an_emptied_layer_asks_no_function_of_ones_own_for_a_mean_of_nothing():
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    dst = ps.DynamicSparsity(
        model, 0.8, optimizer, prune=extensions.magnitude_variance_pruning,
        redistribution=extensions.variance_redistribution, prune_rate=0.3,
    )  # fmt: skip
    train(model, optimizer, dst, 3)
    ps.deploy_masks(model, {"3.weight": torch.zeros(5, 20)})
    dst.update()
    assert dst.history[-1].missing == 0
    assert int(ps.mask_of(model, "3.weight").sum()) >= 1  # it gets the first one


def test_a_state_of_other_tensors_is_refused():
    one, two = build(), nn.Linear(5, 5)
    state = ps.DynamicSparsity(one, 0.5, sgd(one)).state_dict()
    other = ps.DynamicSparsity(two, 0.5, sgd(two))
    with pytest.raises(ValueError, match="must be of the same rules"):
        other.load_state_dict(state)


def test_presets_say_what_they_are():
    model = build()
    dst = ps.sparse_momentum(model, 0.8, sgd(model), stop=50)
    assert dst.moves.prune is ps.moves.magnitude_prune
    assert dst.moves.growth is ps.moves.momentum_growth
    assert dst.prune_rate == Cosine(0.5, 0.0, stop=50)
    model = build()
    dst = ps.sparse_evolutionary_training(model, 0.8, sgd(model))
    assert (dst.moves.prune, dst.moves.growth) == (ps.moves.set_prune, ps.moves.random_growth)
    assert dst.prune_rate == Constant(0.3)
    assert dst.moves.redistribution is ps.moves.no_redistribution


def test_functions_of_ones_own_go_with_an_optimizer_without_state():
    model = build()
    optimizer = sgd(model, momentum=0.0)

    def importance(masking, name, weight, mask):
        return weight.abs().mean()  # a tensor with a graph, as long as nobody says otherwise

    dst = ps.DynamicSparsity(
        model, 0.8, optimizer, growth="random", redistribution=importance, every=5
    )
    train(model, optimizer, dst, 10)
    assert len(dst.history) == 2


def test_importance_below_zero_is_none():
    model = build()
    optimizer = sgd(model)

    def signed(masking, name, weight, mask):  # the tutorial's first example
        momentum = masking.optimizer.state[weight]["momentum_buffer"]
        found[name] = momentum[mask.bool()].sum().item()
        return found[name]

    found = {}
    dst = ps.DynamicSparsity(model, 0.8, optimizer, redistribution=signed, growth="random")
    for _ in range(5):
        train(model, optimizer, dst)
        dst.update()
        assert total(masks_of(model)) == dst.baseline_nonzero
    assert min(found.values()) < 0


def test_a_layer_that_is_nearly_full_loses_less_if_it_is_important():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    optimizer = sgd(model)
    seen = {}

    @ps.moves.needs("weights")
    def importance(masking, name, weight, mask):
        return {"0.weight": 5.0, "1.weight": 0.0, "2.weight": 1.0}[name]

    @ps.moves.needs("weights")
    def prune(masking, mask, weight, name):
        seen[name] = masking.name2prune_rate[name]
        return ps.moves.magnitude_prune(masking, mask, weight, name)

    rules = {"0.weight": 0.1, "1.weight": 0.1, "2.weight": 0.5}
    dst = ps.DynamicSparsity(
        model, rules, optimizer, prune=prune, growth="random", redistribution=importance,
        prune_rate=0.4,
    )  # fmt: skip
    dst.update()
    assert seen == {"0.weight": pytest.approx(0.1), "1.weight": 0.4, "2.weight": 0.4}


def test_functions_for_all_layers_may_have_defaults_and_owe_what_was_missing():
    model = build()
    optimizer = sgd(model)
    asked = []

    @ps.moves.needs("weights")
    def prune(masking, threshold=0.05, *, verbose=False):
        removed = 0
        for module in masking.modules:
            for name, weight in module.named_parameters():
                if name in masking.masks:
                    mask = masking.masks[name]
                    removed += int(mask.sum())
                    mask[:] = mask & (weight.abs() > threshold)
                    removed -= int(mask.sum())
        return removed

    @ps.moves.needs("weights")
    def growth(masking, total_regrowth, least=1):
        asked.append((masking.total_removed, total_regrowth))
        left = total_regrowth // 2 if len(asked) == 1 else total_regrowth
        for mask in masking.masks.values():
            free = (~mask).flatten().nonzero().flatten()[:left]
            mask.view(-1)[free] = True
            left -= len(free)
        return sum(int(mask.sum()) for mask in masking.masks.values())

    dst = ps.DynamicSparsity(
        model, 0.8, optimizer, prune=functools.partial(prune, threshold=0.1), growth=growth,
        redistribution="nonzero",
    )  # fmt: skip
    dst.update()
    missing = dst.history[0].missing
    assert asked[0][0] == asked[0][1] > missing > 0
    assert total(masks_of(model)) == dst.baseline_nonzero - missing
    dst.update()
    assert asked[1][1] == asked[1][0] + missing
    assert total(masks_of(model)) == dst.baseline_nonzero


def test_two_controllers_share_a_model():
    model = build()
    optimizer = sgd(model)
    one = ps.rigl(model, {"0.weight": 0.8}, optimizer, stop=100, every=2, init="constant")
    two = ps.rigl(model, {"2.weight": 0.8}, optimizer, stop=100, every=2, init="constant")
    three = ps.sparse_momentum(model, {"3.weight": 0.5}, optimizer, stop=100, every=2)
    for _ in range(4):
        train(model, optimizer, one)
        two.step()
        three.step()
    assert len(one.history) == len(two.history) == len(three.history) == 2
    assert [ps.mask_of(model, n).sum() for n in ("0.weight", "2.weight", "3.weight")] == [
        72,
        120,
        50,
    ]


def test_a_failed_update_asks_for_the_dense_gradient_again():
    model = build()
    optimizer = sgd(model)
    fails = [True]

    @ps.moves.needs("gradient")
    def growth(masking, name, new_mask, total_regrowth, weight):
        if fails[0]:
            raise KeyError(name)
        seen[name] = masking.get_gradient_for_weight(weight).clone()
        return ps.moves.gradient_growth(masking, name, new_mask, total_regrowth, weight)

    seen = {}
    dst = ps.DynamicSparsity(model, 0.8, optimizer, growth=growth, redistribution="none", every=2)
    train(model, optimizer, dst)
    with pytest.raises(KeyError) as error:
        train(model, optimizer, dst)
    assert 'while growth was called for "0.weight"' in error.value.__notes__
    fails[0] = False
    optimizer.zero_grad()
    x = torch.randn(8, 12)
    dense = build()
    dense.load_state_dict(ps.dense_state_dict(model))
    for net in (model, dense):
        net(x).square().mean().backward()
    optimizer.step()
    dst.step()
    assert dst.steps == 2
    for name, grad in seen.items():
        torch.testing.assert_close(grad, dict(dense.named_parameters())[name].grad)


def test_a_grad_scaler_that_skips_steps_postpones_updates():
    model = build()
    optimizer = sgd(model)
    dst = ps.sparse_momentum(model, 0.8, optimizer, stop=100, every=1)
    model(torch.full((8, 12), math.inf)).square().mean().backward()  # step() is skipped
    dst.step()
    assert not dst.history
    train(model, optimizer, dst)
    assert [update.step for update in dst.history] == [2]


def test_gradients_are_masked_again_once_somebody_else_sets_the_masks():
    model = build()
    optimizer = sgd(model)
    dst = ps.sparse_momentum(model, 0.8, optimizer, stop=100)
    train(model, optimizer, dst, 2)
    pruner = ps.GradualPruning(model, 0.9, optimizer, schedule=Constant(1.0), every=10)
    train(model, optimizer, pruner, 2)
    for name, mask in masks_of(model).items():
        assert not ps.stored(model, name).grad[~mask].any()


def test_masked_weights_are_zero_at_an_update_whatever_the_optimizer_does():
    model = build()
    muon = torch.optim.Muon([layer.weight for layer in (model[0], model[2], model[3])], 0.1)

    @ps.moves.needs("weights")
    def prune(masking, mask, weight, name):
        assert not weight[mask == 0].any()
        return ps.moves.set_prune(masking, mask, weight, name)

    dst = ps.DynamicSparsity(
        model, 0.8, muon, prune=prune, growth="random", redistribution="none", every=3
    )
    train(model, muon, dst, 2)
    stored = ps.stored(model, "0.weight")
    assert stored[~ps.mask_of(model, "0.weight")].any()  # Muon moves them
    train(model, muon, dst, 4)
    assert len(dst.history) == 2


def test_its_state_is_whole():
    def made():
        model = build()
        return ps.DynamicSparsity(model, 0.8, sgd(model), every=3)

    one, two = made(), made()
    one.steps, one._is_due, one._missing, one.baseline_nonzero = 7, True, {"0.weight": 3}, 123
    two.load_state_dict(one.state_dict())
    assert two.state_dict().keys() == one.state_dict().keys()
    assert (two.steps, two._is_due, two._missing, two.baseline_nonzero) == (
        7, True, {"0.weight": 3}, 123,
    )  # fmt: skip


@pytest.mark.parametrize("growth", ["momentum", "gradient"])
def test_a_copy_of_all_goes_on_alike(growth):
    torch.manual_seed(0)
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(model, 0.8, optimizer, growth=growth, redistribution="none", every=3)
    train(model, optimizer, dst, 2)
    copies = copy.deepcopy((model, optimizer, dst))
    batches = [torch.randn(8, 12) for _ in range(4)]
    for net, opt, controller in ((model, optimizer, dst), copies):
        for x in batches:
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
            controller.step()
    other = masks_of(copies[0])
    assert len(dst.history) == len(copies[2].history) == 2
    assert all(mask.equal(other[name]) for name, mask in masks_of(model).items())
    pickle.loads(pickle.dumps(dst))


def test_resuming_from_a_real_mask_is_refused():
    model = ps.sparsify(build(), {"0.weight": torch.rand(30, 12)})
    with pytest.raises(ValueError, match="must find bool masks.*`binarize` the model first"):
        ps.DynamicSparsity(model, {"0.weight": 0.5}, sgd(model), init="resume")


def test_sparse_gradients_of_embeddings_grow_connections():
    model = nn.Embedding(10, 6, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dst = ps.rigl(model, {"weight": 0.5}, optimizer, stop=100, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randint(10, (8,))).square().sum().backward()
        optimizer.step()
        dst.step()
    assert len(dst.history) == 2
    assert int(ps.mask_of(model, "weight").sum()) == 30


def test_what_a_move_did_not_ask_for_it_does_not_get():
    model = build()
    optimizer = sgd(model)

    def growth(masking, name, new_mask, total_regrowth, weight):
        return ps.moves.gradient_growth(masking, name, new_mask, total_regrowth, weight)

    dst = ps.DynamicSparsity(model, 0.8, optimizer, growth=growth, redistribution="none")
    train(model, optimizer, dst)
    with pytest.raises(RuntimeError, match="decorate the function that reads it"):
        dst.update()

    def copied(masking, name, weight, mask):
        return masking.get_momentum_for_weight(weight.data)

    dst = ps.DynamicSparsity(model, 0.8, optimizer, redistribution=copied)
    train(model, optimizer, dst)
    with pytest.raises(ValueError, match="must be one that a move was given"):
        dst.update()
    with pytest.raises(ValueError, match='`what` must be of "weights", .*got "momentm"'):
        ps.moves.needs("momentm")
    with pytest.raises(TypeError, match="`optimizer` must be one of torch's kind; got None"):
        ps.DynamicSparsity(build(), 0.8, None)
