"""The recipes of the documentation prune a Llama as the original programs do.

The programs take the statistics of all layers of a block from one run of the dense block, on what
pruned blocks return.
"""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import parasparse as ps
from tests.oneshot import originals
from tests.oneshot.originals import PATTERNS


@pytest.fixture(scope="module")
def dense():
    """Queries share keys, and the last block of columns of an MLP is a short one."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=40, intermediate_size=168, num_hidden_layers=2, head_dim=8,
        num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


def batches(size):
    found = torch.randint(50, (4, 50), generator=torch.Generator().manual_seed(1))
    return found.split(size)


METHODS = {  # the original program, how many it drops, and the recipe
    "magnitude": (originals.magnitude, originals.share_of_magnitude, ps.Prune, {}),
    "wanda": (
        originals.wanda, originals.share_of_wanda,
        ps.OneShot, {"score": "wanda", "update": "none"}),
    "sparsegpt": (
        originals.sparsegpt, originals.share_of_sparsegpt,
        ps.OneShot, {"update": "obs", "scope": "tensor"}),
}  # fmt: skip


@torch.no_grad()
def as_the_original(model, inputs, prune, setting):
    for block in model.model.layers:
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        grams = dict.fromkeys(layers, 0.0)

        def add(name, grams, x):
            rows = x.flatten(0, -2).numpy()
            grams[name] = grams[name] + rows.T @ rows

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, n=name, g=grams: add(n, g, args[0]))
            for name, layer in layers.items()
        ]
        for ids in inputs:
            model(ids)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            found = prune(layer.weight.numpy(), grams[name], setting)
            layer.weight.copy_(torch.from_numpy(found))
    return model


CASES = [
    ("magnitude", 0.73), ("magnitude", "4:8"), ("wanda", 0.6), ("wanda", 0.73), ("wanda", "4:8"),
    ("sparsegpt", 0.5), ("sparsegpt", 0.6), ("sparsegpt", 0.73), ("sparsegpt", "1:4"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "setting"), CASES)
def test_a_recipe_gives_what_the_original_program_gives(dense, method, setting):
    program, share, treatment, arguments = METHODS[method]
    expected = as_the_original(copy.deepcopy(dense), batches(1), program, setting)
    model, size = copy.deepcopy(dense), 2 if setting in PATTERNS else 3
    if setting in PATTERNS:
        rules = treatment(pattern=ps.patterns.n_of_m(*PATTERNS[setting]), **arguments)
    else:
        weights = dict(model.model.layers.named_parameters(prefix="model.layers"))
        rules = {
            name: treatment(share(*p.shape, setting), **arguments)
            for name, p in weights.items()
            if p.ndim == 2
        }
    ps.prune_blocks(model, batches(size), rules)
    for name, mask in ps.named_masks(model):
        weight = expected.get_parameter(name)
        assert torch.equal(mask, weight != 0), name
        torch.testing.assert_close(ps.stored(model, name) * mask, weight, rtol=0, atol=1e-9)
