"""Make the folders that evaluate.py measures, each with its transcripts.tsv, from held-out clips and recordings.

    python testsets.py --clips data --output data/test
    python testsets.py --clips data --output data/test --recordings RECORDINGS

    python testsets.py --clips data --output data/test --guard ../tests/held_out

RECORDINGS holds single digits of real speakers, named DIGIT_SPEAKER_TAKE.wav as in the Free Spoken Digit Dataset.
The guard is a small compressed part of the held-out sets, which the project's tests use.
"""

import argparse
import json
import random
import shutil
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torchaudio
from evaluate import read_transcripts

SAMPLE_RATE = 16_000
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MINUTE = 60 * SAMPLE_RATE


def write_transcripts(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    lines = ["file\ttext\tspeaker", *("\t".join(row) for row in rows)]
    (folder / "transcripts.tsv").write_text("\n".join(lines) + "\n")
    print(f"{folder}: {len(rows)} files")


def new_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def coloured_noise(length: int, slope: float, generator: np.random.Generator) -> np.ndarray:
    """Unit-power noise whose power falls by ``slope`` times 3 dB an octave: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(generator.standard_normal(length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20 * length / SAMPLE_RATE) ** (slope / 2)
    wave = np.fft.irfft(spectrum, length)
    return wave / wave.std()


def heldout(clips: Path, output: Path) -> None:
    """The held-out voices: clean, with white and pink noise at 10 dB, and through a telephone line."""
    generator = np.random.default_rng(0)
    folders = [new_folder(output / f"heldout-{name}") for name in ("clean", "noise-10db", "telephone")]
    rows = []
    for number, path in enumerate(sorted(clips.glob("heldout-*.json"))):
        clip = json.loads(path.read_text())
        name = path.with_suffix(".wav").name
        wave, _ = soundfile.read(path.with_suffix(".wav"))
        wave = 0.5 * wave / np.abs(wave).max()
        noise = coloured_noise(len(wave), number % 2, generator) * wave.std() * 10 ** (-10 / 20)
        line = torchaudio.functional.resample(torch.from_numpy(wave), SAMPLE_RATE, 8_000)
        line = torchaudio.functional.highpass_biquad(line, 8_000, 300.0)
        line = torchaudio.functional.lowpass_biquad(line, 8_000, 3400.0)
        soundfile.write(folders[0] / name, wave, SAMPLE_RATE)
        soundfile.write(folders[1] / name, (wave + noise).clip(-1, 1), SAMPLE_RATE)
        soundfile.write(folders[2] / name, line.clamp(-1, 1).numpy(), 8_000, subtype="ULAW")
        rows.append((name, clip["text"], clip["voice"]))
    for folder in folders:
        write_transcripts(folder, rows)


def other_speech(clips: Path, output: Path) -> None:
    folder, rows = new_folder(output / "other-speech"), []
    for path in sorted(clips.glob("other-*.json")):
        shutil.copy(path.with_suffix(".wav"), folder)
        rows.append((path.with_suffix(".wav").name, "", json.loads(path.read_text())["voice"]))
    write_transcripts(folder, rows)


def quiet(output: Path) -> None:
    """A minute each of what is no speech: silence, three noises, tones, breath."""
    folder, generator, rng = new_folder(output / "quiet"), np.random.default_rng(1), random.Random(1)
    sounds = {"silence": np.zeros(MINUTE)}
    for slope, name in enumerate(("white", "pink", "brown")):
        sounds[name] = 0.05 * coloured_noise(MINUTE, slope, generator)
    time = np.arange(MINUTE) / SAMPLE_RATE
    tones = np.zeros(MINUTE)
    for start in range(0, MINUTE, SAMPLE_RATE // 4):  # four notes a second over a bass, decaying, with overtones
        note = slice(start, start + SAMPLE_RATE // 2)
        decay = np.exp(-4 * (time[note] - time[start]))
        for pitch in (220 * 2 ** (rng.choice([0, 2, 4, 7, 9, 12]) / 12), 110 * 2 ** (rng.choice([0, 5, 7]) / 12)):
            for overtone in (1, 2, 3, 4):
                tones[note] += decay * np.sin(2 * np.pi * pitch * overtone * time[note]) / overtone**1.5
    sounds["tones"] = 0.3 * tones / np.abs(tones).max()
    breath = coloured_noise(MINUTE, 1, generator)
    spectrum = np.fft.rfft(breath)
    frequency = np.fft.rfftfreq(MINUTE, 1 / SAMPLE_RATE)
    for formant in (600, 1600, 2700):
        spectrum *= 1 + 4 * np.exp(-(((frequency - formant) / 300) ** 2))
    breath = np.fft.irfft(spectrum, MINUTE)
    cycle = time % 4  # in for 1.4 s, a rest, out for 1.6 s, a rest
    swell = np.where(cycle < 1.4, np.sin(np.pi * cycle / 1.4), 0.0)
    swell += np.where((cycle > 1.8) & (cycle < 3.4), 0.7 * np.sin(np.pi * (cycle - 1.8) / 1.6), 0.0)
    sounds["breath"] = 0.1 * breath / breath.std() * swell + 0.0005 * generator.standard_normal(MINUTE)
    for name, wave in sounds.items():
        soundfile.write(folder / f"{name}.wav", wave.clip(-1, 1), SAMPLE_RATE)
    write_transcripts(folder, [(f"{name}.wav", "", name) for name in sounds])


def real(recordings: Path, output: Path, strings: int) -> None:
    """Single digits as they were recorded, and joined to strings of 3 to 8 with gaps of 50 to 250 ms."""
    rng, rows, speakers = random.Random(0), [], defaultdict(list)
    folder = new_folder(output / "real-isolated")
    for path in sorted(recordings.rglob("?_*_*.wav")):
        digit, speaker, _ = path.stem.split("_")
        shutil.copy(path, folder)
        rows.append((path.name, WORDS[int(digit)], speaker))
        speakers[speaker].append(path)
    write_transcripts(folder, rows)
    folder, rows = new_folder(output / "real-joined"), []
    for number in range(strings):
        speaker = sorted(speakers)[number % len(speakers)]
        pieces, words = [], []
        for path in rng.sample(speakers[speaker], rng.randint(3, 8)):
            wave, rate = soundfile.read(path)
            pieces += [wave, np.zeros(int(rng.uniform(0.05, 0.25) * rate))]
            words.append(WORDS[int(path.name[0])])
        name = f"{number:04d}.wav"
        soundfile.write(folder / name, np.concatenate(pieces[:-1]), rate)
        rows.append((name, " ".join(words), speaker))
    write_transcripts(folder, rows)


def guard(output: Path, folder: Path, count: int) -> None:
    """``count`` of the held-out clips as Opus, by turns clean, in noise and through the telephone."""
    names, rows = ("clean", "noise-10db", "telephone"), []
    clips = [row for row in read_transcripts(output / "heldout-clean") if row["speaker"] != "joe"]
    new_folder(folder)
    for number, row in enumerate(clips[:: max(len(clips) // count, 1)][:count]):
        condition = names[number % 3]
        wave, rate = soundfile.read(output / f"heldout-{condition}" / row["file"], dtype="float32")
        name = f"{number:02d}-{condition}.ogg"
        encode(folder / name, wave, rate)
        rows.append((name, row["text"], row["speaker"]))
    write_transcripts(folder, rows)


def encode(path: Path, wave: np.ndarray, rate: int) -> None:
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.rate = rate
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono", options={"b": "24000"})
        for part in (frame, None):
            container.mux(stream.encode(part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("data"), help="folder that synthesise.py wrote")
    parser.add_argument("--output", type=Path, default=Path("data/test"))
    parser.add_argument("--recordings", type=Path, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--strings", type=int, default=300, help="joined strings to make of the recordings")
    parser.add_argument("--guard", type=Path, help="folder to write a small compressed set to")
    args = parser.parse_args()
    heldout(args.clips, args.output)
    other_speech(args.clips, args.output)
    quiet(args.output)
    if args.recordings:
        real(args.recordings, args.output, args.strings)
    if args.guard:
        guard(args.output, args.guard, 60)


if __name__ == "__main__":
    main()
