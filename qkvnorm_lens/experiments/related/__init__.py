"""Measurements of related papers."""
