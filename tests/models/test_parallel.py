"""Models on more than one process: two ranks give the numbers of one, and the states of each rank are buffered."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import transformers.distributed
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kvbuffer_compile.backend import GraphRecord, observers
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers import enable_continuous_batching
from kvbuffer_compile.runtime.by_hand import accounts_of
from tests.support.ranks import Ranks
from tests.zoo.build import bare_model
from tests.zoo.decoding import prefilled, prompt, states_of
from tests.zoo.weights import remember

FAST: dict[str, Any] = {"inner": "eager", "target": "aten", "flush": 4}
WAIT = "_c10d_functional.wait_tensor.default"
NIGHTLY = pytest.mark.nightly
NEW = pytest.mark.skipif(
    not hasattr(transformers, "distributed") or Version(transformers.__version__) < Version("5.23"),
    reason="the plans of transformers before 5.23 were not tried",
)
PLANS = (
    "qwen3_5",
    "qwen3_next",
    "qwen3_5_moe",
    "olmo_hybrid",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "nemotron_h",
)
BATCH, HEADS, K, V, WIDTH, STEPS = 3, 4, 8, 12, 32, 14


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


class Layer(nn.Module):
    """Gated DeltaNet, one token, on a state that the caller or the module has."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in {"q": HEADS * K, "k": HEADS * K, "v": HEADS * V, "beta": HEADS, "decay": HEADS}.items():
            setattr(self, name, nn.Linear(WIDTH, width, bias=False))
        self.out = nn.Linear(HEADS * V, WIDTH, bias=False)
        self.heads = HEADS

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        q, k = (F.normalize(p(x).view(BATCH, self.heads, K), dim=-1) for p in (self.q, self.k))
        v = self.v(x).view(BATCH, self.heads, V)
        state.mul_(torch.sigmoid(self.decay(x) + 2)[..., None, None])
        delta = torch.sigmoid(self.beta(x))[..., None] * (v - (state * k[..., None]).sum(-2))
        state.add_(k[..., None] * delta[..., None, :])
        read = (state * q[..., None]).sum(-2)
        return x + self.out(read.reshape(BATCH, self.heads * V))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, states: list[Tensor]) -> Tensor:
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, state)
        return x


def plan(style: Callable[[], Any]) -> dict[str, Any]:
    columns = {f"layers.{n}.{name}": style() for n in range(2) for name in ("q", "k", "v", "beta", "decay")}
    return columns | {f"layers.{n}.out": RowwiseParallel() for n in range(2)}


class Alone:
    """The same numbers on every rank: a model, tokens, states, and what comes out on one process."""

    @torch.no_grad()
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model, self.tokens = Layers(), torch.randn(STEPS, BATCH, WIDTH)
        self.begin = [0.3 * torch.randn(BATCH, HEADS, K, V) for _ in range(2)]
        self.states = [state.clone() for state in self.begin]
        self.out = [self.model(x, self.states) for x in self.tokens]


class Watched:
    """The graphs that are compiled meanwhile."""

    def __enter__(self) -> list[GraphRecord]:
        self.records: list[GraphRecord] = []
        observers.listeners.append(self.records.append)
        return self.records

    def __exit__(self, *_: object) -> None:
        observers.listeners.remove(self.records.append)


def buffered(records: list[GraphRecord]) -> list[int]:
    """How many states are buffered in each graph, of which none may be declined."""
    assert not any(record.declined for record in records), [record.declined for record in records]
    return [sum(plan.variant == "buffered" for _, plan in record.rewritten) for record in records]


def accounts_owe(states: list[Tensor]) -> list[int]:
    """The rows owed to each state."""
    return [int(account.cursor[0].max()) for account in accounts_of(states)]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def heads_are_split(inner: str) -> None:
    """Each rank has half of the heads and of each state; the graph ends each layer with a collective."""
    alone, rank = Alone(), dist.get_rank()
    model = parallelize_module(copy.deepcopy(alone.model), init_device_mesh("cpu", (2,)), plan(ColwiseParallel))
    for layer in model.layers:
        layer.heads = HEADS // 2
    states = [state.chunk(2, dim=1)[rank].clone() for state in alone.begin]
    collectives: list[str] = []

    def seen(gm: Any, inputs: Any) -> Any:
        collectives.extend(str(n.target) for n in gm.graph.nodes if "_c10d_functional" in str(n.target))
        return gm.forward

    options = {**FAST, "inner": seen if inner == "seen" else inner}
    step = torch.compile(model, backend="kvbuffer", fullgraph=True, options=options)
    with Watched() as records:
        for x, want in zip(alone.tokens, alone.out, strict=True):
            close(step(x, states), want)
    assert buffered(records) == [2]
    assert inner != "seen" or collectives == ["_c10d_functional.all_reduce.default", WAIT] * 2
    assert sum(accounts_owe(states)) > 0
    for got, want in zip(states, alone.states, strict=True):
        close(got, want.chunk(2, dim=1)[rank])


@pytest.mark.parametrize("inner", ["seen", pytest.param("inductor", marks=NIGHTLY)])
def test_heads_that_are_split(inner: str, ranks: Ranks) -> None:
    ranks.run(heads_are_split, inner)


@torch.no_grad()
def states_are_dtensors() -> None:
    """Operands and states are whole to the program, and each rank has a part of them."""
    alone, mesh = Alone(), init_device_mesh("cpu", (2,))
    columns = functools.partial(ColwiseParallel, use_local_output=False)
    model = parallelize_module(copy.deepcopy(alone.model), mesh, plan(columns))
    states = [distribute_tensor(state, mesh, [Shard(1)]) for state in alone.begin]
    step = torch.compile(model, backend="kvbuffer", fullgraph=True, options=FAST)
    with Watched() as records:
        for n, (x, want) in enumerate(zip(alone.tokens, alone.out, strict=True)):
            close(step(x, states), want)
            if n == 8:  # others look at a state, and write to it
                states[0].mul_(0.5).mul_(2.0)
    assert buffered(records) == [2]
    assert sum(accounts_owe(states)) > 0
    for got, want in zip(states, alone.states, strict=True):
        assert isinstance(got, DTensor)
        close((got + 0).full_tensor(), want)


