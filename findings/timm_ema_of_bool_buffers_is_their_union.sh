#!/usr/bin/env bash
# timm 1.0.31, torch 2.15.0: ModelEmaV2 makes of a bool buffer the union of all that it has been.
#
# It averages every entry of the state dict and copies the result into the average's own entry: of
# bools 0.5 * True + 0.5 * False is 0.5, which becomes True, for ever. A mask that moves (dynamic
# sparse training, gradual pruning) ends up dense in the average. ModelEmaV3 copies buffers by its
# default.
#
# Seen: the model has [False, True]; its average, after 50 updates, [True, True].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 timm==1.0.31
cat > program.py <<'PROGRAM'
import torch
from timm.utils import ModelEmaV2

model = torch.nn.Linear(2, 2)
model.register_buffer("kept", torch.tensor([True, False]))
average = ModelEmaV2(model, decay=0.5)
model.kept.copy_(torch.tensor([False, True]))
for _ in range(50):
    average.update(model)
print(model.kept.tolist(), average.module.kept.tolist())
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in "[False, True] [True, True]") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
