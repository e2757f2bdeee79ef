"""Scores that need more than the weight, against the same by other means."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import parasparse as ps
from tests.helpers.cases import PairLinear, Tied
from tests.helpers.scoring import batches, build, collected, loss_of, prune


@pytest.fixture
def seen():
    return collected()


def gradients(model, data, name):
    """One for each batch, by a single weight and central differences."""
    weight = dict(model.named_parameters())[name]
    found = torch.zeros(len(data), *weight.shape, dtype=weight.dtype)
    with torch.no_grad():
        for row, x in zip(found, data, strict=True):
            for index in range(weight.numel()):
                sides = []
                for step in (1e-5, -1e-5):
                    weight.view(-1)[index] += step
                    sides.append(loss_of(model(x)))
                    weight.view(-1)[index] -= step
                row.view(-1)[index] = (sides[0] - sides[1]) / 2e-5
    return found


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_first_order_scores_are_their_formulas(seen, name):
    model, data, statistics = seen
    weight, grads = dict(model.named_parameters())[name].detach(), gradients(model, data, name)
    mean = grads.mean(0)
    want = {
        ps.scores.taylor: (weight * mean) ** 2,
        ps.scores.snip: (weight * mean).abs(),
        ps.scores.fisher: weight**2 * (grads**2).mean(0) / 2,
        ps.scores.movement: -(weight * grads).sum(0),
    }
    for score, values in want.items():
        torch.testing.assert_close(score(statistics)(weight, name), values, rtol=1e-6, atol=1e-12)


def test_snip_is_the_derivative_by_the_masks(seen):
    model, data, statistics = seen
    weights = {n: p.detach() for n, p in model.named_parameters()}
    ones = {n: torch.ones_like(w, requires_grad=True) for n, w in weights.items()}
    masked = {n: w * ones[n] for n, w in weights.items()}
    loss = sum(loss_of(functional_call(model, masked, x)) for x in data) / len(data)
    grads = torch.autograd.grad(loss, [ones[n] for n in statistics.sums])
    total = sum(grad.abs().sum() for grad in grads)
    found = {n: ps.scores.snip(statistics)(weights[n], n) for n in statistics.sums}
    for (name, score), grad in zip(found.items(), grads, strict=True):
        share = score / sum(values.sum() for values in found.values())
        torch.testing.assert_close(share, grad.abs() / total, msg=name)


def test_grasp_is_by_the_whole_hessian():
    torch.manual_seed(0)
    model, (x,) = build().double(), batches(1)
    names = ["0.weight", "2.weight"]
    with ps.scores.collect(model) as statistics:
        loss = loss_of(model(x))
        statistics.add_curvature(loss)
        loss.backward()  # the graph is still there
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def of_flat(flat):
        parts = flat.split([weights[n].numel() for n in names])
        new = {n: part.view_as(weights[n]) for n, part in zip(names, parts, strict=True)}
        return loss_of(functional_call(model, weights | new, x))

    flat = torch.cat([weights[n].flatten() for n in names])
    grad = torch.autograd.functional.jacobian(of_flat, flat)
    product = torch.autograd.functional.hessian(of_flat, flat) @ grad
    found = [ps.scores.grasp(statistics)(weights[n], n).flatten() for n in names]
    torch.testing.assert_close(torch.cat(found), flat * product)
    assert statistics.sums["0.weight"].passes == 1  # the user's own, not those of the curvature


def test_synflow_is_by_every_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with ps.scores.collect(model) as statistics:
        statistics.add_synaptic_flow(torch.ones(1, 4))
    first, second = (model[i].weight.detach().double().abs() for i in (0, 2))
    paths = torch.einsum("hi,oh->ohi", first, second)
    torch.testing.assert_close(ps.scores.synflow(statistics)(first, "0.weight"), paths.sum(0))
    torch.testing.assert_close(ps.scores.synflow(statistics)(second, "2.weight"), paths.sum(2))


def test_synflow_leaves_the_model_as_it_was_and_conserves_the_flow():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ps.scores.collect(model) as statistics:
        statistics.add_synaptic_flow(torch.ones(1, 2, 5, 5))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].training
    # Each output's incoming flow, with its bias, is what leaves it: a law of the paper.
    flow = statistics.synaptic_flow("4.weight")
    weight = model[4].weight.detach().double().abs()
    torch.testing.assert_close(flow / weight, (flow / weight)[:1].expand_as(flow))


def test_synflow_step_by_step_empties_no_layer():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(20, 20), nn.ReLU())])
    for k in range(1, 101):
        with ps.scores.collect(model) as statistics:
            statistics.add_synaptic_flow(torch.ones(1, 20))
        score = ps.scores.zeros_first(ps.scores.synflow(statistics))
        ps.sparsify(model, ps.Prune(1 - 0.02 ** (k / 100), score=score, scope="global"))
    assert all(mask.any() for _, mask in ps.named_masks(model))


def test_what_several_calls_add_is_summed():
    model, data = build().double(), batches(2)
    seen = []
    for inputs in (data, data[:1], data[1:]):
        with ps.scores.collect(model) as statistics:
            for x in inputs:
                statistics.add_curvature(loss_of(model(x)))
                statistics.add_synaptic_flow(x)
        seen.append(statistics)
    both, one, two = seen
    for read in (type(both).hessian_gradient, type(both).synaptic_flow):
        want = read(one, "0.weight") + read(two, "0.weight")
        torch.testing.assert_close(read(both, "0.weight"), want)


def test_wanda_is_each_weight_times_the_norm_of_its_input():
    torch.manual_seed(0)
    model, data = nn.Linear(6, 4), batches(3, torch.float32)
    with torch.no_grad(), ps.scores.collect(model) as statistics:
        for x in data:
            model(x.view(2, 2, 6))
    norm = torch.cat(data).norm(dim=0)
    raw = ps.scores.wanda(statistics, per_output=False)(model.weight.detach(), "weight")
    torch.testing.assert_close(raw, model.weight.detach().abs() * norm)
    mask = ps.mask_of(prune(model, ps.scores.wanda(statistics)), "weight")
    want = torch.zeros(4, 6, dtype=torch.bool)
    for row, scores in zip(want, raw, strict=True):
        row[scores.argsort(descending=True)[:3]] = True
    assert mask.equal(want)
    groups = ps.sparsify(
        copy.deepcopy(model),
        ps.Prune(score=ps.scores.wanda(statistics), pattern=ps.patterns.n_of_m(1, 2)),
    )
    assert ps.mask_of(groups, "weight").equal(ps.patterns.n_of_m(1, 2)(raw))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2),
        nn.Conv2d(4, 6, (2, 3), padding=1, dilation=2, groups=2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", groups=4),
        nn.Conv3d(4, 2, 2),
    ],
    ids=str,
)
def test_inputs_of_convolutions_are_those_that_a_weight_meets(layer):
    x = torch.randn(2, 4, *[7] * (layer.weight.ndim - 2))
    with torch.no_grad(), ps.scores.collect(layer) as statistics:
        layer(x)
    found = statistics.input_norm("weight")
    probe = copy.deepcopy(layer)
    for index in range(0, layer.weight.numel(), 5):  # alone, with weight 1: its output is its input
        with torch.no_grad():
            probe.weight.zero_().view(-1)[index] = 1
            probe.bias.zero_()
            want = probe(x).norm()
        torch.testing.assert_close(found.reshape(-1)[index], want)


def test_inputs_of_embeddings_and_ties_are_counted():
    model = Tied()
    index = torch.tensor([[0, 1, 1], [5, 0, 1]])
    inputs = []
    model.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad(), ps.scores.collect(model, "embedding.weight") as statistics:
        model(index)
    counts = torch.bincount(index.flatten(), minlength=12).float()
    want = (counts[:, None] + inputs[0].reshape(-1, 6).square().sum(0)).sqrt()
    torch.testing.assert_close(statistics.input_norm("embedding.weight"), want)


def test_a_pair_has_the_inputs_of_both_its_parts():
    model, (one, two) = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)]), batches(2, torch.float)
    model.weight_re, model.weight_im = model[0].weight, model[1].weight
    with torch.no_grad(), ps.scores.collect(model, "weight") as statistics:
        model[0](one)
        model[1](two)
    norm = torch.cat([one, two]).norm(dim=0)
    torch.testing.assert_close(statistics.input_norm("weight"), norm[None])


@pytest.mark.parametrize("kind", ["complex", "pair", "masked pair"])
def test_complex_weights_change_the_loss_along_both_parts(kind):
    torch.manual_seed(0)
    if kind == "complex":
        model, x = nn.Linear(6, 4, dtype=torch.complex128), torch.randn(3, 6) + 0j
        x = x.to(torch.complex128)
        name = "weight"
    else:
        model, x, name = PairLinear().double(), batches(1)[0], "weight"
        if "masked" in kind:
            ps.sparsify(model, {"*": 0.5})
    targets = "*"
    with ps.scores.collect(model, targets) as statistics:
        loss = loss_of(model(x))
        statistics.add_curvature(loss)
        loss.backward()
    first = model.weight if kind == "complex" else torch.complex(model.weight_re, model.weight_im)
    weight = first.detach()

    def at(change):
        new = copy.deepcopy(ps.unsparsify(copy.deepcopy(model)))
        with torch.no_grad():
            if kind == "complex":
                new.weight.copy_(change)
            else:
                new.weight_re.copy_(change.real)
                new.weight_im.copy_(change.imag)
        return loss_of(new(x)).detach()

    scores = ps.scores.snip(statistics)(weight, name)
    for i, j in ((0, 0), (2, 3), (3, 5)):
        sides = []
        for step in (1e-6, -1e-6):
            changed = weight.clone()
            changed[i, j] *= 1 + step
            sides.append(at(changed))
        torch.testing.assert_close(scores[i, j], ((sides[0] - sides[1]) / 2e-6).abs())
    for score in (ps.scores.taylor, ps.scores.fisher, ps.scores.movement, ps.scores.grasp):
        found = score(statistics)(weight, name)
        assert found.shape == weight.shape
        assert not found.is_complex()
        assert found.isfinite().all()
    masked = (
        prune(ps.unsparsify(model), ps.scores.taylor(statistics), 0.5)
        if kind != "pair"
        else (ps.sparsify(model, {"*": ps.Prune(0.5, score=ps.scores.taylor(statistics))}))
    )
    assert all(int(mask.sum()) == 12 for _, mask in ps.named_masks(masked))


def test_fisher_takes_the_parts_of_a_complex_weight_by_themselves():
    model, data = nn.Linear(6, 4, dtype=torch.complex128), batches(3, torch.complex128)
    grads = [torch.autograd.grad(loss_of(model(x)), model.weight)[0] for x in data]
    with ps.scores.collect(model) as statistics:
        for x in data:
            loss_of(model(x)).backward()
    weight = model.weight.detach()
    want = sum(
        (weight.real * g.real).square() / 2 + (weight.imag * g.imag).square() / 2 for g in grads
    )
    torch.testing.assert_close(ps.scores.fisher(statistics)(weight, "weight"), want / 3)


def test_movement_is_of_the_weights_as_they_were():
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    want = torch.zeros(5, 6, dtype=torch.double)
    with ps.scores.collect(model) as statistics:
        for x in batches(5):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            want -= (model[0].weight * model[0].weight.grad).detach()
            optimizer.step()
    found = ps.scores.movement(statistics)(model[0].weight.detach(), "0.weight")
    torch.testing.assert_close(found, want)


def test_small_gradients_still_rank():
    model = build()
    with ps.scores.collect(model) as statistics:
        (loss_of(model(torch.randn(4, 6))) * 1e-24).backward()
    scores = ps.scores.taylor(statistics)(model[0].weight.detach(), "0.weight")
    assert (scores > 0).all()


def test_a_hessian_of_zero_scores_zero():
    model = nn.Linear(6, 1)
    with ps.scores.collect(model) as statistics:
        statistics.add_curvature(model(torch.randn(4, 6)).sum())
    assert not ps.scores.grasp(statistics)(model.weight.detach(), "weight").any()


def test_wanda_gives_ranks_from_the_first_of_equals_down():
    with torch.no_grad():
        for layer, x in (
            (nn.Linear(2, 3).double(), torch.tensor([[1.0, 1.0]]).double()),
            (nn.Embedding(2, 3), torch.tensor([0, 1])),
        ):
            layer.weight.fill_(1.0)
            with ps.scores.collect(layer, "weight") as statistics:
                layer(x)
            ranks = ps.scores.wanda(statistics)(layer.weight, "weight")
            by_output = ranks.T if isinstance(layer, nn.Embedding) else ranks
            assert by_output.tolist() == [[1.0, 0.5]] * 3
        wide = nn.Linear(100_000, 1)  # torch sorts few entries stably in any case
        wide.weight.fill_(1.0)
        with ps.scores.collect(wide) as statistics:
            wide(torch.ones(1, 100_000))
        assert (ps.scores.wanda(statistics)(wide.weight, "weight").diff() < 0).all()


def test_what_is_ranked_by_output_depends_on_what_the_outputs_are():
    table = nn.Embedding(5, 4)
    with torch.no_grad(), ps.scores.collect(table, "weight") as statistics:
        table(torch.tensor([1, 1, 1, 1, 2]))
    ps.sparsify(table, {"weight": ps.Prune(0.8, score=ps.scores.wanda(statistics))})
    kept = ps.mask_of(table, "weight")
    assert kept.sum(0).tolist() == [1, 1, 1, 1]  # by column, and only what was looked up
    assert not kept[[0, 3, 4]].any()
    depthwise = nn.Conv2d(4, 4, 1, groups=4)
    with torch.no_grad(), ps.scores.collect(depthwise) as statistics:
        depthwise(torch.randn(2, 4, 3, 3))
    raw = depthwise.weight.detach().abs() * statistics.input_norm("weight")
    assert torch.equal(ps.scores.wanda(statistics)(depthwise.weight.detach(), "weight"), raw)
