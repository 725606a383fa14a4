"""Sections of the table."""
