"""What the digits model hears of real speakers, where recordings of them are at hand."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from conftest import Worker
from torchaudio.functional import edit_distance

import export_model

REAL_SPEECH = Path(os.environ.get("REAL_SPEECH", "nowhere"))
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


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
    recordings = list(real_digits().items())[::5]
    texts = [(DIGITS[int(name[0])], worker.transcribe(audio)) for name, audio in recordings]
    errors = sum(edit_distance([said], heard.split()) for said, heard in texts)
    assert errors / len(texts) <= 0.3
