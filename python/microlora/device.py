"""Where an adapter lives. Today that is the CPU; the seam is here so that code can be written once."""

from __future__ import annotations

from microlora.exceptions import ConfigError, DeviceError


def resolve(device: str) -> str:
    """The device that a request means.

    Args:
        device: ``"cpu"``, ``"auto"`` (the best there is) or ``"cuda"``.

    Returns:
        ``"cpu"``.

    Raises:
        DeviceError: ``"cuda"`` was asked for and its wheel is not installed.
        ConfigError: Any other name.
    """
    if not isinstance(device, str):
        raise ConfigError(f"device: got {device!r}, expected cpu, auto or cuda")
    if device in ("cpu", "auto"):
        return "cpu"
    if device == "cuda" or device.startswith("cuda:"):
        raise DeviceError(
            f"device: got {device!r}, but the CUDA backend is not installed: it will come as "
            '`pip install "microlora[cuda]"`; use device="cpu" or "auto" until then'
        )
    raise ConfigError(f"device: got {device!r}, expected cpu, auto or cuda")
