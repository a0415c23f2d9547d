"""TorchServe handler for torchaudio's Emformer RNN-T: audio bytes in, transcript out.

The archive needs this file and the TorchScript model that export_model.py wrote, nothing else. Every
request takes the same way, from top to bottom of this file:

    request -> bytes -> waveform (mono, 16 kHz) -> features (T, 80) -> tokens -> text

Settings come from the ``handler`` section of an archive's model-config.yaml, see ``DEFAULTS``.
"""

import base64
import dataclasses
import io
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sized
from http import HTTPStatus
from pathlib import Path

import av
import torch
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

logger = logging.getLogger(__name__)

DEFAULTS = {
    "beam_width": 1,  # hypotheses kept after each frame of the search
    "num_threads": 1,  # torch threads of this worker: more, in several workers, would fight for the cores
    "max_audio_seconds": 3600,  # longer audio is refused
}
# A model file that holds a plain RNNTBeamSearch takes time and memory that grow with the square of the length.
MAX_AUDIO_SECONDS_WITHOUT_OUR_ENGINE = 120

# FFmpeg opens what these demuxers know and nothing else: no playlist that names other files, no other protocol.
FFMPEG_OPTIONS = {
    "format_whitelist": "wav,w64,flac,ogg,mp3,aac,mov,matroska,aiff,au,caf,amr",
    "protocol_whitelist": "none",
}
SEND_AUDIO = "Send the bytes of an audio file (WAV, FLAC, MP3, Ogg/Opus, M4A, WebM, ...) as the request body"

# What export_model.py puts into the model file.
EXTRA_FILES = ("metadata.json", "global_stats.json", "tokenizer.model")
# Features are extracted in pieces of this many hops (one minute): the spectrum of an hour would take a gigabyte.
PIECE_HOPS = 6000
# Runs before the first request: TorchScript profiles the first two calls and optimises on the third.
WARM_UP_RUNS = 4


