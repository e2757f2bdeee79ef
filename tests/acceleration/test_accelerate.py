import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from parasparse.acceleration.formats.compressed import CSR, Bag
from parasparse.acceleration.installing import weights_in
from tests.acceleration.cases import CASES, q, x
from tests.helpers.machine import needs_mkl

case = pytest.mark.parametrize("name", CASES)
pytestmark = [
    needs_mkl,
    # torch's own: it has no fast kernel for them either
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def sparse(name, sparsity=0.8):
    """Return a squashed model, and a plan that lets each of its weights multiply sparsely."""
    build, inputs = CASES[name]
    rules = {"embedding.weight": sparsity} if name == "tied" else sparsity
    model = ps.squash(ps.sparsify(build().eval(), rules))
    kind = "csr" if inputs[0].dtype == torch.float64 else "bag"
    weights = [n for n, p in model.named_parameters() if p.ndim > 1]
    return model, {n: [[1, "csr"], [4, kind]] for n in weights}, inputs


def close(got, want):
    got, want = (torch.utils._pytree.tree_leaves(v) for v in (got, want))
    for one, other in zip(got, want, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@case
@torch.no_grad()
def test_outputs_are_those_of_the_dense_model(name):
    dense, plan, inputs = sparse(name)
    masked = ps.sparsify(copy.deepcopy(dense), {"*": "zeros"})
    for model in (copy.deepcopy(dense), masked):
        assert ps.accelerate(model, formats=plan) is model
        assert list(weights_in(model))
        close(model(*inputs), dense(*inputs))
        got, want = model(*inputs), dense(*inputs)
        if isinstance(want, torch.Tensor):
            assert got.stride() == want.stride()


@pytest.fixture
def kernel_calls(monkeypatch):
    """Return a list that grows with each call of a sparse kernel."""
    calls = []

    def spied(method):
        return lambda *args: (calls.append(method.__name__), method(*args))[1]

    for kind in (CSR, Bag):
        monkeypatch.setattr(kind, "rows", spied(kind.rows))
        monkeypatch.setattr(kind, "columns", spied(kind.columns))
    return calls


@case
def test_the_kernels_are_those_that_run(name, kernel_calls):
    """Else the outputs would be right because nothing was accelerated."""
    if name in ("linear, no rows", "lstm, projections"):
        pytest.skip("dense by design: nothing to multiply; projections")
    model, plan, inputs = sparse(name)
    ps.accelerate(model, formats=plan)
    with torch.no_grad():
        model(*inputs)
    assert kernel_calls


@case
@torch.no_grad()
def test_the_default_device_does_not_matter(name):
    dense, plan, inputs = sparse(name)
    want = dense(*inputs)
    with torch.device("meta"):
        model = copy.deepcopy(ps.accelerate(copy.deepcopy(dense), formats=plan))
        close(model(*inputs), want)
    close(model(*inputs), want)
    assert all(torch.equal(t, dense.state_dict()[key]) for key, t in model.state_dict().items())


@case
def test_the_module_stays_what_it_was(name):
    dense, plan, inputs = sparse(name)
    before = copy.deepcopy(dense)
    parameters = dict(dense.named_parameters())
    ps.accelerate(dense, formats=plan)
    assert isinstance(dense, type(before))
    state = dense.state_dict()
    assert list(state) == list(before.state_dict())
    for key, value in before.state_dict().items():
        assert type(state[key]) is torch.Tensor
        assert torch.equal(state[key], value)
    assert [n for n, _ in dense.named_parameters()] == list(parameters)
    assert all(isinstance(p, nn.Parameter) for p in dense.parameters())
    with torch.no_grad():
        want = dense(*inputs)
        copied, again = copy.deepcopy(dense), io.BytesIO()
        torch.save(dense, again)
        again.seek(0)
        for other in (copied, torch.load(again, weights_only=False)):
            assert [s.attr for s, _ in weights_in(other)] == [s.attr for s, _ in weights_in(dense)]
            close(other(*inputs), want)
        ps.restore(copied)
        close(dense(*inputs), want)
    assert ps.restore(dense) is dense
    assert not list(weights_in(dense))
    for n, parameter in dense.named_parameters():
        assert parameter is parameters[n]
        assert torch.equal(parameter, before.get_parameter(n))
    with torch.no_grad():
        assert all(
            torch.equal(one, other)
            for one, other in zip(
                torch.utils._pytree.tree_leaves(dense(*inputs)),
                torch.utils._pytree.tree_leaves(before(*inputs)),
                strict=True,
            )
            if one is not None
        )


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: ps.sparsify(m, 0.9),
        lambda m: ps.plan(m, 0.9),
        ps.squash,
        ps.unsparsify,
        ps.binarize,
        lambda m: ps.deploy_masks(m, {}),
        lambda m: ps.accelerate(m, formats="csr"),
    ],
    ids=["sparsify", "plan", "squash", "unsparsify", "binarize", "deploy_masks", "accelerate"],
)
def test_verbs_that_change_masks_ask_to_restore_first(verb):
    for model in (nn.Linear(32, 48), ps.sparsify(nn.Linear(32, 48), 0.9)):
        with torch.no_grad():
            model.weight.mul_(torch.rand(48, 32) < 0.1)
        ps.accelerate(model, formats={"weight": [[1, "csr"]]})
        with pytest.raises(RuntimeError, match=r"parasparse\.restore\(model\) first"):
            verb(model)
        assert list(weights_in(model))


