"""Benchmarks that run on any installation: time and memory of a step of one's own model, kernels.

`zoopt bench` runs them; each is a module with a `main`.
"""
