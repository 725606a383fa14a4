"""Every function with every kind of bad input: a typed error that names the argument, and nothing changed."""

import json
import struct

import numpy as np
import pytest

import microlora as ml
from microlora import exceptions as ex
from support import feedback_kinds, make, normal, rng, run_python, state_of

N_IN, N_OUT, RANK = 12, 9, 3
X, Y = normal(rng(1), N_IN), normal(rng(2), N_OUT)
FB = ml.Target(Y)


def learner():
    lora = make(N_IN, N_OUT, RANK, names=("q_proj", "k_proj"))
    lora.instant(X, FB, "q_proj")
    lora.adapt(X, FB, "q_proj")
    return lora


def odd(n):
    """Wrong arrays where float32 (n,) is wanted: name -> (value, error, words of the message)."""
    good = normal(rng(3), n)
    return {
        "too long": (normal(rng(), n + 1), ex.ShapeError, f"({n + 1},)"),
        "empty": (np.zeros(0, np.float32), ex.ShapeError, "(0,)"),
        "scalar array": (np.float32(1), ex.ShapeError, "()"),
        "three dimensions": (np.zeros((2, 2, n), np.float32), ex.ShapeError, f"(2, 2, {n})"),
        "column": (np.zeros((n, 1), np.float32), ex.ShapeError, f"({n}, 1)"),
        "integers": (np.ones(n, np.int64), ex.DTypeError, "int64"),
        "bytes": (np.ones(n, np.uint8), ex.DTypeError, "uint8"),
        "integer list": ([1] * n, ex.DTypeError, "int64"),
        "booleans": (np.ones(n, bool), ex.DTypeError, "bool"),
        "complex": (np.ones(n, np.complex64), ex.DTypeError, "complex64"),
        "objects": (np.array([None] * n), ex.DTypeError, "object"),
        "text": (["a"] * n, ex.DTypeError, "<U1"),
        "a string": ("abc", ex.DTypeError, "<U3"),
        "ragged": ([[1.0], [1.0, 2.0]], ex.DTypeError, "list"),
        "none": (None, ex.DTypeError, "object"),
        "structured": (np.zeros(n, [("a", "f4")]), ex.DTypeError, "a"),
        "byte-swapped": (good.astype(">f4"), ex.LayoutError, "byte-swapped"),
        "byte-swapped double": (good.astype(">f8"), ex.LayoutError, "byte-swapped"),
        "nan": (np.where(np.arange(n) == n - 1, np.nan, good).astype("f4"), ex.NonFiniteError, "NaN"),
        "inf": (np.where(np.arange(n) == 0, np.inf, good).astype("f4"), ex.NonFiniteError, "NaN or infinity"),
        "nan list": ([float("nan")] * n, ex.NonFiniteError, "NaN"),
        "double beyond float32": (np.full(n, 1e300), ex.NonFiniteError, "NaN or infinity"),
    }


def outs(n):
    """Wrong buffers where a writable float32 (n,) is wanted."""
    readonly = np.zeros(n, np.float32)
    readonly.flags.writeable = False
    unaligned = np.frombuffer(bytearray(4 * n + 1), np.float32, offset=1)
    return {
        "too short": (np.zeros(n - 1, np.float32), ex.ShapeError, f"expected ({n},)"),
        "matrix": (np.zeros((1, n), np.float32), ex.ShapeError, f"expected ({n},)"),
        "three dimensions": (np.zeros((1, 1, n), np.float32), ex.ShapeError, "dimensions"),
        "double": (np.zeros(n), ex.DTypeError, "float64"),
        "half": (np.zeros(n, np.float16), ex.DTypeError, "float16"),
        "byte-swapped": (np.zeros(n, ">f4"), ex.DTypeError, "native"),
        "read-only": (readonly, ex.LayoutError, "read-only"),
        "strided": (np.zeros(2 * n, np.float32)[::2], ex.LayoutError, "C-contiguous"),
        "unaligned": (unaligned, ex.LayoutError, "aligned"),
        "list": ([0.0] * n, ex.DTypeError, "expected a float32 NumPy array"),
    }


