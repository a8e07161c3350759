"""Reads and writes files: data, never code."""
