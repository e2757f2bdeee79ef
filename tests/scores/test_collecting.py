"""The context that collects statistics: what it sees, what it leaves behind, what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import parasparse as ps
from tests.helpers.cases import PairLinear
from tests.helpers.scoring import batches, build, collected, loss_of, prune


@pytest.fixture
def seen():
    return collected()


def test_masked_entries_have_their_gradient_and_grad_stays_as_it_is():
    model, (x,) = ps.sparsify(build().double(), 0.5), batches(1)
    dense = build().double()
    dense.load_state_dict(ps.dense_state_dict(model))
    loss_of(dense(x)).backward()
    with ps.scores.collect(model) as statistics:
        loss_of(model(x)).backward()
    for name, mask in ps.named_masks(model):
        grad = dict(dense.named_parameters())[name].grad
        torch.testing.assert_close(statistics.gradient(name), grad)
        assert grad[~mask].any()
        torch.testing.assert_close(ps.stored(model, name).grad, grad * mask)
    assert not any("probe" in vars(module) for module in model.modules())


def test_scores_drive_controllers():
    model = ps.sparsify(build(), 0.0)  # masks that are there at once, for dropped entries to score
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ps.scores.collect(model) as statistics:
        pruner = ps.GradualPruning(  # before the first backward: nothing is ranked at 0

            model, ps.Prune(0.8, score=ps.scores.movement(statistics)), optimizer,
            schedule=ps.schedules.Linear(0.0, 1.0, stop=6), every=2,
        )  # fmt: skip
        for _ in range(6):
            loss_of(model(torch.randn(4, 6))).backward()
            optimizer.step()
            pruner.step()
    assert [round(update.sparsity["0.weight"], 1) for update in pruner.history] == [0.3, 0.5, 0.8]


def test_amp_half_and_sparse_gradients_are_summed_in_32_bits():
    model = nn.Sequential(nn.Embedding(10, 6, sparse=True), nn.Linear(6, 3)).bfloat16()
    with ps.scores.collect(model, ["0.weight", "1.weight"]) as statistics:
        model(torch.tensor([[1, 2, 2]])).float().square().mean().backward()
    for name in ("0.weight", "1.weight"):
        grad = statistics.gradient(name)
        assert grad.dtype == torch.float32
        assert grad.any()
    model = build()
    with (
        ps.scores.collect(model) as statistics,
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss_of(model(torch.randn(4, 6))).backward()
    assert ps.scores.wanda(statistics)(model[0].weight.detach(), "0.weight").dtype == torch.float32


def test_an_inner_model_of_a_wrapper_has_its_plain_names():
    model = nn.DataParallel(build())
    with ps.scores.collect(model) as statistics:
        loss_of(model(torch.randn(4, 6))).backward()
    assert list(statistics.sums) == ["0.weight", "2.weight"]
    prune(model, ps.scores.taylor(statistics))


def test_hooks_are_gone_after_the_block_also_when_it_fails():
    model = ps.sparsify(build(), {"0.weight": 0.5})
    with pytest.raises(KeyError), ps.scores.collect(model) as statistics:
        raise KeyError
    loss_of(model(torch.randn(4, 6))).backward()
    assert not any(sums.passes for sums in statistics.sums.values())
    assert not statistics.squared_inputs
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert repr(statistics) == "Statistics(2 tensors)"


def test_without_backward_no_gradients_are_held():
    model = build()
    with torch.no_grad(), ps.scores.collect(model) as statistics:
        model(torch.randn(4, 6))
    assert all(sums.gradient is None for sums in statistics.sums.values())


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (ps.scores.taylor, 'no gradient of "0.weight" was collected: no backward pass'),
        (ps.scores.fisher, 'no gradient of "0.weight"'),
        (ps.scores.movement, 'no gradient of "0.weight"'),
        (ps.scores.grasp, "Call `statistics.add_curvature"),
        (ps.scores.synflow, "Call `statistics.add_synaptic_flow"),
        (ps.scores.wanda, 'the input of "0.weight" was not collected'),
    ],
)
def test_what_was_not_seen_is_said(score, text):
    model = build()
    with ps.scores.collect(model) as statistics:
        pass
    with pytest.raises(RuntimeError, match=text):
        prune(model, score(statistics))
    with pytest.raises(RuntimeError, match='no statistics were collected for "1.weight", only for'):
        score(statistics)(torch.ones(2, 2), "1.weight")


def test_bad_targets_and_losses_are_refused():
    model = build()
    with (
        pytest.raises(ValueError, match="`targets` must each reach a tensor; 'nowhere'"),
        ps.scores.collect(model, ["0.weight", "nowhere"]),
    ):
        pass
    with (
        ps.scores.collect(model) as statistics,
        pytest.raises(RuntimeError, match="`loss` must depend on the tensors"),
    ):
        statistics.add_curvature((torch.ones(2, requires_grad=True) * 2).sum())
    ps.sparsify(model, 0.5)
    with (
        ps.dense_gradients(model),
        pytest.raises(RuntimeError, match="must not be collected twice"),
        ps.scores.collect(model),
    ):
        pass


def test_other_parametrizations_are_seen_under_a_mask_only():
    model = build().double()
    weight_norm(model[0])
    with ps.scores.collect(model) as statistics:
        loss_of(model(batches(1)[0])).backward()
    with pytest.raises(RuntimeError, match="parametrized by other than a mask"):
        statistics.gradient("0.weight")
    ps.sparsify(model, {"0.weight": 0.0})
    (x,) = batches(1)
    with ps.scores.collect(model) as statistics:
        loss_of(model(x)).backward()
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain.load_state_dict(ps.squash(copy.deepcopy(model)).state_dict())
    loss_of(plain(x)).backward()
    torch.testing.assert_close(statistics.gradient("0.weight"), plain[0].weight.grad)


def test_inputs_are_counted_once_under_checkpointing():
    model, (x,) = build(), batches(1, torch.float)
    with ps.scores.collect(model) as statistics:
        out = checkpoint(model, x, use_reentrant=False)
        loss_of(out).backward()
    torch.testing.assert_close(statistics.input_norm("0.weight"), x.norm(dim=0)[None])
    assert statistics.sums["0.weight"].passes == 1


def test_copies_of_the_model_are_not_watched():
    model, (x,) = build(), batches(1, torch.float)
    with torch.no_grad(), ps.scores.collect(model) as statistics:
        model(x)
        twin = copy.deepcopy(model)
        twin(100 * x)
    twin(100 * x)
    torch.testing.assert_close(statistics.input_norm("0.weight"), x.norm(dim=0)[None])


def test_statistics_and_scores_pickle_after_the_block(seen):
    model, _, statistics = seen
    again = pickle.loads(pickle.dumps(ps.scores.taylor(statistics)))
    weight = model[0].weight.detach()
    assert torch.equal(again(weight, "0.weight"), ps.scores.taylor(statistics)(weight, "0.weight"))


def test_gradients_that_are_not_finite_are_refused():
    model = build()
    with ps.scores.collect(model) as statistics:
        (loss_of(model(torch.randn(4, 6))) * math.inf).backward()
    for score in (ps.scores.snip, ps.scores.taylor, ps.scores.fisher, ps.scores.movement):
        with pytest.raises(RuntimeError, match='"0.weight" must be finite; a loss was not'):
            prune(model, score(statistics))


def test_synaptic_flow_that_cannot_be_is_refused():
    class Cast(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    normalised = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    gated = ps.sparsify(build(), ps.Gate())
    wrapped = build()
    weight_norm(wrapped[0])
    cases = [
        (normalised, "is 0 everywhere"),
        (gated, "weights that are plain or have a bool or real mask; not .0.weight., .2.weight."),
        (wrapped, "bool or real mask; not .0.weight."),
        (nn.Sequential(Cast(6, 5)), "dtype"),
    ]
    for model, text in cases:
        with (
            ps.scores.collect(model) as statistics,
            pytest.raises(RuntimeError, match=text) as error,
        ):
            statistics.add_synaptic_flow(torch.ones(1, 6))
        assert model.training
    assert "while the model ran in float64" in error.value.__notes__[0]
    with pytest.raises(RuntimeError, match="inside the `with` block; it has ended"):
        statistics.add_synaptic_flow(torch.ones(1, 6))
    with pytest.raises(RuntimeError, match="inside the `with` block; it has ended"):
        statistics.add_curvature(torch.ones(()))


def test_inference_mode_and_keywords_will_do():
    model = nn.Conv2d(2, 3, 3)
    x = torch.randn(1, 2, 5, 5)
    with torch.no_grad(), ps.scores.collect(model) as statistics:
        model(x)
    with torch.inference_mode(), ps.scores.collect(model) as other:
        model(x)
        other.add_synaptic_flow(input=torch.ones(1, 2, 5, 5))
    assert torch.equal(statistics.input_norm("weight"), other.input_norm("weight"))
    assert other.synaptic_flow("weight").all()


@pytest.mark.parametrize("ending", [("_re", "_im"), ("_real", "_imag")])
def test_pairs_are_reached_as_rules_reach_them(ending):
    model = PairLinear(*(f"in_weight{part}" for part in ending))
    for targets in (None, "in_weight", "*weight"):
        with ps.scores.collect(model, targets) as statistics:
            loss_of(model(torch.randn(3, 6))).backward()
        ps.plan(model, {"*weight": ps.Prune(0.5, score=ps.scores.snip(statistics))})
    holder = nn.Module()
    holder.weight = nn.ParameterDict({"real": torch.randn(4, 6), "imag": torch.randn(4, 6)})
    with ps.scores.collect(holder) as statistics:
        (holder.weight["real"] ** 2 + holder.weight["imag"] ** 2).sum().backward()
    ps.sparsify(holder, ps.Prune(0.5, score=ps.scores.snip(statistics)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_inputs_are_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), ps.scores.collect(encoder, "*linear1.weight") as statistics:
        encoder(torch.randn(2, 3, 8), src_key_padding_mask=padding)
    assert statistics.sums


def test_blocks_do_not_nest_and_ties_must_be_whole():
    model = build()
    with (
        ps.scores.collect(model),
        pytest.raises(RuntimeError, match="is already open for this model"),
        ps.scores.collect(model),
    ):
        pass
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    two[1].weight = two[0].weight
    ps.sparsify(two[0], 0.5)
    with (
        pytest.raises(RuntimeError, match="is tied, and only some of its uses are masked"),
        ps.scores.collect(two),
    ):
        pass
    with ps.scores.collect(nn.Linear(6, 1)) as statistics:
        loss_of(statistics.model(torch.randn(4, 6))).backward()
    with pytest.raises(ValueError, match=r"the statistics have, \(1, 6\)"):
        ps.sparsify(nn.Linear(6, 5), ps.Prune(0.5, score=ps.scores.taylor(statistics)))
