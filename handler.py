"""TorchServe handler for torchaudio's Emformer RNN-T: audio bytes in, transcript out.

The archive needs this file and the TorchScript model that export_model.py wrote, nothing else. Every
request takes the same way, from top to bottom of this file:

    request -> bytes -> waveform (mono, 16 kHz) -> features (T, 80) -> tokens -> words -> answer

What needs the model is ``ModelHandler``; the functions before it make waveforms of requests, those after it answers of
tokens. Where they refuse, they raise what ``refusal`` makes. Settings: ``DEFAULTS``, and model-config.yaml's section
``handler``.
"""

import base64
import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import struct
import tempfile
import textwrap
import time
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path

import av
import torch
from av.stream import Disposition
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import PredictionException

logger = logging.getLogger(__name__)

DEFAULTS = {
    "beam_width": 1,  # hypotheses kept after each frame of the search
    "num_threads": 1,  # torch threads of this worker: more, in several workers, would fight for the cores
    "max_audio_seconds": 3600,  # longer audio is refused
    "max_engine_seconds": 900,  # what the engine has not heard by then is refused: others wait
    "window_segments": 96,  # segments of 160 ms that the encoder takes at once: fewer need less memory
    "hotwords": None,  # phrases that are expected where a request names none, see ``hotwords_of``
    "sha256": None,  # of the model file, as export_model.py prints it: any other file is refused
}
SHA256 = re.compile("[0-9a-f]{64}")
# A model file that holds a plain RNNTBeamSearch takes time and memory that grow with the square of the length.
MAX_AUDIO_SECONDS_WITHOUT_OUR_ENGINE = 120

# FFmpeg opens what these demuxers know and nothing else: no playlist that names other files, no device, no game.
DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dss,dts,dtshd,dv,eac3,flac,flv,gsm,gxf,iff,ircam,loas,matroska,mlp,mov,mp3,"
    "mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nut,ogg,oma,qcp,rm,shn,sox,spdif,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)
FFMPEG_OPTIONS = {
    "format_whitelist": DEMUXERS,
    "protocol_whitelist": "none",
    "ignore_editlist": "1",  # FFmpeg can take minutes over it and cuts at whole packets: ``edited`` does it instead
}
# The known answers, by the name of OpenAI's response_format: what they are, and what in Accept asks for them, the most
# specific first. ``formatted`` writes them.
ANSWER_FORMATS = {
    "text": ("text/plain; charset=utf-8", ("text/plain", "text/*", "*/*")),
    "json": ("application/json", ("application/json", "application/*")),
    "verbose_json": ("application/json", ("application/json;profile=verbose",)),
    "srt": ("application/x-subrip; charset=utf-8", ("application/x-subrip",)),
    "vtt": ("text/vtt; charset=utf-8", ("text/vtt",)),
    "events": ("text/event-stream; charset=utf-8", ("text/event-stream",)),
}
WITHOUT_TIMES = ("text", "json", "events")  # of these, what a plain RNNTBeamSearch can give, too
# Where the audio is looked for, in forms and JSON; "body" is a raw body.
AUDIO_FIELDS = ("data", "file", "audio", "b64", "base64", "input", "inputs", "instances", "content", "body")
TEXT_FIELDS = ("response_format", "audio_track", "hotwords", "prompt", "stream")  # never, whatever their bytes
BINARY = re.compile(rb"[\x00-\x08\xf8-\xff]")  # bytes that no text has, and the first kilobytes of every audio file
MAX_FILES = 64  # in one request
MAX_DEPTH = 8  # of JSON around the audio
NUMBER = re.compile("[1-9][0-9]{0,14}")
MAX_HOTWORDS, MAX_HOTWORD_LENGTH, MAX_WEIGHT = 1000, 100, 5.0  # phrases, characters, natural logarithm for a token
USUAL_WEIGHT = 1.5
GRAPHS = 4  # lists of hotwords that a worker keeps ready
DATA_URL = re.compile("data:[^,]{0,200};base64,", re.IGNORECASE)
URL_SAFE = str.maketrans("-_", "+/")  # from the URL-safe alphabet of base64 to the usual one
FIELD_BYTES = 1024  # more than the head of a form's field takes
SEND_AUDIO = "Send the bytes of an audio file (WAV, FLAC, MP3, Ogg/Opus, M4A, WebM, ...) as the request body"

# What decoding may cost, so that no small file keeps a worker busy for minutes or fills the memory: some processor
# time, and a part of the time that the audio plays; some memory, and a few times what the longest audio needs.
DECODING_SECONDS, DECODING_RATE = 5.0, 0.1
DECODING_BYTES, DECODING_COPIES = 2**30, 4
MAPPED = Path("/proc/self/statm")  # begins with the pages of memory that this process has mapped
SAMPLE_RATES = (1_000, 1_000_000)  # Hz; to resample what claims another one can take minutes and gigabytes
# How files begin that FFmpeg does not expect behind the end of another one. A pattern for each: only those that begin
# with fixed bytes are found quickly.
BEGINNINGS = (
    *(rb"RIFF....WAVE", rb"RIFX....WAVE", rb"RF64....WAVE", rb"BW64....WAVE", rb"FORM....AIF[FC]", rb"OggS\x00\x02"),
    *(rb"\x1aE\xdf\xa3.{0,40}?(?:webm|matroska)", rb"\x00\x00\x00[\x08-\x40]ftyp", rb"FLV\x01.\x00\x00\x00\x09"),
    *(rb"caff\x00\x01\x00\x00desc", rb"riff.\x91\xcf\x11\xa5\xd6", rb"0&\xb2u\x8ef\xcf\x11\xa6\xd9"),
)
SHORTEST = 1024  # bytes of a file in which anything is said; an Ogg file's streams begin nearer to each other
MAX_PARTS = 1000  # files that were joined to one
ID3 = re.compile(rb"ID3[\x02-\x04].(.)([\x00-\x7f]{4})", re.DOTALL)  # flags and size
PADDING = re.compile(rb"\x00*")
CHUNK = re.compile(rb"[A-Za-z_][A-Za-z0-9_ ]{3}")  # how a part of a WAV file begins
MAX_TAGS, MAX_CHUNKS = 16, 10_000  # looked at in one file; boxes of an MP4 are chunks, too
ASIDE = Disposition.comment | Disposition.hearing_impaired | Disposition.visual_impaired  # tracks for some listeners
SILENT = 0.001  # of full scale: a track that never gets louder has nothing in it
CANCELLED = 0.5  # of the level that the sum of channels has which have nothing in common: less has lost the sound
MAX_STUMBLES = 16  # errors of a demuxer one after the other; it may go on after each
DAMAGED = "The file is damaged, cut off or has gaps; what could be read was transcribed."
TOO_COSTLY = "To decode the file takes too much time or memory: convert it, to FLAC for instance."
GAP = 0.1  # seconds between the times in a file and what has been decoded: more is silence, or lost
LOUDEST = 4.0  # times full scale: what is louder is no recording

