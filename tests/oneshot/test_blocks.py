"""`prune_blocks` against the plain way: the whole model runs again for each block."""

import copy
import threading

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.oneshot.finding_blocks import blocks_of
from tests.oneshot.block_models import (
    MODELS,
    Chain,
    TwoStacks,
    Wanda,
    assert_same,
    batches,
    masks_of,
    plainly,
)


def made(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_those_of_runs_of_the_whole_model(kind):
    model, inputs = made(kind), batches()
    expected = plainly(copy.deepcopy(model), inputs, Wanda(0.5), blocks_of(model, None))
    given = copy.deepcopy(inputs)
    assert ps.prune_blocks(model, inputs, Wanda(0.5)) is model
    assert_same(model, expected)
    assert all(map(torch.equal, inputs, given))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "repeats"])
def test_without_recompute_statistics_are_those_of_the_dense_model(kind):
    model, inputs = made(kind), batches()
    names = blocks_of(model, None)
    expected = plainly(copy.deepcopy(model), inputs, Wanda(0.5), names, recompute=False)
    ps.prune_blocks(model, inputs, Wanda(0.5), recompute=False)
    assert_same(model, expected)


def test_what_goes_on_is_what_pruned_blocks_return():
    model, seen = made("chain"), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *call: seen.append(call))
    ps.prune_blocks(model, batches(1), Wanda(0.5))
    _, _, last = seen[-1]  # the last run of the last block
    assert torch.equal(model.head(last), model(batches(1)[0]))


INPUTS = {
    "a tensor": lambda x: x,
    "a tuple": lambda x: (x, 2.0),
    "a dict": lambda x: {"x": x, "scale": 2.0},
}


@pytest.mark.parametrize("form", INPUTS)
def test_batches_are_tensors_tuples_and_dicts(form):
    model, other = made("between"), made("between")
    ps.prune_blocks(model, [INPUTS[form](x) for x in batches()], Wanda(0.5))
    assert_same(model, ps.prune_blocks(other, iter(batches()), Wanda(0.5)))


def test_rules_have_names_of_the_whole_model_and_none_may_be_outside_blocks():
    model = made("chain")
    rules = {"layers.0": None, "*.up.weight": Wanda(0.75), nn.Linear: 0.25, "head": None}
    ps.prune_blocks(model, batches(), rules)
    kept = {name: int(mask.sum()) for name, mask in ps.named_masks(model)}
    up, down = 8 * 16 // 4, 8 * 16 * 3 // 4
    assert kept == {
        "layers.1.up.weight": up, "layers.1.down.weight": down,
        "layers.2.up.weight": up, "layers.2.down.weight": down,
    }  # fmt: skip


def test_progress_is_told_of_each_block():
    model, reports = made("chain"), []
    ps.prune_blocks(model, batches(), {"layers.1": None, "*": Wanda(0.5)}, progress=reports.append)
    assert [report.name for report in reports] == ["layers.0", "layers.1", "layers.2"]
    assert [report.sparsity for report in reports] == [0.5, 0.0, 0.5]
    assert reports[0].numel == {"layers.0.up.weight": 128, "layers.0.down.weight": 128}
    assert str(reports[2]) == "3/3 layers.2: 2 tensors, sparsity 50.00%"


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x) if len(x) else self.unused(x)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": ps.patterns.n_of_m(1, 2)}])
def test_experts_that_saw_no_token_are_pruned_by_magnitude(pattern):
    model, reports = nn.ModuleDict({"blocks": nn.ModuleList([Experts()])}), []
    model.forward = lambda x: model["blocks"][0](x)
    by_magnitude = ps.Prune(**pattern)({"": model["blocks"][0].unused.weight})[""]
    with pytest.warns(UserWarning, match="no inputs of .*unused.weight.* by magnitude"):
        ps.prune_blocks(model, batches(), Wanda(**pattern), progress=reports.append)
    assert torch.equal(masks_of(model)["blocks.0.unused.weight"], by_magnitude)
    assert reports[0].by_magnitude == ("blocks.0.unused.weight",)


def test_it_goes_on_where_it_was_interrupted():
    def interrupt(report):
        if report.number == 2:
            raise KeyboardInterrupt

    model, whole = made("chain"), ps.prune_blocks(made("chain"), batches(), Wanda(0.5))
    with pytest.raises(KeyboardInterrupt):
        ps.prune_blocks(model, batches(), Wanda(0.5), progress=interrupt)
    assert not any("layers.2" in name for name in masks_of(model))
    state, model = model.state_dict(), made("chain")
    ps.load_state_dict(model, state)  # in another process
    ps.prune_blocks(model, batches(), Wanda(0.5), resume=True)
    assert_same(model, whole)


