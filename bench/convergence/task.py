"""What bench.convergence trains: the demo's language model and sentences, its last layers only.

The layers below are frozen, so their output is computed once per sentence. A forward pass only runs
the trained layers. Prompt, words, loss, batches and metrics are those of
examples/finetune_sentiment.py.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ROOT

if str(ROOT / "examples") not in sys.path:
    sys.path.insert(1, str(ROOT / "examples"))

from sentiment.data import read_sentences, split
from sentiment.evaluation import BATCH_SIZE, evaluate
from sentiment.model import (
    Batch,
    Classifier,
    Example,
    balanced_batches,
    load_classifier,
)
from sentiment.options import MODEL, REVIEWS

PROMPT, WORDS = "{} Just", (" terrible", " great")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common.

    Attributes:
        model, data: paths of the model's directory and of the sentences.
        layers: how many of the last layers are trained, with the final norm.
        dtype: of the weights.
        batch_size: sentences a step, half of each label.
        max_words: longer sentences are left out.
        validation_sentences, test_sentences: at most so many are used.
        forwards: the budget of a run.
        grid_forwards: the budget of the runs that choose the learning rate.
        seeds: runs of a method at the chosen learning rate.
        extensions: learning rates that may be added to a grid whose best one is at its edge.
        evaluations: looks at the validation set in a run of the full budget, after the first.
    """

    model: str = str(MODEL)
    data: str = str(REVIEWS)
    layers: int = 5
    dtype: str = "bfloat16"
    batch_size: int = 32
    max_words: int = 12
    validation_sentences: int = 300
    test_sentences: int = 600
    forwards: int = 480
    grid_forwards: int = 240
    seeds: int = 3
    extensions: int = 1
    evaluations: int = 4

    def as_dict(self) -> dict[str, Any]:
        """The settings as they go into files: no paths, but names."""
        values = dataclasses.asdict(self)
        return {**values, "model": Path(self.model).name, "data": Path(self.data).name}


class LastLayers(Classifier):
    """A classifier whose examples enter the model after the frozen layers.

    Args:
        classifier: the whole model; it is cut in two and must not be used afterwards.
        layers: how many of the last layers stay.
        examples: all the examples there will be.
    """

    def __init__(self, classifier: Classifier, layers: int, examples: Sequence[Example]) -> None:
        super().__init__(classifier.model, classifier.tokenizer, classifier.prompt, WORDS)
        decoder = self.model.base_model
        if not 1 <= layers <= len(decoder.layers):
            raise ValueError(
                f"layers must be between 1 and the model's {len(decoder.layers)}, got {layers}"
            )
        last, norm = decoder.layers[len(decoder.layers) - layers :], decoder.norm
        decoder.layers = decoder.layers[: len(decoder.layers) - layers]
        decoder.norm = torch.nn.Identity()
        self._hidden = self._run_frozen(classifier, examples)
        decoder.layers, decoder.norm = last, norm
        decoder.register_forward_pre_hook(_as_embeddings, with_kwargs=True)
        for name, parameter in self.model.named_parameters():
            kept = name.startswith(("model.layers.", "model.norm."))
            parameter.requires_grad_(kept)

    @torch.no_grad()
    def _run_frozen(
        self, classifier: Classifier, examples: Sequence[Example]
    ) -> dict[tuple[int, ...], Tensor]:
        hidden = {}
        ordered = sorted(examples, key=lambda e: (len(e.token_ids), e.token_ids))
        for start in range(0, len(ordered), BATCH_SIZE):
            members = ordered[start : start + BATCH_SIZE]
            batch = classifier.collate(members)
            output = self.model.base_model(input_ids=batch.input_ids, use_cache=False)
            for example, rows in zip(members, output.last_hidden_state, strict=True):
                hidden[example.token_ids] = rows[: len(example.token_ids)].clone()
        return hidden

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad the frozen layers' output, (sentence, token, d), which replaces the token ids."""
        batch = super().collate(examples)
        rows = [self._hidden[example.token_ids] for example in examples]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return dataclasses.replace(batch, input_ids=padded)


def _as_embeddings(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"inputs_embeds": kwargs.pop("input_ids"), **kwargs}


class Task:
    """A model that can be reset to its initial weights, its batches, and its metrics."""

    def __init__(self, settings: Settings) -> None:
        splits = split(read_sentences(Path(settings.data), settings.max_words))
        whole = load_classifier(settings.model, settings.dtype, 0, PROMPT, WORDS)
        self.train = whole.encode(splits.train)
        self.validation = whole.encode(splits.validation[: settings.validation_sentences])
        self.test = whole.encode(splits.test[: settings.test_sentences])
        everything = [*self.train, *self.validation, *self.test]
        self.classifier = LastLayers(whole, settings.layers, everything)
        self._batch_size = settings.batch_size
        self._initial = {name: p.detach().clone() for name, p in self.parameters()}
        self.untrained = {"validation": self.validate(), "test": self.final()}

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self.classifier.trainable()

    @torch.no_grad()
    def reset(self) -> None:
        """Reset the parameters to their initial values."""
        for name, parameter in self.parameters():
            parameter.copy_(self._initial[name])

    def batches(self, seed: int) -> Iterator[Batch]:
        """The batches of a seed, the same for every method."""
        for members in balanced_batches(self.train, self._batch_size, seed):
            yield self.classifier.collate(members)

    def loss(self, batch: Batch) -> Tensor:
        return self.classifier.loss(batch)

    def validate(self) -> dict[str, float]:
        return evaluate(self.classifier, self.validation).as_dict()

    def final(self) -> dict[str, float]:
        return evaluate(self.classifier, self.test).as_dict()

    def sizes(self) -> dict[str, int]:
        """How many sentences and parameters there are."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "trained_parameters": sum(p.numel() for _, p in self.parameters()),
        }
