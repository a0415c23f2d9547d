"""TorchServe handler for torchaudio's Emformer RNN-T: audio bytes in, transcript out.

The archive needs this file and the TorchScript model that export_model.py wrote, nothing else. Every
request takes the same way, from top to bottom of this file:

    request -> bytes -> waveform (mono, 16 kHz) -> features (T, 80) -> tokens -> words -> answer

What needs the model is ``ModelHandler``; the functions before it make waveforms of requests, those after it answers of
tokens.

Settings come from the ``handler`` section of an archive's model-config.yaml, see ``DEFAULTS``.
"""

import base64
import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import logging
import math
import mmap
import os
import re
import statistics
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import av
import torch
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import PredictionException

logger = logging.getLogger(__name__)

DEFAULTS = {
    "beam_width": 1,  # hypotheses kept after each frame of the search
    "num_threads": 1,  # torch threads of this worker: more, in several workers, would fight for the cores
    "max_audio_seconds": 3600,  # longer audio is refused
    "window_segments": 96,  # segments of 160 ms that the encoder takes at once: fewer need less memory
    "sha256": None,  # of the model file, as export_model.py prints it: any other file is refused
}
SHA256 = re.compile("[0-9a-f]{64}")
# A model file that holds a plain RNNTBeamSearch takes time and memory that grow with the square of the length.
MAX_AUDIO_SECONDS_WITHOUT_OUR_ENGINE = 120

# FFmpeg opens what these demuxers know and nothing else: no playlist that names other files, no other protocol.
FFMPEG_OPTIONS = {
    "format_whitelist": "wav,w64,flac,ogg,mp3,aac,mov,matroska,aiff,au,caf,amr",
    "protocol_whitelist": "none",
    "advanced_editlist": "0",  # a film may otherwise say in a few bytes that it is to be cut up a thousand times
}
# The known answers, by the name of OpenAI's response_format: what they are, and what in Accept asks for them, the most
# specific first.
FORMATS = {
    "text": ("text/plain; charset=utf-8", ("text/plain", "text/*", "*/*")),
    "json": ("application/json", ("application/json", "application/*")),
    "verbose_json": ("application/json", ("application/json;profile=verbose",)),
    "srt": ("application/x-subrip; charset=utf-8", ("application/x-subrip",)),
    "vtt": ("text/vtt; charset=utf-8", ("text/vtt",)),
}
AUDIO_FIELDS = ("data", "file", "audio", "body")  # where the audio is looked for; "body" is a raw body
MAX_FILES = 64  # in one request
# A segment of verbose_json or a subtitle ends where nobody speaks for so long, and before it grows longer than this.
PAUSE = 0.6  # seconds
SEGMENT_SECONDS = 7.0
LINES = textwrap.TextWrapper(width=42, break_long_words=False)  # of which a subtitle has two at most
# What decoding may cost, so that no small file keeps a worker busy for minutes or fills the memory: some processor
# time, and a part of the time that the audio plays; some memory, and a few times what the longest audio needs.
DECODING_SECONDS, DECODING_RATE = 5.0, 0.1
DECODING_BYTES, DECODING_COPIES = 2**30, 4
MAPPED = Path("/proc/self/statm")  # begins with the pages of memory that this process has mapped
SAMPLE_RATES = (1_000, 1_000_000)  # Hz; to resample what claims another one can take minutes and gigabytes
GAP = 0.1  # seconds between the times in a file and what has been decoded: more is silence, or lost
LOUDEST = 4.0  # times full scale: what is louder is no recording
URL_SAFE = str.maketrans("-_", "+/")  # from the URL-safe alphabet of base64 to the usual one
SEND_AUDIO = "Send the bytes of an audio file (WAV, FLAC, MP3, Ogg/Opus, M4A, WebM, ...) as the request body"

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
# Features are extracted in pieces of this many hops (one minute): the spectrum of an hour would take a gigabyte.
PIECE_HOPS = 6000
# Runs before the first request: TorchScript profiles the first two calls and optimises on the third.
WARM_UP_RUNS = 4


