"""Lines covered by the tests, Rust and Python together: `make coverage`.

The crate is built with rustc's own instrumentation into a target folder of its own; the Rust tests and the
extension under pytest both write profiles, which llvm-profdata and llvm-cov read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "coverage"
TARGET = ROOT / "target" / "coverage"
MISSING = (
    "coverage needs llvm-profdata and llvm-cov of LLVM 19 or newer, and none on this machine reads what this "
    "rustc writes: run `rustup component add llvm-tools`, or install your system's package of that version "
    "(on Debian 12: apt-get install llvm-19)."
)
Counts = dict[str, tuple[int, int]]
"""File to (lines covered, lines)."""


def run(*command: str | Path, env: dict[str, str] | None = None, capture: bool = False) -> str:
    """Runs one step from the root; its failure ends the program with the step's own status."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env=os.environ | (env or {}),
        check=False,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def tool_pairs() -> Iterator[tuple[str, str]]:
    """llvm-profdata and llvm-cov: those of the toolchain first, then the system's, newest first."""
    sysroot = Path(run("rustc", "--print", "sysroot", capture=True).strip())
    for profdata in sysroot.glob("lib/rustlib/*/bin/llvm-profdata"):
        yield str(profdata), str(profdata.with_name("llvm-cov"))
    for suffix in [*(f"-{version}" for version in range(40, 18, -1)), ""]:
        pair = shutil.which(f"llvm-profdata{suffix}"), shutil.which(f"llvm-cov{suffix}")
        if pair[0] and pair[1]:
            yield pair[0], pair[1]


def find_tools() -> tuple[str, str]:
    """The first pair that reads a profile of the present rustc."""
    probe = WORK / "probe"
    (WORK / "probe.rs").write_text("fn main() {}\n", encoding="utf-8")
    run("rustc", "-Cinstrument-coverage", WORK / "probe.rs", "-o", probe)
    run(probe, env={"LLVM_PROFILE_FILE": f"{probe}.profraw"})
    for profdata, cov in tool_pairs():
        merge = [profdata, "merge", "-sparse", f"{probe}.profraw", "-o", f"{probe}.profdata"]
        report = [cov, "report", str(probe), f"--instr-profile={probe}.profdata"]
        if all(subprocess.run(c, capture_output=True, check=False).returncode == 0 for c in (merge, report)):
            return profdata, cov
    sys.exit(MISSING)


def built(messages: str) -> list[Path]:
    """Test programs among cargo's messages."""
    found = []
    for line in messages.splitlines():
        message: dict[str, Any] = json.loads(line)
        if message.get("executable") and message.get("profile", {}).get("test"):
            found.append(Path(message["executable"]))
    return found


def rust_tests(environment: dict[str, str]) -> list[Path]:
    """Builds and runs the crate's tests; the programs."""
    cargo = ("cargo", "test", "--locked", "--lib", "--tests")
    programs = built(run(*cargo, "--no-run", "--message-format=json", env=environment, capture=True))
    run(*cargo, "--quiet", env=environment)
    return programs


def python_tests(environment: dict[str, str]) -> tuple[Path, Counts]:
    """Builds the extension, runs pytest on it; the extension and Python's counts."""
    run("cargo", "build", "--locked", "--lib", "--features", "python", env=environment)
    package = WORK / "package" / "microlora"
    package.mkdir(parents=True)
    for source in (ROOT / "python" / "microlora").iterdir():
        if source.suffix != ".so" and source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    extension = package / "_core.abi3.so"
    shutil.copy(TARGET / "debug" / "libmicrolora.so", extension)
    data = {"COVERAGE_FILE": str(WORK / "python.data"), "PYTHONPATH": str(package.parent)}
    python = (sys.executable, "-m", "coverage")
    run(*python, "run", "-m", "pytest", "-q", env=environment | data)
    run(*python, "combine", "--quiet", env=data)
    run(*python, "json", "--quiet", "-o", WORK / "python.json", env=data)
    files = json.loads((WORK / "python.json").read_text(encoding="utf-8"))["files"]
    return extension, {
        name: (f["summary"]["covered_lines"], f["summary"]["num_statements"]) for name, f in files.items()
    }


def rust_counts(tools: tuple[str, str], objects: list[Path]) -> Counts:
    """Counts of the crate's sources over all profiles."""
    profdata, cov = tools
    merged = WORK / "rust.profdata"
    (WORK / "profiles.txt").write_text("\n".join(map(str, (WORK / "profiles").iterdir())), encoding="utf-8")
    run(profdata, "merge", "-sparse", "--failure-mode=all", "-f", WORK / "profiles.txt", "-o", merged)
    args: list[str | Path] = [
        objects[0],
        *(f"--object={o}" for o in objects[1:]),
        f"--instr-profile={merged}",
    ]
    report = json.loads(run(cov, "export", "--summary-only", "--skip-expansions", *args, capture=True))
    counts = {}
    for f in report["data"][0]["files"]:
        path = Path(f["filename"])
        if path.is_relative_to(ROOT / "rust"):
            lines = f["summary"]["lines"]
            counts[str(path.relative_to(ROOT))] = (lines["covered"], lines["count"])
    return counts


def share(counts: Counts) -> tuple[int, int, float]:
    """Covered, all, percent."""
    covered, total = (sum(c[i] for c in counts.values()) for i in (0, 1))
    return covered, total, 100.0 * covered / max(total, 1)


def main() -> int:
    """Runs everything; exit 1 below the wanted share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fail-under", type=float, default=0.0, metavar="PERCENT")
    least = parser.parse_args().fail_under
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "profiles").mkdir(parents=True)
    tools = find_tools()
    environment = {
        "CARGO_TARGET_DIR": str(TARGET),
        "RUSTFLAGS": "-Cinstrument-coverage",
        "CARGO_PROFILE_DEV_OPT_LEVEL": "1",
        "CARGO_PROFILE_DEV_DEBUG": "0",
        "LLVM_PROFILE_FILE": str(WORK / "profiles" / "%p-%m.profraw"),
    }
    programs = rust_tests(environment)
    extension, python = python_tests(environment)
    rust = rust_counts(tools, [*programs, extension])
    for name, (covered, total) in sorted((python | rust).items()):
        print(f"{re.sub(r'^build/coverage/package', 'python', name):48} {covered:5} of {total:5}")
    for label, counts in (("Python", python), ("Rust", rust), ("together", python | rust)):
        covered, total, percent = share(counts)
        print(f"{label:48} {covered:5} of {total:5}  {percent:.1f} %")
    if percent < least:
        print(f"coverage: {percent:.1f} % is under {least:g} %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
