"""What is installed: metadata, pins, the backend's entry point, and the contents of a wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ENTRY_POINT = PROJECT["entry-points"]["torch_dynamo_backends"]["kvbuffer"]


def folder_of(package: str) -> Path:
    """Where setuptools takes a package from."""
    for name, folder in SETUPTOOLS["package-dir"].items():
        if package == name or package.startswith(f"{name}."):
            return ROOT / (folder + package.removeprefix(name).replace(".", "/"))
    return ROOT / package.replace(".", "/")


def pins(name: str) -> dict[str, str]:
    """Canonical name -> version of each `name==version` line."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(package): version for package, version in pairs}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def test_package_list_is_complete() -> None:
    folders = (ROOT / "kvbuffer_compile", ROOT / "passes", ROOT / "codegen")
    on_disk = {p.parent.resolve() for folder in folders for p in folder.rglob("__init__.py")}
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == on_disk


def test_every_dependency_is_pinned_inside_its_range() -> None:
    pinned = pins("constraints.txt")
    for requirement in requirements():
        if requirement.name == "triton":
            continue  # the CUDA wheel of torch requires one exact version: see constraints.txt
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(version), f"{requirement} excludes its pin {version}"


def test_entry_point_names_a_function() -> None:
    """Also holds where the project is not installed; the next test needs it to be."""
    module, function = ENTRY_POINT.split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_torch_finds_the_backend() -> None:
    import torch._dynamo

    try:
        importlib.metadata.distribution(PROJECT["name"])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kvbuffer_compile is not installed")
    assert "kvbuffer" in torch._dynamo.list_backends(exclude_tags=())
    assert callable(torch._dynamo.lookup_backend("kvbuffer"))


def test_packages_import_without_being_installed() -> None:
    """From the root of the checkout, with no editable finder: -S leaves out what .pth files would add."""
    if not (ROOT / "kvbuffer_compile" / "passes").is_symlink():
        pytest.skip("this checkout has no symbolic links: the project must be installed")
    packages = SETUPTOOLS["packages"]
    paths = [str(ROOT), *(p for p in sys.path if "site-packages" in p)]
    imported = f"for name in {packages!r}: print(importlib.import_module(name).__file__)"
    script = f"import sys, importlib; sys.path[:0] = {paths!r}\n{imported}"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [Path(line).resolve() for line in done.stdout.split()]
    assert found == [folder_of(package) / "__init__.py" for package in packages]


def copy_of_checkout(target: Path, links: bool) -> Path:
    """The files of the project; without `links`, as git checks them out where it cannot make links."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("kvbuffer_compile", "passes", "codegen"):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=skip)
    for folder in () if links else ("passes", "codegen"):
        (target / "kvbuffer_compile" / folder).unlink()
        (target / "kvbuffer_compile" / folder).write_text(f"../{folder}", encoding="utf-8")
    return target


@pytest.mark.nightly
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path, links: bool) -> None:
    source = copy_of_checkout(tmp_path / "source", links)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package in SETUPTOOLS["packages"]
        for path in folder_of(package).iterdir()  # whatever its suffix: sources of extensions, headers, py.typed
        if path.is_file()
    }
    assert names == expected


def test_the_version_is_in_one_place() -> None:
    tree = ast.parse((ROOT / "kvbuffer_compile" / "__init__.py").read_text(encoding="utf-8"))
    (version,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{version}]" in changes and "\n## [Unreleased]" in changes


def test_everybody_names_the_same_pythons() -> None:
    """pyproject.toml, the Makefile, doctor and the release check."""
    from kvbuffer_compile.commands.doctor import PYTHON

    (first, last) = ((major, minor) for major, minor in PYTHON)
    wanted = Requirement(f"x{PROJECT['requires-python']}").specifier
    supported = {n for n in range(8, 20) if wanted.contains(f"3.{n}")}
    assert supported == set(range(first[1], last[1] + 1))
    classified = {c.rpartition("3.")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert classified == {str(n) for n in supported}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"not {first} <= sys.version_info[:2] <= {last}" in makefile
    for n in supported:
        assert f"python3.{n}" in makefile and f"python3.{n}" in (ROOT / ".ci" / "release_check").read_text()


def test_importing_the_integration_without_transformers_says_what_to_install() -> None:
    script = "import sys; sys.modules['transformers'] = None; import kvbuffer_compile.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "pip install 'kvbuffer_compile[transformers]'" in done.stderr.splitlines()[-1]


def test_the_release_check_runs_what_the_readme_has() -> None:
    (wanted,) = re.findall(r'if "(def \w+)" in block', (ROOT / ".ci" / "check_release.py").read_text(encoding="utf-8"))
    assert f"{wanted}(" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_a_release_installs_and_runs() -> None:
    venv = {"VENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run([ROOT / ".ci" / "release_check"], capture_output=True, text=True, env=os.environ | venv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the README's decode loop" in done.stdout
