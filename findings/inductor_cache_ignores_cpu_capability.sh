#!/usr/bin/env bash
# torch 2.15.0, Linux, a processor with AVX-512: torch.compile returns wrong numbers, without a
# warning, when ATEN_CPU_CAPABILITY changes between two runs that share inductor's cache folder.
#
# The second run takes the kernel from the cache whose loops were cut for vectors of 16 floats, and
# builds it for vectors of 8. With a folder of its own the same run is right. Whoever tests for
# AVX2 with ATEN_CPU_CAPABILITY=avx2 on a larger processor meets this; a folder for each
# capability (TORCHINDUCTOR_CACHE_DIR) avoids it.
#
# Seen (largest difference between compiled and eager):
#   AVX512 9.54e-07      first run, new folder
#   AVX2 6.85e+00        second run, same folder
#   AVX2 9.54e-07        new folder
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


def function(x, weight):
    return torch.tanh(F.linear(x, weight) * 2).sum(1)


torch.manual_seed(0)
x, weight = torch.randn(4, 37), torch.randn(29, 37)
difference = (torch.compile(function, fullgraph=True)(x, weight) - function(x, weight)).abs().max()
print(torch.backends.cpu.get_cpu_capability(), f"{difference:.2e}")
PROGRAM
first=$(TORCHINDUCTOR_CACHE_DIR=$folder/shared env/bin/python program.py)
second=$(TORCHINDUCTOR_CACHE_DIR=$folder/shared ATEN_CPU_CAPABILITY=avx2 env/bin/python program.py)
alone=$(TORCHINDUCTOR_CACHE_DIR=$folder/own ATEN_CPU_CAPABILITY=avx2 env/bin/python program.py)
printf '%s\n' "$first" "$second" "$alone"
env/bin/python - "$first" "$second" "$alone" <<'CHECK'
import sys

(one, first), (two, second), (three, alone) = (line.split() for line in sys.argv[1:])
if one != "AVX512":
    sys.exit("this processor has no AVX-512, so that nothing changes between the runs")
if (two, three) != ("AVX2", "AVX2") or float(first) > 1e-4 or float(alone) > 1e-4:
    sys.exit("changed: the runs are not what they were")
if float(second) < 1e-2:
    sys.exit("changed: the shared cache gives the right numbers now")
print("as described")
CHECK
