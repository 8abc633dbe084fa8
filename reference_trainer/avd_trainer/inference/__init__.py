"""Exported students and their clips."""
