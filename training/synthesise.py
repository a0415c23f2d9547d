"""Synthesise the spoken-digit clips that the digits model is trained on.

Three engines speak random digit strings: Kokoro-82M (its 54 voices, and convex mixtures of them for
training), espeak-ng and flite. Six whole voices are held out for testing. Every clip is made from its
own seed, so the set is the same on every machine, and a stopped run goes on where it stopped.

    python synthesise.py --engines DIR --output data --jobs 2

See training/README.md for what DIR must hold.
"""

import argparse
import functools
import io
import json
import random
import subprocess
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
import torch
import torchaudio

SAMPLE_RATE = 16_000
KOKORO_RATE = 24_000

# The vocabulary, with each word in Kokoro's phoneme alphabet (capital letters are diphthongs).
AMERICAN = {
    "zero": "zˈɪɹO",
    "one": "wˈʌn",
    "two": "tˈu",
    "three": "θɹˈi",
    "four": "fˈɔɹ",
    "five": "fˈIv",
    "six": "sˈɪks",
    "seven": "sˈɛvən",
    "eight": "ˈAt",
    "nine": "nˈIn",
    "oh": "ˈO",
}
BRITISH = AMERICAN | {"zero": "zˈɪəɹQ", "two": "tˈuː", "three": "θɹˈiː", "four": "fˈɔː", "oh": "ˈQ"}
WORDS = list(AMERICAN)

# What speakers of other languages put in the place of an English sound.
ACCENTS = {
    "θ": ["s", "t", "f"],
    "z": ["s"],
    "v": ["f", "w"],
    "w": ["v"],
    "ɹ": ["ɾ", "ʁ"],
    "O": ["o", "ɔ"],
    "A": ["e", "ɛ"],
    "I": ["a", "aj"],
    "ɪ": ["i"],
    "ʌ": ["a"],
    "ən": ["en"],
}

