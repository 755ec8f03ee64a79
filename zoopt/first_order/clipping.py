"""Training loops that clip gradients themselves: with a fused backward pass there are none to
clip."""

from __future__ import annotations

import sys
from typing import Any

#: Module, class, the attribute that configures clipping, and the name under which users know it.
_LOOPS = (
    ("transformers.trainer", "Trainer", "args.max_grad_norm", "max_grad_norm of TrainingArguments"),
    ("lightning.pytorch", "Trainer", "gradient_clip_val", "gradient_clip_val of the Trainer"),
    ("pytorch_lightning", "Trainer", "gradient_clip_val", "gradient_clip_val of the Trainer"),
)
_PACKAGES = {module.partition(".")[0] for module, *_ in _LOOPS}


def check_unclipped() -> None:
    """Raise if the caller is a loop that would clip gradients: they have been freed by then.

    Raises:
        RuntimeError: it is one. The updates of this step have been applied, unclipped.
    """
    loops: list[tuple[type[Any], str, str]] = []
    for module, name, attribute, label in _LOOPS:
        cls = getattr(sys.modules.get(module), name, None)  # a caller's module is imported
        if cls is not None:
            loops.append((cls, attribute, label))
    frame = sys._getframe(1) if loops else None
    while frame is not None:
        # Up to Python 3.12 a frame keeps all that was read as `f_locals`: in the user's own frame
        # that would keep the model alive after its `del`.
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        caller = frame.f_locals.get("self") if package in _PACKAGES else None
        for cls, attribute, label in loops:
            if issubclass(type(caller), cls):
                _check(caller, attribute, label)
        frame = frame.f_back


def _check(loop: Any, attribute: str, label: str) -> None:
    limit: Any = loop
    for part in attribute.split("."):
        limit = getattr(limit, part, None)
    if limit:
        raise RuntimeError(
            f"{label} must be 0 or None where the backward is fused, got {limit}: there are no "
            f"gradients left to clip, and nothing is clipped; pass "
            f"zoopt.fuse_backward(..., max_grad_norm={limit}) and clip there only"
        )
