"""inspect, convert, quantize, verify and sign on the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import microlora as ml
from doctor_support import sound_config, sound_tensors, write_peft
from microlora import cli
from microlora.cli.quantize import calibration_of
from microlora.cli.words import in_flags
from microlora.exceptions import ConfigError
from microlora.formats.base_config import read_base_config
from styles_support import factors, kohya


@pytest.fixture
def run(capsys):
    """Runs a command; gives (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def sound(tmp_path):
    return write_peft(tmp_path / "sound")


@pytest.fixture
def broken(tmp_path):
    tensors = {k.replace("base_model.model.", ""): v for k, v in sound_tensors().items()}
    return write_peft(tmp_path / "broken", tensors, sound_config(alpha_pattern={"o_proj": 3}))


def test_inspect_prints_the_report_and_tells_by_its_exit_code(run, sound, broken, tmp_path):
    code, out, err = run("inspect", sound)
    assert (code, err) == (0, "")
    assert out == str(ml.inspect(sound)) + "\n"
    code, out, _ = run("inspect", broken)
    assert code == 1
    assert "prefix_missing" in out
    write_peft(tmp_path / "warned", config=sound_config(alpha_pattern={"o_proj": 3}))
    assert run("inspect", tmp_path / "warned")[0] == 0
    assert run("inspect", tmp_path / "warned", "--strict")[0] == 1
    assert run("inspect", sound, "--strict")[0] == 0
    code, _, err = run("inspect", tmp_path / "no")
    assert code == 2
    assert err.startswith("microlora: ")


def test_inspect_as_json(run, broken):
    code, out, _ = run("inspect", broken, "--json")
    assert code == 1
    assert json.loads(out) == json.loads(ml.inspect(broken).to_json())


def test_inspect_repairs_a_copy(run, broken, tmp_path):
    code, out, _ = run("inspect", broken, "--fix", tmp_path / "fixed")
    assert code == 1  # of the file that was looked at
    assert f"repaired copy: {tmp_path / 'fixed'}" in out
    assert run("inspect", tmp_path / "fixed", "--strict")[0] == 0
    code, _, err = run("inspect", broken, "--fix", tmp_path / "fixed")
    assert code == 2
    assert "exists" in err
    code, _, err = run("inspect", broken, "--also", "upcast")
    assert code == 2
    assert "--fix" in err
    tensors = sound_tensors()
    next(iter(tensors.values()))[0] = np.nan
    write_peft(tmp_path / "nan", tensors)
    code, _, err = run("inspect", tmp_path / "nan", "--fix", tmp_path / "off")
    assert code == 2
    assert "(--also nonfinite repairs 'nonfinite')" in err
    assert run("inspect", tmp_path / "nan", "--fix", tmp_path / "off", "--also", "nonfinite")[0] == 1
    assert run("inspect", tmp_path / "off")[0] == 0


def test_inspect_against_a_base(run, sound, tmp_path):
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run("inspect", sound, "--base", tmp_path / "config.json")
    assert code == 1
    assert "the base has 2 layers" in out
    code, _, err = run("inspect", sound, "--base", sound)
    assert code == 2
    assert "base" in err


def test_inspect_draws(run, sound, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    code, out, _ = run("inspect", sound, "--plot", tmp_path / "map.png")
    assert code == 0
    assert f"Drawn in {tmp_path / 'map.png'}" in out
    assert (tmp_path / "map.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("inspect", sound, "--plot", tmp_path / "other.png")
    assert code == 2
    assert "microlora[plot]" in err


def test_a_terminal_gets_colours_and_the_same_text(broken, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["inspect", str(broken)]) == 1
    out = capsys.readouterr().out
    assert "prefix_missing" in out
    assert "\x1b[" in out


def test_convert_writes_and_says_so(run, sound, tmp_path):
    code, out, err = run("convert", sound, tmp_path / "one.safetensors", "--format", "safetensors")
    assert (code, err) == (0, "")
    assert "safetensors, 10 modules, from peft" in out
    assert ml.fingerprint(tmp_path / "one.safetensors") == ml.fingerprint(sound)
    code, _, err = run("convert", sound, tmp_path / "one.safetensors", "--format", "safetensors")
    assert code == 2
    assert "exists" in err
    again = ("convert", tmp_path / "one.safetensors", tmp_path / "one.safetensors", "--format", "safetensors")
    assert run(*again, "--overwrite")[0] == 0
    code, _, err = run("convert", sound, tmp_path / "x", "--format", "docx")
    assert code == 2
    assert "format: got 'docx'" in err
    code, _, err = run("convert", sound, tmp_path / "x", "--format", "peft", "--allow", "dora")
    assert code == 2
    assert "allow" in err
    assert not (tmp_path / "x").exists()
    assert run("convert", sound, tmp_path / "x")[0] == 2  # no format


def test_convert_takes_names_of_the_base(run, sound, tmp_path):
    code, _, err = run("convert", sound, tmp_path / "x", "--format", "npz", "--names", "gguf")
    assert code == 2
    assert "names: got one for a peft file" in err
    assert run("convert", sound, tmp_path / "k", "--format", "kohya")[0] == 0
    named = ("convert", tmp_path / "k", tmp_path / "y", "--format", "peft", "--module-names")
    assert run(*named, tmp_path / "no model")[0] == 2
    assert not (tmp_path / "y").exists()


def test_quantize_writes_what_runs(run, sound, tmp_path):
    pytest.importorskip("microlora.quantizing")
    x = np.random.default_rng(0).standard_normal((32, 64)).astype("f4")
    factors = {"q": (x[:4], x[:, :4].copy()), "v": (x[4:8], x[:, 4:8].copy())}
    ml.save(ml.Adapter.from_factors(factors, alpha=8.0), tmp_path / "a.safetensors")
    np.savez(tmp_path / "x.npz", x)
    source = tmp_path / "a.safetensors"
    code, out, err = run(
        "quantize", source, tmp_path / "q.safetensors", "--type", "q8_0", "--calibration", tmp_path / "x.npz"
    )
    assert (code, err) == (0, "")
    assert "q8_0" in out
    made = ml.load(tmp_path / "q.safetensors")
    assert made.modules() == ["q", "v"]
    report = ml.inspect(tmp_path / "q.safetensors")
    assert report.ok
    assert [m.rank for m in report.modules] == [4, 4]
    code, _, err = run("quantize", source, tmp_path / "q.safetensors", "--type", "q8_0")
    assert code == 2
    assert "exists" in err
    assert run("quantize", source, tmp_path / "e.safetensors", "--target-error", 0.05)[0] == 0
    code, _, err = run("convert", tmp_path / "q.safetensors", tmp_path / "q.gguf", "--format", "gguf")
    assert (code, "quantize with --b-along-rank" in err) == (2, True), err
    turned = tmp_path / "turned.safetensors"
    assert run("quantize", source, turned, "--type", "q8_0", "--b-along-rank")[0] == 0
    same, _ = ml.quantize(ml.load(source), "q8_0", b_along_rank=True)
    assert ml.load(turned).types("q") == same.types("q") != made.types("q")
    for wrong in ((), ("--type", "q8_0", "--target-error", 0.1)):
        assert run("quantize", source, tmp_path / "z", *wrong)[0] == 2
    assert run("quantize", source, tmp_path / "z", "--type", "q3")[0] == 2
    assert not (tmp_path / "z").exists()


def test_calibration_is_one_array_or_one_for_each_module(tmp_path):
    np.savez(tmp_path / "one.npz", np.ones((2, 3)))
    assert calibration_of(tmp_path / "one.npz").shape == (2, 3)
    np.savez(tmp_path / "two.npz", q=np.ones((2, 3)), v=np.ones((2, 4)))
    assert set(calibration_of(tmp_path / "two.npz")) == {"q", "v"}
    (tmp_path / "bad.npz").write_bytes(b"\x80\x04K\x01.")
    np.save(tmp_path / "plain.npy", np.ones(3))
    whole = (tmp_path / "two.npz").read_bytes()
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04" + bytes(50))
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "sum.npz").write_bytes(whole.replace(np.ones(6).tobytes(), np.full(6, 2.0).tobytes()))
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for bad in (*("bad.npz", "plain.npy", "zip.npz", "half.npz", "sum.npz", "empty.npz", "objects.npz"),):
        with pytest.raises(ConfigError, match=r"^calibration: got .*, expected an \.npz of float") as told:
            calibration_of(tmp_path / bad)
        assert "pickle" not in str(told.value)


def test_verify_and_sign(run, tmp_path):
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    plain = s.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes_raw().hex()
    path = tmp_path / "a.safetensors"
    ml.create_lora("coder", 64).save(path)
    code, out, _ = run("verify", path)
    assert (code, "the weights have the fingerprint of the file's own header" in out) == (0, True)
    assert "nothing from elsewhere was compared (--sha256, --manifest, --public-key)" in out
    code, out, _ = run("sign", path, "--key", tmp_path / "key.pem")
    assert (code, out.strip()) == (0, str(path) + ".sig")
    assert run("sign", path, "--key", tmp_path / "key.pem")[0] == 2
    assert run("sign", path, "--key", tmp_path / "key.pem", "--overwrite")[0] == 0
    assert run("verify", path, "--public-key", public)[0] == 0
    code, out, _ = run("sign", path, "--manifest")
    (tmp_path / "m.json").write_text(out)
    sha = json.loads(out)["a.safetensors"]
    assert run("verify", path, "--manifest", tmp_path / "m.json", "--sha256", sha)[0] == 0
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for options in ((), ("--public-key", public), ("--sha256", sha), ("--manifest", tmp_path / "m.json")):
        code, out, err = run("verify", path, *options)
        assert (code, out) == (1, "")
        assert "a.safetensors" in err
    assert run("verify", tmp_path / "no")[0] == 2
    assert run("verify", path, "--sha256", "x")[0] == 2
    assert run("sign", path)[0] == 2
    assert run("sign", path, "--manifest", "--key", "k")[0] == 2


def test_the_new_commands_are_in_the_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("demo", "inspect", "convert", "quantize", "verify", "sign"):
        assert name in out
        code, text, _ = run(name, "--help")
        assert code == 0
        assert "usage" in text


def test_messages_name_flags_and_not_arguments_of_python(run, sound, tmp_path):
    _, _, err = run("convert", sound, tmp_path / "a.gguf", "--format", "gguf")
    assert err.startswith("microlora: --base-config: got None")
    _, _, err = run("convert", sound, tmp_path / "a.npz", "--format", "npy")
    assert err.startswith("microlora: --format: got 'npy'")
    _, _, err = run("convert", sound, sound, "--format", "peft")
    assert "pass --overwrite to replace it" in err
    dora = write_peft(tmp_path / "dora", config=sound_config(use_dora=True))
    _, _, err = run("convert", dora, tmp_path / "a.npz", "--format", "npz")
    assert "--allow drop:dora leaves it out" in err
    np.savez(tmp_path / "flat.npz", lora_a=np.eye(4, dtype="f4"), lora_b=np.eye(4, dtype="f4"))
    _, _, err = run("convert", tmp_path / "flat.npz", tmp_path / "flat", "--format", "peft")
    assert "pass --orientation rank_first" in err or "pass --alpha" in err
    _, _, err = run("verify", sound)
    assert "no --sha256, --manifest or --public-key" in err


def files_of_json(sound, tmp_path):
    """Commands that read a JSON file whose path is to be added, and the flag before it."""
    return {
        "--base-config": ("convert", sound, tmp_path / "a.gguf", "--format", "gguf"),
        "--base": ("inspect", sound),
        "--manifest": ("verify", sound),
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("place", ["pipe", os.devnull, "model"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(sound, tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    calls = files_of_json(sound, tmp_path)
    calls["--calibration"] = ("quantize", sound, tmp_path / "q.safetensors", "--type", "q8_0")
    calls["--module-names"] = ("convert", sound, tmp_path / "k.safetensors", "--format", "kohya")
    for flag, words in calls.items():
        # a process of its own, which a test that waits for ever can end
        command = [sys.executable, "-m", "microlora", *map(str, words), flag, str(tmp_path / place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        if (flag, place) != ("--base", "model"):
            assert done.stderr.startswith(f"microlora: {flag}: got "), done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "pipe", "sound"]


def test_json_is_read_strictly_and_within_bounds(run, sound, tmp_path, monkeypatch):
    (tmp_path / "twice").write_text('{"num_attention_heads": 4, "num_attention_heads": 8}')
    (tmp_path / "list").write_text("[]")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "bits").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_text('{"model_type": "' + "x" * 2000 + '"}')
    monkeypatch.setattr("microlora._file_checks.MOST_DOCUMENT", 1000)
    for flag, words in files_of_json(sound, tmp_path).items():
        for name, want in (
            ("twice", "'num_attention_heads' appears twice"),
            ("list", "a JSON list, expected an object"),
            ("deep", "more than 1000 bytes"),
            ("bits", "not valid JSON"),
            ("large", "more than 1000 bytes"),
        ):
            code, out, err = run(*words, flag, tmp_path / name)
            assert (code, out) == (2, "")
            assert err.startswith(f"microlora: {flag}: got "), err
            assert want in err
    monkeypatch.undo()
    for flag, words in files_of_json(sound, tmp_path).items():
        assert "not valid JSON" in run(*words, flag, tmp_path / "deep")[2]


def test_the_infinity_of_a_models_settings_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bamba", "time_step_limit": [0.0, Infinity]}')
    assert read_base_config(tmp_path)["time_step_limit"] == [0.0, float("inf")]


def test_module_names_that_are_no_model_are_named_with_their_flag(run, sound, tmp_path):
    (tmp_path / "c.json").write_text("{}")
    for place in ("c.json", "."):
        words = ("--format", "kohya", "--module-names", tmp_path / place)
        code, _, err = run("convert", sound, tmp_path / "k.safetensors", *words)
        assert (code, err.startswith("microlora: --module-names: got ")) == (2, True), err


def test_a_copy_is_not_written_into_what_is_inspected(run, sound, tmp_path):
    before = sorted(sound.iterdir())
    (tmp_path / "link").symlink_to(sound)
    for place in (sound / "sub", tmp_path / "link" / "sub"):
        code, out, err = run("inspect", sound, "--fix", place)
        assert (code, out, sorted(sound.iterdir())) == (2, "", before)
        assert err.startswith("microlora: --fix: got "), err
    assert run("inspect", sound, "--fix", sound / ".." / "copy")[0] == 0


def test_what_is_not_there_is_named_with_its_flag(run, sound, tmp_path):
    pytest.importorskip("cryptography")
    convert = ("convert", sound, tmp_path / "a.gguf", "--format", "gguf")
    quantize = ("quantize", sound, tmp_path / "q.safetensors", "--type", "q8_0")
    for words, flag, want in (
        ((*convert, "--base-config", "nobase"), "--base-config", "the base's config.json or its directory"),
        (
            (*convert, "--module-names", "nobase"),
            "--module-names",
            "dotted names of modules, or a model on disk",
        ),
        ((*quantize, "--base-config", "nobase"), "--base-config", "the base's config.json or its directory"),
        ((*quantize, "--calibration", "nobase"), "--calibration", "an .npz of float arrays"),
        (("inspect", sound, "--base", "nobase"), "--base", "the base's directory, config.json"),
        (
            ("verify", sound, "--public-key", "nobase"),
            "--public-key",
            "a PEM file, or a key as 64 hex digits",
        ),
        (("verify", sound, "--manifest", "nobase"), "--manifest", "a mapping {file: sha256} or the path"),
        (("sign", sound, "--key", "nobase"), "--key", "a PEM file, or a key as 64 hex digits"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"microlora: {flag}: got 'nobase', which is not there, expected {want}"), err
        assert "Errno" not in err
    for words in (
        ("inspect", "nofile"),
        ("convert", "nofile", tmp_path / "x", "--format", "peft"),
        ("quantize", "nofile", tmp_path / "q.safetensors", "--type", "q8_0"),
        ("verify", "nofile"),
        ("sign", "nofile", "--manifest"),
    ):
        assert run(*words) == (2, "", "microlora: nofile: No such file or directory\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sound"]


def test_a_picture_is_refused_before_a_repair_is_made(run, broken, tmp_path):
    pytest.importorskip("matplotlib")
    for name, want in (
        ("x.jpg", "a name that ends in .png"),
        ("no/x.png", "a place in a folder that exists"),
    ):
        code, out, err = run("inspect", broken, "--fix", tmp_path / "fixed", "--plot", tmp_path / name)
        assert (code, out) == (2, "")
        assert err.startswith(f"microlora: --plot: got '{tmp_path / name}', expected {want}")
    assert not (tmp_path / "fixed").exists()


def test_unknown_kinds_and_orientations_are_refused(run, sound, tmp_path):
    for words in (
        ("convert", sound, tmp_path / "x", "--format", "peft"),
        ("quantize", sound, tmp_path / "q.safetensors", "--type", "q8_0"),
    ):
        code, _, err = run(*words, "--allow", "drop:dorra")
        assert code == 2
        assert err.startswith("microlora: --allow: got 'drop:dorra', expected 'drop:' and one of ")
        assert "did you mean 'dora'" in err
        assert ": --orientation: got" in run(*words, "--orientation", "rank_first")[2]
        assert ": --alpha: got 4, expected none" in run(*words, "--alpha", "4")[2]
        assert run(*words, "--orientation", "up")[2].startswith("microlora: --orientation: got 'up'")
        assert run(*words, "--allow", "drop:dora")[0] == 0


def test_notes_speak_of_flags(run, tmp_path):
    kohya(tmp_path / "k.safetensors", factors(["lora_unet_a_to_q"]), alpha=3.0)
    code, out, _ = run("convert", tmp_path / "k.safetensors", tmp_path / "p", "--format", "peft")
    assert code == 0
    assert "pass --module-names for the base's own" in out


def test_words_of_the_command_line():
    options = {"run": 1, "path": 1, "allow": 1, "overwrite": 1, "base_config": 1}
    assert in_flags('allow=["drop:a", "drop:b"] leaves', options) == "--allow drop:a --allow drop:b leaves"
    assert in_flags("pass base_config= for it", options) == "pass --base-config for it"
    assert in_flags("path: got 1; alpha= too", options) == "path: got 1; alpha= too"
    assert in_flags("f.npz: allow: got 1", options) == "f.npz: --allow: got 1"
    assert in_flags("x_overwrite=True", options) == "x_overwrite=True"


def test_quantize_reads_what_convert_reads(run, tmp_path):
    np.savez(tmp_path / "a.npz", **{"q.lora_a": np.ones((4, 32), "f4"), "q.lora_b": np.ones((32, 4), "f4")})
    to = tmp_path / "q.safetensors"
    code, _, err = run("quantize", tmp_path / "a.npz", to, "--type", "q8_0")
    assert code == 2
    assert "pass --alpha" in err
    assert run("quantize", tmp_path / "a.npz", to, "--type", "q8_0", "--alpha", "8")[0] == 0
    code, out, _ = run("verify", to)
    assert (code, "weights" in out) == (0, True)
    code, out, _ = run("inspect", to)
    assert (code, "Q8_0" in out) == (0, True)
    code, out, _ = run("convert", to, tmp_path / "plain", "--format", "peft")
    assert code == 0
    assert "note: in blocks, and float32 in formats that have none: q8_0:" in out
    plain, blocks = ml.load(tmp_path / "plain"), ml.load(to).dequantize()
    assert all((x == y).all() for x, y in zip(plain.factors("q"), blocks.factors("q"), strict=True))
    code, _, err = run("quantize", to, tmp_path / "again.safetensors", "--type", "q4_0")
    assert (code, "dequantize" in err) == (2, True)


def test_a_manifest_goes_to_standard_output_alone(run, sound, tmp_path):
    code, out, err = run("sign", sound, "--manifest", "--out", tmp_path / "m.json")
    assert (code, out) == (2, "")
    assert "--out and --overwrite go with --key" in err


def test_a_terminal_without_the_letters_of_a_name_gets_them_spelled(tmp_path):
    place = tmp_path / "ümläut"
    ml.save(ml.Adapter.from_factors({"q": (np.ones((2, 8)), np.ones((8, 2)))}, alpha=2.0), place, "peft")
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "microlora", "inspect", str(place)]
    done = subprocess.run(command, env=narrow, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert rb"\xfc" in done.stdout
