#!/usr/bin/env bash
# torch 2.15.0: torch.fx.experimental.optimization.fuse folds a batch norm into the convolution
# before it although the network calls the convolution a second time, without a norm.
#
# The second call computes the norm as well then. Nothing is said, and outputs are far off. A
# network that calls each convolution once is right within rounding.
#
# Seen:
#   each called once: right
#   called twice: wrong
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
from torch.fx.experimental.optimization import fuse


class Twice(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = last or self.first

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


torch.manual_seed(0)
x = torch.randn(8, 4, 16, 16)
for name, last in (("each called once", nn.Conv2d(4, 4, 3)), ("called twice", None)):
    model = Twice(last)
    model.norm.weight.data.fill_(3)
    model(x)  # running statistics
    model.eval()
    with torch.no_grad():
        difference = (fuse(model)(x) - model(x)).abs().max() / model(x).abs().max()
    print(f"{name}: {'right' if difference < 1e-4 else 'wrong' if difference > 0.1 else difference}")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
[ "$shown" = "each called once: right
called twice: wrong" ] || { echo "changed"; exit 1; }
echo "as described"
