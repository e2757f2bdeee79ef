#!/usr/bin/env bash
# torch 2.15.0: a tensor subclass computes other numbers under torch.compile, without a warning, if
# its `__torch_function__` calls a function on the subclass again.
#
# In eager mode the inner call reaches `__torch_function__` of the subclass, as the outer one did.
# torch.compile switches subclasses off while it traces `__torch_function__`, so the inner call
# takes the tensor for an ordinary one. A weight that multiplies in its own way, such as a sparse
# or a quantized one, meets this where a handler is built on others: attention on linear layers.
#
# Seen:
#   eager 12.0 compiled 6.0
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


class Doubled(torch.Tensor):
    """A weight that multiplies with twice its values."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * func(*args, **kwargs)
        if func is F.bilinear:  # built on linear layers
            x, y, weight = args
            return F.linear(x, weight[0]) + F.linear(y, weight[0])
        return super().__torch_function__(func, types, args, kwargs)


def model(x, weight):
    return F.bilinear(x, x, weight)


x, weight = torch.ones(1, 3), torch.ones(1, 3, 3).as_subclass(Doubled)
eager = model(x, weight)
compiled = torch.compile(model, backend="eager", fullgraph=True)(x, weight)
print("eager", eager.flatten()[0].item(), "compiled", compiled.flatten()[0].item())
PROGRAM
output=$(env/bin/python program.py)
echo "$output"
[ "$output" = "eager 12.0 compiled 6.0" ] && echo "as described"
