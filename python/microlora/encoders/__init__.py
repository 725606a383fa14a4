"""Encoders of text: the protocol, and one that needs NumPy only."""

from microlora.encoders.cache import fit_cached
from microlora.encoders.lsa import LsaEncoder
from microlora.encoders.protocol import TextEncoder, encode_checked

__all__ = ["LsaEncoder", "TextEncoder", "encode_checked", "fit_cached"]
