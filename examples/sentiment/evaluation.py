"""How good the classifier is, with and without its label bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from .model import Classifier, Example

BATCH_SIZE = 32


@dataclass(frozen=True)
class Metrics:
    """Figures of one evaluation.

    ``calibrated_accuracy`` and ``calibrated_cross_entropy`` put the threshold at the median of the
    logit differences instead of at zero. A model that merely says "positive" less often gains
    accuracy and nothing in these two, so they tell what was learned about the sentences.
    """

    sentences: int
    accuracy: float
    calibrated_accuracy: float
    cross_entropy: float
    calibrated_cross_entropy: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


def metrics(difference: torch.Tensor, positive: torch.Tensor) -> Metrics:
    """Compare logit differences with labels (1.0 for positive)."""
    centred = difference - difference.median()

    def accuracy(scores: torch.Tensor) -> float:
        return ((scores > 0) == (positive > 0)).float().mean().item()

    return Metrics(
        sentences=len(positive),
        accuracy=accuracy(difference),
        calibrated_accuracy=accuracy(centred),
        cross_entropy=F.binary_cross_entropy_with_logits(difference, positive).item(),
        calibrated_cross_entropy=F.binary_cross_entropy_with_logits(centred, positive).item(),
    )


@torch.no_grad()
def evaluate(classifier: Classifier, examples: Sequence[Example]) -> Metrics:
    """Classify all examples, in batches of similar length."""
    ordered = sorted(examples, key=lambda e: len(e.token_ids))
    differences, labels = [], []
    for start in range(0, len(ordered), BATCH_SIZE):
        batch = classifier.collate(ordered[start : start + BATCH_SIZE])
        differences.append(classifier.logit_difference(batch))
        labels.append(batch.positive)
    return metrics(torch.cat(differences), torch.cat(labels))
