"""Requests that nobody should send: mutated files of every format, and what only looks like one."""

import base64
import random
from collections.abc import Iterator

import numpy as np
import torch
import torchaudio
from conftest import encode

FORMATS = {  # container: codec, sample rate
    "wav": ("pcm_s16le", 16_000),
    "w64": ("pcm_s16le", 16_000),
    "flac": ("flac", 16_000),
    "mp3": ("mp3", 16_000),
    "ogg": ("libopus", 48_000),
    "webm": ("libopus", 48_000),
    "adts": ("aac", 16_000),
    "mp4": ("aac", 16_000),
    "mov": ("aac", 44_100),
    "matroska": ("aac", 16_000),
    "aiff": ("pcm_s16be", 16_000),
    "au": ("pcm_s16be", 16_000),
    "caf": ("pcm_s16le", 16_000),
}
TEXTS = [
    "#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n",
    "ffconcat version 1.0\nfile /etc/hostname\n",
    "[playlist]\nFile1=http://127.0.0.1:9/\n",
    "1\n00:00:00,000 --> 00:00:01,000\n[METRICS]evil.Count:1|#Level:Host\n",
    "<?xml version='1.0'?><smil><audio src='http://127.0.0.1:9/'/></smil>",
    "data:audio/wav;base64,",
    "\n[METRICS]evil.Count:1|#Level:Host|#hostname:x,1\n",
    "\x00" * 5000,
    "%s%n" * 50,
]


def files_of(speech: torch.Tensor) -> dict[str, bytes]:
    """The same speech, (samples,) at 16 kHz, in every format."""
    return {
        container: encode(
            torchaudio.functional.resample(speech, 16_000, rate)[None].numpy(),
            rate,
            container,
            codec,
            "s16" if codec == "flac" else None,
        )
        for container, (codec, rate) in FORMATS.items()
    }


def silence_bomb(seconds: int) -> bytes:
    """A small file that unpacks to ``seconds`` of silence."""
    return encode(np.zeros((1, 8_000 * seconds), np.float32), 8_000, "flac", "flac", "s16")


def mutated(files: dict[str, bytes], rng: random.Random) -> bytes:
    names = sorted(files)
    file = bytearray(files[rng.choice(names)])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind, place = rng.randrange(8), rng.randrange(len(file) + 1)
        if kind == 0:  # flipped bits anywhere
            for _ in range(rng.choice([1, 5, 50, 500])):
                file[rng.randrange(len(file))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # flipped bits where the header is
            for _ in range(rng.choice([1, 3, 10])):
                file[rng.randrange(min(len(file), 120))] ^= 1 << rng.randrange(8)
        elif kind == 2:  # a number in the header becomes huge, or zero
            size = rng.choice([1, 2, 4, 8])
            begin = rng.randrange(min(len(file), 100))
            file[begin : begin + size] = rng.choice([b"\xff", b"\x00", b"\x7f"]) * size
        elif kind == 3 and place > 8:
            del file[place:]
        elif kind == 4 and place > 8:
            del file[rng.randrange(place) : place]
        elif kind == 5:  # another format's header
            other = files[rng.choice(names)]
            size = rng.choice([4, 16, 64, 300])
            file[:size] = other[:size]
        elif kind == 6:
            file[place:place] = rng.randbytes(rng.choice([1, 100, 4000]))
        else:
            file[place : place + rng.choice([10, 1000])] = bytes(rng.choice([10, 1000]))
        if not file:
            return b""
    return bytes(file)


def deep(rng: random.Random) -> object:
    value: object = rng.choice([1, None, "x", [], {}, True, 1e308])
    for _ in range(rng.choice([1, 10, 200])):
        value = [value] if rng.random() < 0.5 else {rng.choice(["data", "instances", "body"]): value}
    return value


def request(files: dict[str, bytes], bomb: bytes, rng: random.Random) -> dict:
    """One request as TorchServe would hand it to a worker."""
    kind = rng.random()
    if kind < 0.6:
        content: object = mutated(files, rng)
    elif kind < 0.65:
        content = rng.randbytes(rng.choice([0, 1, 2, 11, 100, 5000]))
    elif kind < 0.7:
        content = rng.choice(list(files.values()))[:16] + rng.randbytes(rng.choice([0, 100, 5000]))
    elif kind < 0.78:
        text = rng.choice(TEXTS)
        content = rng.choice([text, text.encode()])
    elif kind < 0.8:
        content = bomb
    elif kind < 0.9:
        content = base64.b64encode(mutated(files, rng)).decode()
        if rng.random() < 0.3:
            content = content[: rng.randrange(len(content) + 1)] + rng.choice(["", "=", "===", "\u00e9", "\x00", "@"])
        if rng.random() < 0.6:
            content = {"data": content}
            content = rng.choice([content, {"instances": [content] * rng.randint(0, 3)}])
    else:
        content = deep(rng)
    fields = {rng.choice(["body", "data", "file", "audio", "x", "response_format", "\n[METRICS]x"]): content}
    if rng.random() < 0.2:
        fields["response_format"] = rng.choice(["json", "verbose_json", "srt", "vtt", "", "pdf", b"\xff\n", None, 7])
    return fields


def headers(rng: random.Random) -> dict:
    if rng.random() < 0.6:
        return {}
    value = rng.choice(
        [
            *("*/*", "application/json", "text/vtt", "application/json; profile=verbose", "text/plain\n[METRICS]x", ""),
            *(";;;,,,", "q=1;q=2", "text/plain;q=1e999", "text/plain;q=-1", "text/plain;q=\u0661", "a/b," * 500),
        ]
    )
    return {rng.choice(["Accept", "accept", "X-Other"]): value}


def requests_of(speech: torch.Tensor, count: int, seed: int) -> Iterator[tuple[dict, dict]]:
    """``count`` pairs of fields and headers, the same for a seed."""
    rng, files, bomb = random.Random(seed), files_of(speech), silence_bomb(90)
    for _ in range(count):
        yield request(files, bomb, rng), headers(rng)
