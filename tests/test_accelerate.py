import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from parasparse.sparse import measure
from parasparse.sparse.compressed import CSR, Bag
from parasparse.sparse.measure import Measured
from parasparse.sparse.places import weights_in
from parasparse.sparse.weight import SparseWeight


def x(*shape):
    return torch.randn(*shape)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


q, k = x(2, 5, 32), x(2, 7, 32)
mha = {"embed_dim": 32, "num_heads": 4}
CASES = {
    "linear": (lambda: nn.Linear(32, 48), (x(2, 5, 32),)),
    "linear, one row": (lambda: nn.Linear(32, 48), (x(32),)),
    "linear, no bias, many rows": (lambda: nn.Linear(32, 48, bias=False), (x(150, 32),)),
    "linear, no rows": (lambda: nn.Linear(32, 48), (x(0, 32),)),
    "conv1d": (lambda: nn.Conv1d(16, 32, 3, padding=1, stride=2), (x(2, 16, 9),)),
    "conv1d, unbatched": (lambda: nn.Conv1d(16, 32, 1), (x(16, 9),)),
    "conv2d": (lambda: nn.Conv2d(16, 32, (3, 2), padding=(1, 0), dilation=2), (x(2, 16, 9, 8),)),
    "conv2d, 1 x 1": (lambda: nn.Conv2d(16, 32, 1, stride=(2, 1)), (x(2, 16, 9, 8),)),
    "conv2d, same": (lambda: nn.Conv2d(16, 32, (5, 3), padding="same"), (x(1, 16, 9, 8),)),
    "conv2d, valid": (lambda: nn.Conv2d(16, 32, 3, padding="valid"), (x(1, 16, 9, 8),)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
        (x(1, 16, 9, 8),),
    ),
    "conv2d, channels last": (
        lambda: nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last),
        (x(2, 16, 9, 8).to(memory_format=torch.channels_last),),
    ),
    "conv3d, 1 x 1 x 1": (lambda: nn.Conv3d(16, 32, 1, bias=False), (x(2, 16, 3, 4, 5),)),
    "conv3d": (lambda: nn.Conv3d(16, 32, 2), (x(2, 16, 3, 4, 5),)),
    "conv2d, groups": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 32, 1)),
        (x(2, 16, 4, 4),),
    ),
    "self-attention": (lambda: nn.MultiheadAttention(**mha, batch_first=True), (q, q, q)),
    "cross-attention": (lambda: nn.MultiheadAttention(**mha, batch_first=True), (q, k, k)),
    "attention of three": (
        lambda: nn.MultiheadAttention(**mha, batch_first=True, bias=False),
        (q, k, k.clone()),
    ),
    "attention, kdim": (
        lambda: nn.MultiheadAttention(**mha, kdim=16, vdim=24, batch_first=True),
        (q, x(2, 7, 16), x(2, 7, 24)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        (q,),
    ),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), (q, k)),
    "lstm": (lambda: nn.LSTM(16, 32, num_layers=2), (x(5, 3, 16),)),
    "lstm, two ways": (
        lambda: nn.LSTM(16, 32, 2, bidirectional=True, batch_first=True, bias=False),
        (x(3, 5, 16),),
    ),
    "lstm, state": (lambda: nn.LSTM(16, 32), (x(5, 3, 16), (x(1, 3, 32), x(1, 3, 32)))),
    "conv1d, same, even": (
        lambda: nn.Conv1d(16, 32, 4, padding="same", dilation=2),
        (x(1, 16, 9),),
    ),
    "lstm, projections": (lambda: nn.LSTM(16, 32, proj_size=8), (x(5, 3, 16),)),
    "gru": (lambda: nn.GRU(16, 32, num_layers=2, bidirectional=True), (x(5, 3, 16),)),
    "gru, state, unbatched": (lambda: nn.GRU(16, 32), (x(5, 16), x(1, 32))),
    "rnn": (lambda: nn.RNN(16, 32), (x(5, 3, 16),)),
    "rnn, relu": (lambda: nn.RNN(16, 32, nonlinearity="relu"), (x(5, 3, 16),)),
    "tied": (Tied, (torch.randint(48, (2, 5)),)),
    "float64": (lambda: nn.Linear(32, 48).double(), (x(5, 32).double(),)),
}
case = pytest.mark.parametrize("name", CASES)
pytestmark = [
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
    if name in ("linear, no rows", "conv3d", "lstm, projections"):
        pytest.skip("dense by design: nothing to multiply; no patches in 3-d; projections")
    model, plan, inputs = sparse(name)
    ps.accelerate(model, formats=plan)
    with torch.no_grad():
        model(*inputs)
    assert kernel_calls


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


@case
def test_other_dtypes_and_new_values_are_followed(name):
    dense, plan, inputs = sparse(name)
    if inputs[0].dtype != torch.float32:
        pytest.skip("tokens and float64 have no other dtype to go to")
    other = ps.squash(ps.sparsify(CASES[name][0]().eval(), 0.7))
    for model in (copy.deepcopy(dense), ps.sparsify(copy.deepcopy(dense), "zeros")):
        ps.accelerate(model, formats={n: [[1, "csr"]] for n in plan})
        with torch.no_grad():
            wide = torch.utils._pytree.tree_map(torch.Tensor.double, inputs)
            close(model.double()(*wide), copy.deepcopy(dense).double()(*wide))
            model.float()
            if not ps.is_sparse(model):
                model.load_state_dict(other.state_dict())
                close(model(*inputs), other(*inputs))
        ps.restore(model)


def test_a_masked_model_follows_what_is_loaded():
    model = ps.sparsify(nn.Linear(32, 48), 0.8)
    other = ps.sparsify(nn.Linear(32, 48), 0.7)
    ps.accelerate(model, formats={"weight": [[1, "csr"]]})
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
        close(model(q), other(q))
        assert model.weight is model.weight
    ps.restore(model)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(ps.mask_of(model, "weight"), ps.mask_of(other, "weight"))


def test_gradients_are_an_error():
    model, plan, inputs = sparse("linear")
    ps.accelerate(model, formats=plan)
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        model(*inputs)
    model.requires_grad_(False)
    model(*inputs)  # nothing would get one
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        model(inputs[0].clone().requires_grad_())
    ps.restore(model)
    assert not model.weight.requires_grad
    masked = ps.accelerate(ps.sparsify(nn.Linear(32, 48), 0.8), formats={"weight": [[1, "csr"]]})
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        masked(inputs[0].detach())


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


def test_half_is_refused_on_a_cpu_before_and_after():
    model, plan, _ = sparse("linear")
    with pytest.raises(TypeError, match=r'float32 or float64; "weight" are torch\.bfloat16'):
        ps.accelerate(copy.deepcopy(model).bfloat16())
    ps.accelerate(model, formats=plan)
    with pytest.raises(TypeError, match=r"got torch\.float16. Call parasparse\.restore"):
        model.half()
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "arguments", "error", "text"),
    [
        (lambda: nn.Linear(8, 8), {}, ValueError, "at least half are zeros.*none among 1"),
        ("linear", {"formats": "csc"}, ValueError, r'of "csr", .*; got "csc"'),
        ("linear", {"formats": []}, ValueError, "must be of"),
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
        ("linear", {"formats": {"weight": [[1, ["csr"]]]}}, ValueError, "must be of"),
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
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ps.accelerate(model.train(), x(2, 31))
    assert model.weight is before
    assert model.training


def test_the_plan_says_what_was_measured_and_is_followed():
    model = ps.squash(ps.sparsify(nn.Sequential(nn.Linear(512, 1024), nn.ReLU()), 0.99))
    ps.accelerate(model, x(8, 512))
    table = ps.accelerated(model)
    assert [row.rows for row in table] == [1, 8, 64]
    assert all(row.name == "0.weight" and row.shape == (1024, 512) for row in table)
    assert all(abs(row.sparsity - 0.99) < 1e-3 for row in table)
    for row in table:
        assert 0 < row.chosen_ms <= row.dense_ms
        assert (row.format is None) == (row.chosen_ms == row.dense_ms)
    assert "chosen ms" in repr(table)
    assert table._repr_html_().count("<tr>") == 4
    saved = json.loads(json.dumps(table.plan))
    ps.restore(model)
    assert ps.accelerated(model) == ()
    again = ps.accelerated(ps.accelerate(model, formats=saved))
    assert [(r.name, r.rows, r.format) for r in again] == [
        (r.name, r.rows, r.format) for r in table
    ]
    assert json.loads(json.dumps(again.plan)) == saved
    assert again[0].dense_ms is None


def fake_times(monkeypatch, milliseconds):
    """Let the clock of the measurements say what each format takes."""

    def timed(calls):
        return {name: milliseconds.get(name, 9.0) for name in calls}

    monkeypatch.setattr(measure, "timed", timed)


def test_the_fastest_is_chosen_if_it_gains_more_than_noise(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    for times, chosen in [
        ({None: 1.0, "csr": 0.5, "bag": 0.4}, "bag"),
        ({None: 1.0, "csr": 0.97}, None),
        ({None: 1.0, "csr": 1.5}, None),
    ]:
        fake_times(monkeypatch, times)
        model, _, inputs = sparse("linear")
        ps.accelerate(model, inputs)
        assert {row.format for row in ps.accelerated(model)} == {chosen}
        assert len(list(weights_in(model))) == (chosen is not None)


def test_a_model_that_does_not_gain_as_a_whole_stays_dense(monkeypatch):
    fake_times(monkeypatch, {None: 1.0, "csr": 0.5})
    monkeypatch.setattr(measure, "gains", lambda *_: False)
    for name in ("linear", "lstm", "encoder"):
        model, _, inputs = sparse(name)
        ps.accelerate(model, inputs)
        assert not list(weights_in(model))
        assert {(r.format, r.chosen_ms) for r in ps.accelerated(model)} == {(None, 1.0)}


def test_a_weight_that_gains_only_at_other_rows_than_the_examples_stays_dense(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    monkeypatch.setattr(measure, "_fastest", lambda use, _: Measured(use.rows, *FAST[use.rows]))
    for rows in (8, 64):
        model = sparse("linear")[0]
        ps.accelerate(model, x(rows, 32))
        assert [r.format for r in ps.accelerated(model)] == (
            [None, None, None] if rows == 8 else [None, None, "csr"]
        )


FAST = {1: (None, 1.0, 1.0), 8: (None, 1.0, 1.0), 64: ("csr", 1.0, 0.5)}


def test_the_nearest_number_of_rows_decides():
    weight = nn.Parameter(torch.eye(64), requires_grad=False)
    made = SparseWeight(weight, ((1, "csr"), (8, "bag"), (64, None)))
    kinds = {n: getattr(made.format_for(n), "kind", None) for n in (1, 2, 3, 8, 22, 23, 999)}
    assert kinds == {1: "csr", 2: "csr", 3: "bag", 8: "bag", 22: "bag", 23: None, 999: None}


def test_measuring_leaves_buffers_hooks_and_modes_alone():
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Dropout(0.5))
    ps.squash(ps.sparsify(model, 0.99))
    model[2].eval()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    inputs = x(4, 512)
    torch.set_rng_state(drawn)
    ps.accelerate(model, {"input": inputs})
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dense_values_can_be_freed():
    model, plan, inputs = sparse("linear")
    dense = copy.deepcopy(model)
    ps.accelerate(model, formats={"weight": [[1, "csr"]]}, keep_dense=False)
    assert model.weight.original is None
    with torch.no_grad():
        close(model(*inputs), dense(*inputs))
        for other in (model, copy.deepcopy(model)):
            assert torch.equal(other.state_dict()["weight"], dense.weight)
            assert torch.equal(other.weight.sum(), dense.weight.sum())
            assert other.weight.shape == (48, 32)
    with pytest.raises(RuntimeError, match="freed them"):
        ps.restore(model)
    other = ps.squash(ps.sparsify(nn.Linear(32, 48), 0.9))
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32):
            close(
                model.to("cpu").to(dtype)(inputs[0].to(dtype)), dense.to(dtype)(inputs[0].to(dtype))
            )
            assert model.weight.original is None
        model.load_state_dict(other.state_dict())
        close(model(*inputs), other(*inputs))
        nn.init.constant_(model.weight, 0.5)  # no zeros are left: dense again
        assert model.weight.original is not None
        nn.init.constant_(other.weight, 0.5)
        close(model(*inputs), other(*inputs))
    masked = ps.sparsify(nn.Linear(32, 48), 0.9)
    with pytest.raises(ValueError, match=r"Call parasparse\.squash first"):
        ps.accelerate(masked, formats=plan, keep_dense=False)


def test_what_is_read_densely_as_well_keeps_its_dense_values(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    fake_times(monkeypatch, {None: 1.0, "csr": 0.5})
    model, _, inputs = sparse("tied")
    ps.accelerate(model, inputs, keep_dense=False)  # the embedding looks rows up
    assert model.head.weight.original is not None
    model, _, inputs = sparse("linear")
    ps.accelerate(model, inputs, keep_dense=False)
    assert model.weight.original is None


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


def test_every_way_to_write_is_followed():
    dense, plan, inputs = sparse("linear")
    for write in (
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.eye(48)[:, :32]),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: w.__imul__(2),
        lambda w: nn.init.zeros_(w),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: torch.mul(w, 2, out=w),
        lambda w: setattr(w, "data", torch.eye(48)[:, :32].double().float()),
        lambda w: nn.init.constant_(tensor=w, val=0.1),
        lambda w: w[:32].zero_(),
        lambda w: w.view(-1).mul_(2),
        lambda w: w.T.mul_(2),
        lambda w: w.detach().mul_(2),
        lambda w: w.split([32, 16])[0].mul_(2),
        lambda w: w.chunk(2)[0].zero_(),
        lambda w: [row.mul_(2) for row in w],
        lambda w: F.relu(w, inplace=True),
    ):
        model, other = ps.accelerate(copy.deepcopy(dense), formats=plan), copy.deepcopy(dense)
        with torch.no_grad():
            write(model.weight)
            write(other.weight)
            close(model(*inputs), other(*inputs))
            assert torch.equal(model.state_dict()["weight"], other.weight)
        assert torch.equal(ps.restore(model).weight, other.weight)


def test_a_reference_from_before_is_followed():
    dense, plan, inputs = sparse("linear")
    parameter = dense.weight
    ema = torch.optim.swa_utils.AveragedModel(dense)
    ps.accelerate(dense, formats=plan)
    ps.accelerate(ema, formats=plan)
    with torch.no_grad():
        parameter.mul_(3)
        close(dense(*inputs), F.linear(*inputs, parameter, dense.bias))
        ema.update_parameters(dense)
        close(ema(*inputs), dense(*inputs))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, stack: stack.original.mul_(3),
        lambda m, stack: stack.original.detach()[:3].zero_(),
        lambda m, stack: setattr(m, "weight", torch.ones(48, 32)),
        lambda m, stack: setattr(m, "weight", nn.Parameter(torch.ones(48, 32))),
        lambda m, stack: stack[0].mask_(torch.eye(48)[:, :32]),
        lambda m, stack: stack[0].mask.logical_not_(),
        lambda m, stack: m.double(),
    ],
    ids=["in place", "view", "assigned", "retied", "mask", "mask in place", "dtype"],
)
def test_a_masked_model_follows_its_weights_and_masks(change):
    dense = ps.sparsify(nn.Linear(32, 48), 0.8)
    model = ps.accelerate(copy.deepcopy(dense), formats={"weight": [[1, "csr"]]})
    with torch.no_grad():
        for one in (model, dense):
            change(one, one.parametrizations.weight)
        inputs = q.to(dense.bias.dtype)
        close(model(inputs), dense(inputs))
        new = {"parametrizations.weight.original": torch.randn(48, 32, dtype=inputs.dtype)}
        for _ in range(2):
            close(*(torch.func.functional_call(one, new, (inputs,)) for one in (model, dense)))
        close(model(inputs), dense(inputs))
    assert list(weights_in(model))


