"""Check an installed release: `python -I check_release.py VERSION yes|no README.md`, outside of the checkout.

yes: torch is there, and the decode loop of the README runs. no: what needs no torch is checked.
"""

import compileall
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

version, torch, readme = sys.argv[1:]
site = Path(importlib.util.find_spec("kvbuffer_compile").origin).parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-I", "-m", "kvbuffer_compile", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


assert importlib.metadata.version("kvbuffer_compile") == version
assert compileall.compile_dir(site, quiet=1, force=True), "a file does not compile on this Python"
assert command("--version").stdout == f"kvbuffer_compile {version}\n"
assert command("emit", "--help").returncode == 0
doctor = command("doctor")
if torch == "no":
    assert doctor.returncode == 1 and re.search(r"bad +torch +not installed", doctor.stdout), (
        doctor.stdout + doctor.stderr
    )
    done = "sources compile, command line"
else:
    blocks = re.findall(r"```python\n(.*?)```", Path(readme).read_text(encoding="utf-8"), re.S)
    loop = next(block for block in blocks if "def gla_step" in block)
    check = (
        "\nimport kvbuffer_compile\nassert kvbuffer_compile.stats(state).total('steps') == 40 and state.norm() > 0\n"
    )
    ran = subprocess.run([sys.executable, "-"], input=loop + check, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    done = "sources compile, command line, the README's decode loop"
print(f"Python {sys.version.split()[0]}: {done}")
