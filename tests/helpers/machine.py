"""What the processor and the compilers of this machine can do, of that which not all can."""

from functools import cache

import pytest
import torch
from torch import nn

needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(),
    reason="this torch has no MKL, with which CSR and blocks are multiplied on a CPU",
)


@cache
def _has_bfloat16_lstm():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(4, 4)(torch.randn(2, 1, 4))
        except RuntimeError:
            return False
    return True


@cache
def _has_inductor():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except Exception:  # no compiler, no headers of Python: each has an error of its own
        return False
    return True


def need_bfloat16_lstm():
    """Skip where the dense LSTM fails under autocast as well."""
    if not _has_bfloat16_lstm():
        pytest.skip("oneDNN has no LSTM in bfloat16 on this processor, which lacks AVX-512")


def need_inductor():
    """Skip where inductor cannot compile anything."""
    if not _has_inductor():
        pytest.skip("inductor cannot compile here: it needs a C++ compiler and Python's headers")