def test_no_gradient_is_lost_in_silence():
    model, plan, inputs = sparse("linear")
    ps.accelerate(model, formats=plan)
    for use in (lambda w: inputs[0] @ w.T, lambda w: (w**2).sum(), lambda w: w.clone()):
        with pytest.raises(RuntimeError, match="no gradient goes through them"):
            use(model.weight)
    masked = ps.sparsify(nn.Linear(32, 48).requires_grad_(False), 0.8)
    ps.accelerate(masked, formats={"weight": [[1, "csr"]]})
    masked(*inputs)
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        masked.requires_grad_(True)(*inputs)
    masked.requires_grad_(False)(*inputs)


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
                        with pytest.raises(RuntimeError, match="shapes cannot|to have 16 channels"):
                            one(torch.randn(shape))


def test_summary_leaves_an_accelerated_model_accelerated():
    for model in (sparse("linear")[0], ps.sparsify(nn.Linear(32, 48), 0.8)):
        ps.accelerate(model, formats={"weight": [[1, "csr"]]})
        ps.summary(model, q)
        assert len(list(weights_in(model))) == len(ps.accelerated(model)) == 1


def test_what_was_replaced_is_no_longer_told_of():
    model, plan, _ = sparse("linear")
    ps.accelerate(model, formats=plan)
    model.load_state_dict(nn.Linear(32, 48).state_dict(), assign=True)
    assert ps.accelerated(model) == ()


