#!/usr/bin/env bash
# nncf 3.4.0, torch 2.15.0: compress_weights raises NotImplementedError for a model that is an
# nn.Sequential itself.
#
# nncf registers the module that holds its hooks as a child of the model, and nn.Sequential runs all
# its children in turn, this one too, which has no forward. The same Sequential inside another
# module is quantized.
#
# Seen:
#   Sequential NotImplementedError: Module [HookStorage] is missing the required "forward" function
#   Wrapped torch.int8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 nncf==3.4.0
cat > program.py <<'PROGRAM'
import nncf
import torch
from torch import nn


class Wrapped(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


x = torch.randn(4, 256)
data = nncf.Dataset([x])
for around in (lambda body: body, Wrapped):
    model = around(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))).eval()
    name = type(model).__name__
    try:
        mode = nncf.CompressWeightsMode.INT8_SYM
        quantized = nncf.compress_weights(model, mode=mode, dataset=data)
        print(name, quantized.body[0].weight.dtype)
    except NotImplementedError as error:
        print(f"{name} NotImplementedError: {error}")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null | grep -E '^(Sequential|Wrapped) ')
printf '%s\n' "$shown"
case "$shown" in *'Sequential NotImplementedError: Module [HookStorage]'*'Wrapped torch.int8') ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
