"""Write an Emformer RNN-T as one self-contained TorchScript file that handler.py serves.

    python export_model.py                                  # our spoken-digit model, from models/digits/
    python export_model.py --model librispeech              # torchaudio's EMFORMER_RNNT_BASE_LIBRISPEECH
    python export_model.py --model librispeech --checkpoint my_weights.pt --precision int8

The file carries, beside the network, what the handler needs to turn audio into features and tokens into
text: the global feature statistics, the SentencePiece model and a small metadata.json.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torchaudio
from sentencepiece import SentencePieceProcessor
from torchaudio.models import RNNT, emformer_rnnt_model
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

from engine.decoder import Decoder
from engine.precision import PRECISIONS, with_precision

DIGITS = Path(__file__).parent / "models" / "digits"
# Seconds by which the emission of a word's first and last token is behind its sound; what handler.py subtracts from the
# times of words. Medians of training/word_times.py; not known for other weights.
WORD_DELAYS = {"digits": {"start": -0.025, "end": -0.015}}
# Seconds without an answer after which a download counts as unreachable.
DOWNLOAD_TIMEOUT = 30

Content = TypeVar("Content", bytes, dict[str, torch.Tensor])


def bundle_asset(name: str, read: Callable[[Path], Content]) -> Content:
    """What ``read`` gives of one of the LibriSpeech bundle's files, downloaded if it is not in the torch hub cache.

    Raises:
        ConnectionError: the file is not in the cache and cannot be downloaded.
        ValueError: it is not whole; then it is removed, so that the next download is not kept from replacing it.
    """
    cached = Path(torch.hub.get_dir()) / "torchaudio" / name
    try:
        torchaudio.utils._download_asset(name)
    except OSError as error:  # urllib's errors are OSErrors
        raise ConnectionError(
            f"{cached.name} is not in the torch hub cache and cannot be downloaded ({error}). "
            f"Download it elsewhere and put it at {cached}."
        ) from error
    try:
        return read(cached)
    except (ValueError, RuntimeError) as error:  # RuntimeError is SentencePiece's
        cached.unlink()
        raise ValueError(
            f"{cached} was cut off or damaged on its way and has been removed: run this again to download it anew."
        ) from error


def read_stats(path: Path) -> bytes:
    json.loads(path.read_bytes())
    return path.read_bytes()


def read_tokenizer(path: Path) -> bytes:
    SentencePieceProcessor(model_proto=path.read_bytes())
    return path.read_bytes()


def librispeech(checkpoint: Path | None) -> tuple[RNNT, int, dict[str, bytes]]:
    """torchaudio's base model: the network, its blank index and its files, see ``digits``."""
    bundle = EMFORMER_RNNT_BASE_LIBRISPEECH
    files = {
        "global_stats.json": bundle_asset(bundle._global_stats_path, read_stats),
        "tokenizer.model": bundle_asset(bundle._sp_model_path, read_tokenizer),
    }
    model = bundle._rnnt_factory_func()
    weights = read_weights(checkpoint) if checkpoint else bundle_asset(bundle._rnnt_path, read_weights)
    load_weights(model, weights, checkpoint or "The bundle's checkpoint")
    return model, bundle._blank, files


def digits(checkpoint: Path | None) -> tuple[RNNT, int, dict[str, bytes]]:
    """Our spoken-digit model.

    Args:
        checkpoint (Path or None): state dict to load instead of ``models/digits/weights.pt``.

    Returns:
        (RNNT, int, dict[str, bytes]): the network, its blank index, and the content of the feature statistics
        and of the SentencePiece model under the names that handler.py looks for.
    """
    architecture = json.loads((DIGITS / "architecture.json").read_text())
    model = emformer_rnnt_model(**architecture)
    path = checkpoint or DIGITS / "weights.pt"
    load_weights(model, read_weights(path), path)
    files = {name: (DIGITS / name).read_bytes() for name in ("global_stats.json", "tokenizer.model")}
    return model, architecture["num_symbols"] - 1, files