def calls():
    """(argument, name of the case, call on a learner, error, words)."""
    out = []

    def add(argument, name, call, error, *words):
        out.append(pytest.param(argument, call, error, words, id=f"{name}-{argument}"))

    reads = {
        "forward": lambda lora, x, **k: lora.forward(x, "q_proj", **k),
        "handle": lambda lora, x, **k: lora["q_proj"].forward(x, **k),
        "forward_add": lambda lora, x, out=None: lora.forward_add(
            x, "q_proj", out=np.zeros(N_OUT, np.float32) if out is None else out
        ),
        "handle_add": lambda lora, x, out=None: lora["q_proj"].forward_add(
            x, np.zeros(N_OUT, np.float32) if out is None else out
        ),
        "forward_all": lambda lora, x: lora.forward_all(x),
        "disabled": disabled,
    }
    learns = {"instant": lambda lora: lora.instant, "adapt": lambda lora: lora.adapt}
    for kind, (v, error, word) in odd(N_IN).items():
        for name, f in reads.items():
            add("x", f"{name}-{kind}", lambda lora, f=f, v=v: f(lora, v), error, word, f"{N_IN}")
        for name, f in learns.items():
            add("x", f"{name}-{kind}", lambda lora, f=f, v=v: f(lora)(v, FB, "q_proj"), error, word)
        if kind not in ("column", "three dimensions"):
            call = lambda lora, v=v: lora.fit_input_basis(v, "k_proj")  # noqa: E731
            if kind not in ("nan", "inf", "nan list", "double beyond float32"):
                add("X", f"fit_input_basis-{kind}", call, error, word)
    nan_rows = normal(rng(), 20, N_IN)
    nan_rows[19, 11] = np.nan
    for name in ("forward", "handle", "forward_all", "disabled"):
        add(
            "x",
            f"{name}-nan in a batch",
            lambda lora, f=reads[name]: f(lora, nan_rows),
            ex.NonFiniteError,
            "NaN",
        )
        call = lambda lora, f=reads[name]: f(lora, np.zeros((0, N_IN), np.float32))  # noqa: E731
        add("x", f"{name}-no rows", call, ex.ShapeError, f"(0, {N_IN})")
    add("X", "fit_input_basis-nan", lambda lora: lora.fit_input_basis(nan_rows, "k_proj"), ex.NonFiniteError)
    huge = lambda lora: lora.fit_input_basis(normal(rng(), 20, N_IN) * 1e30, "k_proj")  # noqa: E731
    add("X", "fit_input_basis-huge", huge, ex.ConfigError, "norm")
    tiny = lambda lora: lora.fit_input_basis(normal(rng(), 20, N_IN) * 1e-30, "k_proj")  # noqa: E731
    add("X", "fit_input_basis-tiny", tiny, ex.ConfigError, "norm")
    few = lambda lora: lora.fit_input_basis(normal(rng(), 2, N_IN), "k_proj")  # noqa: E731
    add("X", "fit_input_basis-few", few, ex.ShapeError, "at least 3 rows")
    for kind, (v, error, word) in outs(N_OUT).items():
        for name in ("forward", "handle", "forward_add", "handle_add"):
            add("out", f"{name}-{kind}", lambda lora, f=reads[name], v=v: f(lora, X, out=v), error, word)
    for kind, (v, error, word) in odd(N_OUT).items():
        for name, f in learns.items():
            if kind != "none":
                call = lambda lora, f=f, v=v: f(lora)(X, FB, "q_proj", base=v)  # noqa: E731
                add("base", f"{name}-{kind}", call, error, word)
    for name, f in learns.items():
        for kind, fb in feedback_kinds(rng(), N_OUT + 1).items():
            argument = {
                "mse": "target",
                "cosine": "target",
                "reward": "response",
                "preference": "chosen",
            }.get(kind)
            argument = argument or {"gradient": "gradient", "contrastive": "positive"}[kind]
            call = lambda lora, f=f, fb=fb: f(lora)(X, fb, "q_proj")  # noqa: E731
            add(argument, f"{name}-{kind}", call, ex.ShapeError, f"({N_OUT + 1},)", f"({N_OUT},)")
        for kind, v in {"a number": 0.5, "numpy number": np.float32(1)}.items():
            add(
                "feedback",
                f"{name}-{kind}",
                lambda lora, f=f, v=v: f(lora)(X, v, "q_proj"),
                ex.FeedbackError,
                "Target",
            )
        for kind, v in {"none": None, "array": Y, "text": "good", "class": ml.Target}.items():
            add(
                "feedback",
                f"{name}-{kind}",
                lambda lora, f=f, v=v: f(lora)(X, v, "q_proj"),
                ex.DTypeError,
                "Target",
            )
    named = {
        "forward": lambda lora, m: lora.forward(X, m),
        "forward_add": lambda lora, m: lora.forward_add(X, m, out=np.zeros(N_OUT, np.float32)),
        "handle": lambda lora, m: lora[m],
        "forward_all": lambda lora, m: lora.forward_all(X, [m]),
        "instant": lambda lora, m: lora.instant(X, FB, m),
        "adapt": lambda lora, m: lora.adapt(X, FB, m),
        "fit_input_basis": lambda lora, m: lora.fit_input_basis(nan_rows, m),
        "delta_weight": lambda lora, m: lora.delta_weight(m),
        "fuse_into": lambda lora, m: lora.fuse_into(np.zeros((N_OUT, N_IN), np.float32), m),
        "unfuse_from": lambda lora, m: lora.unfuse_from(np.zeros((N_OUT, N_IN), np.float32), m),
        "info": lambda lora, m: lora.adapter().info(m),
        "factors": lambda lora, m: lora.adapter().factors(m),
        "raw": lambda lora, m: lora.adapter().raw(m),
    }
    for name, f in named.items():
        add(
            "module",
            f"{name}-unknown",
            lambda lora, f=f: f(lora, "q_prj"),
            ex.UnknownModuleError,
            "q_prj",
            "q_proj",
        )
        kind = ex.DTypeError if name == "handle" else TypeError
        add("module", f"{name}-number", lambda lora, f=f: f(lora, 3), kind, "int")
    for name in (
        "forward",
        "forward_add",
        "instant",
        "adapt",
        "delta_weight",
        "fuse_into",
        "fit_input_basis",
    ):
        call = lambda lora, f=named[name]: f(lora, None)  # noqa: E731
        add("module", f"{name}-missing", call, ex.ConfigError, "q_proj, k_proj")
    for name in ("fuse_into", "unfuse_from"):
        f = lambda lora, w, name=name: getattr(lora, name)(w, "q_proj")  # noqa: E731
        w = normal(rng(), N_OUT, N_IN)
        readonly, bad = w.copy(), w.copy()
        readonly.flags.writeable, bad[3, 3] = False, np.inf
        for kind, (v, error, word) in {
            "transposed": (w.T, ex.LayoutError, "C-contiguous"),
            "swapped sides": (np.ascontiguousarray(w.T), ex.ShapeError, f"expected ({N_OUT}, {N_IN})"),
            "vector": (w[0].copy(), ex.ShapeError, f"expected ({N_OUT}, {N_IN})"),
            "double": (w.astype("f8"), ex.DTypeError, "float64"),
            "read-only": (readonly, ex.LayoutError, "read-only"),
            "inf": (bad, ex.NonFiniteError, "NaN or infinity"),
            "list": (w.tolist(), ex.DTypeError, "list"),
        }.items():
            add("w", f"{name}-{kind}", lambda lora, f=f, v=v: f(lora, v), error, word)
    for kind, lr in {"nan": np.nan, "inf": np.inf, "negative": -1.0}.items():
        add("lr", f"apply_updates-{kind}", lambda lora, lr=lr: lora.apply_updates(lr), ex.ConfigError)
    add("lr", "apply_updates-text", lambda lora: lora.apply_updates("fast"), TypeError, "str")
    add(
        "lr",
        "apply_updates-beyond float32",
        lambda lora: lora.apply_updates(1e300),
        ex.NonFiniteError,
        "overflow",
    )
    add("max_grad_norm", "apply_updates", lambda lora: lora.apply_updates(0.1, 0.0), ex.ConfigError)
    add("data", "import_weights", lambda lora: lora.import_weights(None), ex.DTypeError, "NoneType")
    add("source", "restore", lambda lora: lora.restore(None), ex.DTypeError, "NoneType")
    add("metadata", "metadata", lambda lora: setattr(lora, "metadata", {}), ex.DTypeError, "dict")
    add("enabled", "enabled", lambda lora: setattr(lora, "enabled", 3), ex.DTypeError, "int")
    return out


