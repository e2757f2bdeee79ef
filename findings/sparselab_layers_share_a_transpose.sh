#!/usr/bin/env bash
# SparseLab 0.2.2: a layer made after another one is gone may get a wrong gradient, in silence.
#
# The backward pass of a `SparseLinear` keeps the transpose of its weight by `id(weight)`, and never
# drops it. Python gives the number of a freed object to a later one. If both have the same shape,
# the later layer takes the places of the earlier one: the gradient of its input is then that of
# other connections, or an IndexError is raised. It shows wherever layers are made one after another
# in one process: a search over sparsities or seeds, a test suite, a benchmark. Which layers are hit
# differs from run to run; in five runs of 300 layers 8 to 35 were wrong and 7 to 34 raised.
# A comment in its source knows of it and expects it to be rare.
#
# Seen (numbers differ):
#   some layers have a wrong gradient: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 numpy sparselab==0.2.2
cat > program.py <<'PROGRAM'
import torch
from sparselab import SparseLinear

wrong, raised = 0, 0
for seed in range(1000):  # one layer after another, as in a search over seeds
    torch.manual_seed(seed)
    layer = SparseLinear(64, 64, sparsity=0.9, bias=False)
    x = torch.randn(8, 64, requires_grad=True)
    try:
        layer(x).sum().backward()
    except IndexError:
        raised += 1
        continue
    with torch.no_grad():
        weight = layer(torch.eye(64)).T
    wrong += not torch.allclose(x.grad, weight.sum(0).expand(8, 64), atol=1e-5)
print(f"wrong: {wrong}, raised an IndexError: {raised}")
print("some layers have a wrong gradient:", wrong > 0)
PROGRAM
output=$(env/bin/python -W ignore program.py)
echo "$output"
echo "$output" | grep -q "some layers have a wrong gradient: True" && echo "as described"
