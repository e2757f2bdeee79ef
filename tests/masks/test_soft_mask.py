"""Laws of all gates: what a soft mask does and learns."""

import copy
import pickle

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse import gates
from parasparse.masks import gate_kinds
from tests.helpers.cases import CASES, PairLinear, Tied
from tests.helpers.gated import DRAWS, GATES, KINDS, all_gates, all_kinds, gated, mask_of


@all_gates
@pytest.mark.parametrize("dtype", [torch.float, torch.double, torch.cdouble])
def test_parameters_train_beside_the_weight(name, dtype):
    model = gated(name, dtype)
    mask = mask_of(model)
    assert mask.logits.requires_grad
    assert mask.logits.dtype == (torch.double if dtype != torch.float else torch.float)
    assert [n for n, _ in model.named_parameters()] == [
        "bias", "parametrizations.weight.original", "parametrizations.weight.0.logits",
    ]  # fmt: skip
    (model(torch.randn(3, 6, dtype=dtype)).abs().square().sum() + ps.penalty(model)).backward()
    assert mask.logits.grad.any()
    assert ps.stored(model, "weight").grad.any()
    assert model.weight.dtype == dtype


@all_gates
def test_evaluation_is_a_function_and_training_draws_where_it_should(name):
    model = gated(name)
    x = torch.randn(3, 6).double()
    assert torch.equal(model(x), model(x)) == (name not in DRAWS)
    model.eval()
    assert torch.equal(model(x), model(x))


@all_gates
def test_gradients_are_right(name):
    model = gated(name).eval()
    mask, weight = mask_of(model), ps.stored(model, "weight")
    if "straight_through" in name or name == "units":
        pytest.skip("a straight-through gradient is none of the function; see test_gates")

    def run(stored, logits):
        new = {
            "parametrizations.weight.original": stored,
            "parametrizations.weight.0.logits": logits,
        }
        return torch.func.functional_call(model, new, (torch.eye(6).double(),))

    assert torch.autograd.gradcheck(run, (weight, mask.logits))

    def penalty(stored, logits):
        return torch.func.functional_call(Penalty(mask), {"mask.logits": logits}, (stored,))

    if name not in ("soft_threshold", "rows"):  # which have none
        assert torch.autograd.gradcheck(penalty, (weight, mask.logits))


class Penalty(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return self.mask.penalty(weight)


@all_gates
def test_copies_pickles_and_states_agree(name):
    model = gated(name).eval()
    x = torch.randn(3, 6).double()
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    other = ps.sparsify(nn.Linear(6, 4).double(), GATES[name]).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), want)
    optimizer = torch.optim.Adam(model.parameters())
    ps.optim.load_named_state(model, optimizer, ps.optim.named_state(model, optimizer))
    assert repr(mask_of(model)) in repr(model)


@all_gates
def test_it_compiles_into_one_graph_and_trains_there(name):
    model = gated(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6).double()
    compiled(x).square().sum().backward()
    assert mask_of(model).logits.grad is not None
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["channels", "blocks", "rows", "units"])
def test_a_unit_has_one_logit(name):
    model = gated(name).eval()
    mask, pattern = mask_of(model), GATES[name].pattern
    assert mask.logits.shape == pattern.pool(torch.zeros(4, 6)).shape
    plain = copy.deepcopy(mask)
    plain.pattern = None
    plain.logits = nn.Parameter(pattern.spread(mask.logits.detach(), torch.Size((4, 6))))
    if name != "units":  # there a share of the units is kept, here of the entries
        weight = ps.stored(model, "weight")
        torch.testing.assert_close(plain.eval()(weight), mask(weight))
        torch.testing.assert_close(plain.penalty(weight), mask.penalty(weight))
    else:
        assert int((model.weight != 0).any(0).sum()) == 3


def test_penalties_are_their_sums():
    model = gated("hard_concrete")
    logits = mask_of(model).logits
    assert torch.equal(ps.penalty(model), gates.hard_concrete_penalty(logits).sum())
    model = gated("variational_dropout")
    weight, logits = ps.stored(model, "weight"), mask_of(model).logits
    relevance = logits - 2 * (weight.abs() + 1e-12).log()
    torch.testing.assert_close(
        ps.penalty(model), gates.variational_dropout_penalty(relevance).sum()
    )
    two = nn.Sequential(gated("sigmoid"), gated("hard_concrete"))
    total = ps.penalty(two, "0.weight") + ps.penalty(two, "1.weight")
    torch.testing.assert_close(ps.penalty(two), total)
    with pytest.raises(ValueError, match="`model` must have gates"):
        ps.penalty(ps.sparsify(nn.Linear(3, 3), 0.5))


def test_ties_and_pairs_share_a_gate():
    tied = ps.sparsify(Tied(), {"head.weight": ps.Gate(gates.hard_concrete)})
    assert tied.head.parametrizations.weight[-1] is tied.embedding.parametrizations.weight[-1]
    pair = ps.sparsify(PairLinear(), ps.Gate(gates.straight_through, sparsity=0.5))
    assert pair.parametrizations.weight_re[-1] is pair.parametrizations.weight_im[-1]
    apart = ps.sparsify(PairLinear(), ps.Gate(gates.soft_threshold), pairs=False)
    assert apart.parametrizations.weight_re[-1] is not apart.parametrizations.weight_im[-1]


