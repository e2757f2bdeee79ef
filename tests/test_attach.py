"""What attaching must guarantee: the rows of the traps that stock parametrize falls into."""

import abc
import copy
import gc
import multiprocessing
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import parasparse as ps
from tests.cases import OddNames, Tied


class Half(nn.Module):
    def forward(self, tensor):
        return tensor * 0.5

    def right_inverse(self, tensor):
        return tensor * 2


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


@pytest.mark.parametrize("other", ["bias", "weight"])
def test_stock_registration_beside_ours_leaves_siblings_whole(other):
    one, two = (ps.sparsify(nn.Linear(4, 3), {"weight": 0.5}) for _ in range(2))
    x = torch.randn(2, 4)
    expected = two(x)
    own = one(x)
    if other == "bias":
        bias = one.bias.detach().clone()
        parametrize.register_parametrization(one, "bias", Half())
        assert torch.equal(one.bias, bias)  # Half's inverse doubled what is stored
        assert torch.equal(pickle.loads(pickle.dumps(one))(x), one(x))
        parametrize.remove_parametrizations(one, "bias")
        assert torch.equal(one.bias, bias)
    else:
        for register in (
            lambda: parametrize.register_parametrization(one, "weight", Half()),
            lambda: parametrizations.weight_norm(one),
            lambda: parametrizations.spectral_norm(one),
        ):
            with pytest.raises(RuntimeError, match="parasparse.unsparsify"):
                register()
        with pytest.raises(RuntimeError, match="parasparse.squash"):
            parametrize.remove_parametrizations(one, "weight")
    assert torch.equal(one(x), own)
    assert torch.equal(two(x), expected)
    two.bias = nn.Parameter(torch.zeros(3))
    assert not two.bias.any()
    assert torch.equal(copy.deepcopy(two)(x), two(x))
    ps.squash(one)
    ps.squash(two)
    assert type(one) is type(two) is nn.Linear
    assert [n for n, _ in one.named_parameters()] == ["weight", "bias"]


def test_a_stock_parametrization_of_the_bias_stays_when_ours_goes():
    model = nn.Linear(4, 3)
    parametrize.register_parametrization(model, "bias", Half())
    ps.squash(ps.sparsify(model, {"weight": 0.5}))
    assert parametrize.is_parametrized(model, "bias")
    parametrize.remove_parametrizations(model, "bias")
    assert type(model) is nn.Linear


def test_parametrizing_a_copy_leaves_the_original_alone():
    model = ps.sparsify(nn.Linear(4, 3), {"weight": 0.5})
    twin = copy.deepcopy(model)
    ps.sparsify(twin, {"bias": 0.5})
    assert model.bias.all()
    parametrize.register_parametrization(copy.deepcopy(model), "bias", Half())
    assert model.bias.all()


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


def test_an_rnn_follows_its_masks_and_training():
    model = nn.LSTM(4, 5)
    x = torch.randn(3, 2, 4)
    ps.sparsify(model, {"weight_hh_l0": 0.5})
    first = model(x)[0]
    ps.deploy_masks(model, {"weight_hh_l0": torch.tensor(0.0)})
    twin = nn.LSTM(4, 5)
    twin.load_state_dict(ps.dense_state_dict(model))
    assert torch.equal(model(x)[0], twin(x)[0])
    assert not torch.equal(model(x)[0], first)
    with torch.no_grad():
        model.bias_ih_l0.add_(1.0)
        ps.stored(model, "weight_hh_l0").zero_()
    twin.load_state_dict(ps.dense_state_dict(model))
    assert torch.equal(model(x)[0], twin(x)[0])
    torch.testing.assert_close(model.double()(x.double())[0].float(), twin(x)[0])
    model.float()
    ps.squash(model)
    assert torch.equal(model(x)[0], twin(x)[0])


def test_an_rnn_deepcopies_after_a_forward_with_gradients():
    model = ps.sparsify(nn.GRU(4, 5), 0.5)
    x = torch.randn(3, 2, 4)
    out = model(x)[0]
    assert torch.equal(copy.deepcopy(model)(x)[0], out)


def test_frozen_brings_an_rnn_to_one_evaluation():
    model = ps.sparsify(nn.LSTM(4, 5), {"weight_hh_l0": 0.5})
    calls = []
    model.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), ps.frozen(model):
        model(torch.randn(3, 2, 4))
        model(torch.randn(3, 2, 4))
    assert len(calls) == 1


