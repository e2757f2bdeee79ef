"""What the files beside this one hold, and how compressed-tensors 0.13.0 has written them.

pip install compressed-tensors==0.13.0
python -m tests.files.compressed_tensors.contents
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent


def every(step, *shape, dtype=torch.float32):
    """Return a tensor that keeps one entry of `step`."""
    numbers = torch.arange(torch.Size(shape).numel())
    values = torch.where(numbers % step == 1, numbers - 7.5, 0.0)
    return values.view(shape).to(dtype)


def unstructured():
    """Return weights of several dtypes and shapes, and a bias."""
    weight = every(5, 6, 11)
    weight[2], weight[5, 3] = 0, torch.nan  # an empty row, a special value
    return {
        "a.weight": weight,
        "a.bias": torch.arange(6.0),
        "b.half.weight": every(3, 4, 16, dtype=torch.float16),
        "b.conv.weight": every(7, 4, 2, 3, 3, dtype=torch.bfloat16),
        "b.norm.weight": torch.ones(5),
        "b.zero.weight": torch.zeros(2, 3),
        "b.wide.weight": every(2, 2, 8, dtype=torch.float64),
    }


def two_of_four():
    """Return weights with at most two of four entries, some with fewer."""
    kept = torch.tensor([True, True, False, False, False, True, False, True])

    def half(*shape, dtype):
        values = torch.arange(1.0, 1 + torch.Size(shape).numel())
        return torch.where(kept.repeat(values.numel() // 8), values, 0.0).view(shape).to(dtype)

    fewer = half(4, 16, dtype=torch.float32)
    fewer[1] = 0
    return {
        "a.weight": fewer,
        "a.bias": torch.arange(4.0),
        "b.weight": half(8, 8, dtype=torch.bfloat16),
        "c.weight": half(4, 6, dtype=torch.float16),
    }


def quantized():
    """Return weights in int8 and float8 with their scales, as they are quantized before."""
    weight = every(4, 4, 8)
    return {
        "a.weight": weight.to(torch.int8),
        "a.weight_scale": torch.ones(4, 1),
        "b.weight": weight.to(torch.float8_e4m3fn),
        "b.weight_scale": torch.ones(4, 1),
    }


def llama():
    """Return a Llama of 1,800 parameters, pruned."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        step = 4 if parameter.ndim == 2 else 1
        kept = every(step, *parameter.shape) if step > 1 else torch.ones(parameter.shape)
        parameter.data.copy_(kept / 64)
    return model


def write():
    """Write the files."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.sparse_compressors import (
        BitmaskCompressor,
        Sparse24BitMaskCompressor,
    )
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig

    bitmask = BitmaskCompressor(BitmaskConfig())
    save_file(bitmask.compress(unstructured()), FOLDER / "bitmask.safetensors")
    save_file(bitmask.compress(quantized()), FOLDER / "quantized.safetensors")
    half = Sparse24BitMaskCompressor(Sparse24BitMaskConfig())
    save_file(half.compress(two_of_four()), FOLDER / "two_of_four.safetensors")

    model, config = llama(), BitmaskConfig(targets=["Linear"], ignore=["lm_head"])
    compressor = ModelCompressor(sparsity_config=config)
    state = compressor.compress(model)
    model.save_pretrained(FOLDER / "llama", state_dict=state, max_shard_size=700)
    compressor.update_config(FOLDER / "llama")


if __name__ == "__main__":
    write()
