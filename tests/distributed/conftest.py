"""One group of processes of each size for all tests."""

import pytest
import torch.distributed as dist

from tests.distributed.processes import Processes


@pytest.fixture(scope="session")
def groups():
    found = {}
    yield found
    for processes in found.values():
        processes.close()


@pytest.fixture
def run(groups):
    """Return `run(number, job, *args)`: what `job(rank, *args)` returns in each process."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")

    def run(number, job, *args):
        if number not in groups or not groups[number].alive:
            groups[number] = Processes(number)
        return groups[number].run(job, *args)

    return run
