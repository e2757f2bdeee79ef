"""What stays with a model that is shrunk: its Parameters, hooks, optimizers, masks, copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import parasparse as ps
from tests.shrink.test_shrink import assert_same, filters, pruned


def network():
    """Two convolutions and two linear layers, in float64, in training mode."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.Tanh(),
        nn.Linear(10, 3),
    ).double()


def images(batch=2):
    return torch.randn(batch, 3, 4, 4, dtype=torch.float64)


def coupled_network():
    model = network()
    return pruned(model, images())


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Lion(torch.optim.Optimizer):
    """Chen et al., 2023, arXiv:2302.06675, algorithm 2."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
            mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.sub_(0.01 * ((0.9 * mean + 0.1 * p.grad).sign() + 0.1 * p))
            mean.mul_(0.99).add_(0.01 * p.grad)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "lion": Lion,
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, lr_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 2) for name in OPTIMIZERS), ("sgd", 0), ("adamw", 0)]
)
def test_training_first_and_shrinking_first_end_in_the_same_network(name, steps):
    model = coupled_network()
    # Before a norm, the gradient of a bias is rounding alone, of which Lion takes the sign.
    model[0].parametrizations.bias.original.requires_grad_(False)
    optimizer = OPTIMIZERS[name](model.parameters())
    batches = [images(4) for _ in range(5)]
    for x in batches[:steps]:
        step(model, optimizer, x)
    early, early_optimizer = copy.deepcopy((model, optimizer))
    for x in batches[steps:]:
        step(model, optimizer, x)
    ps.shrink(early, images(), optimizer=early_optimizer)
    for x in batches[steps:]:
        step(early, early_optimizer, x)
    ps.shrink(model, images())
    assert_equal_states(early, model)


def assert_equal_states(one, other):
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Run:
    """A model in training with all that lives beside it."""

    def __init__(self):
        self.model = coupled_network()
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, 0.01, weight_decay=0.0)
        self.schedule = OneCycleLR(self.optimizer, [0.02, 0.05], total_steps=20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        average = get_ema_multi_avg_fn(0.5)
        self.average = AveragedModel(self.model, multi_avg_fn=average)

    def step(self, x):
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(x).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.average.update_parameters(self.model)

    def shrink(self):
        ps.shrink(self.model, images(), optimizer=self.optimizer)
        ps.shrink(self.average.module, images())


def test_groups_schedules_scalers_and_averages_go_on():
    run, batches = Run(), [images(4) for _ in range(6)]
    for x in batches[:3]:
        run.step(x)
    early = copy.deepcopy(run)
    early.shrink()
    for x in batches[3:]:
        run.step(x)
        early.step(x)
    run.shrink()
    assert_equal_states(early.model, run.model)
    assert_equal_states(early.average, run.average)
    assert early.schedule.get_last_lr() == run.schedule.get_last_lr()
    assert early.scaler.get_scale() == run.scaler.get_scale() == 64.0


def test_parameters_their_hooks_and_flags_stay():
    model = coupled_network()
    model[1].parametrizations.weight.original.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: seen.append("module"))
    seen, before = [], dict(model.named_parameters())
    (stored,) = [p for p in model[0].parameters() if p.ndim == 4]
    stored.register_hook(lambda grad: seen.append(grad.shape))
    stored.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    flags = [p.requires_grad for p in before.values()]
    ps.shrink(model, images())
    seen.clear()
    after = list(model.parameters())
    assert {id(p) for p in after} == {id(p) for p in before.values()}
    assert [p.requires_grad for p in before.values()] == flags
    model(images()).sum().backward()
    assert seen == ["module", stored.shape, stored.shape]
    assert stored is model[0].weight


def test_training_goes_on_while_an_earlier_graph_lives():
    model = coupled_network()
    (stored,) = [p for p in model[0].parameters() if p.ndim == 4]
    node = stored.view_as(stored).grad_fn.next_functions[0][0]  # as other libraries hold it
    loss = model(images()).sum()
    ps.shrink(model, images())
    model(images()).sum().backward()
    assert stored.grad.shape == stored.shape
    del node, loss


def test_gradients_are_cut_along():
    model = coupled_network()
    model(images()).sum().backward()
    head = next(p for n, p in model[7].named_parameters() if n.endswith("original"))
    grad, plan = head.grad, ps.plan_shrink(model, images())
    ps.shrink(model, images())
    (kept,) = [row.kept[1] for row in plan.rows if row.name == "7.weight"]
    assert torch.equal(head.grad, grad[:, list(kept)])
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_sparse_gradients_are_cut_along():
    model = nn.Sequential(nn.Embedding(5, 6, sparse=True), nn.Linear(6, 2))
    index = torch.tensor([[1, 3]])
    model(index).sum().backward()
    grad = model[0].weight.grad.to_dense()
    with torch.no_grad():
        model[0].weight[:, :3] = 0
    ps.shrink(model, index)
    assert torch.equal(model[0].weight.grad.to_dense(), grad[:, 3:])


def test_memory_format_stays():
    model = coupled_network().to(memory_format=torch.channels_last)
    ps.sparsify(model, {"3": 0.3})  # a mask that stays
    ps.shrink(model, images(), check=False)
    for tensor in (ps.stored(model, "3.weight"), ps.mask_of(model, "3.weight")):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_names_and_their_order_stay():
    model = coupled_network()
    names = list(ps.dense_state_dict(model))
    ps.shrink(model, images())
    assert list(model.state_dict()) == names


class Scaled(nn.Module):
    """A buffer outside the state dict scales the channels."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x):
        return self.down(self.up(x) * self.scale)


