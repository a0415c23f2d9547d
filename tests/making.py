"""Files that FFmpeg's encoders do not make by themselves: films, edit lists, WAV's relatives, tags, old formats."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import torch
import torchaudio
from av.stream import Disposition

RATE = 16_000


def at(samples: torch.Tensor, rate: int, channels: int = 1) -> np.ndarray:
    """(channels, samples) of 16 kHz ``samples`` at ``rate``."""
    return torchaudio.functional.resample(samples, RATE, rate)[None].numpy().repeat(channels, axis=0)


def film(
    container: str,
    picture: str | None,
    codec: str,
    sounds: list[torch.Tensor],
    default: int | None = 0,
    rate: int = 48_000,
    aside: tuple[int, ...] = (),
) -> bytes:
    """A film (without ``picture`` only its sound) with a track of each of ``sounds``; those ``aside`` are comments."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        if picture:
            pictures = output.add_stream(picture, rate=25)
            pictures.width = pictures.height = 64
            pictures.pix_fmt = "yuv420p"
        tracks = [output.add_stream(codec, rate=rate, layout="mono") for _ in sounds]
        for number, track in enumerate(tracks):
            track.disposition = Disposition.default if number == default else Disposition(0)
            if number in aside:
                track.disposition = Disposition.comment
            if codec.startswith("wma"):
                track.bit_rate = 96_000
        if picture:
            for part in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24"), None):
                output.mux(pictures.encode(part))
        for track, sound in zip(tracks, sounds, strict=True):
            frame = av.AudioFrame.from_ndarray(at(sound, rate), format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            for part in (frame, None):
                output.mux(track.encode(part))
    return file.getvalue()


def with_edits(file: bytes, *edits: tuple[float | None, float], wide: bool = False, flags: int = 0) -> bytes:
    """An MP4 with its index at the end, whose sound is played in these pieces: start (None: silence) and length."""
    sound = file.index(b"soun")
    media, movie = file.rindex(b"mdhd", 0, sound), file.index(b"mvhd")
    scale, unit = (struct.unpack(">I", file[place + 16 : place + 20])[0] for place in (movie, media))
    form = ">QqI" if wide else ">IiI"
    entries = [
        struct.pack(form, round(length * scale), -1 if start is None else round(start * unit), 1 << 16)
        for start, length in edits
    ]
    head = struct.pack(">II", wide << 24 | flags, len(edits))
    body = struct.pack(">I", 16 + sum(map(len, entries))) + b"elst" + head + b"".join(entries)
    old = file.rindex(b"elst", 0, sound) - 4
    end = old + struct.unpack(">I", file[old : old + 4])[0]
    changed = bytearray(file)
    for box in (b"moov", b"trak", b"edts"):
        place = file.rindex(box, 0, sound) - 4
        size = struct.unpack(">I", file[place : place + 4])[0] + len(body) - (end - old)
        changed[place : place + 4] = struct.pack(">I", size)
    changed[old:end] = body
    return bytes(changed)


def riff(
    samples: np.ndarray,
    name: bytes = b"RIFF",
    before: bytes = b"",
    between: bytes = b"",
    sizes: tuple[int | None, int | None] = (None, None),
    form: tuple[int, int, int, int] = (1, 1, RATE, 2),
    extensible: bool = False,
) -> bytes:
    """A WAV file or a relative: ``form`` is encoding, channels, rate and bytes of a sample; sizes of file and data."""
    order = ">" if name == b"RIFX" else "<"
    encoding, channels, rate, width = form
    header = (channels, rate, rate * channels * width, channels * width, 8 * width)
    head = struct.pack(order + "HHIIHH", 0xFFFE if extensible else encoding, *header)
    if extensible:
        head += struct.pack(order + "HHIIHH", 22, 8 * width, 4, encoding, 0, 0x10) + b"\x80\0\0\xaa\0\x38\x9b\x71"
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    body = b"WAVE" + before + b"fmt " + struct.pack(order + "I", len(head)) + head + between + b"data"
    size = len(body) + 4 + len(data) if sizes[0] is None else sizes[0]
    return (
        name
        + struct.pack(order + "I", size)
        + body
        + struct.pack(order + "I", len(data) if sizes[1] is None else sizes[1])
        + data
    )


def id3(size: int, version: int = 3, footer: bool = False) -> bytes:
    """A tag with a picture of ``size`` zeros."""
    frame = b"APIC" + struct.pack(">I", size + 14) + b"\0\0" + b"\0image/png\0\x03\0" + b"\0" + bytes(size)
    length = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    tag = bytes([version, 0, 16 * footer]) + length
    return b"ID3" + tag + frame + (b"3DI" + tag if footer else b"")


def nist(samples: np.ndarray) -> bytes:
    head = f"NIST_1A\n   1024\nchannel_count -i 1\nsample_rate -i {RATE}\nsample_n_bytes -i 2\nsample_sig_bits -i 16\n"
    head += f"sample_count -i {len(samples)}\nsample_byte_format -s2 01\nsample_coding -s3 pcm\nend_head\n"
    return head.ljust(1024).encode() + samples.astype("<i2").tobytes()


def eight_svx(samples: np.ndarray) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack(">I", len(content)) + content + bytes(len(content) % 2)

    head = chunk(b"VHDR", struct.pack(">IIIHBBI", len(samples), 0, 0, RATE, 1, 0, 1 << 16))
    return chunk(b"FORM", b"8SVX" + head + chunk(b"BODY", (samples >> 8).astype("i1").tobytes()))
