"""RMSNorms whose channels go: the weight and the eps make up for it."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps

EPS = 0.1  # large, so that an eps that stays as it was is seen


class Norm(nn.Module):
    """x * f(mean(x * x) + eps) * (shift + weight)."""

    def __init__(self, width, shift=0.0):
        super().__init__()
        self.eps, self.shift = EPS, shift
        self.weight = nn.Parameter(torch.ones(width))

    def gain(self):
        return self.shift + self.weight if self.shift else self.weight


class Llama(Norm):
    def forward(self, x):
        variance = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


class Gemma(Norm):
    def __init__(self, width):
        super().__init__(width, 1.0)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.gain()


class Power(Norm):
    def forward(self, x):
        return x * torch.pow(self.eps + x.square().mean(-1, keepdim=True), -0.5) * self.weight


class Quotient(Norm):
    def forward(self, x):
        return self.weight * (x / (x * x).mean(-1, keepdim=True).add_(self.eps).sqrt_())


class RootFirst(Norm):
    """The eps is added to the root."""

    def forward(self, x):
        return (x / ((x**2).mean(-1).sqrt().unsqueeze(-1) + self.eps)) * self.weight


class WeightFirst(Norm):
    def forward(self, x):
        return x * (self.weight * torch.rsqrt(x.pow(2).mean(-1, True) + self.eps))


class Response(Norm):
    """As the global response norm of ConvNeXt V2."""

    def forward(self, x):
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x + self.weight * (x * (size / (size.mean(-1, keepdim=True) + self.eps)))


EXACT = {
    "nn.RMSNorm": lambda width: nn.RMSNorm(width, eps=EPS),
    "without eps": nn.RMSNorm,
    **{kind.__name__: kind
       for kind in (Llama, Gemma, Power, Quotient, RootFirst, WeightFirst, Response)},
}  # fmt: skip


class Stream(nn.Module):
    """A residual stream between an embedding and a head, which may be tied to it."""

    def __init__(self, norm, *, tied=False, width=12):
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.first, self.last = norm(width), norm(width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        self.head = nn.Linear(width, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.down(self.up(self.first(x)).relu())
        return self.head(self.last(x))


def tokens(batch=2, length=5):
    return torch.randint(9, (batch, length))


def filled(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.double().eval()


def pruned(model, example):
    units = ps.coupled(model, example)
    return ps.sparsify(model, units.rules(0.5)), units


def computed(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def assert_same(model, other, inputs, rtol=1e-12):
    want = computed(other, inputs)
    error = (computed(model, inputs) - want).abs().max() / want.abs().max()
    assert float(error) < rtol


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_the_width_of_a_residual_stream_goes(name, tied):
    model, _ = pruned(filled(Stream(EXACT[name], tied=tied)), tokens())
    masked = ps.squash(copy.deepcopy(model))
    plan = ps.plan_shrink(model, tokens())
    ps.shrink(model, tokens())
    assert model.embedding.weight.shape == (9, 6)
    assert model.first.weight.shape == (6,)
    assert_same(model, masked, tokens(3, 7))
    assert not ps.plan_shrink(model, tokens()).rows
    assert plan.kept_back == ()

    fresh = filled(Stream(EXACT[name], tied=tied), seed=1)
    ps.shrink(fresh, ps.Shrinkage.from_json(plan.to_json()))
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh, model, tokens(), rtol=1e-15)

    ps.unshrink(model, plan)
    assert {n: t.shape for n, t in masked.state_dict().items()} == {
        n: t.shape for n, t in ps.squash(copy.deepcopy(model)).state_dict().items()
    }
    assert model.first.eps == masked.first.eps
    assert_same(model, masked, tokens(3, 7))


def test_a_plan_shows_what_is_rescaled_and_survives_json():
    model, _ = pruned(filled(Stream(Gemma)), tokens())
    plan = ps.plan_shrink(model, tokens())
    assert "(first.weight + 1): times 1.41421" in str(plan)
    assert f"first.eps: {EPS} -> {2 * EPS}" in str(plan)
    assert ps.Shrinkage.from_json(plan.to_json()) == plan


class Changed(Llama):
    """A norm in which something else reads the mean, the weight or the eps."""

    def __init__(self, width, change):
        super().__init__(width)
        self.change, self.other = change, nn.Parameter(torch.ones(width))

    def forward(self, x):
        epsilon = 2 * self.eps if self.change == "eps is computed" else self.eps
        if self.change == "eps is a constant":
            epsilon = EPS
        variance = x.pow(2).mean(-1, keepdim=True)
        normed = x * torch.rsqrt(variance + epsilon)
        out = normed * self.weight
        match self.change:
            case "weight is read elsewhere":
                return out + self.weight
            case "weight is used by another power":
                return out + x * variance * self.weight
            case "weight is changed":
                return normed * self.weight.abs()
            case "eps is read elsewhere":
                return out + torch.add(x, 0.0, alpha=1) * torch.full_like(x, self.eps)
            case "eps is a number elsewhere":
                return out * (1 + self.eps)
            case "mean is read elsewhere":
                return out + variance
            case "half of it has no weight":
                return out + normed
            case "mean is not the whole":
                return out * self.weight[:1]
        return out


STAYS = {
    "nn.LayerNorm": nn.LayerNorm,
    "no weight": lambda width: nn.RMSNorm(width, eps=EPS, elementwise_affine=False),
    **{change: lambda width, change=change: Changed(width, change) for change in (
        "eps is computed", "eps is a constant", "weight is read elsewhere",
        "weight is used by another power", "weight is changed", "eps is read elsewhere",
        "eps is a number elsewhere", "mean is read elsewhere", "half of it has no weight",
        "mean is not the whole")},
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_made_up_for_stays(name):
    model = filled(Stream(STAYS[name]))
    _, units = pruned(model, tokens())
    assert not units.reaches("embedding.weight", model.embedding, model.embedding.weight)
    alone = filled(Stream(STAYS[name]))
    kept = torch.arange(12) < 6
    masks = {n: kept.expand(p.shape) for n, p in alone.named_parameters() if p.shape[-1] == 12}
    masks["down.weight"] = kept.unsqueeze(1).expand(12, 10)
    ps.sparsify(alone, masks)
    (reason, *_) = {r.reason for r in ps.plan_shrink(alone, tokens()).kept_back
                    if r.name == "embedding.weight"}  # fmt: skip
    assert reason
    masked = ps.squash(copy.deepcopy(model))
    assert_same(ps.shrink(model, tokens()), masked, tokens(3, 7))  # the inner width goes


def test_dead_channels_that_stay_for_the_size_count_in_the_mean():
    model, _ = pruned(filled(Stream(Gemma, width=14)), tokens())
    masked = ps.squash(copy.deepcopy(model))
    ps.shrink(model, tokens(), multiple_of=4)
    assert model.embedding.embedding_dim == 8  # 7 are not dropped
    assert_same(model, masked, tokens(3, 7))


def test_removed_channels_come_back_with_the_values_of_the_dense_checkpoint():
    dense = filled(Stream(Gemma))
    model, _ = pruned(copy.deepcopy(dense), tokens())
    plan = ps.plan_shrink(model, tokens())
    ps.shrink(model, tokens())
    ps.unshrink(model, plan, dense.state_dict())
    assert_same(model, dense, tokens(3, 7))


class Shared(nn.Module):
    """Norms that share things, over the widths 12 and 8."""

    def __init__(self, how):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 12), nn.Linear(12, 5)
        self.middle, self.back = nn.Linear(12, 8), nn.Linear(8, 12)
        self.first, self.last, self.inner = Llama(12), Llama(12), Llama(8)
        if how == "module":
            self.last = self.first
        elif how == "weight":
            self.last.weight = self.first.weight
        self.how, self.eps = how, EPS

    def norm(self, norm, x):
        if self.how != "eps":
            return norm(x)
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.back(self.norm(self.inner, self.middle(self.norm(self.first, x))))
        return self.head(self.norm(self.last, x))


@pytest.mark.parametrize("how", ["module", "weight", "nothing"])
def test_norms_of_one_width_may_share_a_weight(how):
    model, _ = pruned(filled(Shared(how)), tokens())
    masked = ps.squash(copy.deepcopy(model))
    assert_same(ps.shrink(model, tokens()), masked, tokens(3, 7))
    assert model.embedding.embedding_dim == 6
    assert model.middle.out_features == 4


def test_norms_of_two_widths_that_share_an_eps_stay():
    model = filled(Shared("eps"))
    assert not ps.coupled(model, tokens()).jointly({}, 0.5)
    with torch.no_grad():
        for each in (model.embedding.weight.T, model.back.weight, model.back.bias):
            each[6:] = 0
    plan = ps.plan_shrink(model, tokens())
    assert not plan.rows
    assert "takes a mean" in plan.kept_back[0].reason


def test_channels_that_are_not_zero_stay():
    model = filled(Stream(Llama))
    kept = torch.arange(12) < 6
    masks = {"embedding.weight": kept.expand(9, 12), "head.weight": kept.expand(9, 12)}
    masks["down.weight"] = kept.unsqueeze(1).expand(12, 10)  # but not its bias
    ps.sparsify(model, masks | {"first.weight": kept, "last.weight": kept})
    plan = ps.plan_shrink(model, tokens())
    assert not plan.rows
    assert '"last" takes a mean over it' in {row.reason for row in plan.kept_back}
    inexact = ps.plan_shrink(model, tokens(), exact=False)
    assert inexact.inexact == ("last",)


@pytest.mark.parametrize("kind", [Llama, Gemma])
def test_masks_of_a_norm_that_drop_more(kind):
    """1 + 0 is not 0: it would have to change where the mask holds it."""
    model, _ = pruned(filled(Stream(kind)), tokens())
    mask = model.first.parametrizations.weight[0].mask.clone()
    mask[mask.nonzero()[0]] = False
    model = ps.squash(model)
    ps.sparsify(model, {"first.weight": mask, "up.weight": model.up.weight != 0,
                        "embedding.weight": model.embedding.weight != 0,
                        "down.weight": model.down.weight != 0, "down.bias": model.down.bias != 0,
                        "last.weight": model.last.weight != 0,
                        "head.weight": model.head.weight != 0})  # fmt: skip
    masked = ps.squash(copy.deepcopy(model))
    ps.shrink(model, tokens())
    assert model.embedding.embedding_dim == (6 if kind is Llama else 12)
    assert_same(model, masked, tokens(3, 7))


def test_gradients_and_copies_of_the_weight_are_rescaled():
    model, _ = pruned(filled(Stream(Llama)), tokens())
    model(tokens()).sum().backward()
    weight = model.first.parametrizations.weight.original
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    optimizer.step()
    optimizer.state[weight]["z"] = weight.detach().clone()
    plan, kept = ps.plan_shrink(model, tokens()), model.first.weight.detach() != 0
    value, grad = weight.detach()[kept], weight.grad[kept]
    momentum = optimizer.state[weight]["momentum_buffer"][kept]
    ps.shrink(model, tokens(), optimizer=optimizer)
    root = 2**0.5
    for got, want in (
        (model.first.weight, value * root),
        (model.first.weight.grad, grad / root),
        (optimizer.state[weight]["z"], value * root),
        (optimizer.state[weight]["momentum_buffer"], momentum),
    ):
        torch.testing.assert_close(got.detach(), want)
    ps.unshrink(model, plan, optimizer=optimizer)
    torch.testing.assert_close(optimizer.state[weight]["z"][kept], value)
    torch.testing.assert_close(weight.grad[kept], grad)


def test_an_rms_norm_may_be_one_operation(monkeypatch):
    """As it is on a GPU."""

    def fused(x, shape, weight, eps):
        return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]

    monkeypatch.setattr(torch, "rms_norm", fused)
    model, _ = pruned(filled(Stream(EXACT["nn.RMSNorm"])), tokens())
    masked = ps.squash(copy.deepcopy(model))
    assert_same(ps.shrink(model, tokens()), masked, tokens(3, 7))
    assert model.embedding.embedding_dim == 6
    assert model.first.eps == 2 * EPS


class Logits(nn.Module):
    """T5 also returns what its encoder computes, whose width would then stay."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens, decoder_input_ids=tokens).logits