def test_buffers_outside_the_state_dict_are_cut():
    model = Scaled()
    ps.sparsify(model, {"up": filters(0.5)})
    masked, x = copy.deepcopy(model), torch.randn(3, 4)
    ps.shrink(model, x)
    assert model.scale.shape == (3,)
    torch.testing.assert_close(model(x), masked(x))


class Shared(nn.Module):
    """Two layers share a weight, and so a mask."""

    def __init__(self):
        super().__init__()
        self.up, self.twin, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.twin.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x).tanh() + self.twin(x))


class Fixed(nn.Module):
    """A layer whose weight is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 4))
        self.register_buffer("shift", torch.randn(6))
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(F.linear(x, self.weight, self.shift).relu())


def test_channels_of_masked_buffers_go():
    model, x = Fixed().double(), torch.randn(3, 4, dtype=torch.float64)
    ps.sparsify(model, {"weight": filters(0.5)})
    masked, plan = copy.deepcopy(model), ps.plan_shrink(model, x)
    ps.shrink(model, x)
    assert model.weight.shape == (3, 4)
    assert_same(model, masked, x)
    assert_same(ps.unshrink(model, plan), masked, x)


def test_ties_and_their_masks_stay():
    model = Shared().double()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:3] = False
    mask[3, 0] = False  # so that the mask stays
    bias = torch.tensor([0.0, 0, 0, 1, 1, 1])
    ps.sparsify(model, {"up.weight": mask, "up.bias": bias, "twin.bias": bias})
    masked, x = copy.deepcopy(model), torch.randn(3, 4, dtype=torch.float64)
    ps.shrink(model, x)
    assert ps.mask_of(model, "up.weight").shape == (3, 4)
    assert model.up.parametrizations.weight.original is model.twin.parametrizations.weight.original
    assert model.up.parametrizations.weight[0] is model.twin.parametrizations.weight[0]
    assert_same(model, masked, x)


class Pair(nn.Module):
    """A complex layer in real and imaginary tensors, which have one mask."""

    def __init__(self):
        super().__init__()
        self.w_re, self.w_im = (nn.Parameter(torch.randn(6, 4)) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        re, im = x @ self.w_re.T, x @ self.w_im.T
        return self.head(re * re + im * im)


def test_the_mask_of_a_pair_is_cut_once():
    model = Pair().double()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:2], mask[2, 1] = False, False
    ps.sparsify(model, {"w": mask})
    masked, x = copy.deepcopy(model), torch.randn(3, 4, dtype=torch.float64)
    ps.shrink(model, x)
    assert ps.mask_of(model, "w").shape == (4, 4)
    assert model.head.in_features == 4
    assert_same(model, masked, x)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_complex_parameters_are_cut_and_their_constants_are_folded(first, second):
    model = nn.Sequential(
        nn.Linear(4, 6, bias=first, dtype=torch.complex64),
        nn.Linear(6, 2, bias=second, dtype=torch.complex64),
    )
    ps.sparsify(model, {"0.weight": filters(0.5)})
    masked, x = copy.deepcopy(model), torch.randn(3, 4, dtype=torch.complex64)
    ps.shrink(model, x)
    # Without a bias to add to, one constant stands for the others.
    assert model[0].weight.shape == (4 if first and not second else 3, 4)
    torch.testing.assert_close(model(x), masked(x))


def test_several_optimizers_are_cut_along():
    model = coupled_network()
    one = torch.optim.SGD(model[:4].parameters(), 0.1, momentum=0.9)
    two = torch.optim.Adam(model[4:].parameters(), 0.01)
    for optimizer in (one, two):
        step(model, optimizer, images())
    ps.shrink(model, images(), optimizer=[one, two])
    for optimizer in (one, two):
        step(model, optimizer, images())
        for parameter, state in optimizer.state.items():
            assert all(t.shape in (parameter.shape, ()) for t in state.values())


def test_constants_added_to_a_bias_reach_copies_of_it():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2)).double()
    ps.sparsify(model, {"0": filters(0.5)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bias = model[2].bias
    optimizer.state[bias]["z"] = bias.detach() + 1
    ps.shrink(model, torch.randn(2, 4, dtype=torch.float64), optimizer=optimizer)
    torch.testing.assert_close(optimizer.state[bias]["z"], bias.detach() + 1)


def small_network():
    return ps.shrink(coupled_network(), images()).eval()


def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": loaded,
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "export": lambda model: torch.export.export(model, (images(),)).module(),
    "fx": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize("name", COPIES)
def test_small_networks_are_copied_compiled_and_exported(name):
    model, x = small_network(), images()
    with torch.no_grad():
        torch.testing.assert_close(COPIES[name](model)(x), model(x))


def test_a_compiled_module_is_compiled_anew():
    model, x = coupled_network().eval(), images()
    model.compile(backend="eager")
    masked = model(x).detach()
    ps.shrink(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constants_are_folded_and_checked_in_every_dtype(dtype):
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)
    ps.sparsify(model, {"0": filters(0.5)})
    ps.shrink(model, torch.randn(5, 4, dtype=dtype))
    assert model[2].in_features == 6


class Casts(nn.Module):
    """Runs in float32 whatever the inputs are, so there is no float64 copy."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(self.up(x.float()).relu())


def test_a_network_that_runs_in_one_dtype_only_is_checked_in_that():
    model = ps.sparsify(Casts(), {"up": filters(0.5)})
    ps.shrink(model, torch.randn(5, 4))
    assert model.up.out_features == 6
