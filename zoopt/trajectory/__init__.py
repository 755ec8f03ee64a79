"""A zeroth-order run as a file of scalars: recorded, replayed bit for bit, resumed."""

from zoopt.trajectory.arithmetic import Difference, delta, diff, drop, merge, revert
from zoopt.trajectory.format import TrajectoryError
from zoopt.trajectory.recorder import Recorder
from zoopt.trajectory.replay import replay, resume

__all__ = [
    "Difference",
    "Recorder",
    "TrajectoryError",
    "delta",
    "diff",
    "drop",
    "merge",
    "replay",
    "resume",
    "revert",
]
