#!/usr/bin/env bash
# transformers 5.24.0, compressed-tensors 0.20.1, torch 2.15.0: a checkpoint that compressed-tensors
# 0.13.0 has written in its format sparse-bitmask loads as random weights.
#
# The newer compressed-tensors has no reader for the format and ignores sparsity_config in
# config.json. from_pretrained does not raise: each layer starts anew, and only the report of
# missing and unexpected keys says so.
#
# Seen: two loads of one checkpoint that differ from each other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 transformers==5.24.0 accelerate==1.15.0 compressed-tensors==0.13.0
cat > write.py <<'PROGRAM'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config)
for parameter in model.parameters():
    parameter.data.fill_(1.0)
compressor = ModelCompressor(sparsity_config=BitmaskConfig(targets=["Linear"], ignore=["lm_head"]))
model.save_pretrained("sparse", state_dict=compressor.compress(model))
compressor.update_config("sparse")
PROGRAM
cat > read.py <<'PROGRAM'
from transformers import LlamaForCausalLM

one, two = (LlamaForCausalLM.from_pretrained("sparse").model.layers[0] for _ in range(2))
equal = bool((one.mlp.up_proj.weight == two.mlp.up_proj.weight).all())
print(f"loaded without an error; both loads the same: {equal}")
PROGRAM
env/bin/python -W ignore write.py 2>/dev/null
env/bin/uv pip install --quiet --python env/bin/python compressed-tensors==0.20.1
shown=$(env/bin/python -W ignore read.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in *"both loads the same: False"*) ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
