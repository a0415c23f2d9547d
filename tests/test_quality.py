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
LIMITS = {"clean": 0.07, "noise-10db": 0.16, "telephone": 0.1}  # word error rate; 0.05, 0.13 and 0.07 were measured
# The same of real speakers (0.14, 0.03 and 0.05 were measured); of other words, digits for each file (0.07).
REAL_LIMITS = {"fsdd": 0.15, "isolated": 0.05, "string": 0.07, "negative": 0.11}
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


def recordings_of_speakers_set_aside(kind: str) -> list[tuple[str, Path]]:
    """(text, file) of those that training/recordings.py leaves out: every fifth speaker of each source that has five.

    The folder that REAL_SPEECH names holds a folder with ``manifest.tsv`` (file, speaker, text, kind) for each source.
    """
    found = []
    for manifest in sorted(REAL_SPEECH.rglob("manifest.tsv")):
        with manifest.open(newline="") as table:
            rows = [row for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)]
        speakers = sorted({row["speaker"] for row in rows if row["kind"] in ("isolated", "string", "negative")})
        aside = set(speakers[::5]) if len(speakers) >= 5 else set()
        chosen = [row for row in rows if row["speaker"] in aside and row["kind"] == kind]
        found += [(row["text"], manifest.parent / row["file"]) for row in chosen]
    return found


@pytest.fixture(scope="module", params=["fp32", "int8"])
def hearing(request, tmp_path_factory) -> tuple[str, Worker]:
    """A precision, and a worker of that precision."""
    path = tmp_path_factory.mktemp(request.param) / "emformer_rnnt.pt"
    export_model.export("digits", path, request.param)
    return request.param, Worker(path)


@pytest.mark.skipif(
    not real_digits(),
    reason="needs real spoken digits: REAL_SPEECH=folder with DIGIT_SPEAKER_TAKE.wav files, or fsdd*.zip of them",
)
def test_single_digits_of_real_speakers_are_heard(hearing):
    _, worker = hearing
    recordings = [(DIGITS[int(name[0])], audio) for name, audio in list(real_digits().items())[::5]]
    assert word_error_rate(worker, recordings) <= REAL_LIMITS["fsdd"]


@pytest.mark.skipif(
    not recordings_of_speakers_set_aside("isolated"),
    reason="needs digits by speaker: REAL_SPEECH=folder with a folder and its manifest.tsv for each source",
)
@pytest.mark.parametrize("kind", ["isolated", "string"])
def test_speakers_that_were_set_aside_are_heard(hearing, kind):
    _, worker = hearing
    recordings = [(text, path.read_bytes()) for text, path in recordings_of_speakers_set_aside(kind)]
    assert word_error_rate(worker, recordings) <= REAL_LIMITS[kind]


@pytest.mark.skipif(
    not recordings_of_speakers_set_aside("negative"),
    reason="needs other words by speaker: REAL_SPEECH=folder with a folder and its manifest.tsv for each source",
)
def test_other_words_are_not_taken_for_digits(hearing):
    _, worker = hearing
    recordings = [path.read_bytes() for _, path in recordings_of_speakers_set_aside("negative")]
    written = sum(len(worker.transcribe(audio).split()) for audio in recordings)
    assert written <= REAL_LIMITS["negative"] * len(recordings)
