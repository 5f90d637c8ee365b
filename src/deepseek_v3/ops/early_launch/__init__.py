"""Launching a kernel before the one before it has ended."""