def disabled(lora, x):
    lora.enabled = False
    try:
        return lora.forward(x, "q_proj")
    finally:
        lora.enabled = True


@pytest.mark.parametrize(("argument", "call", "error", "words"), calls())
def test_a_learner_refuses_by_name_and_stays_as_it_was(argument, call, error, words):
    lora = learner()
    before = state_of(lora)
    with pytest.raises(error) as caught:
        call(lora)
    message = str(caught.value)
    assert type(caught.value) is error, message
    notes = "".join(getattr(caught.value, "__notes__", ()))  # where a plain TypeError says the argument
    assert argument in message.split(":")[0] or f"'{argument}" in notes, (message, notes)
    if error in (ex.ShapeError, ex.DTypeError, ex.ConfigError, ex.UnknownModuleError):
        assert "expected" in message, message
    if error is not ex.NonFiniteError or words:
        for word in words[:1] if error is not ex.ShapeError else words:
            assert word in message, message
    assert state_of(lora) == before


@pytest.mark.parametrize("rows", [None, 1, 50])
@pytest.mark.parametrize("shift", [0, 4, -4])
def test_out_may_not_overlap_x(rows, shift):
    lora = make(8, 8, 2)
    n = 8 * (rows or 1)
    memory = normal(rng(), n + 16)
    x, out = memory[8 : 8 + n], memory[8 + shift : 8 + shift + n]
    x, out = (x, out) if rows is None else (x.reshape(rows, 8), out.reshape(rows, 8))
    before = memory.copy()
    for call in (lora.forward, lora.forward_add):
        with pytest.raises(ex.LayoutError, match=r"^out: overlaps x"):
            call(x, "m", out=out)
    np.testing.assert_array_equal(memory, before)
    lora.forward(memory[:8], "m", out=memory[8:16])


