"""Programs that torch exported or traced: masks there are tensors of plain modules."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import parasparse as ps

pytestmark = pytest.mark.filterwarnings("ignore")  # torch deprecates jit

X = torch.randn(2, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x @ self.weight)


def exported(model):
    return torch.export.export(model, (X,)).module()


def unflattened(model):
    return torch.export.unflatten(torch.export.export(model, (X,)))


def jit_traced(model):
    return torch.jit.trace(model, X)


PROGRAMS = [exported, unflattened, torch.fx.symbolic_trace, jit_traced]
over_programs = pytest.mark.parametrize("made", PROGRAMS, ids=lambda made: made.__name__)


def frozen(model):
    with torch.no_grad(), ps.frozen(model):
        pass


def dense_gradients(model):
    with ps.dense_gradients(model):
        pass


VERBS = {
    "plan": lambda model: ps.plan(model, 0.5),
    "sparsify": lambda model: ps.sparsify(model, 0.5),
    "squash": ps.squash,
    "unsparsify": ps.unsparsify,
    "binarize": ps.binarize,
    "deploy_masks": lambda model: ps.deploy_masks(model, {"weight": torch.ones(6, 6)}),
    "summary": ps.summary,
    "is_sparse": ps.is_sparse,
    "named_masks": lambda model: list(ps.named_masks(model)),
    "mask_of": lambda model: ps.mask_of(model, "weight"),
    "stored": lambda model: ps.stored(model, "weight"),
    "penalty": ps.penalty,
    "frozen": frozen,
    "dense_gradients": dense_gradients,
    "dense_state_dict": ps.dense_state_dict,
    "load_state_dict": lambda model: ps.load_state_dict(model, model.state_dict()),
    "save": lambda model: ps.save(model, "never.pt"),
    "accelerate": lambda model: ps.accelerate(model, X),
    "LotteryTicket": lambda model: ps.LotteryTicket(model, 0.5, rounds=2),
}


@over_programs
@pytest.mark.parametrize("treatment", [0.5, ps.Gate()], ids=["mask", "gate"])
def test_every_verb_says_that_masks_in_a_program_are_out_of_reach(made, treatment):
    program = made(ps.sparsify(Net(), treatment))
    before, output = {k: v.clone() for k, v in program.state_dict().items()}, program(X)
    for verb, call in VERBS.items():
        with pytest.raises(ValueError, match="part of an exported or traced program"):
            call(program)
            raise AssertionError(verb)
    torch.testing.assert_close(dict(program.state_dict()), before)
    assert torch.equal(program(X), output)


def normalized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)))


@pytest.mark.parametrize("made", [exported, unflattened])
def test_what_other_parametrizations_leave_in_a_program_are_plain_tensors(made):
    program = made(normalized())
    dense, keys = program(X), list(program.state_dict())
    assert not ps.is_sparse(program)
    (row,) = ps.plan(program, 0.5)
    assert row.name == "0.parametrizations.weight.original1"
    masked = ps.sparsify(program, 0.5)(X)
    assert not torch.equal(masked, dense)
    assert ps.summary(program).rows[0].kept == 18
    assert set(ps.dense_state_dict(program)) == set(keys)
    assert torch.equal(ps.squash(program)(X), masked)
    assert list(program.state_dict()) == keys


def test_a_jit_program_without_masks_is_read_and_not_masked():
    program = jit_traced(normalized())
    assert not ps.is_sparse(program)
    assert len(ps.summary(program).rows) == 0
    assert list(ps.dense_state_dict(program)) == list(program.state_dict())
    assert ps.stored(program, "0.bias") is not None
    with pytest.raises(TypeError, match="ScriptModule"):
        ps.sparsify(program, 0.5)


def test_masks_of_layers_that_a_trace_keeps_whole_are_reached():
    graph = torch.fx.symbolic_trace(ps.sparsify(Net(), {"layer.weight": 0.5}))
    expected = graph(X)
    assert [name for name, _ in ps.named_masks(graph)] == ["layer.weight"]
    assert torch.equal(ps.squash(graph)(X), expected)
    assert type(graph.layer) is nn.Linear


def test_layers_in_a_dict_called_parametrizations_are_layers_as_any():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.parametrizations = nn.ModuleDict({"first": nn.Linear(6, 6)})
            self.weight = nn.Parameter(torch.randn(6, 6))

    model = Own()
    with pytest.raises(ValueError, match="Rename"):
        ps.sparsify(model, {"weight": 0.5})
    ps.sparsify(model, {"parametrizations.first.weight": 0.5})
    assert [name for name, _ in ps.named_masks(model)] == ["parametrizations.first.weight"]
    ps.squash(model)
    assert list(model.state_dict()) == list(Own().state_dict())
