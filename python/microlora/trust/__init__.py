"""Trust: what an adapter's weights are called, whether a file is the one that was meant, and who says so."""

from microlora.trust.hashing import Manifest, fingerprint, manifest
from microlora.trust.signing import sign
from microlora.trust.verifying import Verification, verify

__all__ = ["Manifest", "Verification", "fingerprint", "manifest", "sign", "verify"]