def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was():
    model = made("chain").train()
    model.layers.insert(1, nn.Dropout(0.5).eval())
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    threads, state = threading.active_count(), torch.get_rng_state()
    ps.prune_blocks(model, batches(), Wanda(0.5), device="cpu")
    modules = [m for m in model.modules() if not isinstance(m, ps.Mask)]
    plain = [m for m in modules if "Parametriz" not in type(m).__name__]
    assert [module.training for module in plain] == modes
    assert [len(module._forward_pre_hooks) for module in plain] == hooks
    assert threading.active_count() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_blocks_run_under_the_autocast_of_the_caller():
    model, kinds = made("chain"), set()
    model.layers[1].up.register_forward_hook(lambda *call: kinds.add(call[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ps.prune_blocks(model, batches(), Wanda(0.5))
    assert kinds == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_come_to_the_device_one_at_a_time(kind):
    model, on_cpu, seen = made(kind).double(), made(kind).double(), []
    names = blocks_of(model, None)

    def look(block, args):
        there = [name for name, other in names.items() if next(other.parameters()).is_cuda]
        seen.append([names[name] for name in there] == [block])

    for block in names.values():
        block.register_forward_pre_hook(look)
    inputs = [x.double() for x in batches()]
    ps.prune_blocks(model, inputs, Wanda(0.5), device="cuda")
    assert all(seen)
    assert not any(p.is_cuda for p in (*model.parameters(), *model.buffers()))
    assert_same(model, ps.prune_blocks(on_cpu, inputs, Wanda(0.5)))


FOUND = {
    "the largest list": (Chain, None, "layers.0 layers.1 layers.2"),
    "two lists": (TwoStacks, None, "encoder.0 encoder.1 decoder.0 decoder.1"),
    "a glob for the outermost modules": (Chain, "layers.*", "layers.0 layers.1 layers.2"),
    "a list for its modules": (TwoStacks, "decoder", "decoder.0 decoder.1"),
    "several": (TwoStacks, ["decoder.1", "*coder.0"], "encoder.0 decoder.0 decoder.1"),
    "parts of a block": (Chain, "layers.*.up", "layers.0.up layers.1.up layers.2.up"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_blocks_are_found(kind):
    model, blocks, names = FOUND[kind]
    assert list(blocks_of(model(), blocks)) == names.split()


WRONG = {
    "a glob that reaches nothing": ({"blocks": "layer.*"}, ValueError, 'nearest: "layers'),
    "no blocks": ({"blocks": []}, ValueError, "at least one module"),
    "nested blocks": ({"blocks": ["layers.0", "layers.0.up"]}, ValueError, "inside each other"),
    "a block that is not called": ({"blocks": ["layers.0", "spare"]}, ValueError, '"spare"'),
    "no batches": ({"batches": []}, ValueError, "at least one batch"),
    "a single batch": ({"batches": torch.ones(2, 5, 6)}, TypeError, "split"),
    "a single batch of keywords": ({"batches": {"x": torch.ones(2, 5, 6)}}, TypeError, "list"),
    "a batch that does not fit": ({"batches": [*batches(2), torch.ones(2, 5, 7)]}, RuntimeError,
                                  "mat1"),
    "a rule that reaches nothing": ({"rules": {"layers.7": 0.5, "*": 0.5}}, ValueError, "layers.7"),
    "a rule outside the blocks": ({"rules": {"head": 0.5, "*": 0.5}}, ValueError, "head"),
    "integers": ({"rules": {"layers.1.codes": 0.5}}, TypeError, "codes"),
    "a tensor of two blocks": ({"rules": {"*.tied": 0.5}}, ValueError, "shared by"),
    "resuming without what goes on": ({"resume": True, "recompute": False}, ValueError, "dense"),
    "not a treatment": ({"rules": {"*": "half"}}, ValueError, "zeros"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_call_changes_nothing(kind):
    wrong, error, text = WRONG[kind]
    model = made("chain").train()
    model.spare = nn.Linear(6, 6)
    tied = nn.Parameter(torch.ones(2, 2))
    model.layers[0].tied = model.layers[1].tied = tied
    model.layers[1].codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = {"batches": batches(), "rules": {"*.up.weight": Wanda(0.5)}, **wrong}
    threads = threading.active_count()
    with pytest.raises(error, match=text):
        ps.prune_blocks(model, **given)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(map(torch.equal, before.values(), after.values()))
    assert model.training
    assert threading.active_count() == threads


def test_an_error_in_a_block_leaves_it_as_it_was_and_those_before_pruned():
    def fail(tensors):
        raise RuntimeError("the Gram matrix is singular")

    model = made("chain")
    before = {key: value.clone() for key, value in model.layers[1].state_dict().items()}
    rules = {"layers.0": Wanda(0.5), "layers.1.up.weight": Wanda(0.5), "layers.1": fail}
    with pytest.raises(RuntimeError, match="singular"):
        ps.prune_blocks(model, batches(), rules)
    assert masks_of(model).keys() == {"layers.0.up.weight", "layers.0.down.weight"}
    assert all(map(torch.equal, before.values(), model.layers[1].state_dict().values()))


def test_blocks_that_are_called_several_times_need_recompute():
    with pytest.raises(ValueError, match="more than once"):
        ps.prune_blocks(made("repeats"), batches(), Wanda(0.5), recompute=False)
