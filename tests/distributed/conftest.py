"""One group of processes of each size for all tests."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.processes import Processes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("processes"))


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
