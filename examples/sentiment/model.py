"""A causal language model read as a classifier: which of two words would it say next?"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .data import Sentence
from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Example:
    """One prompted sentence as token ids, and its label."""

    token_ids: tuple[int, ...]
    positive: bool


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right."""

    input_ids: torch.Tensor
    last: torch.Tensor
    positive: torch.Tensor


class Classifier:
    """The language model, its tokenizer, a prompt and two verbalizers."""

    def __init__(self, model: Any, tokenizer: Any, prompt: str, verbalizers: Sequence[str]) -> None:
        if prompt.count("{}") != 1:
            raise InputError(f"--prompt needs one {{}} where the sentence goes, got {prompt!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.verbalizer_ids = torch.tensor([self._single_token(word) for word in verbalizers])
        if self.verbalizer_ids[0] == self.verbalizer_ids[1]:
            raise InputError("the two --verbalizers are the same token; give two different words")

    def _single_token(self, word: str) -> int:
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise InputError(
                f"verbalizer {word!r} is {len(ids)} tokens of this model ({pieces}), it must be "
                "one; try a commoner word, and mind the space in front"
            )
        return int(ids[0])

    def encode(self, sentences: Sequence[Sentence]) -> list[Example]:
        """Put the sentences into the prompt and turn them into token ids."""
        texts = [self.prompt.replace("{}", sentence.text) for sentence in sentences]
        ids = self.tokenizer(texts, add_special_tokens=True).input_ids
        return [Example(tuple(row), s.positive) for row, s in zip(ids, sentences, strict=True)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad the examples to one length."""
        lengths = [len(example.token_ids) for example in examples]
        width = max(lengths)
        rows = [e.token_ids + (0,) * (width - len(e.token_ids)) for e in examples]
        return Batch(
            input_ids=torch.tensor(rows),
            last=torch.tensor(lengths) - 1,
            positive=torch.tensor([float(example.positive) for example in examples]),
        )

    def logit_difference(self, batch: Batch) -> torch.Tensor:
        """Logit of the positive minus that of the negative verbalizer after each prompt.

        Padding stands on the right of a causal model, where nothing that is read can see it, so no
        attention mask is needed. Only two rows of the output head are read: the logits of the
        whole vocabulary would cost more memory than the rest of the forward pass.
        """
        decoder = self.model.base_model
        hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(batch.last)), batch.last]
        head = self.model.get_output_embeddings()
        # In float32, since two bf16 logits near 16 differ by multiples of 0.06.
        logits = F.linear(last.float(), F.embedding(self.verbalizer_ids, head.weight).float())
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[self.verbalizer_ids].float()
        return logits[:, 1] - logits[:, 0]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy between the two verbalizers, mean over the batch."""
        return F.binary_cross_entropy_with_logits(self.logit_difference(batch), batch.positive)

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the parameters to train, by name."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]


def balanced_batches(
    examples: Sequence[Example], batch_size: int, seed: int
) -> Iterator[list[Example]]:
    """Yield batches without end: half of each label, all of similar length.

    Equal halves keep the label bias, the easiest thing to change and the least worth learning,
    out of a batch's sampling noise; similar lengths leave next to no padding.
    """
    rng = random.Random(seed)
    labels = [[e for e in examples if e.positive is positive] for positive in (True, False)]
    count = min(len(members) for members in labels)
    half = min(batch_size // 2, count)
    while True:
        halves = []
        for members in labels:
            chosen = rng.sample(members, count)
            chosen.sort(key=lambda e: len(e.token_ids))
            halves.append([chosen[i : i + half] for i in range(0, count - half + 1, half)])
        batches = [positive + negative for positive, negative in zip(*halves, strict=True)]
        rng.shuffle(batches)
        yield from batches


def load_classifier(
    model_path: str, dtype: str, lora_rank: int, prompt: str, verbalizers: Sequence[str]
) -> Classifier:
    """Load a model and its tokenizer in evaluation mode, optionally with LoRA adapters.

    Dropout stays off: two evaluations of a loss are compared, and should differ by the parameters
    alone.
    """
    local = Path(model_path).is_dir()
    if local:
        # Must be set before the hub client is imported, or a local directory is still looked up.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path, local_files_only=local)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_path, dtype=DTYPES[dtype], local_files_only=local
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"cannot load a causal language model and tokenizer from {model_path!r} ({reason}); "
            "give --model a directory that save_pretrained wrote, or a model's name"
        ) from error
    if lora_rank:
        model = _with_lora(model, lora_rank)
    return Classifier(model.eval(), tokenizer, prompt, verbalizers)


def _with_lora(model: Any, rank: int) -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("--lora needs the package peft; pip install peft") from error
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none")
    try:
        return peft.get_peft_model(model, config).get_base_model()
    except ValueError as error:
        raise InputError(
            f"peft knows no LoRA layers for model type {model.config.model_type!r}; "
            "leave out --lora"
        ) from error
