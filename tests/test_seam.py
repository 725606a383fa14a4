"""The seam between Rust and Python: what is public is documented, frozen, light to import and picklable."""

import ast
import inspect
import json
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import microlora as ml
from microlora import _core, exceptions

ROOT = Path(__file__).parent.parent
BINDINGS = sorted((ROOT / "rust" / "src" / "python").glob("*.rs"))
STUB = ROOT / "python" / "microlora" / "_core.pyi"
# What object documents for every class, and what only pickling and hashing call.
UNDOCUMENTED = {"__eq__", "__hash__", "__reduce__", "__new__", "__init__"}


@cache
def stub() -> dict[str, dict[str, str | None]]:
    """``{class or "": {name: docstring}}`` of the typed stub; a class's own docstring is under ``""``."""
    found: dict[str, dict[str, str | None]] = {"": {}}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[""][node.name] = ast.get_docstring(node)
        elif isinstance(node, ast.ClassDef):
            members = found.setdefault(node.name, {"": ast.get_docstring(node)})
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name not in members:
                    members[item.name] = ast.get_docstring(item)
    return found


def documentation(owner: type, name: str) -> str | None:
    """Docstring of a method where it is defined: in Python, or in the stub for a class of the core."""
    for base in owner.__mro__:
        if name not in vars(base):
            continue
        if base.__module__ == "microlora._core" or base in vars(_core).values():
            return stub()[base.__name__].get(name)
        return inspect.getdoc(vars(base)[name])
    raise AssertionError(f"{owner.__name__}.{name} is nowhere defined")


def public_methods() -> list[tuple[type, str]]:
    """Every public method and property of every public class."""
    classes = [c for c in (getattr(ml, name) for name in ml.__all__) if inspect.isclass(c)]
    found = []
    for c in classes:
        mine = [b for b in c.__mro__ if b.__module__.split(".")[0] == "microlora"]
        names = {n for b in mine for n in vars(b) if not n.startswith("_")}
        for name in sorted(names):
            value = inspect.getattr_static(c, name)
            # Fields of dataclasses, members of enums and the like stand in the class's own docstring.
            compiled = type(value).__name__ in {"getset_descriptor", "method_descriptor"}
            if compiled or callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                found.append((c, name))
    return found


@pytest.mark.parametrize("name", [n for n in ml.__all__ if n not in {"__version__"}])
def test_public_name_is_documented(name):
    value = getattr(ml, name)
    if name == "Progress":  # a type alias: its docstring is a literal below it
        return
    doc = inspect.getdoc(value)
    assert doc, f"microlora.{name} has no docstring"
    assert doc.splitlines()[0].strip(), f"microlora.{name}: empty first line"


@pytest.mark.parametrize(("owner", "name"), public_methods(), ids=lambda v: getattr(v, "__name__", v))
def test_public_method_is_documented(owner, name):
    assert documentation(owner, name), f"{owner.__name__}.{name} has no docstring"


@pytest.mark.parametrize("owner", [c for c in stub() if c])
def test_stub_documents_every_member(owner):
    missing = [n for n, doc in stub()[owner].items() if not doc and not n.startswith("__")]
    assert not missing
    assert stub()[owner][""]


def test_stub_documents_every_function():
    assert [n for n, doc in stub()[""].items() if not doc] == []


@pytest.mark.parametrize("owner", [c for c in stub() if c])
def test_compiled_methods_say_something_to_help(owner):
    cls = getattr(_core, owner)
    silent = []
    for name, value in vars(cls).items():
        described = type(value).__name__ in {"getset_descriptor", "method_descriptor", "property"}
        if described and not name.startswith("_") and not value.__doc__:
            silent.append(name)
    assert not silent
    assert cls.__doc__


def test_every_pyclass_is_frozen():
    found = 0
    for path in BINDINGS:
        for match in re.finditer(r"#\[pyclass(\(([^\]]*)\))?\]", path.read_text()):
            found += 1
            options = [o.strip() for o in (match[2] or "").split(",")]
            assert "frozen" in options, f"{path.name}: {match[0]}"
    assert found >= 6


def test_pyo3_stays_in_its_room():
    core = [p for p in (ROOT / "rust" / "src").rglob("*.rs") if p not in BINDINGS]
    assert len(core) > 20
    assert [p.name for p in core if re.search(r"\b(pyo3|numpy)::", p.read_text())] == []


@pytest.mark.parametrize("name", [n for n, v in vars(exceptions).items() if inspect.isclass(v)])
def test_exceptions_pickle_with_their_message(name):
    cls = getattr(exceptions, name)
    error = cls("x: got shape (3,), expected (4,)")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) == "x: got shape (3,), expected (4,)"


def test_all_is_sorted_and_complete():
    assert ml.__all__ == sorted(ml.__all__)
    assert len(set(ml.__all__)) == len(ml.__all__)
    for name in ml.__all__:
        assert hasattr(ml, name)


def test_import_brings_in_nothing_heavy():
    code = "import json, sys, microlora; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    roots = {name.split(".")[0] for name in json.loads(out)}
    heavy = {"rich", "matplotlib", "torch", "peft", "transformers", "safetensors", "scipy", "pytest"}
    assert "microlora" in roots
    assert roots & heavy == set()


def test_version_is_the_crates():
    manifest = (ROOT / "Cargo.toml").read_text()
    version = re.search(r'^version = "([^"]+)"', manifest, re.MULTILINE)
    assert version is not None
    assert ml.__version__ == version[1] == _core.__version__
