"""Synthesise ``sample_audio/``: spoken digits in held-out voices, and one English sentence.

    python samples.py --engines DIR --output ../sample_audio

Each file is of another kind, so that together they show what the server takes.
"""

import argparse
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio
from synthesise import AMERICAN, BRITISH, KOKORO_RATE, kokoro

CARD_NUMBER = "three oh oh nine, zero nine nine six, zero three zero eight, two four six two"
# file, voice, speed, sample rate, channels, codec, text; a comma is a pause.
DIGITS = [
    ("three-digits.wav", "am_michael", 0.95, 16_000, 1, "pcm_s16le", "four seven two"),
    ("phone-number.flac", "ef_dora", 0.9, 44_100, 2, "flac", "two zero zero, three three two, two four five three"),
    ("zero-to-nine.mp3", "af_sarah", 0.9, 22_050, 1, "mp3", "zero one two three four five six seven eight nine"),
    ("telephone.wav", "bm_lewis", 0.9, 8_000, 1, "pcm_mulaw", "five two six, zero one eight, one five"),
    ("card-number.m4a", "af_sarah", 0.85, 48_000, 2, "aac", CARD_NUMBER),
    ("pin.webm", "af_sarah", 0.95, 48_000, 1, "libopus", "seven three zero two"),
    ("room-number.ogg", "bf_emma", 0.95, 48_000, 1, "libopus", "five seven five eight nine"),
]
SENTENCE = "the quick brown fox jumps over the lazy dog while seven old wizards watch from the garden wall"
SENTENCE_PHONEMES = (
    "ðə kwˈɪk bɹˈWn fˈɑks ʤˈʌmps ˌOvəɹ ðə lˈAzi dˈɔɡ, wˌIl sˈɛvən ˈOld wˈɪzəɹdz wˈɑʧ fɹʌm ðə ɡˈɑɹdᵊn wˈɔl."
)


def speak(engines: Path, phonemes: str, voice: str, speed: float) -> np.ndarray:
    """Speak ``phonemes`` with one of Kokoro's voices; returns 24 kHz float32."""
    session, symbols, voices = kokoro(engines)
    tokens = [symbols[symbol] for symbol in phonemes]
    inputs = {
        "tokens": np.array([[0, *tokens, 0]]),
        "style": voices[voice][len(tokens) - 1][None],
        "speed": np.array([speed], np.float32),
    }
    return session.run(None, inputs)[0].reshape(-1)


def write(path: Path, samples: np.ndarray, rate: int, channels: int, codec: str) -> None:
    """Encode 24 kHz samples as ``codec`` in the container of the path's suffix."""
    wave = torchaudio.functional.resample(torch.from_numpy(samples), KOKORO_RATE, rate)
    if codec == "pcm_mulaw":  # a telephone line passes 300 to 3400 Hz
        wave = torchaudio.functional.highpass_biquad(wave, rate, 300.0)
        wave = torchaudio.functional.lowpass_biquad(wave, rate, 3400.0)
    wave = 0.5 * wave / wave.abs().max()
    sides = torch.stack([wave * gain for gain in ([1.0] if channels == 1 else [1.0, 0.6])])  # the speaker sits left
    frame = av.AudioFrame.from_ndarray(sides.numpy(), format="fltp", layout="mono" if channels == 1 else "stereo")
    frame.rate = rate
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, layout=frame.layout.name)
        for part in (frame, None):
            container.mux(stream.encode(part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, help="folder with kokoro.onnx, vocab.json and voices/")
    parser.add_argument("--output", type=Path, default=Path("../sample_audio"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = ["file\ttext\tmodel"]
    for name, voice, speed, rate, channels, codec, text in DIGITS:
        words = BRITISH if voice.startswith("b") else AMERICAN
        phonemes = ", ".join(" ".join(words[word] for word in group.split()) for group in text.split(","))
        write(args.output / name, speak(args.engines, phonemes, voice, speed), rate, channels, codec)
        rows.append(f"{name}\t{text.replace(',', '')}\tdigits")
    sentence = speak(args.engines, SENTENCE_PHONEMES, "bf_emma", 0.95)
    write(args.output / "sentence.wav", sentence, 16_000, 1, "pcm_s16le")
    rows.append(f"sentence.wav\t{SENTENCE}\tlibrispeech")
    (args.output / "transcripts.tsv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
