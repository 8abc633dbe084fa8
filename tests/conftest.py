"""Settings for every test: reproducible draws, one thread, and a reason where there is no GPU."""

import pytest
import torch
from hypothesis import settings

# The same examples on every machine and in every run; tensors are tiny, so more threads would only cost time.
settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("reproducible")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    # Not a number that tests seed generators of their own with, whose first draw would then be the same.
    torch.manual_seed(271828)
