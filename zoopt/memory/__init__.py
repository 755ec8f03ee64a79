"""Memory: `plan` predicts a training step's peak, `measure` measures it."""

from zoopt.memory.measure import Measurement, measure
from zoopt.memory.plan import Plan, plan
from zoopt.memory.simulate import Estimate

__all__ = ["Estimate", "Measurement", "Plan", "measure", "plan"]
