"""Within one call of a module, a tensor is masked once, and nothing that changes is overlooked."""

import copy
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import parasparse as ps

KEPT = torch.arange(36).reshape(4, 3, 3) % 3 != 0
X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Counting(nn.Module):
    """Masks, and counts how often."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return torch.where(self.mask, weight, 0)


def nothing(module):
    pass


class Experts(nn.Module):
    """Reads its stack for each expert, and calls `between` before each."""

    def __init__(self, between=nothing, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, dtype=dtype))
        self.between = between

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        for index in range(4):
            self.between(self)
            x = x + scale * torch.tanh(x @ self.weight[index])
        return x


class Recurrent(nn.Module):
    """A hand-written recurrent layer with a buffer, which reads its weights at each step."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=dtype))
        self.register_buffer("table", torch.randn(3, 3, dtype=dtype))

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(x @ self.weight + x @ self.table)
        return x


def masked(between=nothing, mask=KEPT):
    return ps.sparsify(Experts(between), {"weight": mask})


def counting(between=nothing):
    model = Experts(between)
    ps.sparsify(model, {"weight": lambda tensors: {k: Counting(KEPT) for k in tensors}})
    mask = model.parametrizations.weight[0]
    mask.calls = 0  # `sparsify` tries it
    return model, mask


def masked_anew(module):
    return module.parametrizations.weight()


def test_a_forward_masks_each_tensor_once():
    model, mask = counting()
    for calls in (1, 2):
        model(X).sum().backward()
        assert mask.calls == calls
    with torch.no_grad():
        model(X)
    assert mask.calls == 3
    assert model.weight is not model.weight
    assert mask.calls == 5