HELD_OUT = ["af_sarah", "am_michael", "bf_emma", "bm_lewis", "ef_dora", "flite-rms"]
ESPEAK_LANGUAGES = [
    *["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"],
    *["en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd"],
]
ESPEAK_VARIANTS = ["", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+f5"]


# From this training clip on, every second word is the one before it: a transducer is slow to learn that.
FIRST_REPEATING_CLIP = 3900


def random_words(index: int, split: str, rng: random.Random) -> list[str]:
    """The text of a clip: one word in a quarter of them, else two to six."""
    words = rng.choices(WORDS, k=1 if rng.random() < 0.25 else rng.randint(2, 6))
    if split == "train" and index >= FIRST_REPEATING_CLIP:
        for i in range(1, len(words)):
            words[i] = words[i - 1] if rng.random() < 0.5 else words[i]
        words += words[-1:]
    return words


@functools.cache
def kokoro(engines: Path) -> tuple[onnxruntime.InferenceSession, dict[str, int], dict[str, np.ndarray]]:
    """Load Kokoro: the session, its symbol table and its voices, each of shape (510, 256)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(engines / "kokoro.onnx", options, providers=["CPUExecutionProvider"])
    symbols = json.loads((engines / "vocab.json").read_text())["vocab"]
    voices = {
        path.stem: np.fromfile(path, "<f4").reshape(-1, 256) for path in sorted((engines / "voices").glob("*.bin"))
    }
    return session, symbols, voices


def mixed_style(voices: dict[str, np.ndarray], names: list[str], row: int, rng: random.Random) -> np.ndarray:
    """A voice that nobody has: timbre (first half) and prosody (second half) from two random mixtures."""
    halves = []
    for half in (slice(0, 128), slice(128, 256)):
        chosen = rng.sample(names, rng.randint(1, 3))
        weights = np.array([rng.random() + 0.1 for _ in chosen], np.float32)
        halves.append(sum(w * voices[name][row, half] for w, name in zip(weights / weights.sum(), chosen, strict=True)))
    return np.concatenate(halves)


def speak_kokoro(engines: Path, words: list[str], voice: str, rng: random.Random) -> np.ndarray:
    """Speak ``words`` with one of Kokoro's voices, or ``mix`` for a new one; returns 24 kHz float32."""
    session, symbols, voices = kokoro(engines)
    spoken = [(BRITISH if voice.startswith("b") else AMERICAN)[word] for word in words]
    if voice not in HELD_OUT and rng.random() < 0.35:
        chance = rng.uniform(0.1, 0.6)
        for sound, others in ACCENTS.items():
            if rng.random() < chance:
                other = rng.choice(others)
                spoken = [word.replace(sound, other) for word in spoken]
    separator = rng.choice([" ", " ", " ", ", ", ". "])
    tokens = [symbols[symbol] for symbol in separator.join(spoken)]
    row = len(tokens) - 1
    if voice == "mix":
        style = mixed_style(voices, [name for name in voices if name not in HELD_OUT], row, rng)
    else:
        style = voices[voice][row]
    speed = rng.uniform(0.75, 1.5)
    inputs = {
        "tokens": np.array([[0, *tokens, 0]]),
        "style": style[None],
        "speed": np.array([speed], np.float32),
    }
    return session.run(None, inputs)[0].reshape(-1)


def speak_command(words: list[str], voice: str, rng: random.Random) -> tuple[np.ndarray, int]:
    """Speak ``words`` with flite or espeak-ng; returns the samples and their rate."""
    text = rng.choice([" ", " ", ", "]).join(words)
    engine, _, name = voice.partition("-")
    if engine == "flite":
        stretch = f"duration_stretch={rng.uniform(0.65, 1.2):.2f}"
        command = ["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", "/dev/stdout"]
    else:
        speed, pitch = str(rng.randint(110, 260)), str(rng.randint(20, 80))
        command = ["espeak-ng", "-v", name, "-s", speed, "-p", pitch, "--stdout", text]
    audio = subprocess.run(command, check=True, capture_output=True).stdout
    return soundfile.read(io.BytesIO(audio), dtype="float32")


def pick_voice(index: int, split: str, engines: Path, rng: random.Random) -> str:
    """The voice of clip ``index``: held-out voices in turn, or for training mostly Kokoro's."""
    if split == "heldout":
        return HELD_OUT[index % len(HELD_OUT)]
    kind = rng.random()
    if kind < 0.35:
        return rng.choice([name for name in kokoro(engines)[2] if name not in HELD_OUT])
    if kind < 0.70:
        return "mix"
    if kind < 0.85:
        return "espeak-" + rng.choice(ESPEAK_LANGUAGES) + rng.choice(ESPEAK_VARIANTS)
    return "flite-" + rng.choice(["awb", "slt", "kal16"])


def make_clip(job: tuple[int, str, Path, Path]) -> None:
    """Write clip ``index`` of ``split`` as ``SPLIT-INDEX.wav`` with its text and voice beside it."""
    index, split, engines, output = job
    path = output / f"{split}-{index:06d}.wav"
    if path.with_suffix(".json").exists():
        return
    rng = random.Random(f"{split}-{index}")
    words = random_words(index, split, rng)
    voice = pick_voice(index, split, engines, rng)
    if voice.startswith(("flite-", "espeak-")):
        samples, rate = speak_command(words, voice, rng)
    else:
        samples, rate = speak_kokoro(engines, words, voice, rng), KOKORO_RATE
    resampled = torchaudio.functional.resample(torch.from_numpy(samples), rate, SAMPLE_RATE)
    soundfile.write(path, resampled.clamp(-1, 1).numpy(), SAMPLE_RATE)
    path.with_suffix(".json").write_text(json.dumps({"text": " ".join(words), "voice": voice}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, help="folder with kokoro.onnx, vocab.json and voices/")
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--train-clips", type=int, default=4600)
    parser.add_argument("--heldout-clips", type=int, default=180)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    jobs = [(i, "heldout", args.engines, args.output) for i in range(args.heldout_clips)]
    jobs += [(i, "train", args.engines, args.output) for i in range(args.train_clips)]
    torch.set_num_threads(1)
    with Pool(args.jobs) as pool:
        for done, _ in enumerate(pool.imap_unordered(make_clip, jobs, chunksize=4), start=1):
            if done % 100 == 0:
                print(f"{done} of {len(jobs)} clips", flush=True)


if __name__ == "__main__":
    main()
