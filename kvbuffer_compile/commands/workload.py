"""What the command line runs: a decode step from a Python file or from a checkpoint of Hugging Face transformers."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.commands.arguments import check_spec

Call = tuple[Callable[..., Any], tuple[Any, ...]]
Factory = Callable[[], Call]  # a fresh function with fresh arguments, the same numbers every time

PROMPT = 8  # tokens of the prefill before the decode step


def load(spec: str, batch: int = 1) -> Factory:
    """The workload that a SPEC names. batch: sequences, for a checkpoint.

    ValueError naming SPEC for anything that is not one of arguments.FORMS.
    """
    check_spec(spec)
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return _seeded(_from_file(Path(path), name, spec))
    return _seeded(_from_checkpoint(Path(spec), batch, spec))


def _seeded(factory: Factory) -> Factory:
    def fresh() -> Call:
        torch.manual_seed(0)
        return factory()

    return fresh


def _from_file(path: Path, name: str, spec: str) -> Factory:
    module = _module(path, spec)
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [n for n, x in vars(module).items() if callable(x)], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"SPEC {spec!r}: {path} has no function {name!r}{hint}")

    def factory() -> Call:
        try:
            made = function()
        except Exception as error:
            raise ValueError(f"SPEC {spec!r}: {name}() failed: {error!r}") from error
        if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], tuple | list)):
            raise ValueError(f"SPEC {spec!r}: {name}() must return (fn, args), a callable and a tuple")
        _check_arguments(made[0], tuple(made[1]), f"SPEC {spec!r}: what {name}() returns does not fit together")
        return made[0], tuple(made[1])

    return factory


def _check_arguments(fn: Callable[..., Any], args: tuple[Any, ...], what: str) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of something built in
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def _module(path: Path, spec: str) -> Any:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module  # dataclasses and pickle look there
    sys.path.insert(0, str(path.parent.resolve()))  # as if the file were run as a script
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"SPEC {spec!r}: {path} cannot be imported: {error!r}") from error
    finally:
        sys.path.pop(0)
    return module


def _from_checkpoint(folder: Path, batch: int, spec: str) -> Factory:
    """One decode step after a short prompt, on a cache of its own. The model is loaded once."""
    model = _model(folder, spec)
    vocabulary = int(model.config.get_text_config().vocab_size)

    def decode(token: Tensor, cache: Any) -> Tensor:
        logits = model(input_ids=token, use_cache=True, **{keyword: cache}).logits
        assert isinstance(logits, Tensor)
        return logits

    def factory() -> Call:
        prompt = torch.randint(vocabulary, (batch, PROMPT), device=model.device)
        with torch.no_grad():
            out = model(input_ids=prompt, use_cache=True)
        return decode, (prompt[:, -1:], getattr(out, keyword))

    with torch.no_grad():
        probe = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    caches = [name for name in ("past_key_values", "cache_params") if getattr(probe, name, None) is not None]
    if not caches:
        raise ValueError(f"SPEC {spec!r}: the model returns no cache, so it has no decode step")
    keyword = caches[0]
    return factory


def _model(folder: Path, spec: str) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"SPEC {spec!r}: the folder has no config.json, so it is no checkpoint")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("a checkpoint needs transformers: pip install 'kvbuffer_compile[transformers]'") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"SPEC {spec!r}: not a causal language model that transformers can load: {error}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
