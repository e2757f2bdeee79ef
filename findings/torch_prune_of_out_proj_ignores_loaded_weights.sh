#!/usr/bin/env bash
# torch 2.15.0: an nn.MultiheadAttention whose out_proj is pruned with torch.nn.utils.prune ignores
# the output projection that load_state_dict loads, although all keys match.
#
# prune computes the weight in a hook that runs when the layer is called. Attention reads
# out_proj.weight, but never calls out_proj, so the weight stays what it was when prune was called.
# In a model that was built to load a checkpoint, this is a random matrix. Layers that hold such an
# attention, as nn.TransformerEncoderLayer does, are wrong too. prune.remove(layer.out_proj,
# "weight") after loading computes the weight.
#
# Seen (largest difference to the model that was saved, after loading):
#   in_proj_weight <All keys matched successfully> 0.00 near
#   out_proj.weight <All keys matched successfully> 0.75 far
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 numpy==2.4.6
cat > program.py <<'PROGRAM'
import torch
from torch import nn
from torch.nn.utils import prune

torch.manual_seed(0)
x = torch.randn(2, 5, 16)
for name in ("in_proj_weight", "out_proj.weight"):
    path, _, tensor = name.rpartition(".")
    saved, fresh = (nn.MultiheadAttention(16, 2, batch_first=True).eval() for _ in range(2))
    prune.l1_unstructured(saved.get_submodule(path), tensor, 0.5)
    prune.identity(fresh.get_submodule(path), tensor)  # the names of a pruned weight
    message = fresh.load_state_dict(saved.state_dict())
    with torch.no_grad():
        difference = float((fresh(x, x, x)[0] - saved(x, x, x)[0]).abs().max())
    print(name, message, f"{difference:.2f}", "near" if difference < 1e-4 else "far")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in "in_proj_weight <All keys"*" near"*"out_proj.weight <All keys matched"*" far") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