def test_convolutions_go_back_to_dense_far_above_what_was_measured(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    fake_times(monkeypatch, {None: 1.0, "csr": 0.5})
    model, _, inputs = sparse("conv2d, 1 x 1")
    ps.accelerate(model, inputs)
    rows = [(row.rows, row.format, row.dense_ms) for row in ps.accelerated(model)]
    assert rows == [(80, "csr", 1.0), (640, "csr", 1.0), (2560, None, None)]


@torch.no_grad()
def test_double_under_autocast_stays_double():
    dense, plan, _ = sparse("float64")
    with torch.autocast("cpu", torch.bfloat16):
        assert ps.accelerate(dense, formats=plan)(x(5, 32).double()).dtype == torch.float64


def test_transforms_of_torch_func_see_the_dense_weight():
    dense, plan, inputs = sparse("linear")
    model = ps.accelerate(copy.deepcopy(dense), formats=plan)
    with torch.no_grad():
        close(torch.vmap(model)(inputs[0]), dense(inputs[0]))
        got, want = (torch.func.jvp(m, inputs, inputs) for m in (model, dense))
        close(got, want)


def test_inference_mode_is_fine():
    dense, plan, inputs = sparse("linear")
    model = copy.deepcopy(dense)
    with torch.inference_mode():
        close(ps.accelerate(model, formats=plan)(*inputs), dense(*inputs))
    with torch.no_grad():
        close(model(*inputs), dense(*inputs))
    ps.restore(model)
    model(*inputs).sum().backward()
    assert model.weight.grad is not None


def test_autocast_gives_what_it_gives_dense():
    for name in ("linear", "conv2d", "lstm"):
        dense, plan, inputs = sparse(name)
        model = ps.accelerate(copy.deepcopy(dense), formats=plan)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got, want = (torch.utils._pytree.tree_leaves(m(*inputs))[0] for m in (model, dense))
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["linear", "conv2d", "self-attention"])
def test_an_accelerated_model_compiles_in_one_graph(name):
    dense, plan, inputs = sparse(name)
    model = ps.accelerate(copy.deepcopy(dense), formats=plan)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(compiled(*inputs), dense(*inputs))


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


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
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


def test_a_real_model_gains():
    vision = pytest.importorskip("torchvision")
    model = vision.models.resnet18(weights=None).eval()
    ps.squash(ps.sparsify(model, 0.98))
    dense, inputs = copy.deepcopy(model), x(1, 3, 64, 64)
    ps.accelerate(model, inputs)
    with torch.no_grad():
        close(model(inputs), dense(inputs))
    assert len(ps.accelerated(model)) >= 21
