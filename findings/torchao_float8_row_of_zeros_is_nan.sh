#!/usr/bin/env bash
# torchao 0.18.0, torch 2.15.0, on a CPU: Float8WeightOnlyConfig makes nan of a row of zeros.
#
# The scale of a row is its largest value by that of float8; of a row of zeros it is 0, and the row
# is divided by it. A layer with a pruned output channel then gives nan for this channel, without
# an error. Int8WeightOnlyConfig keeps the row at 0. Remove such rows first, or put one small
# number into them.
#
# Seen:
#   Float8WeightOnlyConfig 4 of 4 outputs of the row of zeros are nan
#   Int8WeightOnlyConfig 0 of 4 outputs of the row of zeros are nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torchao==0.18.0 numpy==2.4.6
cat > program.py <<'PROGRAM'
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

for config in (Float8WeightOnlyConfig, Int8WeightOnlyConfig):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    with torch.no_grad():
        model[0].weight[3] = 0
    quantize_(model, config())
    nans = int(model(torch.randn(4, 64))[:, 3].isnan().sum())
    print(config.__name__, nans, "of 4 outputs of the row of zeros are nan")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in "Float8WeightOnlyConfig 4 "*"Int8WeightOnlyConfig 0 "*) ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
