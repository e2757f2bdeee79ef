import importlib.util
import math
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
    number, left = dict.fromkeys(names, 0), removed
    others = list(names)
    while True:  # who is full takes what it can, the others share the rest
        wanted = {n: left * share[n] / sum(share[m] for m in others) for n in others}
        full = [n for n in others if wanted[n] >= room[n]]
        if not full:
            break
        number |= {n: room[n] for n in full}
        left -= sum(room[n] for n in full)
        others = [n for n in others if n not in full]
    number |= {n: math.floor(wanted[n]) for n in others}
    for n in sorted(others, key=lambda n: number[n] - wanted[n])[: removed - sum(number.values())]:
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
        ({"redistribution": nan_importance}, 'a finite number >= 0; got nan for "0.weight"'),
        ({"redistribution": lambda *_: -1.0}, "a finite number >= 0; got -1.0"),
        ({"redistribution": lambda *_: "high"}, "must return a number; got 'high'"),
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
