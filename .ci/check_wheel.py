"""Check the installed wheel: `python check_wheel.py SITE_PACKAGES`, run outside the checkout.

Fails unless the package and its two mapped sub-packages come from SITE_PACKAGES, no top-level `passes`
or `codegen` came along, and torch lists the backend without an import of ours.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch._dynamo

site = Path(sys.argv[1]).resolve()

assert "kvbuffer_compile" not in sys.modules, "torch imported the package before it was asked to"
assert "kvbuffer" in torch._dynamo.list_backends(exclude_tags=()), "the backend's entry point is missing"
for name in ("kvbuffer_compile", "kvbuffer_compile.passes", "kvbuffer_compile.codegen"):
    origin = Path(str(importlib.import_module(name).__file__)).resolve()
    assert origin == site / name.replace(".", "/") / "__init__.py", f"{name} came from {origin}"
    print(f"{name}: {origin.relative_to(site)}")
for name in ("passes", "codegen", "tests", "examples"):
    assert not (site / name).exists(), f"the wheel installed a top-level {name}"
    found = importlib.util.find_spec(name) if name in ("passes", "codegen") else None
    assert found is None, f"{name} is importable: {found}"
assert callable(torch._dynamo.lookup_backend("kvbuffer"))
print("backend: kvbuffer")