def refusal(status: HTTPStatus, kind: str, message: str) -> PredictionException:
    """What is raised for a request that cannot be answered: TorchServe's exception, with a ``kind`` for programs."""
    error = PredictionException(message, status)
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
        if name == "sha256":
            if not (isinstance(value, str) and SHA256.fullmatch(value)):
                raise ValueError("model-config.yaml: handler: sha256 must be 64 hexadecimal digits, in quotes.")
        elif type(value) is not int or value < 1:  # a bool is an int, too
            raise ValueError(f"model-config.yaml: handler: {name} must be a whole number from 1, not {value!r}.")
    return known | given


def json_body(request: dict) -> dict:
    """The object that was sent as a JSON body, or an empty one."""
    body = request.get("body")
    return body if isinstance(body, dict) else {}


def format_of(request: dict, headers: dict, has_times: bool) -> str:
    """One of ``FORMATS``: that of the field ``response_format``, or else the likeliest in the header ``Accept``.

    Raises:
        PredictionException: there is no such format, or the model file gives no times and it needs them.
    """
    name = request.get("response_format") or json_body(request).get("response_format")
    if not name:
        accept = [value for name, value in headers.items() if name.lower() == "accept" and isinstance(value, str)]
        name = accepted("".join(accept).lower().replace(" ", "").replace('"', "") or "*/*")
    elif isinstance(name, bytes | bytearray):
        name = name.decode("ascii", "replace")
    if not isinstance(name, str) or name not in FORMATS:
        message = (
            f"There is no such format. The field response_format may be {', '.join(FORMATS)}; the header Accept "
            f"{', '.join(media_types[0] for _, media_types in FORMATS.values())}."
        )
        raise refusal(HTTPStatus.NOT_ACCEPTABLE, "UnknownFormat", message)
    if name not in ("text", "json") and not has_times:
        message = "The model file gives no times: only the formats text and json can be had."
        raise refusal(HTTPStatus.NOT_ACCEPTABLE, "NoTimes", message)
    return name


def accepted(accept: str) -> str | None:
    """The one of ``FORMATS`` with the highest weight in a header Accept; of equals, the first in it (RFC 9110)."""
    ranges: dict[str, tuple[float, int]] = {}
    for place, item in enumerate(accept.split(",")):
        media_type, *parameters = item.split(";")
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        quality = float(quality) if quality.replace(".", "", 1).isdecimal() else 0.0
        media_type += ";profile=verbose" * ("profile=verbose" in parameters)
        ranges.setdefault(media_type, (quality, -place))
    weights = {
        name: next((ranges[media_type] for media_type in media_types if media_type in ranges), (0.0, 0))
        for name, (_, media_types) in FORMATS.items()
    }
    best = max(weights, key=weights.get)
    return best if weights[best][0] > 0 else None


def audio_files(request: dict) -> Iterator[bytes | bytearray]:
    """The audio files in a request, however they were sent: raw body, form field, base64 text or JSON.

    Raises:
        PredictionException: there is none.
    """
    body = json_body(request)
    if "instances" in body:  # KServe's way of sending several at once
        instances = body["instances"] if isinstance(body["instances"], list) else []
        values = [instance.get("data") if isinstance(instance, dict) else 0 for instance in instances]
        if len(values) > MAX_FILES:
            message = f"The request has {len(values)} files, and one may have {MAX_FILES}: send several requests."
            raise refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooManyFiles", message)
    elif body:
        values = [body.get("data", 0)]
    else:
        # A form may have other fields beside the file: where none has a usual name, the file is the longest.
        named = [request[name] for name in AUDIO_FIELDS if name in request]
        others = [value for name, value in request.items() if name != "response_format"]
        others = sorted((value for value in others if isinstance(value, bytes | bytearray | str)), key=len)
        values = [next((value for value in named or others[::-1] if value), b"")]
    for value in values or [b""]:
        if isinstance(value, str):  # text/* or JSON, as TorchServe's own handlers take images
            # With or without a data URI's head, line breaks and padding; either alphabet.
            text = "".join(value[value.find(";base64,") + 8 if value.startswith("data:") else 0 :].split())
            text = text.translate(URL_SAFE).rstrip("=")
            try:
                value = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
            except ValueError:
                message = f"The request is text that is not audio in base64. {SEND_AUDIO}."
                raise refusal(HTTPStatus.BAD_REQUEST, "NotAudio", message) from None
        if not isinstance(value, bytes | bytearray):
            message = f'The request is JSON without audio. {SEND_AUDIO}, or {{"data": "<the file in base64>"}}.'
            raise refusal(HTTPStatus.BAD_REQUEST, "NotAudio", message)
        if not value:
            hint = "with curl: -T speech.wav, or --data-binary @speech.wav -H 'Content-Type: application/octet-stream'"
            message = f"The request has no audio. {SEND_AUDIO} ({hint})."
            raise refusal(HTTPStatus.BAD_REQUEST, "EmptyBody", message)
        yield value


