"""Adam's operations."""

from zoopt.kernels.reference_adam import adam, adamw

__all__ = ["adam", "adamw"]
