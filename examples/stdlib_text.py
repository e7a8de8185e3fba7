"""The text the small models learn: the source of Python's own standard library, from this interpreter."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
# Generated when the interpreter was built: they hold paths of the machine it was built on.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT_FILES = 10


@dataclass(frozen=True)
class Corpus:
    """Byte values (int64, 1-D) of the training and of the held-out files, and the names of the latter."""

    train: Tensor
    held_out: Tensor
    held_out_names: list[str]
    digest: str  # of the training bytes: the same digest, seed and versions give the same model


def library_files(root: Path) -> list[Path]:
    """Return the ASCII .py files below `root` in sorted order, less what is skipped or generated."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        skipped = SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts)
        if not skipped and path.read_bytes().isascii():
            found.append(path)
    return found


def read_corpus() -> Corpus:
    """Read the standard library of this interpreter; every n-th file, 10 in all, is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = library_files(root)
    stride = len(files) // HELD_OUT_FILES
    held_out = files[stride // 2 :: stride][:HELD_OUT_FILES]
    train_bytes = b"\n\n".join(path.read_bytes() for path in files if path not in held_out)
    held_out_bytes = b"\n\n".join(path.read_bytes() for path in held_out)
    return Corpus(
        train=torch.frombuffer(bytearray(train_bytes), dtype=torch.uint8).long(),
        held_out=torch.frombuffer(bytearray(held_out_bytes), dtype=torch.uint8).long(),
        held_out_names=[path.relative_to(root).as_posix() for path in held_out],
        digest=hashlib.sha256(train_bytes).hexdigest()[:16],
    )
