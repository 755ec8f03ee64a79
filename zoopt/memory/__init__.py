"""Memory: `plan` predicts a training step's peak, `measure` measures it."""

from zoopt.memory.estimate import Estimate
from zoopt.memory.measure import Measurement, measure
from zoopt.memory.plan import Plan, plan

__all__ = ["Estimate", "Measurement", "Plan", "measure", "plan"]
