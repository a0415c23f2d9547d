"""Requests that nobody should send: mutated files of every format, and what only looks like one."""

import base64
import random
import re
import struct
from collections.abc import Iterator

import numpy as np
import torch
import torchaudio
from conftest import encode
from making import film, id3, nist, riff, with_edits

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
    **{name: ("mp3", 44_100) for name in ("avi", "asf", "mpegts", "flv")},
    **{"mpeg": ("mp2", 44_100), "wtv": ("mp2", 44_100), "nut": ("aac", 44_100), "latm": ("aac", 44_100)},
    **{"ac3": ("ac3", 48_000), "eac3": ("eac3", 48_000), "spdif": ("ac3", 48_000), "rm": ("ac3", 44_100)},
    **{"wv": ("wavpack", 16_000), "tta": ("tta", 16_000), "amr": ("libopencore_amrnb", 8_000), "3gp": ("aac", 16_000)},
    **{name: ("pcm_s16le", 16_000) for name in ("voc", "ircam")},
    **{name: ("pcm_s16le", 48_000) for name in ("gxf", "mxf_opatom")},
}
BOXES = rb"elst|mvhd|mdhd|tkhd|trak|edts|mvex|data|fmt |ds64|LIST|OggS|ID3"
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
    files = {
        container: encode(
            torchaudio.functional.resample(speech, 16_000, rate)[None].numpy(),
            rate,
            container,
            codec,
            "s16" if codec == "flac" else None,
        )
        for container, (codec, rate) in FORMATS.items()
    }
    tracks = [speech, torch.zeros_like(speech), speech]
    edited = with_edits(film("mp4", "mpeg4", "aac", tracks[:1]), (0.5, 1.0), (None, 0.2), (0.0, 9.0), (1.0, 0.5))
    fragmented = encode(speech[None].numpy(), 16_000, "mp4", "aac", movflags="frag_keyframe+empty_moov+delay_moov")
    odd = b"LIST" + struct.pack("<I", 5) + b"abcde"
    samples = (speech * 32_767).to(torch.int16).numpy()
    return files | {
        "tracks in mp4": film("mp4", "mpeg4", "aac", tracks, 1),
        "tracks in ts": film("mpegts", None, "ac3", tracks),
        "tracks in mkv": film("matroska", None, "aac", tracks, None),
        **{"edited": edited, "pieces": fragmented, "tag": id3(3000) + files["flac"]},
        **{"rifx": riff(samples, b"RIFX"), "odd": riff(samples, before=odd, between=odd), "nist": nist(samples)},
        "rf64": riff(samples, b"RF64", before=struct.pack("<4sIQQQI", b"ds64", 28, 0, 0, 0, 0), sizes=(2**32 - 1, 0)),
        "phases": encode(torch.stack([speech, -speech]).numpy(), 16_000, "wav", "pcm_s16le"),
        "chained": files["ogg"] + encode(speech[None].repeat(2, 1).numpy(), 48_000, "ogg", "libopus"),
    }


def silence_bomb(seconds: int) -> bytes:
    """A small file that unpacks to ``seconds`` of silence."""
    return encode(np.zeros((1, 8_000 * seconds), np.float32), 8_000, "flac", "flac", "s16")


def mutated(files: dict[str, bytes], rng: random.Random) -> bytes:
    names = sorted(files)
    file = bytearray(files[rng.choice(names)])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind, place = rng.randrange(11), rng.randrange(len(file) + 1)
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
        elif kind == 7:  # another file behind it, whole or cut, once or often
            other = files[rng.choice(names)]
            times = rng.choice([1, 1, 3, 1000 if len(other) < 9000 else 9])
            file += other[: rng.choice([20, 2000, len(other)])] * times
        elif kind == 8 and (boxes := list(re.finditer(BOXES, file))):  # a box's or chunk's numbers
            begin = max(rng.choice(boxes).start() + rng.choice([-4, 4, 8, 12, 16, 20]), 0)
            size = rng.choice([1, 4, 12, 24])
            file[begin : begin + size] = rng.choice([b"\xff", b"\x00", b"\x7f", rng.randbytes(1)]) * size
        elif kind == 9 and b"elst" in file:  # an edit list of thousands
            begin = file.index(b"elst") + 12
            file[begin - 4 : begin] = struct.pack(">I", rng.choice([2, 1000, 2**32 - 1]))
            file[begin:begin] = rng.randbytes(12) * rng.choice([1, 100, 20_000])
        else:
            file[place : place + rng.choice([10, 1000])] = bytes(rng.choice([10, 1000]))
        if not file:
            return b""
    return bytes(file)


NAMES = ["data", "instances", "body", "inputs", "b64", "audio", "sound"]


def deep(rng: random.Random) -> object:
    value: object = rng.choice([1, None, "x", [], {}, True, 1e308])
    for _ in range(rng.choice([1, 10, 200])):
        value = [value] * rng.choice([1, 1, 1, 2]) if rng.random() < 0.5 else {rng.choice(NAMES): value}
        value = value if len(str(value)) < 100_000 else 1
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
            inside = {rng.choice(NAMES): content}
            inside = rng.choice(
                [inside, {"inputs": [{"name": "x", "data": [content]}]}, "data:a/b;c=d;base64," + content]
            )
            content = rng.choice([inside, {"instances": [inside] * rng.randint(0, 3)}])
    else:
        content = deep(rng)
    fields = {rng.choice(["body", "data", "file", "audio", "x", "response_format", "\n[METRICS]x"]): content}
    if rng.random() < 0.2:
        fields["response_format"] = rng.choice(["json", "verbose_json", "srt", "vtt", "", "pdf", b"\xff\n", None, 7])
    if rng.random() < 0.1:
        fields["audio_track"] = rng.choice(["1", "2", b"3", 2, "0", "x", b"\xff", None, [1], "9" * 5000])
    if rng.random() < 0.1:
        texts = ["one,two:3", b"one\n:", ["one:-1", "two"], {"oh": 10**999, "two": []}, [[]], ",:" * 5000, "\xff: nan"]
        fields["hotwords"] = rng.choice(texts)
    if rng.random() < 0.05:
        fields["y"] = mutated(files, rng)
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
    length = rng.choice(["0", "100000000", "-1", "x", "9" * 5000])
    more = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": length} if rng.random() < 0.1 else {}
    return {
        rng.choice(["Accept", "accept", "X-Audio-Track", "X-Hotwords", "X-Other"]): rng.choice([value, "1", "2"])
    } | more


def requests_of(speech: torch.Tensor, count: int, seed: int) -> Iterator[tuple[dict, dict]]:
    """``count`` pairs of fields and headers, the same for a seed."""
    rng, files, bomb = random.Random(seed), files_of(speech), silence_bomb(90)
    for _ in range(count):
        yield request(files, bomb, rng), headers(rng)
