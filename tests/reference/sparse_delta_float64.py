"""SpIEL (Ansell et al., 2024) in float64 numpy: Adam on the active entries of each tensor.

Active entries are held as a dictionary, each with its base, moments and age.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Array = np.ndarray


@dataclasses.dataclass
class Entry:
    """An active entry."""

    base: float
    m: float = 0.0
    v: float = 0.0
    age: int = 0


def best(scores: dict[int, float], count: int) -> list[int]:
    """The positions of largest score; of equal ones the first."""
    return sorted(sorted(scores, key=lambda i: (-scores[i], i))[:count])


@dataclasses.dataclass
class SparseDelta64:
    """growth: "accumulated" (AG) or "momentum" (MA)."""

    lr: float
    density: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    update_gap: int = 20
    window: int = 5
    drop_fraction: float = 0.2
    total_steps: int | None = None
    growth: str = "accumulated"
    maximize: bool = False
    steps: int = 0
    active: dict[str, dict[int, Entry]] = dataclasses.field(default_factory=dict)
    sums: dict[str, dict[int, list[float]]] = dataclasses.field(default_factory=dict)
    rows: dict[str, Array] = dataclasses.field(default_factory=dict)
    columns: dict[str, Array] = dataclasses.field(default_factory=dict)

    def step(self, theta: dict[str, Array], grads: dict[str, Array], _: object = None) -> None:
        self.steps += 1
        for name, weights in theta.items():
            self.one(name, weights.reshape(-1), grads[name])

    def one(self, name: str, w: Array, gradient: Array) -> None:
        g = gradient.reshape(-1)
        count = min(w.size, max(1, int(self.density * w.size)))
        if name not in self.active:
            first = best(dict(enumerate(np.abs(g))), count)
            self.active[name] = {i: Entry(w[i]) for i in first}
            m = gradient.shape[0] if gradient.ndim > 1 else 1
            self.rows[name], self.columns[name] = np.zeros(m), np.zeros(w.size // m)
        active = self.active[name]
        sign = -1.0 if self.maximize else 1.0
        for i, entry in active.items():
            b1, b2 = self.betas
            entry.age += 1
            entry.m = b1 * entry.m + (1 - b1) * g[i]
            entry.v = b2 * entry.v + (1 - b2) * g[i] ** 2
            mhat, vhat = entry.m / (1 - b1**entry.age), entry.v / (1 - b2**entry.age)
            decay = self.lr * self.weight_decay * (w[i] - entry.base)
            w[i] += -decay - sign * self.lr * mhat / (np.sqrt(vhat) + self.eps)
        if self.growth == "momentum":
            self.sm3(name, g)
        else:
            self.accumulate(name, g, count)
        if self.steps % self.update_gap == 0:
            self.change_places(name, w)

    def sm3(self, name: str, g: Array) -> None:
        rows, columns = self.rows[name], self.columns[name]
        old = rows.copy(), columns.copy()
        for k in self.active[name]:
            i, j = divmod(k, columns.size)
            nu = min(old[0][i], old[1][j]) + g[k] ** 2
            rows[i], columns[j] = max(rows[i], nu), max(columns[j], nu)

    def accumulate(self, name: str, g: Array, count: int) -> None:
        place = (self.steps - 1) % self.update_gap - (self.update_gap - self.window)
        if place == 0:
            others = {i: abs(g[i]) for i in range(g.size) if i not in self.active[name]}
            most = max(count // 4 - 1, round(self.drop_fraction * count))
            self.sums[name] = {i: [0.0, 0.0] for i in best(others, most)}
        elif place > 0:
            for i, pair in self.sums[name].items():
                pair[0] += g[i]
                pair[1] += g[i] ** 2

    def change_places(self, name: str, w: Array) -> None:
        active, (b1, b2) = self.active[name], self.betas
        left = 1.0 if self.total_steps is None else max(0.0, 1 - self.steps / self.total_steps)
        moving = round(self.drop_fraction * left * len(active))
        if self.growth == "momentum":
            product = np.outer(self.rows[name], self.columns[name]).reshape(-1)
            scores = {i: product[i] for i in range(w.size) if i not in active}
        else:
            scores = {i: abs(pair[0]) for i, pair in self.sums[name].items()}
        grown = best(scores, moving)
        order = list(active)
        dull = {place: -abs(w[i] - active[i].base) for place, i in enumerate(order)}
        for place, new in zip(best(dull, len(grown)), grown, strict=True):
            old = order[place]
            w[old] = active[old].base
            order[place] = new
            active[new] = Entry(w[new])
            if self.growth == "accumulated":
                n, (total, squares) = self.window - 1, self.sums[name][new]
                active[new] = Entry(w[new], total / n * (1 - b1**n), squares / n * (1 - b2**n), n)
        self.active[name] = {i: active[i] for i in order}