# What export_model.py puts into the model file.
EXTRA_FILES = ("metadata.json", "global_stats.json", "tokenizer.model")
# What the bundle and every model that is served with it have in common.
SAMPLE_RATE = EMFORMER_RNNT_BASE_LIBRISPEECH.sample_rate
HOP_SAMPLES = EMFORMER_RNNT_BASE_LIBRISPEECH.hop_length
WINDOW_SAMPLES = EMFORMER_RNNT_BASE_LIBRISPEECH.n_fft
SEGMENT_SAMPLES = EMFORMER_RNNT_BASE_LIBRISPEECH.segment_length * HOP_SAMPLES
RIGHT_CONTEXT = EMFORMER_RNNT_BASE_LIBRISPEECH.right_context_length  # feature frames
ENCODER_STRIDE = 4  # feature frames to a frame of the encoder
FRAME_SECONDS = ENCODER_STRIDE * HOP_SAMPLES / SAMPLE_RATE
SEGMENT_FRAMES = SEGMENT_SAMPLES // HOP_SAMPLES  # feature frames
# Hops on either side of a piece of sound that hold all samples of its features, and are enough for the extractor.
MARGIN = -(-WINDOW_SAMPLES // HOP_SAMPLES)
WARM_UP_RUNS = 4  # before the first request: TorchScript profiles the first two calls and optimises on the third
# A segment of verbose_json or a subtitle ends where nobody speaks for so long, and before it grows longer than this.
PAUSE = 0.6  # seconds
SEGMENT_SECONDS = 7.0
LINES = textwrap.TextWrapper(width=42, break_long_words=False)  # of which a subtitle has two at most

# Seconds that all audio of a request may be together; those left for a file; processor time used before this request.
Limits = tuple[int, float, float]
# What is played of a track: from which of its seconds (None: silence), and how many.
Edits = list[tuple[float | None, float]]


def refusal(status: int, kind: str, message: str) -> PredictionException:
    """What is raised for a request that cannot be answered: TorchServe's exception, with a ``kind`` for programs."""
    error = PredictionException(message, HTTPStatus(status))
    error.kind = kind
    return error


# What is asked for


def settings_of(context, known: dict[str, int | str | None]) -> dict[str, int | str | None]:
    """``known``, the default settings, with those that model-config.yaml gives.

    Raises:
        ValueError: it has a setting that is not known, or that cannot have that value.
    """
    given = (getattr(context, "model_yaml_config", None) or {}).get("handler") or {}
    if not isinstance(given, dict):
        raise ValueError(f"model-config.yaml: handler must be names and values, not {given!r}.")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"model-config.yaml: handler has no setting {name!r}; it has {', '.join(known)}.")
        if name == "hotwords":
            valid, values = value is None or isinstance(value, str | list | dict), "phrases"
        elif name == "sha256":
            valid, values = isinstance(value, str) and SHA256.fullmatch(value), "64 hexadecimal digits, in quotes"
        else:
            valid, values = type(value) is int and value >= 1, "a whole number from 1"  # a bool is an int, too
        if not valid:
            raise ValueError(f"model-config.yaml: handler: {name} must be {values}, not {value!r}.")
    return known | given


def headers_of(index: int, context) -> dict[str, str]:
    """A request's headers, their names in lower case."""
    headers = context.get_all_request_header(index).items()
    headers = {name.lower(): value for name, value in headers if isinstance(value, str)}
    if not headers:
        # Without an HTTP header it came over gRPC, where the worker is killed if the answer to a StreamPredictions call
        # does not say that it is the last one.
        context.set_response_header(index, "ts_stream_next", "false")
    return headers


def json_body(request: dict) -> dict:
    """The object that was sent as a JSON body, or an empty one."""
    body = request.get("body")
    return body if isinstance(body, dict) else {}


def field(request: dict, name: str) -> object:
    """What a form, a query or a JSON body has under this name; bytes as text."""
    value = request.get(name) or json_body(request).get(name)
    return value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else value


def track_of(request: dict, headers: dict[str, str]) -> int | None:
    """The sound track, from 1, that the field ``audio_track`` or the header ``x-audio-track`` chooses."""
    track = str(field(request, "audio_track") or headers.get("x-audio-track", "")).strip()
    if track and not NUMBER.fullmatch(track):
        message = "audio_track (or the header x-audio-track) must be the number of one of the sound tracks, from 1."
        raise refusal(400, "NoSuchTrack", message)
    return int(track) if track else None


def bad_hotwords(message: str) -> PredictionException:
    return refusal(400, "BadHotwords", message)


def hotwords_of(given: object) -> tuple[tuple[str, float], ...]:
    """Phrases that are expected, and their weights, of ``phrase: weight, phrase``, a list of such, or an object."""
    if isinstance(given, str):
        given = re.split("[,\n]", given, maxsplit=2 * MAX_HOTWORDS)
    if isinstance(given, list) and all(isinstance(each, str) for each in given):
        given = [each.partition(":")[::2] for each in given if each.strip()]
    elif isinstance(given, dict):
        given = list(given.items())
    else:
        how = "phrases with commas between them, as in: four two, nine: 2"
        raise bad_hotwords(f"hotwords (or the header x-hotwords) must be {how}.")
    if len(given) > MAX_HOTWORDS:
        raise bad_hotwords(f"There are more than {MAX_HOTWORDS} hotwords, the most for a request.")
    hotwords = []
    for number, (phrase, weight) in enumerate(given, start=1):
        try:
            weight = USUAL_WEIGHT if weight in ("", None) else float(weight)
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        if not 0 < weight <= MAX_WEIGHT:
            raise bad_hotwords(f"The weight of hotword {number} must be a number above 0, at most {MAX_WEIGHT:g}.")
        phrase = str(phrase).strip()
        if not 0 < len(phrase) <= MAX_HOTWORD_LENGTH:
            raise bad_hotwords(f"Hotword {number} must have 1 to {MAX_HOTWORD_LENGTH} characters.")
        hotwords.append((phrase, weight))
    return tuple(hotwords)


def spelt(phrases: list[str], processor: Callable) -> tuple[list[list[int]], torch.Tensor]:
    """The tokens of each phrase, and of each token of the vocabulary its kind, see ``engine.context.Context``."""
    spell, silent, tokens = processor.sp_model, processor.post_process_remove_list, []
    for number, phrase in enumerate(phrases, start=1):
        forms = [spell.encode(form) for form in (phrase, phrase.lower())]
        forms = [form for form in forms if form and spell.unk_id() not in form]
        if not forms:
            raise bad_hotwords(f"The model cannot write hotword {number}: leave it out or spell it otherwise.")
        tokens.append(forms[0])
    pieces = map(spell.id_to_piece, range(spell.get_piece_size()))
    kinds = [2 if i in silent else int(not piece.startswith("\u2581")) for i, piece in enumerate(pieces)]
    return tokens, torch.tensor(kinds)


