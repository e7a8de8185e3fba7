"""Every test runs strict: an internal error is an error, and unused row slots hold NaN."""

import os

os.environ.setdefault("KVBUFFER_STRICT", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # two workers share two cores


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No test sees graphs that another one compiled."""
    from kvbuffer_compile.integrations import functions

    torch._dynamo.reset()
    functions.watch()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def records():
    """Every graph the backend decides on during a test, as GraphRecords."""
    from kvbuffer_compile.backend import observers

    seen = []
    observers.listeners.append(seen.append)
    yield seen
    observers.listeners.clear()
