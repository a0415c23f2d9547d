"""Live transcription for TorchServe: the text appears while the person speaks.

The handler of an archive of its own, which handler.py goes into as an extra file. Its model-config.yaml turns
``sequenceBatching`` on: TorchServe then brings all requests of a sequence to one worker, which keeps the sequence's
state between them. A sequence is one utterance, sent in pieces, each
a POST of raw 16-bit little-endian mono PCM with these request headers:

    ts_request_sequence_id   the client's name for the utterance, the same for all its pieces
    x-piece                  the piece's number, from 0
    x-last-piece             true with the last piece; one more, empty one says that its answer has come
    x-sample-rate            of the first piece and so of all, in Hz; 16000 if it is not there
    x-hotwords               with the first piece: phrases that are expected, see ``handler.hotwords_of``

The answer is JSON: ``sequence``, ``piece``, ``text`` (the best transcript so far), ``stable`` (how many of its
characters will not change any more), ``final`` and, with the last piece, ``words``. The final text is that of the whole
sound in one request, token for token (at fp32), whatever the sizes of the pieces.
"""

import dataclasses
import itertools
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

import av
import numpy as np
import torch
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import PredictionException

from handler import (
    DEFAULTS,
    HOP_SAMPLES,
    RIGHT_CONTEXT,
    SAMPLE_RATE,
    SEGMENT_SAMPLES,
    WINDOW_SAMPLES,
    ModelHandler,
    measure,
    mono,
    refusal,
    refused,
    words_of,
)

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NUMBER = re.compile(r"[0-9]{1,9}")
RATES = (8_000, 192_000)  # Hz
MAX_PIECE_SECONDS = 30  # in one request, so that nobody makes the others of a batch wait for long
TOGETHER = 60  # seconds of sound whose features are extracted in one call: more takes hundreds of megabytes
# TorchServe finds a sequence's name in this request header. It keeps its place in a worker until it is idle for too
# long, unless an answer has the other one: then the place is free at once, and what still waits for it is lost.
SEQUENCE_ID, SEQUENCE_END = "ts_request_sequence_id", "ts_request_sequence_end"
# Ids of sequences that are over, remembered so that a late piece is told so.
REMEMBERED = 10_000
# Before the first request: batches of these many streams, some segments each, for TorchScript's optimisation.
WARM_UP_STREAMS, WARM_UP_SEGMENTS = (1, 2, 4, 1), 4
SETTINGS = DEFAULTS | {"max_sequences": 50}  # of a worker, open at a time: the next is refused
# A frame is made of the samples around its hop, as far as ``REACH`` to both sides, which ``MARGIN``, whole hops, holds.
REACH = WINDOW_SAMPLES // 2
MARGIN = -(-REACH // HOP_SAMPLES) * HOP_SAMPLES


# What a request brings


def asked(name: str, headers: dict[str, str]) -> tuple[int, bool]:
    """The number of the piece that a request brings, and whether it is the last.

    Raises:
        PredictionException: the headers do not tell.
    """
    if not NAME.fullmatch(name):
        message = "The header ts_request_sequence_id must name the utterance: 1 to 64 letters, digits, _ or -."
        raise refusal(HTTPStatus.BAD_REQUEST, "NoSequence", message)
    number = headers.get("x-piece", "")
    if not NUMBER.fullmatch(number):
        message = "The header x-piece must be the piece's number, counted from 0."
        raise refusal(HTTPStatus.BAD_REQUEST, "BadPiece", message)
    last = headers.get("x-last-piece", "false").lower()
    if last not in ("true", "false"):
        message = "The header x-last-piece must be true or false."
        raise refusal(HTTPStatus.BAD_REQUEST, "BadPiece", message)
    return int(number), last == "true"


def pcm_of(request: dict) -> np.ndarray:
    """The samples (n,), int16, in a request's body."""
    body = next((request[name] for name in ("body", "data") if name in request), None if request else b"")
    if not isinstance(body, bytes | bytearray) or len(body) % 2:
        message = "The body must be raw 16-bit PCM, sent with Content-Type: application/octet-stream."
        raise refusal(HTTPStatus.BAD_REQUEST, "NotPCM", message)
    return np.frombuffer(body, dtype="<i2")


def waveform_of(sequence: "LiveHandler.Sequence", pcm: np.ndarray, last: bool) -> torch.Tensor:
    """(samples,), float32, full scale 1.0, at the model's rate."""
    if sequence.resampler is None:
        return torch.from_numpy(pcm.astype(np.float32)) / 32_768
    frames = []
    if len(pcm):
        frame = av.AudioFrame.from_ndarray(pcm.astype(np.int16).reshape(1, -1), format="s16", layout="mono")
        frame.rate = sequence.rate
        frames += sequence.resampler.resample(frame)
    if last:
        frames += sequence.resampler.resample(None)
    return torch.cat([torch.empty(0), *(mono(frame, []) for frame in frames)])


# From samples to text


def features_of(work: list[tuple], extractor: torch.nn.Module, nothing: torch.Tensor) -> list[torch.Tensor]:
    """The features (T, 80) that each sequence's new samples complete, exactly those of the whole sound.

    ``work`` holds sequences, what is new of each, and whether it is the last; ``nothing`` is no features, (0, 80).

    torchaudio's extractor centres a frame on every hop and mirrors the samples at both ends of what it is given.
    Here they are mirrored at the utterance's own ends, and between them a frame waits until the last of its samples
    has come. Many sequences' samples stand behind each other in one call: frames that would mix two are not used.
    """
    chunks, counts = [], []
    for sequence, new, last in work:
        begun = sequence.heard > REACH
        sequence.heard += len(new)
        samples = torch.cat([sequence.samples, new])
        if last and sequence.heard < SEGMENT_SAMPLES:  # as in ``ModelHandler._features``
            samples = torch.nn.functional.pad(samples, (0, SEGMENT_SAMPLES - sequence.heard))
        if not begun and len(samples) > REACH:
            mirrored = torch.nn.functional.pad(samples[1 : REACH + 1].flip(0), (MARGIN - REACH, 0))
            samples = torch.cat([mirrored, samples])
        if last:
            samples = torch.cat([samples, samples[-REACH - 1 : -1].flip(0)])
        # The next frame's hop is ``MARGIN`` samples from the beginning.
        count = max((len(samples) - MARGIN - REACH) // HOP_SAMPLES + 1, 0)
        sequence.samples = samples[count * HOP_SAMPLES :].clone()
        chunks.append(torch.nn.functional.pad(samples, (0, -len(samples) % HOP_SAMPLES)) if count else samples[:0])
        counts.append(count)
    features, most = [], TOGETHER * SAMPLE_RATE
    ends = list(itertools.accumulate(map(len, chunks)))
    for _, places in itertools.groupby(range(len(work)), lambda i: ends[i] // most):
        group, begin = list(places), MARGIN // HOP_SAMPLES
        samples = torch.cat([chunks[i] for i in group])
        everything = extractor(samples)[0] if len(samples) else nothing
        for i in group:
            own = everything[begin : begin + counts[i]] if counts[i] else nothing
            # The last frames of the whole are its right context.
            features.append(torch.cat([own, everything[-RIGHT_CONTEXT:]]) if work[i][2] else own)
            begin += len(chunks[i]) // HOP_SAMPLES
    return features


def transcript(
    name: str,
    sequence: "LiveHandler.Sequence",
    number: int,
    last: bool,
    processor: Callable,
    word_delays: dict[str, float],
) -> dict:
    """The answer to a piece."""
    _, _, _, (hypotheses, frames, log_probs, *_), (settled, settled_frames, settled_log_probs) = sequence.stream
    blank, best = hypotheses[0][0][:1], hypotheses[0][0][1:]

    def text(tokens: list[int]) -> str:
        return processor(blank + tokens, lstrip=False)

    sequence.tokens += settled
    sequence.frames += settled_frames
    sequence.log_probs += settled_log_probs
    sequence.text += text(settled)
    agreed = 0  # more tokens that all hypotheses share: every later one begins with them, too
    for ranked in zip(*(hypothesis[0][1:] for hypothesis in hypotheses), strict=False):
        if len(set(ranked)) > 1:
            break
        agreed += 1
    transcript = (sequence.text + text(best)).lstrip()
    stable = len(transcript) if last else len((sequence.text + text(best[:agreed])).lstrip())
    answer = {"sequence": name, "piece": number, "text": transcript, "stable": stable, "final": last, "words": []}
    if last:
        duration = sequence.heard / SAMPLE_RATE
        emitted = (sequence.frames + frames[0], sequence.log_probs + log_probs[0])
        words = words_of((blank + sequence.tokens + best, hypotheses[0][3], *emitted), duration, processor, word_delays)
        names = ("word", "start", "end", "probability")
        answer["words"] = [{key: word[key] for key in names} for word in words]
        sequence.stream = sequence.resampler = sequence.expected = None  # nothing but the answer is kept
        sequence.samples, sequence.tokens, sequence.frames, sequence.log_probs = torch.empty(0), [], [], []
    return answer


# The server's side


class LiveHandler(ModelHandler):
    """A worker for live speech: a ``ModelHandler`` that keeps the sequences that are open in it.

    Attributes:
        sequences (dict[str, Sequence]): by name, those that are open or have just ended.
        over (dict[str, str]): why each of those before is over, so that a late piece is told so.
    """

    known_settings = SETTINGS

    # Inside, because TorchServe takes a handler's module for broken if it defines a second class.
    @dataclasses.dataclass
    class Sequence:
        """An utterance that is being spoken.

        Attributes:
            stream (Stream or None): the engine's state, see engine/decoder.py; None when the sequence is over.
            rate (int): Hz, of its pieces.
            resampler (av.AudioResampler or None): to the model's rate, where that is another one.
            samples (Tensor): (samples,), those that frames to come are made of, at the model's rate.
            heard (int): samples so far, at the model's rate.
            tokens, frames, log_probs (list): what has settled, see ``Decoder.advance``.
            text (str): of these tokens, with a leading space.
            piece (int): the last piece's number.
            answer (dict): to that piece.
            used (float): time of the last request, in seconds.
            expected (tuple or None): what the engine takes for the phrases that are expected.
        """

        stream: tuple | None
        rate: int
        resampler: av.AudioResampler | None
        samples: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
        heard: int = 0
        tokens: list[int] = dataclasses.field(default_factory=list)
        frames: list[int] = dataclasses.field(default_factory=list)
        log_probs: list[float] = dataclasses.field(default_factory=list)
        text: str = ""
        piece: int = -1
        answer: dict = dataclasses.field(default_factory=dict)
        used: float = 0.0
        expected: tuple | None = None

    def initialize(self, context) -> None:
        """As ``ModelHandler``'s.

        Raises:
            ValueError: what ``ModelHandler`` raises; the model file is not one of export_model.py's, or too old; or
                model-config.yaml has no ``sequenceMaxIdleMSec``.
        """
        config = getattr(context, "model_yaml_config", None) or {}
        if not isinstance(config.get("sequenceMaxIdleMSec"), int):
            raise ValueError("model-config.yaml: live speech needs sequenceMaxIdleMSec, a number of milliseconds.")
        self.max_idle = config["sequenceMaxIdleMSec"] / 1000  # seconds
        self.sequences: dict[str, LiveHandler.Sequence] = {}
        self.over: dict[str, str] = {}
        self.lasted = 0.0  # seconds, the batch before
        super().initialize(context)

    def _warm_up(self) -> None:
        if not hasattr(self.model, "advance"):
            raise ValueError("The model file does not stream: write it anew with export_model.py.")
        self.nothing = torch.empty(0, self.model.encoder.input_dim)
        generator = torch.Generator().manual_seed(0)
        for count in WARM_UP_STREAMS:
            sequences = [self.Sequence(self.model.begin(), SAMPLE_RATE, None) for _ in range(count)]
            for _ in range(WARM_UP_SEGMENTS):
                new = [torch.randn(SEGMENT_SAMPLES, generator=generator) * 0.1 for _ in sequences]
                self._advance(list(zip(sequences, new, [False] * count, strict=True)), Counter())

    def handle(self, data: list[dict], context) -> list[dict]:
        """Answer a batch of pieces, of different sequences or of one, see the top of this file.

        Args:
            data (list[dict]): as for ``ModelHandler.handle``.
            context (ts.context.Context): as there.

        Returns:
            list[dict]: an answer or an error each, in the order of ``data``.
        """
        started, begun, spent = time.perf_counter(), time.monotonic(), Counter()
        # Whose piece had to wait for the batch before was not silent.
        self._forget(begun - self.lasted)
        answers: list[dict] = [{}] * len(data)
        todo, seconds = list(range(len(data))), 0.0
        while todo:
            # TorchServe puts no two pieces of a sequence into a batch; should it, they are taken one after the other.
            later, named, pieces = [], set(), {}
            for index in todo:
                given = context.get_all_request_header(index)
                headers = {name.lower(): value for name, value in given.items() if isinstance(value, str)}
                name = given.get(SEQUENCE_ID, "")  # TorchServe makes one up if it does not find the header
                if name in named:
                    later.append(index)
                    continue
                named.add(name)
                try:
                    if sum(header.lower() == SEQUENCE_ID for header in given) > 1:
                        message = f"Write the header {SEQUENCE_ID} in lower case: TorchServe does not see it otherwise."
                        raise refusal(HTTPStatus.BAD_REQUEST, "NoSequence", message)
                    piece = self._piece(name, headers, data[index])
                except Exception as error:
                    answers[index] = self._refused(index, context, name, error)
                    continue
                if piece is None:
                    answers[index] = self._answer(index, context, name)
                    if int(headers["x-piece"]) > self.sequences[name].piece:
                        context.set_response_header(index, SEQUENCE_END, name)
                else:
                    pieces[index] = (name, *piece)
            work = [(self.sequences[name], new, last) for name, new, last, _ in pieces.values()]
            seconds += sum(len(new) for _, new, _ in work) / SAMPLE_RATE
            failures = self._advance(work, spent)
            for (index, (name, _, last, number)), error in zip(pieces.items(), failures, strict=True):
                try:
                    if error:
                        raise error
                    sequence = self.sequences[name]
                    sequence.answer = transcript(name, sequence, number, last, self.tokens_to_text, self.word_delays)
                    sequence.piece, sequence.used = number, time.monotonic()
                    answers[index] = self._answer(index, context, name)
                except Exception as error:
                    answers[index] = self._refused(index, context, name, error)
            todo = later
        spent["handler"] = time.perf_counter() - started
        measure(context, "asr_audio_seconds", seconds, MetricTypes.COUNTER)
        measure(context, "asr_batch_size", len(data))
        for step in ("features", "engine", "handler"):
            measure(context, f"asr_{step}_seconds", spent[step])
        measure(context, "asr_open_sequences", self._open(), MetricTypes.GAUGE, Process=str(os.getpid()))
        self.lasted = time.monotonic() - begun
        return answers

    def _piece(self, name: str, headers: dict[str, str], request: dict) -> tuple[torch.Tensor, bool, int] | None:
        """A request's new samples, whether they are the last ones, and the piece's number.

        None if it is to be answered as the one before: if it is repeated, or empty and behind the last. Opens the
        sequence with piece 0.

        Raises:
            PredictionException: the request is wrong, or not the one that is expected now.
        """
        number, last = asked(name, headers)
        sequence = self.sequences.get(name)
        if sequence is None:
            if name in self.over:
                message = f"The sequence is over, because it {self.over[name]}: begin another one, under another name."
                raise refusal(HTTPStatus.GONE, "SequenceEnded", message)
            if number > 0:
                message = f"No such sequence is open here, and this is piece {number}: begin again, with piece 0."
                raise refusal(HTTPStatus.CONFLICT, "UnknownSequence", message)
        else:
            sequence.used = time.monotonic()
            if number <= sequence.piece:
                return None
            if sequence.answer["final"]:
                if number == sequence.piece + 1 and not len(pcm_of(request)):
                    return None
                message = f"The sequence ended with piece {sequence.piece}: begin another one, under another name."
                raise refusal(HTTPStatus.GONE, "SequenceEnded", message)
            if number > sequence.piece + 1:
                message = f"Piece {sequence.piece + 1} is missing: send it before piece {number}."
                raise refusal(HTTPStatus.CONFLICT, "MissingPiece", message)
        pcm = pcm_of(request)
        if sequence is None:
            sequence = self._opened(request, headers)
        longest, seconds = self.settings["max_audio_seconds"], len(pcm) / sequence.rate
        if seconds > MAX_PIECE_SECONDS or sequence.heard / SAMPLE_RATE + seconds > longest:
            message = f"Too much sound: a piece may have {MAX_PIECE_SECONDS} s, a sequence {longest} s."
            raise refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "AudioTooLong", message)
        new = waveform_of(sequence, pcm, last)
        self.sequences[name] = sequence
        return new, last, number

    def _opened(self, request: dict, headers: dict[str, str]) -> Sequence:
        most = self.settings["max_sequences"]
        if self._open() >= most:
            message = f"All {most} places are taken: try again when somebody has finished."
            raise refusal(HTTPStatus.SERVICE_UNAVAILABLE, "TooManySequences", message)
        rate = headers.get("x-sample-rate", str(SAMPLE_RATE))
        if not NUMBER.fullmatch(rate) or not RATES[0] <= int(rate) <= RATES[1]:
            message = "The header x-sample-rate must be a number of Hz from {} to {}.".format(*RATES)
            raise refusal(HTTPStatus.BAD_REQUEST, "BadRate", message)
        expected = self._expected(request, headers)
        resampler = None if int(rate) == SAMPLE_RATE else av.AudioResampler("flt", "mono", SAMPLE_RATE)
        return self.Sequence(self.model.begin(), int(rate), resampler, used=time.monotonic(), expected=expected)

    def _advance(self, work: list[tuple[Sequence, torch.Tensor, bool]], spent: Counter) -> list[Exception | None]:
        """Let sequences hear their new samples, all in one call of the engine; what went wrong with each."""
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                features = features_of(work, self.extract_features, self.nothing)
                extracted = time.perf_counter()
                spent["features"] += extracted - started
                ended = [last for _, _, last in work]
                contexts = [sequence.expected for sequence, _, _ in work]
                streams = self._streams([sequence.stream for sequence, _, _ in work], features, ended, contexts)
                spent["engine"] += time.perf_counter() - extracted
        except Exception as error:
            return [error] * len(work)
        failures = []
        for (sequence, _, _), stream in zip(work, streams, strict=True):
            failures.append(stream if isinstance(stream, Exception) else None)
            sequence.stream = stream
        return failures

    def _streams(
        self, streams: list, features: list[torch.Tensor], ended: list[bool], contexts: list[tuple | None]
    ) -> list:
        """The streams after their new features, or what made them fail."""
        if not streams:
            return []
        try:
            features = [each.to(self.device) for each in features]
            more = [contexts] if any(contexts) else []
            return self.model.advance(streams, features, ended, self.settings["beam_width"], *more)
        except Exception as error:
            if len(streams) == 1:
                return [error]
            logger.warning("A batch of %d failed and is taken one by one", len(streams), exc_info=error)
            each = zip(streams, features, ended, contexts, strict=True)
            return [self._streams([s], [f], [e], [c])[0] for s, f, e, c in each]

    def _answer(self, index: int, context, name: str) -> dict:
        context.set_response_content_type(index, "application/json")
        measure(context, "asr_requests", 1, MetricTypes.COUNTER, Outcome="ok")
        return self.sequences[name].answer

    def _refused(self, index: int, context, name: str, error: Exception) -> dict:
        if name in self.sequences and not isinstance(error, PredictionException):
            self._drop(name, "failed")  # what it has heard is not known any more
        if name not in self.sequences or self.sequences[name].answer.get("final"):
            context.set_response_header(index, SEQUENCE_END, name)
        return refused(index, context, error)

    def _open(self) -> int:
        """Number of sequences that are not over."""
        return sum(sequence.stream is not None for sequence in self.sequences.values())

    def _forget(self, now: float) -> None:
        """Drop what has been idle for too long."""
        for name, sequence in list(self.sequences.items()):
            if now - sequence.used > self.max_idle:
                self._drop(name, f"was idle for more than {self.max_idle:g} s" if sequence.stream else "has ended")

    def _drop(self, name: str, why: str) -> None:
        del self.sequences[name]
        self.over[name] = why
        if len(self.over) > REMEMBERED:
            del self.over[next(iter(self.over))]