def format_of(request: dict, headers: dict[str, str], has_times: bool) -> str:
    """One of ``ANSWER_FORMATS``: that of the field ``response_format``, or else the likeliest in the header ``Accept``.

    With the field ``stream``, whatever they say, it is what OpenAI's clients then read.
    """
    name = "events" if str(field(request, "stream")).lower() in ("true", "1") else field(request, "response_format")
    name = name or accepted(headers.get("accept", "").lower().replace(" ", "").replace('"', "") or "*/*")
    if not isinstance(name, str) or name not in ANSWER_FORMATS:
        media_types = ", ".join(media_types[0] for _, media_types in ANSWER_FORMATS.values())
        allowed = f"The field response_format may be {', '.join(ANSWER_FORMATS)}; the header Accept {media_types}."
        raise refusal(406, "UnknownFormat", f"There is no such format. {allowed}")
    if name not in WITHOUT_TIMES and not has_times:
        message = "The model file gives no times: only the formats text, json and events can be had."
        raise refusal(406, "NoTimes", message)
    return name


def accepted(accept: str) -> str | None:
    """The format with the highest weight in a header Accept; of equals, the first in it (RFC 9110)."""
    ranges: dict[str, tuple[float, int]] = {}
    for place, item in enumerate(accept.split(",")):
        media_type, *parameters = item.split(";")
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        quality = float(quality) if quality.replace(".", "", 1).isdecimal() else 0.0
        media_type += ";profile=verbose" * ("profile=verbose" in parameters)
        ranges.setdefault(media_type, (quality, -place))
    weights = {
        name: next((ranges[media_type] for media_type in media_types if media_type in ranges), (0.0, 0))
        for name, (_, media_types) in ANSWER_FORMATS.items()
    }
    best = max(weights, key=weights.get)
    return best if weights[best][0] > 0 else None


def audio_files(request: dict, headers: dict[str, str]) -> Iterator[bytes | bytearray]:
    """The audio files in a request, however they were sent: raw body, form fields, base64 text or JSON."""
    fields = {name: value for name, value in request.items() if name not in TEXT_FIELDS}
    sent = [value for value in fields.values() if isinstance(value, bytes | bytearray | str)]
    # A form may have other fields beside the files: where none is binary or has a usual name, the file is the longest.
    binary = [value for value in sent if not isinstance(value, str) and BINARY.search(value[:4096])]
    named = [fields[name] for name in AUDIO_FIELDS if name in fields]
    found = json_body(request) or binary or [value for value in named or sorted(sent, key=len)[-1:] if value][:1]
    values = list(itertools.islice(in_json(found or b""), MAX_FILES + 1))
    if len(values) > MAX_FILES:
        message = f"The request has more than {MAX_FILES} files, the most for one: send several requests."
        raise refusal(413, "TooManyFiles", message)
    arrived = [value.encode("utf-8", "replace") if isinstance(value, str) else value for value in request.values()]
    size = sum(len(value) for value in arrived if isinstance(value, bytes | bytearray))
    length, form = headers.get("content-length", ""), headers.get("content-type", "").lower().startswith("multipart/")
    if form and NUMBER.fullmatch(length) and int(length) > size + FIELD_BYTES * (len(arrived) + 1):
        why = "TorchServe keeps the last of several files under one name"
        message = f"Of the form's {length} bytes only {size} arrived: {why}. Give each a name of its own."
        raise refusal(400, "LostFile", message)
    return map(audio_of, values)


def in_json(value: object, depth: int = 0) -> Iterator[object]:
    """What may be audio in JSON, under the names and in the lists in which clients send it."""
    if isinstance(value, dict) and value and depth < MAX_DEPTH:
        yield from in_json(next((value[name] for name in AUDIO_FIELDS if value.get(name)), 0), depth + 1)
    elif isinstance(value, list) and value and depth < MAX_DEPTH:
        for each in value:
            yield from in_json(each, depth + 1)
    else:
        yield value


def audio_of(value: object) -> bytes | bytearray:
    """The bytes of a file that were sent as they are or in base64."""
    if isinstance(value, str):  # text/* or JSON, as TorchServe's own handlers take images
        # With or without a data URL's head, line breaks and padding; either alphabet.
        text = "".join(DATA_URL.sub("", value, count=1).split()).translate(URL_SAFE).rstrip("=")
        try:
            value = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError:
            raise refusal(400, "NotAudio", f"The request is text that is not audio in base64. {SEND_AUDIO}.") from None
    if not isinstance(value, bytes | bytearray):
        names = f"for data you may write {', '.join(AUDIO_FIELDS[1:-1])}, too"
        message = f'The request is JSON without audio. {SEND_AUDIO}, or {{"data": "<the file in base64>"}} ({names}).'
        raise refusal(400, "NotAudio", message)
    if not value:
        hint = "with curl: -T speech.wav, or --data-binary @speech.wav -H 'Content-Type: application/octet-stream'"
        raise refusal(400, "EmptyBody", f"The request has no audio. {SEND_AUDIO} ({hint}).")
    return value


# From bytes to a waveform


def decode_audio(
    audio: bytes | bytearray,
    notes: list[str] | None = None,
    longest: int = DEFAULTS["max_audio_seconds"],
    left: float = math.inf,
    used: float = math.inf,
    track: int | None = None,
) -> torch.Tensor:
    """Decode an audio file of any sample rate, channel count and bit depth, as far as it goes.

    PyAV, because its wheel brings FFmpeg along: nothing has to be installed on the system.

    Args:
        audio (bytes or bytearray): the file, or several that were joined end to end.
        notes (list[str] or None): gets a sentence for the caller about each thing that had to be mended or chosen.
        longest (int): seconds that all audio of a request may be together; ``left`` of them for this file.
        used (float): this thread's processor time when the request came, in seconds.
        track (int or None): which of the file's sound tracks, from 1; by default the first that is to be heard.

    Returns:
        Tensor: (samples,), float32, full scale 1.0, mono, at ``SAMPLE_RATE``.
    """
    parts, found, problem = [], [], None
    try:
        with limited_memory(longest):
            for file in files_in(audio):
                decoded = sum(map(len, parts)) / SAMPLE_RATE
                try:
                    parts.append(sound_of(mended_wav(file), found, (longest, left - decoded, used), track))
                except PredictionException as error:
                    if error.error_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                        raise
                    problem = error
            waveform = joined(parts)
    except MemoryError:
        raise refusal(413, "TooCostly", TOO_COSTLY) from None
    if not len(waveform):
        kind, what = ("NotAudio", "is not audio I can read") if found else ("NoSamples", "has no samples of sound")
        raise problem or refusal(400, kind, f"What was sent ({len(audio)} bytes) {what}. {SEND_AUDIO}.")
    notes = [] if notes is None else notes
    notes += dict.fromkeys(found)
    return sane(waveform, notes)


