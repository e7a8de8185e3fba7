"""Which models, settings and versions of transformers can be served with continuous batching, and why not."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.guard.wrapped import is_wrapper
from kvbuffer_compile.integrations.transformers.pools import CacheShape

KNOWN = ("5.23",)  # versions of transformers whose engine this was written for and tested with


def check_version() -> None:
    if not transformers.__version__.startswith(tuple(f"{known}." for known in KNOWN)):
        raise StateError(
            f"continuous batching: transformers {transformers.__version__} is not known here, its engine may differ: "
            f"install {' or '.join(known + '.*' for known in KNOWN)}"
        )


def check_on_one_process(model: Any) -> None:
    if getattr(model, "_pp_stage", None) is not None or any(map(is_wrapper, model.parameters())):
        raise StateError(
            f"continuous batching: {type(model).__name__} is spread over several processes (DTensor parameters, stages "
            "of a pipeline): the slots of its states are kept in one; model.generate is served, by this backend too"
        )


def linear_layers(model: Any) -> list[Any]:
    """The modules of a model that keep a state of one size in its cache. StateError when one has a forward of its own:
    hooks of other libraries are set like that."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "cache_params" in inspect.signature(type(module).forward).parameters
    ]
    if any("forward" in vars(module) for module in found):
        raise StateError(
            f"continuous batching: the forward of {type(found[0]).__name__} was set on the instance (hooks of another "
            "library?): it is not served"
        )
    return found


def check_served(model: Any, shape: CacheShape, mixers: list[int]) -> None:
    name = type(model).__name__
    if not shape.states:
        raise StateError(
            f"continuous batching: {name} keeps no states of linear layers in the cache layers of transformers; "
            "transformers serves it as it is, or refuses it"
        )
    if not shape.attention:
        raise StateError(f"continuous batching: {name} has no attention, the engine schedules by the pages that needs")
    if sorted(mixers) != sorted(shape.states):
        raise StateError(
            f"continuous batching: the states of {name} in layers {sorted(shape.states)} are not those of the modules "
            f"that take cache_params, in layers {sorted(mixers)}"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise StateError(f"continuous batching: {name} lies on {len(devices)} devices, states are kept on one")
    compiled = [n for n, module in model.named_modules() if getattr(module, "_compiled_call_impl", None) and n]
    if compiled:
        raise StateError(f"continuous batching: {compiled[0]} of {name} is compiled by itself, serve it uncompiled")


COMPILED = "is not allowed for this model: its linear layers are compiled here, and the rest runs as it is"


def check_config(config: Any) -> None:
    """ValueError for what the engine can do and cannot with states."""
    refused = {
        "varlen_compile_config": (None, COMPILED),
        "decode_compile_config": (None, COMPILED),
        "default_compile_level": (0, COMPILED),
        "cpu_offload_space": (0, "is not allowed for this model: states are not offloaded; requests are computed anew"),
    }
    for name, (allowed, why) in refused.items():
        value = getattr(config, name)
        if value != allowed:
            raise ValueError(f"continuous_batching_config.{name}={value!r} {why}; it must be {allowed}")
    for name in ("use_cuda_graph", "use_async_batching"):
        value = getattr(config, name)
        if value is True or (isinstance(value, tuple) and any(value)):
            raise ValueError(
                f"continuous_batching_config.{name}={value!r} is not allowed for this model: the slots of a batch are "
                "told apart on the host; it must be None or False"
            )