class Causal(Logits):
    def forward(self, tokens):
        return self.model(input_ids=tokens).logits


TRANSFORMERS = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Olmo2": {},
}


def language_model(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "pad_token_id": 0}
    if name == "T5":
        config = transformers.T5Config(
            **sizes, d_model=16, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
            layer_norm_epsilon=EPS, decoder_start_token_id=0,
        )  # fmt: skip
        return Logits(transformers.T5ForConditionalGeneration(config))
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(
        **sizes, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=EPS, attn_implementation="eager", **TRANSFORMERS[name],
    )  # fmt: skip
    return Causal(getattr(transformers, f"{kind}ForCausalLM")(config))


@pytest.mark.parametrize("name", [*TRANSFORMERS, "T5"])
def test_the_width_of_a_language_model_goes(name, monkeypatch):
    model, _ = pruned(filled(language_model(name)), tokens())
    masked = ps.squash(copy.deepcopy(model))
    plan = ps.plan_shrink(model, tokens())
    ps.shrink(model, tokens())
    assert model.model.get_input_embeddings().weight.shape == (9, 8)
    assert not ps.plan_shrink(model, tokens()).rows
    fresh = ps.shrink(filled(language_model(name)), plan)
    fresh.load_state_dict(model.state_dict())
    # These models compute a part in float32 on purpose.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert_same(model, masked, tokens(3, 7))
    assert_same(fresh, masked, tokens(3, 7))
    assert_same(ps.unshrink(model, plan), masked, tokens(3, 7))
