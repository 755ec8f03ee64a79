"""Memory: `plan` predicts a training step's peak, `measure` measures it."""

from zoopt.memory.plan import Estimate, Plan, plan

__all__ = ["Estimate", "Plan", "plan"]