MODELS = {"digits": digits, "librispeech": librispeech}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in ``path``.

    Raises:
        ValueError: the file is cut off, or not a state dict.
        OSError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'torch.load' received a zip file that looks like a TorchScript")
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # what the unpickler raises on other files depends on their first bytes
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        cut = zipped and not zipfile.is_zipfile(path)  # the index of a zip file is at its end
        if cut or isinstance(error, EOFError) or "EOF" in str(error) or "truncated" in str(error):
            raise ValueError(f"{path} is cut off: download or copy it again.") from error
        kind = "a TorchScript model" if "TorchScript" in str(error) else "another kind of file"
        raise ValueError(
            f"{path} is not a PyTorch state dict but {kind}: give one written by torch.save(model.state_dict(), ...)."
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise ValueError(
            f"{path} is not a state dict: it must map parameter names to tensors. Of a training checkpoint, save the "
            "state dict in it alone."
        )
    return weights


def load_weights(model: RNNT, weights: dict[str, torch.Tensor], source: Path | str) -> None:
    """Load ``weights``, which were read from ``source``, into ``model``.

    Raises:
        ValueError: they are those of another architecture, or not all of them are finite numbers.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (expected, weights)]
        if shapes[0] != shapes[1]:
            found = "lacks it" if shapes[1] is None else f"has {shapes[1]}"
            wanted = "does not have it" if shapes[0] is None else f"expects {shapes[0]}"
            raise ValueError(
                f"{source} is of another architecture: for {name} the model {wanted}, the file {found}. Choose the "
                "--model that it was trained as."
            )
        if not weights[name].isfinite().all():
            raise ValueError(
                f"{source} has values in {name} that are not finite numbers: its training failed, or the file is "
                "damaged. Take an earlier checkpoint, or copy it again."
            )
    model.load_state_dict(weights)


def export(
    model_name: str, output: Path, precision: str = "fp32", checkpoint: Path | None = None
) -> dict[str, str | int]:
    """Build, script and save a model.

    Args:
        model_name (str): ``digits`` or ``librispeech``.
        output (Path): the TorchScript file to write; an existing file is replaced in one step.
        precision (str): ``fp32``, ``bf16`` or ``int8``, see ``engine.precision.with_precision``.
        checkpoint (Path or None): state dict to load instead of the model's own.

    Returns:
        dict: the metadata that the file carries.

    Raises:
        ValueError: the checkpoint does not fit, or is not whole.
        OSError: a file cannot be read, downloaded or written.
    """
    model, blank, files = MODELS[model_name](checkpoint)
    model.eval()
    metadata = {
        "model": model_name,
        "checkpoint": checkpoint.name if checkpoint else "default",
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sample_rate": EMFORMER_RNNT_BASE_LIBRISPEECH.sample_rate,
        "blank": blank,
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
    }
    if model_name in WORD_DELAYS and not checkpoint:
        metadata["word_delays"] = WORD_DELAYS[model_name]
    with warnings.catch_warnings():
        # TorchScript is what the handler's interface asks for; torch 2.11 calls it deprecated on every use.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        scripted = torch.jit.script(with_precision(Decoder(model, blank), precision))
        save(scripted, output, files | {"metadata.json": json.dumps(metadata, indent=1).encode()})
    return metadata


def save(scripted: torch.jit.ScriptModule, output: Path, files: dict[str, bytes]) -> None:
    """Save beside ``output`` first, so that a full disk or an interrupt leaves no half-written model there.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
            unfinished = Path(folder) / "model.pt"
            torch.jit.save(scripted, str(unfinished), _extra_files=files)
            os.replace(unfinished, output)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch.jit.save raises on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {output}: {reason}.") from error


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="digits", help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="state dict to load instead of the model's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("emformer_rnnt.pt"), help="default: %(default)s")
    args = parser.parse_args()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        metadata = export(args.model, args.output, args.precision, args.checkpoint)
    except (ValueError, OSError) as error:
        print(f"export_model.py: {error}", file=sys.stderr)
        return 1
    content = args.output.read_bytes()
    print(f"wrote      {args.output}")
    print(f"model      {metadata['model']} (checkpoint: {metadata['checkpoint']})")
    print(f"parameters {metadata['parameters']:,}")
    print(f"precision  {metadata['precision']}")
    print(f"size       {len(content):,} bytes")
    print(f"sha256     {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