@pytest.mark.parametrize(
    ("build", "arguments", "error", "text"),
    [
        (lambda: nn.Linear(8, 8), {}, ValueError, "at least half are zeros.*none among 1"),
        ("linear", {"formats": "csc"}, ValueError, r'among "csr", .*; got "csc"'),
        ("linear", {"formats": []}, ValueError, "must be among"),
        ("linear", {"formats": {"wieght": [[1, "csr"]]}}, ValueError, 'nearest: "weight"'),
        ("linear", {"formats": {"weight": [[1, "2:4"]]}}, ValueError, "cannot hold"),
        ("linear", {"formats": {"weight": [[1, "blocks"]]}}, ValueError, 'got "blocks"'),
        ("conv2d", {}, ValueError, "`example_inputs` must be given"),
        ("linear", {"formats": 5}, TypeError, "must be names of formats, or a plan; got 5"),
        ("linear", {"formats": {}}, ValueError, "must name a weight; got an empty one"),
        *(
            ("linear", {"formats": {"weight": plan}}, ValueError, "must hold pairs")
            for plan in (
                [],
                "csr",
                ["csr"],
                None,
                [["a", "csr"]],
                [[0, "csr"]],
                [[1.5, "csr"]],
                [[1, "csr"], [1, None]],
                [[1, "csr", 2]],
            )
        ),
        ("linear", {"formats": {"weight": [[1, ["csr"]]]}}, ValueError, "must be among"),
    ],
)
def test_bad_input_is_an_error_and_changes_nothing(build, arguments, error, text):
    model = build() if callable(build) else sparse(build)[0]
    before = dict(model.named_parameters())
    with pytest.raises(error, match=text):
        ps.accelerate(model, **arguments)
    assert all(parameter is before[n] for n, parameter in model.named_parameters())


def test_a_weight_that_is_not_multiplied_is_an_error():
    model = ps.squash(ps.sparsify(nn.Embedding(16, 32), {"*": 0.9}))
    with pytest.raises(ValueError, match="on these inputs it does not"):
        ps.accelerate(model, torch.arange(4))


def test_a_failing_model_is_left_as_it_was():
    model, _, _ = sparse("linear")
    before = model.weight
    with pytest.raises(RuntimeError):  # torch's own
        ps.accelerate(model.train(), x(2, 31))
    assert model.weight is before
    assert model.training


@pytest.mark.parametrize(
    ("name", "linears"), [("self-attention", 2), ("cross-attention", 3), ("attention of three", 4)]
)
def test_attention_computes_with_sparse_projections(name, linears, kernel_calls):
    """All that are fused in one weight, of which torch cuts parts."""
    model, plan, inputs = sparse(name)
    ps.accelerate(model, formats=plan)
    with torch.no_grad():
        model(*inputs)
    assert kernel_calls.count("rows") == linears


