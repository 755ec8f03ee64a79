"""`zoopt doctor --gpu`: measures the package on a GPU, and checks whether it keeps its promises.

`report` runs the sections (`sections`), each in its own process with a time limit, and compares
their figures with the limits in `bars`. A `Scale` defines the models and sizes: `FULL` is for a
GPU, and `TINY` does the same work in seconds on a CPU. The figures of `TINY` mean nothing.
"""
