"""What a sparsity alone reaches: whatever multiplies activations, in forty architectures."""

import re

import pytest
import torch
import transformers
from torch import nn

import parasparse as ps

# Model type of transformers -> its tensors of two or more dimensions that stay dense, by the last
# two parts of their names without numbers. All others are reached.
STAYS_DENSE = {
    "aria": ["embed_tokens.weight", "multi_modal_projector.query", "position_embedding.weight",
             "router.weight"],
    "bart": ["embed_positions.weight", "shared.weight"],
    "bert": ["position_embeddings.weight", "token_type_embeddings.weight",
             "word_embeddings.weight"],
    "bloom": ["word_embeddings.weight"],
    "clip": ["position_embedding.weight", "token_embedding.weight"],
    "convnextv2": ["grn.bias", "grn.weight"],
    "deberta-v2": ["position_embeddings.weight", "word_embeddings.weight"],
    "deepseek_v3": ["embed_tokens.weight", "gate.weight"],
    "dinov2": ["embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"],
    "electra": ["position_embeddings.weight", "token_type_embeddings.weight",
                "word_embeddings.weight"],
    "falcon_mamba": ["embeddings.weight", "mixer.A_log"],
    "gemma3": ["embed_tokens.weight", "head.probe", "position_embedding.weight"],
    "glm4_moe": ["embed_tokens.weight", "gate.weight"],
    "gpt2": ["wpe.weight", "wte.weight"],
    "gpt_oss": ["embed_tokens.weight", "experts.down_proj_bias", "experts.gate_up_proj_bias",
                "router.weight"],
    "granitemoe": ["embed_tokens.weight", "router.weight"],
    "groupvit": ["embeddings.position_embeddings", "position_embedding.weight",
                 "stages.group_token", "token_embedding.weight"],
    "hubert": [],
    "ibert": ["position_embeddings.weight", "token_type_embeddings.weight",
              "word_embeddings.weight"],
    "idefics": ["embed_tokens.weight", "position_embedding.weight"],
    "jamba": ["embed_tokens.weight", "mamba.A_log", "router.weight"],
    "kosmos-2": ["embed_tokens.weight", "image_to_text_projection.latent_query",
                 "position_embedding.weight"],
    "led": ["embed_positions.weight", "shared.weight"],
    "llama": ["embed_tokens.weight"],
    "llama4": ["embed_tokens.weight", "router.weight", "vision_model.positional_embedding_vlm"],
    "mixtral": ["embed_tokens.weight", "gate.weight"],
    "olmoe": ["embed_tokens.weight", "gate.weight"],
    "opt": ["embed_positions.weight", "embed_tokens.weight"],
    "phimoe": ["embed_tokens.weight", "router.weight"],
    "qwen3_moe": ["embed_tokens.weight", "gate.weight"],
    "reformer": ["position_embeddings.weights", "word_embeddings.weight"],
    "rwkv": ["attention.time_mix_key", "attention.time_mix_receptance",
             "attention.time_mix_value", "embeddings.weight", "feed_forward.time_mix_key",
             "feed_forward.time_mix_receptance"],
    "segformer": [],
    "siglip": ["head.probe", "position_embedding.weight", "token_embedding.weight"],
    "swin": ["relative_position_bias.relative_position_bias_table"],
    "t5": ["relative_attention_bias.weight", "shared.weight"],
    "videomae": [],
    "vit": ["embeddings.cls_token", "embeddings.position_embeddings"],
    "wav2vec2": [],
    "whisper": ["embed_positions.weight", "embed_tokens.weight"],
    "xlnet": ["mask_emb", "rel_attn.r_r_bias", "rel_attn.r_s_bias", "rel_attn.r_w_bias",
              "rel_attn.seg_embed", "word_embedding.weight"],
    "zamba": ["embed_tokens.weight", "mamba.A_log", "mamba.D", "mamba.dt_proj_bias"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # transformers' own, of configurations
@pytest.mark.parametrize("kind", STAYS_DENSE)
def test_a_sparsity_alone_reaches_what_multiplies_activations(kind):
    if kind not in transformers.CONFIG_MAPPING or transformers.__version__ < "5.23":
        pytest.skip("the layers of this model are other ones in this version of transformers")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[kind]()).to("meta")
    reached = {row.name for row in ps.plan(model, 0.5)}
    weights = {name for name, tensor in model.named_parameters() if tensor.ndim > 1}
    weights = {re.sub(r"parametrizations\.(\w+)\.original\d*", r"\1", name) for name in weights}
    dense = {re.sub(r"\.\d+\b", "", name) for name in weights - reached}
    assert sorted({".".join(name.split(".")[-2:]) for name in dense}) == STAYS_DENSE[kind]


def module(name="Own", base=nn.Module, **shapes):
    made = type(name, (base,), {})()
    for attr, shape in shapes.items():
        made.register_parameter(attr, nn.Parameter(torch.randn(shape)))
    return made


def counted_table():
    table = module("Lookup", weight=(50, 8))
    table.num_embeddings = 50
    return table


REACHED = {
    "experts with gates": nn.ModuleDict({"experts": nn.ModuleDict({"gate": module(w=(8, 8))})}),
    "fused experts": module("Experts", gate_up_proj=(4, 16, 8), down_proj=(4, 8, 8)),
    "experts with biases": module("Experts", up=(4, 16, 8), up_bias=(4, 16)),
    "root of a graph convolution": module("RGCNConv", weight=(3, 8, 8), root=(8, 8)),
    "W": module("AntiSymmetricConv", W=(8, 8)),
    "spectral weights": module("DenseTensor", tensor=(8, 8, 5)),
    "letters": module("Attention", q=(8, 2, 4), k=(8, 2, 4), o=(8, 2, 4)),
    "a quantized weight": module("FP8Linear", weight=(8, 8), weight_scale_inv=(8, 1)),
    "old weight_norm": module("Conv", weight_g=(8, 1, 1), weight_v=(8, 4, 3)),
    "one row": nn.Linear(8, 1),
    "names that add to a weight": module(
        "Own", weight=(8, 8), weight_out=(5, 8), weight_mean=(8, 8)
    ),
    "low rank": module("LoRA", weight=(32, 32), weight_down=(4, 32), weight_up=(32, 4)),
    "query, key and value": module("Attention", query=(8, 8), key=(8, 8), value=(8, 8)),
    "a query by name": module("Attention", query_weight=(8, 8), key_weight=(8, 8)),
    "a projection": module("PatchEmbedding", weight=(8, 8), bias=(8,)),
    "a layer with a norm in its name": module("NormLinear", weight=(8, 8)),
    "two directions": nn.LSTM(4, 8, bidirectional=True),
    "a Linear called a norm": type("NormalizedLinearNorm", (nn.Linear,), {})(8, 8),
    "a Linear called an embedding": type("PatchEmbedding", (nn.Linear,), {})(8, 8),
    "a convolution called a norm": module("ConvBatchNorm", weight=(8, 4, 3, 3), bias=(8,)),
    "an own weight_norm": module("WeightNorm", weight_v=(8, 4), weight_g=(8, 1), bias=(8,)),
    "a modulation": module("AdaptiveNorm", weight=(16, 8), bias=(16,)),
    "a layer in a norm": module("HyperNorm", fc=(8, 8)),
    "a kernel in an embedding": module("InputEmbedding", kernel=(16, 8)),
    "attention scaled": module("ScaledDotAttention", w_query=(8, 8), w_key=(8, 8)),
    "query and key and value": module("CrossAttention", query_proj=(8, 8), kv_proj=(8, 16)),
    "feed-forward": module("PositionwiseFeedForward", w1=(16, 8), w2=(8, 16)),
    "projections of what is looked up": module(
        "EmbeddingProjection", emb_proj=(8, 16), position_proj=(8, 8), table_projection=(8, 4)
    ),
    "mixers": module("TokenMixer", token_mixing=(8, 8), channel_mixing=(8, 8)),
    "norm and convolution": module("GroupNormConv", weight=(8, 8, 3, 3)),
    "latent attention": module("MultiLatentAttention", latent_down=(4, 16), latent_up=(16, 4)),
    "means of random weights": module("BayesianLinear", w_mean=(8, 8), w_std=(8, 8)),
    "low rank by letters": module("LoRA", A=(2, 16), B=(16, 2)),
    "words without a line": module("Own", embedWeight=(8, 8), queryKernel=(8, 8)),
    "numbered": module("MLP", w=(32, 16), w_2=(16, 8)),
    "separable": module("Separable", kernel=(8, 8, 3, 3), kernel_pointwise=(8, 8)),
    "a shared expert": module("Experts", weight=(4, 8, 8), weight_shared=(8, 8)),
}
DENSE = {
    "norm": module("ComplexBatchNorm2d", weight=(2, 2, 8)),
    "gain": module("Response", weight=(1, 1, 1, 8)),
    "embedding": module("QuantEmbedding", weight=(50, 8)),
    "position": module("Encoder", pos_embed=(1, 16, 8)),
    "learned token": module("Encoder", query_tokens=(1, 16, 8)),
    "scale": module("Block", layer_scale=(8, 8)),
    "bias": module("Attention", rel_bias=(8, 8)),
    "embedding of torch": nn.Embedding(9, 8),
    "state space": module("Mixer", A=(1, 6), D=(1, 1)),
    "router": nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": module(w=(4, 8, 8))}),
    "router of several words": nn.ModuleDict(
        {
            "gates": nn.ModuleList([nn.ModuleDict({"wg": nn.Linear(8, 4)})]),
            "shared_expert_gate": nn.Linear(8, 1),
            "gating_network": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),
            "experts": module(w=(4, 8, 8)),
        }
    ),
    "embedding of bags": module("QuotientEmbeddingBag", weight_q=(50, 8), weight_r=(9, 8)),
    "embedding by its size": counted_table(),
    "bias of pairs": module("Attention", attention_biases=(4, 49)),
    "scale of splines": module("KANLinear", spline_scaler=(8, 8)),
}
# Dense beside them.
ALSO = {"up_bias", "weight_scale_inv", "weight_g", "bias", "bias_ih_l0", "bias_hh_l0",
        "bias_ih_l0_reverse", "bias_hh_l0_reverse"}  # fmt: skip