def test_wrong_sizes_are_torchs_own_error():
    for name in ("linear", "conv2d"):
        dense, _, inputs = sparse(name)
        for kind in ("csr", "bag", "channels"):
            with torch.no_grad():
                dense.weight[::2] = 0
                dense.weight[:, 1::2] = 0
            model = ps.accelerate(copy.deepcopy(dense), formats={"weight": [[1, kind]]})
            for more in (-1, 1):
                shape = list(inputs[0].shape)
                shape[-1 if name == "linear" else 1] += more
                with torch.no_grad():
                    for one in (dense, model):
                        with pytest.raises(RuntimeError):
                            one(torch.randn(shape))


def test_summary_leaves_an_accelerated_model_accelerated():
    for model in (sparse("linear")[0], ps.sparsify(nn.Linear(32, 48), 0.8)):
        ps.accelerate(model, formats={"weight": [[1, "csr"]]})
        ps.summary(model, q)
        assert len(list(weights_in(model))) == len(ps.accelerated(model)) == 1


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, groups", "self-attention"])
def test_an_accelerated_model_compiles_in_one_graph(name):
    dense, plan, inputs = sparse(name)
    model = ps.accelerate(copy.deepcopy(dense), formats=plan)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(compiled(*inputs), dense(*inputs))


@pytest.mark.parametrize("name", ["self-attention", "attention, kdim"])
def test_the_compiled_kernels_are_sparse(name):
    """Without dense values, a dense kernel would give NaN."""
    dense, plan, inputs = sparse(name)
    want = dense(*inputs)
    model = ps.accelerate(dense, formats=plan, keep_dense=False)
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), want)


def test_blocks_and_channels_compile_as_well():
    weight = torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    for kind in ("bsr", "channels"):
        dense = nn.Linear(64, 64).requires_grad_(False)
        dense.weight.copy_(weight)
        dense.weight[:32] = 0
        model = ps.accelerate(copy.deepcopy(dense), formats={"weight": [[1, kind]]})
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for inputs in (x(1, 64), x(70, 64)):
            close(compiled(inputs), dense(inputs))


@pytest.mark.parametrize("keep_dense", [True, False])
def test_export_gives_the_dense_program(keep_dense):
    dense, plan, inputs = sparse("linear")
    model = ps.accelerate(copy.deepcopy(dense), formats=plan, keep_dense=keep_dense)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        close(program.module()(*inputs), dense(*inputs))
        assert "parasparse" not in str(program.graph)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_tracing_is_refused():
    model, plan, inputs = sparse("linear")
    ps.accelerate(model, formats=plan)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must not be exported or traced"):
        torch.jit.trace(model, inputs)


def test_channels_leave_whole_outputs_and_inputs_out():
    for build, inputs in (
        (lambda: nn.Linear(32, 48), x(5, 32)),
        (lambda: nn.Conv2d(16, 32, 3, padding=1), x(2, 16, 5, 5)),
        (lambda: nn.Conv2d(16, 32, 1, bias=False), x(2, 16, 5, 5)),
    ):
        dense = build().requires_grad_(False)
        dense.weight[::2] = 0
        dense.weight[:, 1::3] = 0
        model = ps.accelerate(copy.deepcopy(dense), formats={"weight": [[1, "channels"]]})
        close(model(inputs), dense(inputs))


def test_packed_sequences_stay_dense():
    model, plan, inputs = sparse("lstm")
    packed = nn.utils.rnn.pack_padded_sequence(inputs[0], [5, 4, 2])
    with torch.no_grad():
        want = model(packed)[0].data
        ps.accelerate(model, formats=plan)
        close(model(packed)[0].data, want)


def test_masks_and_summary_are_read_as_before():
    model = ps.sparsify(nn.Linear(32, 48), 0.9)
    before = repr(ps.summary(model)), ps.dense_state_dict(model), dict(ps.named_masks(model))
    ps.accelerate(model, formats={"weight": [[1, "csr"]]})
    assert repr(ps.summary(model)) == before[0]
    for key, value in ps.dense_state_dict(model).items():
        assert torch.equal(value, before[1][key])
        assert type(value) is torch.Tensor
    assert torch.equal(ps.mask_of(model, "weight"), before[2]["weight"])
    with torch.no_grad():
        assert torch.equal(F.relu(model.weight), F.relu(before[1]["weight"]))
