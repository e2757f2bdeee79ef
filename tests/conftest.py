import os

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, more threads than cores get in their way
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.backends.cpu import get_cpu_capability

# Inductor's own folder holds kernels for another processor after ATEN_CPU_CAPABILITY has changed.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(__file__).parent.parent / "out" / f"inductor-{get_cpu_capability()}"),
)

settings.register_profile(
    "quick",
    max_examples=60,
    deadline=None,  # machines are shared: a slow example is no failure
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("long", settings.get_profile("quick"), max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
