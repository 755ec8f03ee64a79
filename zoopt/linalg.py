"""Linear algebra that methods of both families share."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_fixed_qr(columns: Tensor) -> Tensor:
    """Q (m, r) of columns (m, r), m >= r, in the QR decomposition whose R has a positive diagonal.

    LAPACK's choice of signs would bias a random basis, and flip columns of one that moves slowly.
    """
    q, r = torch.linalg.qr(columns)
    flips = torch.where(r.diagonal() < 0, -1.0, 1.0).to(columns.dtype)
    return torch.mul(q, flips).contiguous()