# From bytes to a waveform


def decode_audio(
    audio: bytes | bytearray,
    notes: list[str] | None = None,
    longest: int = DEFAULTS["max_audio_seconds"],
    left: float = math.inf,
    used: float = math.inf,
) -> torch.Tensor:
    """Decode an audio file of any sample rate, channel count and bit depth, as far as it goes.

    PyAV, because its wheel brings FFmpeg along: nothing has to be installed on the system.

    Args:
        audio (bytes or bytearray): the file.
        notes (list[str] or None): gets a sentence for the caller about each thing that had to be mended.
        longest (int): that all audio of a request may be together, in seconds.
        left (float): of that, for this file.
        used (float): this thread's processor time when the request came, in seconds.

    Returns:
        Tensor: (samples,), float32, full scale 1.0, mono, at ``SAMPLE_RATE``.

    Raises:
        PredictionException: the bytes are no audio file, or it has no audio, or too much, or costs too much to decode.
    """
    # Grows in place: of an hour, the pieces and the whole beside each other are hundreds of megabytes.
    samples, notes = bytearray(), [] if notes is None else notes
    try:
        with (
            limited_memory(longest),
            av.open(io.BytesIO(audio), options=FFMPEG_OPTIONS, metadata_errors="replace") as container,
        ):
            if not container.streams.audio:
                message = f"The file has no audio stream. {SEND_AUDIO}."
                raise refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "NoAudioStream", message)
            for piece in resampled(sound_frames(container, longest, left, used, notes)):
                samples += piece.numpy().data
    except av.error.DecoderNotFoundError:
        message = f"There is no decoder for the file's sound. {SEND_AUDIO}."
        raise refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "NoDecoder", message) from None
    except MemoryError:
        raise too_costly() from None
    except (av.FFmpegError, ValueError, ZeroDivisionError):
        notes.append("The file is damaged or cut off; what could be read was transcribed.")
    if not samples:
        kind, what = ("NotAudio", "is not audio I can read") if notes else ("NoSamples", "has no samples of sound")
        message = f"What was sent ({len(audio)} bytes) {what}. {SEND_AUDIO}."
        raise refusal(HTTPStatus.BAD_REQUEST, kind, message)
    return sane(torch.frombuffer(samples, dtype=torch.float32), notes)


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


def too_costly() -> PredictionException:
    message = "To decode the file takes too much time or memory: convert it, to FLAC for instance."
    return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooCostly", message)


def sound_frames(
    container: av.container.InputContainer, longest: int, left: float, used: float, notes: list[str]
) -> Iterator[tuple[float, av.AudioFrame]]:
    """The sound's frames as they are, each with the seconds in which there is no sound before it.

    Raises:
        PredictionException: they last longer than ``left`` seconds, or take too long to decode.
    """
    damaged, seconds = False, 0.0
    origin = (container.start_time or 0) / av.time_base
    for packet in container.demux(audio=0):
        if time.thread_time() - used > DECODING_SECONDS + DECODING_RATE * (longest - left + seconds):
            raise too_costly()
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            frames, damaged = [], True
        for frame in frames:
            if not SAMPLE_RATES[0] <= frame.sample_rate <= SAMPLE_RATES[1]:
                damaged = True
                continue
            gap = 0.0 if frame.time is None else frame.time - origin - seconds
            gap = gap if GAP < gap < left - seconds else 0.0
            damaged = damaged or (gap > 0 and seconds > 0)
            # Before resampling: one small frame that claims a few samples a second would become gigabytes.
            seconds += gap + frame.samples / frame.sample_rate
            if seconds > left + 0.001:
                declared = f" (it says of itself: {container.duration / 1e6:.0f} s)" if container.duration else ""
                message = f"The audio is longer than {longest} s, the most for a request{declared}: send it in pieces."
                raise refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "AudioTooLong", message)
            yield gap, frame
    if damaged:
        notes.append("The file is damaged or has gaps; what could be read was transcribed.")