@contextlib.contextmanager
def limited_memory(longest: int) -> Iterator[None]:
    """Let allocations fail that no honest file needs: FFmpeg takes some headers at their word. On Linux only."""
    if not MAPPED.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    samples = longest * SAMPLE_RATE * torch.float32.itemsize
    most = int(MAPPED.read_text().split()[0]) * resource.getpagesize() + DECODING_BYTES + DECODING_COPIES * samples
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_time(limits: Limits, seconds: float = 0.0) -> None:
    """Refuse a file of which ``seconds`` have been decoded in more processor time than ``limits`` leave."""
    longest, left, used = limits
    if time.thread_time() - used > DECODING_SECONDS + DECODING_RATE * (longest - left + seconds):
        raise refusal(413, "TooCostly", TOO_COSTLY)


def check_length(limits: Limits, seconds: float) -> None:
    """Refuse a file that plays for more ``seconds`` than ``limits`` leave."""
    longest, left, _ = limits
    if seconds > left + 0.001:
        message = f"The audio is longer than {longest} s, the most for a request: send it in pieces."
        raise refusal(413, "AudioTooLong", message)


def files_in(audio: bytes | bytearray) -> Iterator[bytes | bytearray]:
    """The files that were joined end to end, as a rule one, each without the ID3 tags before it.

    FFmpeg goes on by itself where a format has no header (MP3, AAC, MPEG-TS), and passes over small tags only.
    """
    begins, last = {0}, -SHORTEST
    for place in sorted(found.start() for kind in BEGINNINGS for found in re.finditer(kind, audio, re.DOTALL)):
        if place >= last + SHORTEST:
            begins.add(place)
            last = place
    if len(begins) > MAX_PARTS:
        message = f"More than {MAX_PARTS} files are joined in what was sent: send them in several requests."
        raise refusal(413, "TooManyFiles", message)
    for begin, end in itertools.pairwise([*sorted(begins), len(audio)]):
        place = begin
        for _ in range(MAX_TAGS):
            if not (tag := ID3.match(audio, place)):
                break
            size = sum(digit << shift for digit, shift in zip(tag[2], (21, 14, 7, 0), strict=True))
            place = PADDING.match(audio, place + 10 + size + (10 if tag[1][0] & 16 else 0)).end()
        if len(begins) == 1 and place in (0, end):
            yield audio
        elif place < end:
            yield audio[place:end]


def mended_wav(file: bytes | bytearray) -> bytes | bytearray:
    """A WAV file with a header that FFmpeg reads as it was meant; any other file, and most WAV files, as they are.

    Mended are big-endian samples (RIFX), sizes that were never filled in (RF64), and chunks of odd size without the
    byte that should follow them.
    """
    if file[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or file[8:12] != b"WAVE":
        return file
    order, content = "big" if file[:4] == b"RIFX" else "little", memoryview(file)
    chunks, place, well = {}, 12, file[:4] == b"RIFF"
    for _ in range(MAX_CHUNKS):
        name, size = bytes(content[place : place + 4]), int.from_bytes(content[place + 4 : place + 8], order)
        place += 8
        if name == b"data":
            break
        chunks[name] = bytes(content[place : place + min(size, 64)])
        place += size
        unpadded = size % 2 and CHUNK.match(file, place)
        well, place = well and not unpadded, place if unpadded else place + size % 2
    form = chunks.get(b"fmt ", b"")
    if well or name != b"data" or len(form) < 16:
        return file
    if size in (0, 0xFFFFFFFF):
        size = int.from_bytes(chunks.get(b"ds64", b"")[8:16], "little") or len(file)
    sound = content[place : place + size]
    if order == "big":
        tag, channels, rate, per_second, block, bits = struct.unpack(">HHIIHH", form[:16])
        tag = max(form[24:28], default=0) if tag == 0xFFFE else tag  # an extension of 1 or 3, in whichever order
        form = struct.pack("<HHIIHH", tag, channels, rate, per_second, block, bits)
        width = max(block // max(channels, 1), 1) if tag in (1, 3) else 1  # bytes of a sample
        whole = sound[: len(sound) // width * width]
        sound = bytearray(whole)
        for byte in range(width):
            sound[byte::width] = whole[width - 1 - byte :: width]
    form += bytes(len(form) % 2)
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(sound))
    return b"".join([b"RIFF", struct.pack("<I", len(head) + len(sound)), head, sound])


@contextlib.contextmanager
def opened(file: bytes | bytearray, limits: Limits) -> Iterator[av.container.InputContainer]:
    """A file in FFmpeg, which looks for its streams meanwhile, in hostile ones for very long."""
    content, place, opening = memoryview(file), 0, True  # io.BytesIO would copy it

    def read(size: int) -> bytes:
        nonlocal place
        if opening:
            check_time(limits)
        part = bytes(content[place : place + size])
        place += len(part)
        return part

    def seek(offset: int, whence: int = 0) -> int:
        nonlocal place
        place = max(offset + (0, place, len(content))[whence], 0)
        return place

    reader = types.SimpleNamespace(read=read, seek=seek, tell=lambda: place)
    with av.open(reader, options=FFMPEG_OPTIONS, metadata_errors="replace") as container:
        opening = False
        yield container


def sound_of(file: bytes | bytearray, notes: list[str], limits: Limits, wanted: int | None) -> torch.Tensor:
    """One file's sound (samples,): of its tracks the one that is wanted, or else the first that is to be heard."""
    waveform, said, places = torch.empty(0), [], None
    while places is None or places:
        samples, found, edits = bytearray(), [], []  # samples grow in place: of an hour, a copy is 230 MB
        try:
            with opened(file, limits) as container:
                tracks = container.streams.audio
                places = tracks_to_try(tracks, wanted) if places is None else places
                track = tracks[places.pop(0)]
                edits = edits_of(file, container, track)
                for piece in resampled(sound_frames(container, track, limits, found), found):
                    samples += piece.numpy().data
                if len(tracks) > 1 and not wanted:
                    number = tracks.index(track) + 1
                    found.append(f"Of {len(tracks)} sound tracks this is number {number}; audio_track chooses another.")
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError, ZeroDivisionError):
            found.append(DAMAGED)
            places = places or []
        played = torch.frombuffer(samples, dtype=torch.float32) if samples else torch.empty(0)
        played = edited(played, edits, limits)
        loud = peak_of(played) > SILENT
        if loud or len(played) >= len(waveform):
            waveform, said = played, found
        if loud:
            break
    notes += said
    return waveform


def tracks_to_try(tracks: Sequence[av.AudioStream], wanted: int | None) -> list[int]:
    """The places of a file's sound tracks that can be decoded, those first that a player would play."""
    if not tracks:
        raise refusal(415, "NoAudioStream", f"The file has no audio stream. {SEND_AUDIO}.")
    if wanted and wanted > len(tracks):
        message = f"The file has no sound track {wanted}: audio_track may be 1 to {len(tracks)}."
        raise refusal(400, "NoSuchTrack", message)
    places = [place for place, track in enumerate(tracks) if track.codec_context and wanted in (None, place + 1)]
    if not places:
        raise refusal(415, "NoDecoder", f"There is no decoder for the file's sound. {SEND_AUDIO}.")
    kinds = [track.disposition for track in tracks]
    return sorted(places, key=lambda place: (not kinds[place] & Disposition.default, bool(kinds[place] & ASIDE)))


def packets_of(container: av.container.InputContainer, stream: av.AudioStream, notes: list[str]) -> Iterator[av.Packet]:
    """A stream's packets and an empty one, which flushes the decoder, whatever the demuxer stumbles over."""
    stumbles = 0
    while stumbles < MAX_STUMBLES:
        try:
            for packet in container.demux(stream):
                stumbles = 0
                yield packet
            return
        except MemoryError:
            raise
        except IndexError:
            pass  # a packet of a stream that appeared midway, which PyAV does not know
        except av.FFmpegError:
            stumbles += 1
            notes.append(DAMAGED)
    flush = av.Packet()
    flush.stream = stream
    yield flush


def sound_frames(
    container: av.container.InputContainer, stream: av.AudioStream, limits: Limits, notes: list[str]
) -> Iterator[tuple[float, av.AudioFrame]]:
    """The sound's frames as they are, each with the seconds in which there is no sound before it."""
    damaged, seconds, least, (_, left, _) = False, 0.0, 0.0, limits
    origin = (container.start_time or 0) / av.time_base
    for packet in packets_of(container, stream, notes):
        check_time(limits, seconds)
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError):
            frames, damaged = [], True
        least = least if frames else 0.0  # what this packet would have played is silence
        for frame in frames:
            if not SAMPLE_RATES[0] <= frame.sample_rate <= SAMPLE_RATES[1]:
                damaged = True
                continue
            gap = 0.0 if frame.time is None else frame.time - origin - seconds
            gap = gap if least < gap < left - seconds else 0.0
            damaged, least = damaged or (gap > 0 and seconds > 0), GAP
            # Before resampling: one small frame that claims a few samples a second would become gigabytes.
            seconds += gap + frame.samples / frame.sample_rate
            check_length(limits, seconds)
            yield gap, frame
    if damaged:
        notes.append(DAMAGED)


