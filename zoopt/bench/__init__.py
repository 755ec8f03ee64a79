"""Benchmarks that run on any installation: time and memory of a step of your model, and kernels.

`zoopt bench` runs them; each is a module with a `main`.
"""
