"""Every error microlora raises; each is also the builtin that a caller would expect."""

from __future__ import annotations


class MicroLoraError(Exception):
    """Base of all errors of this package."""


class ShapeError(MicroLoraError, ValueError):
    """An array has the wrong shape; the message names the argument, the shape got and the one wanted."""


class DTypeError(MicroLoraError, TypeError):
    """An array has the wrong element type."""


class NonFiniteError(MicroLoraError, ValueError):
    """NaN or infinity in an input; nothing was changed."""


class SampleError(NonFiniteError):
    """A sample cannot be learned from; the step that it belongs to changed nothing.

    Attributes:
        row: Row of the sample in the data.
        steps_done: Steps that the same call had done before.
        sample_id: The sample's id, where the data have ids.
    """

    def __init__(
        self, *args: object, row: int = 0, steps_done: int = 0, sample_id: str | None = None
    ) -> None:
        # The core raises with (message, row, steps_done); only the message is an argument of the exception.
        if len(args) == 3 and isinstance(args[1], int) and isinstance(args[2], int):
            row, steps_done = args[1], args[2]
            args = args[:1]
        super().__init__(*args)
        self.row, self.steps_done, self.sample_id = row, steps_done, sample_id


class LayoutError(MicroLoraError, ValueError):
    """A buffer is read-only, not C-contiguous, unaligned, byte-swapped or overlaps another."""


class ConfigError(MicroLoraError, ValueError):
    """A setting is out of its range, or two settings exclude each other."""


class _NamedKeyError(MicroLoraError, KeyError):
    """A KeyError whose text is the message itself, not its repr."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnknownModuleError(_NamedKeyError):
    """The adapter has no module of that name; the message lists those it has."""


class UnknownChoiceError(_NamedKeyError):
    """No choice of that number waits for its reward; nothing was learned."""


class UnknownPresetError(_NamedKeyError):
    """There is no preset of that name; the message carries the nearest names."""


class FeedbackError(MicroLoraError, ValueError):
    """Feedback that gives no direction, or lies outside its range."""


class FormatError(MicroLoraError, ValueError):
    """A file is not what it claims to be; the message names the file, the tensor or key, and the reason."""


class UnsupportedVariantError(FormatError):
    """A sound file of a kind that must not be applied as plain LoRA (DoRA, PiSSA init, pickle ...)."""


class UnrepairableError(FormatError):
    """A file whose errors no repair removes; nothing was written, and the message names what is left."""


class VerificationError(MicroLoraError, ValueError):
    """A file is not the one that was meant, by a hash, a manifest or a signature; the message names it."""


class DestinationExistsError(MicroLoraError, FileExistsError):
    """Something lies where a file was to be written, and ``overwrite`` was not given; it was not touched."""


class MissingPathError(MicroLoraError, FileNotFoundError):
    """A file that an argument names is not there, nor the folder of one that is to be written."""


class DeviceError(MicroLoraError, RuntimeError):
    """The device asked for cannot be had; the message says what to install."""


class SwapError(MicroLoraError, RuntimeError):
    """A swap cannot happen: no standby, nothing to go back to, or another writer was faster; nothing changed.

    Attributes:
        generation: Number of the generation that was active then; None where it is not known.
    """

    def __init__(self, *args: object, generation: int | None = None) -> None:
        # The core raises with (message, generation); only the message is an argument of the exception.
        if len(args) == 2 and isinstance(args[1], int):
            generation = args[1]
            args = args[:1]
        super().__init__(*args)
        self.generation = generation


class CancelledError(MicroLoraError):
    """The caller's cancel token was set; no output was left behind."""


class MissingExtraError(MicroLoraError, ImportError):
    """A command needs an optional dependency; the message is the pip line that brings it."""


class EncoderError(MicroLoraError, RuntimeError):
    """An encoder of text raised; its own error is the cause, and nothing was learned or counted."""


class LeakageError(MicroLoraError, ValueError):
    """Data held out is in the training part as well: a sample, a text or a variation; names both samples."""


class UnusedTensorWarning(UserWarning):
    """``strict=False`` found tensors that no adapter module uses; they are kept and listed."""
