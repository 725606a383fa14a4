"""The doctor: what is wrong with an adapter file, what to do about it, and a repaired copy."""

from microlora.doctor.checks import CHECKS, Check
from microlora.doctor.inspecting import inspect
from microlora.doctor.report import Finding, ModuleRow, Report

__all__ = ["CHECKS", "Check", "Finding", "ModuleRow", "Report", "inspect"]
