"""Whatever happens while `shrink` works, a model that it has not made smaller is as it was."""

import copy
import importlib
import random
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_modules

import parasparse as ps
from parasparse.shrink import sizes
from parasparse.shrink.plan import ShrinkRow
from parasparse.shrink.running import ALONE
from tests.shrink.test_surroundings import settings

CALLS = {"now": 0, "fails": 0, "error": RuntimeError}


def called(*_):
    """A hook, or part of a program, that fails in one of its calls."""
    CALLS["now"] += 1
    if CALLS["now"] == CALLS["fails"]:
        raise CALLS["error"]("in the middle")


class Hostile(nn.Module):
    """Constants to fold, heads, a tie, an RMSNorm, a frozen layer, a buffer, random numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 1)
        self.rms = nn.RMSNorm(8, eps=1e-5)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.up, self.down, self.twin = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.twin.weight = self.up.weight
        self.frozen = nn.Linear(12, 6).requires_grad_(False)
        self.register_buffer("shift", torch.randn(12))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        called()
        x = self.conv(self.norm(self.stem(x)).relu()).flatten(2).mT
        x = self.rms(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(self.up(x).relu())
        x = F.silu(self.twin(x) * self.shift)
        return self.head(self.frozen(x)) + torch.rand(3)


def images():
    return torch.randn(2, 3, 4, 4)


OPTIMIZERS = {
    "none": lambda model: None,
    "sgd": lambda model: torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.1},
         {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}],
        0.01, momentum=0.9,
    ),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.01, amsgrad=True),
    "two": lambda model: [
        torch.optim.SGD(model.attention.parameters(), 0.01, momentum=0.9),
        torch.optim.AdamW([p for n, p in model.named_parameters() if "attention" not in n], 0.01),
    ],
    "copies": lambda model: Averaging(model.parameters()),
}  # fmt: skip


class Averaging(torch.optim.Optimizer):
    """Keeps a slow copy of the weights, and whatever is the same for all of them."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                state = self.state[p]
                state.setdefault("z", p.clone()).lerp_(p - 0.1 * p.grad, 0.5)
                state["step"] = torch.tensor(1.0)
                p.copy_(state["z"])


def each(optimizer):
    return optimizer if isinstance(optimizer, list) else [optimizer] if optimizer else []


def hostile(kind="adam"):
    """A masked model in training, its optimizers, and inputs."""
    torch.manual_seed(3)
    CALLS.update(now=0, fails=0)
    model, x = Hostile(), images()
    with torch.no_grad():
        model.norm.bias.uniform_(0.5, 1.0)
    units = ps.coupled(model, x)
    ps.sparsify(model, {units.reaches: ps.Prune(0.4, pattern=units, scope="global")})
    masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
    masks["down.weight"][tuple(masks["down.weight"].nonzero()[0])] = False  # an entry alone
    masks["norm.bias"][:] = True  # so that the conv reads constants, and adds them to its bias
    masks["conv.weight"] |= masks["conv.weight"].any(1, keepdim=True)
    ps.deploy_masks(model, masks)
    model.stem.register_forward_hook(called)
    model.up.register_forward_pre_hook(called)
    model.up.weight.register_hook(lambda grad: grad)
    model.register_state_dict_post_hook(lambda *_: None)
    optimizer = OPTIMIZERS[kind](model)
    for _ in range(2):
        model(x).square().sum().backward()
        for one in each(optimizer):
            one.step()
    model.train()
    model.attention.eval()
    CALLS["now"] = 0
    return model, optimizer, x


def of_tensor(t):
    """What a tensor is, so that another one, or another value, is told apart."""
    values = t.detach().clone().nan_to_num(7.0).tolist()
    return id(t), type(t), t.data_ptr(), t.shape, t.stride(), t.requires_grad, t.is_leaf, values


def of_module(module):
    tensors = {**module._parameters, **module._buffers}
    kept = {k: of_tensor(t) for k, t in tensors.items() if t is not None}
    grads = {k: of_tensor(t.grad) for k, t in tensors.items()
             if t is not None and t.grad is not None}  # fmt: skip
    kinds = (int, float, bool, str, tuple, torch.Size, type(None))
    attributes = {k: (type(v), v) for k, v in vars(module).items() if isinstance(v, kinds)}
    hooks = {k: dict(v) for k, v in vars(module).items() if "hooks" in k and hasattr(v, "items")}
    children = [(k, id(v)) for k, v in module._modules.items()]
    return type(module), kept, grads, attributes, hooks, children


