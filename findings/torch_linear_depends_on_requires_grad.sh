#!/usr/bin/env bash
# torch 2.15.0, on a CPU: under no_grad, F.linear of a transposed 3-D input gives other last bits
# for a weight that requires grad than for the same weight without it.
#
# matmul decides by weight.requires_grad whether it folds the input into a matrix, and does not ask
# whether gradients are on. A weight that is computed under no_grad (by a parametrization, say) has
# no requires_grad, the Parameter that it replaces has. So a parametrized layer and the same layer
# after remove_parametrizations differ, though their weights are equal bit for bit.
#
# Seen: False (equal?) and a largest difference of 3.8e-06; the digits depend on the processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0
cat > program.py <<'PROGRAM'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
weight, x = torch.randn(32, 32), torch.randn(2, 12, 32).transpose(0, 1)
with torch.no_grad():
    plain = F.linear(x, weight)
    trained = F.linear(x, weight.clone().requires_grad_())
print(torch.equal(plain, trained), f"{(plain - trained).abs().max():.1e}")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in False*) ;; *) echo "changed: the two results are equal"; exit 1 ;; esac
echo "as described"
