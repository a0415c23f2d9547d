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
from pathlib import Path

import torch
import torchaudio
from torchaudio.models import RNNT, emformer_rnnt_model
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

from engine.decoder import Decoder
from engine.precision import PRECISIONS, with_precision

DIGITS = Path(__file__).parent / "models" / "digits"
# Seconds by which the emission of a word's first and last token is behind its sound; what handler.py subtracts from the
# times of words. Medians of training/word_times.py; not known for other weights.
WORD_DELAYS = {"digits": {"start": -0.005, "end": -0.025}}
# Seconds without an answer after which a download counts as unreachable.
DOWNLOAD_TIMEOUT = 30


def bundle_asset(name: str) -> Path:
    """Path of one of the LibriSpeech bundle's files, downloaded into the torch hub cache if it is not there.

    Raises:
        ConnectionError: the file is not in the cache and cannot be downloaded.
    """
    cached = Path(torch.hub.get_dir()) / "torchaudio" / name
    try:
        return Path(torchaudio.utils._download_asset(name))
    except OSError as error:  # urllib's errors are OSErrors
        raise ConnectionError(
            f"{cached.name} is not in the torch hub cache and cannot be downloaded ({error}). "
            f"Download it elsewhere and put it at {cached}."
        ) from error


def librispeech(checkpoint: Path | None) -> tuple[RNNT, int, dict[str, bytes]]:
    """torchaudio's base model: the network, its blank index and its files, see ``digits``."""
    bundle = EMFORMER_RNNT_BASE_LIBRISPEECH
    files = {
        "global_stats.json": bundle_asset(bundle._global_stats_path).read_bytes(),
        "tokenizer.model": bundle_asset(bundle._sp_model_path).read_bytes(),
    }
    model = bundle._rnnt_factory_func()
    load_weights(model, checkpoint or bundle_asset(bundle._rnnt_path))
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
    load_weights(model, checkpoint or DIGITS / "weights.pt")
    files = {name: (DIGITS / name).read_bytes() for name in ("global_stats.json", "tokenizer.model")}
    return model, architecture["num_symbols"] - 1, files


MODELS = {"digits": digits, "librispeech": librispeech}


def load_weights(model: RNNT, path: Path) -> None:
    """Load the state dict in ``path`` into ``model``.

    Raises:
        ValueError: the file is not a state dict, or not one of this architecture.
        OSError: the file cannot be read.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # what the unpickler raises on other files depends on their first bytes
        raise ValueError(f"{path} is not a PyTorch state dict (a file written by torch.save).") from error
    expected = model.state_dict()
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise ValueError(f"{path} is not a state dict: it must map parameter names to tensors.")
    for name in sorted(expected.keys() | weights.keys()):
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (expected, weights)]
        if shapes[0] != shapes[1]:
            found = "lacks it" if shapes[1] is None else f"has {shapes[1]}"
            wanted = "does not have it" if shapes[0] is None else f"expects {shapes[0]}"
            raise ValueError(f"{path} does not fit this model: for {name} the model {wanted}, the file {found}.")
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
        ValueError: the checkpoint does not fit.
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
