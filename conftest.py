"""What the examples in docstrings use without importing it: torch, nn and the public names."""

import pytest


@pytest.fixture(autouse=True)
def _public_names(doctest_namespace):
    import torch  # not before tests/conftest.py has said how many threads it gets

    import parasparse

    doctest_namespace |= {name: getattr(parasparse, name) for name in parasparse.__all__}
    doctest_namespace |= {"torch": torch, "nn": torch.nn}