def resampled(frames: Iterator[tuple[float, av.AudioFrame]]) -> Iterator[torch.Tensor]:
    """Bring decoded frames to ``SAMPLE_RATE`` and mix their channels: pieces (samples,), float32.

    Packed samples, because PyAV crashes on planar frames of eight channels and more.
    """
    resampler, source = None, None
    for gap, frame in frames:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != source or gap:  # also midway, in files that were joined
            if resampler:
                yield from map(mono, resampler.resample(None))  # what is left in it
            # In pieces of some seconds: one for every decoded frame would take three times as long.
            resampler = av.AudioResampler(format="flt", rate=SAMPLE_RATE, frame_size=4 * SAMPLE_RATE)
            source = kind
            yield torch.zeros(round(gap * SAMPLE_RATE))
        yield from map(mono, resampler.resample(frame))
    if resampler:
        yield from map(mono, resampler.resample(None))


def mono(frame: av.AudioFrame) -> torch.Tensor:
    """The mean of the channels, (samples,): FFmpeg's own downmix would be 3 dB louder than either side."""
    return torch.from_numpy(frame.to_ndarray()).view(frame.samples, -1).mean(dim=1)


def sane(waveform: torch.Tensor, notes: list[str]) -> torch.Tensor:
    """``waveform`` without what is no number, and within full scale; adds to ``notes`` what was done.

    Raises:
        PredictionException: most of it is no number.
    """
    peak = float(torch.linalg.vector_norm(waveform, math.inf))  # of an hour, .abs() would be 230 MB more
    if not math.isfinite(peak):
        finite = waveform.isfinite()
        missing = len(waveform) - int(finite.sum())
        if 2 * missing > len(waveform):
            message = f"The samples are no sound: most of them are not numbers. {SEND_AUDIO}."
            raise refusal(HTTPStatus.BAD_REQUEST, "NotAudio", message)
        notes.append(f"{missing} samples that are not numbers were taken for silence.")
        waveform = waveform.where(finite, 0.0)
        peak = float(waveform.abs().max())
    if peak > LOUDEST:  # float files only; often integers that nobody has scaled
        # All but the loudest: a single wrong sample must not make silence of the others.
        level = float(waveform.abs().kthvalue(math.ceil(0.9999 * len(waveform))).values)
        notes.append(f"The samples reach {peak:.3g} times full scale and were scaled down to it.")
        waveform = (waveform / max(level, 1.0)).clamp(-1.0, 1.0)
    return waveform


# From waveforms to tokens


