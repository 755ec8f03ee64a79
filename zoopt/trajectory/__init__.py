"""A zeroth-order run as a file of scalars: recorded, replayed bit for bit, resumed."""

from zoopt.trajectory.format import TrajectoryError
from zoopt.trajectory.recorder import Recorder
from zoopt.trajectory.replay import replay, resume

__all__ = ["Recorder", "TrajectoryError", "replay", "resume"]
