"""What attaching must guarantee: the rows of the traps that stock parametrize falls into."""

import copy
import gc
import multiprocessing
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import parasparse as ps
from tests.helpers.cases import DictLinear, PairLinear, Tied


def test_the_layout_is_that_of_parametrize():
    model = nn.Linear(4, 3)
    weight = model.weight
    ps.sparsify(model, 0.5)
    assert parametrize.is_parametrized(model)
    assert parametrize.is_parametrized(model, "weight")
    assert not parametrize.is_parametrized(model, "bias")
    assert model.parametrizations.weight.original is weight
    assert isinstance(model.parametrizations.weight[0], ps.Mask)
    assert model.parametrizations.weight[0].mask is ps.mask_of(model, "weight")
    assert parametrize.type_before_parametrizations(model) is nn.Linear
    assert isinstance(model, nn.Linear)
    with parametrize.cached():
        assert model.weight is model.weight
    assert model.weight is not model.weight


def test_modules_of_one_kind_share_one_class_and_others_do_not():
    a, b = (ps.sparsify(nn.Linear(4, 3), 0.5) for _ in range(2))
    c = ps.sparsify(nn.Linear(4, 3), {"weight": 0.5, "bias": 0.5})
    assert type(a) is type(b)
    assert type(a) is not type(c)


def test_cached_copies_read_their_own_weights():
    model = ps.sparsify(nn.Linear(4, 3), 0.5)
    with parametrize.cached():
        first = model.weight
        assert copy.deepcopy(model).weight is not first


def test_accumulate_grad_nodes_hooks_and_optimizers_survive():
    model = nn.Linear(4, 3)
    weight, calls = model.weight, []
    weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    weight.register_hook(lambda g: calls.append("hook"))
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    optimizer = torch.optim.Adam(model.parameters())
    ps.sparsify(model, 0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    ps.squash(model)
    model(torch.ones(1, 4)).sum().backward()
    assert calls == ["hook", "accumulated"] * 2
    assert weight.expand_as(weight).grad_fn.next_functions[0][0] is node
    assert optimizer.state[model.weight]


def test_a_hook_on_a_masked_weight_belongs_on_the_stored_tensor():
    layer = ps.sparsify(nn.Linear(4, 3), 0.5)
    calls = []
    layer.weight.register_hook(lambda gradient: calls.append("lost"))
    stored = layer.parametrizations.weight.original
    stored.register_hook(lambda gradient: calls.append(gradient))
    layer(torch.ones(2, 4)).sum().backward()
    (gradient,) = calls
    assert torch.equal(gradient, 2.0 * ps.mask_of(layer, "weight"))


def test_positional_optimizer_checkpoints_resume_after_squash():
    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 4)).pow(2).sum().backward()
            optimizer.step()

    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    ps.sparsify(model, 0.5)
    train(model, optimizer, 2)
    ps.squash(model)
    resumed = torch.optim.Adam(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        old, new = optimizer.state[parameter], resumed.state[parameter]
        assert torch.equal(old["exp_avg"], new["exp_avg"])


def test_a_new_parameter_is_tied_and_another_shape_refused():
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    ps.sparsify(head, 0.5)
    mask = ps.mask_of(head, "weight").clone()
    head.weight = embedding.weight
    assert head.parametrizations.weight.original is embedding.weight
    assert torch.equal(head.weight, embedding.weight * mask)
    with pytest.raises(ValueError, match="squash"):
        head.weight = nn.Parameter(torch.ones(6, 4))
    assert head.parametrizations.weight.original is embedding.weight
    ps.squash(head)
    assert head.weight is embedding.weight


def test_functional_call_by_value_leaves_what_is_stored_whole():
    model = ps.sparsify(nn.Linear(4, 3), 0.5)
    mask, stored = ps.mask_of(model, "weight"), ps.stored(model, "weight")
    before, identity = stored.detach().clone(), model.parametrizations.weight.original
    x, value = torch.randn(2, 4), torch.randn(3, 4)
    out = torch.func.functional_call(model, {"weight": value}, (x,))
    torch.testing.assert_close(out, nn.functional.linear(x, value * mask, model.bias))
    with torch.no_grad():  # a Parameter is a value there, no tie
        parameter = nn.Parameter(value.clone())
        torch.func.functional_call(model, {"weight": parameter}, (x,))
    assert torch.equal(parameter, value)
    assert model.parametrizations.weight.original is identity
    assert torch.equal(stored, before)


@pytest.mark.parametrize("kind", ["leaf", "parameter", "computed", "grad", "vmap", "jvp"])
def test_functional_call_that_would_lose_gradients_names_the_key_to_use(kind):
    model = ps.sparsify(nn.Linear(4, 3), 0.5)
    before = ps.stored(model, "weight").detach().clone()
    x, value = torch.randn(2, 4), torch.randn(3, 4)

    def call(w):
        return torch.func.functional_call(model, {"weight": w}, (x,)).sum()

    with pytest.raises(RuntimeError, match=r"parametrizations\.<name>\.original"):
        if kind == "leaf":
            call(value.requires_grad_())
        elif kind == "parameter":
            call(nn.Parameter(value))
        elif kind == "computed":
            call(value.requires_grad_() * 2)
        elif kind == "grad":
            torch.func.grad(call)(value)
        elif kind == "vmap":
            torch.func.vmap(call)(torch.stack([value, value]))
        else:
            torch.func.jvp(call, (value,), (value,))
    assert torch.equal(ps.stored(model, "weight"), before)
    key = "parametrizations.weight.original"
    gradient = torch.func.grad(lambda w: torch.func.functional_call(model, {key: w}, (x,)).sum())(
        torch.randn(3, 4)
    )
    torch.testing.assert_close(gradient, x.sum(0).expand(3, 4) * ps.mask_of(model, "weight"))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, "keep its shape"),
        (None, TypeError, "tensor"),
        (torch.ones(3, 4, requires_grad=True), RuntimeError, "detach"),
    ],
    ids=["shape", "none", "gradient"],
)
def test_what_cannot_be_assigned_is_refused_and_changes_nothing(value, error, message):
    model = ps.sparsify(nn.Linear(4, 3), 0.5)
    before = model.weight.detach().clone()
    with pytest.raises(error, match=message):
        model.weight = value
    assert torch.equal(model.weight, before)