@pytest.mark.parametrize("kind", REACHED)
def test_weights_of_any_name_are_reached(kind):
    names = {name for name, _ in REACHED[kind].named_parameters()}
    assert {row.name for row in ps.plan(REACHED[kind], 0.5)} == names - ALSO


@pytest.mark.parametrize("kind", DENSE)
def test_what_is_no_weight_stays_dense_and_the_table_says_why(kind):
    model = nn.ModuleDict({"layer": DENSE[kind], "fc": nn.Linear(8, 8)})
    plan = ps.plan(model, 0.5)
    assert {row.name for row in plan} - {"layer.experts.w"} == {"fc.weight"}
    reasons = {row.reason for row in plan.dense}
    reason = kind.partition(" of ")[0].removesuffix(" by its size")
    assert reasons == {reason}
    assert ps.summary(ps.sparsify(model, 0.5)).dense == plan.dense
    assert f"({reason})" in str(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_norms_of_complex_numbers_with_a_bias_stay_dense(dtype):
    norm = module("LayerNorm", weight=(8, 2, 2))  # a covariance for each channel
    norm.bias = nn.Parameter(torch.zeros(8, dtype=dtype))
    plan = ps.plan(nn.ModuleDict({"layer": norm, "fc": nn.Linear(8, 8)}), 0.5)
    assert [row.name for row in plan] == ["fc.weight"]
    assert {row.reason for row in plan.dense} == {"norm"}


def test_the_last_word_of_a_name_says_what_it_is():
    model = module(
        "Own", scale_proj=(8, 8), proj_scale=(8, 8), bias_kernel=(8, 8), down_bias=(8, 8)
    )
    plan = ps.plan(model, 0.5)
    assert [row.name for row in plan] == ["scale_proj", "bias_kernel"]
    assert [(row.name, row.reason) for row in plan.dense] == [
        ("proj_scale", "scale"), ("down_bias", "bias"),
    ]  # fmt: skip


def test_a_model_of_which_nothing_is_reached_says_why():
    model = module("ConvNorm", weight=(8, 8))
    with pytest.raises(ValueError, match=r'which it leaves dense: "weight \(norm\)"'):
        ps.sparsify(model, 0.5)


def test_scales_are_reached_by_their_exact_name_only():
    layer = REACHED["a quantized weight"]
    for rules in ({"*": 0.5}, {re.compile(".*"): 0.5}, {nn.Module: 0.5}):
        assert [row.name for row in ps.plan(layer, rules)] == ["weight"]
    assert [row.name for row in ps.plan(layer, {"weight_scale_inv": 0.5})] == ["weight_scale_inv"]


def test_weights_that_are_missed_are_told_of():
    model = nn.ModuleDict({"flat": module(weight=(64,)), "fc": nn.Linear(8, 8, bias=False)})
    with pytest.warns(UserWarning, match=r'leaves "flat.weight" dense'):
        ps.sparsify(model, 0.5)
    assert [(row.name, row.reason) for row in ps.summary(model).dense] == [
        ("flat.weight", "one dimension")
    ]
    ps.sparsify(model, {"fc": 0.5, "flat.weight": None})  # says so itself: no warning
    ps.sparsify(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), 0.5)


def test_groups_of_a_stack_of_matrices_need_a_dimension():
    experts = REACHED["fused experts"]
    with pytest.raises(ValueError, match="stack of matrices"):
        ps.plan(experts, ps.Prune(pattern=ps.patterns.n_of_m(2, 4)))
    rows = ps.plan(experts, ps.Prune(pattern=ps.patterns.n_of_m(2, 4, dim=-1)))
    assert [row.kept for row in rows] == [256, 128]
    ps.plan(nn.Conv1d(8, 4, 3), ps.Prune(pattern=ps.patterns.n_of_m(2, 4)))
