"""LoRA-GGPO, CoFiTune and LoRA-SB in float64 numpy, from their papers."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def ggpo(weight: Array, gradient: Array | None, z: Array, sigma: float, beta: float) -> Array:
    """Where the model is evaluated: W + c z by rows (Chang et al., 2025)."""
    m = weight.shape[0]
    perturbed = weight.copy()
    for i in range(m):
        steep = 0.0 if gradient is None else beta * np.sum(gradient[i] ** 2)
        c = (sigma * np.sqrt(np.sum(weight[i] ** 2)) + steep) / np.sqrt(m)
        perturbed[i] += c * z[i]
    return perturbed


def importance(weight: Array, gradients: list[Array]) -> Array:
    """CoFiTune's (Zhang et al., 2024) of each row: of the factors before the neurons."""
    gates = np.abs(np.mean([np.sum(weight * gradient, 1) for gradient in gradients], 0))
    return np.abs(np.tanh((gates - gates.mean()) / gates.std()))


def held_back(old: Array, new: Array, share: Array) -> Array:
    """The step of each row, less its importance."""
    return old + (1.0 - share)[:, None] * (new - old)


def lora_sb(gradients: list[Array], rank: int, lr: float) -> Array:
    """B R A at the start: of the full step -lr sign(sum G) what rank r can hold (Ponkshe, 2024)."""
    u, s, vh = np.linalg.svd(-lr * np.sign(np.sum(gradients, 0)), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]