def test_the_fast_path_of_attention_is_still_taken_and_right():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    ps.sparsify(layer, 0.5)
    x = torch.randn(2, 3, 8)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast = layer(x)
    assert any("_transformer_encoder_layer_fwd" in event.name for event in profile.events())
    torch.testing.assert_close(fast, layer(x).detach())
    with torch.no_grad():
        torch.testing.assert_close(ps.squash(layer)(x), fast)


@pytest.mark.parametrize(
    "normalise", [parametrizations.weight_norm, parametrizations.orthogonal], ids=["norm", "orth"]
)
def test_squash_bakes_what_lies_underneath_into_one_parameter(normalise):
    model = normalise(nn.Linear(4, 4))
    ps.sparsify(model, 0.5)
    expected = model.weight.detach().clone()
    assert torch.equal(ps.stored(model, "weight") * ps.mask_of(model, "weight"), expected)
    ps.squash(model)
    assert type(model) is nn.Linear
    assert torch.equal(model.weight, expected)
    assert isinstance(model.weight, nn.Parameter)
    assert model.weight.requires_grad


def test_unsparsify_leaves_what_lies_underneath_to_torch():
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    dense = model.weight.detach().clone()
    ps.unsparsify(ps.sparsify(model, 0.5))
    assert torch.equal(model.weight, dense)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is nn.Linear
    torch.testing.assert_close(model.weight, dense)


def test_masks_of_torch_prune_are_taken_over():
    model = nn.Linear(4, 4)
    weight = model.weight
    prune.l1_unstructured(model, "weight", amount=0.5)
    mask = model.weight_mask.bool()
    before = weight.detach().clone()
    ps.sparsify(model, "zeros")
    assert torch.equal(ps.mask_of(model, "weight"), mask)
    assert ps.stored(model, "weight") is weight
    assert torch.equal(weight, before)
    assert not model._forward_pre_hooks
    ps.sparsify(model, 0.25)
    assert int(ps.mask_of(model, "weight").sum()) == 12
    ps.squash(model)
    assert set(model.state_dict()) == {"weight", "bias"}
    assert model.weight is weight


def test_ema_models_follow_and_their_masks_are_their_own():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        ps.stored(model, "weight").add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    mask = ps.mask_of(average, "weight")
    assert mask is not ps.mask_of(model, "weight")
    assert not average.module.weight[~mask].any()
    ps.squash(average)
    assert type(average.module) is nn.Linear


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


def test_a_parameter_called_keys_can_be_masked():
    model = ps.sparsify(OddNames(), {"keys": 0.5, "values": 0.5})
    assert parametrize.is_parametrized(model, "keys")
    assert set(dict(ps.squash(model).named_parameters())) >= {"keys"}


class WithCustomCopies(nn.Linear):
    """As many libraries write __deepcopy__ and __reduce__."""

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce__(self):
        return _rebuild, (self.in_features, self.out_features), self.__dict__


def _rebuild(*args):
    return WithCustomCopies(*args)


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class Concrete(Abstract):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("build", [lambda: WithCustomCopies(4, 4), Concrete], ids=["custom", "abc"])
def test_classes_that_copy_and_build_their_own_way_work(build):
    model = ps.sparsify(build(), 0.5)
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert type(twin) is type(model)
        ps.squash(twin)
    assert int((model.weight != 0).sum()) == 8


def _child(queue, model):
    queue.put((model(torch.ones(1, 4)).tolist(), type(ps.squash(model)).__name__))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_masked_model_can_be_sent_to_a_spawned_process():
    model = ps.sparsify(nn.Linear(4, 3), 0.5)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, model))
    process.start()
    assert queue.get(timeout=120) == (model(torch.ones(1, 4)).tolist(), "Linear")
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


def test_a_class_put_on_top_stays():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    model.__class__ = type("Noted", (type(model),), {"note": "kept"})
    expected = model.weight.detach().clone()
    ps.squash(model)
    assert type(model).__name__ == "Noted"
    assert type(model).__mro__[1] is nn.Linear
    assert model.note == "kept"
    assert torch.equal(model.weight, expected)


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


