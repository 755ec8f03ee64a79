"""`zoopt doctor --gpu`: what a GPU says of the package, and whether it keeps its promises there.

`report` runs the sections (`sections`), each in a process of its own and within a time limit, and
compares their figures with the bars (`bars`). A `Scale` says on what models: `FULL` for a GPU, and
`TINY`, the same work in seconds on a CPU, whose figures mean nothing.
"""
