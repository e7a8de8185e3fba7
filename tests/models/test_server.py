"""`transformers serve` with a hybrid model, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import socket
import string
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvbuffer_compile.integrations.transformers import servable
from kvbuffer_compile.integrations.transformers.paged import HybridCache
from tests.models.test_serving import FAST, alone, model_of

for package in ("fastapi", "uvicorn", "pydantic", "openai", "accelerate"):
    pytest.importorskip(package, reason='needs pip install ".[serving]"')
if not transformers.__version__.startswith(tuple(f"{known}." for known in servable.KNOWN)):
    pytest.skip("the engine of this version of transformers is not known", allow_module_level=True)

pytestmark = pytest.mark.nightly
LETTERS = string.ascii_letters + string.digits + " .,;:!?-"
STREAMS, TOKENS = 32, 24


def tokenizer() -> Any:
    """A token for each letter."""
    made = Tokenizer(models.WordLevel({letter: n + 1 for n, letter in enumerate(LETTERS)} | {"~": 0}, unk_token="~"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="~")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, Any, Any, str]]:
    model, words = model_of("qwen3_5"), tokenizer()
    model.generation_config.update(do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    from kvbuffer_compile.integrations.transformers.server import Server

    server = Server(
        str(tmp_path), slots=8, options=FAST, host="127.0.0.1", port=port, device="cpu", dtype="float32",
        cb_num_blocks=40, cb_max_batch_tokens=64, cb_max_memory_percent=0.2,
    )  # fmt: skip
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield server, model, words, f"http://127.0.0.1:{port}/v1"
    server.kill_server()


async def streamed(client: Any, model: str, prompt: str, most: int | None = None) -> str:
    """The text of one request; most: the client is gone after so many pieces."""
    text = ""
    stream = await client.completions.create(model=model, prompt=prompt, max_tokens=TOKENS, stream=True)
    async for n, chunk in _numbered(stream):
        if chunk.choices:
            text += chunk.choices[0].text or ""
        if most is not None and n >= most:
            await stream.close()
            break
    return text


async def _numbered(stream: Any) -> Any:
    n = 0
    async for chunk in stream:
        yield n, chunk
        n += 1


def test_many_streams(served: tuple[Any, Any, Any, str]) -> None:
    import openai

    server, model, words, url = served
    name = server._model_manager.force_model
    prompts = [f"request {n} says {'la ' * (n % 5)}" for n in range(STREAMS)]
    model.generation_config.max_new_tokens = TOKENS
    want = [words.decode(alone(model, words(p).input_ids, TOKENS), skip_special_tokens=True) for p in prompts]

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600)
        first = await streamed(client, name, prompts[0])
        assert first == want[0]
        lost = [streamed(client, name, p, most=2) for p in prompts[:4]]
        got = await asyncio.gather(*[streamed(client, name, p) for p in prompts], *lost)
        assert list(got[:STREAMS]) == want
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(model=name, prompt=["not", "text"], max_tokens=4)
        assert await streamed(client, name, prompts[1]) == want[1]

    asyncio.run(run())
    assert not server.refused
    manager = server._generation_state._cb_manager
    assert manager is not None and manager._cb is not None
    slots = manager._cb.batch_processor.cache.pools.slots
    end = time.monotonic() + 60
    while slots.free < slots.count and time.monotonic() < end:
        time.sleep(0.1)
    assert slots.free == slots.count == 8


def test_clients_whose_connection_drops(served: tuple[Any, Any, Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is dropped is not computed to its end. The library does not look whether a client that waits for
    the whole text is still there: that request runs to its end, and its slot is free then."""
    server, model, _, url = served
    states: dict[str, Any] = {}
    fits = HybridCache.can_store_request_tokens

    def noted(self: HybridCache, state: Any, *args: Any, **kwargs: Any) -> bool:
        states[state.request_id] = state
        return fits(self, state, *args, **kwargs)

    monkeypatch.setattr(HybridCache, "can_store_request_tokens", noted)
    name, port = server._model_manager.force_model, int(url.split(":")[2].split("/")[0])
    for stream, most in ((True, 1500), (False, 60)):
        states.clear()
        body = json.dumps({"model": name, "prompt": "a request", "max_tokens": most, "stream": stream})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            if stream:
                for _ in range(3):
                    assert connection.recv(4096)
            else:
                _until(lambda: any(len(s.generated_tokens) > 2 for s in states.values()))
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # reset, as a crash does
        slots = server._generation_state._cb_manager._cb.batch_processor.cache.pools.slots
        _until(lambda: slots.free == slots.count)  # noqa: B023
        ((request, state),) = ((r, s) for r, s in states.items() if not r.startswith("__trial"))
        assert (len(state.generated_tokens) < most) if stream else (len(state.generated_tokens) == most), request


def _until(so: Any) -> None:
    end = time.monotonic() + 120
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)
