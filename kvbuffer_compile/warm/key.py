"""What a kept graph of ours depends on, as a part of the key of AOTAutograd's cache.

Torch's own key knows the captured graph, its inputs, and the settings of Inductor and AOTAutograd. It also takes in the
`uuid` of a custom pass. So a pass that does nothing stands in Inductor's configuration while a graph of ours is
compiled, and its uuid is a hash of everything else that decides what we make of the graph. docs/design-notes.md, "Warm
starts", has the argument why that is enough.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from kvbuffer_compile import machine
from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.guard.guarded import GuardedState
from kvbuffer_compile.guard.overlap import storage_of
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.process import disk
from kvbuffer_compile.records import observers

log = logging.getLogger("kvbuffer_compile")

PASS = "post_grad_custom_pre_pass"  # the setting of Inductor's that the key stands in
BUNDLED = "bundled_autograd_cache"  # entries hold what the inner compiler gave, of any class
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, GuardedState)
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
NAMESPACES = ("aten", "prims", "prim", "_c10d_functional", "kvbuffer")
SILENT = ("KVBUFFER_QUIET", "KVBUFFER_CACHE")  # environment variables that decide nothing about a graph
OURS = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".h", ".cpp")


class Unknown(Exception):
    """What a graph depends on cannot be said: why."""


class Key(CustomGraphPass):
    """A pass that does nothing but what the user's own in its place does. of: a hash of what our part depends on."""

    def __init__(self, of: str, theirs: CustomGraphPass | None) -> None:
        self.of = of
        self.theirs = theirs

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.theirs is not None:
            self.theirs(graph)

    def uuid(self) -> Any:
        return self.of, None if self.theirs is None else self.theirs.uuid()


def key_for(gm: GraphModule, inputs: Sequence[Any], ours: Options, patches: Mapping[str, Any]) -> Key | None:
    """The key of a captured graph that needs no gradients; None where nothing may be kept of it. patches: settings of
    Inductor that it is compiled with."""
    try:
        _require_wanted(ours)
        _require_ordinary({**inductor_config.get_config_copy(), **patches})
        _require_open(gm, inputs)
        _require_private()
        theirs = patches.get(PASS, getattr(inductor_config, PASS))
        around = source(), repr(ours), _environment(), _process(), _device(inputs, ours)
        parts = (*around, _sharing(inputs), _guards(inputs), *map(_input, inputs))
        return Key(hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest(), theirs)
    except Unknown as why:
        log.debug("nothing is kept of this graph for other processes: %s", why)
    except Exception as error:  # not worth a compilation
        log.info("nothing is kept of this graph for other processes: %r", error)
    return None


@contextmanager
def kept_by(key: Key | None) -> Iterator[None]:
    """While AOTAutograd compiles a graph under a key, or one of which nothing may be kept."""
    settings = {BUNDLED: True} if key is not None else {"enable_autograd_cache": False}
    with functorch_config.patch(settings):
        yield


def active() -> Key | None:
    """The key that the graph at hand is compiled under."""
    found = getattr(inductor_config, PASS, None)
    return found if isinstance(found, Key) else None


@contextmanager
def left_to_inductor(key: Key | None) -> Iterator[None]:
    """While Inductor compiles the rewritten graph, which its own cache knows by itself."""
    if key is None:
        yield
        return
    with functorch_config.patch({BUNDLED: False}), inductor_config.patch({PASS: key.theirs}):
        yield


# ------------------------------------------------------------------------------------- what may be kept at all


def _require(ok: object, why: str) -> None:
    if not ok:
        raise Unknown(why)


def _require_wanted(ours: Options) -> None:
    said = os.environ.get("KVBUFFER_CACHE", "")
    _require(said != "0" and (ours.cache or (ours.cache is None and said == "1")), "the cache is not asked for")
    _require(ours.inner == "inductor", "another compiler than Inductor")
    _require(not ours.check, "check=True needs the graph itself")
    _require(not ours.dump and not os.environ.get("KVBUFFER_DUMP"), "a dump tells of graphs as they are compiled")
    _require(not observers.listeners, "somebody listens to what is decided")


def _require_ordinary(settings: Mapping[str, Any]) -> None:
    """Settings of torch under which its cache works, and does what is known of it."""
    _require(hasattr(functorch_config, BUNDLED), "this PyTorch keeps compiled graphs in another way")
    _require(functorch_config.enable_autograd_cache, "AOTAutograd's cache is switched off")
    _require(not functorch_config.enable_remote_autograd_cache, "AOTAutograd's cache is on another machine")
    _require(not getattr(torch._dynamo.config, "caching_precompile", False), "graphs are precompiled")
    _require(settings.get("fx_graph_cache", True), "Inductor's cache is switched off")
    _require(not settings.get("unsafe_skip_cache_dynamic_shape_guards"), "guards of sizes are left out")
    _require(not settings.get("triton.cudagraphs"), "CUDA graphs")
    _require(not settings.get("freezing"), "weights are frozen")
    _require(getattr(inductor_config, "cudagraph_policy", None) is None, "a policy of CUDA graphs")
    theirs = settings.get(PASS)
    if theirs is not None:
        _require(isinstance(theirs, CustomGraphPass) and theirs.uuid() is not None, "a pass without uuid")


