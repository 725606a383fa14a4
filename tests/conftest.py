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


def pytest_addoption(parser):
    parser.addoption(
        "--none-skipped", action="store_true", help="a test that skips, or none at all, is a failure"
    )


def pytest_sessionfinish(session, exitstatus):
    """A program that is missing must not look like a proof."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--none-skipped") or reporter is None or exitstatus != 0:
        return
    if reporter.stats.get("skipped") or not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
