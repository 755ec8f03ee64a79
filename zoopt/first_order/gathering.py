"""Which gradients of a backward pass are applied together: those of a layer, as they arrive."""

from __future__ import annotations

from torch import Tensor, nn

from zoopt.nn.modules import repeated_layers

#: Gradients are gathered until they have this many bytes, though more of their layer may come.
MOST = 256 << 20


def layers_of(model: nn.Module) -> dict[Tensor, str]:
    """The name of each parameter's layer: the member of a ModuleList that has it, or, outside of
    these, the module itself."""
    try:
        repeated = repeated_layers(model)
    except ValueError:
        repeated = {}
    found: dict[Tensor, str] = {}
    for name, layer in repeated.items():
        for param in layer.parameters():
            found.setdefault(param, name)
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            found.setdefault(param, name)
    return found


class Gathered:
    """Gradients of one layer that have arrived: less than `MOST` bytes, and one more gradient.

    Attributes:
        gradients: by parameter, in the order of their arrival.
    """

    def __init__(self) -> None:
        self.gradients: dict[Tensor, Tensor] = {}
        self._layer: str | None = None
        self._nbytes = 0

    def belongs(self, layer: str | None) -> bool:
        """Whether a gradient of that layer can be gathered with those that are there."""
        return not self.gradients or layer == self._layer

    def add(self, param: Tensor, gradient: Tensor, layer: str | None) -> None:
        """Gather one more."""
        self.gradients[param], self._layer = gradient, layer
        self._nbytes += gradient.nbytes

    @property
    def full(self) -> bool:
        """Whether no more may be gathered."""
        return self._nbytes >= MOST

    def clear(self) -> None:
        """Drop them."""
        self.gradients, self._layer, self._nbytes = {}, None, 0