class ModelHandler:
    """One worker's model: TorchServe calls ``initialize`` once and ``handle`` for every batch of requests.

    Attributes:
        model (torch.jit.ScriptModule): the engine, a scripted ``torchaudio.models.RNNTBeamSearch`` or a drop-in.
        device (torch.device): where it runs.
        initialized (bool): whether ``initialize`` has succeeded.
    """

    known_settings = DEFAULTS  # of the section ``handler`` in model-config.yaml

    def __init__(self) -> None:
        self.model = None
        self.device = None
        self.initialized = False

    def initialize(self, context) -> None:
        """Load the model and build the feature extractor and the token processor, once for all requests.

        Args:
            context (ts.context.Context): ``system_properties`` (``model_dir``, ``gpu_id``), ``manifest`` and
                ``model_yaml_config`` are read.

        Raises:
            ValueError: model-config.yaml has a handler setting that does not exist or cannot have that value, or names
                another SHA-256 than the model file has.
            FileNotFoundError: the archive has no model file.
        """
        properties = context.system_properties
        self.settings = settings_of(context, self.known_settings)
        torch.set_num_threads(self.settings["num_threads"])
        if self.settings["num_threads"] > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
            # OpenMP reads it when torch is loaded, which TorchServe has done by now.
            logger.warning("num_threads > 1: start TorchServe with OMP_WAIT_POLICY=passive, or it is many times slower")
        model_path = Path(properties["model_dir"]) / context.manifest["model"]["serializedFile"]
        if not model_path.is_file():
            raise FileNotFoundError(f"The archive has no model file {model_path.name}.")
        if self.settings["sha256"]:
            with model_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = hashlib.sha256(content).hexdigest()
            if found != self.settings["sha256"]:
                raise ValueError(f"{model_path.name} has the SHA-256 {found}, not the one in model-config.yaml.")
        files = dict.fromkeys(EXTRA_FILES, "")
        model = torch.jit.load(str(model_path), map_location="cpu", _extra_files=files).eval()
        self._build_processors(files)
        metadata = json.loads(files["metadata.json"] or "{}")
        gpu_id = properties.get("gpu_id")
        on_gpu = gpu_id is not None and torch.cuda.is_available()
        if on_gpu and metadata.get("precision") == "int8":
            logger.warning("An int8 model runs on the CPU: PyTorch has its products for no GPU. Export fp32 or bf16.")
            on_gpu = False
        self.device = torch.device(f"cuda:{gpu_id}" if on_gpu else "cpu")
        self.model = model.to(self.device)
        self.model_name = metadata.get("model", model_path.stem)
        self.word_delays = metadata.get("word_delays", {"start": 0.0, "end": 0.0})  # seconds, see export_model.py
        if hasattr(self.model, "decode"):
            self.model.window_segments = self.settings["window_segments"]
        else:
            limits = (self.settings["max_audio_seconds"], MAX_AUDIO_SECONDS_WITHOUT_OUR_ENGINE)
            self.settings["max_audio_seconds"] = min(limits)
        logger.info("Loaded %s on %s, settings %s: %s", model_path.name, self.device, self.settings, metadata)

        self._warm_up()
        # All that is here now stays. To look through it again and again would stop the worker for a tenth of a second
        # and more, every few hundred requests.
        gc.collect()
        gc.freeze()
        self.initialized = True

    def _build_processors(self, files: dict[str, bytes | str]) -> None:
        """Build torchaudio's extractor and token processor, on the files that came with the model.

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
            self.extract_features = bundle.get_feature_extractor()
            self.tokens_to_text = bundle.get_token_processor()

    def _warm_up(self) -> None:
        """Transcribe noise of several lengths, so that no request pays for TorchScript's optimisation."""
        generator = torch.Generator().manual_seed(0)
        for run in range(WARM_UP_RUNS):
            waveform = torch.randn((run + 1) * SAMPLE_RATE, generator=generator) * 0.1
            self._search([self._features(waveform)])

    def handle(self, data: list[dict], context) -> list[str | dict]:
        """Answer a batch of requests; nothing that is wrong with one of them reaches the others.

        Args:
            data (list[dict]): one dict a request, field name to content; a raw body is the field ``body``.
            context (ts.context.Context): has each request's headers, takes its status, content type and metrics.

        Returns:
            list[str | dict]: in the order of ``data``, an answer each in the format that was asked for, by default the
            transcript; for a request that cannot be answered an object with ``code``, ``type`` and ``message``, sent
            with that HTTP status.
        """
        started = time.perf_counter()
        answers: list[str | dict] = [{}] * len(data)
        sounds: dict[int, list[dict]] = {}  # by place in the batch; a request may hold several files
        spent: Counter[str] = Counter()  # seconds by step
        for index, request in enumerate(data):
            try:
                headers = context.get_all_request_header(index)
                if not any(isinstance(value, str) for value in headers.values()):
                    # Without an HTTP header it came over gRPC, where the worker is killed if the answer to a
                    # StreamPredictions call does not say that it is the last one.
                    context.set_response_header(index, "ts_stream_next", "false")
                sounds[index] = self._sounds(request, headers, spent)
            except Exception as error:
                answers[index] = refused(index, context, error)
        every = [sound for request in sounds.values() for sound in request]
        searching = time.perf_counter()
        for sound, heard in zip(every, self._transcribe([sound.pop("features") for sound in every]), strict=True):
            sound["heard"] = heard
        spent["engine"] = time.perf_counter() - searching
        for index, request in sounds.items():
            try:
                answers[index] = self._answer(index, context, request, "instances" in json_body(data[index]))
            except Exception as error:
                answers[index] = refused(index, context, error)
        spent["handler"] = time.perf_counter() - started
        seconds = sum(sound["duration"] for sound in every)
        measure(context, "asr_audio_seconds", seconds, MetricTypes.COUNTER)
        measure(context, "asr_batch_size", len(data))
        for step in ("decode", "features", "engine", "handler"):
            measure(context, f"asr_{step}_seconds", spent[step])
        if seconds:
            measure(context, "asr_real_time_factor", spent["handler"] / seconds)
        logger.info("Answered %d requests with %.2f s of audio in %.3f s", len(data), seconds, spent["handler"])
        return answers

    def _sounds(self, request: dict, headers: dict, spent: Counter[str]) -> list[dict]:
        """Each audio file of a request, ready for the engine: its features (T, 80), duration and notes."""
        response_format = format_of(request, headers, has_times=hasattr(self.model, "decode"))
        sounds, used = [], time.thread_time()
        left = longest = self.settings["max_audio_seconds"]  # for all its files together
        for audio in audio_files(request):
            started, notes = time.perf_counter(), []
            try:
                waveform = decode_audio(audio, notes, longest, left, used)
            finally:
                decoded = time.perf_counter()
                spent["decode"] += decoded - started
            features, duration = self._features(waveform), len(waveform) / SAMPLE_RATE
            spent["features"] += time.perf_counter() - decoded
            left -= duration
            sounds.append({"format": response_format, "features": features, "duration": duration, "notes": notes})
        return sounds

    def _features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Features (T, 80) of a waveform (samples,) at ``SAMPLE_RATE``, piece by piece."""
        missing = SEGMENT_SAMPLES - len(waveform)
        if missing > 0:  # the extractor and the encoder need one segment; silence says nothing
            waveform = torch.nn.functional.pad(waveform, (0, missing))
        # The extractor centres a frame on every hop and mirrors the samples at both ends of what it is given. A
        # piece gets as many hops more on either side as half a window covers, and its mirrored frames are dropped:
        # what remains are the frames of the whole.
        margin = -(-WINDOW_SAMPLES // 2 // HOP_SAMPLES)  # hops
        last = len(waveform) // HOP_SAMPLES  # frame
        pieces = []
        with torch.inference_mode():
            for first in range(0, last + 1, PIECE_HOPS):
                begin, end = max(first - margin, 0), first + PIECE_HOPS + margin
                piece, _ = self.extract_features(waveform[begin * HOP_SAMPLES : end * HOP_SAMPLES])
                # The last piece keeps the frames of right context that the extractor puts behind everything.
                stop = None if first + PIECE_HOPS > last else first - begin + PIECE_HOPS
                pieces.append(piece[first - begin : stop])
            return torch.cat(pieces)

    def _search(self, features: list[torch.Tensor]) -> list[list[tuple]]:
        """Hypotheses for each of ``features`` (T, 80), the best first: (tokens, score, frames, log_probs).

        The tokens have the leading blank, the frames and log-probabilities have not; a plain RNNTBeamSearch has none.
        """
        features = [utterance.to(self.device) for utterance in features]
        beam_width = self.settings["beam_width"]
        with torch.inference_mode():
            if hasattr(self.model, "decode"):
                return [
                    [(h[0], h[3], frames, log_probs) for h, frames, log_probs in zip(*beam[:3], strict=True)]
                    for beam in self.model.decode(features, beam_width)
                ]
            lengths = [torch.tensor([len(utterance)], device=self.device) for utterance in features]
            beams = [self.model(*one, beam_width) for one in zip(features, lengths, strict=True)]
            return [[(h[0], h[3], None, None) for h in beam] for beam in beams]

    def _transcribe(self, features: list[torch.Tensor]) -> list[list[tuple] | Exception]:
        """The hypotheses for each of ``features`` (T, 80), or what made it fail."""
        try:
            return self._search(features)
        except Exception as error:
            if len(features) == 1:
                return [error]
            logger.warning("A batch of %d failed and is taken one by one", len(features), exc_info=error)
            return [self._transcribe([utterance])[0] for utterance in features]

    def _answer(self, index: int, context, sounds: list[dict], several: bool) -> str | dict:
        """One request's answer, in the format that it asked for; sets its content type."""
        answers = []
        for sound in sounds:
            if isinstance(sound["heard"], Exception):
                raise sound["heard"]
            answers.append(self._formatted(sound))
        content_type = "application/json" if several else FORMATS[sounds[0]["format"]][0]
        context.set_response_content_type(index, content_type)
        mended = [" ".join(sound["notes"]) for sound in sounds if sound["notes"]]
        if mended:
            note = f"{len(mended)} of the files had to be mended: ask for verbose_json." if several else mended[0]
            context.set_response_header(index, "x-audio-notes", note)
        measure(context, "asr_requests", 1, MetricTypes.COUNTER, Outcome="ok")
        return {"predictions": answers} if several else answers[0]

    def _formatted(self, sound: dict) -> str | dict:
        """The answer for one file, in the format that was asked for."""
        best, *_ = hypotheses = sound["heard"]
        text = self.tokens_to_text(best[0])
        if sound["format"] == "text":
            return text
        if sound["format"] == "json":
            return {"text": text}
        words = words_of(*best, sound["duration"], self.tokens_to_text, self.word_delays)
        segments = segments_of(words)
        if sound["format"] != "verbose_json":
            return subtitles(segments, sound["format"])
        answer = {
            "text": text,
            "duration": round(sound["duration"], 3),
            "language": "english",
            "model": self.model_name,
        }
        answer["segments"] = [{"id": i} | segment for i, segment in enumerate(segments)]
        answer["words"] = [{name: word[name] for name in ("word", "start", "end", "probability")} for word in words]
        if self.settings["beam_width"] > 1:
            scores: dict[str, float] = {}
            for tokens, score, *_ in hypotheses:
                scores.setdefault(self.tokens_to_text(tokens), round(score, 4))
            answer["alternatives"] = [{"text": text, "score": score} for text, score in scores.items()]
        return answer | ({"notes": sound["notes"]} if sound["notes"] else {})


