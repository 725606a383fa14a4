"""Every Python block of README.md and docs/ runs, every example runs, and local links lead somewhere."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import microlora as ml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(#[^)\s]*)?\)")

BLOCKS = [
    pytest.param(match[1], id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in FENCE.finditer(page.read_text())
]
# The command line draws and the demo reads a corpus: their own tests run them.
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(ml.__path__, "microlora.")
    if not name.startswith(("microlora.cli", "microlora.demo", "microlora._core", "microlora.__main__"))
]


def run(arguments, folder):
    """Runs this interpreter with warnings as errors, away from the repository."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path):
    done = run(["-c", block], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_runs(path, tmp_path):
    assert len(path.read_text().splitlines()) < 60
    done = run([str(path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"
    assert list(tmp_path.iterdir()) == [], "an example cleans up"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page):
    targets = [m[1] for m in LINK.finditer(page.read_text()) if "://" not in m[1]]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_something_is_tested():
    assert any("README" in str(block.id) for block in BLOCKS)
    assert len(EXAMPLES) >= 3


def test_figures_are_those_that_were_measured():
    """README and the generated pages say what docs/data holds."""
    done = run([str(ROOT / "docs" / "build.py"), "--check"], ROOT)
    assert done.returncode == 0, done.stderr
