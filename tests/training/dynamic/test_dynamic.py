"""Dynamic sparsity: its budget, its methods, its first masks."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.schedules import Constant, Cosine
from tests.helpers.training import build, dense_twin, masks_of, sgd, total, train

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
        dense = dense_twin(model)
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
    one.steps, one._is_due, one._missing = 7, True, {"0.weight": 3}
    two.load_state_dict(one.state_dict())
    assert two.state_dict().keys() == one.state_dict().keys()
    assert (two.steps, two._is_due, two._missing, two.baseline_nonzero) == (
        7, True, {"0.weight": 3}, one.baseline_nonzero,
    )  # fmt: skip


def test_a_state_of_another_sparsity_is_refused():
    models = build(), build()
    half, sparser = (
        ps.DynamicSparsity(model, sparsity, sgd(model), every=3)
        for model, sparsity in zip(models, (0.5, 0.8), strict=True)
    )
    with pytest.raises(ValueError, match=r"must be of a network with .* connections"):
        sparser.load_state_dict(half.state_dict())


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
