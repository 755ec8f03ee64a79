"""Labelled sentences: three file formats to read and fixed splits."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

TEST_SHARE = 0.20
VALIDATION_SHARE = 0.10

LABELS = {
    "0": False, "-1": False, "false": False, "neg": False, "negative": False, "bad": False,
    "1": True, "+1": True, "true": True, "pos": True, "positive": True, "good": True,
}  # fmt: skip
FORMATS = (
    "a .tsv of id<TAB>rating<TAB>text, a .csv with the columns label,text "
    'or a .jsonl of {"label": ..., "text": ...}'
)


@dataclass(frozen=True)
class Sentence:
    """One sentence and whether it is positive."""

    text: str
    positive: bool


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets, each in an order that depends on the texts alone."""

    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]


def _parse_label(value: object, where: str) -> bool:
    key = str(value).strip().lower().removesuffix(".0")
    if key not in LABELS:
        raise InputError(f"{where}: label {value!r} is not one of {', '.join(LABELS)}")
    return LABELS[key]


def _numbered_lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    # Not str.splitlines, which also cuts at characters that may stand inside a sentence.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _read_tsv(text: str, path: Path) -> Iterator[Sentence]:
    for where, line in _numbered_lines(text, path):
        fields = line.split("\t")
        if len(fields) != 3:
            raise InputError(
                f"{where}: expected id<TAB>rating<TAB>text, got {len(fields)} field(s)"
            )
        try:
            rating = float(fields[1])
        except ValueError:
            raise InputError(f"{where}: rating {fields[1]!r} is not a number") from None
        if not math.isfinite(rating):
            raise InputError(f"{where}: rating {fields[1]!r} is not a finite number")
        if rating != 0:
            yield Sentence(fields[2].strip(), rating > 0)


def _read_csv(text: str, path: Path) -> Iterator[Sentence]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"label", "text"} <= set(reader.fieldnames or ()):
        raise InputError(f"{path}:1: the first line must name the columns label and text")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if row["label"] is None or row["text"] is None:
            raise InputError(f"{where}: a label or a text is missing")
        yield Sentence(row["text"].strip(), _parse_label(row["label"], where))


def _read_jsonl(text: str, path: Path) -> Iterator[Sentence]:
    for where, line in _numbered_lines(text, path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise InputError(f'{where}: expected {{"label": ..., "text": "..."}}')
        yield Sentence(row["text"].strip(), _parse_label(row["label"], where))


READERS: dict[str, Callable[[str, Path], Iterator[Sentence]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}


def read_sentences(path: Path, max_words: int) -> list[Sentence]:
    """Read the labelled sentences of at most ``max_words`` words (0: any length) from a file."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown format; give {FORMATS}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give {FORMATS} with --data") from None
    sentences = [s for s in reader(text, path) if s.text]
    kept = [s for s in sentences if not max_words or len(s.text.split()) <= max_words]
    if not kept:
        raise InputError(
            f"{path}: none of {len(sentences)} labelled sentences has at most {max_words} words; "
            "raise --max-words"
        )
    return kept


def _position(text: str) -> float:
    """Map a text to [0, 1), the same in every run and for every spelling of its case."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(sentences: Sequence[Sentence]) -> Splits:
    """Divide the sentences into train (70%), validation (10%) and test (20%) sets.

    A hash of the text decides, so that a sentence that occurs twice stays on one side and a
    sentence added to the file moves no other.
    """
    ordered = sorted(sentences, key=lambda s: _position(s.text))
    splits = Splits([], [], [])
    for sentence in ordered:
        position = _position(sentence.text)
        if position < TEST_SHARE:
            splits.test.append(sentence)
        elif position < TEST_SHARE + VALIDATION_SHARE:
            splits.validation.append(sentence)
        else:
            splits.train.append(sentence)
    for name in ("train", "validation", "test"):
        members = getattr(splits, name)
        if len({s.positive for s in members}) < 2:
            raise InputError(
                f"the {name} split of {len(sentences)} sentences holds {len(members)} and lacks "
                "one of the two labels; give more sentences with --data or raise --max-words"
            )
    return splits
