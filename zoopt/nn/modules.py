"""Selects the linear layers of a model to which a method is applied."""

from __future__ import annotations

import collections
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

#: "linear", another regular expression, shell patterns, or a predicate of a layer's name and
#: module. Patterns match whole module names, such as "model.layers.0.mlp.up_proj".
Target = str | Sequence[str] | Callable[[str, nn.Module], bool]


#: How many matrices torch's attention keeps in each of its own parameters.
_ATTENTION = {
    "in_proj_weight": 3,
    **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), 1),
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is (in, out)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def foreign_kind(module: nn.Module) -> str | None:
    """Who has quantised a linear layer: "4bit" or "8bit" (bitsandbytes), "torchao", or None."""
    names = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes.") and cls.__name__ in names:
            return names[cls.__name__]
    if isinstance(module, nn.Linear):
        of_torchao = type(module.weight.data).__module__.startswith("torchao.")
        return "torchao" if of_torchao else None
    return None


class Matrices(NamedTuple):
    """A parameter that holds weights of linear maps.

    Attributes:
        module: the linear layer, or the module that owns the parameter.
        param: (m, n), or `number` of such matrices stacked along the first axis.
        number: how many.
    """

    module: nn.Module
    param: nn.Parameter
    number: int

    @property
    def is_layers(self) -> bool:
        """Whether it is the weight of a linear layer."""
        layer = isinstance(self.module, nn.Linear) or is_conv1d(self.module)
        return layer and self.module.weight is self.param


def bare_matrices(model: nn.Module) -> dict[str, Matrices]:
    """The weights of linear maps that belong to no linear layer, by name, except tied ones.

    A parameter with three axes is a stack (E, m, n): a layer's experts. Kernels of convolutions are
    none, nor are parameters of shape (1, m, n), which may be anything in a batch of one. torch's
    attention keeps its three projections as one (3 d, d), or as (d, k) each.
    """
    found: dict[str, Matrices] = {}
    tied = tied_parameters(model)
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd | ParametrizationList):
            continue
        for own, param in module.named_parameters(recurse=False):
            name, count = f"{prefix}.{own}" if prefix else own, 0
            if isinstance(module, nn.MultiheadAttention):
                count = _ATTENTION.get(own, 0)
            elif param.dim() == 3 and min(param.shape) > 1:
                count = param.shape[0]
            if count and name not in tied:
                found[name] = Matrices(module, param, count)
    return found


def matrices(model: nn.Module, target: Target = "linear") -> dict[str, Matrices]:
    """The parameters with weights of linear maps that `target` names: those of linear layers, and
    bare ones.

    Args:
        target: as for `linear_layers`. Patterns and predicates get the name and module of a linear
            layer, or the name of a bare parameter and the module that owns it.

    Returns:
        The parameters by name; at least one.

    Raises:
        TypeError, ValueError: as for `linear_layers`.
    """
    layers = _linear_layers(model)
    bare = bare_matrices(model)
    modules = layers | {name: own.module for name, own in bare.items()}
    found: dict[str, Matrices] = {}
    for name, module in chosen(model, modules, target).items():
        if name in bare:
            found[name] = bare[name]
        else:
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            found[f"{name}.weight" if name else "weight"] = Matrices(module, weight, 1)
    return found


def linear_layers(model: nn.Module, target: Target = "linear") -> dict[str, nn.Module]:
    """The nn.Linear and transformers Conv1D layers that `target` names, except tied ones.

    Args:
        target: `"linear"` is every linear layer inside an nn.ModuleList, which is where models
            keep their repeated layers: attention and MLPs, and not heads, poolers or projections of
            embeddings. In a model that has none there: every linear layer except the one that
            `get_output_embeddings()` returns. Any other string is a regular expression for whole
            module names; a sequence holds shell patterns (`"*.q_proj"`); a callable is given name
            and module.

    Returns:
        name -> module, in the model's order; at least one.

    Raises:
        TypeError: `target` is of another kind.
        ValueError: `target`, or one of its patterns, matches no linear layer.
    """
    return chosen(model, _linear_layers(model), target)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    tied = {name.rpartition(".")[0] for name in tied_parameters(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module))
        and name not in tied
        # Not one whose weight is computed from other parameters (weight_norm, parametrize, prune).
        and module._parameters.get("weight") is not None
    }


def chosen(model: nn.Module, layers: dict[str, nn.Module], target: Target) -> dict[str, nn.Module]:
    """Those of the layers (and bare parameters) that `target` names; at least one."""
    found = dict(_matching(model, layers, target))
    if not found:
        some = ", ".join(map(repr, list(layers)[:5])) or "none at all"
        raise ValueError(
            f"target must match a linear layer (nn.Linear or Conv1D, its weight a parameter and "
            f"not tied), got "
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
        inside = [name in repeated or name.rpartition(".")[0] in repeated for name in layers]
        for (name, module), chosen in zip(layers.items(), inside, strict=True):
            if chosen or (not any(inside) and module is not head):
                yield name, module
    elif isinstance(target, str):
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise ValueError(
                f"target must be a regular expression of whole module names, got {target!r} "
                f"({error}); pass a pattern such as '*.q_proj' in a list, [{target!r}]"
            ) from None
        yield from ((name, m) for name, m in layers.items() if pattern.fullmatch(name))
    elif callable(target):
        yield from ((name, m) for name, m in layers.items() if target(name, m))
    elif isinstance(target, Sequence) and all(isinstance(glob, str) for glob in target):
        for glob in target:
            if not any(fnmatch.fnmatchcase(name, glob) for name in layers):
                raise ValueError(
                    f"each pattern of target must match a linear layer, got {glob!r}, which "
                    f"matches none whose weight is a parameter, and not tied; the patterns are of "
                    f"whole module names, '*.q_proj' say"
                )
        for name, module in layers.items():
            if any(fnmatch.fnmatchcase(name, glob) for glob in target):
                yield name, module
    else:
        raise TypeError(
            f"target must be 'linear', a regular expression, a sequence of name patterns or a "
            f"predicate of name and module, got {target!r}"
        )


def named(model: nn.Module, params: Iterable[Tensor]) -> list[tuple[str, nn.Parameter]]:
    """Those of the parameters that are the model's, with their names, in the model's order."""
    own = set(map(id, params))
    return [(name, param) for name, param in model.named_parameters() if id(param) in own]


def tied_parameters(model: nn.Module) -> set[str]:
    """The names of parameters that have several."""
    names = collections.defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


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
