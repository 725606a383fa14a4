"""The compiled core: types, and the documentation of what the public classes inherit.

Arrays that come in may be anything that NumPy can view as floating point: float32, C-contiguous ones are
read in place, others (float64, float16, lists, CPU torch tensors) are copied to float32 first; integers are
refused. Nobody may write to an array while a call reads it. In every formula x is a row vector and ``dY = s
(x A) B``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NoReturn, Self, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import disjoint_base

from microlora.progress import CancelToken, Progress

__all__ = [
    "AdaptationResult",
    "Adapter",
    "AdapterFile",
    "Bandit",
    "Chain",
    "Choice",
    "Contrastive",
    "Ewc",
    "FeedbackBase",
    "Generation",
    "Gradient",
    "HotSwap",
    "MicroLora",
    "ModuleHandle",
    "Optimizer",
    "Preference",
    "QuantizedAdapter",
    "ReplayMemory",
    "Reward",
    "Scan",
    "Snapshot",
    "Sona",
    "StepResult",
    "SwapHandle",
    "Target",
    "__version__",
    "adapter_file_formats",
    "adapter_file_kinds",
    "adapter_from_factors",
    "available_isas",
    "block_types",
    "combine",
    "compose",
    "dequantize_blocks",
    "diff",
    "evaluate",
    "extract_from_arrays",
    "extract_from_files",
    "from_bytes",
    "fuse_model",
    "gguf_adapter",
    "gguf_alpha",
    "gguf_interleaves",
    "gguf_keep_names",
    "gguf_lost_blocks",
    "gguf_stack",
    "gguf_translate",
    "isa",
    "list_tensors",
    "load",
    "load_any",
    "match_patterns",
    "match_whole",
    "merge_adapters",
    "merge_mask",
    "merge_methods",
    "num_threads",
    "off_policy",
    "probe_fma_gflops",
    "probe_forward_ns",
    "probe_read_gbps",
    "probe_swap",
    "quantize_blocks",
    "resize",
    "save_gguf",
    "save_peft",
    "save_single",
    "scan_file",
    "set_num_threads",
    "sona_config",
    "unfuse_model",
    "write_file",
    "write_safetensors",
]

__version__: str

@disjoint_base
class FeedbackBase:
    """Base of all feedback: immutable values, checked when they are made, equal and picklable by content."""

    @property
    def width(self) -> int:
        """Number of features of the output that this feedback is about."""
    def __eq__(self, value: object, /) -> bool: ...
    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]: ...

@final
class Target(FeedbackBase):
    """The output that was wanted: ``base + dY``, or ``dY`` itself where no ``base`` is passed with it.

    With ``"mse"`` the loss is ``1/2 |y - t|^2``, summed over features (not their mean), so that its
    gradient is ``y - t``. With ``"cosine"`` it is ``1 - cos(y, t)``. A target teaches about ten times as
    much as a scalar.

    Args:
        t: float32 (out_features,): the wanted output.
        loss: ``"mse"`` or ``"cosine"``.

    Raises:
        ConfigError: Another name for ``loss``.
        ShapeError: ``t`` is empty or not a vector.
        NonFiniteError: NaN or infinity in ``t``, or numbers whose squares leave float32.
        FeedbackError: All zeros with the cosine loss.
    """

    def __new__(cls, t: ArrayLike, loss: str = "mse") -> Self: ...
    @property
    def t(self) -> NDArray[np.float32]:
        """float32 (out_features,), read-only: the target; of unit length with the cosine loss."""
    @property
    def loss(self) -> Literal["mse", "cosine"]:
        """How the output is compared with it."""

@final
class Gradient(FeedbackBase):
    """The gradient of a loss of your own with respect to the layer's output, ``dL/dy``.

    Args:
        g: float32 (out_features,): the gradient; the step goes against it.

    Raises:
        ShapeError: ``g`` is empty or not a vector.
        NonFiniteError: NaN or infinity in ``g``, or numbers whose squares leave float32.
    """

    def __new__(cls, g: ArrayLike) -> Self: ...
    @property
    def g(self) -> NDArray[np.float32]:
        """float32 (out_features,), read-only: the gradient."""

@final
class Reward(FeedbackBase):
    """A score, with the embedding of the response that earned it.

    The loss is ``1/2 (e . dY - kappa (R - b))^2``: the adapter's own score of the response's direction e is
    pulled to the advantage over the running mean b of earlier rewards (a contextual bandit with a baseline).

    Args:
        r: The reward R, any finite number.
        response: float32 (out_features,): embedding of the response; it is scaled to unit length.

    Raises:
        FeedbackError: No ``response`` (a scalar has no direction), all zeros in it, or a reward that is not
            finite.
        ShapeError: ``response`` is empty or not a vector.
        NonFiniteError: NaN or infinity in ``response``.
    """

    def __new__(cls, r: float, response: ArrayLike | None = None) -> Self: ...
    @property
    def r(self) -> float:
        """The reward."""
    @property
    def response(self) -> NDArray[np.float32]:
        """float32 (out_features,), read-only: direction of the response, of unit length."""

@final
class Preference(FeedbackBase):
    """One response was preferred to another (Bradley and Terry 1952), on cosines with the output.

    With ``m = beta (cos(y, chosen) - cos(y, rejected))`` the loss is
    ``-p log sigmoid(m) - (1 - p) log sigmoid(-m)``.

    Args:
        chosen: float32 (out_features,): embedding of the preferred response; scaled to unit length.
        rejected: float32 (out_features,): embedding of the other one; scaled to unit length.
        p: Probability that ``chosen`` is the better one, 0 to 1.
        beta: Inverse temperature, above 0.

    Raises:
        ShapeError: Widths differ, or an array is empty or not a vector.
        NonFiniteError: NaN or infinity in an array.
        FeedbackError: ``p`` or ``beta`` out of range, or an array of zeros.
    """

    def __new__(cls, chosen: ArrayLike, rejected: ArrayLike, p: float = 1.0, beta: float = 20.0) -> Self: ...
    @property
    def chosen(self) -> NDArray[np.float32]:
        """float32 (out_features,), read-only, of unit length."""
    @property
    def rejected(self) -> NDArray[np.float32]:
        """float32 (out_features,), read-only, of unit length."""
    @property
    def p(self) -> float:
        """Probability that ``chosen`` is the better one."""
    @property
    def beta(self) -> float:
        """Inverse temperature."""

@final
class Contrastive(FeedbackBase):
    """The right answer among wrong ones: InfoNCE (arXiv 1807.03748) on cosines with the output.

    The loss is ``-log softmax(cos(y, .) / tau)`` of the positive among positive and negatives.

    Args:
        positive: float32 (out_features,): embedding of the right answer; scaled to unit length.
        negatives: float32 (k, out_features) or (out_features,): the wrong ones, k at least 1; scaled
            likewise.
        tau: Temperature, above 0.

    Raises:
        ShapeError: No negative, other widths, or an empty array.
        NonFiniteError: NaN or infinity in an array.
        FeedbackError: ``tau`` out of range, or a row of zeros.
    """

    def __new__(cls, positive: ArrayLike, negatives: ArrayLike, tau: float = 0.05) -> Self: ...
    @property
    def positive(self) -> NDArray[np.float32]:
        """float32 (out_features,), read-only, of unit length."""
    @property
    def negatives(self) -> NDArray[np.float32]:
        """float32 (k, out_features), read-only, rows of unit length."""
    @property
    def tau(self) -> float:
        """Temperature."""

@final
class StepResult:
    """What one call of ``instant`` or ``adapt`` did."""

    @property
    def rule(self) -> Literal["rls", "nlms", "accumulate"]:
        """Which rule ran."""
    @property
    def loss_before(self) -> float | None:
        """Loss of this event before the step, in the units of its feedback; None for a bare gradient."""
    @property
    def loss_after(self) -> float | None:
        """Loss of this event after the step; None for a bare gradient, or where nothing was applied."""
    @property
    def grad_norm_a(self) -> float:
        """Frobenius norm of dL/dA of this event; 0 where A is not trained."""
    @property
    def grad_norm_b(self) -> float:
        """Frobenius norm of dL/dB of this event."""
    @property
    def step(self) -> float:
        """Share of the output error that the step removes: ``u.k`` of RLS, ``eta |u|^2`` of NLMS."""
    @property
    def halvings(self) -> int:
        """How often NLMS halved its step before the loss fell."""
    @property
    def baseline(self) -> float | None:
        """Mean reward before this event; None for other feedback."""
    @property
    def applied(self) -> bool:
        """Whether weights (``instant``) or pending gradients (``adapt``) changed."""
    @property
    def reason(self) -> str | None:
        """Why nothing was applied; None where something was."""
    @property
    def version(self) -> int:
        """Version of the learner after the step."""

@final
class AdaptationResult:
    """What one turn of a loop did."""

    @property
    def applied(self) -> bool:
        """Whether weights changed."""
    @property
    def loop_type(self) -> Literal["instant", "background", "deep"]:
        """Which loop."""
    @property
    def outcome(
        self,
    ) -> Literal["event", "accepted", "kept", "rolled_back", "goes_on", "cancelled", "warmed_up"]:
        """What it came to: kept is the live weights where the result was refused; goes_on left work."""
    @property
    def latency_us(self) -> float:
        """Time that it took in the core, microseconds."""
    @property
    def quality_delta(self) -> float:
        """Loss before less loss after: of the event, or of the held-out samples; NaN where not measured."""
    @property
    def loss_before(self) -> float | None:
        """That loss before; None where it was not measured."""
    @property
    def loss_after(self) -> float | None:
        """That loss after; None where it was not measured."""
    @property
    def samples_used(self) -> int:
        """Samples that it learned from."""
    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say, and why something was skipped or refused."""
    @property
    def event(self) -> int | None:
        """Number of the event; None where none was kept."""
    @property
    def version(self) -> int:
        """Version of the live learner afterwards."""

