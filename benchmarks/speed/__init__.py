"""``python -m benchmarks.speed``: time and memory of PVT beside its peers."""