def test_a_call_of_attention_masks_its_projections_once():
    model = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    keep = {"in_proj_weight": lambda tensors: {k: Counting(t > 0) for k, t in tensors.items()}}
    mask = ps.sparsify(model, keep).parametrizations.in_proj_weight[0]
    mask.calls, x = 0, torch.randn(2, 3, 6)
    with torch.no_grad():
        out, _ = model(x, x, x)
    assert mask.calls == 1
    with torch.no_grad():
        assert torch.equal(out, ps.squash(model)(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_outputs_and_gradients_are_those_of_zeros(dtype, mode):
    for dense, rules in ((Experts(dtype=dtype), {"weight": KEPT}), (Recurrent(dtype), 0.5)):
        model = ps.sparsify(copy.deepcopy(dense), rules)
        zeroed = ps.squash(copy.deepcopy(model))
        with mode():
            out, expected = model(X.to(dtype)), zeroed(X.to(dtype))
        assert torch.equal(out, expected)
        if mode is nullcontext:
            out.abs().sum().backward()
            expected.abs().sum().backward()
            grad, kept = model.parametrizations.weight.original.grad, ps.mask_of(model, "weight")
            # The terms of a sum over steps may be added in another order.
            torch.testing.assert_close(grad, torch.where(kept, zeroed.weight.grad, 0))
            assert not grad[~kept].any()


def added(module):
    with torch.no_grad():
        module.parametrizations.weight.original += 1


def assigned(module):
    module.weight = torch.randn(4, 3, 3)


def tied(module):
    module.weight = nn.Parameter(torch.randn(4, 3, 3))


def given_other_data(module):
    stored = module.parametrizations.weight.original
    stored.data = stored.data * 2


def swapped(module):
    module.parametrizations.weight.original = nn.Parameter(torch.randn(4, 3, 3))


def masked_otherwise(module):
    ps.deploy_masks(module, {"weight": torch.rand(4, 3, 3) < 0.5})


def masked_by_another(module):
    module.parametrizations.weight.replace_mask(Counting(torch.rand(4, 3, 3) < 0.5))


def written_to(module):
    with torch.no_grad():
        module.weight.mul_(2)


def trained(module, **keywords):
    stored = module.parametrizations.weight.original
    optimizer = torch.optim.SGD([stored], 0.1, **keywords)
    optimizer.zero_grad()
    module.weight.square().sum().backward()
    optimizer.step()


CHANGES = {
    "added in place": added,
    "assigned": assigned,
    "tied": tied,
    "given other data": given_other_data,
    "swapped": swapped,
    "masked otherwise": masked_otherwise,
    "masked by another module": masked_by_another,
    "written to what is read": written_to,
    "trained": trained,
    "trained by a fused optimizer": partial(trained, fused=True),  # it counts no versions
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_two_reads_is_seen(change):
    steps = []

    def between(module):
        before = module.weight
        change(module)
        assert torch.equal(module.weight, masked_anew(module))
        assert module.weight is module.weight
        steps.append(change is written_to or not torch.equal(before, module.weight))

    masked(between, KEPT.clone())(X)
    assert steps == [True] * 4


@pytest.mark.parametrize("trained", [True, False])
def test_a_weight_frozen_or_thawed_between_two_reads_is_so(trained):
    seen = []

    def between(module):
        seen.append(module.weight.requires_grad)
        module.requires_grad_(trained)
        seen.append(module.weight.requires_grad)
        module.requires_grad_(not trained)

    module = masked(between, KEPT.clone())
    module.requires_grad_(not trained)(X)
    assert seen == [not trained, trained] * 4


def test_an_unset_mask_is_refused_at_the_next_read():
    model = masked(
        lambda module: module.weight is None or ps.deploy_masks(module, {"weight": None})
    )
    with pytest.raises(RuntimeError, match="has no sparsity mask"):
        model(X)


def test_a_mask_taken_off_in_between_is_off():
    def between(module):
        _ = module.weight
        ps.unsparsify(module)
        assert isinstance(module.weight, nn.Parameter)

    masked(between)(X)


MODES = {
    "gradients off": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "saved on CPU": torch.autograd.graph.save_on_cpu,
    "forward derivatives": forward_ad.dual_level,
    "fake tensors": partial(FakeTensorMode, allow_non_fake_inputs=True),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_what_is_read_in_another_mode_is_read_apart(mode):
    def between(module):
        outside = module.weight
        with mode():
            inside, fresh = module.weight, masked_anew(module)
            assert inside is not outside
            assert (type(inside), inside.requires_grad) == (type(fresh), fresh.requires_grad)
            assert inside.is_inference() == fresh.is_inference()
        assert module.weight is outside

    masked(between)(X)


def test_reads_inside_a_gate_in_evaluation_mode_are_apart():
    def between(module):
        noisy = module.weight
        module.eval()
        assert torch.equal(module.weight, masked_anew(module))
        assert not torch.equal(module.weight, noisy)
        module.train()
        assert module.weight is noisy  # one draw for each forward

    model = ps.sparsify(Experts(between), {"weight": ps.Gate(ps.gates.hard_concrete)})
    model(X)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, whole):
    class Parts(Experts):
        def forward(self, x):
            x = x @ self.weight[0]
            run = (lambda f, x: f(x)) if whole else partial(checkpoint, use_reentrant=reentrant)
            return run(super().forward, x) @ self.weight[1]

    model = ps.sparsify(Parts(), {"weight": KEPT})
    plain = ps.squash(copy.deepcopy(model))
    x = X.clone().requires_grad_()
    out = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
    out.sum().backward()
    plain(X).sum().backward()
    grad = model.parametrizations.weight.original.grad
    torch.testing.assert_close(grad, torch.where(KEPT, plain.weight.grad, 0))


def test_transforms_of_torch_func_read_for_themselves():
    def between(module):
        outside = module.weight
        grad = torch.func.grad(lambda x: (x @ module.weight[0]).square().sum())(X)
        torch.testing.assert_close(grad, 2 * (X @ outside[0]) @ outside[0].T)
        rows = torch.vmap(lambda x: x @ module.weight[1])(X)
        torch.testing.assert_close(rows, X @ outside[1])
        assert module.weight is outside

    masked(between)(X)
    model, dense = masked(), ps.squash(masked())
    key = "parametrizations.weight.original"
    values = {key: model.parametrizations.weight.original.detach()}

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(values, X)[key].sum(0)
    dense(X).sum().backward()
    torch.testing.assert_close(each, torch.where(KEPT, dense.weight.grad, 0))


@pytest.mark.parametrize("key", ["weight", "parametrizations.weight.original"])
def test_a_functional_call_inside_reads_what_it_was_given(key):
    new = torch.ones(4, 3, 3)

    def between(module):
        outside = module.weight
        if torch.equal(outside.detach(), KEPT.float()):
            return
        with torch.no_grad():
            inner = torch.func.functional_call(module, {key: new}, (X,))
        other = ps.sparsify(Experts(), {"weight": KEPT})
        with torch.no_grad():
            other.weight = new
            assert torch.equal(inner, other(X))
        assert torch.equal(module.weight, outside)

    masked(between)(X)


def test_a_forward_inside_a_forward_keeps_for_itself():
    def between(module):
        outside = module.weight
        module.between = nothing
        module(X)
        assert module.weight is outside

    model, mask = counting(between)
    model(X)
    assert mask.calls == 2


def test_nothing_is_kept_after_an_exception():
    def between(module):
        _ = module.weight
        raise KeyboardInterrupt

    model, mask = counting(between)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert model.weight is not model.weight
    assert mask.calls == 3


def test_nothing_is_kept_alive_after_a_forward():
    held = []
    with torch.no_grad():
        masked(lambda module: held.append(torch._C._WeakTensorRef(module.weight)))(X)
    assert all(reference.expired() for reference in held)


def test_threads_keep_apart():
    barrier, read = threading.Barrier(2), {False: [], True: []}

    def between(module):
        barrier.wait(10)
        read[torch.is_grad_enabled()].append(module.weight)

    model, mask = counting(between)

    def run(grad):
        with torch.set_grad_enabled(grad):
            model(X)

    threads = [threading.Thread(target=run, args=(grad,)) for grad in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mask.calls == 2
    assert all(len({id(t) for t in tensors}) == 1 for tensors in read.values())
    assert read[True][0].grad_fn is not None
    assert read[False][0].grad_fn is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_during_a_forward_reads_its_own(copied):
    def between(module):
        outside = module.weight
        module.between = nothing
        other = copied(module)
        assert torch.equal(other.weight, outside)
        added(other)
        assert torch.equal(other.weight, masked_anew(other))
        assert not torch.equal(other.weight, module.weight)

    masked(between)(X)


def test_what_a_forward_hook_changes_is_seen():
    model, mask = counting()
    model.register_forward_pre_hook(lambda module, _: added(module))
    seen = []
    model.parametrizations.weight.register_forward_hook(lambda *_: seen.append(1))
    out = model(X)
    assert len(seen) == mask.calls == 4  # a hook on each read is run at each
    assert torch.equal(out, model.forward(X))


def test_dense_gradients_inside_a_forward():
    def between(module):
        outside = module.weight
        with ps.dense_gradients(module) as grads:
            module.weight.sum().backward()
        assert torch.equal(grads["weight"], torch.ones(4, 3, 3))
        assert torch.equal(module.weight, outside)

    masked(between)(X)


def test_frozen_and_cached_values_come_first():
    model, mask = counting()
    with torch.no_grad(), ps.frozen(model):
        before = mask.calls
        model(X)
        assert mask.calls == before
    with parametrize.cached():
        model(X), model(X)
        assert mask.calls == before + 1


def test_a_parametrization_below_is_computed_at_each_read_as_without_a_mask():
    model = Experts()
    model.weight = nn.Parameter(torch.randn(4, 3, 3))
    stock = parametrizations.spectral_norm(model)
    ours = ps.sparsify(copy.deepcopy(stock), {"weight": torch.ones(4, 3, 3)})
    assert torch.equal(ours(X), stock(X))
    assert torch.equal(ours.parametrizations.weight[0]._u, stock.parametrizations.weight[0]._u)


def test_a_gate_on_a_pair_follows_both_components():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_re, self.w_im = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))

        def forward(self, x):
            for _ in range(2):
                x = x @ self.w_re + x @ self.w_im
                with torch.no_grad():
                    self.parametrizations.w_im.original += 1
                stacks = self.parametrizations
                assert torch.equal(self.w_re, stacks.w_re())
                assert torch.equal(self.w_im, stacks.w_im())
            return x

    gate = ps.Gate(ps.gates.soft_threshold, init=0.1)
    ps.sparsify(Pair(), {"w": gate})(X)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch deprecates `jit.trace`
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_traces_as_when_dense():
    model = masked()
    expected = model(X)
    graph = torch.fx.symbolic_trace(model, {"scale": 1.0})
    traced = torch.jit.trace(model, (X,))
    assert torch.equal(graph(X), expected)
    assert torch.equal(traced(X), expected)
    added(model)
    assert torch.equal(graph(X), model(X))
    assert torch.equal(traced(X), model(X))
    assert not torch.equal(model(X), expected)


def test_it_compiles_and_exports_as_one_graph():
    model = masked()
    expected = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), expected)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
    added(model)
    assert torch.equal(compiled(X), model(X))


def test_forward_is_that_of_the_class():
    assert type(masked()).forward is Experts.forward


def test_classes_with_a_forward_of_torch_are_called_as_they_are():
    class Own(nn.Linear):
        pass

    for layer in (nn.Linear(3, 3), Own(3, 3)):
        assert type(ps.sparsify(layer, 0.5)).__call__ is nn.Module.__call__
