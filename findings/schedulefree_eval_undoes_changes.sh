#!/usr/bin/env bash
# schedulefree 1.4.1, torch 2.15.0: what is written into the weights while the optimizer is in train
# mode is gone after optimizer.eval().
#
# eval() moves the weights from where they train to the average, by weights and a second copy (z) in
# the optimizer's state. Zeros that were put into the weights in between (pruning, clipping, an
# in-place projection) become other numbers, without an error. Call optimizer.eval() first, then
# change the weights; before training goes on, z has to be changed as well.
#
# Seen: 683 zeros before eval(), 0 after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 schedulefree==1.4.1
cat > program.py <<'PROGRAM'
import torch
from schedulefree import AdamWScheduleFree

torch.manual_seed(0)
layer = torch.nn.Linear(20, 50)
optimizer = AdamWScheduleFree(layer.parameters(), lr=0.01)
optimizer.train()
for _ in range(12):
    optimizer.zero_grad()
    layer(torch.randn(32, 20)).square().mean().backward()
    optimizer.step()
with torch.no_grad():
    layer.weight[layer.weight.abs() < 0.1] = 0
before = int((layer.weight == 0).sum())
optimizer.eval()
after = int((layer.weight == 0).sum())
print(before, after, "gone" if after < before / 10 else "kept")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in *gone) ;; *) echo "changed: zeros survive eval()"; exit 1 ;; esac
echo "as described"
