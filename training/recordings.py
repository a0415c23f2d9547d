"""Turn recordings of real speakers into clips for train.py, and of a fifth of the speakers into sets to measure on.

    python recordings.py --recordings RECORDINGS --clips data --output data/test

RECORDINGS holds a folder for each source with a ``manifest.tsv``: file, speaker, text, kind. Kinds: ``isolated`` (one
digit), ``string`` (several), ``negative`` (other words), ``noise`` (no speech); others are left out. Every fifth
speaker of a source is set aside, if it has five. Where the words of a string are is found by pocketsphinx.

``train.py`` reads the clips beside those of synthesise.py. training/README.md names the data sets.
"""

import argparse
import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pocketsphinx
import soundfile
from testsets import new_folder, write_transcripts

SAMPLE_RATE = 16_000
KINDS = ("isolated", "string", "negative", "noise")
POOL = 6  # speakers with fewer than four digits are put together, so that strings can be made of them
DIGITS_OF_A_SPEAKER = 4
PAUSE = 0.5  # seconds of silence that pocketsphinx gets before and behind


def read_manifests(folder: Path) -> list[dict[str, str]]:
    """The rows of every ``manifest.tsv``, with ``path`` and ``source``, the name of its folder, added."""
    rows = []
    for manifest in sorted(folder.glob("*/manifest.tsv")):
        with manifest.open(newline="") as table:
            for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE):
                path = manifest.parent / row["file"]
                if row["kind"] in KINDS and path.exists():
                    rows.append(row | {"path": path, "source": manifest.parent.name})
    return rows


def set_aside(rows: list[dict[str, str]]) -> set[str]:
    """Every fifth speaker of each source that has at least five."""
    speakers = defaultdict(set)
    for row in rows:
        if row["kind"] != "noise":
            speakers[row["source"]].add(row["speaker"])
    return {name for names in speakers.values() if len(names) >= 5 for name in sorted(names)[::5]}


def read(path: Path) -> np.ndarray:
    """Samples as int16."""
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == SAMPLE_RATE, path
    return samples


def word_times(samples: np.ndarray, words: list[str]) -> list[tuple[float, float]] | None:
    """Where each word is, in seconds; None if pocketsphinx cannot align them."""
    decoder = pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    quiet = np.random.default_rng(0).integers(-3, 4, int(PAUSE * SAMPLE_RATE)).astype(np.int16)
    decoder.set_align_text(" ".join(words))
    decoder.start_utt()
    decoder.process_raw(np.concatenate([quiet, samples, quiet]).tobytes(), full_utt=True)
    decoder.end_utt()
    length = len(samples) / SAMPLE_RATE
    found = []
    for segment in decoder.seg() or []:
        word = segment.word.partition("(")[0]
        if word not in ("<s>", "</s>", "<sil>", "(NULL)", "") and not word.startswith(("[", "+")):
            start, end = segment.start_frame / 100 - PAUSE, (segment.end_frame + 1) / 100 - PAUSE
            found.append((word, min(max(start, 0.0), length), min(max(end, 0.0), length)))
    if [word for word, _, _ in found] != words:
        return None
    return [(start, end) for _, start, end in found]


def pooled(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """The voice that each speaker counts as: himself, or a pool of several who said little."""
    digits, alone = defaultdict(int), {}
    for row in rows:
        digits[row["source"], row["speaker"]] += row["kind"] in ("isolated", "string")
    few: dict[str, int] = defaultdict(int)
    for (source, speaker), count in sorted(digits.items()):
        if count >= DIGITS_OF_A_SPEAKER:
            alone[speaker] = speaker
        else:
            alone[speaker] = f"{source}-pool-{few[source] // POOL:03d}"
            few[source] += 1
    return alone


def write_clips(rows: list[dict[str, str]], folder: Path) -> None:
    """Write ``train-real-NUMBER.wav`` and ``.json``, as synthesise.py does."""
    for old in folder.glob("train-real-*"):
        old.unlink()
    voices, unaligned = pooled(rows), 0
    for number, row in enumerate(rows):
        samples = read(row["path"])
        words = row["text"].split() if row["kind"] in ("isolated", "string") else []
        times = word_times(samples, words) if len(words) > 1 else None
        unaligned += len(words) > 1 and times is None
        path = folder / f"train-real-{number:06d}.wav"
        soundfile.write(path, samples, SAMPLE_RATE)
        clip = {"text": " ".join(words), "voice": voices[row["speaker"]], "words": times}
        path.with_suffix(".json").write_text(json.dumps(clip | {"source": row["source"], "kind": row["kind"]}))
    print(f"{folder}: {len(rows)} clips to train on, {unaligned} strings without times of words")


def write_test_sets(rows: list[dict[str, str]], folder: Path) -> None:
    """Single digits, strings as they were said, strings joined of one speaker's digits, other words."""
    singles = defaultdict(list)
    for name, kind in (("aside-single", "isolated"), ("aside-strings", "string"), ("aside-other", "negative")):
        path, lines = new_folder(folder / name), []
        for number, row in enumerate(row for row in rows if row["kind"] == kind):
            samples = read(row["path"])
            file = f"{number:04d}.wav"
            soundfile.write(path / file, samples, SAMPLE_RATE)
            lines.append((file, row["text"] if kind != "negative" else "", row["speaker"]))
            if kind == "isolated":
                singles[row["speaker"]].append((samples, row["text"]))
        write_transcripts(path, lines)
    rng, lines = random.Random(0), []
    path = new_folder(folder / "aside-joined")
    for speaker, clips in sorted(singles.items()):
        for number in range(min(len(clips) // 3, 6)):
            chosen = rng.sample(clips, rng.randint(3, min(len(clips), 8)))
            pieces = []
            for samples, _ in chosen:
                pieces += [samples, np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE), np.int16)]
            file = f"{speaker}-{number}.wav"
            soundfile.write(path / file, np.concatenate(pieces[:-1]), SAMPLE_RATE)
            lines.append((file, " ".join(word for _, word in chosen), speaker))
    write_transcripts(path, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--clips", type=Path, default=Path("data"), help="folder for the clips to train on")
    parser.add_argument("--output", type=Path, default=Path("data/test"), help="folder for the sets to measure on")
    args = parser.parse_args()
    rows = read_manifests(args.recordings)
    aside = set_aside(rows)
    args.clips.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    write_clips([row for row in rows if row["speaker"] not in aside], args.clips)
    write_test_sets([row for row in rows if row["speaker"] in aside], args.output)


if __name__ == "__main__":
    main()