def resampled(
    frames: Iterator[tuple[float, av.AudioFrame]], notes: list[str], size: int | None = 4 * SAMPLE_RATE
) -> Iterator[torch.Tensor]:
    """Bring decoded frames to ``SAMPLE_RATE`` and mix their channels: pieces (samples,), float32.

    In pieces of ``size`` samples: one for every decoded frame (None) takes three times as long. Packed samples, because
    PyAV crashes on planar frames of eight channels and more.
    """
    resampler, source = None, None
    for gap, frame in itertools.chain(frames, [(0.0, None)]):
        kind = frame and (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != source or gap:  # also midway, in files that were joined
            yield from (mono(rest, notes) for rest in (resampler.resample(None) if resampler else []))
            yield torch.zeros(round(gap * SAMPLE_RATE))
            resampler = av.AudioResampler(format="flt", rate=SAMPLE_RATE, frame_size=size)
            source = kind
        if frame:
            yield from (mono(part, notes) for part in resampler.resample(frame))


def mono(frame: av.AudioFrame, notes: list[str]) -> torch.Tensor:
    """The mean of the channels, (samples,), or the loudest where they cancel each other out.

    FFmpeg's own downmix would be 3 dB louder than either side.
    """
    channels = torch.from_numpy(frame.to_ndarray()).view(frame.samples, -1)  # (samples, channels)
    mean, count = channels.mean(dim=1), channels.shape[1]
    if count > 1 and count * mean.norm() < CANCELLED * channels.norm():
        mean = channels[:, channels.norm(dim=0).argmax()].contiguous()
        notes.append("The channels cancel each other out (opposite phases): the loudest was transcribed.")
    return mean


def boxes(file: bytes | bytearray) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of an MP4's boxes, in order; those around edit lists before what is in them."""
    content, place = memoryview(file), 0
    for _ in range(MAX_CHUNKS):
        size, name, head = int.from_bytes(content[place : place + 4], "big"), bytes(content[place + 4 : place + 8]), 8
        if size == 1:
            size, head = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        yield name, content[place + head : place + size]
        if size < head:  # 0: to the end
            return
        place += head if name in (b"moov", b"trak", b"edts") else size


def edits_of(file: bytes | bytearray, container: av.container.InputContainer, track: av.AudioStream) -> Edits:
    """What an MP4's edit list plays of a track, in order."""
    edits, scale, number, in_pieces = [], 0, 0, False
    origin = (container.start_time or 0) / av.time_base
    for name, box in boxes(file) if container.format.name.startswith("mov,") else ():
        in_pieces = in_pieces or name == b"mvex"
        if name in (b"mvhd", b"tkhd"):  # units to a second; the track's number: behind two dates of 4 or 8 bytes
            value = int.from_bytes(box[20:24] if box[:1] == b"\1" else box[12:16], "big")
            scale, number = (value, number) if name == b"mvhd" else (scale, value)
        elif name == b"elst" and number == track.id and scale and not edits:
            entry = struct.Struct(">QqI" if box[:1] == b"\1" else ">IiI")
            count = min(int.from_bytes(box[4:8], "big"), (len(box) - 8) // entry.size, MAX_CHUNKS)
            for length, start, _ in entry.iter_unpack(box[8 : 8 + count * entry.size]):
                begin, seconds = float(start * track.time_base) - origin, length / scale
                edits.append((None, seconds) if start < 0 else (begin, seconds or math.inf))
    if in_pieces and edits and edits[-1][0] is not None:  # its end was not known when this was written
        edits[-1] = (edits[-1][0], math.inf)
    return edits


def edited(waveform: torch.Tensor, edits: Edits, limits: Limits) -> torch.Tensor:
    """What an edit list plays of ``waveform`` (samples,); all of it where that would be nothing."""
    pieces, played = [], 0.0  # seconds
    for start, seconds in edits:
        ends = (0.0, 0.0) if start is None else (max(start, 0.0), max(start + seconds, 0.0))
        begin, end = (round(min(second * SAMPLE_RATE, len(waveform))) for second in ends)
        played += seconds if start is None else (end - begin) / SAMPLE_RATE
        check_length(limits, played)
        pieces.append(torch.zeros(round(seconds * SAMPLE_RATE)) if start is None else waveform[begin:end])
    return joined(pieces) if played else waveform


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """All ``parts`` (samples,) in order; one alone is not copied: of an hour, that would be 230 MB."""
    return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])


def peak_of(waveform: torch.Tensor) -> float:
    """The largest of ``waveform``'s (samples,) absolute values."""
    return float(torch.linalg.vector_norm(waveform, math.inf)) if len(waveform) else 0.0  # .abs() would copy an hour