class ModelHandler:
    """One worker's model: TorchServe calls ``initialize`` once and ``handle`` for every batch of requests.

    Attributes:
        model (torch.jit.ScriptModule): the engine, a scripted ``torchaudio.models.RNNTBeamSearch`` or a drop-in.
        device (torch.device): where it runs.
        initialized (bool): whether ``initialize`` has succeeded.
    """

    # Inside, because TorchServe takes a handler's module for broken if it defines a second class.
    class RequestError(Exception):
        """A request that cannot be answered, as (HTTP status, type, message to the caller)."""

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
            ValueError: model-config.yaml has a handler setting that does not exist or is no whole number from 1.
            FileNotFoundError: the archive has no model file.
        """
        properties = context.system_properties
        self.settings = self._settings(context)
        torch.set_num_threads(self.settings["num_threads"])
        gpu_id = properties.get("gpu_id")
        on_gpu = gpu_id is not None and torch.cuda.is_available()
        self.device = torch.device(f"cuda:{gpu_id}" if on_gpu else "cpu")

        model_path = Path(properties["model_dir"]) / context.manifest["model"]["serializedFile"]
        if not model_path.is_file():
            raise FileNotFoundError(f"The archive has no model file {model_path.name}.")
        files = dict.fromkeys(EXTRA_FILES, "")
        self.model = torch.jit.load(str(model_path), map_location=self.device, _extra_files=files).eval()
        self._build_processors(files)
        metadata = json.loads(files["metadata.json"] or "{}")
        if not hasattr(self.model, "decode"):
            limits = (self.settings["max_audio_seconds"], MAX_AUDIO_SECONDS_WITHOUT_OUR_ENGINE)
            self.settings["max_audio_seconds"] = min(limits)
        logger.info("Loaded %s on %s, settings %s: %s", model_path.name, self.device, self.settings, metadata)

        self._warm_up()
        self.initialized = True

    @staticmethod
    def _settings(context) -> dict[str, int]:
        given = (getattr(context, "model_yaml_config", None) or {}).get("handler") or {}
        for name, value in given.items():
            if name not in DEFAULTS:
                raise ValueError(f"model-config.yaml: handler has no setting {name!r}; it has {', '.join(DEFAULTS)}.")
            if type(value) is not int or value < 1:  # a bool is an int, too
                raise ValueError(f"model-config.yaml: handler: {name} must be a whole number from 1, not {value!r}.")
        return DEFAULTS | given

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
        self.sample_rate = bundle.sample_rate
        self.hop_samples = bundle.hop_length
        self.window_samples = bundle.n_fft
        self.segment_samples = bundle.segment_length * bundle.hop_length

    def _warm_up(self) -> None:
        """Transcribe noise of several lengths, so that no request pays for TorchScript's optimisation."""
        generator = torch.Generator().manual_seed(0)
        for run in range(WARM_UP_RUNS):
            waveform = torch.randn((run + 1) * self.sample_rate, generator=generator) * 0.1
            self._tokens([self._features(waveform)])

    def handle(self, data: list[dict], context) -> list[str | dict]:
        """Answer a batch of requests; nothing that is wrong with one of them reaches the others.

        Args:
            data (list[dict]): one dict a request, field name to content; a raw body is the field ``body``.
            context (ts.context.Context): takes each request's status and content type.

        Returns:
            list[str | dict]: in the order of ``data``, a transcript each, or for a request that cannot be
            answered an object with ``code``, ``type`` and ``message``, sent with that HTTP status.
        """
        started = time.perf_counter()
        answers: list[str | dict] = [{}] * len(data)
        features, seconds = {}, 0.0  # by place in the batch: of those requests whose audio can be read
        for index, request in enumerate(data):
            try:
                waveform = self._waveform(self._audio_bytes(request))
                features[index] = self._features(waveform)
                seconds += len(waveform) / self.sample_rate
            except Exception as error:
                answers[index] = self._error(index, context, error)
        for index, text in zip(features, self._transcribe([*features.values()]), strict=True):
            if isinstance(text, Exception):
                answers[index] = self._error(index, context, text)
            else:
                context.set_response_content_type(index, "text/plain; charset=utf-8")
                answers[index] = text
        elapsed = time.perf_counter() - started
        logger.info("Answered %d requests with %.2f s of audio in %.3f s", len(data), seconds, elapsed)
        return answers

    def _error(self, index: int, context, error: Exception) -> dict:
        """Set one request's HTTP status; returns the object that TorchServe sends as its JSON body."""
        if isinstance(error, self.RequestError):
            status, kind, message = error.args
        else:
            logger.error("Request %d of the batch failed", index, exc_info=error)
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError"
            message = "The server failed on this request; its log says why. The audio may be sent again."
        context.set_response_status(status.value, status.phrase, index)
        context.set_response_content_type(index, "application/json")
        return {"code": status.value, "type": kind, "message": message}

    def _audio_bytes(self, request: dict) -> bytes | bytearray:
        """The audio file in a request, however it was sent: raw body, form field, base64 text or JSON.

        Raises:
            RequestError: there is none.
        """
        # A form may have other fields beside the file, under any name: the file is the longest.
        fields = [value for value in request.values() if value]
        value = max(fields, key=lambda field: len(field) if isinstance(field, Sized) else 0, default=None)
        if isinstance(value, dict):  # a JSON object
            value = value.get("data")
        if isinstance(value, str):  # text/* or JSON, as TorchServe's own handlers take images
            try:
                value = base64.b64decode("".join(value.split()), validate=True)
            except ValueError:
                message = f"The request is text that is not audio in base64. {SEND_AUDIO}."
                raise self.RequestError(HTTPStatus.BAD_REQUEST, "NotAudio", message) from None
        if value is not None and not isinstance(value, bytes | bytearray):
            message = f'The request is JSON without audio. {SEND_AUDIO}, or {{"data": "<the file in base64>"}}.'
            raise self.RequestError(HTTPStatus.BAD_REQUEST, "NotAudio", message)
        if not value:
            hint = "with curl: -T speech.wav, or --data-binary @speech.wav -H 'Content-Type: application/octet-stream'"
            message = f"The request has no audio. {SEND_AUDIO} ({hint})."
            raise self.RequestError(HTTPStatus.BAD_REQUEST, "EmptyBody", message)
        return value

    def _waveform(self, audio: bytes | bytearray) -> torch.Tensor:
        """Decode an audio file of any sample rate, channel count and bit depth.

        PyAV, because its wheel brings FFmpeg along: nothing has to be installed on the system.

        Args:
            audio (bytes or bytearray): the file.

        Returns:
            Tensor: (samples,), float32, full scale 1.0, mono, at ``self.sample_rate``.

        Raises:
            RequestError: the bytes are no audio file, or it has no audio, or too much of it.
        """
        chunks, samples = [], 0
        try:
            with av.open(io.BytesIO(audio), options=FFMPEG_OPTIONS, metadata_errors="replace") as container:
                if not container.streams.audio:
                    message = f"The file has no audio stream. {SEND_AUDIO}."
                    raise self.RequestError(HTTPStatus.BAD_REQUEST, "NoAudioStream", message)
                for frame in self._resampled(container.decode(audio=0)):
                    packed = torch.from_numpy(frame.to_ndarray())  # (1, samples * channels)
                    # The mean of the channels: FFmpeg's own downmix would be 3 dB louder than either side.
                    chunks.append(packed.view(frame.samples, -1).mean(dim=1))  # (samples,)
                    samples += frame.samples
        except (av.FFmpegError, ValueError, ZeroDivisionError):
            where = f"is damaged after {samples / self.sample_rate:.2f} s" if samples else "is not audio I can read"
            message = f"What was sent ({len(audio)} bytes) {where}. {SEND_AUDIO}."
            raise self.RequestError(HTTPStatus.BAD_REQUEST, "NotAudio", message) from None
        if samples == 0:
            message = f"The audio stream is empty: zero samples. {SEND_AUDIO}."
            raise self.RequestError(HTTPStatus.BAD_REQUEST, "NoSamples", message)
        return torch.cat(chunks)

    def _resampled(self, frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
        """Bring decoded frames to ``self.sample_rate``, all channels kept, as packed float32.

        Packed, because PyAV crashes on planar frames of eight channels and more.

        Raises:
            RequestError: the frames last longer than ``max_audio_seconds``.
        """
        limit = self.settings["max_audio_seconds"]
        seconds, resampler, source = 0.0, None, None
        for frame in frames:
            # Before resampling: one small frame that claims a few samples a second would become gigabytes.
            seconds += frame.samples / frame.sample_rate
            if seconds > limit:
                message = f"The audio is longer than the {limit} s that this server takes: send it in pieces."
                raise self.RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "AudioTooLong", message)
            if (
                frame.format.name,
                frame.layout.name,
                frame.sample_rate,
            ) != source:  # also midway, in files that were joined
                if resampler:
                    yield from resampler.resample(None)  # what is left in it
                resampler = av.AudioResampler(format="flt", rate=self.sample_rate)
                source = (frame.format.name, frame.layout.name, frame.sample_rate)
            yield from resampler.resample(frame)
        if resampler:
            yield from resampler.resample(None)

    def _features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Features (T, 80) of a waveform (samples,) at ``self.sample_rate``, piece by piece.

        Raises:
            RequestError: the samples are not finite, or too large to be squared.
        """
        missing = self.segment_samples - len(waveform)
        if missing > 0:  # the extractor and the encoder need one segment; silence says nothing
            waveform = torch.nn.functional.pad(waveform, (0, missing))
        # The extractor centres a frame on every hop and mirrors the samples at both ends of what it is given. A
        # piece gets as many hops more on either side as half a window covers, and its mirrored frames are dropped:
        # what remains are the frames of the whole.
        margin = -(-self.window_samples // 2 // self.hop_samples)  # hops
        last = len(waveform) // self.hop_samples  # frame
        pieces = []
        with torch.inference_mode():
            for first in range(0, last + 1, PIECE_HOPS):
                begin, end = max(first - margin, 0), first + PIECE_HOPS + margin
                piece, _ = self.extract_features(waveform[begin * self.hop_samples : end * self.hop_samples])
                # The last piece keeps the frames of right context that the extractor puts behind everything.
                stop = None if first + PIECE_HOPS > last else first - begin + PIECE_HOPS
                pieces.append(piece[first - begin : stop])
                if not piece.isfinite().all():  # it would spoil every score of the search
                    message = f"The samples are no sound: not numbers, or far beyond full scale. {SEND_AUDIO}."
                    raise self.RequestError(HTTPStatus.BAD_REQUEST, "NotAudio", message)
            return torch.cat(pieces)

    def _tokens(self, features: list[torch.Tensor]) -> list[list[int]]:
        """Tokens of the best hypothesis for each of ``features`` (T, 80)."""
        features = [utterance.to(self.device) for utterance in features]
        beam_width = self.settings["beam_width"]
        with torch.inference_mode():
            if hasattr(self.model, "decode"):
                return [beam.hypotheses[0][0] for beam in self.model.decode(features, beam_width)]
            lengths = [torch.tensor([len(utterance)], device=self.device) for utterance in features]
            return [self.model(*one, beam_width)[0][0] for one in zip(features, lengths, strict=True)]

    def _transcribe(self, features: list[torch.Tensor]) -> list[str | Exception]:
        """The text of each of ``features`` (T, 80), or what made it fail."""
        try:
            return [self.tokens_to_text(tokens) for tokens in self._tokens(features)]
        except Exception as error:
            if len(features) == 1:
                return [error]
            logger.warning("A batch of %d failed and is taken one by one", len(features), exc_info=error)
            return [self._transcribe([utterance])[0] for utterance in features]