def test_jit_trace_agrees_and_squashed_models_script():
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 0.5)
    x = torch.randn(2, 4)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates both
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
        expected = model(x)
        assert torch.equal(torch.jit.script(ps.squash(model))(x), expected)


class Delegating(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x @ self.weight)


class ReadOnly(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["sealed"] = True

    def __setattr__(self, name, value):
        if "sealed" in self.__dict__:
            raise AttributeError(f"read only: {name}")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "build", [Delegating, lambda: ReadOnly(4, 4)], ids=["delegating", "sealed"]
)
def test_classes_with_attribute_access_of_their_own_work(build):
    model, x = build(), torch.randn(2, 4)
    weight = model.weight
    ps.sparsify(model, {"weight": 0.5})
    expected = model(x)
    ps.squash(model)
    assert model.weight is weight
    assert torch.equal(model(x), expected)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in build().named_parameters()]


def test_a_stock_registration_leaves_siblings_whose_attribute_is_plain():
    class Maybe(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.bias = nn.Parameter(torch.zeros(4)) if bias else None

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    one, two = (ps.sparsify(Maybe(bias), {"weight": 0.5}) for bias in (True, False))
    x = torch.randn(2, 4)
    expected = two(x)
    parametrize.register_parametrization(one, "bias", Half())
    assert torch.equal(two(x), expected)
    two.bias = None
    assert torch.equal(two(x), expected)


def test_an_rnn_lives_on_when_ours_goes_before_a_stock_parametrization():
    model, x = nn.GRU(4, 5), torch.randn(3, 2, 4)
    ps.sparsify(model, {"weight_hh_l0": 0.5})
    parametrize.register_parametrization(model, "bias_hh_l0", nn.Identity())
    expected = model(x)[0]
    ps.squash(model)
    assert torch.equal(model(x)[0], expected)
    parametrize.remove_parametrizations(model, "bias_hh_l0")
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("rules", [None, {"weight": 0.25}], ids=["one_place", "two_masks"])
def test_a_tie_that_reads_differently_at_its_places_is_not_squashed(rules):
    model, index = Tied(), torch.arange(5)
    ps.sparsify(model.head, {"weight": 0.5})
    if rules:
        ps.sparsify(model.embedding, rules)
    expected = model(index)
    with pytest.raises(RuntimeError, match="one mask at all its places"):
        ps.squash(model)
    assert torch.equal(model(index), expected)
    assert len(list(ps.named_masks(model))) == (2 if rules else 1)
    assert ps.dense_state_dict(model)["head.weight"].count_nonzero() == 36
    ps.unsparsify(model)
    assert type(model.head) is nn.Linear


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
    with pytest.raises(ValueError, match="one for several"):
        ps.sparsify(model, {"*": lambda tensors: dict.fromkeys(tensors, mask)})
    assert not ps.is_sparse(model)


def test_prune_at_one_place_of_a_tie_is_refused():
    model = Tied()
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    with pytest.raises(ValueError, match="prune.remove"):
        ps.sparsify(model, {"head.weight": "zeros"})
    assert prune.is_pruned(model)


def test_a_submodule_called_parametrizations_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.parametrizations = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

    model = Own()
    with pytest.raises(ValueError, match="parametrizations"):
        ps.sparsify(model, {"weight": 0.5})
    assert not ps.is_sparse(model)


def test_squash_of_what_cannot_be_written_changes_nothing():
    with torch.inference_mode():
        fixed = nn.Linear(4, 4)
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 4), fixed), 0.5)
    with pytest.raises(RuntimeError, match="inference mode"):
        ps.squash(model)
    assert len(list(ps.named_masks(model))) == 2


def test_feature_extractors_trace_through_masked_modules():
    from torchvision.models import swin_t
    from torchvision.models.feature_extraction import create_feature_extractor

    model = ps.sparsify(swin_t(weights=None).eval(), 0.5)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = create_feature_extractor(model, ["flatten"])(x)["flatten"]
        torch.testing.assert_close(model.head(features), model(x))


def test_a_real_and_imaginary_tensor_that_are_one_are_one_target():
    from tests.cases import PairLinear

    model = PairLinear()
    model.weight_im = model.weight_re
    ps.sparsify(model, 0.5)
    assert [name for name, _ in ps.named_masks(model)] == ["weight_re"]
