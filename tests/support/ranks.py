"""Several processes that compute together by gloo on the loopback, as `torchrun` starts them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

WAIT = 600  # seconds for one function on all ranks


class Ranks:
    """Processes with a rank each, which run functions together until `close`."""

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) gives on each rank. function: of a module; AssertionError with the trace of a rank where
        it fails."""
        for pipe in self.pipes:
            pipe.send((function, args))
        found = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(WAIT), f"rank {rank} gave no answer in {WAIT} seconds"
            failed, result = pipe.recv()
            assert not failed, f"rank {rank}: {result}"
            found.append(result)
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), GLOO_SOCKET_IFNAME="lo", KVBUFFER_STRICT="1"
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        function, args = pipe.recv()
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