def sane(waveform: torch.Tensor, notes: list[str]) -> torch.Tensor:
    """``waveform`` (samples,) without what is no number, and within full scale; adds to ``notes`` what was done."""
    if not math.isfinite(peak := peak_of(waveform)):
        finite = waveform.isfinite()
        missing = len(waveform) - int(finite.sum())
        if 2 * missing > len(waveform):
            raise refusal(400, "NotAudio", f"The samples are no sound: most of them are not numbers. {SEND_AUDIO}.")
        notes.append(f"{missing} samples that are not numbers were taken for silence.")
        waveform = waveform.where(finite, 0.0)
        peak = peak_of(waveform)
    if peak > LOUDEST:  # float files only; often integers that nobody has scaled
        # All but the loudest: a single wrong sample must not make silence of the others.
        level = float(waveform.abs().kthvalue(math.ceil(0.9999 * len(waveform))).values)
        notes.append(f"The samples reach {peak:.3g} times full scale and were scaled down to it.")
        waveform = (waveform / max(level, 1.0)).clamp(-1.0, 1.0)
    return waveform


# From waveforms to tokens


def processors_of(files: dict[str, bytes | str]) -> tuple[torch.nn.Module, Callable]:
    """torchaudio's feature extractor and token processor, on the ``EXTRA_FILES`` that came with the model.

    A model file without them (a scripted ``RNNTBeamSearch`` of the LibriSpeech bundle, as older examples
    export it) gets the bundle's own, from the torch hub cache or by download.
    """
    bundle = EMFORMER_RNNT_BASE_LIBRISPEECH
    with tempfile.TemporaryDirectory() as folder:
        if files["global_stats.json"] and files["tokenizer.model"]:
            stats, tokenizer = Path(folder, "global_stats.json"), Path(folder, "tokenizer.model")
            stats.write_bytes(files["global_stats.json"])
            tokenizer.write_bytes(files["tokenizer.model"])
            bundle = dataclasses.replace(bundle, _global_stats_path=str(stats), _sp_model_path=str(tokenizer))
        return bundle.get_feature_extractor(), bundle.get_token_processor()


