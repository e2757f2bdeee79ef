"""`prune_blocks` on models of transformers, and against the original SparseGPT and Wanda."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import parasparse as ps
from parasparse.oneshot.finding_blocks import blocks_of
from tests.oneshot.block_models import Wanda, assert_same, is_linear_in, plainly
from tests.oneshot.originals import share_of_sparsegpt

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, on tiny configs

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 24, "pad_token_id": 0,
}  # fmt: skip
D_MODEL = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip


def ids(names="input_ids"):
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(3, 40, (3, 2, 12), generator=generator)
    return [dict.fromkeys(names.split(), batch) for batch in found]


def floats(name, *shape):
    found = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    return [{name: batch} for batch in found]


def whisper():
    config = tf.WhisperConfig(
        **D_MODEL, vocab_size=40, num_mel_bins=8, max_source_positions=10, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    sounds = floats("input_features", 1, 8, 20)
    return tf.WhisperModel(config), [
        {**sound, "decoder_input_ids": batch["input_ids"][:1]}
        for sound, batch in zip(sounds, ids(), strict=False)
    ]


FAMILIES = {
    "llama": lambda: (tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), ids()),
    "gpt2": lambda: (
        tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), ids()),
    "opt": lambda: (
        tf.OPTForCausalLM(tf.OPTConfig(**{**SMALL, "word_embed_proj_dim": 16, "ffn_dim": 32})),
        ids()),
    "bert": lambda: (tf.BertForMaskedLM(tf.BertConfig(**SMALL)), ids()),
    "t5": lambda: (
        tf.T5ForConditionalGeneration(tf.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
        ids("input_ids decoder_input_ids")),
    "vit": lambda: (
        tf.ViTModel(tf.ViTConfig(**SMALL, image_size=16, patch_size=8)),
        floats("pixel_values", 2, 3, 16, 16)),
    "whisper": whisper,
    "mixtral": lambda: (
        tf.MixtralForCausalLM(tf.MixtralConfig(
            **SMALL, num_key_value_heads=1, num_local_experts=4, sliding_window=None)),
        ids()),
    "gemma3": lambda: (  # two masks in turn, of which each block gets one
        tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(
            **{**SMALL, "num_hidden_layers": 3}, head_dim=8, num_key_value_heads=1,
            sliding_window=4, sliding_window_pattern=2)),
        ids()),
    "albert": lambda: (  # one block, called again and again
        tf.AlbertModel(tf.AlbertConfig(**SMALL, embedding_size=8)), ids()),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_runs_of_the_whole_model(family):
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    expected = plainly(copy.deepcopy(model).eval(), inputs, Wanda(0.5), blocks_of(model, None))
    ps.prune_blocks(model, inputs, {lambda *tensor: is_linear_in("", *tensor): Wanda(0.5)})
    assert_same(model, expected)
    with torch.no_grad():
        model.eval()(**inputs[0])


MOE = {**SMALL, "num_key_value_heads": 1, "num_local_experts": 4}
EXPERTS = {
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, sliding_window=None)), False),
    "qwen3 moe": (
        lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(
            **SMALL, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=8)),
        False),
    "gpt-oss": (
        lambda: tf.GptOssForCausalLM(tf.GptOssConfig(
            **MOE, head_dim=8, num_experts_per_tok=2, sliding_window=8)),
        True),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_pruned_from_the_tokens_that_each_saw(name, implementation):
    torch.manual_seed(0)
    build, is_transposed = EXPERTS[name]
    model, inputs = build().eval(), ids()
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("this version of transformers has one implementation of experts")
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    experts, met = model.model.layers[0].mlp.experts, []
    hook = experts.register_forward_pre_hook(
        lambda _, args, kwargs: met.append((*args, *kwargs.values())[:2]), with_kwargs=True
    )
    with torch.no_grad(), ps.scores.collect(model, "*.experts", grams=True) as statistics:
        for batch in inputs:
            model(**batch)
    hook.remove()
    weight = "model.layers.0.mlp.experts.gate_up_proj"
    for expert in range(4):
        rows = [x.reshape(-1, 16)[(chosen == expert).any(-1).flatten()] for x, chosen in met]
        x = torch.cat(rows).double()
        torch.testing.assert_close(statistics.gram(weight)[expert], x.T @ x, rtol=1e-4, atol=1e-6)
    assert statistics.layout(weight).is_transposed == is_transposed
    reports = []
    ps.prune_blocks(model, inputs, ps.OneShot(0.5), progress=reports.append)
    assert not any(report.by_magnitude for report in reports)
    stacks = {n: mask for n, mask in ps.named_masks(model) if "experts" in n}
    assert len(stacks) == 4
    for mask in stacks.values():
        inputs_last = mask.mT if is_transposed else mask
        assert (inputs_last.sum(-1) == inputs_last.shape[-1] // 2).all()


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_half_precision_gives_nearly_the_same(family, way):
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    half = copy.deepcopy(model).to(torch.bfloat16 if way == "bfloat16" else torch.float32)
    found = []
    for each in (model, half):
        reports = []
        with torch.autocast("cpu", torch.bfloat16, enabled=each is half and way == "autocast"):
            ps.prune_blocks(each, inputs, ps.OneShot(0.5), progress=reports.append)
        assert not any(report.by_magnitude for report in reports)
        found.append([row for report in reports for row in report.rows])
    for one, two in zip(*found, strict=True):
        assert (one.name, one.samples) == (two.name, two.samples)
        assert one.error == pytest.approx(two.error, rel=0.2)


def original(name):
    """Return a Llama, its tokens, and what the original programs made of it."""
    data = np.load(Path(__file__).parent / "originals_llama.npz")
    config = json.loads(str(data["config"]))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**config, pad_token_id=0))
    dense = {n[6:]: torch.from_numpy(data[n]) for n in data.files if n.startswith("dense.")}
    model.load_state_dict(dense)
    found = {n.removeprefix(f"{name}."): data[n] for n in data.files if n.startswith(f"{name}.")}
    return model, torch.from_numpy(data["ids"]).split(1), found


TWO_OF_FOUR = ps.patterns.n_of_m(2, 4)
RECIPES = {
    "magnitude_2of4": lambda _: ps.Prune(pattern=TWO_OF_FOUR),
    "wanda_50": lambda _: ps.OneShot(0.5, score="wanda", update="none"),
    "wanda_2of4": lambda _: ps.OneShot(score="wanda", update="none", pattern=TWO_OF_FOUR),
    "sparsegpt_50": lambda weight: ps.OneShot(
        share_of_sparsegpt(*weight.shape, 0.5), update="obs", scope="tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_masks_are_those_of_the_original_programs(name):
    model, batches, bits = original(name)
    rules = {weight: RECIPES[name](model.get_parameter(weight)) for weight in bits}
    ps.prune_blocks(model, batches, rules)
    masks = dict(ps.named_masks(model))
    assert masks.keys() == bits.keys()
    for weight, mask in masks.items():
        expected = np.unpackbits(bits[weight])[: mask.numel()].reshape(mask.shape)
        assert np.array_equal(mask, expected), weight


def test_weights_are_those_of_the_original_sparsegpt():
    model, batches, weights = original("sparsegpt_2of4")
    rows = []
    rule = ps.OneShot(pattern=TWO_OF_FOUR, update="obs", history=rows)
    ps.prune_blocks(model, batches, rule)
    assert len(rows) == len(weights) == 14
    for name, mask in ps.named_masks(model):
        expected = torch.from_numpy(weights[name])
        assert torch.equal(mask, expected != 0), name
        torch.testing.assert_close(ps.stored(model, name), expected, rtol=0, atol=1e-5)