def test_a_refused_batch_leaves_out_as_it_was():
    lora = make(256, 64, 16)
    for rows in (3, 3000):
        x, out = normal(rng(), rows, 256), np.full((rows, 64), 7.0, np.float32)
        x[rows - 1, 5] = np.nan
        for call in (lora.forward, lora.forward_add):
            with pytest.raises(ex.NonFiniteError, match=r"^x: .*NaN"):
                call(x, "m", out=out)
        assert (out == 7).all()


MAKERS = {
    "t": lambda v: ml.Target(v),
    "g": lambda v: ml.Gradient(v),
    "response": lambda v: ml.Reward(0.5, response=v),
    "chosen": lambda v: ml.Preference(v, np.ones(9, np.float32)),
    "rejected": lambda v: ml.Preference(np.ones(9, np.float32), v),
    "positive": lambda v: ml.Contrastive(v, np.ones((2, 9), np.float32)),
    "negatives": lambda v: ml.Contrastive(np.ones(9, np.float32), v),
}


@pytest.mark.parametrize("argument", MAKERS)
@pytest.mark.parametrize("kind", odd(9))
def test_feedback_refuses_bad_arrays_by_name(argument, kind):
    value, error, word = odd(9)[kind]
    if argument in ("t", "g", "response") and kind == "too long":
        return  # a width of its own is checked when it is used
    if argument == "response" and kind == "none":
        error, word = ex.FeedbackError, "direction"
    other = {
        "t": "target",
        "g": "gradient",
        "chosen": "rejected",
        "rejected": "chosen",
        "positive": "negatives",
    }
    with pytest.raises(error) as caught:
        MAKERS[argument](value)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.split(":")[0].split("[")[0] in (argument, other.get(argument)), message
    if error is not ex.ShapeError:
        assert word in message