class ModelHandler:
    """One worker's model: TorchServe calls ``initialize`` once and ``handle`` for every batch of requests."""

    known_settings = DEFAULTS  # of the section ``handler`` in model-config.yaml

    def __init__(self) -> None:
        self.model = None  # torch.jit.ScriptModule: a scripted ``torchaudio.models.RNNTBeamSearch`` or a drop-in
        self.device = None  # torch.device
        self.expected = None  # what the engine takes for the phrases in model-config.yaml
        self.initialized = False

    def initialize(self, context) -> None:
        """Load the model and build the feature extractor and the token processor, once for all requests.

        Of ``context`` (ts.context.Context) it reads ``system_properties``, ``manifest`` and ``model_yaml_config``.

        Raises:
            ValueError: a wrong setting in model-config.yaml, another SHA-256 there than the model file has, or an int8
                model on a processor that cannot compute it.
            FileNotFoundError: the archive has no model file.
        """
        self.settings = settings_of(context, self.known_settings)
        torch.set_num_threads(self.settings["num_threads"])
        if self.settings["num_threads"] > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
            # OpenMP reads it when torch is loaded, which TorchServe has done by now.
            logger.warning("num_threads > 1: start TorchServe with OMP_WAIT_POLICY=passive, or it is many times slower")
        model_path = Path(context.system_properties["model_dir"]) / context.manifest["model"]["serializedFile"]
        if not model_path.is_file():
            raise FileNotFoundError(f"The archive has no model file {model_path.name}.")
        wanted = self.settings["sha256"]
        if wanted and (found := hashlib.sha256(model_path.read_bytes()).hexdigest()) != wanted:
            raise ValueError(f"{model_path.name} has the SHA-256 {found}, not the one in model-config.yaml.")
        files = dict.fromkeys(EXTRA_FILES, "")
        model = torch.jit.load(str(model_path), map_location="cpu", _extra_files=files).eval()
        self.extract_features, self.tokens_to_text = processors_of(files)
        self._graph = functools.lru_cache(maxsize=GRAPHS)(self._graph)
        metadata = json.loads(files["metadata.json"] or "{}")
        gpu_id, int8 = context.system_properties.get("gpu_id"), metadata.get("precision") == "int8"
        on_gpu = gpu_id is not None and torch.cuda.is_available()
        if on_gpu and int8:
            logger.warning("An int8 model runs on the CPU: PyTorch has its products for no GPU. Export fp32 or bf16.")
        if int8 and "fbgemm" not in torch.backends.quantized.supported_engines:
            raise ValueError("An int8 model needs FBGEMM, which PyTorch has on x86-64 alone: export fp32 or bf16.")
        self.device = torch.device(f"cuda:{gpu_id}" if on_gpu and not int8 else "cpu")
        self.model = model.to(self.device)
        self.model_name = metadata.get("model", model_path.stem)
        self.word_delays = metadata.get("word_delays", {"start": 0.0, "end": 0.0})  # seconds, see export_model.py
        self.has_times = hasattr(self.model, "advance")
        if self.has_times:
            self.model.window_segments = self.settings["window_segments"]
        else:
            longest = self.settings["max_audio_seconds"]
            self.settings["max_audio_seconds"] = min(longest, MAX_AUDIO_SECONDS_WITHOUT_OUR_ENGINE)
        logger.info("Loaded %s on %s, settings %s: %s", model_path.name, self.device, self.settings, metadata)

        try:
            self.expected = self._expected({}, {"x-hotwords": self.settings["hotwords"]})
        except PredictionException as error:
            raise ValueError(f"model-config.yaml: handler: {error.message}") from None
        self._warm_up()
        # All that is here now stays. To look through it again and again would stop the worker for a tenth of a second
        # and more, every few hundred requests.
        gc.collect()
        gc.freeze()
        self.initialized = True

    def _expected(self, request: dict, headers: dict[str, str]) -> tuple | None:
        """What the engine takes for the phrases that are expected, in the field ``hotwords`` or the header."""
        given = field(request, "hotwords")
        given = headers.get("x-hotwords") if given is None else given
        if given is None:
            return self.expected
        hotwords = hotwords_of(given)
        return self._graph(hotwords) if hotwords else None

    def _graph(self, hotwords: tuple[tuple[str, float], ...]) -> tuple:
        """``hotwords``, spelt in the model's tokens, as the engine takes them."""
        if not hasattr(self.model, "context"):
            message = "The model file takes no hotwords: they need one that today's export_model.py has written."
            raise refusal(400, "NoHotwords", message)
        phrases, kinds = spelt([phrase for phrase, _ in hotwords], self.tokens_to_text)
        return self.model.context(phrases, [weight for _, weight in hotwords], kinds)

    def _warm_up(self) -> None:
        """Transcribe noise of several lengths, so that no request pays for TorchScript's optimisation."""
        generator = torch.Generator().manual_seed(0)
        for run in range(WARM_UP_RUNS):
            self._search([torch.randn((run + 1) * SAMPLE_RATE, generator=generator) * 0.1])

    def handle(self, data: list[dict], context) -> list[str | dict]:
        """Answer a batch of requests; nothing that is wrong with one of them reaches the others.

        Args:
            data (list[dict]): one dict a request, field name to content; a raw body is the field ``body``.
            context (ts.context.Context): has each request's headers, takes its status, content type and metrics.

        Returns:
            list[str | dict]: an answer each, in the format that was asked for; for a request that cannot be answered an
            object with ``code``, ``type`` and ``message``.
        """
        started = time.perf_counter()
        answers: list[str | dict] = [{}] * len(data)
        sounds: dict[int, list[dict]] = {}  # by place in the batch; a request may hold several files
        spent: Counter[str] = Counter()  # seconds by step
        for index, request in enumerate(data):
            try:
                sounds[index] = self._sounds(request, headers_of(index, context))
            except Exception as error:
                answers[index] = refused(index, context, error)
        every = [sound for own in sounds.values() for sound in own]
        decoded = time.perf_counter()
        self._transcribe(every, spent)
        spent["engine"] = time.perf_counter() - decoded - spent["features"]
        for index, own in sounds.items():
            try:
                answers[index] = self._answer(index, context, data[index], own)
            except Exception as error:
                answers[index] = refused(index, context, error)
        spent["decode"], spent["handler"] = decoded - started, time.perf_counter() - started
        seconds = sum(sound["duration"] for sound in every)
        measure(context, "asr_audio_seconds", seconds, MetricTypes.COUNTER)
        measure(context, "asr_batch_size", len(data))
        for step in ("decode", "features", "engine", "handler"):
            measure(context, f"asr_{step}_seconds", spent[step])
        if seconds:
            measure(context, "asr_real_time_factor", spent["handler"] / seconds)
        logger.info("Answered %d requests with %.2f s of audio in %.3f s", len(data), seconds, spent["handler"])
        return answers

    def _sounds(self, request: dict, headers: dict) -> list[dict]:
        """Each audio file of a request: its waveform, duration and notes, and the format that was asked for."""
        used, response_format = time.thread_time(), format_of(request, headers, has_times=self.has_times)
        track, expected = track_of(request, headers), self._expected(request, headers)
        asked_for = {"format": response_format, "expected": expected, "several": self.settings["beam_width"] > 1}
        left = longest = self.settings["max_audio_seconds"]  # for all its files together
        sounds = []
        for audio in audio_files(request, headers):
            notes: list[str] = []
            waveform = decode_audio(audio, notes, longest, left, used, track)
            duration = len(waveform) / SAMPLE_RATE
            left -= duration
            sounds.append(asked_for | {"waveform": waveform, "duration": duration, "notes": notes})
        return sounds

    def _transcribe(self, sounds: list[dict], spent: Counter[str]) -> None:
        """Add to each of ``sounds`` its hypotheses, or what made it fail, as ``heard``."""
        try:
            waveforms, contexts = ([sound[name] for sound in sounds] for name in ("waveform", "expected"))
            heard = self._search(waveforms, contexts, spent)
        except Exception as error:
            if len(sounds) > 1:
                logger.warning("A batch of %d failed and is taken one by one", len(sounds), exc_info=error)
                for sound in sounds:
                    self._transcribe([sound], spent)
                return
            heard = [error]
        for sound, hypotheses in zip(sounds, heard, strict=True):
            sound["heard"] = hypotheses

    def _search(
        self, waveforms: list[torch.Tensor], contexts: Sequence[tuple | None] = (), spent: Counter[str] | None = None
    ) -> list[list[tuple] | Exception]:
        """Hypotheses for each of ``waveforms`` (samples,), the best first: (tokens, score, frames, log_probs).

        The tokens have the leading blank, the frames and log-probabilities have not; a plain RNNTBeamSearch has none.
        Window by window, so that features and encodings of an hour need no more memory than those of a minute, and
        within a time: what has not been heard by then gets an exception in place of hypotheses.
        """
        spent, beam_width = Counter() if spent is None else spent, self.settings["beam_width"]
        limit = self.settings["max_engine_seconds"]
        message = f"To transcribe it takes more than {limit} s, the most for a request: send it in pieces."
        heard, deadline = [refusal(413, "TooCostly", message) for _ in waveforms], time.monotonic() + limit
        with torch.inference_mode():
            if not self.has_times:
                features = [self._features(waveform).to(self.device) for waveform in waveforms]
                beams = [self.model(one, torch.tensor([len(one)], device=self.device), beam_width) for one in features]
                return [[(h[0], h[3], None, None) for h in beam] for beam in beams]
            streams = dict(enumerate(self.model.begin() for _ in waveforms))
            windows = [self._windows(waveform) for waveform in waveforms]
            settled = [([], [], []) for _ in waveforms]  # of each: tokens, frames, log_probs
            while streams and time.monotonic() < deadline:
                started = time.perf_counter()
                features, ended = zip(*(next(windows[i]) for i in streams), strict=True)
                spent["features"] += time.perf_counter() - started
                more = [[contexts[i] for i in streams]] if any(contexts) else []  # which older model files do not take
                advanced = self.model.advance(list(streams.values()), list(features), list(ended), beam_width, *more)
                for i, stream, end in zip(list(streams), advanced, ended, strict=True):
                    streams[i] = stream
                    for known, new in zip(settled[i], stream[4], strict=True):
                        known += new
                    if end:
                        tokens, frames, log_probs = settled[i]
                        heard[i] = [
                            (h[0][:1] + tokens + h[0][1:], h[3], frames + own_frames, log_probs + own_log_probs)
                            for h, own_frames, own_log_probs in zip(*stream[3][:3], strict=True)
                        ]
                        del streams[i]
        return heard

    def _windows(self, waveform: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
        """A waveform's features, as many at a time as complete a window of the engine's; whether they are the last.

        The windows are of one size, because a short one at the end would cost as much as a long one.
        """
        frames = max(len(waveform), SEGMENT_SAMPLES) // HOP_SAMPLES + 1
        segments = -(-(frames - frames % ENCODER_STRIDE) // SEGMENT_FRAMES)
        count = -(-segments // self.settings["window_segments"])
        size, begin = -(-segments // count) * SEGMENT_FRAMES, 0
        for end in (*(number * size + RIGHT_CONTEXT for number in range(1, count)), None):
            yield self._features(waveform, begin, end).to(self.device), end is None
            begin = end

    def _features(self, waveform: torch.Tensor, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Feature frames (T, 80) from ``begin`` to before ``end`` of a waveform (samples,).

        Without ``end`` they go on to the last, and to the right context that the extractor puts behind it. It centres
        a frame on every hop and mirrors the samples at both ends of what it is given: of a part the frames on which
        that tells are dropped, and what remains are the frames of the whole.
        """
        missing = SEGMENT_SAMPLES - len(waveform)
        if missing > 0:  # the extractor and the encoder need one segment; silence says nothing
            waveform = torch.nn.functional.pad(waveform, (0, missing))
        first = max(begin - MARGIN, 0)
        part = waveform[first * HOP_SAMPLES : None if end is None else (end + MARGIN) * HOP_SAMPLES]
        return self.extract_features(part)[0][begin - first : None if end is None else end - first]

    def _answer(self, index: int, context, request: dict, sounds: list[dict]) -> str | dict:
        """One request's answer, in the format that it asked for; sets its content type."""
        answers = [formatted(sound, self.model_name, self.tokens_to_text, self.word_delays) for sound in sounds]
        several = len(sounds) > 1 or "instances" in json_body(request)
        content_type = "application/json" if several else ANSWER_FORMATS[sounds[0]["format"]][0]
        context.set_response_content_type(index, content_type)
        if mended := [" ".join(sound["notes"]) for sound in sounds if sound["notes"]]:
            note = f"{len(mended)} of the files had to be mended: ask for verbose_json." if several else mended[0]
            context.set_response_header(index, "x-audio-notes", note)
        measure(context, "asr_requests", 1, MetricTypes.COUNTER, Outcome="ok")
        return {"predictions": answers} if several else answers[0]


# From tokens to the answer


def formatted(sound: dict, model_name: str, processor: Callable, word_delays: dict[str, float]) -> str | dict:
    """The answer for one file, in the format that was asked for; raises what made it fail."""
    if isinstance(sound["heard"], Exception):
        raise sound["heard"]
    best, *_ = hypotheses = sound["heard"]
    text = processor(best[0])
    if sound["format"] in WITHOUT_TIMES:
        return {"text": text, "json": {"text": text}, "events": events(text)}[sound["format"]]
    words = words_of(best, sound["duration"], processor, word_delays)
    segments = segments_of(words)
    if sound["format"] != "verbose_json":
        return subtitles(segments, sound["format"])
    answer = {"task": "transcribe", "text": text, "duration": round(sound["duration"], 3), "language": "english"}
    words = [{name: word[name] for name in ("word", "start", "end", "probability")} for word in words]
    answer |= {"model": model_name, "segments": segments, "words": words}
    if sound["several"]:
        scores: dict[str, float] = {}
        for tokens, score, *_ in hypotheses:
            scores.setdefault(processor(tokens), round(score, 4))
        answer["alternatives"] = [{"text": text, "score": score} for text, score in scores.items()]
    return answer | ({"notes": sound["notes"]} if sound["notes"] else {})


def words_of(hypothesis: tuple, duration: float, processor: Callable, word_delays: dict[str, float]) -> list[dict]:
    """The words of a hypothesis (as ``ModelHandler._search`` gives it), with times in seconds and probabilities.

    A word begins at its first token, or where the model marked its beginning by a token that is not text, and ends
    after its last; both are corrected by ``word_delays``, in seconds. ``duration`` is that of the sound, in seconds.
    """
    tokens, _, frames, log_probs = hypothesis
    words, mark = [], []
    for emitted in zip(tokens[1:], frames, log_probs, strict=True):
        if emitted[0] in processor.post_process_remove_list:
            mark = [emitted]
            continue
        piece = processor.sp_model.id_to_piece(emitted[0])
        if piece.startswith("\u2581") or not words:
            words.append({"word": "", "emitted": mark})
        words[-1]["word"] += piece.replace("\u2581", "")
        words[-1]["emitted"].append(emitted)
        mark = []
    words, latest = [word for word in words if word["word"]], 0.0
    for word in words:
        word["tokens"], frames, word["log_probs"] = map(list, zip(*word.pop("emitted"), strict=True))
        start = frames[0] * FRAME_SECONDS - word_delays["start"]
        end = (frames[-1] + 1) * FRAME_SECONDS - word_delays["end"]
        word["start"] = round(min(max(start, latest), duration), 3)
        word["end"] = latest = round(min(max(end, word["start"]), duration), 3)
        word["probability"] = round(math.exp(min(sum(word["log_probs"]), 0.0)), 4)
    return words


def segments_of(words: list[dict]) -> list[dict]:
    """Words joined to what a subtitle holds, under OpenAI's names; docs/requests.md says why some of them are 0."""
    groups: list[list[dict]] = []
    for word in words:
        group = groups[-1] if groups else [word]
        near = word["start"] - group[-1]["end"] <= PAUSE and word["end"] - group[0]["start"] <= SEGMENT_SECONDS
        if not groups or not near or len(LINES.wrap(text_of([*group, word]))) > 2:
            groups.append([])
        groups[-1].append(word)
    segments = []
    for number, group in enumerate(groups):
        text, log_probs = text_of(group), [log_prob for word in group for log_prob in word["log_probs"]]
        segment = {"id": number, "seek": 0, "start": group[0]["start"], "end": group[-1]["end"], "text": text}
        segment |= {"tokens": [token for word in group for token in word["tokens"]], "temperature": 0.0}
        segment["avg_logprob"] = round(sum(log_probs) / len(log_probs), 4)
        segment["compression_ratio"] = round(len(text.encode()) / len(zlib.compress(text.encode())), 4)
        segments.append(segment | {"no_speech_prob": 0.0})
    return segments


def text_of(words: list[dict]) -> str:
    return " ".join(word["word"] for word in words)


def events(text: str) -> str:
    """``text`` as server-sent events, as OpenAI streams a transcript: word by word, and the whole at the end."""
    parts = [{"type": "transcript.text.delta", "delta": part} for part in re.findall(r"\s*\S+", text)]
    parts.append({"type": "transcript.text.done", "text": text})
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts)


def subtitles(segments: list[dict], kind: str) -> str:
    """``segments`` as ``srt`` (SubRip) or ``vtt`` (WebVTT)."""

    def clock(seconds: float) -> str:
        minutes, rest = divmod(round(1000 * seconds), 60_000)  # milliseconds
        point = "," if kind == "srt" else "."
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"

    cues = [] if kind == "srt" else ["WEBVTT\n"]
    for number, segment in enumerate(segments, start=1):
        times = f"{clock(segment['start'])} --> {clock(segment['end'])}"
        cues.append(f"{number}\n{times}\n{LINES.fill(segment['text'])}\n")
    return "\n".join(cues)


# What became of a request


def refused(index: int, context, error: Exception) -> dict:
    """Set one request's HTTP status; returns the object that TorchServe sends as its JSON body."""
    if isinstance(error, PredictionException):
        status, kind, message = error.error_code, error.kind, error.message
    else:
        logger.error("Request %d of the batch failed", index, exc_info=error)
        status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError"
        message = "The server failed on this request; its log says why. The audio may be sent again."
    context.set_response_status(status.value, status.phrase, index)
    context.set_response_content_type(index, "application/json")
    measure(context, "asr_requests", 1, MetricTypes.COUNTER, Outcome=kind)
    return {"code": status.value, "type": kind, "message": message}


def measure(context, name: str, value: float, metric=MetricTypes.HISTOGRAM, **dimensions: str) -> None:
    """Add to one of the metrics that metrics.yaml declares."""
    if context.metrics is not None:
        items = [Dimension(*item) for item in dimensions.items()]
        context.metrics.add_metric(name, value, "count", dimensions=items, metric_type=metric)
