#!/usr/bin/env bash
# model-compression-toolkit 2.6.1, torch 2.15.0: post-training quantization of a model with
# weight_norm gives a model with random weights, without an error.
#
# The modules are built anew from their class and get the tensors of their own state by the names of
# a plain layer. A layer with a parametrization has none of these names, and keeps the weights that
# its constructor drew: two runs on one model differ. Remove parametrizations before.
#
# Seen (the largest difference to the outputs before, which are at most 0.43; the digits of the
# parametrized model change from run to run):
#   plain 0.01 0.01
#   weight_norm 0.46 0.42
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 model-compression-toolkit==2.6.1
cat > program.py <<'PROGRAM'
import model_compression_toolkit as mct
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def data():
    for _ in range(4):
        yield [torch.randn(16, 256)]


for name, around in {"plain": lambda layer: layer, "weight_norm": weight_norm}.items():
    torch.manual_seed(0)
    layers = nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    model = nn.Sequential(*layers).eval()
    around(model[0]), around(model[2])
    x = torch.randn(16, 256)
    expected = model(x).detach()
    differences = []
    for _ in range(2):
        quantized, _ = mct.ptq.pytorch_post_training_quantization(model, data)
        differences.append(float((quantized(x).detach().cpu() - expected).abs().max()))
    print(name, *(f"{difference:.2f}" for difference in differences))
    print("far" if min(differences) > 0.2 else "near")
PROGRAM
shown=$(CUDA_VISIBLE_DEVICES= env/bin/python -W ignore program.py 2>/dev/null | grep -E '^(plain|weight_norm|far|near)')
printf '%s\n' "$shown"
case "$shown" in plain*near*weight_norm*far) ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
