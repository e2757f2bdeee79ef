"""Heads of `nn.MultiheadAttention` go; what is left computes what the masked layer did."""

import copy
import pickle

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.shrink.attention import FewerHeads, let_heads_go
from parasparse.shrink.undo import Undo

N, L, S, E, H = 2, 4, 5, 12, 4


def layer(seed=0, **options):
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(E, H, **options).double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.uniform_(-0.7, 0.7)
    return attention


def inputs(attention, *, batched=True):
    shapes = [(L, E), (S, attention.kdim), (S, attention.vdim)]
    if batched:
        place = 0 if attention.batch_first else 1
        shapes = [(*shape[:place], N, *shape[place:]) for shape in shapes]
    return [torch.randn(shape, dtype=torch.double) for shape in shapes]


PADDING = torch.zeros(N, S, dtype=torch.bool)
PADDING[1, -2:] = True
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)
ARGUMENTS = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding in numbers": {"key_padding_mask": PADDING * -2.0, "need_weights": False},
    "mask": {"attn_mask": CAUSAL, "need_weights": False},
    "mask in numbers": {"attn_mask": torch.randn(L, S, dtype=torch.double)},
    "mask of each head": {"attn_mask": torch.randn(N * H, L, S, dtype=torch.double)},
    "bool mask of each head": {"attn_mask": CAUSAL.expand(N * H, L, S), "need_weights": False},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
}
OPTIONS = {
    "batch second": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "other keys": {"kdim": 5, "vdim": 7},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_with_all_heads_it_computes_what_torch_does(options, arguments):
    attention = layer(**options)
    x = inputs(attention)
    want = attention(*x, **arguments)
    let_heads_go(attention)
    got = attention(*x, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("average", [True, False])
def test_inputs_without_a_batch(average):
    attention = layer(batch_first=True)
    x = inputs(attention, batched=False)
    want = attention(*x, average_attn_weights=average)
    let_heads_go(attention)
    torch.testing.assert_close(attention(*x, average_attn_weights=average), want)


class Attending(nn.Module):
    """Takes the outputs of attention, and not its weights."""

    def __init__(self, attention, **arguments):
        super().__init__()
        self.attention, self.arguments = attention, arguments

    def forward(self, *x):
        return self.attention(*x, **self.arguments)[0]


def without_heads(model, example):
    """Half of the units are pruned; return a copy of the masked model, and shrink the model."""
    units = ps.coupled(model, example)
    score = lambda tensor, name: torch.rand(tensor.shape)  # noqa: E731
    ps.sparsify(model, units.rules(0.5, score=score))
    masked = copy.deepcopy(model)
    ps.shrink(model, example)
    return masked


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["plain", "without weights", "padding", "mask"])
def test_heads_go_and_nothing_else_changes(options, name):
    model = Attending(layer(**options), **ARGUMENTS[name])
    masked = without_heads(model, tuple(inputs(model.attention)))
    assert model.attention.num_heads == 2
    assert model.attention.out_proj.in_features == 6
    assert list(model.state_dict()) == list(ps.dense_state_dict(masked))
    x = inputs(model.attention)
    torch.testing.assert_close(model(*x), masked(*x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["mask of each head", "weights of each head"])
def test_heads_stay_where_the_program_counts_them(name):
    attention = layer()
    example = tuple(inputs(attention))
    arguments = ARGUMENTS[name]
    model = Attending(attention, **arguments) if "mask" in name else attention
    units = ps.coupled(model, example)
    assert not any("proj_weight" in name for name in units._shapes)


def test_heads_stay_where_their_weights_are_returned():
    attention = layer()
    plan = ps.plan_shrink(zero_head(attention), tuple(inputs(attention)))
    assert not plan.rows
    assert {row.reason for row in plan.kept_back} == {"the model takes a mean or norm over it"}


def zero_head(attention):
    """The first head feeds zeros into the outputs."""
    with torch.no_grad():
        attention.in_proj_weight[2 * E : 2 * E + E // H] = 0
        attention.in_proj_bias[2 * E : 2 * E + E // H] = 0
        attention.out_proj.weight[:, : E // H] = 0
    return attention


class Fed(nn.Module):
    """Queries, keys and values are of different layers."""

    def __init__(self, **options):
        super().__init__()
        self.attention = layer(**options)
        widths = (E, self.attention.kdim, self.attention.vdim)
        self.layers = nn.ModuleList(nn.Linear(6, width).double() for width in widths)
        self.last = nn.Linear(E, 2).double()

    def forward(self, x):
        return self.last(self.attention(*(layer(x) for layer in self.layers))[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dead", [(0, 1, 2), (0,), (1,), (2,), (3,)])
def test_inputs_and_outputs_go_while_all_heads_stay(options, dead):
    model, x = Fed(**options).eval(), torch.randn(N, L, 6, dtype=torch.double)
    layers = [*model.layers, model.attention.out_proj]
    with torch.no_grad():
        for layer_ in (layers[place] for place in dead):
            for tensor in layer_.parameters():
                tensor[:2] = 0
    plan = ps.plan_shrink(model, x)
    assert all(row.name != "num_heads" for row in plan.attributes)
    if not plan.rows:  # a weight of all three has one number of inputs
        assert dead != (0, 1, 2)
        return
    want = model(x)
    ps.shrink(model, x)
    torch.testing.assert_close(model(x), want)


STACKS = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 1),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2),
        1,
    ),
    "decoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16), 2), 2),
    "transformer": (lambda: nn.Transformer(E, H, 1, 1, 16, batch_first=True), 2),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_lose_heads(name):
    torch.manual_seed(0)
    build, number = STACKS[name]
    model = build().double().eval()
    masked = without_heads(model, tuple(torch.randn(2, 3, E).double() for _ in range(number)))
    heads = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert set(heads) == {2}
    others = [torch.randn(3, 5, E).double() for _ in range(number)]
    with torch.no_grad():  # where torch would choose its own kernel
        torch.testing.assert_close(model(*others), masked(*others), rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # in the masked model
def test_an_encoder_with_padding_gives_zeros_there():
    torch.manual_seed(0)
    model = STACKS["encoder"][0]().double().eval()
    x = torch.randn(N, S, E).double()
    masked = without_heads(model, {"src": x, "src_key_padding_mask": PADDING})
    with torch.no_grad():
        got, want = (m(x, src_key_padding_mask=PADDING) for m in (model, masked))
    torch.testing.assert_close(got, want)


def test_copies_and_pickles_have_fewer_heads_too():
    model = Attending(layer())
    without_heads(model, tuple(inputs(model.attention)))
    x = inputs(model.attention)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.attention) is FewerHeads
        torch.testing.assert_close(copied(*x), model(*x))


def test_masks_that_stay_are_cut_along():
    model = Attending(zero_head(layer()))
    with torch.no_grad():
        model.attention.in_proj_weight[0, :3] = 0
    nonzero = lambda tensor, name: (tensor != 0).double()  # noqa: E731
    ps.sparsify(model, {"attention": ps.Prune(0.1, score=nonzero)})
    masked = copy.deepcopy(model)
    ps.sparsify(model, {"attention.in_proj_bias": ps.Fixed(model.attention.in_proj_bias != 0)})
    masked = copy.deepcopy(model)
    ps.shrink(model, tuple(inputs(model.attention)))
    assert isinstance(model.attention, FewerHeads)
    assert model.attention.num_heads == 3
    x = inputs(model.attention)
    torch.testing.assert_close(model(*x), masked(*x))


def test_a_plan_gives_a_fresh_model_fewer_heads():
    model = Attending(layer())
    example = tuple(inputs(model.attention))
    units = ps.coupled(model, example)
    ps.sparsify(model, units.rules(0.5))
    plan = ps.plan_shrink(model, example)
    ps.shrink(model, example)
    fresh = ps.shrink(Attending(layer(1)), ps.Shrinkage.from_json(plan.to_json()))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(*example), model(*example))


def test_what_has_been_done_can_be_undone():
    attention = layer()
    ps.sparsify(attention, 0.5)
    before, undo = type(attention), Undo()
    let_heads_go(attention, undo)
    assert isinstance(attention, FewerHeads)
    undo.run()
    assert type(attention) is before


def test_other_layers_stay_as_they_are():
    class Own(nn.MultiheadAttention):
        pass

    for other in (Own(4, 2), nn.Linear(2, 2)):
        kind, undo = type(other), Undo()
        let_heads_go(other, undo)
        assert type(other) is kind
        assert not undo.steps