def test_assigning_to_a_real_mask_reads_back_what_was_assigned():
    model = ps.sparsify(nn.Linear(3, 1), {"weight": [[0.5, 0.0, -2.0]]})
    stored = ps.stored(model, "weight").detach().clone()
    model.weight = torch.tensor([[1.0, 2.0, 3.0]])
    assert model.weight.tolist() == [[1.0, 0.0, 3.0]]
    assert ps.stored(model, "weight")[0, 1] == stored[0, 1]


def test_tied_embeddings_train_copy_and_stay_tied():
    model = ps.sparsify(Tied(), {"head.weight": 0.5})
    twin = copy.deepcopy(model)
    assert twin.head.parametrizations.weight[0] is twin.embedding.parametrizations.weight[0]
    assert (
        twin.head.parametrizations.weight.original
        is twin.embedding.parametrizations.weight.original
    )
    loss = twin(torch.arange(5)).pow(2).sum()
    loss.backward()
    mask = ps.mask_of(twin, "head.weight")
    assert not ps.stored(twin, "head.weight").grad[~mask].any()
    ps.squash(twin)
    assert twin.head.weight is twin.embedding.weight
    assert len(list(ps.named_masks(model))) == 1


def _child(queue, model):
    queue.put((model(torch.ones(1, 4)).tolist(), type(ps.squash(model)).__name__))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_masked_model_can_be_sent_to_a_spawned_process():
    model = ps.sparsify(nn.Linear(4, 3), 0.5)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, model))
    process.start()
    assert queue.get(timeout=600) == (model(torch.ones(1, 4)).tolist(), "Linear")
    process.join()


def test_masked_modules_and_their_classes_are_freed():
    class Local(nn.Linear):
        pass

    model = ps.sparsify(Local(4, 4), 0.5)
    module, cls = weakref.ref(model), weakref.ref(type(model))
    gc.disable()
    try:
        del model
        assert module() is None  # by reference counting alone
    finally:
        gc.enable()
    del Local
    gc.collect()
    assert cls() is None


def test_a_buffer_that_is_not_persistent_stays_so():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(4, 4), persistent=False)

    model = ps.sparsify(Buffered(), {"table": 0.5})
    assert set(model.state_dict()) == {"parametrizations.table.0.mask"}
    ps.squash(model)
    assert not model.state_dict()
    assert int((model.table != 0).sum()) == 8