@disjoint_base
class Sona:
    """The compiled part of :class:`microlora.SonaLoop`: a learner, its memory and its consolidations."""

    def __new__(cls, lora: MicroLora, manager: HotSwap, settings_json: str) -> Self: ...
    def instant_adapt(
        self,
        x: ArrayLike | str,
        feedback: FeedbackBase | str,
        quality: float | None = None,
        module: str | None = None,
        base: ArrayLike | None = None,
    ) -> AdaptationResult:
        """Learns from one event at once, and keeps it for the background loop; the next ``forward`` sees it.

        One event in ten (``holdout``) is held out: it is kept to measure with, and no loop trains on it.

        Args:
            x: float32 (in_features,): the layer's input; or a text, where there is an encoder.
            feedback: A `Target`, `Gradient`, `Reward`, `Preference` or `Contrastive`; or the text of the
                response, for a text, which ``quality`` then rewards. Prefer a target where there is one: a
                scalar teaches about a tenth.
            quality: How good it was, 0 to 1. Targets below ``quality_threshold`` are passed over, others
                weigh ``(quality - threshold) / (1 - threshold)``; other feedback is never dropped.
            module: Name of the module; None is every module.
            base: float32 (out_features,): output of the frozen layer; see :meth:`MicroLora.instant`. With a
                text the embedding is it, for modules as wide as their input.

        Returns:
            What was done; ``notes`` say why an event was skipped.

        Raises:
            NonFiniteError: NaN or infinity, or a quality of NaN.
            FeedbackError: A quality out of its range, or feedback that gives no direction.
            MicroLoraError: As :meth:`MicroLora.instant`. Nothing changes and nothing is counted then.
        """
    def forward(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """``dY(x)`` of the live weights; see :meth:`MicroLora.forward`."""
    def forward_add(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> None:
        """``out += dY(x)`` of the live weights; see :meth:`MicroLora.forward_add`."""
    def modules(self) -> list[str]:
        """Module names, in order."""
    def maybe_background(self, force: bool = False) -> AdaptationResult | None:
        """One turn of the background loop, where one is due, within ``max_ms``; None where none is."""
    def run_background(self, callback: Callable[[AdaptationResult], object]) -> None:
        """Serves the background loop without the GIL until `stop_background`.

        Args:
            callback: Gets the result of every turn; False ends the loop.
        """
    def stop_background(self) -> None:
        """Ends `run_background` soon."""
    def pause(self) -> None:
        """Waits until no turn is under way and lets none begin: for a fork."""
    def resume(self, child: bool = False) -> None:
        """Ends a pause; ``child`` says that this is a forked child."""
    def stats(self) -> dict[str, Any]:
        """Counts, times (microseconds, of the core's own work) and sizes; None where nothing was measured."""
    def samples(
        self, held_out: bool
    ) -> list[
        tuple[
            int,
            NDArray[np.float32],
            FeedbackBase,
            NDArray[np.float32] | None,
            str | None,
            float | None,
            float,
        ]
    ]:
        """The reservoir's samples: ``(event, x, feedback, base, module, quality, weight)`` each.

        Args:
            held_out: The samples that no loop trains on, or the others.
        """
    def evaluate(self, adapter: Adapter | None = None) -> float | None:
        """Held-out loss of the live weights or of an adapter's; None without held-out samples."""
    def install(self, adapter: Adapter, samples_used: int, gate: bool = True) -> AdaptationResult:
        """Lets a trained adapter serve where its held-out loss passes the gate; the rules start afresh."""
    def adapter(self, config_json: str | None = None, metadata_json: str | None = None) -> Adapter:
        """The live weights, with these settings attached; of an ensemble the first member's."""
    def consolidated(self, config_json: str | None = None, metadata_json: str | None = None) -> Adapter:
        """The last accepted weights."""
    def ensemble(self) -> list[tuple[Adapter, NDArray[np.float32]]]:
        """The live weights of every member with its centroid; a single one has a centroid of no numbers."""
    def warm_up(self, x: ArrayLike) -> float:
        """Chooses A from unlabelled inputs before anything is consolidated.

        Args:
            x: float32 (n, in_features).

        Returns:
            The share of their energy that A holds, 0 to 1; the least of the modules.

        Raises:
            ConfigError: The loop has consolidated; `deep_optimize` moves A later.
            ShapeError: Another width.
        """
    def choose(self, x: ArrayLike, arms: Sequence[str], module: str | None = None) -> Choice:
        """Chooses one of some named arms for an input: bottleneck LinUCB.

        Args:
            x: float32 (in_features,).
            arms: Their names.
            module: Whose bottleneck to choose by; None takes the first.

        Raises:
            ConfigError: No arms, an arm twice, or another module than that of the first choice.
            MicroLoraError: An input that does not fit. Nothing changes in any error.
        """
    def reward(self, choice: int, reward: float) -> float:
        """Says what a choice earned.

        Args:
            choice: Its ``id``.
            reward: A finite number.

        Returns:
            The reward that was expected.

        Raises:
            UnknownChoiceError: A choice that is unknown or settled.
            NonFiniteError: NaN or infinity.
        """
    def choices(self) -> list[tuple[str, float, float]]:
        """``(arm, propensity, reward)`` of the last choices that were settled, for off-policy evaluation."""
    def to_bytes(self, config_json: str | None = None) -> bytes:
        """The whole loop as bytes, with a text of the caller's; see `sona_config`."""
    def restore(self, data: bytes) -> None:
        """Goes on from the bytes of a loop with the same modules, shapes and settings.

        Raises:
            FormatError: Not a state, a damaged one, or one of a newer version.
            ConfigError: Of other modules or settings.
        """
    def open_dir(
        self,
        dir: str | PathLike[str],
        config_json: str | None,
        journal: tuple[str, float, int, int | None] | None = None,
    ) -> str:
        """Opens a state directory, and from now on writes there; what was found, as JSON."""
    def checkpoint(self) -> int:
        """Saves the state in its directory; returns its bytes."""
    def sync(self) -> None:
        """Writes the journal through to the disk, whatever its policy; nothing where there is none."""
    def close(self) -> None:
        """Leaves the state directory; the journal is synced first."""
    def forget(self, event: int, how: str | None = None) -> str:
        """Takes an event out of what was learned from it.

        Args:
            event: Its number.
            how: ``"replay"`` (exact), ``"downdate"`` (within 1e-5), or None for the first of them that is
                possible.

        Returns:
            Which it was.

        Raises:
            FeedbackError: An event that is unknown, or that neither way can take out; says why. Nothing
                changes then.
        """
    def audit_json(self) -> str:
        """What the journal holds, as JSON."""
    @property
    def enabled(self) -> bool:
        """Whether ``forward`` adds anything; learning goes on."""
    @enabled.setter
    def enabled(self, value: bool, /) -> None: ...
    @property
    def version(self) -> int:
        """Version of the live learner: counts every change of its weights."""

@disjoint_base
class AdapterFile:
    """The compiled part of :class:`microlora.AdapterFile`: all that a file holds."""

    def __new__(cls, source: AdapterFile) -> Self: ...
    @staticmethod
    def open(
        path: str | PathLike[str],
        mmap: bool,
        strict: bool,
        limits: tuple[int, int, int, int] | None = None,
        alpha: float | None = None,
        orientation: str | None = None,
    ) -> AdapterFile:
        """Reads any known format.

        Raises:
            FormatError: The file is broken, ambiguous, beyond the limits or of no known format.
            OSError: The file cannot be read.
        """

    @staticmethod
    def build(
        modules: Sequence[
            tuple[str, str, float, bool, tuple[str, Sequence[int], bytes], tuple[str, Sequence[int], bytes]]
        ],
        extra: Sequence[tuple[str, str, Sequence[int], bytes]],
        config_json: str | None = None,
        metadata_json: str | None = None,
        peft_config: str | None = None,
        prefix: str | None = None,
    ) -> AdapterFile:
        """Content from Python.

        Args:
            modules: (path, kind, alpha, use_rslora, A, B) of each, a factor as (dtype, shape, bytes).
            extra: Other tensors as (name, dtype, shape, bytes).
            config_json: Settings of ours.
            metadata_json: Metadata of ours.
            peft_config: The text of an adapter_config.json.
            prefix: PEFT's prefix of keys, where it was repeated.

        Raises:
            ShapeError: Byte counts or shapes that do not fit.
            ConfigError: Unknown kind or dtype, a name twice.
            NonFiniteError: NaN or infinity in a factor.
        """

    @staticmethod
    def of(adapter: Adapter) -> AdapterFile:
        """An adapter as a file would hold it."""

    @staticmethod
    def of_quantized(adapter: QuantizedAdapter) -> AdapterFile:
        """A quantised adapter as a file would hold it."""

    @property
    def format(self) -> str:
        """Name of the format it was read from; empty when it was built."""

    @property
    def file(self) -> str:
        """Where it was read from."""

    def rows(
        self,
    ) -> list[tuple[str, str, int, float, bool, tuple[str, list[int]], tuple[str, list[int]]]]:
        """`(path, kind, rank, alpha, use_rslora, (dtype, shape) of A, of B)` of each module."""

    def factor_bytes(self, module: int) -> tuple[bytes, bytes]:
        """Bytes of A and of B of the module at that place in `rows`."""

    def extra(self) -> list[tuple[str, str, list[int]]]:
        """`(name, dtype, shape)` of each tensor that is no factor."""

    def extra_bytes(self, tensor: int) -> bytes:
        """Bytes of the tensor at that place in `extra`."""

    def variant_rows(self) -> list[tuple[str, str, str]]:
        """`(kind, at, why)` of everything that is not plain LoRA on linear layers."""

    @property
    def unused(self) -> list[str]:
        """Tensors and settings that nothing uses."""

    @property
    def notes(self) -> list[str]:
        """What is worth knowing and no error."""

    @property
    def has_blocks(self) -> bool:
        """True where a factor or more is in blocks."""

    @property
    def peft_config(self) -> str | None:
        """The text of `adapter_config.json`, where there was one."""

    @property
    def prefix(self) -> str | None:
        """PEFT's prefix of keys, where it was repeated."""

    @property
    def config_json(self) -> str | None:
        """Settings of ours, as JSON."""

    @property
    def metadata_json(self) -> str | None:
        """Metadata of ours, as JSON."""

    @property
    def header(self) -> dict[str, str]:
        """Other entries of a safetensors header."""

    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, dtypes, scaling and data: 64 hex digits."""

    @property
    def weights_sha256(self) -> str | None:
        """The fingerprint that the file says its weights have."""

    def lost_in(self, format: str, allow: Sequence[str]) -> list[tuple[str, str]]:
        """`(kind, at)` of what a format that is one key style cannot hold of it, and of what is dropped.

        Raises:
            ConfigError: No such format.
        """

    def save_style(self, path: str | PathLike[str], format: str, allow: Sequence[str]) -> list[str]:
        """Writes a format that is one key style, without what `allow` drops by name; gives back notes.

        Raises:
            UnsupportedVariantError: Something that the format cannot hold and that is not dropped.
            ConfigError: No such format, or names, ranks or scales that it cannot hold.
            OSError: The system refused; what was there is left whole.
        """

    def resolved(self, names: Sequence[str]) -> AdapterFile:
        """The same content under the names that the base's modules have, Kohya's underscores made dots.

        Raises:
            FormatError: A name that no module of the base has, or several have.
        """

    def runnable(self, allow: Sequence[str]) -> Adapter:
        """The adapter that runs, without the variants that `allow` drops by name.

        Raises:
            UnsupportedVariantError: A variant is left.
        """

    def save_single(self, path: str | PathLike[str], lost: Sequence[str], expand: bool) -> None:
        """Writes all of it to one file of ours; of variants of the kinds in `lost` it says nothing.

        Blocks of linear layers stay blocks without ``expand``.

        Raises:
            OSError: The system refused; an older file is left whole.
        """

    def lost_in_peft(self) -> list[tuple[str, str]]:
        """`(kind, at)` of what a PEFT directory cannot hold of it."""

    def save_peft(self, path: str | PathLike[str]) -> None:
        """Writes a PEFT directory, without what `lost_in_peft` lists.

        Raises:
            ConfigError: Modules that one PEFT configuration cannot describe.
            OSError: The system refused; older files are left whole.
        """

    def unpacked(self, experts: int | None = None) -> AdapterFile:
        """The same content with packed experts as modules of their own.

        Raises:
            ConfigError: No packed experts, or a number that the ranks do not give.
        """

@disjoint_base
class Adapter:
    """The compiled part of :class:`microlora.Adapter`: an immutable set of factors with its settings."""

    def __new__(cls, source: Adapter | bytes) -> Self: ...
    def to_bytes(self) -> bytes:
        """The adapter as the bytes of a single safetensors file; the same content gives the same bytes.

        Raises:
            FormatError: A tensor that the format cannot hold.
        """
    def modules(self) -> list[str]:
        """Module names, in order."""
    def describe(self, module: str) -> tuple[int, int, int, float, bool, str, str]:
        """``(in_features, out_features, rank, alpha, use_rslora, dtype of A, dtype of B)`` of a module.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
    def lora_a(self, module: str) -> NDArray[np.float32]:
        """A of a module: float32 (rank, in_features), C-contiguous, a read-only copy.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
    def lora_b(self, module: str) -> NDArray[np.float32]:
        """B of a module: float32 (out_features, rank), C-contiguous, a read-only copy.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
    def raw(self, module: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Stored bits of A (rank, in_features) and B (out_features, rank); bf16 comes as uint16.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
    @property
    def param_count(self) -> int:
        """Numbers in all factors."""
    @property
    def memory_bytes(self) -> int:
        """Bytes resident: factors as they lie in memory (rows padded to 16 numbers), and extra tensors."""
    @property
    def config_json(self) -> str | None:
        """Settings as JSON, or None where the file carried none."""
    @property
    def metadata_json(self) -> str | None:
        """Metadata as JSON, or None where the file carried none."""
    @property
    def peft_config(self) -> str | None:
        """The text of the ``adapter_config.json`` it was read from, or None."""
    def extra_tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name to ``(dtype, shape)`` of every tensor that is kept but is no factor."""
    def extra_bytes(self, name: str) -> bytes:
        """Little-endian bytes of one extra tensor.

        Raises:
            UnknownModuleError: There is no such tensor.
        """
    def with_json(self, config_json: str | None, metadata_json: str | None) -> Adapter:
        """The same weights (shared) with other settings and metadata."""
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]: ...

@disjoint_base
class QuantizedAdapter:
    """The compiled part of :class:`microlora.QuantizedAdapter`: factors in blocks, with their settings."""

    def __new__(cls, source: QuantizedAdapter | bytes) -> Self: ...
    @staticmethod
    def quantize(
        adapter: Adapter, types: Mapping[str, tuple[str, str]], b_along_rank: bool = False
    ) -> QuantizedAdapter:
        """Quantises an adapter: `{module: (type of A, type of B)}`.

        Raises:
            ShapeError: A width that is not whole blocks of its type.
            NonFiniteError: Numbers too large for the type's scales.
            ConfigError: An unknown type, or a module without types.
            UnknownModuleError: Types for a module that the adapter does not have.
        """
    def dequantize(self) -> Adapter:
        """The plain adapter: float32 where a factor was quantised."""
    def to_bytes(self) -> bytes:
        """The adapter as the bytes of a single safetensors file; the same content gives the same bytes."""
    def save_single(self, path: str | PathLike[str]) -> None:
        """Writes the single file through a temporary sibling and a rename.

        Raises:
            OSError: The system refused; an older file is left whole.
        """
    def forward(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """What the module adds to its layer's output: ``dY = s (x A) B``, decoded in registers.

        Args:
            x: float32 (in_features,) or (n, in_features), as for :meth:`MicroLora.forward`.
            module: Name of the module; None where there is only one.
            out: float32 (out_features,) or (n, out_features) to fill: C-contiguous, writable, apart from
                ``x``.

        Returns:
            ``out``, or a new float32 array of that shape.

        Raises:
            ShapeError: Another width, or an ``out`` of another shape.
            DTypeError: Integers, or an ``out`` that is not float32.
            LayoutError: An ``out`` that cannot be written in place.
            NonFiniteError: NaN or infinity in ``x``; ``out`` is untouched.
            UnknownModuleError: The adapter has no such module.
            ConfigError: No module named where there are several.
        """
    def forward_add(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> None:
        """``out += dY(x)``; arguments and errors are those of :meth:`forward`, ``out`` is needed."""
    def forward_all(
        self, x: ArrayLike, modules: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """``{module: dY(x)}`` of modules that read the same input; see :meth:`MicroLora.forward_all`."""
    def modules(self) -> list[str]:
        """Module names, in order."""
    def describe(self, module: str) -> tuple[int, int, int, float, bool, str, str]:
        """``(in_features, out_features, rank, alpha, use_rslora, type of A, type of B)`` of a module.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
    def along(self, module: str) -> tuple[str, str]:
        """Which way the blocks of A and B lie: "features", "rank", or "" where there are none.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
    @property
    def param_count(self) -> int:
        """Numbers in all factors."""
    @property
    def memory_bytes(self) -> int:
        """Bytes resident: blocks and plain factors as they lie in memory, and extra tensors."""
    @property
    def config_json(self) -> str | None:
        """Settings as JSON, or None."""
    @property
    def metadata_json(self) -> str | None:
        """Metadata as JSON, or None."""
    def with_json(self, config_json: str | None, metadata_json: str | None) -> QuantizedAdapter:
        """The same weights (shared) with other settings and metadata."""
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]: ...

@disjoint_base
class Snapshot(Adapter):
    """The compiled part of :class:`microlora.Snapshot`: an adapter with what its learner remembered."""

    def __new__(cls, source: Snapshot | bytes) -> Self: ...
    def to_bytes(self) -> bytes:
        """Weights and learner state as bytes; the constructor takes them back.

        Raises:
            FormatError: A tensor that the format cannot hold.
        """
    @property
    def version(self) -> int:
        """Version of the learner when the snapshot was taken."""
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]: ...

@final
class ModuleHandle:
    """One module of a :class:`microlora.MicroLoRA`, found once: ``lora["q_proj"]``.

    It follows the learner: calls see its present weights.
    """

    def forward(self, x: ArrayLike, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """``dY(x)``; see :meth:`MicroLora.forward`, without the lookup of a name."""
    def forward_add(self, x: ArrayLike, out: NDArray[np.float32]) -> None:
        """``out += dY(x)``; see :meth:`MicroLora.forward_add`."""
    def delta_weight(self) -> NDArray[np.float32]:
        """float32 (out_features, in_features): the change of the weight, ``s (A B)^T``, a new array."""
    def raw(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Stored bits of A (rank, in_features) and B (out_features, rank); bf16 comes as uint16."""
    @property
    def name(self) -> str:
        """Name of the module."""
    @property
    def lora_a(self) -> NDArray[np.float32]:
        """A as float32 (rank, in_features), C-contiguous, a read-only copy."""
    @property
    def lora_b(self) -> NDArray[np.float32]:
        """B as float32 (out_features, rank), C-contiguous, a read-only copy."""
    @property
    def rank(self) -> int:
        """Rank r of the update."""
    @property
    def alpha(self) -> float:
        """Numerator of the scaling."""
    @property
    def scaling(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732)."""
    @property
    def in_features(self) -> int:
        """Width of x."""
    @property
    def out_features(self) -> int:
        """Width of the output."""
    @property
    def dtype(self) -> Literal["f32", "f16", "bf16"]:
        """Storage dtype of A."""
    @property
    def pending(self) -> int:
        """Events of ``adapt`` that wait for ``apply_updates``."""
    @property
    def ridge(self) -> float | None:
        """Ridge constant that this module's RLS started from; None before its first event."""

@disjoint_base
class MicroLora:
    """The compiled part of :class:`microlora.MicroLoRA`."""

    def __new__(
        cls,
        modules: Sequence[tuple[str, int, int, int, float]] | Adapter,
        *,
        use_rslora: bool,
        dtype: str,
        seed: int,
        dropout: float,
        instant: tuple[str, str, float, float, float | None, float, float, float | None],
    ) -> Self: ...
    def forward(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """What the module adds to its layer's output: ``dY = s (x A) B``.

        Args:
            x: float32 (in_features,) or (n, in_features). Float32 C-contiguous arrays are read in place,
                other floating point is copied; a batch may release the GIL.
            module: Name of the module; None where there is only one.
            out: float32 (out_features,) or (n, out_features) to fill: C-contiguous, writable, apart from
                ``x``.

        Returns:
            ``out``, or a new float32 array of that shape; exact zeros while B is zero or ``enabled`` is
            False.

        Raises:
            UnknownModuleError: No module of that name.
            ConfigError: ``module`` left out with several modules.
            ShapeError: ``x`` or ``out`` of another shape, or empty.
            DTypeError: ``x`` is not floating point, or ``out`` is not float32.
            LayoutError: ``out`` cannot be written in place or overlaps ``x``; ``x`` is byte-swapped.
            NonFiniteError: NaN or infinity in ``x``, or a product beyond float32.
        """
    def forward_add(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> None:
        """``out += dY(x)``: adds the module's part to the layer's output in place.

        Args:
            x: float32 (in_features,) or (n, in_features).
            module: Name of the module; None where there is only one.
            out: float32 (out_features,) or (n, out_features), needed: C-contiguous, writable, apart from
                ``x``.

        Raises:
            ConfigError: ``out`` is missing, or ``module`` with several modules.
            MicroLoraError: As :meth:`forward`; ``out`` is unchanged then.
        """
    def forward_all(
        self, x: ArrayLike, modules: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """``dY(x)`` of several modules that read the same input, all of one version of the weights.

        Args:
            x: float32 (in_features,) or (n, in_features).
            modules: Their names; None takes those there are of q_proj, k_proj and v_proj, else of gate_proj
                and up_proj.

        Returns:
            ``{module: float32 (out_features,) or (n, out_features)}``.

        Raises:
            ConfigError: Nothing to choose by default, or modules of different input widths.
            MicroLoraError: As :meth:`forward`.
        """
    def __getitem__(self, key: str, /) -> ModuleHandle: ...
    def __contains__(self, key: str, /) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def modules(self) -> list[str]:
        """Module names, in order."""
    def instant(
        self, x: ArrayLike, feedback: FeedbackBase, module: str | None = None, base: ArrayLike | None = None
    ) -> StepResult:
        """Learns from one event by a closed form; the next ``forward`` sees it.

        A squared-error target is learned by recursive least squares on B (Haykin, Adaptive Filter Theory,
        ch. 13): B is then the exact ridge solution of all such events so far. Other feedback takes a
        normalised LMS step that is halved until the event's loss falls.

        Args:
            x: float32 (in_features,): the layer's input.
            feedback: A `Target`, `Gradient`, `Reward`, `Preference` or `Contrastive`.
            module: Name of the module; None where there is only one.
            base: float32 (out_features,): output of the frozen layer for this x (for embeddings: x itself),
                so that feedback is about ``base + dY``; without it feedback is about dY alone.

        Returns:
            What was done; an event that teaches nothing is skipped, with the reason.

        Raises:
            FeedbackError: A bare number, which has no direction, or feedback that the rule in the settings
                does not take.
            ShapeError: ``x``, ``base`` or the feedback of another width.
            DTypeError: ``x`` or ``base`` is not floating point, or ``feedback`` is none.
            NonFiniteError: NaN or infinity, or a step that would leave float32. Nothing changes in any error.
            UnknownModuleError: No module of that name.
        """
    def adapt(
        self, x: ArrayLike, feedback: FeedbackBase, module: str | None = None, base: ArrayLike | None = None
    ) -> StepResult:
        """Adds one event's gradient to the module's pending sum; the weights wait for :meth:`apply_updates`.

        With ``u = s x A`` and ``g = dL/dy``: ``dL/dB = u^T g`` and ``dL/dA = s x^T (B g)``. Dropout of the
        settings acts on x here, and only here.

        Args:
            x: float32 (in_features,): the layer's input.
            feedback: As in :meth:`instant`.
            module: Name of the module; None where there is only one.
            base: float32 (out_features,): output of the frozen layer; see :meth:`instant`.

        Returns:
            Loss and gradient norms of the event.

        Raises:
            MicroLoraError: As :meth:`instant`; nothing changes then.
        """
    def apply_updates(self, lr: float, max_grad_norm: float | None = None) -> int:
        """``W -= lr * mean`` of the pending gradients of every module, then forgets them.

        Args:
            lr: Learning rate, 0 or above.
            max_grad_norm: Scale the mean gradients of all modules together down to this norm.

        Returns:
            How many events were applied.

        Raises:
            ConfigError: ``lr`` or ``max_grad_norm`` out of range.
            NonFiniteError: The step would leave float32. Nothing changes in either error.
        """
    def fit_input_basis(
        self,
        x: ArrayLike,
        module: str | None = None,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> float:
        """Sets A to the top right singular vectors of unlabelled inputs (the idea of EVA, arXiv 2410.07170).

        The inputs are not centred. A is scaled so that the mean of ``|s x A|^2`` over them is 1.

        Args:
            x: float32 (n, in_features), n at least the rank.
            module: Name of the module; None where there is only one.
            progress: Called with ``(done, total, message)`` between steps.
            cancel: Looked at between steps; a cancelled call changes nothing.

        Returns:
            The share of ``|x|^2`` that the rank holds, 0 to 1.

        Raises:
            ShapeError: Another width, or fewer rows than the rank.
            NonFiniteError: NaN or infinity in ``x``.
            FeedbackError: Every input is zero.
            CancelledError: ``cancel`` was set.
            ConfigError: Gradients are pending, or the adapter has learned what the new A cannot express.
        """
    def delta_weight(self, module: str | None = None) -> NDArray[np.float32]:
        """The change of the layer's weight, ``s (A B)^T``, in the orientation of torch and PEFT.

        Args:
            module: Name of the module; None where there is only one.

        Returns:
            float32 (out_features, in_features), new: ``forward(x) == x @ delta_weight().T``.

        Raises:
            UnknownModuleError: No module of that name.
        """
    def fuse_into(self, w: NDArray[np.float32], module: str | None = None) -> None:
        """``w += delta_weight()`` in place, without the array between.

        Args:
            w: float32 (out_features, in_features), C-contiguous and writable: the base layer's weight.
            module: Name of the module; None where there is only one.

        Raises:
            ShapeError: Another shape.
            DTypeError: Not float32.
            LayoutError: Read-only or not C-contiguous.
            NonFiniteError: NaN or infinity in ``w``. It is unchanged in every error.
            UnknownModuleError: No module of that name.
        """
    def unfuse_from(self, w: NDArray[np.float32], module: str | None = None) -> None:
        """``w -= delta_weight()`` in place: undoes :meth:`fuse_into` to 1e-6 of ``max(|w|, |delta|)``.

        Args:
            w: float32 (out_features, in_features), C-contiguous and writable.
            module: Name of the module; None where there is only one.

        Raises:
            MicroLoraError: As :meth:`fuse_into`.
        """
    def snapshot(self, config_json: str | None = None, metadata_json: str | None = None) -> Snapshot:
        """Weights and learner state, with these settings attached."""
    def restore(self, source: Adapter) -> None:
        """Goes back to a snapshot, or takes an adapter's weights.

        After a :class:`microlora.Snapshot` outputs and later learning are bit-identical to what they were;
        after a plain :class:`microlora.Adapter` the rules start afresh. ``version`` goes up either way.

        Args:
            source: A value with the same modules, shapes, ranks, alphas and dtypes.

        Raises:
            ConfigError: Other modules.
            ShapeError: Other shapes, ranks, alphas or dtypes.
            DTypeError: Neither of the two. Nothing changes in any error.
        """
    def adapter(self, config_json: str | None = None, metadata_json: str | None = None) -> Adapter:
        """The present weights, with these settings attached."""
    def set_storage(self, dtype: str) -> None:
        """What ``forward`` reads: the weights rounded to ``dtype``, while learning goes on in float32.

        This is mixed precision while training; ``"f32"`` goes back to the float32 weights, bit for bit.

        Args:
            dtype: ``"f32"``, ``"f16"`` or ``"bf16"``.

        Raises:
            ConfigError: Another name.
        """
    @property
    def param_count(self) -> int:
        """Numbers in all factors."""
    @property
    def memory_bytes(self) -> int:
        """Bytes resident now: weights, float32 masters, RLS state and pending gradients."""
    @property
    def version(self) -> int:
        """Counts every change of the weights."""
    @property
    def enabled(self) -> bool:
        """Whether ``forward`` gives the adapter's output; while False zeros. Learning goes on."""
    @enabled.setter
    def enabled(self, value: bool) -> None: ...
    @property
    def counters(self) -> dict[str, int]:
        """Events so far: ``instant``, ``adapt``, ``apply`` and ``skipped``."""
    def __hash__(self) -> NoReturn: ...

@final
class SwapHandle:
    """One module of a :class:`microlora.HotSwapManager`, found once: ``manager["q_proj"]``.

    Every call reads the generation that is active when it starts, and raises UnknownModuleError where that
    one lacks the module.
    """

    def forward(self, x: ArrayLike, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """``dY(x)``; see :meth:`HotSwap.forward`, without the lookup of a name."""
    def forward_add(self, x: ArrayLike, out: NDArray[np.float32]) -> None:
        """``out += dY(x)``; see :meth:`HotSwap.forward_add`."""
    def delta_weight(self) -> NDArray[np.float32]:
        """float32 (out_features, in_features): the change of the weight, ``s (A B)^T``, a new array."""
    @property
    def name(self) -> str:
        """Name of the module."""
    @property
    def lora_a(self) -> NDArray[np.float32]:
        """A as float32 (rank, in_features), C-contiguous, a read-only copy."""
    @property
    def lora_b(self) -> NDArray[np.float32]:
        """B as float32 (out_features, rank), C-contiguous, a read-only copy."""
    @property
    def rank(self) -> int:
        """Rank r of the update."""
    @property
    def scaling(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732)."""
    @property
    def in_features(self) -> int:
        """Width of x."""
    @property
    def out_features(self) -> int:
        """Width of the output."""

@final
class Choice:
    """What a :class:`Bandit` chose."""

    @property
    def id(self) -> int:
        """Number of the choice, from 1; the reward names it."""
    @property
    def arm(self) -> int:
        """Position of the chosen arm in the arms that were asked for."""
    @property
    def name(self) -> str:
        """Name of the chosen arm."""
    @property
    def propensity(self) -> float:
        """Probability of the choice: ``epsilon / n``, on the best arms plus ``(1 - epsilon) / ties``."""
    @property
    def scores(self) -> list[float]:
        """Expected reward plus exploration bonus of every arm that was asked for, in their order."""
    def __eq__(self, value: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]: ...
    @staticmethod
    def _from_fields(fields: tuple[int, int, str, float, list[float]]) -> Choice:
        """What pickling calls."""

@final
class Bandit:
    """Bottleneck LinUCB: chooses among named arms for an input and learns from the reward alone.

    LinUCB with one model per arm (Li et al. 2010, arXiv 1003.0146) on ``u = s x A`` of a module instead of x:
    ridge regression of the reward on u, one recursive least-squares step per reward, and the arm with the
    largest ``theta . u + alpha sqrt(u P u)`` is chosen. An arm is made when it is first asked for. The
    module's B plays no part and is not changed; fit A to inputs first (`MicroLora.fit_input_basis`).

    The arms belong to one A. When the module's A has other numbers than at the last choice, they start again
    and learn the last ``history`` rewarded inputs in the new bottleneck; older ones are forgotten.
    ``restarts`` counts that. Any number of threads may call it.

    Args:
        lora: The learner; its instant update must leave A alone (``InstantConfig.train`` is ``"b"``).
        module: Name of the module; None where there is only one.
        alpha: Weight of the exploration bonus, in units of the rewards; 0 is greedy. Default 0.3, for rewards
            between 0 and 1.
        ridge: Ridge of every arm, in units of the mean ``|u|^2`` (of the first input where A is not fitted).
            Default 1.
        epsilon: Share of choices drawn evenly from all arms, 0 to 1: off-policy evaluation of other policies
            needs some. Default 0.
        max_arms: Arms that may be named, 1 or more; an arm takes ``8 rank^2`` bytes. Default 256.
        max_open: Choices that may wait for a reward, 1 or more; the oldest is given up beyond it. Default
            1000.
        history: Rewarded choices kept with their inputs (``4 in_features`` bytes each). Default 1000; with 0
            nothing is logged, and another A starts from nothing.
        seed: Seed of ties and exploration. They are drawn by the number of the choice, so that the same
            history gives the same choices.

    Raises:
        ConfigError: A setting out of its range, or a learner that moves A.
        UnknownModuleError: The learner has no such module.

    Example:
        >>> import numpy as np, microlora as ml
        >>> from microlora import _core
        >>> lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=64)
        >>> bandit = _core.Bandit(lora)
        >>> choice = bandit.choose(np.ones(64, np.float32), ["short answer", "long answer"])
        >>> bandit.reward(choice, 1.0)
        0.0
    """

    def __new__(
        cls,
        lora: MicroLora,
        module: str | None = None,
        *,
        alpha: float | None = None,
        ridge: float | None = None,
        epsilon: float | None = None,
        max_arms: int | None = None,
        max_open: int | None = None,
        history: int | None = None,
        seed: int | None = None,
    ) -> Self: ...
    def choose(self, x: ArrayLike, arms: Sequence[str]) -> Choice:
        """Chooses one of the named arms for an input.

        Args:
            x: float32 (in_features,): the module's input.
            arms: Their names, each once; new ones are made.

        Returns:
            The choice; ties are drawn evenly.

        Raises:
            ConfigError: No arms, an arm twice, an empty name, or more arms than ``max_arms``.
            DTypeError: ``arms`` is not a sequence of str, or ``x`` not floating point.
            ShapeError: ``x`` of another shape.
            NonFiniteError: NaN or infinity in ``x``. Nothing changes in any of these cases.
        """
    def reward(self, choice: Choice | int, reward: float) -> float:
        """Gives a choice its reward; its arm learns at once.

        Args:
            choice: A `Choice`, or its id; rewards may come late and in any order.
            reward: A finite number; larger is better.

        Returns:
            The reward that was expected of the arm there, before this one.

        Raises:
            UnknownChoiceError: The choice has its reward, was given up (``max_open``) or never was.
            NonFiniteError: The reward is NaN or infinite.
            ConfigError: The reward is beyond 1e18. Nothing changes in any of these cases.
        """
    def log(self) -> list[tuple[int, str, float, float]]:
        """The latest rewarded choices, oldest first: ``(id, name of the arm, propensity, reward)``.

        At most ``history`` of them; see `off_policy`.
        """
    def arms(self) -> dict[str, tuple[int, float]]:
        """``{name: (rewards, mean reward)}`` of every arm that was asked for; NaN without a reward."""
    def to_bytes(self) -> bytes:
        """Everything as safetensors bytes: `from_bytes` goes on bit for bit."""
    @staticmethod
    def from_bytes(lora: MicroLora, data: bytes, module: str | None = None) -> Bandit:
        """Takes what `to_bytes` gave.

        Args:
            lora: A learner whose module has the same rank and width; where its A has other numbers the arms
                learn again at the next choice.
            data: The bytes.
            module: Name of the module; None where there is only one.

        Raises:
            FormatError: Bytes of anything else, or damaged ones.
            ShapeError: A bandit of another rank or width.
        """
    @property
    def settings(self) -> dict[str, float | int]:
        """Settings, by name."""
    @property
    def module(self) -> str:
        """Name of the module that it reads."""
    @property
    def waiting(self) -> int:
        """Choices that wait for a reward."""
    @property
    def dropped(self) -> int:
        """Choices that were given up because more than ``max_open`` waited."""
    @property
    def restarts(self) -> int:
        """How often the arms were learned again because the module's A had changed."""
    @property
    def memory_bytes(self) -> int:
        """Bytes resident: arms, waiting choices and log."""

@disjoint_base
class Generation:
    """The compiled part of :class:`microlora.hot_swap.Generation`."""

    def __new__(cls, manager: HotSwap) -> Self: ...
    @property
    def number(self) -> int:
        """Its number; also after it was released."""
    @property
    def released(self) -> bool:
        """Whether :meth:`release` was called."""
    def modules(self) -> list[str]:
        """Module names, in order.

        Raises:
            SwapError: It was released.
        """
    def forward(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """``dY(x)`` of this generation; see :meth:`HotSwap.forward`.

        Raises:
            SwapError: It was released.
        """
    def forward_add(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> None:
        """``out += dY(x)`` of this generation; see :meth:`HotSwap.forward_add`.

        Raises:
            SwapError: It was released.
        """
    def forward_all(
        self, x: ArrayLike, modules: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """``dY(x)`` of several modules that read the same input; see :meth:`HotSwap.forward_all`.

        Raises:
            SwapError: It was released.
        """
    def release(self) -> None:
        """Lets go of the generation; calls that are running on it finish, a second release does nothing."""
    def _adapter(self) -> Adapter | None:
        """Its adapter; None for generation 0."""

@disjoint_base
class HotSwap:
    """The compiled part of :class:`microlora.HotSwapManager`."""

    def __new__(cls, *, keep_previous: bool) -> Self: ...
    def forward(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """What the module adds to its layer's output, ``dY = s (x A) B``, in the active generation.

        Args:
            x: float32 (in_features,) or (n, in_features); a batch may release the GIL.
            module: Name of the module; None where the active adapter has only one.
            out: float32 (out_features,) or (n, out_features) to fill: C-contiguous, writable, apart from
                ``x``.

        Returns:
            ``out``, or a new float32 array of that shape; all of it of one generation.

        Raises:
            UnknownModuleError: The active generation lacks the module, or has no adapter yet.
            ConfigError: ``module`` left out with several modules.
            ShapeError: ``x`` or ``out`` of another shape, or empty.
            DTypeError: ``x`` is not floating point, or ``out`` is not float32.
            LayoutError: ``out`` cannot be written in place or overlaps ``x``; ``x`` is byte-swapped.
            NonFiniteError: NaN or infinity in ``x``, or a product beyond float32.
        """
    def forward_add(
        self, x: ArrayLike, module: str | None = None, out: NDArray[np.float32] | None = None
    ) -> None:
        """``out += dY(x)`` in the active generation.

        Args:
            x: float32 (in_features,) or (n, in_features).
            module: Name of the module; None where the active adapter has only one.
            out: float32 (out_features,) or (n, out_features), needed: C-contiguous, writable, apart from
                ``x``.

        Raises:
            ConfigError: ``out`` is missing, or ``module`` with several modules.
            MicroLoraError: As :meth:`forward`; ``out`` is unchanged then.
        """
    def forward_all(
        self, x: ArrayLike, modules: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """``dY(x)`` of several modules that read the same input, all of one generation.

        Args:
            x: float32 (in_features,) or (n, in_features).
            modules: Their names; None takes those there are of q_proj, k_proj and v_proj, else of gate_proj
                and up_proj.

        Returns:
            ``{module: float32 (out_features,) or (n, out_features)}``.

        Raises:
            ConfigError: Nothing to choose by default, or modules of different input widths.
            MicroLoraError: As :meth:`forward`.
        """
    def __getitem__(self, key: str, /) -> SwapHandle: ...
    def __contains__(self, key: str, /) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def modules(self) -> list[str]:
        """Module names of the active generation, in order."""
    @property
    def generation(self) -> int:
        """Number of the active generation: 0 before the first adapter, one more with every change."""
    @property
    def live_generations(self) -> int:
        """Generations that are not freed: the active one, the one before, older ones that readers hold."""
    @property
    def keep_previous(self) -> bool:
        """Whether the generation before the active one is kept for ``rollback``; False lets go of it."""
    @keep_previous.setter
    def keep_previous(self, value: bool) -> None: ...
    def forget_previous(self) -> bool:
        """Lets go of what is kept for ``rollback``.

        Returns:
            Whether there was anything.
        """
    def discard_standby(self) -> bool:
        """Lets go of the standby; a preparation that is under way goes on.

        Returns:
            Whether there was one.
        """
    @property
    def is_swapping(self) -> bool:
        """Whether work on a change is under way; readers need not care.

        True from the call of ``prepare_standby`` until its adapter stands by or has failed, and during
        ``swap``, ``rollback``, ``set_active`` and ``compare_and_swap``, their subscribers included.
        """
    def _begin(self) -> None:
        """One more piece of work for ``is_swapping``."""
    def _end(self) -> None:
        """One piece of work less."""
    def _active(self) -> Adapter | None:
        """The active adapter."""
    def _previous(self) -> Adapter | None:
        """The adapter that is kept for a rollback."""
    def _standby(self) -> Adapter | None:
        """The adapter that stands by."""
    def _check(
        self,
        adapter: Adapter,
        reshape: bool,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Looks an adapter over before it may serve: shapes, then every number, without the GIL."""
    def _expect(self, expected: int) -> None:
        """Raises SwapError unless this generation is the active one."""
    def _publish(self, adapter: Adapter, expected: int | None, reshape: bool) -> tuple[int, int]:
        """The exchange, for an adapter that was checked; numbers before and after."""
    def _ticket(self) -> int:
        """Number for a preparation that starts now."""
    def _install(self, adapter: Adapter, ticket: int, reshape: bool) -> None:
        """Lets an adapter that was checked stand by."""
    def _swap(self) -> tuple[int, int]:
        """The exchange with the standby; numbers before and after."""
    def _rollback(self) -> tuple[int, int]:
        """The exchange with what is kept; numbers before and after."""

@disjoint_base
class Chain:
    """The compiled part of :class:`microlora.LoraChain`."""

    def __new__(
        cls,
        lora: MicroLora,
        layers: Sequence[tuple[ArrayLike, ArrayLike | None]],
        *,
        activation: str,
        head: str,
        use_dora: Sequence[bool],
        gradient_checkpointing: bool,
    ) -> Self: ...
    @property
    def in_features(self) -> int:
        """Width of a row of x."""
    @property
    def out_features(self) -> int:
        """Width of an output."""
    @property
    def frozen_bytes(self) -> int:
        """Resident bytes of the frozen layers: rows of W padded to 16 numbers, biases, norms of rows."""
    def forward(self, x: ArrayLike) -> NDArray[np.float32]:
        """Outputs of the network with its adapters.

        Args:
            x: float32 (in_features,) or (n, in_features).

        Returns:
            float32 (out_features,) or (n, out_features), without softmax.

        Raises:
            ShapeError: Another width.
            SampleError: A row with NaN or infinity.
        """
    def gradients(
        self, x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None
    ) -> tuple[float, int, list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]]]:
        """Mean gradient of the loss over the rows; nothing is learned.

        Args:
            x: float32 (n, in_features).
            y: Integer labels (n,), or float32 targets (n, out_features) for the mse head.
            weights: float32 (n,): weight of each row's loss.

        Returns:
            Mean loss, peak activation bytes, and per layer the gradients of A (rank, in), B (out, rank) and,
            with DoRA, of the magnitudes (out,).

        Raises:
            SampleError: A row that cannot be used.
        """
    def fuse(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        """The layers with their adapters fused in: W' (out, in) and b of each; they need no adapter."""
    def frozen(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        """Copies of the frozen W (out, in) and b (out,) of each layer, read-only."""
    def magnitudes(self) -> list[NDArray[np.float32]]:
        """Magnitudes (out,) of the layers that are DoRA, in order; empty for plain LoRA."""
    def set_magnitudes(self, values: Sequence[ArrayLike]) -> None:
        """Replaces DoRA's magnitudes, whole or not at all.

        Raises:
            ConfigError: Not one per layer, or no DoRA.
            ShapeError: Another width.
        """
    def export_state(self) -> bytes:
        """All that learns, as bytes: factors, float32 masters, magnitudes and what rules remember."""
    def import_state(self, data: bytes) -> None:
        """Takes what :meth:`export_state` gave, whole or not at all.

        Raises:
            FormatError: Other bytes.
            ShapeError: The state of another chain.
            ConfigError: A state with magnitudes for a chain without, or the other way round.
        """

@final
class Optimizer:
    """Moments of one training run, and the compiled loop.

    ``"sgd"`` and ``"momentum"`` are torch's ``SGD`` (weight decay added to the gradient), ``"adamw"`` is
    AdamW (decoupled decay, arXiv 1711.05101). With ``lora_plus_ratio`` B learns at ratio times the rate of A
    (LoRA+, arXiv 2402.12354).

    Args:
        lora: The learner or chain whose shapes the moments take.
        kind: ``"sgd"``, ``"momentum"`` or ``"adamw"``.
        momentum: Decay of the velocity, 0 up to but not including 1.
        betas: Decays of AdamW's moments.
        eps: Added to the root of the second moment.
        weight_decay: 0 or above.
        lora_plus_ratio: Above 0.

    Raises:
        ConfigError: A setting out of its range.
    """

    def __new__(
        cls,
        lora: MicroLora | Chain,
        kind: str,
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = ...,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lora_plus_ratio: float = 1.0,
    ) -> Self: ...
    @property
    def kind(self) -> Literal["sgd", "momentum", "adamw"]:
        """The rule."""
    @property
    def steps(self) -> int:
        """Steps taken."""
    @property
    def memory_bytes(self) -> int:
        """Resident bytes of the moments: 8 per stored weight for AdamW, 4 for momentum, none for SGD."""
    @property
    def peak_activation_bytes(self) -> int:
        """Most bytes of a chain's activations and their gradients that were alive at once in its calls."""
    def step(
        self,
        lora: MicroLora,
        lr: float,
        *,
        max_grad_norm: float | None = None,
        ewc: Ewc | None = None,
        ewc_every: int = 1,
    ) -> tuple[int, float]:
        """One step along the mean of the gradients that ``lora.adapt`` left pending.

        Args:
            lora: The learner.
            lr: Learning rate, 0 or above.
            max_grad_norm: Global norm that the mean gradient is clipped to.
            ewc: Penalty against forgetting.
            ewc_every: It acts in every n-th step, n-fold: the same lambda at a part of the cost.

        Returns:
            Events in the step (0: nothing was pending), and the gradient's norm before clipping.

        Raises:
            ConfigError: A learner of other shapes, a rate out of its range.
            NonFiniteError: The step would overflow; nothing changes then.
        """
    def train(
        self,
        target: MicroLora | Chain,
        x: ArrayLike,
        y: ArrayLike,
        order: ArrayLike,
        lrs: Sequence[float] | NDArray[np.float64],
        *,
        batch_size: int,
        accumulation: int = 1,
        modules: Sequence[str] | None = None,
        weights: ArrayLike | None = None,
        base: ArrayLike | None = None,
        max_grad_norm: float | None = None,
        ewc: Any = None,
        ewc_every: int = 1,
        accumulate_fisher: bool = False,
        replay: ReplayMemory | None = None,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Steps over rows in a given order; several calls in sequence give the bits of one.

        Args:
            target: A learner (each module learns the same targets from the same inputs) or a chain.
            x: float32 (n, in).
            y: float32 (n, out): targets, loss ``1/2 |base + dY - t|^2`` per row; or integers (n,), labels.
            order: Integers: rows in the order of their visit.
            lrs: One learning rate per step: ``ceil(len(order) / (batch_size * accumulation))`` of them.
            batch_size: Rows of a batch; the last may be short.
            accumulation: Batches of a step; the step is that of one large batch.
            modules: Modules that learn; None takes those whose widths fit.
            weights: float32 (n,): weight of each row's loss, 0 or above.
            base: float32 (n, out): outputs of the frozen layer.
            max_grad_norm: Global norm that the mean gradient is clipped to.
            ewc: Penalty against forgetting.
            ewc_every: It acts in every n-th step, n-fold.
            accumulate_fisher: Adds the batches' squared gradients to the penalty's importance; those of
                replayed rows are not in it.
            replay: Rows of earlier tasks: as many as a batch has are drawn and join it. Losses that are
                returned are those of the data alone.
            progress: Called with (steps done, steps, what).
            cancel: Ends the call between two steps; what was done stays.

        Returns:
            float32 (steps,): mean loss of each step's rows before the step, penalty not counted; and float32
            (steps,): norm of the mean gradient before clipping.

        Raises:
            SampleError: A row that cannot be learned from; its step changed nothing.
            ShapeError: Widths that do not fit.
            ConfigError: Settings out of range, rows that do not exist, a memory of other rows than these.
            NonFiniteError: A step that would overflow, or a replayed row that does; it changed nothing.
            CancelledError: The token was set.
        """
    def to_bytes(self) -> bytes:
        """Moments, counts and settings, for :meth:`restore`."""
    def restore(self, data: bytes) -> None:
        """Goes on where :meth:`to_bytes` stood, bit for bit.

        Raises:
            FormatError: Other bytes, or a newer version.
            ConfigError: Other settings or shapes. Nothing changes then.
        """

@final
class ReplayMemory:
    """A uniform draw of the rows of earlier tasks, each with what the adapter answered to it.

    See `microlora.ReplayConfig` for the loss, the paper and the meaning of the weights.

    Args:
        capacity: Rows that are kept at most.
        label_weight: Weight of the replayed rows' own loss, 0 to 1e6.
        logit_weight: Weight of the distance to what was answered, 0 to 1e6.
        seed: Of what is kept and of what is drawn.

    Raises:
        ConfigError: A weight out of its range.
    """

    def __new__(cls, *, capacity: int, label_weight: float, logit_weight: float, seed: int) -> Self: ...
    def __len__(self) -> int:
        """Rows that are kept."""
    @property
    def capacity(self) -> int:
        """Rows that are kept at most."""
    @property
    def seen(self) -> int:
        """Rows that were offered so far."""
    @property
    def memory_bytes(self) -> int:
        """Resident bytes of the rows."""
    @property
    def places(self) -> NDArray[np.int64]:
        """int64 (rows,): number of each row in the stream, from 0."""
    @property
    def x(self) -> NDArray[np.float32]:
        """float32 (rows, in), read-only: inputs."""
    @property
    def y(self) -> NDArray[Any]:
        """Labels, int64 (rows,); or float32 (rows, out): targets less the frozen layer's output."""
    @property
    def outputs(self) -> NDArray[np.float32]:
        """float32 (rows, out), read-only: what was answered; of several modules side by side."""
    @property
    def weights(self) -> NDArray[np.float32]:
        """float32 (rows,): weight of each row's loss."""
    def offer(
        self,
        target: MicroLora | Chain,
        x: ArrayLike,
        y: ArrayLike,
        rows: ArrayLike | None = None,
        *,
        modules: Sequence[str] | None = None,
        weights: ArrayLike | None = None,
        base: ArrayLike | None = None,
    ) -> None:
        """Shows rows as the next of the stream; each row of the stream is kept with the same probability.

        Args:
            target: The learner or chain, whose present answers are stored.
            x: float32 (n, in).
            y: Targets or labels, as in `Optimizer.train`.
            rows: Integers: which rows, in the order of the stream; None takes all.
            modules: Modules that answer; None takes those whose widths fit.
            weights: float32 (n,): weight of each row's loss.
            base: float32 (n, out): outputs of the frozen layer.

        Raises:
            ConfigError: Rows that do not exist, or of other widths or modules than those that are kept.
            ShapeError: Widths that do not fit.
            SampleError: A row that is not finite. Nothing changes in any of these cases.
        """
    def check(
        self, target: MicroLora | Chain, x: ArrayLike, y: ArrayLike, *, modules: Sequence[str] | None = None
    ) -> None:
        """Refuses rows that could not join those that are kept, or the other way round.

        Raises:
            ConfigError: Other widths, labels instead of targets, or other modules.
        """
    def copy(self) -> ReplayMemory:
        """The same rows and draws in another object."""
    def to_bytes(self) -> bytes:
        """Rows, settings and where the draws stand, for :meth:`restore`."""
    def restore(self, data: bytes) -> None:
        """Goes on where :meth:`to_bytes` stood, bit for bit.

        Raises:
            FormatError: Other bytes, or a newer version.
            ConfigError: Other settings. Nothing changes then.
        """

@final
class Scan:
    """A file's tensors as they lie in it, looked at and not understood."""

    @staticmethod
    def of(file: AdapterFile) -> Scan:
        """The content of a file that a reader understood, under PEFT's names without a prefix."""

    @property
    def damage(self) -> str | None:
        """Why the container cannot be read, in its reader's words."""

    @property
    def header(self) -> dict[str, str]:
        """The header's entries."""

    def rows(
        self,
    ) -> list[tuple[str, str, list[int], tuple[float, float, int, int, int, bool, bool] | None]]:
        """`(name, dtype, shape, numbers)` of each tensor.

        Numbers are (norm, max_abs, NaN, infinite, zero, fits f16, fits bf16), the first two of those
        that are finite; None for a dtype whose numbers are not looked at.
        """

    def data(self, tensor: int) -> bytes:
        """Bytes of one tensor.

        Raises:
            ConfigError: There is no such tensor.
        """

    def delta_norm(self, a: int, b: int, experts: bool) -> float | None:
        """`|B A|_F` without scaling.

        None where these are no factors of one layer, or need more than 2^34 multiplications.

        Raises:
            ConfigError: There is no such tensor.
        """

def scan_file(path: str | PathLike[str], limits: tuple[int, int, int, int] | None = None) -> Scan:
    """Looks into a safetensors file; a broken one has ``damage``.

    Raises:
        OSError: The file cannot be read.
    """

def match_patterns(
    keys: Sequence[str], paths: Sequence[str]
) -> tuple[list[int | None], list[int], list[tuple[int, str]]]:
    """For each path the number of the first key of a PEFT pattern table that matches it.

    Then numbers of keys that match none, and those of refused ones with the reason.

    Raises:
        FormatError: The table would take too long.
    """

def match_whole(pattern: str, paths: Sequence[str]) -> list[bool]:
    """Whether a regular expression matches each path as a whole.

    Raises:
        ConfigError: An expression that only Python runs, or none.
    """

def write_safetensors(
    path: str | PathLike[str],
    tensors: Sequence[tuple[str, str, Sequence[int], bytes]],
    header: Mapping[str, str],
) -> None:
    """Writes tensors (name, dtype, shape, bytes) and header entries, whole or not at all.

    Raises:
        ConfigError: A name twice, or an unknown dtype.
        ShapeError: Bytes that do not fit a shape.
        OSError: The file cannot be written.
    """

def evaluate(
    target: MicroLora | Chain,
    x: ArrayLike,
    y: ArrayLike,
    *,
    modules: Sequence[str] | None = None,
    weights: ArrayLike | None = None,
    base: ArrayLike | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> NDArray[np.float32]:
    """Loss of every row, float32 (n,), mean over modules; nothing is learned. See :meth:`Optimizer.train`."""

def adapter_from_factors(
    modules: Sequence[tuple[str, ArrayLike, ArrayLike, float]], use_rslora: bool, dtype: str
) -> Adapter:
    """An adapter from (name, A (rank, in), B (out, rank), alpha); see `microlora.Adapter.from_factors`."""

def adapter_file_kinds() -> list[str]:
    """Every kind of variant that can be given up by name (`drop:<kind>`)."""

def adapter_file_formats() -> list[tuple[str, str]]:
    """Every format that is read: name, and what it is known by."""

def load(
    path: str | PathLike[str],
    mmap: bool,
    strict: bool,
    limits: tuple[int, int, int, int] | None = None,
    alpha: float | None = None,
    orientation: str | None = None,
    allow: Sequence[str] | None = None,
) -> tuple[Adapter, list[str], list[str]]:
    """Reads any known format: the adapter without what `allow` drops, unused tensors, and notes.

    Raises:
        FormatError: The file is broken.
        UnsupportedVariantError: The file is of a kind that must not be applied as plain LoRA.
        OSError: The file cannot be read.
    """

def load_any(
    path: str | PathLike[str],
    mmap: bool,
    strict: bool,
    limits: tuple[int, int, int, int] | None = None,
    alpha: float | None = None,
    orientation: str | None = None,
    allow: Sequence[str] | None = None,
) -> tuple[Adapter | QuantizedAdapter, list[str], list[str]]:
    """Reads any known format, quantised adapters included; otherwise as `load`.

    Raises:
        FormatError: The file is broken.
        UnsupportedVariantError: The file is of a kind that must not be applied as plain LoRA.
        OSError: The file cannot be read.
    """

def from_bytes(data: bytes, strict: bool) -> tuple[Adapter, list[str], list[str]]:
    """The same from the bytes of a single file.

    Raises:
        FormatError: The bytes are broken.
        UnsupportedVariantError: They are of a kind that must not be applied as plain LoRA.
    """

def save_single(adapter: Adapter, path: str | PathLike[str]) -> None:
    """Writes a single safetensors file through a temporary sibling and a rename.

    Raises:
        FormatError: A tensor that the format cannot hold.
        OSError: The system refused; an older file is left whole.
    """

def save_peft(
    adapter: Adapter,
    path: str | PathLike[str],
    layer_paths: Mapping[str, Sequence[str]] | None,
    base_model: str | None,
) -> None:
    """Writes a directory that PEFT loads, each file through a temporary sibling and a rename.

    Raises:
        ConfigError: ``layer_paths`` that do not fit the modules.
        OSError: The system refused.
    """

def fuse_model(
    base: str | PathLike[str],
    adapter: Adapter,
    out: str | PathLike[str],
    sidecar: str | PathLike[str] | None,
    layer_paths: Mapping[str, Sequence[str]] | None,
    fan_in_fan_out: bool | None,
    progress: Progress | None,
    cancel: CancelToken | None,
) -> str:
    """Adds an adapter to the weights of a model on disk; the report as JSON. See :func:`microlora.fuse`.

    Raises:
        ConfigError: Modules without their one tensor, or places that would overwrite something needed.
        ShapeError: A weight that fits in neither layout.
        NonFiniteError: NaN or infinity in a touched weight or in the sum.
        FormatError: A broken file.
        CancelledError: The token was set.
        OSError: The system refused. Nothing is left behind in any error.
    """

def gguf_interleaves(architecture: str) -> bool | None:
    """Whether llama.cpp interleaves the rows of q and k of an architecture; None where that is not known."""

def gguf_adapter(file: AdapterFile, allow: Sequence[str] | None = None) -> Adapter | QuantizedAdapter:
    """The adapter of a GGUF file that was read, its blocks as they are.

    Raises:
        UnsupportedVariantError: Something in it does not run here.
    """

def gguf_alpha(file: AdapterFile, modules: Sequence[str]) -> float:
    """The one alpha that a file of these modules gets; other scalings are folded into B.

    Raises:
        ConfigError: An alpha that no float32 holds.
    """

def gguf_translate(file: AdapterFile, places: Mapping[str, tuple[str, int | None]]) -> AdapterFile:
    """The file with the model's names and row order: ``places`` maps a module to its path and its heads.

    Raises:
        FormatError: A module without a place, or two at one.
        ShapeError: Heads that do not divide the rows.
    """

def gguf_keep_names(file: AdapterFile) -> AdapterFile:
    """The file with llama.cpp's names and row order, as they are."""

def gguf_lost_blocks(file: AdapterFile, modules: Sequence[str], dtype: str) -> list[str]:
    """Factors of these modules whose blocks a GGUF file of that dtype cannot hold as they are, and why."""

def gguf_stack(file: AdapterFile, groups: Mapping[str, Sequence[str]]) -> AdapterFile:
    """The file with the modules of each group (experts, in order) as one module of kind ``"experts"``.

    Raises:
        UnsupportedVariantError: Modules of a group that differ in rank, alpha, sizes or types.
        FormatError: A module that the file does not have.
    """

def save_gguf(
    file: AdapterFile,
    path: str | PathLike[str],
    architecture: str,
    targets: Mapping[str, tuple[str, int | None]],
    dtype: str,
    drop_blocks: bool,
    tokens: Sequence[int] | None,
    config_json: str | None,
    progress: Progress | None,
    cancel: CancelToken | None,
) -> list[str]:
    """Writes the modules that have a target (base tensor, heads) as a GGUF adapter; returns notes.

    ``config_json`` are our settings, as the weights in the file will be. Blocks go out byte for byte; those
    that do not fit as their numbers with ``drop_blocks``.

    Raises:
        ConfigError: An unknown dtype, a name that ggml does not hold, no modules.
        UnsupportedVariantError: Blocks that do not fit, without ``drop_blocks``.
        NonFiniteError: A number that the dtype cannot hold.
        OSError: The system refused; an older file is left whole.
    """

def unfuse_model(
    fused: str | PathLike[str],
    sidecar: str | PathLike[str],
    out: str | PathLike[str],
    progress: Progress | None,
    cancel: CancelToken | None,
) -> str:
    """Takes a side-car's adapter off again, bit for bit; the report as JSON. See :func:`microlora.unfuse`.

    Raises:
        FormatError: A hash that does not fit, or a broken file.
        ConfigError: Places that would overwrite the input.
        CancelledError: The token was set.
        OSError: The system refused. Nothing is left behind in any error.
    """

def block_types() -> list[tuple[str, int, int, int]]:
    """(name, number in ggml, numbers per block, bytes per block) of every block type, most exact first."""

def quantize_blocks(x: ArrayLike, type: str) -> bytes:
    """Quantises along the rows; the bytes are those that llama.cpp writes.

    Args:
        x: Floating point (rows, cols), cols a multiple of the block's length; read as float32.
        type: ``q8_0``, ``q6_k``, ``q5_k``, ``q4_k``, ``q4_1`` or ``q4_0``.

    Returns:
        The blocks of the rows, one row after the other.

    Raises:
        ConfigError: Another type.
        ShapeError: Not two dimensions, or rows that are not whole blocks.
        NonFiniteError: NaN or infinity, or numbers too large for the f16 scale of their block.
    """

def dequantize_blocks(data: bytes, type: str, rows: int, cols: int) -> NDArray[np.float32]:
    """The numbers of quantised rows, float32 (rows, cols).

    Raises:
        ConfigError: An unknown type.
        ShapeError: Rows that are not whole blocks, or another number of bytes.
        NonFiniteError: A scale that is infinite or NaN.
    """

def isa() -> str:
    """The instruction set that adapters made now use: ``scalar``, ``avx2`` or ``avx512``.

    Raises:
        ConfigError: ``MICROLORA_ISA`` names one that is unknown or that this machine lacks.
    """

def available_isas() -> list[str]:
    """Every instruction set that this machine can run, slowest first."""

def set_num_threads(n: int) -> None:
    """Lets batches above about 100 us of work use up to ``n`` threads; calls of one row never do.

    Off by default: waking threads costs tens of microseconds. A process forked later makes its own threads.

    Args:
        n: 1 (off) to 64.

    Raises:
        ConfigError: Another number.
    """

def num_threads() -> int:
    """How many threads a large batch may use; 1 means that the caller does it alone."""

def probe_read_gbps(bytes: int, seconds: float) -> float:
    """Read bandwidth in GB/s over a buffer of ``bytes``, best instruction set, in ``seconds``."""

def probe_swap(adapter: Adapter, readers: int, swapping: bool, seconds: float) -> dict[str, float]:
    """Swaps and reads without Python, for benches: the clock's own time is in every figure.

    Args:
        adapter: What is swapped in again and again; its first module is read.
        readers: Threads that read all the time.
        swapping: False measures the reads alone.
        seconds: How long.

    Returns:
        Nanoseconds, medians and 99th percentiles (``swap``, ``swap_p99``, ``free``, ``free_p99``, ``read``,
        ``read_p99``; 0 where nothing ran), and ``swaps_per_second``, preparation included.
    """

def probe_fma_gflops(seconds: float) -> float:
    """Peak of float32 fused multiply-adds in GFLOP/s, best instruction set, in ``seconds``."""

def probe_forward_ns(handle: ModuleHandle, seconds: float) -> float:
    """Nanoseconds of one forward of a module without Python, in ``seconds``."""

def merge_methods() -> list[dict[str, Any]]:
    """The table of merge methods, one dict a row.

    Keys: name, family, formula, paper, when, laws (names), params (defaults by name, as numbers),
    default_weights (``"none"``, ``"equal"`` or ``"one"``), parents (fewest, and most or None) and semantics.
    """

def merge_mask(seed: int, module: str, parent: str, rows: int, cols: int, density: float) -> list[list[bool]]:
    """The mask that random methods lay on one parent: ``rows`` lists of ``cols`` bools.

    ``semantics="peft"`` draws for ``<module>.lora_a`` (rank, in) and ``<module>.lora_b`` (out, rank) apart.

    Raises:
        ConfigError: A density outside (0, 1].
    """

def list_tensors(path: str, arg: str) -> list[tuple[str, str, list[int]]]:
    """Names, dtypes and shapes of a model's tensors on disk; ``arg`` is what errors call it."""

def extract_from_files(
    tuned: str,
    base: str,
    modules: Mapping[str, bool],
    keep: str,
    value: float,
    max_rank: int,
    dtype: str,
    seed: int,
    progress: Progress | None,
    cancel: CancelToken | None,
) -> tuple[Adapter, str]:
    """An adapter out of two models on disk; see :func:`microlora.extract`.

    Args:
        tuned: The tuned model.
        base: What it was tuned from.
        modules: The modules wanted, and whether their weights lie as (in, out).
        keep: ``"rank"``, ``"energy"`` or ``"max_error"``.
        value: How much.
        max_rank: Highest rank.
        dtype: How the adapter is stored.
        seed: Of the random start.
        progress: Called with ``(done, total, what)``.
        cancel: A token looked at there.
    """

def extract_from_arrays(
    pairs: Sequence[tuple[str, ArrayLike, ArrayLike, bool]],
    keep: str,
    value: float,
    max_rank: int,
    dtype: str,
    seed: int,
    progress: Progress | None,
    cancel: CancelToken | None,
) -> tuple[Adapter, str]:
    """The same from matrices: ``(module, tuned, base, whether they lie as (in, out))``, floating point."""

def merge_adapters(
    parents: Sequence[tuple[str, Adapter]],
    known: Sequence[dict[str, dict[str, Any]] | None],
    plan: str,
    progress: Progress | None,
    cancel: CancelToken | None,
) -> tuple[Adapter, str]:
    """Merges by a plan (JSON); see :func:`microlora.merge`.

    Args:
        parents: Adapters with their names.
        known: Statistics of each: ``{module: {"gram": {"dense": (d, d)} or {"diag": (d,), "low": (q, d)},
            "importance": (a (in,), c (out,))}}``.
        plan: Module by module: method, parents by position, weights, settings.
        progress: Called with ``(done, total, what)``.
        cancel: A token looked at between modules.

    Returns:
        The adapter without settings and metadata, and the report (JSON).

    Raises:
        MicroLoraError: As :func:`microlora.merge`.
    """

def resize(
    adapter: Adapter, plan: str, progress: Progress | None, cancel: CancelToken | None
) -> tuple[Adapter, str]:
    """Other ranks by a plan (JSON): the adapter and the report (JSON); see :func:`microlora.resize`.

    Raises:
        MicroLoraError: As :func:`microlora.resize`.
    """

def diff(a: Adapter, b: Adapter) -> str:
    """Two adapters against each other, as JSON; see :func:`microlora.diff`.

    Raises:
        MicroLoraError: As :func:`microlora.diff`.
    """

def combine(terms: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The exact sum of adapters, each times a number; a module that one lacks counts as zero.

    Raises:
        ShapeError: Modules of one name with different widths.
        ConfigError: Nothing to sum, or a factor that is no finite number.
        NonFiniteError: NaN or infinity in an adapter.
    """

def compose(adapters: Sequence[Adapter], residual: bool) -> Adapter:
    """One adapter after another as one; see :func:`microlora.compose_sequential`.

    Raises:
        MicroLoraError: As :func:`microlora.compose_sequential`.
    """

def write_file(path: str | PathLike[str], data: bytes) -> None:
    """Writes bytes through a temporary sibling and a rename.

    Raises:
        OSError: The system refused; an older file is left whole.
    """

@disjoint_base
class Ewc:
    """The compiled part of :class:`microlora.EwcPlusPlus`."""

    def __new__(
        cls,
        lora: MicroLora,
        *,
        ewc_lambda: float | None,
        kind: str,
        gamma: float,
        fisher: str,
        fisher_normalize: str,
        fisher_decay: float | None,
        step: str,
        anchors: str,
        fisher_samples: int | None,
        seed: int,
    ) -> Self: ...
    def adapt(
        self, x: ArrayLike, feedback: FeedbackBase, module: str | None = None, base: ArrayLike | None = None
    ) -> StepResult:
        """:meth:`MicroLora.adapt` on its learner, and the squares of the same gradient, in one pass.

        Args:
            x: float32 (in_features,): the layer's input.
            feedback: As in :meth:`MicroLora.instant`; with an exact or sampled Fisher a likelihood
                (squared-error target, preference, contrastive).
            module: Name of the module; None where there is only one.
            base: float32 (out_features,): output of the frozen layer.

        Returns:
            Loss and gradient norms of the event; one that is not applied is not counted either.

        Raises:
            FeedbackError: Feedback that the Fisher cannot use; the message names the way out.
            MicroLoraError: As :meth:`MicroLora.adapt`; nothing changes then.
        """
    def observe_event(
        self, x: ArrayLike, feedback: FeedbackBase, module: str | None, base: ArrayLike | None
    ) -> bool:
        """One event for the importance alone; whether it had a direction and was counted.

        Raises:
            MicroLoraError: As :meth:`adapt`.
        """
    def observe_batch(
        self,
        x: ArrayLike,
        passes: Sequence[ArrayLike] | None,
        module: str | None,
        base: ArrayLike | None,
    ) -> None:
        """One batch from per-sample output gradients, an array (n, out) a pass; None takes ``|y|^2``'s.

        Raises:
            ShapeError: Widths or rows that do not fit.
            NonFiniteError: NaN or infinity, or squares beyond float32. Nothing changes in either error.
        """
    def observe_chain(
        self,
        chain: Chain,
        x: ArrayLike,
        y: ArrayLike,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Rows through a chain, with as many backwards as the Fisher has outcomes.

        Raises:
            SampleError: A row that is not finite; its batch is dropped.
            CancelledError: The token was set; batches before stay counted.
        """
    def penalty(self) -> float:
        """``lambda Omega`` at the learner's present weights.

        Exactly 0 before the first task is closed, with lambda 0 and, with one anchor, right after
        :meth:`start_new_task`.
        """
    def penalty_grad(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Gradient of :meth:`penalty`: ``{module: (of A (rank, in), of B (out, rank))}``, read-only."""
    def start_new_task(self) -> None:
        """Ends the running task: its importance joins the earlier ones, the anchor moves to the weights.

        Raises:
            ConfigError: Nothing was accumulated since the last task (kinds "l2" and "si" need no samples).
            NonFiniteError: Weights that are not finite. Nothing changes in either error.
        """
    def task_fisher(self, module: str | None) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Importance measured so far in the running task: of A (rank, in) and of B (out, rank).

        Means of squares for kind "factor", of magnitudes for "mas"; None without samples and for other kinds.

        Raises:
            UnknownModuleError: No module of that name.
        """
    def moments(self, module: str | None) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
        """Second moments that merging weighs by: means of ``x^2`` (in,) and ``g^2`` (out,), and samples.

        They are over all tasks so far, kept for every kind.

        Raises:
            UnknownModuleError: No module of that name.
        """
    def export(self, extra: Sequence[tuple[str, Sequence[int], bytes]], note: str | None) -> bytes:
        """The state as safetensors bytes, with float32 tensors and a text that travel along.

        Raises:
            ConfigError: A name twice.
        """
    def restore(self, data: bytes) -> tuple[list[tuple[str, list[int], bytes]], str | None]:
        """Takes :meth:`export`'s bytes; returns what travelled along.

        Raises:
            FormatError: Not a state, or one of a newer version.
            ConfigError: Another kind or other modules.
            ShapeError: Other shapes. Nothing changes in any error.
        """
    @staticmethod
    def settings_of(data: bytes) -> str:
        """Settings of a state, as JSON.

        Raises:
            FormatError: Not a state, or one of a newer version.
        """
    @property
    def settings_json(self) -> str:
        """Settings as JSON."""
    @property
    def task_count(self) -> int:
        """Tasks closed so far."""
    @property
    def n_samples(self) -> int:
        """Samples of the running task that were counted."""
    @property
    def ignored_samples(self) -> int:
        """Samples of the running task beyond ``fisher_samples``."""
    @property
    def max_importance(self) -> float:
        """Largest F over all weights (for "delta" of the weight change; several anchors: an upper bound).

        Explicit steps are stable while ``ewc_lambda * max_importance * lr < 2``.
        """
    @property
    def is_active(self) -> bool:
        """Whether the penalty pulls: a task is closed and lambda is above 0."""
    @property
    def memory_bytes(self) -> int:
        """Bytes resident, summed over modules.

        With ``d = in + out``, ``t = 16 ceil(in / 16) + 16 ceil(out / 16)`` and ``p = 4 rank t``, a pair of
        factors as they lie in memory:

        - ``16 d + 4 t``: means of x^2 and g^2, and the open batch's sums;
        - ``2 p`` more for "factor" and "mas": means of squares and the open batch's sums;
        - ``2 p`` more for "si": path and the task's first weights;
        - ``2 p`` more from the first closed task on for "factor", "l2", "si", "mas": importance and anchor,
          whatever the number of tasks; ``p + 4 d`` an anchor for "delta" (one, or with separate anchors one
          a task);
        - ``128 d + 256 rank + 128`` more from the first single event on: 32 waiting rows.

        Anchors count whole, though they share the learner's memory until its next step.
        """

def sona_config(data: bytes) -> str | None:
    """The text that the state of a loop was saved with, or None.

    Raises:
        FormatError: Not such a state, or one of a newer version.
    """

def off_policy(
    propensities: Sequence[float], rewards: Sequence[float], probabilities: Sequence[float]
) -> dict[str, float]:
    """What another policy would have earned on logged choices.

    Inverse propensity scores (Horvitz and Thompson 1952) and their self-normalised form (Swaminathan and
    Joachims, NeurIPS 2015), with weights ``probability / propensity``. Unbiased only where every arm that the
    policy takes had a chance in the log (``epsilon`` above 0): otherwise ``weight`` is far from 1.

    Args:
        propensities: (n,) in (0, 1]: with which probability each logged arm was chosen.
        rewards: (n,): what it earned.
        probabilities: (n,) in [0, 1]: with which probability the other policy would choose that arm there.

    Returns:
        ``ips`` and ``snips``, the policy's mean reward, each with its standard error (``ips_error``,
        ``snips_error``); ``weight``, the mean weight; ``effective``, the effective sample size; ``events``,
        their number n.

    Raises:
        ShapeError: Nothing logged, or lengths that differ.
        ConfigError: Numbers out of their ranges, or a policy that takes none of the logged arms.
        NonFiniteError: A reward that is NaN or infinite.
        DTypeError: Anything but sequences of numbers.
    """
