#!/usr/bin/env bash
# torch-geometric 2.8.1, torch 2.15.0: a torch_geometric.nn.Linear with a parametrized weight writes
# the weight into its state dict twice, and does not load its own state dict.
#
# Its _save_to_state_dict writes self.weight under "weight" by itself. Under torch's parametrize that
# is the computed weight, beside parametrizations.weight.original; load_state_dict then finds the
# key "weight" unexpected. nn.Linear writes the second alone. Leave "weight" out before loading.
#
# Seen:
#   ['weight', 'parametrizations.weight.original']
#   RuntimeError: Unexpected key(s) in state_dict: "weight".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torch-geometric==2.8.1
cat > program.py <<'PROGRAM'
import torch
from torch.nn.utils import parametrize
from torch_geometric.nn import Linear


class Half(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


layer = Linear(3, 2)
parametrize.register_parametrization(layer, "weight", Half())
state = layer.state_dict()
print([key for key in state if "weight" in key])
try:
    layer.load_state_dict(state)
except RuntimeError as error:
    print(f"RuntimeError: {str(error).splitlines()[-1].strip()}")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in *'Unexpected key(s) in state_dict: "weight"'*) ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
