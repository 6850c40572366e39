"""Measurements for maintainers.

This is a regular package: an installed one named ``benchmarks`` would hide a folder without this
file.
"""
