"""What cannot be shrunk is refused before anything changes, with the way out."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import parasparse as ps
from tests.shrink.test_shrink import filters


def network(sparsity=0.5):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
        nn.Flatten(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 3),
    )  # fmt: skip
    return ps.sparsify(model, {"3": filters(sparsity)}) if sparsity else model


def images():
    return torch.randn(2, 3, 4, 4)


def digest(model, *optimizers):
    """Everything that a failed call must leave as it is: objects, storages, values, attributes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = [
        (name, id(t), t.data_ptr() if not t.is_meta else 0, t.stride(), t.requires_grad,
         t.tolist() if not t.is_meta else (), None if t.grad is None else t.grad.tolist())
        for name, t in tensors
    ]  # fmt: skip
    plain = (int, float, bool, str, tuple)
    attributes = [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in model.named_modules()
    ]
    states = [
        [(id(p), {k: id(v) for k, v in state.items()}) for p, state in optimizer.state.items()]
        for optimizer in optimizers
    ]
    return repr((found, attributes, states))


def with_gate():
    return ps.sparsify(network(0), {"3": ps.Gate(ps.gates.hard_concrete)})


def with_unset_mask():
    model = network()
    ps.deploy_masks(model, {"3.weight": None})
    return model


def with_float_mask():
    model = network()
    ps.deploy_masks(model, {"3.weight": torch.rand(6, 8, 3, 3)})
    return model


def with_weight_norm():
    model = network()
    parametrizations.weight_norm(model[5])
    return model


def masked_with_weight_norm():
    model = network(0)
    parametrizations.weight_norm(model[3])
    return ps.sparsify(model, {"3": filters(0.5)})


def with_old_weight_norm():
    model = network()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[5])
    return model


def with_old_prune():
    model = network()
    nn.utils.prune.ln_structured(model[5], "weight", 0.5, 2, 0)
    return model


def accelerated():
    return ps.accelerate(network().eval(), formats={"3.weight": [[1, "csr"]]})


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation
        return torch.ao.quantization.quantize_dynamic(network(0), {nn.Linear})


def exported():
    return torch.export.export(network(0).eval(), (images(),)).module()


def checkpointed():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(network())


def with_masks_on_meta():
    model = network()
    for module in model.modules():
        if isinstance(module, ps.Mask):
            module.to("meta")
    return model


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))


