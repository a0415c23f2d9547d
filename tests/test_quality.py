"""What the digits model hears: of voices it was not trained on, and of real speakers where recordings are at hand."""

import csv
import io
import os
import zipfile
from pathlib import Path

import pytest
from conftest import Worker
from torchaudio.functional import edit_distance

import export_model

HELD_OUT = Path(__file__).parent / "held_out"  # made by training/testsets.py --guard
LIMITS = {"clean": 0.13, "noise-10db": 0.33, "telephone": 0.2}  # word error rate; 0.10, 0.29 and 0.16 were measured
REAL_SPEECH = Path(os.environ.get("REAL_SPEECH", "nowhere"))
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def word_error_rate(worker: Worker, recordings: list[tuple[str, bytes]]) -> float:
    """Of pairs of what was said and the file."""
    pairs = [(said.split(), worker.transcribe(audio).split()) for said, audio in recordings]
    return sum(edit_distance(said, heard) for said, heard in pairs) / sum(len(said) for said, _ in pairs)


@pytest.mark.parametrize(("precision", "beam_width"), [("fp32", 1), ("fp32", 10), ("int8", 1)])
def test_held_out_voices_are_heard_clean_in_noise_and_by_telephone(tmp_path, precision, beam_width):
    path = tmp_path / "emformer_rnnt.pt"
    export_model.export("digits", path, precision)
    worker = Worker(path, {"beam_width": beam_width})
    with (HELD_OUT / "transcripts.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for condition, limit in LIMITS.items():
        chosen = [row for row in rows if condition in row["file"]]
        recordings = [(row["text"], (HELD_OUT / row["file"]).read_bytes()) for row in chosen]
        assert len(recordings) == 20
        assert word_error_rate(worker, recordings) <= limit, condition


def real_digits() -> dict[str, bytes]:
    """Recordings named DIGIT_SPEAKER_TAKE.wav in the folder that REAL_SPEECH names, or in a zip file there."""
    found = {path.name: path.read_bytes() for path in sorted(REAL_SPEECH.rglob("[0-9]_*_*.wav"))}
    for archive in sorted(REAL_SPEECH.glob("fsdd*.zip")):
        with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as files:
            for name in sorted(files.namelist()):
                if Path(name).match("[0-9]_*_*.wav"):
                    found[Path(name).name] = files.read(name)
    return found


@pytest.mark.skipif(
    not real_digits(),
    reason="needs real spoken digits: REAL_SPEECH=folder with DIGIT_SPEAKER_TAKE.wav files, or fsdd*.zip of them",
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_three_of_four_digits_of_real_speakers_are_heard(tmp_path, precision):
    path = tmp_path / "emformer_rnnt.pt"
    export_model.export("digits", path, precision)
    worker = Worker(path)
    recordings = [(DIGITS[int(name[0])], audio) for name, audio in list(real_digits().items())[::5]]
    assert word_error_rate(worker, recordings) <= 0.28
