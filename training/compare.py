"""Compare the digits model with what a user might take instead, on the same files in one run, one thread each.

    pip install -r requirements-compare.txt
    python compare.py --whisper whisper --data data/test/heldout-clean data/test/real-isolated --every 7

Whisper's models are folders that faster-whisper reads, found as ``whisper/tiny.en`` and ``whisper/base.en``.
"Oh" and "zero" are counted as one word for everybody, since Whisper writes a 0 for both.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faster_whisper
import numpy as np
import pocketsphinx
import torch
from evaluate import WORDS, Recogniser, errors, read_transcripts
from tqdm import tqdm

import export_model
from handler import SAMPLE_RATE, decode_audio

# Whisper's ways of writing a digit that somebody said.
NUMERALS = dict(zip("0123456789", WORDS[:10], strict=True))
HOMOPHONES = {"o": "zero", "oh": "zero", "to": "two", "too": "two", "for": "four", "won": "one", "ate": "eight"}
GRAMMAR = "#JSGF V1.0;\ngrammar digits;\npublic <digits> = ( " + " | ".join(WORDS) + " )+ ;\n"


def normalised(text: str) -> str:
    """Lower case, numerals as words, homophones of digits as the digits, oh as zero."""
    words = re.findall(r"[a-z]+|\d", text.lower())
    return " ".join(HOMOPHONES.get(word, NUMERALS.get(word, word)) for word in words)


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def whisper(folder: Path) -> Callable[[torch.Tensor], str]:
    model = faster_whisper.WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)

    def recognise(waveform: torch.Tensor) -> str:
        segments, _ = model.transcribe(waveform.numpy(), language="en")
        return " ".join(segment.text for segment in segments)

    return recognise


def sphinx() -> Callable[[torch.Tensor], str]:
    with tempfile.NamedTemporaryFile("w", suffix=".gram") as grammar:
        grammar.write(GRAMMAR)
        grammar.flush()
        decoder = pocketsphinx.Decoder(jsgf=grammar.name, loglevel="FATAL")

    def recognise(waveform: torch.Tensor) -> str:
        samples = (waveform.clamp(-1, 1) * 32767).numpy().astype(np.int16)
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        return decoder.hyp().hypstr if decoder.hyp() else ""

    return recognise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders with transcripts.tsv")
    parser.add_argument("--whisper", type=Path, help="folder with tiny.en and base.en")
    parser.add_argument("--every", type=int, default=1, help="take every n-th file only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recognisers: dict[str, tuple[Callable[[torch.Tensor], str], float]] = {}
    for precision, beam_width in (("fp32", 1), ("fp32", 10), ("int8", 1)):
        handler = Recogniser(precision, beam_width).handler

        def recognise(waveform: torch.Tensor, handler=handler) -> str:
            with torch.inference_mode():
                return handler.tokens_to_text(handler._search([waveform])[0][0][0])

        recognisers[f"this model, {precision}, beam {beam_width}"] = (recognise, megabytes(export_model.DIGITS))
    model = Path(pocketsphinx.get_model_path()) / "en-us"
    recognisers["pocketsphinx, digit grammar"] = (sphinx(), megabytes(model))
    for name in ("tiny.en", "base.en") if args.whisper else ():
        recognisers[f"Whisper {name}, int8"] = (whisper(args.whisper / name), megabytes(args.whisper / name))
    print(f"{'':28} {'set':20} {'WER':>7} {'of words':>9} {'s per s':>8} {'MB':>6}")
    for folder in args.data:
        rows = read_transcripts(folder)[:: args.every]
        waveforms = [decode_audio((folder / row["file"]).read_bytes()) for row in rows]
        texts = [normalised(row["text"]) for row in rows]
        duration = sum(len(waveform) for waveform in waveforms) / SAMPLE_RATE
        for name, (recognise, size) in recognisers.items():
            recognise(waveforms[0])
            started = time.perf_counter()
            heard = [recognise(waveform) for waveform in tqdm(waveforms, desc=name, leave=False, unit="file")]
            pace = (time.perf_counter() - started) / duration
            words, *kinds = errors(texts, [normalised(text) for text in heard])
            wer = 100 * sum(kinds) / words
            print(f"{name:28} {folder.name:20} {wer:6.2f}% {words:9} {pace:8.3f} {size:6.0f}", flush=True)


if __name__ == "__main__":
    main()