def test_a_masked_buffer_keeps_its_place_among_the_others():
    class Buffered(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("first", torch.randn(4, 4))
            self.register_buffer("second", torch.randn(4, 4))

    model = Buffered()
    keys = list(model.state_dict())
    ps.sparsify(model, {"second": 0.5})
    assert list(ps.dense_state_dict(model)) == keys
    assert list(ps.squash(model).state_dict()) == keys


def test_several_masks_of_a_module_share_what_reads_dense_checkpoints():
    model = ps.sparsify(nn.Linear(4, 4), {"weight": 0.5, "bias": 0.5})
    assert len(model._load_state_dict_pre_hooks) == 1
    ps.squash(model, "bias")
    assert len(model._load_state_dict_pre_hooks) == 1
    ps.squash(model)
    assert not model._load_state_dict_pre_hooks


def test_a_masked_rnn_holds_no_second_list_of_its_weights():
    model = nn.GRU(3, 4)
    assert "_flat_weights" in vars(model)
    ps.sparsify(model, 0.5)
    assert "_flat_weights" not in vars(model)
    ps.squash(model)
    weights = vars(model)["_flat_weights"]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_a_failure_halfway_puts_everything_back():
    class Stubborn(nn.Linear):
        def add_module(self, name, module):
            raise OSError("no")

    model = nn.Sequential(nn.Linear(4, 4), Stubborn(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    before, keys = repr(model), list(model.state_dict())
    with pytest.raises(OSError):
        ps.sparsify(model, {"*": 0.5})
    assert repr(model) == before
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert not ps.is_sparse(model)
    model(torch.ones(1, 4))
    assert prune.is_pruned(model)


@pytest.mark.parametrize("rules", [None, {"weight": 0.25}], ids=["one_place", "two_masks"])
def test_a_tie_that_reads_differently_at_its_places_is_not_squashed(rules):
    model, index = Tied(), torch.arange(5)
    ps.sparsify(model.head, {"weight": 0.5})
    if rules:
        ps.sparsify(model.embedding, rules)
    expected = model(index)
    with pytest.raises(RuntimeError, match="one Parameter but masked differently"):
        ps.squash(model)
    assert torch.equal(model(index), expected)
    assert len(list(ps.named_masks(model))) == (2 if rules else 1)
    assert ps.dense_state_dict(model)["head.weight"].count_nonzero() == 36
    ps.unsparsify(model)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("build", [PairLinear, DictLinear])
@pytest.mark.parametrize("treatment", [ps.Fixed(0.5), ps.Gate(init=0.5)], ids=["real", "gate"])
def test_squash_scales_both_tensors_of_a_pair(build, treatment):
    model, x = ps.sparsify(build(), {"weight": treatment}), torch.randn(2, 6)
    if isinstance(treatment, ps.Gate):
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "logits" in n).normal_()
    expected = model(x)
    assert torch.equal(ps.squash(model)(x), expected)


def test_squashing_a_part_scales_a_tie_that_lies_outside_once():
    model = ps.sparsify(Tied(), {"head.weight": torch.full((12, 6), 0.5)})
    expected = model.embedding.weight.detach().clone()
    ps.squash(model.head)
    assert torch.equal(model.embedding.weight, expected)
    assert torch.equal(model.head.weight, expected)


def test_a_tensor_that_is_tied_elsewhere_leaves_its_mask_to_the_others():
    model = ps.sparsify(Tied(), {"head.weight": torch.full((12, 6), 0.5)})
    expected = model.embedding.weight.detach().clone()
    model.head.weight = nn.Parameter(torch.randn(12, 6))
    masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
    assert set(masks) == {"embedding.weight", "head.weight"}
    ps.deploy_masks(model, masks)
    ps.binarize(model)
    assert torch.equal(model.embedding.weight, expected)


def test_one_module_for_several_tensors_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mask = ps.Mask(torch.ones(4, 4), 0.5)
    with pytest.raises(ValueError, match="same module for several"):
        ps.sparsify(model, {"*": lambda tensors: dict.fromkeys(tensors, mask)})
    assert not ps.is_sparse(model)


def test_squash_of_what_cannot_be_written_changes_nothing():
    with torch.inference_mode():
        fixed = nn.Linear(4, 4)
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 4), fixed), 0.5)
    with pytest.raises(RuntimeError, match="inference mode"):
        ps.squash(model)
    assert len(list(ps.named_masks(model))) == 2


def test_a_real_and_imaginary_tensor_that_are_one_are_one_target():
    from tests.helpers.cases import PairLinear

    model = PairLinear()
    model.weight_im = model.weight_re
    ps.sparsify(model, 0.5)
    assert [name for name, _ in ps.named_masks(model)] == ["weight_re"]
