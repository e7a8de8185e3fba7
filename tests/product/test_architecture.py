"""The shape of the source: which folder may import which, how full folders and how long files and functions may be.

Nothing is imported here; every file is parsed. `LAYERS` is the whole rule: a module imports from lower layers, or from
its own folder, and the imports have no cycle. A new folder must be given a layer. docs/architecture.md draws them.
"""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kvbuffer_compile"
MAPPED = ("passes", "codegen")  # folders at the top that are sub-packages to Python

# Folders, and modules that stand in none, from the lowest; those of one layer do not know each other.
LAYERS = [
    ["errors", "limits", "process", "passes", "passes.reading", "integrations", "integrations.functions"],
    ["options", "machine", "ir", "capture", "codegen", "codegen.source"],
    ["passes.lifted", "passes.algebra", "codegen.calls", "codegen.schedule", "codegen.example"],
    ["passes.walk", "passes.storage", "passes.choice", "codegen.cut", "codegen.triton.tiles"],
    ["records", "passes.tokens", "passes.proof", "codegen.cpp", "codegen.triton"],
    ["codegen.build", "passes.lift", "passes.rewrite"],
    ["codegen.standalone", "native"],
    ["guard"],
    ["steps"],
    ["accounts", "report", "planning"],
    ["runtime", "said"],
    ["warm"],
    ["backend", "integrations.transformers"],
    ["explanation"],
    ["public"],
    ["__init__"],
    ["commands"],
    ["__main__"],
]
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}
OPEN = ("", "passes", "codegen")  # folders in which each module has a layer of its own
MODULES = 14  # of a folder
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
        for path in sorted((ROOT / folder).rglob("*.py")):
            files[module_name(PACKAGE / path.relative_to(ROOT))] = path
    return files


def module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    """Every Python file that is not a test."""
    scripts = [p for folder in ("examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    return sorted([*package_files().values(), *scripts])


def family(module: str, modules: set[str]) -> str:
    """The key of LEVELS that a module falls under: its folder, or itself where it stands in none."""
    inner = module.removeprefix(PACKAGE).removeprefix(".")
    if any(m.startswith(f"{module}.") for m in modules):  # a folder's own __init__
        return inner or "__init__"
    folder = inner.rpartition(".")[0]
    return inner if folder in OPEN else folder


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
            ours, theirs = (family(m, set(sources)) for m in (module, target))
            if theirs not in LEVELS or ours not in LEVELS:
                continue  # test_every_folder_has_a_layer names it
            parted = {ours.split(".")[0], theirs.split(".")[0]} == set(MAPPED)
            if ours != theirs and (LEVELS[theirs] >= LEVELS[ours] or parted):
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


def test_every_folder_has_a_layer() -> None:
    files = package_files()
    found = {family(name, set(files)) for name in files}
    assert found == set(LEVELS), "give these a layer in LAYERS, or take them out of it"


def test_no_folder_is_crowded() -> None:
    count = Counter(path.parent for path in package_files().values())
    assert not {relative(folder): n for folder, n in count.items() if n > MODULES}


def test_every_folder_says_what_it_is() -> None:
    """What goes in, what comes out, where to start reading, and what it never imports."""
    for name, path in package_files().items():
        if path.name == "__init__.py" and name != PACKAGE:
            told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert len(told.splitlines()) >= 4 or name.endswith("integrations"), name
            for file in (w.strip(".,;()") for w in told.split() if w.strip(".,;()").endswith(".py")):
                assert any((at / file).exists() for at in (path.parent, path.parents[1])), f"{name}: {file}"


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
    "kvbuffer_compile.ir": "",
    "kvbuffer_compile.ir.program": "import kvbuffer_compile.errors",
    "kvbuffer_compile.errors": "import ast",
    "kvbuffer_compile.passes": "",
    "kvbuffer_compile.passes.lift": "",
    "kvbuffer_compile.passes.lift.lift": "from kvbuffer_compile.passes.reading import labels",
    "kvbuffer_compile.passes.reading": "",
    "kvbuffer_compile.passes.reading.labels": "",
    "kvbuffer_compile.passes.reading.forms": "from kvbuffer_compile.passes.reading import labels",
    "kvbuffer_compile.passes.proof": "",
    "kvbuffer_compile.passes.proof.validate": "",
    "kvbuffer_compile.codegen": "",
    "kvbuffer_compile.codegen.calls": "",
    "kvbuffer_compile.codegen.cpp": "",
    "kvbuffer_compile.codegen.cpp.cpp": "import kvbuffer_compile.codegen.calls, kvbuffer_compile.ir.program",
    "kvbuffer_compile.backend": "from kvbuffer_compile.passes.lift.lift import lift",
}


def test_a_sound_package_passes() -> None:
    assert import_violations(SOUND) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvbuffer_compile.ir.program", "from kvbuffer_compile import backend"),
        ("kvbuffer_compile.ir.program", "def f():\n    import kvbuffer_compile.passes.lift.lift"),
        ("kvbuffer_compile.passes.lift.lift", "from kvbuffer_compile.codegen import calls"),
        ("kvbuffer_compile.codegen.cpp.cpp", "from kvbuffer_compile.passes.reading import labels"),
        ("kvbuffer_compile.passes.reading.labels", "from kvbuffer_compile.passes.lift import lift"),
        ("kvbuffer_compile.passes.proof.validate", "from kvbuffer_compile.passes.lift.lift import lift"),
        ("kvbuffer_compile.passes.reading.labels", "from kvbuffer_compile.passes.reading import forms"),
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