def test_a_share_is_not_rounded_with_the_weights():
    for dtype in (torch.half, torch.bfloat16):
        model = ps.sparsify(nn.Linear(500, 500), ps.Gate(gates.straight_through, sparsity=0.9))
        model.to(dtype)
        assert mask_of(model).sparsity.item() == 0.9
        assert int((model.weight != 0).sum()) == 25_000
    model = ps.sparsify(nn.Linear(3, 2), ps.Gate()).half()
    mask_of(model).temperature.fill_(1e5)
    assert torch.equal(model.weight, ps.stored(model, "weight"))  # sigmoid(0) / sigmoid(0)


@all_gates
def test_it_can_be_made_without_memory_and_loaded(name):
    source = gated(name)
    with torch.device("meta"):
        model = ps.sparsify(nn.Linear(6, 4).double(), GATES[name])
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model.eval().weight, source.eval().weight)


def test_the_complex_penalty_neither_overflows_nor_stops_learning():
    for value in (-100.0, -800.0):
        relevance = torch.tensor(value, requires_grad=True)
        penalty = gates.variational_dropout_penalty(relevance, is_complex=True)
        assert penalty.item() == pytest.approx(-value + 0.5772, rel=1e-4)
        penalty.backward()
        assert relevance.grad.item() == pytest.approx(-1.0, rel=1e-4)
    weight = torch.zeros(2, dtype=torch.half, requires_grad=True)
    gates.log_alpha(weight, torch.zeros(2, dtype=torch.half)).sum().backward()
    assert not weight.grad.isnan().any()


def test_noise_is_drawn_in_32_bits():
    torch.manual_seed(0)
    model = ps.sparsify(nn.Linear(1000, 1000), ps.Gate(gates.hard_concrete, init=6.0)).bfloat16()
    with torch.no_grad():
        closed = (model.weight == 0).float().mean().item()
    assert closed == pytest.approx(1 - torch.sigmoid(torch.tensor(7.6)).item(), abs=3e-4)


def test_its_text_says_how_it_was_made():
    assert repr(GATES["units"]) == (
        "Gate(straight_through, pattern=channel(dim=1, norm=None), sparsity=0.5)"
    )
    text = repr(mask_of(gated("units")))
    assert text == (
        "SoftMask((4, 6), straight_through, init=0.0, channel(dim=1, norm=None), sparsity=0.5)"
    )
    assert all(function.__name__ in ps.Gate.__doc__ for function in gate_kinds.KINDS)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"function": 3}, "`gate` must be one of gates.sigmoid"),
        ({"sparsity": 0.5}, "`sparsity` must be given with `straight_through`"),
        ({"function": gates.straight_through}, "`sparsity` must be given with"),
        ({"function": gates.straight_through, "sparsity": 1.5}, r"must be in \[0, 1\]"),
        ({"init": float("inf")}, "`init` must be finite"),
        ({"pattern": ps.patterns.n_of_m(2, 4)}, "`pattern` must be a pattern of units"),
        (
            {"function": gates.variational_dropout, "pattern": ps.patterns.channel(0)},
            "`pattern` must be a pattern of units",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(keywords, text):
    model = nn.Linear(4, 4)
    with pytest.raises((TypeError, ValueError), match=text):
        ps.sparsify(model, ps.Gate(**keywords))
    assert not ps.is_sparse(model)


def gates_for(rules, gate):
    """The rules of a case with `gate` where it has a sparsity."""
    if not isinstance(rules, dict):
        return gate
    return {spec: gate for spec, rule in rules.items() if rule is not None}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@all_kinds
def test_gates_go_with_every_module(case, kind):
    torch.manual_seed(0)
    model, inputs, gate = case.build(), case.inputs(), KINDS[kind]
    classes = [type(module) for module in model.modules()]
    keys, order = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    ps.sparsify(model, gates_for(case.rules, gate))
    logits = [p for n, p in model.named_parameters() if n.endswith(".logits")]
    assert logits
    out = model(*inputs)
    while isinstance(out, tuple):
        out = out[0]
    loss = out.abs().float().square().sum() + ps.penalty(model).float()
    if loss.requires_grad:
        loss.backward()
        assert any(parameter.grad is not None for parameter in logits)
    copied = dict(ps.named_masks(copy.deepcopy(model)))
    for name, mask in ps.named_masks(model):
        assert torch.equal(copied[name], mask)
    ps.squash(model)
    if not case.underneath:
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_parameters()] == order


def test_an_init_whose_sigmoid_is_zero_is_refused():
    with pytest.raises(ValueError, match="`init` must have a sigmoid above 0"):
        ps.Gate(init=-200.0)
    with pytest.raises(ValueError, match="`init` must have a sigmoid above 0"):
        ps.sparsify(nn.Linear(3, 2).half(), ps.Gate(init=-40.0))


def test_the_penalty_compiles_with_the_loss():
    model = ps.sparsify(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), ps.Gate())
    want = ps.penalty(model)
    compiled = torch.compile(lambda: ps.penalty(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), want)
    assert ps.penalty(model, "1.weight").item() == 6


@pytest.mark.filterwarnings("ignore::UserWarning")
@all_gates
def test_precision_of_complex_layers_can_change(name):
    x = torch.randn(3, 6, dtype=torch.cfloat)
    model = gated(name, torch.cfloat)
    model.to(torch.complex128)
    assert not mask_of(model).logits.is_complex()
    mask_of(model).hard = True
    assert model(x.to(torch.cdouble)).dtype == torch.cdouble
    model = gated(name, torch.cfloat).double()  # which leaves complex tensors as they are
    assert model(x).dtype == torch.cfloat
    mask_of(model).hard = True
    assert model(x).dtype == torch.cfloat


@all_kinds
def test_penalties_in_half_precision_are_finite(kind):
    model = ps.sparsify(nn.Linear(512, 512, dtype=torch.half), GATES[kind])
    assert bool(ps.penalty(model).isfinite())