# From tokens to the answer


def words_of(
    tokens: list[int],
    score: float,
    frames: list[int],
    log_probs: list[float],
    duration: float,
    processor: Callable,
    word_delays: dict[str, float],
) -> list[dict]:
    """The words of a hypothesis, with times in seconds and probabilities.

    A word begins at its first token, or where the model marked its beginning by a token that is not text, and ends
    after its last; both are corrected by ``word_delays``, in seconds.
    """
    pieces, marks = processor.sp_model, processor.post_process_remove_list
    words: list[dict] = []
    mark = []  # frame and log-probability of the mark before this token
    for token, frame, log_prob in zip(tokens[1:], frames, log_probs, strict=True):
        if token in marks:
            mark = [(frame, log_prob)]
            continue
        piece = pieces.id_to_piece(token)
        if piece.startswith("\u2581") or not words:
            words.append({"word": "", "log_probs": [p for _, p in mark], "first": mark[0][0] if mark else frame})
        words[-1]["word"] += piece.replace("\u2581", "")
        words[-1]["last"] = frame + 1
        words[-1]["log_probs"].append(log_prob)
        mark = []
    words = [word for word in words if word["word"]]
    latest = 0.0
    for word in words:
        start = word["first"] * FRAME_SECONDS - word_delays["start"]
        end = word["last"] * FRAME_SECONDS - word_delays["end"]
        word["start"] = round(min(max(start, latest), duration), 3)
        word["end"] = latest = round(min(max(end, word["start"]), duration), 3)
        word["probability"] = round(math.exp(min(sum(word["log_probs"]), 0.0)), 4)
    return words