def test_states_that_are_dtensors(ranks: Ranks) -> None:
    ranks.run(states_are_dtensors)


@torch.no_grad()
def fsdp() -> None:
    """Weights are gathered before each layer and freed behind it; every rank has its own sequences and states."""
    alone, mesh = Alone(), init_device_mesh("cpu", (2,))
    model = copy.deepcopy(alone.model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    states = [state.clone() for state in alone.begin]
    step = torch.compile(model, backend="kvbuffer", options=FAST)
    with Watched() as records:
        for x, want in zip(alone.tokens, alone.out, strict=True):
            close(step(x, states), want)
    assert set(buffered(records)) == {1}  # a graph for each layer: FSDP's hooks are not compiled
    assert sum(accounts_owe(states)) > 0
    for got, want in zip(states, alone.states, strict=True):
        close(got, want)


def test_weights_that_are_sharded(ranks: Ranks) -> None:
    ranks.run(fsdp)


class Kept(nn.Module):
    """A layer with its state in a buffer, as a stage of a pipeline."""

    def __init__(self, layer: nn.Module, state: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("state", state)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.state)  # type: ignore[no-any-return]


@torch.no_grad()
def pipeline() -> None:
    """A layer on each rank, and what it makes goes to the next."""
    alone, rank = Alone(), dist.get_rank()
    kept = Kept(copy.deepcopy(alone.model.layers[rank]), alone.begin[rank].clone())
    compiled = torch.compile(kept, backend="kvbuffer", fullgraph=True, options=FAST)
    x = alone.tokens[0]
    stage = PipelineStage(compiled, rank, 2, torch.device("cpu"), input_args=(x,), output_args=(x,))
    schedule = ScheduleGPipe(stage, n_microbatches=1)
    with Watched() as records:
        for x, want in zip(alone.tokens, alone.out, strict=True):
            out = schedule.step(x) if rank == 0 else schedule.step()
            if rank == 1:
                close(out, want)
    assert buffered(records) == [1]
    assert sum(accounts_owe([kept.state])) > 0
    close(kept.state, alone.states[rank])


def test_layers_on_different_ranks(ranks: Ranks) -> None:
    ranks.run(pipeline)


# ----------------------------------------------------------------------------------------- transformers' own


def loaded(name: str, folder: str, **settings: Any) -> tuple[Any, Any]:
    """The model on one process, and the same as transformers distributes it."""
    one = bare_model(name, torch.float32)
    remember(one, 0)
    if dist.get_rank() == 0:
        one.save_pretrained(folder)
    dist.barrier()
    config = transformers.distributed.DistributedConfig(**settings)
    return one, type(one).from_pretrained(folder, distributed_config=config, dtype=torch.float32).eval()


@torch.no_grad()
def decoded(name: str, folder: str, settings: dict[str, Any], options: dict[str, Any] = FAST) -> None:
    """A prompt as it is, then tokens by a compiled step. Every state that is on this rank is buffered."""
    one, model = loaded(name, folder, **settings)
    ids, tokens = prompt(2, 7), prompt(2, 12, seed=5)
    steps = [prefilled(m, ids, "static") for m in (one, model)]
    compiled = torch.compile(steps[1], backend="kvbuffer", options=options)
    with Watched() as records:
        for t in range(tokens.shape[1]):
            token = tokens[:, t : t + 1]
            close(compiled(token), steps[0](token))
    states = [state for _, state in states_of(steps[1])]
    assert sum(buffered(records)) == len(states) == (1 if "pp_size" in settings else 2)
    assert sum(accounts_owe(states)) > 0


@NEW
@NIGHTLY
@pytest.mark.parametrize("name", PLANS)
def test_the_plan_of_the_library(name: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(decoded, name, str(tmp_path), {"tp_plan": "auto"})


@NEW
@NIGHTLY
def test_with_inductor(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(decoded, "qwen3_5", str(tmp_path), {"tp_plan": "auto"}, {"flush": 4})


@NEW
@NIGHTLY
@pytest.mark.parametrize("settings", [{"fsdp_size": 2}, {"pp_size": 2}])
def test_other_ways_of_the_library(settings: dict[str, Any], ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(decoded, "qwen3_5", str(tmp_path), settings)


@torch.no_grad()
def generated(name: str, folder: str) -> list[int]:
    """`generate` as users write it, its prompt compiled as well."""
    one, model = loaded(name, folder, tp_plan="auto")
    ids = prompt(1, 9)
    want = one.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    model.compile(backend="kvbuffer", options=FAST)
    with Watched() as records:
        got = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)
    return buffered(records)


@torch.no_grad()
def refused(folder: str) -> str:
    _, model = loaded("qwen3_5", folder, tp_plan="auto")
    before = set(vars(model))
    with pytest.raises(StateError) as error:
        enable_continuous_batching(model)
    assert set(vars(model)) == before
    return str(error.value)


@NEW
@NIGHTLY
def test_the_engine_refuses_them(ranks: Ranks, tmp_path: Path) -> None:
    assert all("spread over several processes" in reason for reason in ranks.run(refused, str(tmp_path)))


@NEW
@NIGHTLY
def test_generate(ranks: Ranks, tmp_path: Path) -> None:
    assert all(2 in found for found in ranks.run(generated, "qwen3_5", str(tmp_path)))
