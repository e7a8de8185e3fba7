"""Every test runs strict: an internal error is an error, and unused row slots hold NaN."""

import gc
import os

os.environ.setdefault("KVBUFFER_STRICT", "1")
os.environ.setdefault("KVBUFFER_CACHE", "0")  # tests break our rules on purpose, which no key of the cache knows of
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes, which import torch each

import pytest
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # two workers share two cores


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """What exists before the tests of a module is no garbage of theirs, and their collections look at the rest only:
    a collection takes 2 to 4 s where it looks at torch, transformers and all tests, and serving alone asks for 20."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No test sees graphs that another one compiled, or the phases of its states."""
    from kvbuffer_compile.accounts.ledger import LEDGER
    from kvbuffer_compile.integrations.functions import substitution

    torch._dynamo.reset()
    substitution.watch()
    LEDGER._phases.clear()  # states of earlier tests that wait for a garbage collection take no phase from these
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled(monkeypatch):
    """Graphs run as they are, in tests to which it is the same who compiles them; our kernels are in them."""
    from tests.support.snippets import quick

    with quick(monkeypatch):
        yield


@pytest.fixture
def records():
    """Every graph the backend decides on during a test, as GraphRecords."""
    from kvbuffer_compile.backend import observers

    seen = []
    observers.listeners.append(seen.append)
    yield seen
    observers.listeners.clear()
