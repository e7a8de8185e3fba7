"""The oldest and the newest supported transformers on the pinned torch:  nox

One of them:  nox -s "tests(transformers='5.17.0')"

Each session installs torch from the same place as `make test` does: point pip at PyTorch's index for a CPU wheel.
"""

from __future__ import annotations

import nox

TORCH = "2.13.0"
MODELS = ("tests/models", "tests/lift/test_sequence.py", "tests/lift/test_lift.py")
nox.options.default_venv_backend = "venv"


@nox.session
def fla(session: nox.Session) -> None:
    """The tests of flash-linear-attention, which cannot share an environment with those of transformers."""
    session.install(f"torch=={TORCH}")
    session.install("-e", ".[test,fla]")
    session.run("pytest", "tests/lift/test_fla.py", "tests/lift/test_fused.py", *session.posargs)


@nox.session
@nox.parametrize("transformers", ["5.17.0", "newest"])
def tests(session: nox.Session, transformers: str) -> None:
    """The tests that touch models. With the newest transformers, all tests."""
    wanted = "transformers" if transformers == "newest" else f"transformers=={transformers}"
    session.install(f"torch=={TORCH}")
    session.install("-e", ".[test]", wanted)
    session.run("pytest", *([] if transformers == "newest" else MODELS), *session.posargs)
