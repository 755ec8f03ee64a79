"""Which linear layers of a model a method is for."""

from __future__ import annotations

import collections
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

#: "linear", another regular expression, shell patterns, or a predicate of a layer's name and
#: module. Patterns match whole module names, "model.layers.0.mlp.up_proj" say.
Target = str | Sequence[str] | Callable[[str, nn.Module], bool]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is (in, out)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def linear_layers(model: nn.Module, target: Target = "linear") -> dict[str, nn.Module]:
    """The nn.Linear and transformers Conv1D layers that `target` names, except tied ones.

    Args:
        target: `"linear"` is every linear layer inside an nn.ModuleList, which is where models
            keep their repeated layers: attention and MLPs, and not heads, poolers or projections
            of embeddings. In a model that has none there, every linear layer but the one that
            `get_output_embeddings()` returns. Any other string is a regular expression for whole
            module names; a sequence holds shell patterns (`"*.q_proj"`); a callable is given name
            and module.

    Returns:
        name -> module, in the model's order; at least one.

    Raises:
        TypeError: `target` is of another kind.
        ValueError: `target`, or one of its patterns, matches no linear layer.
    """
    tied = set(_tied_layers(model))
    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and name not in tied
    }
    found = dict(_matching(model, layers, target))
    if not found:
        some = ", ".join(map(repr, list(layers)[:5])) or "none at all"
        raise ValueError(
            f"target must match a linear layer (nn.Linear or Conv1D, its weight not tied), got "
            f"{target!r}, which matches none; the model's are {some}"
            f"{' and others' if len(layers) > 5 else ''}"
        )
    return found


def _matching(
    model: nn.Module, layers: dict[str, nn.Module], target: Target
) -> Iterator[tuple[str, nn.Module]]:
    if target == "linear":
        repeated = {
            f"{prefix}{'.' if prefix else ''}{name}"
            for prefix, parent in model.named_modules()
            if isinstance(parent, nn.ModuleList)
            for name, _ in parent.named_modules()
        }
        head = getattr(model, "get_output_embeddings", lambda: None)()
        inside = [name in repeated for name in layers]
        for (name, module), chosen in zip(layers.items(), inside, strict=True):
            if chosen or (not any(inside) and module is not head):
                yield name, module
    elif isinstance(target, str):
        pattern = re.compile(target)
        yield from ((name, m) for name, m in layers.items() if pattern.fullmatch(name))
    elif callable(target):
        yield from ((name, m) for name, m in layers.items() if target(name, m))
    elif isinstance(target, Sequence) and all(isinstance(glob, str) for glob in target):
        for glob in target:
            if not any(fnmatch.fnmatchcase(name, glob) for name in layers):
                raise ValueError(
                    f"each pattern of target must match a linear layer, got {glob!r}, which "
                    f"matches none; the patterns are of whole module names, '*.q_proj' say"
                )
        for name, module in layers.items():
            if any(fnmatch.fnmatchcase(name, glob) for glob in target):
                yield name, module
    else:
        raise TypeError(
            f"target must be 'linear', a regular expression, a sequence of name patterns or a "
            f"predicate of name and module, got {target!r}"
        )


def _tied_layers(model: nn.Module) -> Iterator[str]:
    """The names of modules that share one of their own parameters with another module."""
    names = collections.defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].append(name)
    for shared in names.values():
        if len(shared) > 1:
            yield from (name.rpartition(".")[0] for name in shared)


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's repeated layers: the members of its outermost nn.ModuleLists, by name, in order.

    Raises:
        ValueError: it has none.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in layers
        ):
            prefix = f"{name}." if name else ""
            layers |= {f"{prefix}{number}": layer for number, layer in module.named_children()}
    if not layers:
        raise ValueError(
            f"model must keep its repeated layers in an nn.ModuleList, got a "
            f"{type(model).__name__} without one"
        )
    return layers
