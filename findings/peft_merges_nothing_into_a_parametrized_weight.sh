#!/usr/bin/env bash
# peft 0.21.2, torch 2.15.0: merge_and_unload loses a LoRA adapter whose layer has a parametrization,
# such as weight_norm, without an error. safe_merge=True does not notice it either.
#
# It writes the sum into base_layer.weight.data. A parametrized weight is computed whenever it is
# read, so the sum goes into a tensor that nobody keeps. The merged model is the one from before
# fine-tuning. Assign to base_layer.weight instead (the sum of it and get_delta_weight), or remove
# the parametrization before the adapter is added.
#
# Seen (largest difference of the merged model's outputs):
#   plain: to the adapted model 0.00, to the model without its adapter 0.44
#   weight_norm: to the adapted model 0.44, to the model without its adapter 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0
cat > program.py <<'PROGRAM'
import collections

import peft
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

for name, around in {"plain": lambda layer: layer, "weight_norm": weight_norm}.items():
    torch.manual_seed(0)
    layers = {"first": around(nn.Linear(16, 16)), "act": nn.ReLU(), "last": nn.Linear(16, 4)}
    base = nn.Sequential(collections.OrderedDict(layers))
    config = peft.LoraConfig(target_modules=["first"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    x = torch.randn(8, 16)
    with torch.no_grad():
        adapted = model(x)
        with model.disable_adapter():
            before = model(x)
        merged = model.merge_and_unload(safe_merge=True)(x)
    far = [float((merged - other).abs().max()) for other in (adapted, before)]
    print(f"{name}: to the adapted model {far[0]:.2f}, to the model without its adapter {far[1]:.2f}")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in "plain: to the adapted model 0.00,"*"weight_norm: "*" adapter 0.00") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
