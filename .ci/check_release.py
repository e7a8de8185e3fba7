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

CHECK = """
import kvbuffer_compile

run = torch.compile(gdn_step, backend="kvbuffer", options={"flush": 4})
state, plain = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)
with torch.no_grad():
    for _ in range(10):
        q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 2, 16), dim=-1)
        beta, decay = torch.rand(2, 2, 2)
        torch.testing.assert_close(run(state, q, k, v, beta, decay), gdn_step(plain, q, k, v, beta, decay))
assert kvbuffer_compile.stats(state).total("steps") == 10, "nothing was buffered"
torch.testing.assert_close(state.clone(), plain)
"""
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
    loop = next(block for block in blocks if "def gdn_step" in block)
    ran = subprocess.run([sys.executable, "-"], input=loop + CHECK, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    done = "sources compile, command line, the README's decode loop"
print(f"Python {sys.version.split()[0]}: {done}")
