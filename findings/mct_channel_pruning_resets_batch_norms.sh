#!/usr/bin/env bash
# model-compression-toolkit 2.6.1, torch 2.15.0: pytorch_pruning_experimental returns the batch norm
# after each layer that lost channels as a new one: mean 0, variance 1, weight 1, bias 0.
#
# Its learned weight and bias are gone as well as its statistics. Nothing is said, and because the
# documentation asks for retraining, the loss looks like that of pruning. The convolutions are right.
# With the kept entries of the old norm, chosen by the masks in the result, the network computes what
# the old one computes with these channels at 0.
#
# Seen (largest difference to the old network with these channels at 0, by its largest output):
#   new norm after the cut layer True, after a whole layer False
#   as returned 0.35, with the kept entries of the old norm 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 model-compression-toolkit==2.6.1
cat > program.py <<'PROGRAM'
import copy

import model_compression_toolkit as mct
import torch
from torch import nn

NAMES = "weight", "bias", "running_mean", "running_var"


def draw():
    return 3 * torch.randn(32, 3, 16, 16) + 1


def data():
    yield [draw()]


def is_new(norm):
    fresh = nn.BatchNorm2d(norm.num_features)
    return all(torch.equal(getattr(norm, name), getattr(fresh, name)) for name in NAMES)


def difference():
    return float((small(x).cpu() - expected).abs().max() / expected.abs().max())


torch.manual_seed(0)
first = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()
second = nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()
last = nn.Conv2d(64, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
model = nn.Sequential(*first, *second, *last)
for norm in (model[1], model[4]):
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
for _ in range(50):
    model(draw())  # running statistics
model.eval()

size = 4 * sum(parameter.numel() for parameter in model.parameters())
budget = mct.core.ResourceUtilization(weights_memory=size)  # its sizes are padded, so this prunes
small, info = mct.pruning.pytorch_pruning_experimental(model, budget, data)
masks = {node.name: torch.tensor(mask).bool() for node, mask in info.pruning_masks.items()}
assert not masks["_0"].all() and masks["_3"].all()
print(f"new norm after the cut layer {is_new(small._1)}, after a whole layer {is_new(small._4)}")

masked, x = copy.deepcopy(model), draw()
with torch.no_grad():
    masked[3].weight[:, ~masks["_0"]] = 0
    expected = masked(x)
    returned = difference()
    for name in NAMES:
        getattr(small._1, name).copy_(getattr(model[1], name)[masks["_0"]])
    print(f"as returned {returned:.2f}, with the kept entries of the old norm {difference():.2f}")
PROGRAM
shown=$(CUDA_VISIBLE_DEVICES= env/bin/python -W ignore program.py 2>/dev/null | grep -E '^(new|as) ')
printf '%s\n' "$shown"
case "$shown" in *"cut layer True"*"whole layer False"*"returned 0."[1-9]*"old norm 0.00") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