def _require_open(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """No tensor is a constant of the graph, since torch's key has the values of none, all inputs are ordinary, and no
    operator is the user's: its name stands in the graph, and what it does may change."""
    for module in gm.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        _require(not any(isinstance(x, Tensor) for x in held), "a tensor is a constant of the graph")
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if isinstance(node.target, OPERATORS):
                name = str(node.target).split(".")[0]
                _require(name in NAMESPACES, f"operators of {name}, which may be the user's")
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    _require(all(type(x) in PLAIN for x in tensors), "inputs of a class of their own")


def _require_private() -> None:
    """Entries are pickles, which run code: nobody else may write to the folder."""
    folder = Path(AOTAutogradCache._get_tmp_dir())
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    private = found.st_uid == os.getuid() and not found.st_mode & disk.OTHERS_MAY_WRITE
    _require(stat.S_ISDIR(found.st_mode) and private, f"others may write to {folder}")


# ----------------------------------------------------------------------------------------- what it depends on


def _mapped() -> list[Path]:
    """Where passes and codegen lie, which need not be below the package."""
    from kvbuffer_compile import codegen, passes

    return [Path(str(where.__file__)).resolve().parent for where in (codegen, passes)]


def _stamps() -> dict[str, tuple[int, ...]]:
    """Every file of the package's own source, and what changes with it."""
    found: dict[str, tuple[int, ...]] = {}
    for folder in (OURS, *(elsewhere for elsewhere in _mapped() if OURS not in elsewhere.parents)):
        for at, _, names in os.walk(folder):
            for path in (os.path.join(at, name) for name in names if name.endswith(SOURCES)):
                with suppress(OSError):  # an editor's file, gone again
                    seen = os.stat(path)
                    found[path] = (seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino)
    return found


def _hashed(paths: Iterable[str]) -> str:
    seen = hashlib.sha256()
    for path in sorted(paths):
        seen.update(path.encode() + b"\0" + hashlib.sha256(Path(path).read_bytes()).digest())
    return seen.hexdigest()


_IMPORTED = _stamps()  # hashed when a key is asked for, if the files are those that were imported


@functools.cache
def source() -> str:
    """A hash of the package's source as it was imported; raises Unknown where that cannot be said any more."""
    names = {os.path.basename(path) for path in _IMPORTED}
    _require({"key.py", "rewrite.py", "entry.py"} <= names, "our own source is not on disk")
    found = _hashed(_IMPORTED)
    _require(_stamps() == _IMPORTED, "our own source has changed since it was imported")
    return found


def _environment() -> list[tuple[str, str]]:
    ours = [name for name in os.environ if name.startswith("KVBUFFER_") and name not in SILENT]
    return [(name, os.environ.get(name, "")) for name in sorted({*ours, "TRITON_INTERPRET", "CXX"})]


def _process() -> tuple[Any, ...]:
    """What is set for this process, beyond what torch's key has: the compiler of kernels above all."""
    try:
        compiler = build.fingerprint()
    except EmitError:
        compiler = "none"
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    return (compiler, *settings, torch.is_inference_mode_enabled(), torch.backends.mkldnn.enabled)


def _device(inputs: Sequence[Any], ours: Options) -> list[Any]:
    """Where the inputs lie, and what the cost model knows of these devices where it is asked."""
    devices = sorted({str(x.device) for x in inputs if isinstance(x, Tensor)})
    _require(all(device == "cpu" for device in devices), "not all inputs are on the CPU")
    by_cost = ours.flush == "auto" or ours.read_dtype == "auto" or ours.tune
    return [(device, machine.identity(device, measured=by_cost)) for device in devices]


def _sharing(inputs: Sequence[Any]) -> list[int]:
    """For each input the first with the same memory. torch's key has nothing of that."""
    memories = [storage_of(x) if isinstance(x, Tensor) else object() for x in inputs]
    return [memories.index(memory) for memory in memories]


def _input(x: Any) -> Any:
    """An input as the cost model and the storage of states see it; symbolic sizes by the values they have."""
    if isinstance(x, torch.SymInt):
        return "size", *_bounds(x)
    if isinstance(x, Tensor):
        sizes = (*map(_bounds, (*x.shape, *x.stride())), hint(x.storage_offset()))
        return type(x) is torch.nn.Parameter, str(x.dtype), sizes
    return type(x).__name__, repr(x)


def _bounds(n: int | torch.SymInt) -> tuple[Any, ...]:
    """A size, and what may become of it: bounds decide whether many tokens fit in a buffer."""
    if isinstance(n, int):
        return (n,)
    return hint(n), str(n.node.shape_env.bound_sympy(n.node.expr))


def _guards(inputs: Sequence[Any]) -> list[str]:
    """What has been decided about symbolic sizes so far."""
    sizes = [n for x in inputs for n in (x.shape if isinstance(x, Tensor) else (x,)) if isinstance(n, torch.SymInt)]
    return sorted(str(guard.expr) for guard in sizes[0].node.shape_env.guards) if sizes else []