def of_optimizer(optimizer):
    states = [
        (id(p), {k: of_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()})
        for p, state in optimizer.state.items()
    ]
    groups = [
        {**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    return states, groups


def of_everything(model, optimizer):
    modules = [(name, of_module(module)) for name, module in model.named_modules()]
    return modules, list(model.state_dict()), [of_optimizer(one) for one in each(optimizer)]


def is_free(lock):
    free = []

    def take():
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return free[0]


def of_surroundings():
    """What a process shares."""
    hooks = {k: dict(v) for k, v in vars(torch_modules).items() if k.startswith("_global")
             and hasattr(v, "items")}  # fmt: skip
    return (
        hooks, settings(), torch.get_rng_state().tolist(), random.getstate(),
        np.random.get_state()[1].tolist(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(), torch.get_default_device(), nn.Parameter.__new__,
        list(warnings.filters), is_free(ALONE), sizes._told.get(), sizes._run.get(),
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip


def fails(model, held, x, **keywords):
    """Whether `shrink` raises an error; if so, everything must be as it was."""
    before, around, error = of_everything(model, held), of_surroundings(), None
    keywords = {"example_inputs": x, "optimizer": held, **keywords}
    try:
        ps.shrink(model, **keywords)
    except BaseException as raised:
        error = raised
    assert of_surroundings() == around, repr(error)
    assert error is None or of_everything(model, held) == before, repr(error)
    return error is not None


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_networks_with_everything_shrink_and_train_on(kind):
    model, optimizer, x = hostile(kind)
    masked, around = copy.deepcopy(model).eval(), of_surroundings()
    flags = [p.requires_grad for p in model.parameters()]
    plan = ps.plan_shrink(model, x)
    assert {"num_heads", "eps", "out_channels"} <= {row.name for row in plan.attributes}
    modes = {name: module.training for name, module in model.named_modules()}
    ps.shrink(model, x, optimizer=optimizer)
    assert of_surroundings() == around
    assert all(module.training == modes[name] for name, module in model.named_modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.manual_seed(0)
    want = masked(x)
    torch.manual_seed(0)
    torch.testing.assert_close(copy.deepcopy(model).eval()(x), want, rtol=1e-4, atol=1e-4)
    for _ in range(2):
        model(x).square().sum().backward()
        for one in each(optimizer):
            one.step()
    for one in each(optimizer):
        for p, state in one.state.items():
            assert all(v.shape in (p.shape, ()) for v in state.values())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_programs_that_fail_in_any_call_leave_everything_as_it_was(error):
    failed, at = 0, 0
    while True:
        at += 1
        model, optimizer, x = hostile()
        CALLS.update(fails=at, error=error)
        done = not fails(model, optimizer, x)
        failed += not done
        if done and CALLS["now"] < at:
            break
    assert failed >= 3


def stepped(optimizer, model, x):
    """An optimizer with a state."""
    model(x).square().sum().backward()
    optimizer.step()
    return optimizer


BAD = {  # arguments of `shrink` for a model and its inputs
    "shape": lambda model, x: {"example_inputs": x[:, :2]},
    "arguments": lambda model, x: {"example_inputs": (x, x)},
    "no inputs": lambda model, x: {"example_inputs": None},
    "targets": lambda model, x: {"targets": "sten"},
    "multiple": lambda model, x: {"multiple_of": 0},
    "all are multiples": lambda model, x: {"multiple_of": 64},
    "another optimizer": lambda model, x: {"optimizer": torch.optim.SGD(Hostile().parameters())},
    "factored": lambda model, x: {
        "optimizer": stepped(torch.optim.Adafactor(model.parameters()), model, x)
    },
    "no optimizer": lambda model, x: {"optimizer": model},
    "another plan": lambda model, x: {
        "example_inputs": replace(ps.plan_shrink(model, x), rows=(MISFIT,))
    },
}
MISFIT = ShrinkRow("head.weight", (3, 9), (3, 5), {1: (0, 1, 2, 3, 4)})


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_wrong_arguments_leave_everything_as_it_was(bad):
    model, optimizer, x = hostile()
    assert fails(model, optimizer, x, **bad(model, x))


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of what changes something, from `cut` on."""

    where = tuple(f"parasparse.{name}" for name in (
        "shrink.cutting", "shrink.undo", "shrink.attention", "optim.cutting", "attach.storing",
        "attach.attaching", "attach.undo", "verbs.squash",
    ))  # fmt: skip

    def __init__(self, monkeypatch):
        self.module = importlib.import_module("parasparse.shrink.shrink")
        self.lines, self.at, self._cut = 0, 0, self.module.cut
        monkeypatch.setattr(self.module, "cut", self.cut)

    def cut(self, *args):
        sys.settrace(self._enter)
        return self._cut(*args)

    def _enter(self, frame, event, _):
        return self._step if frame.f_globals.get("__name__") in self.where else None

    def _step(self, frame, event, _):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._step


def test_interrupts_at_any_line_of_the_cut_leave_everything_as_it_was(monkeypatch):
    model, optimizer, x = hostile("copies")
    interrupt, before = Interrupt(monkeypatch), sys.gettrace()
    work = interrupt.module._planned(model, x, targets=None, exact=True, multiple_of=1)
    monkeypatch.setattr(interrupt.module, "_planned", lambda *_, **__: work)
    for at in range(1, 100_000, 89):
        interrupt.lines, interrupt.at = 0, at
        try:
            failed = fails(model, optimizer, x, check=False)
        finally:
            sys.settrace(before)
        if not failed:
            break
    assert at > 1000


BEFORE = [  # functions that fail before they have done their work
    "shrink.shrink.check_shrinkable", "shrink.shrink.work_for", "shrink.shrink.check_fits",
    "shrink.shrink.cut", "shrink.shrink.squash", "shrink.shrink._fold_whole_masks",
    "shrink.shrink.Reference.__init__", "shrink.shrink.Reference.check",
    "shrink.planning.traced", "shrink.planning.constants_of", "shrink.planning.keep_needed",
    "shrink.running.copied_inputs", "shrink.running.tag_attributes", "shrink.running.call",
    "shrink.comparing._copied", "shrink.comparing._outputs", "shrink.comparing.state_epsilons",
    "shrink.cutting.prepare", "shrink.cutting.store", "shrink.cutting.resize_mask",
    "shrink.cutting.set_size", "shrink.cutting.selected", "shrink.cutting.rescaled",
    "shrink.attention.let_heads_go", "shrink.shrink.drop_cached_results", "shrink.undo.give",
    "optim.cut", "optim.add_to_copies",
]  # fmt: skip
# Those that return how to undo their work, and the last one, cannot fail after it.
AFTER = [path for path in BEFORE if not path.startswith(("optim", "shrink.shrink._fold"))]


def failing(patch, path, number, *, after):
    """Have a function be interrupted in its `number`-th call."""
    place, _, name = f"parasparse.{path}".rpartition(".")
    if place.endswith(".Reference"):
        holder = importlib.import_module("parasparse.shrink.shrink").Reference
    else:
        holder = importlib.import_module(place)
    plain, calls = getattr(holder, name), []

    def fail(*args, **kwargs):
        calls.append(1)
        found = plain(*args, **kwargs) if after or len(calls) != number else None
        if len(calls) == number:
            raise KeyboardInterrupt
        return found

    patch.setattr(holder, name, fail)


@pytest.mark.parametrize(
    ("path", "after"), [*((path, False) for path in BEFORE), *((path, True) for path in AFTER)]
)
def test_steps_that_fail_leave_everything_as_it_was(path, after, monkeypatch):
    model, optimizer, x = hostile("copies")
    for number in (1, 2):
        with monkeypatch.context() as patch:
            failing(patch, path, number, after=after)
            failed = fails(model, optimizer, x)
        assert failed or number > 1
        if not failed:  # there is no second call
            return
    ps.shrink(model, x, optimizer=optimizer)