def segments_of(words: list[dict]) -> list[dict]:
    """Words joined to what a subtitle holds: up to a pause, seven seconds and two lines."""
    groups: list[list[dict]] = []
    for word in words:
        group = groups[-1] if groups else []
        text = " ".join(other["word"] for other in [*group, word])
        if (
            not group
            or word["start"] - group[-1]["end"] > PAUSE
            or word["end"] - group[0]["start"] > SEGMENT_SECONDS
            or len(LINES.wrap(text)) > 2
        ):
            groups.append([])
        groups[-1].append(word)
    return [
        {
            "start": group[0]["start"],
            "end": group[-1]["end"],
            "text": " ".join(word["word"] for word in group),
            "avg_logprob": round(statistics.fmean(p for word in group for p in word["log_probs"]), 4),
        }
        for group in groups
    ]


def subtitles(segments: list[dict], kind: str) -> str:
    """``segments`` as ``srt`` (SubRip) or ``vtt`` (WebVTT)."""
    cues = []
    for number, segment in enumerate(segments, start=1):
        times = " --> ".join(clock(segment[end], "," if kind == "srt" else ".") for end in ("start", "end"))
        cues.append(f"{number}\n{times}\n{LINES.fill(segment['text'])}\n")
    return "\n".join(cues if kind == "srt" else ["WEBVTT\n", *cues])


def clock(seconds: float, point: str) -> str:
    """As subtitles write it: hours, minutes, seconds and milliseconds."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


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
