"""Where a format may be written: one rule for save, convert, quantize, repairs, and the command line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import microlora as ml
from microlora import cli
from microlora.exceptions import ConfigError, DestinationExistsError, MissingPathError
from microlora.formats.conversion import WRITERS
from styles_support import mlx, peft

FOLDERS = ("peft", "mlx")
ENDINGS = {
    ".safetensors": {"safetensors", "kohya", "diffusers", "flat"},
    ".gguf": {"gguf"},
    ".npz": {"npz"},
    ".bin": set(),
    ".pt": set(),
    ".pth": set(),
    ".ckpt": set(),
}
NAMES = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
}
PATH = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def adapter():
    r = np.random.default_rng(3)
    factors = {PATH: (r.standard_normal((2, 32)), r.standard_normal((32, 2)))}
    return ml.Adapter.from_factors(factors, alpha=4.0)


def convert(adapter, place, format, **options):
    if format == "gguf":
        pytest.importorskip("gguf")
        options["base_config"] = CONFIG
    return ml.convert(adapter, place, format=format, **options)


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


@pytest.mark.parametrize("ending", [*ENDINGS, ".SafeTensors", "", ".v1"])
@pytest.mark.parametrize("format", WRITERS)
def test_an_ending_is_for_its_formats_alone(adapter, tmp_path, format, ending):
    place, fits = tmp_path / f"a{ending}", ENDINGS.get(ending.lower())
    if fits is None or format in fits:
        convert(adapter, place, format)
        assert place.is_dir() == (format in FOLDERS)
        return
    want = f"the name of a directory, which {format} is"
    if format not in FOLDERS:
        want = rf"a name that ends in \.\w+ for {format}"
    with pytest.raises(
        ConfigError, match=rf"dst: got .*a{ending}', expected {want} \({ending.lower()} is for"
    ):
        convert(adapter, place, format)
    assert not names(tmp_path)


def test_every_way_to_write_has_the_rule(adapter, tmp_path, capsys):
    source = mlx(tmp_path / "in", {PATH: adapter.factors(PATH)})
    quantised = ml.quantize(adapter, "q8_0").adapter
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=r"dst: got .*expected the name of a directory, which mlx is"):
        ml.AdapterFile.read(source).save(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"path: got .*expected the name of a directory, which peft is"):
        ml.save(adapter, tmp_path / "x.safetensors", "peft")
    with pytest.raises(ConfigError, match=r"path: got .*expected a name that ends in \.safetensors"):
        ml.save(adapter, tmp_path / "x.gguf", "safetensors")
    with pytest.raises(ConfigError, match=r"path: got .*ends in \.safetensors for safetensors \(\.gguf"):
        ml.save(quantised, tmp_path / "q.gguf")
    with pytest.raises(ConfigError, match=r"dst: got .*ends in \.safetensors for safetensors \(\.npz"):
        quantised.save(tmp_path / "q.npz")
    peft(tmp_path / "sound", {PATH: adapter.factors(PATH)})
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=r"fix: got .*expected the name of a directory"):
        ml.inspect(tmp_path / "sound", fix=tmp_path / "fixed.safetensors")
    for words in (
        ("convert", source, tmp_path / "x.safetensors", "--format", "peft"),
        ("quantize", source, tmp_path / "q.gguf", "--type", "q8_0"),
        ("quantize", source, tmp_path / "q.npz", "--type", "q8_0"),
    ):
        assert cli.main([str(w) for w in words]) == 2
        assert capsys.readouterr().err.startswith(f"microlora: DST: got '{words[2]}', expected ")
    assert names(tmp_path) == before


@pytest.mark.parametrize("format", WRITERS)
def test_a_folder_that_is_missing_is_named(adapter, tmp_path, format):
    (tmp_path / "file").write_bytes(b"x")
    for folder, what in (("no", "is not there"), ("file", "is not a folder")):
        with pytest.raises(MissingPathError, match=rf"dst: got .*'{tmp_path / folder}' {what}") as caught:
            convert(adapter, tmp_path / folder / "a", format)
        assert isinstance(caught.value, FileNotFoundError)
        assert ".tmp" not in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_every_way_to_write_names_the_folder(adapter, tmp_path, monkeypatch, capsys):
    peft(tmp_path / "in", {PATH: adapter.factors(PATH)})
    quantised = ml.quantize(adapter, "q8_0").adapter
    gone = tmp_path / "no"
    for write in (
        lambda: ml.save(adapter, gone / "a.safetensors"),
        lambda: ml.save(adapter, gone / "a"),
        lambda: ml.save(quantised, gone / "a.safetensors"),
        lambda: quantised.save(gone / "a.safetensors"),
        lambda: ml.AdapterFile.from_adapter(adapter).save(gone / "a"),
        lambda: ml.inspect(tmp_path / "in", fix=gone / "a"),
    ):
        with pytest.raises(MissingPathError, match=f"expected a place in a folder that exists: '{gone}'"):
            write()
    for words in (
        ("convert", tmp_path / "in", gone / "a", "--format", "peft"),
        ("quantize", tmp_path / "in", gone / "a.safetensors", "--type", "q8_0"),
    ):
        assert cli.main([str(w) for w in words]) == 2
        assert f"a folder that exists: '{gone}' is not there" in capsys.readouterr().err
    assert names(tmp_path)[0] == "in"
    monkeypatch.chdir(tmp_path)
    ml.save(adapter, "here.safetensors")  # the folder that one is in
    ml.save(adapter, "here/")
    with pytest.raises(MissingPathError, match="folder that exists: 'gone'"):
        ml.save(adapter, "gone/..", "peft")
    assert not (tmp_path / "gone").exists()
    assert ml.load("here").modules() == ml.load("here.safetensors").modules() == [PATH]


def test_the_core_names_the_folder_too(adapter, tmp_path):
    import microlora._core as core

    with pytest.raises(FileNotFoundError) as caught:
        core.save_single(adapter, str(tmp_path / "no" / "a.safetensors"))
    assert caught.value.filename == str(tmp_path / "no")
    assert ".tmp" not in str(caught.value)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_and_directories_do_not_replace_each_other(adapter, tmp_path, overwrite):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_bytes(b"mine")
    folder.mkdir()
    for format in FOLDERS:
        with pytest.raises(DestinationExistsError, match=f"file: is a file, expected a directory.*{format}"):
            convert(adapter, file, format, overwrite=overwrite)
    for format in WRITERS.keys() - {*FOLDERS, "gguf"}:
        with pytest.raises(
            DestinationExistsError, match="folder: is a directory, expected the name of a file"
        ):
            convert(adapter, folder, format, overwrite=overwrite)
    with pytest.raises(DestinationExistsError, match="is a file"):
        ml.save(adapter, file, "peft")
    with pytest.raises(DestinationExistsError, match="is a directory"):
        ml.save(adapter, folder, "safetensors")
    assert (file.read_bytes(), names(folder)) == (b"mine", [])


@pytest.mark.parametrize(("old", "new"), [("peft", "mlx"), ("mlx", "peft"), ("peft", "peft")])
def test_a_directory_keeps_the_weights_of_one_format(adapter, tmp_path, old, new):
    place = tmp_path / "dir"
    convert(adapter, place, old)
    (place / "README.md").write_text("mine")
    (place / "tokenizer.bin").write_bytes(b"mine too")
    (place / "adapter_model.bin").write_bytes(b"a pickle")
    done = convert(adapter, place, new, overwrite=True)
    assert names(place) == ["README.md", "adapter_config.json", NAMES[new], "tokenizer.bin"]
    gone = {"adapter_model.bin"} | ({NAMES[old]} if old != new else set())
    assert {note.split()[1].rstrip(",") for note in done.notes if note.startswith("removed")} == gone
    assert ml.AdapterFile.read(place).format == new
    assert ml.load(place).modules() == [PATH]


def test_saving_leaves_the_weights_of_one_format(adapter, tmp_path):
    convert(adapter, tmp_path / "dir", "mlx")
    ml.save(adapter, tmp_path / "dir")
    assert names(tmp_path / "dir") == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_cannot_be_written_takes_nothing_away(adapter, tmp_path):
    place = convert(adapter, tmp_path / "dir", "peft").path
    before = {p.name: p.read_bytes() for p in (tmp_path / "dir").iterdir()}
    r = np.random.default_rng(0)
    uneven = {f"m.{n}": (r.standard_normal((n, 8)), r.standard_normal((8, n))) for n in (1, 2)}
    with pytest.raises(ConfigError, match="rank"):
        ml.convert(ml.Adapter.from_factors(uneven, alpha=1.0), place, format="mlx", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "dir").iterdir()} == before


@pytest.mark.parametrize("format", ["safetensors", "kohya", "flat"])
@pytest.mark.parametrize("folder", ["peft", "mlx"])
def test_a_single_file_does_not_take_the_place_of_weights(adapter, tmp_path, format, folder):
    place = tmp_path / "dir"
    convert(adapter, place, folder)
    before = (place / NAMES[folder]).read_bytes()
    with pytest.raises(DestinationExistsError, match="another name"):
        convert(adapter, place / NAMES[folder], format, overwrite=True)
    with pytest.raises(DestinationExistsError, match="another name"):
        ml.save(adapter, place / NAMES[folder])
    assert (place / NAMES[folder]).read_bytes() == before
    convert(adapter, tmp_path / NAMES[folder], format)
    assert (tmp_path / NAMES[folder]).is_file()


def test_checkpoints_of_mlx_keep_their_settings(adapter, tmp_path):
    place = mlx(tmp_path / "dir", {PATH: adapter.factors(PATH)})
    shutil.copy(place / "adapters.safetensors", place / "0000100_adapters.safetensors")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    for write in (
        lambda: convert(adapter, place, "peft", overwrite=True),
        lambda: ml.save(adapter, place),
    ):
        with pytest.raises(DestinationExistsError, match=r"0000100_adapters\.safetensors.*another directory"):
            write()
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
