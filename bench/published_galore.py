"""GaLore as its authors published it: the distribution galore-torch 1.0, Apache-2.0.

Its wheel comes through the package index that pip is configured for and is kept in .data/; it is
not installed. The package's `__init__` imports bitsandbytes, which the float32 optimizer does not
need, so that its module is imported without it.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

from bench import ROOT

if str(ROOT / "examples") not in sys.path:
    sys.path.insert(1, str(ROOT / "examples"))

from fetch_demo_assets import DATA_DIR, check_sha256, ensure, pip_download

REQUIREMENT = "galore-torch==1.0"
WHEEL = DATA_DIR / "galore_torch-1.0-py3-none-any.whl"
SHA256 = "7339bd6f6ea4557c5c9ae58026d67414bba2a0c7a7e7f1d69a05514ff565dd20"


def _download(destination: Path, scratch: Path) -> None:
    wheel = pip_download(REQUIREMENT, scratch, source=False)
    check_sha256(wheel.read_bytes(), SHA256, wheel.name)
    wheel.replace(destination)


def published_galore() -> Any:
    """The class `galore_torch.adamw.AdamW`.

    Raises:
        AssetError: the wheel could not be fetched; the message says what to do.
    """
    if not WHEEL.exists():
        DATA_DIR.mkdir(exist_ok=True)
        ensure(WHEEL, _download, "the published GaLore")
    if "galore_torch" not in sys.modules:
        package = types.ModuleType("galore_torch")
        # A wheel is a zip file, which Python imports from.
        package.__path__ = [str(WHEEL / "galore_torch")]
        sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW
