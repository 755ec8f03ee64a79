"""What bench.pretrain trains: small LLaMAs from random weights, on English text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.pretrain.data import DOCUMENTS, fingerprint, load_corpus


@dataclasses.dataclass(frozen=True)
class Model:
    """A LLaMA's shape, and the budgets that it is compared at.

    Attributes:
        width, layers, heads, mlp_width: of the decoder; input and output embedding are one.
        steps: of a run.
        grid_steps: of the runs that choose the learning rate.
        seeds: runs of a method at the chosen learning rate.
        transferred: whether a grid is but the smaller model's best learning rate and half of it.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    steps: int
    grid_steps: int
    seeds: int
    transferred: bool = False


MODELS = {
    "1m": Model(width=128, layers=4, heads=4, mlp_width=344, steps=400, grid_steps=400, seeds=3),
    "6m": Model(*(256, 6, 8, 688), steps=400, grid_steps=400, seeds=3, transferred=True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common.

    Attributes:
        model: a name in `MODELS`.
        steps, grid_steps, seeds: as in `Model`, whose own are the defaults on the command line.
        documents: path of the text.
        vocab_size: of the byte-level BPE.
        seq_len: tokens a sequence.
        batch_size: sequences a step.
        rank_share: a projected method's rank, as a share of the width.
        update_proj_gap: steps between a projection's refreshes.
        warmup_share: of the steps, in which the learning rate rises linearly from 0.
        final_lr: what the cosine ends on, as a share of the learning rate.
        validation_rows: sequences of the validation split that are used, spread evenly over it.
        evaluations: looks at the validation split in a run of the full budget.
        extensions: learning rates that may be added to a grid whose best one is at its edge.
    """

    model: str
    steps: int
    grid_steps: int
    seeds: int
    documents: str = str(DOCUMENTS)
    vocab_size: int = 4096
    seq_len: int = 128
    batch_size: int = 8
    rank_share: float = 0.25
    update_proj_gap: int = 50
    warmup_share: float = 0.1
    final_lr: float = 0.1
    validation_rows: int = 256
    evaluations: int = 4
    extensions: int = 4

    @property
    def shape(self) -> Model:
        return MODELS[self.model]

    @property
    def rank(self) -> int:
        return max(1, round(self.rank_share * self.shape.width))

    def as_dict(self) -> dict[str, Any]:
        """The settings as they go into files: no path, but what names the text."""
        values = {**dataclasses.asdict(self.shape), **dataclasses.asdict(self)}
        return {**values, "documents": fingerprint(Path(self.documents)), "rank": self.rank}

    def lr_factor(self, step: int, steps: int) -> float:
        """What the learning rate of step 0, 1, ... of a run is multiplied by."""
        warmup = max(1, round(self.warmup_share * steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return self.final_lr + (1.0 - self.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Task:
    """The tokens in rows, new models, batches and the loss."""

    def __init__(self, settings: Settings) -> None:
        corpus = load_corpus(Path(settings.documents), settings.vocab_size)
        self.settings = settings
        self.train = rows(corpus.train, settings.seq_len)
        validation = rows(corpus.validation, settings.seq_len)
        count = min(settings.validation_rows, len(validation))
        self.validation = validation[torch.arange(count) * len(validation) // count]

    def model(self, seed: int) -> nn.Module:
        """A new model; its weights are a function of the seed."""
        shape, settings = self.settings.shape, self.settings
        # It would warn that the configuration names no loss; the default one is meant.
        transformers.logging.set_verbosity_error()
        config = transformers.LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=settings.seq_len,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = transformers.LlamaForCausalLM(config)
        return model.train()

    def batches(self, seed: int) -> Iterator[Tensor]:
        """The batches of a seed, (batch_size, seq_len), the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        size = self.settings.batch_size
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                yield self.train[order[start : start + size]]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross-entropy of each token after its row's first."""
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Cross-entropy and perplexity of the validation rows."""
        model.eval()
        parts = self.validation.split(self.settings.batch_size)
        total = sum(float(self.loss(model, part)) * len(part) for part in parts)
        model.train()
        loss = total / len(self.validation)
        return {"cross_entropy": loss, "perplexity": math.exp(min(loss, 700.0))}

    def sizes(self) -> dict[str, int]:
        """How many tokens and parameters there are."""
        model = self.model(0)
        return {
            "train_tokens": self.train.numel(),
            "validation_tokens": self.validation.numel(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "matrix_parameters": sum(p.numel() for p in matrices(model).values()),
        }


def rows(tokens: Tensor, seq_len: int) -> Tensor:
    """(rows, seq_len); the last tokens, fewer than a row, are left out."""
    count = len(tokens) // seq_len
    return tokens[: count * seq_len].view(count, seq_len)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the decoder's linear layers train, by name: neither embeddings nor norms."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and ".layers." in name and "norm." not in name
    }
