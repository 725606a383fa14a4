"""Hypothesis profiles, and the marker that most tests share."""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "slow", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("MICROLORA_TEST_PROFILE", "fast"))


def pytest_collection_modifyitems(items):
    """Whatever is neither slow nor oracle nor interop is a unit test."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "oracle", "interop")):
            item.add_marker(pytest.mark.unit)
