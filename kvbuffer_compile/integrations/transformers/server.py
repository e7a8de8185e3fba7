"""`transformers serve` with continuous batching for models with linear layers: the library's own server and options.

    python -m kvbuffer_compile.integrations.transformers.server MODEL --port 8000 --slots 32

Its endpoints are those of OpenAI's API. Needs `pip install "transformers[serving]"`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from transformers.cli.serve import Serve

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers.serving import enable_continuous_batching

log = logging.getLogger("kvbuffer_compile")


class Server(Serve):
    """The server of transformers, running in a thread of its own from when it is made.

    model: the name or folder of the model that all requests are for. slots, options: of `enable_continuous_batching`. A
    model without linear layers goes the library's own way; one that cannot be served with them has its requests
    generated one after the other, for the reason in `refused`. settings: those of
    `transformers serve`, by its names (`host`, `port`, `dtype`, `device`, `cb_num_blocks`, `cb_max_batch_tokens`, ...).
    """

    def __init__(
        self, model: str, *, slots: int | None = None, options: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self._ours: dict[str, Any] = {"slots": slots, "options": options}
        self.refused: dict[str, str] = {}  # why models are served without states, by class
        super().__init__(force_model=model, continuous_batching=True, non_blocking=True, **settings)

    def start_server(self) -> None:
        """Called by the library when everything but the first request is there."""
        library: Any = self
        may_be_served = library._generation_state.use_continuous_batching

        def use_continuous_batching(model: Any, modality: Any) -> bool:
            if not may_be_served(model, modality):
                return False
            try:
                enable_continuous_batching(model, **self._ours)
            except StateError as error:
                if type(model).__name__ not in self.refused:
                    log.warning("%s", error)
                self.refused[type(model).__name__] = str(error)
                return not model._is_stateful  # one after the other, where the engine would refuse it
            return True

        library._generation_state.use_continuous_batching = use_continuous_batching
        super().start_server()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the server ends; an interrupt ends it."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.kill_server()  # type: ignore[no-untyped-call]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kvbuffer_compile.integrations.transformers.server")
    parser.add_argument("model", help="name or folder of a transformers model")
    parser.add_argument("--host", default="localhost", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    parser.add_argument("--dtype", default="auto", help="of the weights, e.g. bfloat16")
    parser.add_argument("--device", default="auto", help="e.g. cpu or cuda:0")
    parser.add_argument("--slots", type=int, default=None, help="requests that have states at a time; others wait")
    parser.add_argument("--num-blocks", type=int, default=None, help="blocks of 256 tokens that the pages hold")
    parser.add_argument("--max-batch-tokens", type=int, default=None, help="tokens of a batch, prompts among them")
    given = parser.parse_args(arguments)
    server = Server(
        given.model,
        slots=given.slots,
        host=given.host,
        port=given.port,
        dtype=given.dtype,
        device=given.device,
        cb_num_blocks=given.num_blocks,
        cb_max_batch_tokens=given.max_batch_tokens,
    )
    server.wait()


if __name__ == "__main__":
    main()
