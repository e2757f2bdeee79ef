import copy
import re

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import parasparse as ps
from parasparse.targets.reach import reaches
from parasparse.targets.tensors import tensors_of
from tests.helpers.cases import DictLinear, OddNames, PairLinear, Tied


class Zoo(nn.Module):
    """One tensor of each sort that a number alone must know."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.bias_table = nn.Parameter(torch.randn(4, 4))
        self.weights = nn.Parameter(torch.randn(4, 4))
        self.position = nn.Embedding(4, 4)
        self.norm = nn.LayerNorm((4, 4))
        self.batchnorm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.GRU(4, 4)
        self.register_buffer("weight_table", torch.randn(4, 4))


def reached(model, rules):
    ps.sparsify(model, rules)
    return [name for name, _ in ps.named_masks(model)]


ZOO_WEIGHTS = [
    "weights",
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
]


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        (0.5, [n for n in ZOO_WEIGHTS if n != "weights"]),
        ({"conv": 0.5}, ["conv.weight"]),
        ({"attention": 0.5}, ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ({"att*": 0.5}, ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ({"*.weight_ih*": 0.5}, ["rnn.weight_ih_l0"]),
        ({"norm.weight": 0.5}, ["norm.weight"]),
        ({"batchnorm.weight": 0.5}, ["batchnorm.weight"]),
        ({"weight_table": 0.5}, ["weight_table"]),
        ({re.compile(r".*hh.*"): 0.5}, ["rnn.weight_hh_l0"]),
        ({nn.Conv2d: 0.5}, ["conv.weight"]),
        ({nn.MultiheadAttention: 0.5}, ["attention.in_proj_weight"]),
        ({(nn.GRU, nn.Embedding): 0.5},
         ["position.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ({lambda name, module, tensor: tensor.ndim == 1 and "batch" in name: 0.5},
         ["batchnorm.weight", "batchnorm.bias"]),
        ({"rnn.*_l0": None, "rnn": None, "*": None}, ValueError),
    ],
)  # fmt: skip
def test_each_kind_of_target_reaches_what_the_design_says(rules, names):
    model = Zoo()
    if names is ValueError:
        with pytest.raises(ValueError, match="earlier rule"):
            ps.sparsify(model, rules)
    else:
        # `weights` starts with "weight": the design's letter reaches it
        expected = ["weights", *names] if rules == 0.5 else names
        assert reached(model, rules) == expected


def test_a_glob_reaches_everything_of_two_dimensions():
    every = [n for n, p in Zoo().named_parameters() if p.ndim >= 2]
    assert reached(Zoo(), {"*": 0.5}) == every


def test_a_number_alone_on_torchvisions_transformer_leaves_tokens_and_positions_dense():
    model = torchvision.models.vit_b_16(weights=None)
    names = reached(model, 0.5)
    assert "class_token" not in names
    assert "encoder.pos_embedding" not in names
    assert "conv_proj.weight" in names
    assert not any("ln" in name for name in names)


def test_the_first_rule_that_matches_wins():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    ps.sparsify(model, {"0.weight": 0.9, nn.Linear: 0.5})
    assert [int(mask.sum()) for _, mask in ps.named_masks(model)] == [10, 50]


def test_none_leaves_a_tensor_with_what_it_has():
    model = ps.sparsify(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), 0.5)
    before = ps.mask_of(model, "0.weight").clone()
    ps.sparsify(model, {"0": None, "*": 0.9})
    assert torch.equal(ps.mask_of(model, "0.weight"), before)
    assert int(ps.mask_of(model, "1.weight").sum()) == 10


def test_rules_may_be_pairs():
    assert reached(nn.Linear(4, 4), [("weight", 0.5)]) == ["weight"]


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_a_tied_tensor_is_reached_by_any_of_its_names_and_has_one_mask(name):
    model = Tied()
    assert reached(model, {name: 0.5}) == ["embedding.weight"]
    assert model.head.parametrizations.weight[0] is model.embedding.parametrizations.weight[0]
    assert (
        model.head.parametrizations.weight.original
        is model.embedding.parametrizations.weight.original
    )
    assert ps.mask_of(model, "head.weight") is ps.mask_of(model, "embedding.weight")


def test_a_tensor_tied_to_an_embedding_counts_as_one_for_a_number_alone():
    assert reached(Tied(), 0.5) == ["body.weight"]


def test_a_real_valued_mask_of_a_tied_tensor_is_folded_once():
    model = ps.sparsify(Tied(), {"head.weight": torch.tensor(0.5)})
    expected = model.head.weight.detach().clone()
    ps.squash(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, expected)


@pytest.mark.parametrize("rule", ["weight", "weight_re", "weight_im", "weight*", PairLinear])
def test_a_pair_is_one_target_under_its_joint_name_and_either_parts(rule):
    model = PairLinear()
    assert reached(model, {rule: 0.5}) == ["weight"]
    both = model.parametrizations
    assert both.weight_re[0] is both.weight_im[0]
    modulus = torch.complex(
        *(ps.stored(model, n).detach() for n in ("weight_re", "weight_im"))
    ).abs()
    mask = ps.mask_of(model, "weight")
    assert modulus[mask].min() >= modulus[~mask].max()
    assert torch.equal(ps.stored(model, "weight").abs(), modulus)


@pytest.mark.parametrize("rule", ["weight", "weight.real", "*", DictLinear, nn.ParameterDict])
def test_a_parameter_dict_of_real_and_imag_is_a_pair_of_its_layer(rule):
    assert reached(DictLinear(), {rule: 0.5}) == ["weight"]
    assert reached(nn.Sequential(DictLinear()), {"0": 0.5}) == ["0.weight"]


def test_pairs_can_be_turned_off_and_on_again():
    model = ps.sparsify(PairLinear(), 0.5, pairs=False)
    assert [name for name, _ in ps.named_masks(model)] == ["weight_re", "weight_im"]
    ps.sparsify(model, 0.5)
    assert [name for name, _ in ps.named_masks(model)] == ["weight"]
    ps.sparsify(model, {"weight_re": 0.0, "weight_im": 1.0}, pairs=False)
    assert [int(mask.sum()) for _, mask in ps.named_masks(model)] == [24, 0]


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


@pytest.mark.parametrize(
    "wrap",
    [AveragedModel, nn.DataParallel, lambda m: torch.compile(m, backend="eager")],
    ids=["ema", "data_parallel", "compiled"],
)
@pytest.mark.parametrize("rule", ["0.weight", "0", "raw"])
def test_prefixes_of_wrappers_do_not_matter(wrap, rule):
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    raw = next(iter(dict(model.named_parameters())))
    assert reached(model, {raw if rule == "raw" else rule: 0.5}) == ["0.weight"]


def test_a_submodule_called_module_is_no_wrapper():
    assert reached(Holder(nn.Linear(4, 4)), 0.5) == ["module.weight"]


@pytest.mark.parametrize("rule", ["module.weight", "weight", "module.weight_re", "weight_im"])
def test_joint_names_of_pairs_have_prefixes_and_ties_too(rule):
    assert reached(AveragedModel(PairLinear()), {rule: 0.5}) == ["weight"]


@pytest.mark.parametrize("rule", ["0.weight", "1.weight", "1.weight_re"])
def test_a_shared_complex_layer_is_reached_by_each_of_its_names(rule):
    layer = PairLinear()
    model = nn.Sequential(layer, layer)
    assert reached(model, {rule: 0.5}) == ["0.weight"]
    assert ps.mask_of(model, "1.weight") is ps.mask_of(model, "0.weight")


def test_a_pair_whose_joint_name_is_taken_stays_apart():
    model = PairLinear()
    model.weight = nn.Parameter(torch.randn(2, 2))
    assert reached(model, 0.5) == ["weight_re", "weight_im", "weight"]


def test_a_modules_name_with_brackets_is_taken_literally():
    model = nn.ModuleDict({"a[0]": nn.Linear(4, 4)})
    assert reached(model, {"a[0]": 0.5}) == ["a[0].weight"]


def test_odd_names_are_reached():
    names = ["keys", "items.0", "items.1"]
    assert reached(OddNames(), {"*": 0.5}) == names


def test_regional_prefixes_of_compiled_blocks_are_left_out():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"))
    assert reached(model, 0.5) == ["0.weight"]


names = st.text("ab.*?", min_size=1, max_size=6)


@given(names)
def test_a_glob_reaches_exactly_what_fnmatch_says(glob):
    from fnmatch import fnmatchcase

    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})})
    for target in tensors_of(model):
        parts = target.name.split(".")
        ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
        tensor = model.get_parameter(target.name)
        wanted = (tensor.ndim >= 2 and any(fnmatchcase(a, glob) for a in ancestors)) or (
            glob == target.name
        )
        assert reaches(glob, target) == wanted


@pytest.mark.filterwarnings("ignore:no entry is left")
@given(
    st.dictionaries(
        st.sampled_from(["0", "1", "2", "0.weight", "*.bias", "*", "[12]", "1.*"]),
        st.one_of(st.none(), st.floats(0, 1)),
        min_size=1,
    )
)
def test_rules_partition_the_tensors_or_change_nothing(rules):
    from parasparse.counts import num_kept

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    before = copy.deepcopy(model)
    try:
        ps.sparsify(model, rules)
    except ValueError:
        assert not ps.is_sparse(model)
        assert repr(model) == repr(before)
        return
    owner = {}
    for name in ("0.weight", "1.weight", "2.weight"):
        for glob in rules:
            if reaches(glob, next(t for t in tensors_of(before) if t.name == name)):
                owner[name] = glob
                break
    wanted = {n: num_kept(16, rules[g]) for n, g in owner.items() if rules[g] is not None}
    assert {n: int(mask.sum()) for n, mask in ps.named_masks(model)} == wanted
    assert set(owner.values()) == set(rules)


def test_what_is_nearest_is_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r'nearest: "1.bias", "0.bias"'):
        ps.sparsify(model, {"*.bias": 0.5})
    with pytest.raises(ValueError, match=r'there are: "0.weight", "0.bias", "1.weight", "1.bias"'):
        ps.sparsify(model, {"qqq": 0.5})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: ps.sparsify(0.5, model), "`model` must be a torch.nn.Module; got float"),
        (lambda model: ps.sparsify(model, {model: 0.5}), "a rule's target must be a name or glob"),
        (lambda model: ps.load_state_dict(model, "a.pt"), "must be a state dict; got str"),
    ],
)
def test_what_is_no_model_rule_or_state_is_called_so(call, message):
    with pytest.raises(TypeError, match=message):
        call(nn.Linear(4, 4))


def test_a_treatment_that_is_none_names_its_rule():
    for treatment in (90, "dense"):
        with pytest.raises(ValueError) as raised:
            ps.sparsify(nn.Linear(4, 4), {"weight": treatment})
        assert raised.value.__notes__ == ['in the rule for "weight"']
