"""What `make` says where something it needs is missing: one clear sentence, no stack trace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None or sys.platform != "linux", reason="needs make on Linux")

CARGO = "#!/bin/sh\necho 'cargo 1.95.0 (f2d3ce0bd 2026-03-21)'\n"
OLD_CARGO = "#!/bin/sh\necho 'cargo 1.70.0 (ec8a8a0ca 2023-04-25)'\n"
BROKEN_CARGO = "#!/bin/sh\necho 'no toolchain' >&2\nexit 1\n"
# Runs the Makefile's own probe in this interpreter, after a change to what the probe sees.
PYTHON = """#!{python}
import sys, sysconfig, importlib.util
if "--version" in sys.argv:
    sys.exit(print("Python"))
{change}
exec(sys.argv[sys.argv.index("-c") + 1])
"""


def tools(tmp_path, **programs):
    """Runs `make tools` with these scripts first on PATH and nothing of ours behind them."""
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    for name in ("sh", "awk", "find"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    assert MAKE is not None
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))}
    return subprocess.run(
        [MAKE, "-C", str(ROOT), "--no-print-directory", "tools"],
        env=environment | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )


def python(change=""):
    return PYTHON.format(python=sys.executable, change=change)


def test_all_there(tmp_path):
    done = tools(tmp_path, cargo=CARGO, python3=python())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ({"python3": python()}, "needs Rust 1.89 or newer to build, and no working 'cargo' was found"),
        ({"cargo": BROKEN_CARGO, "python3": python()}, "no working 'cargo' was found"),
        ({"cargo": OLD_CARGO, "python3": python()}, "this is cargo 1.70.0"),
        ({"cargo": CARGO}, "needs Python 3.11 or newer, and no working 'python3' was found"),
        ({"cargo": CARGO, "python3": python("sys.version_info = (3, 10, 13)")}, "needs Python 3.11 or newer"),
        (
            {"cargo": CARGO, "python3": python("sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1")},
            "does not support free-threaded CPython yet",
        ),
        (
            {"cargo": CARGO, "python3": python("importlib.util.find_spec = lambda name: None")},
            "lacks the venv module",
        ),
    ],
    ids=["no-cargo", "broken-cargo", "old-cargo", "no-python", "old-python", "free-threaded", "no-venv"],
)
def test_what_is_missing_is_one_sentence(tmp_path, programs, sentence):
    done = tools(tmp_path, **programs)
    assert done.returncode != 0
    said, *rest = done.stderr.splitlines()
    assert sentence in said
    assert [line for line in rest if not line.startswith("make")] == []