def test_feedback_refuses_vectors_without_a_direction_and_numbers_out_of_range():
    e, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    for make_it, word in [
        (lambda: ml.Target(zero, loss="cosine"), "target"),
        (lambda: ml.Reward(1.0, response=zero), "response"),
        (lambda: ml.Preference(zero, e), "chosen"),
        (lambda: ml.Preference(e, zero), "rejected"),
        (lambda: ml.Contrastive(zero, e), "positive"),
        (lambda: ml.Contrastive(e, np.stack([e, zero])), "negatives[1]"),
        (lambda: ml.Reward(np.nan, response=e), "reward"),
        (lambda: ml.Reward(1e300, response=e), "reward"),
        (lambda: ml.Preference(e, e, p=1.5), "p"),
        (lambda: ml.Preference(e, e, p=np.nan), "p"),
        (lambda: ml.Preference(e, e, beta=0.0), "beta"),
        (lambda: ml.Contrastive(e, e, tau=-1.0), "tau"),
        (lambda: ml.Contrastive(e, e, tau=np.inf), "tau"),
    ]:
        with pytest.raises(ex.FeedbackError) as caught:
            make_it()
        assert word in str(caught.value)
    with pytest.raises(ex.ConfigError, match=r"loss: got \"l1\", expected mse or cosine"):
        ml.Target(e, loss="l1")
    for make_it in (lambda: ml.Reward("good", response=e), lambda: ml.Contrastive(e, e, tau=None)):
        with pytest.raises(TypeError, match=r"while processing '(r|tau)'"):
            make_it()


def config(**more):
    return ml.LoraConfig(**{"rank": 2, "target_modules": ["m"], **more})


@pytest.mark.parametrize(
    ("argument", "call", "error"),
    [
        ("rank", lambda: config(rank=0), ex.ConfigError),
        ("rank", lambda: config(rank=2.5), ex.ConfigError),
        ("rank", lambda: ml.MicroLoRA(config(rank=9), 8), ex.ConfigError),
        ("alpha", lambda: config(alpha=np.nan), ex.ConfigError),
        ("dtype", lambda: config(dtype="f64"), ex.ConfigError),
        ("target_modules", lambda: config(target_modules=[]), ex.ConfigError),
        ("hidden_dim", lambda: ml.MicroLoRA(config()), ex.ConfigError),
        ("hidden_dim", lambda: ml.MicroLoRA(config(), 0), ex.ConfigError),
        ("hidden_dim", lambda: ml.MicroLoRA(config(), 8.5), ex.ConfigError),
        ("hidden_dim", lambda: ml.MicroLoRA(config(), 8, {"m": (8, 8)}), ex.ConfigError),
        ("hidden_dim", lambda: ml.MicroLoRA(make().adapter(), 8), ex.ConfigError),
        ("dims", lambda: ml.MicroLoRA(config(), dims={"n": (8, 8)}), ex.ConfigError),
        ("dims", lambda: ml.MicroLoRA(config(), dims={"m": 8}), ex.ConfigError),
        ("dims", lambda: ml.MicroLoRA(config(), dims=[8]), ex.ConfigError),
        ("seed", lambda: ml.MicroLoRA(config(), 8, seed=-1), ex.ConfigError),
        ("seed", lambda: ml.MicroLoRA(config(), 8, seed=1.0), ex.ConfigError),
        ("config", lambda: ml.MicroLoRA(None, 8), ex.DTypeError),
        ("config", lambda: ml.MicroLoRA({"rank": 4}, 8), ex.DTypeError),
        ("device", lambda: ml.MicroLoRA(config(), 8, device="tpu"), ex.ConfigError),
        ("device", lambda: ml.MicroLoRA(config(), 8, device=3), ex.ConfigError),
        ("device", lambda: ml.MicroLoRA(config(), 8, device="cuda"), ex.DeviceError),
        ("preset", lambda: ml.create_lora("codr", 8), ex.UnknownPresetError),
        ("preset", lambda: ml.create_lora(3, 8), ex.MicroLoraError),
        ("format", lambda: ml.save(make(), "x", format="onnx"), ex.ConfigError),
        ("layer_paths", lambda: ml.save(make(), "x.safetensors", layer_paths={"m": "a"}), ex.ConfigError),
        ("adapter", lambda: ml.save(None, "x"), ex.DTypeError),
    ],
)
def test_making_refuses_by_name(argument, call, error):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(argument), str(caught.value)


