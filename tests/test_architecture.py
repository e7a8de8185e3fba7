"""The shape of the source: which module may import which, how long files and functions may be.

Nothing is imported here; every file is parsed. `LEVELS` is the whole rule: a module imports from lower
levels, or from its own, and the imports have no cycle. A new module must be given a level.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "kvbuffer_compile"
MAPPED = ("passes", "codegen")  # folders at the top that are sub-packages to Python

LEVELS = {
    "errors": 0,
    "options": 0,
    "afresh": 0,
    "at_once": 0,
    "surroundings": 0,
    "disk": 1,
    "ir": 1,
    "text": 1,
    "memory": 2,
    "ahead": 4,
    "sequence": 2,
    "plan": 2,
    "machine": 2,
    "passes": 3,
    "codegen": 3,
    "composite": 4,
    "overlap": 2,
    "tree": 4,
    "drafts": 4,
    "sharing": 2,
    "forks": 2,
    "locks": 2,
    "attempt": 2,
    "dispatch_watch": 4,
    "guard": 4,
    "aliases": 4,
    "buffers": 4,
    "accounts": 4,
    "ledger": 4,
    "fresh": 4,
    "opening": 4,
    "access": 4,
    "entry": 4,
    "ops": 4,
    "slots": 4,
    "take_back": 4,
    "runtime": 4,
    "step": 4,
    "loops": 4,
    "gradients": 4,
    "check": 4,
    "cut_step": 4,
    "targets": 4,
    "dump": 4,
    "recurrences": 4,
    "records": 4,
    "report": 4,
    "report_html": 4,
    "report_plot": 4,
    "integrations": 5,
    "backend": 6,
    "explain": 6,
    "doctor": 6,
    "workload": 6,
    "emit": 6,
    "bench": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 7,
}
FILE_LINES = 300
FUNCTION_LINES = 60
# File -> why it may be longer than FILE_LINES. Only for templates of kernels.
LONG_FILES: dict[str, str] = {}
# Names that say nothing about what a module holds.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def package_files() -> dict[str, Path]:
    """Dotted module name -> file, each file once and never through a link."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if not any((ROOT / PACKAGE / folder) in path.parents for folder in MAPPED):
            files[module_name(path.relative_to(ROOT))] = path
    for folder in MAPPED:
        for path in sorted((ROOT / folder).glob("*.py")):
            files[module_name(PACKAGE / path.relative_to(ROOT))] = path
    return files


def module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    """Every Python file that is not a test."""
    scripts = [p for folder in ("examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    return sorted([*package_files().values(), *scripts])


def family(module: str) -> str:
    """The key of LEVELS that a module falls under: kvbuffer_compile.passes.lift -> passes."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of the package, wherever in the file, those for types included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in modules else node.module for name in deeper]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == PACKAGE)


def import_violations(sources: dict[str, str]) -> list[str]:
    """What breaks the rule of LEVELS in a package given as dotted name -> source text."""
    problems = []
    graph = networkx.DiGraph()
    for module, source in sources.items():
        for line, target in imports(source, set(sources)):
            graph.add_edge(module, target)
            ours, theirs = family(module), family(target)
            if theirs not in LEVELS or ours not in LEVELS:
                continue  # test_every_module_has_a_level names it
            if LEVELS[theirs] > LEVELS[ours] or {ours, theirs} == set(MAPPED):
                problems.append(f"{module}:{line} imports {target}")
    cycles = [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    return problems + [f"cycle: {' <-> '.join(cycle)}" for cycle in cycles]


def style_violations(source: str) -> list[str]:
    """Relative imports, and imports of the mapped folders as if they were top-level modules."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            problems.append(f"{node.lineno}: relative import")
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        problems += [f"{node.lineno}: import of {n}" for n in names if n.split(".")[0] in MAPPED]
    return problems


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_module_has_a_level() -> None:
    unknown = [name for name in package_files() if family(name) not in LEVELS]
    assert not unknown, f"give these a level in LEVELS: {unknown}"


def test_imports_go_one_way() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in package_files().items()}
    assert len(sources) > 5, "the source was not found"
    assert not import_violations(sources)


@pytest.mark.parametrize("folder", [".", "tests"])
def test_imports_are_absolute(folder: str) -> None:
    files = source_files() if folder == "." else sorted((ROOT / folder).rglob("*.py"))
    found = {relative(p): style_violations(p.read_text(encoding="utf-8")) for p in files}
    assert not {name: problems for name, problems in found.items() if problems}


def test_files_and_functions_stay_short() -> None:
    too_long = {}
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        problems = long_functions(text)
        if len(text.splitlines()) > FILE_LINES and relative(path) not in LONG_FILES:
            problems.append(f"{len(text.splitlines())} lines, {FILE_LINES} allowed")
        if problems:
            too_long[relative(path)] = problems
    assert not too_long


def test_exceptions_are_still_needed() -> None:
    for name in LONG_FILES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > FILE_LINES, name


def test_module_names_say_something() -> None:
    assert not [relative(p) for p in source_files() if p.stem in EMPTY_NAMES]


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_flat(folder: str) -> None:
    """The package list of pyproject.toml names the folder itself; a deeper one would miss the wheel."""
    assert not [relative(p) for p in (ROOT / folder).glob("*/**/*.py")]


@pytest.mark.parametrize("folder", MAPPED)
def test_links_are_relative_and_point_right(folder: str) -> None:
    link = ROOT / PACKAGE / folder
    target = link.readlink().as_posix() if link.is_symlink() else link.read_text(encoding="utf-8").strip()
    assert target == f"../{folder}"
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "--", relative(link)], cwd=ROOT, capture_output=True, text=True
    ).stdout
    if listed:  # empty outside a git checkout
        assert listed.startswith("120000"), f"git stores {relative(link)} as a file, not as a link"


# The checks above must be able to fail.

SOUND = {
    "kvbuffer_compile": "from kvbuffer_compile.backend import kvbuffer",
    "kvbuffer_compile.ir": "import kvbuffer_compile.errors",
    "kvbuffer_compile.errors": "import ast",
    "kvbuffer_compile.passes": "from kvbuffer_compile.passes.lift import lift",
    "kvbuffer_compile.passes.lift": "from kvbuffer_compile.passes import labels; import kvbuffer_compile.ir",
    "kvbuffer_compile.passes.labels": "",
    "kvbuffer_compile.codegen": "",
    "kvbuffer_compile.backend": "from kvbuffer_compile import passes, codegen",
}


def test_a_sound_package_passes() -> None:
    assert import_violations(SOUND) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvbuffer_compile.ir", "from kvbuffer_compile import backend"),
        ("kvbuffer_compile.ir", "def f():\n    import kvbuffer_compile.passes.lift"),
        ("kvbuffer_compile.passes.labels", "from kvbuffer_compile.codegen import calls"),
        ("kvbuffer_compile.codegen", "import kvbuffer_compile.passes"),
        ("kvbuffer_compile.passes.labels", "from kvbuffer_compile.passes import lift"),
        ("kvbuffer_compile.errors", "import kvbuffer_compile"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert import_violations({**SOUND, module: source})


@pytest.mark.parametrize("source", ["from . import ir", "import passes", "from codegen.cpp import emit"])
def test_a_wrong_spelling_is_found(source: str) -> None:
    assert style_violations(source)


def test_a_long_function_is_found() -> None:
    body = "\n".join("    pass" for _ in range(FUNCTION_LINES))
    assert long_functions(f"class C:\n  def f():\n{body}") == ["f: 61 lines"]
