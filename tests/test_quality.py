"""What the digits model hears: a small set of held-out synthetic voices, and real ones where they are at hand."""

import csv
import io
import os
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Worker
from torchaudio.functional import edit_distance

import export_model

HELD_OUT = ROOT / "tests" / "held_out"
REAL_SPEECH = Path(os.environ.get("REAL_SPEECH", "nowhere"))
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Of (said, heard) texts."""
    errors = sum(edit_distance(said.split(), heard.split()) for said, heard in pairs)
    return errors / sum(len(said.split()) for said, _ in pairs)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def digits_worker(request, tmp_path_factory) -> Worker:
    path = tmp_path_factory.mktemp(request.param) / "emformer_rnnt.pt"
    export_model.export("digits", path, request.param)
    return Worker(path)


def real_digits() -> dict[str, bytes]:
    """Recordings named DIGIT_SPEAKER_TAKE.wav in the folder that REAL_SPEECH names, or in a zip file there."""
    found = {path.name: path.read_bytes() for path in sorted(REAL_SPEECH.rglob("[0-9]_*_*.wav"))}
    for archive in sorted(REAL_SPEECH.glob("fsdd*.zip")):
        with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as files:
            for name in sorted(files.namelist()):
                if Path(name).match("[0-9]_*_*.wav"):
                    found[Path(name).name] = files.read(name)
    return found


def test_held_out_voices_are_heard(digits_worker):
    with (HELD_OUT / "transcripts.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    pairs = [(row["text"], digits_worker.transcribe((HELD_OUT / row["file"]).read_bytes())) for row in rows]
    assert len(pairs) == 60
    assert word_error_rate(pairs) <= HELD_OUT_LIMIT


@pytest.mark.skipif(
    not real_digits(),
    reason="needs real spoken digits: REAL_SPEECH=folder with DIGIT_SPEAKER_TAKE.wav files, or fsdd*.zip of them",
)
def test_real_speakers_are_heard(digits_worker):
    recordings = list(real_digits().items())[::5]
    pairs = [(DIGITS[int(name[0])], digits_worker.transcribe(audio)) for name, audio in recordings]
    assert word_error_rate(pairs) <= REAL_LIMIT
