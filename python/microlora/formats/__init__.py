"""Adapter files of every kind: what is read, what is written, and what a conversion may lose."""

from microlora.formats.conversion import Conversion, convert
from microlora.formats.file import AdapterFile, FileModule, Variant
from microlora.formats.limits import Limits
from microlora.formats.plain import convert_to_plain

__all__ = ["AdapterFile", "Conversion", "FileModule", "Limits", "Variant", "convert", "convert_to_plain"]
