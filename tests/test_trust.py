"""Hashes, manifests and signatures: what is the same is the same everywhere, and what was changed is
found."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from doctor_support import sound_config, sound_tensors, write_peft
from microlora import trust
from microlora.exceptions import (
    ConfigError,
    DestinationExistsError,
    DTypeError,
    FormatError,
    MicroLoraError,
    MissingExtraError,
    VerificationError,
)
from styles_support import read_safetensors


def adapter(seed=0, alpha=8.0, dtype="f32", use_rslora=False, names=("q_proj", "ü.v_proj")):
    r = np.random.default_rng(seed)
    factors = {n: (r.standard_normal((2, 6)), r.standard_normal((5, 2))) for n in names}
    factors = {n: (a.astype("f4"), b.astype("f4")) for n, (a, b) in factors.items()}
    return ml.Adapter.from_factors(factors, alpha=alpha, dtype=dtype, use_rslora=use_rslora)


def twin(value):
    """The fingerprint as docs/doctor.md states it."""
    lines = {}
    for module in value.modules():
        info, (a, b) = value.info(module), value.raw(module)
        scaling = np.array([info.alpha, float(info.use_rslora)], "<f8")
        kinds = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
        for name, kind, data in (
            ("lora_a", kinds[info.dtype_a], a),
            ("lora_b", kinds[info.dtype_b], b),
            ("scaling", "F64", scaling),
        ):
            digest = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
            key = f"{module}.{name}"
            lines[key] = f"{json.dumps(key, ensure_ascii=False)} {kind} {list(data.shape)} {digest}\n"
    text = "microlora weights 1\n" + "".join(lines[key] for key in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_fingerprint_is_what_the_docs_state(dtype, use_rslora):
    value = adapter(dtype=dtype, use_rslora=use_rslora)
    assert ml.fingerprint(value) == twin(value)


def test_it_is_the_same_in_memory_and_in_every_file(tmp_path):
    value = adapter().with_metadata(ml.AdapterMetadata(name="x", base_model="b"))
    ml.save(value, tmp_path / "dir")
    ml.save(value, tmp_path / "one.safetensors")
    found = {ml.fingerprint(p) for p in (value, tmp_path / "dir", tmp_path / "one.safetensors")}
    assert len(found) == 1
    assert ml.fingerprint(value.with_metadata(ml.AdapterMetadata())) in found
    assert ml.fingerprint(ml.AdapterFile.read(tmp_path / "dir")) in found
    lora = ml.create_lora("coder", 64)
    assert ml.fingerprint(lora) == ml.fingerprint(lora.adapter())


def test_it_differs_with_weights_scaling_dtype_and_names():
    values = [
        adapter(),
        adapter(1),
        adapter(alpha=4.0),
        adapter(use_rslora=True),
        adapter(dtype="f16"),
        adapter(names=("q_proj", "v_proj")),
    ]
    assert len({ml.fingerprint(v) for v in values}) == len(values)
    with pytest.raises(DTypeError, match="source: got int"):
        ml.fingerprint(3)


def test_tensors_that_are_no_factors_count_too(tmp_path):
    plain = write_peft(tmp_path / "a")
    extra = write_peft(tmp_path / "b", sound_tensors() | {"step": np.ones(1, "f4")})
    other = write_peft(tmp_path / "c", sound_tensors() | {"step": np.zeros(1, "f4")})
    assert len({ml.fingerprint(p) for p in (plain, extra, other)}) == 3


def test_the_hash_is_of_the_file_and_not_of_the_value(tmp_path):
    value = adapter()
    ml.save(value, tmp_path / "one.safetensors")
    ml.save(value, tmp_path / "dir")
    for name in ("one.safetensors", "dir"):
        assert ml.load(tmp_path / name) == ml.Adapter(ml.load(tmp_path / name).to_bytes())
        assert ml.AdapterFile.read(tmp_path / name).weights_sha256 == twin(value)
        assert "sha256" not in str(ml.AdapterFile.read(tmp_path / name).header)
    assert ml.load(tmp_path / "one.safetensors") == value
    first = (tmp_path / "one.safetensors").read_bytes()
    ml.save(ml.load(tmp_path / "one.safetensors"), tmp_path / "two.safetensors")
    assert (tmp_path / "two.safetensors").read_bytes() == first


def test_files_of_many_megabytes_are_hashed_too(tmp_path):
    a = np.arange(16 * 8192, dtype=np.float32).reshape(16, 8192)
    value = ml.Adapter.from_factors({f"m.{i}": (a + i, a.T - i) for i in range(10)}, alpha=8.0)
    ml.save(value, tmp_path / "x.safetensors")
    ml.save(value, tmp_path / "d")
    assert (tmp_path / "x.safetensors").stat().st_size > 10_000_000
    for name in ("x.safetensors", "d"):
        assert ml.verify(tmp_path / name).fingerprint == twin(value)
    assert ml.load(tmp_path / "x.safetensors") == value


def test_layer_paths_are_in_the_hash_that_is_written(tmp_path):
    value = adapter(names=("q_proj",))
    ml.save(value, tmp_path / "dir", layer_paths={"q_proj": ["m.0.q_proj", "m.1.q_proj"]})
    result = ml.verify(tmp_path / "dir")
    assert result.checked == ("weights",)
    assert result.fingerprint == ml.fingerprint(tmp_path / "dir") != ml.fingerprint(value)


def test_a_quantised_adapter_is_known_by_its_blocks(tmp_path):
    r = np.random.default_rng(0)
    factors = {"q": (r.standard_normal((4, 64), np.float32), r.standard_normal((64, 4), np.float32))}
    made = ml.quantize(
        ml.Adapter.from_factors(factors, alpha=8.0), {"lora_a": "q8_0", "lora_b": "q4_0"}
    ).adapter
    path = tmp_path / "q.safetensors"
    ml.save(made, path)
    tensors = read_safetensors(path)[1]
    rows = {"q.lora_a": "Q8_0/features [4, 64]", "q.lora_b": "Q4_0/features [4, 64]"}
    lines = [
        f'"{k}" {rows[k]} {hashlib.sha256(tensors[k][2]).hexdigest()}\n' for k in ("q.lora_a", "q.lora_b")
    ]
    scaling = hashlib.sha256(np.array([8.0, 0.0], "<f8").tobytes()).hexdigest()
    text = "microlora weights 1\n" + "".join(lines) + f'"q.scaling" F64 [2] {scaling}\n'
    want = hashlib.sha256(text.encode()).hexdigest()
    assert ml.fingerprint(path) == ml.fingerprint(made) == want != ml.fingerprint(made.dequantize())
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ml.verify(path, sha256=whole).checked == ("sha256", "weights")
    report = ml.inspect(path)
    assert (report.ok, report.format, report.modules[0].rank) == (True, "safetensors", 4)
    assert report.weights_sha256 == want


# -- verify ---------------------------------------


def test_each_thing_that_is_given_is_checked(tmp_path):
    ml.save(adapter(), tmp_path / "one.safetensors")
    whole = hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()
    result = ml.verify(
        tmp_path / "one.safetensors",
        sha256=whole.upper(),
        manifest=trust.manifest(tmp_path / "one.safetensors"),
    )
    assert result.checked == ("sha256", "manifest", "weights")
    assert result.fingerprint == twin(adapter())
    said = str(result)
    assert "the file has the SHA-256 that was given" in said
    assert "all files are those of the manifest" in said
    assert f"the fingerprint of the file's own header ({result.fingerprint[:16]}" in said
    with pytest.raises(VerificationError, match=r"one\.safetensors: SHA-256 is"):
        ml.verify(tmp_path / "one.safetensors", sha256="0" * 64)
    write_peft(tmp_path / "plain")
    with pytest.raises(VerificationError, match="nothing to verify it against"):
        ml.verify(tmp_path / "plain")
    said = str(ml.verify(tmp_path / "plain", manifest=trust.manifest(tmp_path / "plain")))
    assert said.endswith("those of the manifest; no fingerprint of the weights was there to compare with")
    said = str(ml.verify(tmp_path / "one.safetensors", sha256=whole, limits=ml.Limits(rank=1)))
    assert "; the weights were not read: " in said
    assert "rank" in said
    assert "no fingerprint" not in said
    said = str(ml.verify(tmp_path / "one.safetensors"))
    assert said.endswith("nothing from elsewhere was compared (sha256=, manifest=, public_key=)")


@pytest.mark.parametrize("kind", ["one.safetensors", "dir"])
def test_every_flipped_byte_is_found(kind, tmp_path):
    path = tmp_path / kind
    ml.save(adapter(names=("q",)), path)
    listed = trust.manifest(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    unseen = 0
    for file in files:
        whole = file.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else len(whole)
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
            with pytest.raises(VerificationError, match=file.name):
                ml.verify(path, manifest=listed)
            try:
                ml.verify(path)
            except (MicroLoraError, OSError):
                continue
            assert at < start, "a change of the weights went unseen"
            unseen += 1
        file.write_bytes(whole)
    assert ml.verify(path, manifest=listed).checked == ("manifest", "weights")
    assert unseen > 0  # a header's text is not weights: that is what manifests are for


def test_manifests_name_all_files_and_no_others(tmp_path):
    folder = write_peft(tmp_path / "a")
    (folder / "sub").mkdir()
    (folder / "sub" / "README.md").write_text("x")
    listed = trust.manifest(folder)
    assert set(listed) == {"adapter_config.json", "adapter_model.safetensors", "sub/README.md"}
    (tmp_path / "m.json").write_text(json.dumps(listed))
    assert ml.verify(folder, manifest=tmp_path / "m.json").checked == ("manifest",)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"adapter_model\.bin: not named"):
        ml.verify(folder, manifest=listed)
    (folder / "adapter_model.bin").unlink()
    (folder / "sub" / "README.md").unlink()
    with pytest.raises(VerificationError, match=r"missing; the manifest names sub/README\.md"):
        ml.verify(folder, manifest=listed)
    (folder / "sub" / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="link"):
        ml.verify(folder, manifest=listed)


@pytest.mark.parametrize(
    "bad",
    [
        {"../x": "0" * 64},
        {"/etc/passwd": "0" * 64},
        {"a//b": "0" * 64},
        {"a\\b": "0" * 64},
        {"a": "0" * 63},
        {"a": "g" * 64},
        {"a": 3},
        {},
        3,
    ],
)
def test_bad_manifests_and_hashes_are_refused(bad, tmp_path):
    folder = write_peft(tmp_path / "a")
    with pytest.raises(ConfigError, match="manifest"):
        ml.verify(folder, manifest=bad)
    with pytest.raises(ConfigError, match="sha256"):
        ml.verify(folder / "adapter_config.json", sha256=bad)
    with pytest.raises(ConfigError, match=r"sha256: got .*manifest="):
        ml.verify(folder, sha256="0" * 64)
    with pytest.raises(ConfigError, match="public_key="):
        ml.verify(folder, signature="x")
    with pytest.raises(FileNotFoundError):
        ml.verify(folder / "no")
    (tmp_path / "m").write_bytes(b"\xff{")
    with pytest.raises(FormatError, match=r"manifest: got .*/m', expected"):
        ml.verify(folder, manifest=tmp_path / "m")


# -- signatures ---------------------------------------


@pytest.fixture
def keys():
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    return private, private.public_key()


def pem(private, password=None):
    from cryptography.hazmat.primitives import serialization as s

    lock = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    return private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, lock)


def public_pem(public):
    from cryptography.hazmat.primitives import serialization as s

    return public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("kind", ["one.safetensors", "dir"])
def test_signed_files_verify_and_changed_ones_do_not(kind, keys, tmp_path):
    private, public = keys
    ml.save(adapter(), tmp_path / kind)
    where = ml.sign(tmp_path / kind, private)
    assert where == tmp_path / (kind + ".sig")
    result = ml.verify(tmp_path / kind, public_key=public)
    assert result.checked == ("signature", "weights")
    assert result.signer == public.public_bytes_raw().hex()
    document = json.loads(where.read_text())
    assert document["files"] == trust.manifest(tmp_path / kind)
    ml.save(adapter(1), tmp_path / kind)
    with pytest.raises(VerificationError, match=r"safetensors"):
        ml.verify(tmp_path / kind, public_key=public)


def test_every_flipped_byte_of_a_signature_is_found(keys, tmp_path):
    private, public = keys
    ml.save(adapter(), tmp_path / "one.safetensors")
    where = ml.sign(tmp_path / "one.safetensors", private)
    whole = where.read_bytes()
    document = json.loads(whole)
    passed = []
    for at in range(len(whole)):
        where.write_bytes(whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :])
        try:
            ml.verify(tmp_path / "one.safetensors", public_key=public)
        except VerificationError:
            continue
        passed.append(at)
        assert json.loads(where.read_bytes()) == document, "another document passed"
    assert len(passed) < 60  # spaces of the JSON, whose change changes nothing


def test_another_key_another_text_and_no_signature_are_refused(keys, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = keys
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    path = tmp_path / "one.safetensors"
    ml.save(adapter(), path)
    with pytest.raises(VerificationError, match="no signature there"):
        ml.verify(path, public_key=public)
    ml.sign(path, other)
    with pytest.raises(VerificationError, match="not signed by this key"):
        ml.verify(path, public_key=public)
    with pytest.raises(DestinationExistsError):
        ml.sign(path, private)
    ml.sign(path, private, overwrite=True)
    ml.verify(path, public_key=public)
    # The hashes alone, without the head of the text, are not what is signed.
    document = json.loads((tmp_path / "one.safetensors.sig").read_text())
    import base64

    plain = json.dumps(document["files"], sort_keys=True, separators=(",", ":")).encode()
    document["signature"] = base64.b64encode(private.sign(plain)).decode()
    (tmp_path / "s").write_text(json.dumps(document))
    with pytest.raises(VerificationError, match="not signed by this key"):
        ml.verify(path, public_key=public, signature=tmp_path / "s")
    for change in ({"files": "m.json"}, {"algorithm": "none"}, {"schema_version": 2}, {"more": 1}):
        (tmp_path / "s").write_text(json.dumps(document | change))
        with pytest.raises(VerificationError, match="not a signature"):
            ml.verify(path, public_key=public, signature=tmp_path / "s")


def test_keys_come_in_every_form(keys, tmp_path):
    private, public = keys
    path = tmp_path / "one.safetensors"
    ml.save(adapter(), path)
    (tmp_path / "key.pem").write_bytes(pem(private))
    (tmp_path / "pub.pem").write_bytes(public_pem(public))
    raw, known = private.private_bytes_raw().hex(), public.public_bytes_raw().hex()
    for key in (pem(private), tmp_path / "key.pem", str(tmp_path / "key.pem"), raw):
        ml.sign(path, key, overwrite=True)
        for pub in (public, public_pem(public), tmp_path / "pub.pem", known):
            assert ml.verify(path, public_key=pub).signer == known
    ml.sign(path, pem(private, b"secret"), password=b"secret", overwrite=True)
    with pytest.raises(ConfigError, match="private_key"):
        ml.sign(path, pem(private, b"secret"), password=b"wrong", overwrite=True)
    for bad in (b"x", public, 3, public_pem(public)):
        with pytest.raises(ConfigError, match="private_key"):
            ml.sign(path, bad, overwrite=True)
    for bad in (b"x", private, 3, "ab" * 31 + "zz.pem"):
        with pytest.raises((ConfigError, FileNotFoundError)):
            ml.verify(path, public_key=bad)


def test_a_directory_is_not_signed_inside_itself(keys, tmp_path):
    private, _ = keys
    folder = write_peft(tmp_path / "a")
    with pytest.raises(ConfigError, match="outside"):
        ml.sign(folder, private, out=folder / "s.sig")
    assert ml.sign(folder, private, out=tmp_path / "other.sig") == tmp_path / "other.sig"
    shutil.copytree(folder, tmp_path / "copy")
    ml.verify(tmp_path / "copy", public_key=private.public_key(), signature=tmp_path / "other.sig")


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cryptography", None)
    folder = write_peft(tmp_path / "a")
    with pytest.raises(MissingExtraError, match=r"microlora\[signing\]"):
        ml.sign(folder, b"x")
    with pytest.raises(MissingExtraError, match=r"microlora\[signing\]"):
        ml.verify(folder, public_key=b"x")


# -- what merges leave ---------------------------------------


def test_a_merge_records_its_recipe(tmp_path):
    made, _ = ml.merge({"a": adapter(), "b": adapter(1)}, method="ties", density=0.5)
    recipe = json.loads(made.metadata.recipe)
    assert recipe["merge"]["method"] == "ties"
    assert recipe["merge"]["density"] == 0.5
    assert ml.MergeConfig.from_dict(recipe["merge"]).density == 0.5
    ml.save(made, tmp_path / "m.safetensors")
    report = ml.inspect(tmp_path / "m.safetensors")
    assert (report.parents, json.loads(report.recipe)) == (("a", "b"), recipe)
    ml.save(made, tmp_path / "m")
    assert ml.inspect(tmp_path / "m").recipe == report.recipe


def test_metadata_without_a_recipe_stay_readable_by_older_readers():
    assert ml.AdapterMetadata(name="x").to_dict()["schema_version"] == 1
    assert "recipe" not in ml.AdapterMetadata(name="x").to_dict()
    with_recipe = ml.AdapterMetadata(recipe='{"merge": {}}')
    assert with_recipe.to_dict()["schema_version"] == 2
    assert ml.AdapterMetadata.from_json(with_recipe.to_json()) == with_recipe
    for bad in ("x", "[1]", '{"a": 1, "a": 2}', 3):
        with pytest.raises(ConfigError, match="recipe"):
            ml.AdapterMetadata(recipe=bad)


@given(alpha=st.floats(0.5, 64, width=32), seed=st.integers(0, 99))
def test_any_adapter_verifies_after_saving(alpha, seed, tmp_path_factory):
    value = adapter(seed, alpha)
    folder = tmp_path_factory.mktemp("v")
    ml.save(value, folder / "d")
    ml.save(value, folder / "x.safetensors")
    assert {ml.verify(folder / n).fingerprint for n in ("d", "x.safetensors")} == {twin(value)}
    config = sound_config()
    assert config["r"]  # the support's own configuration stays plain
