"""Bad input: each a clear error, and the model as it was."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

import parasparse as ps


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def legacy():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


def nan():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def masked():
    return ps.sparsify(net(), 0.5)


def gated():
    return ps.sparsify(net(), ps.Gate())


class Widening(nn.Module):
    def forward(self, tensor):
        return tensor.repeat(2, 1)


BAD = {
    "nan_scores": (nan, lambda: 0.5, ValueError, r'NaN(.|\n)*while pruning "2.weight"'),
    "above_one": (net, lambda: 1.5, ValueError, r"must be in \[0, 1\].*got 1.5"),
    "below_zero": (net, lambda: -0.1, ValueError, r"must be in \[0, 1\].*got -0.1"),
    "nan_sparsity": (net, lambda: float("nan"), ValueError, r"must be in \[0, 1\]"),
    "bool_sparsity": (net, lambda: True, TypeError, "number"),
    "none_alone": (net, lambda: None, ValueError, "at least one rule"),
    "no_rules": (net, dict, ValueError, "at least one rule"),
    "mask_alone": (net, lambda: torch.ones(8, 4), TypeError, "name of its tensor"),
    "scalar_mask_alone": (net, lambda: torch.tensor(0.5), TypeError, "name of its tensor"),
    "array_alone": (net, lambda: np.ones((8, 4)), TypeError, "name of its tensor"),
    "module": (net, lambda: {"0": nn.ReLU()}, TypeError, "must not be a module"),
    "pattern_alone": (net, lambda: ps.patterns.channel(0), TypeError, r"Prune\(\.\.\., pattern="),
    "fixed_pattern_alone": (
        net,
        lambda: {"0": ps.patterns.n_of_m(2, 4)},
        TypeError,
        r"not be a pattern alone; got n_of_m\(.*Prune\(\.\.\., pattern=n_of_m\(",
    ),
    "score_alone": (net, lambda: ps.scores.magnitude, TypeError, "Prune.*score=magnitude"),
    "distribution_alone": (net, lambda: ps.distributions.erk, TypeError, "distribution=erk"),
    "pattern_class": (
        net,
        lambda: ps.Prune(0.5, pattern=ps.patterns.n_of_m),
        TypeError,
        "got class n_of_m",
    ),
    "distribution_of_a_fixed_pattern": (
        net,
        lambda: ps.Prune(pattern=ps.patterns.n_of_m(2, 4), distribution=lambda s, p: s),
        ValueError,
        "`distribution` must be omitted",
    ),
    "distribution_of_another_kind": (
        net,
        lambda: ps.Prune(0.5, distribution=lambda s, p: [0.5]),
        ValueError,
        "got list",
    ),
    "numpy_pattern": (
        net,
        lambda: ps.Prune(0.5, pattern=lambda s, p: s.numpy() > 0),
        ValueError,
        "bool tensor.*got ndarray",
    ),
    "score_that_fails": (
        net,
        lambda: ps.Prune(0.5, score=lambda t, n: {}[n]),
        KeyError,
        "while scoring '0.weight'",
    ),
    "spectral_norm_and_a_typo": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: {"weight": 0.5, "wieght": 0.5},
        ValueError,
        "reaches none",
    ),
    "gate_of_nan": (net, lambda: ps.Gate(init=float("nan")), ValueError, "finite"),
    "mask_of_inf": (net, lambda: {"0": torch.tensor(float("inf"))}, ValueError, "inf"),
    "mask_too_small_for_half": (
        lambda: net().half(),
        lambda: {"0": torch.tensor(1e-9)},
        ValueError,
        "rounds to inf or 0",
    ),
    "odd_string": (net, lambda: "zeroes", ValueError, '"zeros"'),
    "odd_target": (net, lambda: {3: 0.5}, TypeError, "predicate"),
    "wrong_shape": (
        net,
        lambda: {"0.weight": 0.5, "2.weight": torch.ones(3, 3)},
        RuntimeError,
        r'must match the existing size(.|\n)*"2.weight"',
    ),
    "sparsity_and_pattern": (
        net,
        lambda: ps.Prune(0.5, pattern=ps.patterns.n_of_m(2, 4)),
        ValueError,
        r"must be omitted with n_of_m\(n=2, m=4",
    ),
    "no_sparsity": (net, lambda: ps.Prune(), ValueError, "must be given"),
    "global_n_of_m": (
        net,
        lambda: ps.Prune(pattern=ps.patterns.n_of_m(2, 4), scope="global"),
        ValueError,
        "`scope` must be omitted",
    ),
    "global_distribution": (
        net,
        lambda: ps.Prune(0.5, scope="global", distribution=lambda s, p: s),
        ValueError,
        "local",
    ),
    "odd_scope": (net, lambda: ps.Prune(0.5, scope="both"), ValueError, "scope"),
    "odd_layout": (net, lambda: {"0": ps.Fixed(1, layout="oi")}, ValueError, "layout"),
    "groups_do_not_fit": (
        net,
        lambda: {"*": ps.Prune(pattern=ps.patterns.n_of_m(2, 3))},
        ValueError,
        r'groups of 3(.|\n)*"0.weight"',
    ),
    "typo": (
        net,
        lambda: {"0.weight": 0.5, "2.wieght": 0.5},
        ValueError,
        r'"2.wieght" reaches none of 4 tensors \(nearest: "2.weight"',
    ),
    "typo_in_a_glob": (
        lambda: nn.ModuleDict({"layer4": net()}),
        lambda: {"layr4.*": 0.5},
        ValueError,
        r'nearest: "layer4.\*"',
    ),
    "missed_type": (net, lambda: {nn.Conv2d: 0.5}, ValueError, '"Conv2d" reaches none'),
    "missed_regex": (net, lambda: {re.compile("x.*"): 0.5}, ValueError, '"x.*" reaches none'),
    "nothing_for_a_number": (lambda: nn.ReLU(), lambda: 0.5, ValueError, "a sparsity alone"),
    "shadowed": (
        net,
        lambda: {nn.Linear: 0.5, "2.weight": 0.9},
        ValueError,
        '"2.weight" reaches was taken by "Linear"',
    ),
    "shadowed_by_two": (
        net,
        lambda: {"0": 0.5, "2": None, "*": 0.9},
        ValueError,
        r'taken by "0", "2"',
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4)),
        lambda: 0.5,
        RuntimeError,
        "dummy batch",
    ),
    "legacy_hooks": (
        legacy,
        lambda: {"weight_v": 0.5},
        ValueError,
        "torch.nn.utils.parametrizations.weight_norm",
    ),
    "integer": (Quantized, lambda: 0.5, TypeError, '"weight" is torch.int8'),
    "gate_on_a_mask": (masked, lambda: {"2": ps.Gate()}, ValueError, "`unsparsify` first"),
    "mask_on_a_gate": (gated, lambda: {"2": 0.5}, ValueError, "`binarize`"),
    "gate_on_a_gate": (gated, lambda: ps.Gate(), ValueError, "`binarize`"),
    "odd_score": (
        net,
        lambda: ps.Prune(0.5, score=lambda t, n: t.sum(0)),
        ValueError,
        "`score` must return a real tensor",
    ),
    "odd_pattern": (
        net,
        lambda: ps.Prune(0.5, pattern=lambda s, p: s),
        ValueError,
        "`pattern` must return a bool tensor",
    ),
    "odd_distribution": (
        net,
        lambda: ps.Prune(0.5, distribution=lambda shapes, s: {"0.weight": 0.5}),
        ValueError,
        "`distribution` must return a sparsity for each",
    ),
    "distribution_out_of_range": (
        net,
        lambda: ps.Prune(0.5, distribution=lambda shapes, s: dict.fromkeys(shapes, 1.2)),
        ValueError,
        "sparsity of 0.weight",
    ),
    "treatment_misses_one": (
        net,
        lambda: {"*": lambda tensors: {}},
        ValueError,
        "a mask for each tensor",
    ),
    "module_of_another_shape": (
        net,
        lambda: {"0": lambda tensors: dict.fromkeys(tensors, Widening())},
        ValueError,
        r"must return torch.float32 \(8, 4\)",
    ),
}


@pytest.mark.parametrize(("build", "rules", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("verb", [ps.sparsify, ps.plan])
def test_bad_rules_are_clear_errors_and_change_nothing(verb, build, rules, error, message):
    model = build()
    before, keys = repr(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    values = {k: v.clone() for k, v in model.state_dict().items() if not is_lazy(v)}
    masks = {name: getattr(mask, "clone", lambda: None)() for name, mask in masks_of(model)}
    with pytest.raises(error) as caught:
        verb(model, rules())
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, text), text
    assert repr(model) == before
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    for name, value in values.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    for name, mask in masks_of(model):
        assert torch.equal(mask, masks[name])


def masks_of(model):
    return (
        [] if any(isinstance(m, nn.LazyLinear) for m in model.modules()) else ps.named_masks(model)
    )


@pytest.mark.parametrize("verb", [ps.squash, ps.unsparsify, ps.binarize])
def test_targets_that_reach_no_mask_are_refused(verb):
    model = ps.sparsify(net(), {"0": 0.5})
    with pytest.raises(ValueError, match=r'masked tensor; "2" reaches none of 1'):
        verb(model, ["0", "2"])
    assert len(list(ps.named_masks(model))) == 1


@pytest.mark.parametrize(
    "targets", ["0", "0.weight", ["0"], re.compile("0.*"), lambda n, m, t: n == "0.weight"]
)
def test_squash_takes_targets_as_rules_do(targets):
    model = ps.squash(ps.sparsify(net(), 0.5), targets)
    assert [name for name, _ in ps.named_masks(model)] == ["2.weight"]
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("verb", [ps.squash, ps.unsparsify, ps.binarize])
def test_verbs_on_a_dense_model_do_nothing(verb):
    model = net()
    assert verb(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_one_unset_mask_keeps_squash_from_changing_anything():
    model = ps.sparsify(net(), {"0": 0.5, "2": ps.Fixed(None)})
    before = ps.stored(model, "0.weight").detach().clone()
    with pytest.raises(RuntimeError, match="no sparsity mask"):
        ps.squash(model)
    assert len(list(ps.named_masks(model))) == 2
    assert torch.equal(ps.stored(model, "0.weight"), before)
    assert type(ps.unsparsify(model)[2]) is nn.Linear


def test_binarize_over_a_normalisation_is_refused():
    model = ps.sparsify(
        parametrizations.weight_norm(nn.Linear(4, 4)), {"weight": torch.tensor(0.5)}
    )
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="squash"):
        ps.binarize(model)
    assert torch.equal(model.weight, before)


def test_a_script_module_is_refused():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Linear(4, 4))
        with pytest.raises(TypeError, match="ScriptModule"):
            ps.sparsify(model, {"weight": 0.5})


def test_verbs_return_the_model_and_a_copy_made_first_is_the_functional_form():
    model = net()
    twin = ps.sparsify(copy.deepcopy(model), 0.5)
    assert not ps.is_sparse(model)
    assert ps.squash(twin) is twin


@pytest.mark.parametrize(
    "read",
    [
        lambda model: ps.plan(model, {"*": 0.5}),
        ps.summary,
        ps.dense_state_dict,
        lambda model: ps.stored(model, "weight"),
        lambda model: dict(ps.named_masks(model)),
    ],
    ids=["plan", "summary", "dense_state_dict", "stored", "named_masks"],
)
@pytest.mark.parametrize("training", [True, False])
def test_reading_changes_nothing_even_over_spectral_norm_in_training_mode(read, training):
    model = ps.sparsify(parametrizations.spectral_norm(nn.Linear(4, 4)), 0.5).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    read(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(module.training is training for module in model.modules())


def test_squash_in_training_mode_bakes_what_evaluation_reads():
    model = ps.sparsify(parametrizations.spectral_norm(nn.Linear(4, 4)), 0.5).eval()
    expected = model.weight.detach().clone()
    assert torch.equal(ps.squash(model.train()).weight, expected)


def test_targets_may_be_a_list_or_a_tuple_of_names():
    model = ps.squash(ps.sparsify(net(), 0.5), ("0", "2.weight"))
    assert not ps.is_sparse(model)


def test_arrays_that_torch_cannot_share_are_masks_all_the_same():
    mask = np.array([[1, 0, 0, 1]])
    read_only = np.broadcast_to(mask, (8, 4))
    model = ps.sparsify(net(), {"0": read_only[::-1]})
    assert torch.equal(ps.mask_of(model, "0.weight"), torch.tensor(mask).bool().expand(8, 4))