def test_near_names_and_hints_are_given():
    with pytest.raises(ex.UnknownPresetError, match="coder"):
        ml.create_lora("codr", 32)
    with pytest.raises(ex.DeviceError, match="pip install"):
        ml.MicroLoRA(config(), 8, device="cuda")
    many = make(4, 4, 1, names=tuple(f"layers.{i}.q_proj" for i in range(40)))
    with pytest.raises(ex.UnknownModuleError, match=r"layers\.17\.q_proj.*40 in all"):
        many.forward(np.ones(4), "layer.17.q_proj")


# -- hostile files --


def container(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


FACTOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HOSTILE = {
    "empty": b"",
    "shorter than a length": b"abc",
    "length beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
    "length of all ones": b"\xff" * 8 + b"{}",
    "truncated header": container({"a": FACTOR}, b"\0" * 24)[:20],
    "truncated body": container({"a": FACTOR}, b"\0" * 23),
    "no json": container(b"not json"),
    "not utf-8": container(b"\xff\xfe{}"),
    "a list": container([1, 2]),
    "deep nesting": container(b"[" * 100_000),
    "negative offset": container({"a": {**FACTOR, "data_offsets": [-8, 24]}}, b"\0" * 24),
    "offsets reversed": container({"a": {**FACTOR, "data_offsets": [24, 0]}}, b"\0" * 24),
    "offsets beyond": container({"a": {**FACTOR, "data_offsets": [0, 2**60]}}, b"\0" * 24),
    "huge shape": container({"a": {**FACTOR, "shape": [2**40, 2**40]}}, b"\0" * 24),
    "wrong size": container({"a": {**FACTOR, "shape": [2, 4]}}, b"\0" * 24),
    "unknown dtype": container({"a": {**FACTOR, "dtype": "F33"}}, b"\0" * 24),
    "same name twice": container(b'{"a":%b,"a":%b}' % ((json.dumps(FACTOR).encode(),) * 2), b"\0" * 24),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0}.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["a.safetensors", "adapter_model.safetensors"])
def test_hostile_files_are_refused_by_name(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(HOSTILE[kind])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["a"]}')
    for mmap in (False, True):
        for call in (ml.load, ml.MicroLoRA.load):
            with pytest.raises(ex.FormatError) as caught:
                call(path, mmap=mmap)
            assert name in str(caught.value)
    with pytest.raises(ex.FormatError):
        ml.Adapter(HOSTILE[kind])
    lora = make()
    before = state_of(lora)
    with pytest.raises(ex.FormatError):
        lora.import_weights(HOSTILE[kind])
    assert state_of(lora) == before


def test_missing_files_and_folders_are_the_system_s_own_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        ml.load(tmp_path / "none.safetensors")
    with pytest.raises(ex.FormatError, match=r"adapter_config\.json"):
        ml.load(tmp_path)
    with pytest.raises(OSError, match="none"):
        ml.save(make(), tmp_path / "none" / "a.safetensors")
    with pytest.raises(TypeError):
        ml.load(None)
    with pytest.raises(TypeError):
        ml.load(3.5)


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, name):
    """A limit on file size fails the write as a full disk does; Rust's own tests fill a real one."""
    run_python(
        "import resource, signal, sys, os, pathlib, microlora as ml\n"
        "from support import make\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "old, new = make(64, 64, 4, seed=1), make(64, 64, 4, seed=2)\n"
        "old.save(path)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "files = sorted(p.name for p in path.parent.rglob('*'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try: new.save(path)\n"
        "except OSError as e: assert e.filename or 'a.safetensors' in str(e), e\n"
        "else: raise AssertionError('the save passed')\n"
        "assert sorted(p.name for p in path.parent.rglob('*')) == files, list(path.parent.rglob('*'))\n"
        "again = ml.load(path)\n"
        "assert (again.lora_a('m') == old['m'].lora_a).all()\n",
        tmp_path / name,
    )