CASES = {  # a model, words of the message
    "gate": (with_gate, "binarize"),
    "unset mask": (with_unset_mask, "deploy_masks"),
    "float mask": (with_float_mask, "binarize"),
    "data parallel": (lambda: DataParallel(network()), "Pass its `.module`"),
    "averaged": (lambda: AveragedModel(network()), "Pass its `.module`"),
    "compiled": (lambda: torch.compile(network(), backend="eager"), "Pass its `._orig_mod`"),
    "a compiled part": (
        lambda: nn.Sequential(torch.compile(network(), backend="eager")), "Pass its `._orig_mod`",
    ),
    "script": (lambda: torch.jit.trace(network(0).eval(), images()), "that it was made from"),
    "exported": (exported, "that it was made from"),
    "checkpointed": (checkpointed, "before you wrap"),
    "quantized": (quantized, "before you quantize"),
    "accelerated": (accelerated, "parasparse.restore"),
    "weight norm": (with_weight_norm, "remove_parametrizations"),
    "weight norm under a mask": (masked_with_weight_norm, "squash"),
    "old weight norm": (with_old_weight_norm, "remove_weight_norm"),
    "old pruning": (with_old_prune, "prune.remove"),
    "meta": (lambda: network().to("meta"), "has no values"),
    "a mask on meta": (with_masks_on_meta, "has no values"),
    "lazy": (lazy, "dummy batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_models_that_must_be_prepared_first_are_refused(name):
    build, words = CASES[name]
    model = build()
    before = digest(model) if name != "lazy" else ""
    for verb in (ps.plan_shrink, ps.shrink):
        with pytest.raises(RuntimeError, match=words):
            verb(model, images())
    assert name == "lazy" or digest(model) == before


@pytest.mark.parametrize(
    "name", ["script", "exported", "quantized", "weight norm", "old weight norm", "old pruning"]
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_units_of_what_cannot_be_shrunk_are_refused(name):
    build, words = CASES[name]
    with pytest.raises(RuntimeError, match=words):
        ps.coupled(build(), images())


def test_models_inside_a_block_that_holds_their_weights_are_refused():
    model = network().eval()
    with torch.no_grad(), ps.frozen(model), pytest.raises(RuntimeError, match="in use by `frozen`"):
        ps.shrink(model, images())
    ps.shrink(model, images())


def test_a_controller_that_is_collecting_gradients_is_to_be_closed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = ps.rigl(model, {"5": 0.5}, optimizer, every=1, stop=9)
    with pytest.raises(RuntimeError, match="call `close` of the controller"):
        ps.shrink(model, images())
    controller.close()
    ps.shrink(model, images())


@pytest.fixture
def one_process():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_wrappers_are_refused(one_process):
    from torch.distributed.fsdp import fully_shard

    wrapped = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(RuntimeError, match="Pass its `.module`"):
        ps.shrink(wrapped, images())
    sharded = fully_shard(network(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match="before `fully_shard`"):
        ps.shrink(sharded, images())


def test_other_objects_are_refused():
    model = network()
    for odd in (None, model.state_dict(), "model"):
        for call in (ps.shrink, ps.plan_shrink, ps.coupled):
            with pytest.raises(TypeError, match="must be a torch.nn.Module"):
                call(odd, images())
    with pytest.raises(TypeError, match="must be a torch optimizer"):
        ps.shrink(model, images(), optimizer=model)


@pytest.mark.parametrize("inputs", [torch.randn(2, 5), (), {"y": 1}, None, "x"])
def test_wrong_inputs_change_nothing_and_say_what_is_wanted(inputs):
    model = network()
    before = digest(model)
    with pytest.raises(Exception) as caught:
        ps.shrink(model, inputs)
    note = caught.value.__notes__[-1]
    assert "`example_inputs`, which must be" in note
    assert f"it is of type {type(inputs).__name__}." in note
    assert digest(model) == before


def test_nothing_to_remove_is_said_in_a_few_lines():
    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)])
    for model in (network(0), ps.sparsify(network(0), 0.1), deep):
        with pytest.raises(ValueError, match="nothing can be removed. No mask") as caught:
            ps.shrink(model, images() if model is not deep else torch.randn(1, 4))
        assert str(caught.value).count("\n") < 8
    ps.sparsify(deep, {"*": filters(0.5)})
    normed = nn.Sequential(*[nn.Sequential(layer, nn.LayerNorm(4)) for layer in deep])
    with pytest.raises(ValueError, match="takes a mean or norm over it") as caught:
        ps.shrink(normed, torch.randn(1, 4))
    assert str(caught.value).count("\n") < 8


class Lies(nn.Module):
    """Looks at the size of a weight in a way that no trace can see: with a float on the left."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(24, 10)

    def forward(self, x):
        return self.layer(x) * (2.0 if 1.0 / self.layer.weight.shape[1] > 1 / 24 else 1.0)


class Fails(Lies):
    def forward(self, x):
        if 1.0 / self.layer.weight.shape[1] > 1 / 24:
            raise ValueError("24 inputs")
        return self.layer(x)


@torch.library.custom_op("parasparse_tests::scaled_by_width", mutates_args=())
def scaled_by_width(x: torch.Tensor, width: float) -> torch.Tensor:
    return x * width


class CustomOperation(Lies):
    """Has the size of a weight decide, in an operation that is not the usual ones."""

    def forward(self, x):
        return scaled_by_width(self.layer(x), 1.0 / self.layer.weight.shape[1])


@pytest.mark.parametrize("kind", [Lies, Fails, CustomOperation])
def test_networks_that_would_differ_are_put_back_and_the_module_is_named(kind):
    model = network()
    model[5] = kind()
    optimizer = torch.optim.Adam(model.parameters(), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        model[3].bias.fill_(1.0)  # so that constants are added to the next bias
    model.eval()
    before = digest(model, optimizer)
    with pytest.raises(RuntimeError, match=rf'first in "5" \({kind.__name__}\)'):
        ps.shrink(model, images(), optimizer=optimizer)
    assert digest(model, optimizer) == before


def with_nested(x):
    return torch.nested.as_nested_tensor(list(x), layout=torch.jagged).relu().to_padded_tensor(0)


NOT_SEEN = {
    "cond": (
        lambda x: torch.cond(x.sum() > 0, torch.relu, torch.tanh, (x,)),
        r'"6" calls torch.ops.higher_order.cond, .* Use an `if`',
    ),
    "jagged": (with_nested, 'must not use nested tensors; "6" .* Use padded tensors'),
    "nested": (
        lambda x: torch.nested.as_nested_tensor(list(x)).relu().to_padded_tensor(0),
        'must not use nested tensors; "6" .* Use padded tensors',
    ),
}


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NOT_SEEN)
def test_calls_that_cannot_be_followed_are_refused(name):
    f, message = NOT_SEEN[name]
    model = network()
    model[6] = Calls(f)
    before = digest(model)
    for verb in (ps.plan_shrink, ps.shrink, ps.coupled):
        with pytest.raises(RuntimeError, match=message):
            verb(model, images())
    assert digest(model) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout):
    x = torch.nested.as_nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=layout)
    with pytest.raises(RuntimeError, match="must not use nested tensors; the model"):
        ps.coupled(nn.Linear(8, 2), x)


@pytest.mark.parametrize("kind", ["rows", "codes", "lists"])
def test_optimizers_with_states_of_other_layouts_are_refused(kind):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bias, before = model[3].bias, digest(model)
    odd = {"rows": torch.ones(2), "codes": torch.ones(6, dtype=torch.uint8),
           "lists": [torch.ones(6, 6)]}[kind]  # fmt: skip
    optimizer.state[bias]["odd"] = odd
    with pytest.raises(TypeError, match='state "odd" of SGD'):
        ps.shrink(model, images(), optimizer=optimizer)
    assert digest(model) == before


OPTIMIZERS = {
    "factored": (torch.optim.Adafactor, 'state "row_var" of Adafactor'),
    "of all together": (torch.optim.LBFGS, "LBFGS has one state"),
}


@pytest.mark.parametrize(("kind", "message"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_states_of_several_channels_together_are_refused_and_new_ones_go_on(kind, message):
    model = network()
    optimizer = kind(model.parameters(), 0.01)

    def loss():
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(loss)
    before = digest(model, optimizer)
    with pytest.raises(TypeError, match=message):
        ps.shrink(model, images(), optimizer=optimizer)
    assert digest(model, optimizer) == before
    ps.shrink(model, images())
    kind(model.parameters(), 0.01).step(loss)


def test_the_optimizer_of_another_model_is_refused():
    model = network()
    optimizer = torch.optim.Adam(copy.deepcopy(model).parameters())
    with pytest.raises(ValueError, match="of the same model object"):
        ps.shrink(model, images(), optimizer=optimizer)


@pytest.mark.parametrize("norm", [0, -1.0, float("inf"), float("nan")])
def test_units_are_ranked_by_a_norm_that_exists(norm):
    with pytest.raises(ValueError, match="`norm` must be None"):
        ps.coupled(network(), images(), norm=norm)


@pytest.mark.parametrize("number", [0, -8, 2.5, True, "8"])
def test_sizes_are_multiples_of_whole_numbers(number):
    with pytest.raises(ValueError, match="`multiple_of` must be an int"):
        ps.shrink(network(), images(), multiple_of=number)


class Held(nn.Module):
    """Uses parameters from a place that torch and masks do not know."""

    def __init__(self, *, modules):
        super().__init__()
        first, last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.known = nn.ParameterList([*first.parameters(), *last.parameters()])
        self.held = [first, last] if modules else list(self.known)

    def forward(self, x):
        if isinstance(self.held[0], nn.Module):
            return self.held[1](self.held[0](x).relu())
        a, b, c, d = self.held
        return nn.functional.linear(nn.functional.linear(x, a, b).relu(), c, d)


@pytest.mark.parametrize("modules", [False, True], ids=["parameters", "modules"])
def test_masks_that_the_network_does_not_use_are_said(modules):
    torch.manual_seed(0)
    model, x = Held(modules=modules), torch.randn(3, 4)
    ps.sparsify(model, ps.coupled(model, x).rules(0.5))
    before = copy.deepcopy(model.state_dict())
    want = model(x)
    with pytest.raises(RuntimeError, match=r"does not use every mask\. .*nn\.ModuleList"):
        ps.shrink(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), want)


class Shares(nn.Module):
    """Divides the channels of each head by their sum, which is 0 where a head is masked."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.heads = nn.Linear(8, 16), nn.Linear(16, 4), 4

    def forward(self, x):
        heads = self.first(x).relu().view(len(x), self.heads, -1)
        return self.last((heads / heads.sum(-1, keepdim=True)).flatten(1))


def test_a_masked_network_that_computes_nan_is_refused_with_that_reason():
    torch.manual_seed(0)
    model, x = Shares(), torch.randn(2, 8)
    ps.sparsify(model, ps.coupled(model, x).rules(0.5))
    assert model(x).isnan().all()
    before = digest(model)
    with pytest.raises(RuntimeError, match=r'computes NaN, first in "last" .*unchanged.*number to'):
        ps.shrink(model, x)
    assert digest(model) == before
