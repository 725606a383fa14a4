"""The command line: what it prints, what it refuses, and how it stops."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from microlora import cli
from microlora.demo import report, session
from microlora.demo.corpus import Corpus, Pair

SOURCE = Path(cli.__file__).parents[2]
WORDS = ["open", "close", "read", "write", "parse", "send", "header", "socket", "file", "line"]


def tiny_corpus():
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(120):
        a, b, c, d = rng.choice(WORDS, 4)
        pairs.append(
            Pair(f"{a} the {b} number{i} now", f"{a}_{b}(x):\n{c}({d}, number{i})", f"m{i % 3}", f"p.{i}")
        )
    return Corpus(tuple(pairs))


@pytest.fixture
def demo(monkeypatch, tmp_path, capsys):
    """Run ``microlora demo`` on a tiny corpus; gives (exit code, standard output, standard error)."""
    monkeypatch.setattr(session, "read_corpus", lambda **_: tiny_corpus())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = cli.main(["demo", "--personas", "3", "--rank", "4", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_table_holds_what_was_measured(demo, tmp_path):
    pytest.importorskip("rich")
    code, out, err = demo()
    assert code == 0, err
    for word in ("m0", "m1", "m2", "mean", "before", "at 10", "all", "others", "p50", "p99"):
        assert word in out
    for word in ("none", "random A, SGD", "instant (RLS)", "rank every held-out query the same", "bytes"):
        assert word in out
    assert all(len(line) <= 80 for line in out.splitlines() if "saved in" not in line)
    folder = tmp_path / "xdg" / "microlora" / "adapters" / "lsa-r4-seed0"
    assert sorted(file.stem for file in folder.iterdir()) == ["m0", "m1", "m2"]
    assert "fitted in" in out
    assert "read from the cache" in demo()[1]


def test_json_holds_the_same_and_needs_no_rich(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "microlora.cli.demo_view", raising=False)
    code, out, err = demo(
        "--json", "--save-dir", tmp_path / "mine", "--cache-dir", tmp_path / "c", "--seed", 3
    )
    got = json.loads(out)
    assert (code, err) == (0, "")
    assert [row["persona"] for row in got["personas"]] == ["m0", "m1", "m2"]
    assert (got["rank"], got["seed"], got["pairs"]) == (4, 3, 120)
    assert got["overall"]["clicks"] == 60
    assert got["saved"]["reloaded_ranks_equal"] is True
    assert len(list((tmp_path / "mine").iterdir())) == 3
    assert len(list((tmp_path / "c" / "encoders").iterdir())) == 1
    assert not (tmp_path / "xdg").exists()


def test_rank_and_seed_have_an_effect(demo, tmp_path):
    def result(*arguments):
        got = json.loads(demo("--json", *arguments)[1])
        return [row["after_all"] for row in got["personas"]], got["saved"]["parameters"]

    assert result("--seed", 1) == result("--seed", 1)
    assert result("--seed", 1)[0] != result("--seed", 2)[0]
    assert result("--rank", 8)[1] == 2 * result("--rank", 4)[1]


def test_one_persona_learns_alone_and_others_are_still_measured(demo):
    got = json.loads(demo("--json", "--persona", "m1")[1])
    assert [row["persona"] for row in got["personas"]] == ["m1"]
    assert got["personas"][0]["others_change"] is not None
    assert got["saved"]["files"] == 1
    alone = json.loads(demo("--json", "--personas", 1)[1])
    assert alone["personas"][0]["others_change"] is None


def test_ask_shows_hits_with_and_without(demo, tmp_path):
    pytest.importorskip("rich")
    code, out, _ = demo("--ask", "open the [file]", "--persona", "m2")
    assert code == 0
    assert "no adapter" in out
    assert "m2" in out
    assert "m0" not in out
    got = json.loads(demo("--json", "--ask", "open the file")[1])
    assert [answer["persona"] for answer in got["with"]] == ["m0", "m1", "m2"]
    assert len(got["without"]) == 5
    assert not (tmp_path / "xdg" / "microlora" / "adapters").exists()


@pytest.mark.parametrize("suffix", ["png", "svg", "PDF"])
def test_plot_draws_a_file(demo, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"out.{suffix}"
    code, _, err = demo("--json", "--plot", path)
    assert code == 0, err
    assert path.stat().st_size > 2000
    assert not list(tmp_path.glob(".out*"))


def test_an_encoder_of_ones_own(demo, tmp_path, monkeypatch):
    (tmp_path / "my_encoder_.py").write_text(
        "import numpy as np\n"
        "class Letters:\n"
        "    name, dim, fits = 'letters', 26, 0\n"
        "    def fit(self, texts): Letters.fits += 1\n"
        "    def encode(self, texts):\n"
        "        return np.array([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    got = json.loads(demo("--json", "--encoder", "my_encoder_:Letters")[1])
    assert got["encoder"]["name"] == "letters"
    assert got["encoder"]["dim"] == 26
    assert sys.modules["my_encoder_"].Letters.fits == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--persona", "nobody"], "persona is 'nobody'; one of m0, m1, m2 is wanted"),
        (["--personas", 9], "personas is 9; from 1 to 3"),
        (["--rank", 500], "rank is 500"),
        (["--encoder", "nope"], "encoder is 'nope'"),
        (["--encoder", "json:dumps"], "encoder 'json:dumps'"),
        (["--plot", "x.bmp"], "plot is 'x.bmp'"),
        (["--plot", "/no/such/folder/x.png"], "folder does not exist"),
        (["--ask", " "], "ask is empty"),
        (["--ask", "!?"], "knows no word"),
        (["--cache-dir", "/dev/null/x"], "/dev/null/x"),
        (["--save-dir", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(demo, arguments, words):
    code, out, err = demo("--json", *arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.startswith("microlora: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rank", "0"],
        ["--rank", "many"],
        ["--seed", "-1"],
        ["--personas", "0"],
        ["--what"],
        ["--ask", "x", "--plot", "x.png"],
        ["--ask", "x", "--save-dir", "x"],
    ],
)
def test_a_wrong_argument_shows_the_usage(demo, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        demo("--json", *arguments)
    assert stop.value.code == 2
    assert "usage: microlora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("rich", [], "cli"), ("matplotlib", ["--json", "--plot", "x.png"], "plot")],
)
def test_a_missing_extra_is_the_pip_line(demo, monkeypatch, missing, arguments, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = demo(*arguments)
    assert code == 2
    assert f"pip install 'microlora[{extra}]'" in err
    assert err.count("\n") == 1


def test_interrupt_is_130_and_leaves_nothing_half_written(demo, monkeypatch, tmp_path):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run_persona", stop)
    code, _, err = demo("--json")
    assert code == 130
    assert err == "microlora: stopped\n"
    assert not (tmp_path / "xdg" / "microlora" / "adapters").exists()


def test_module_runs_and_tells_its_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["microlora", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("microlora", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("microlora ")


def test_a_reader_that_leaves_causes_no_trace(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from microlora import cli\n"
        "def flood(_):\n"
        "    for _ in range(100_000): print('x' * 80)\n"
        "    return 0\n"
        "cli.demo.run = flood\n"
        "sys.exit(cli.main(['demo']))\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(SOURCE), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
