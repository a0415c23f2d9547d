"""Live transcription for TorchServe: the text appears while the person speaks.

The handler of an archive of its own, which handler.py goes into as an extra file. It has one worker, so that all
requests of a sequence come to the one that keeps the sequence's state between them: TorchServe's ``sequenceBatching``
would allow several, but never replaces one that dies. docs/live.md has the protocol: headers, answers, errors. Every
piece of a sequence takes the same way, from top to bottom of this file:

    request -> samples (16 kHz) -> features (T, 80) -> the engine's stream -> text and words -> utterances -> answer

The final text is that of the whole sound in one request, token for token (at fp32), whatever the sizes of the pieces.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import multiprocessing.connection
import os
import queue
import re
import threading
import time
import types
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

import av
import numpy as np
import torch
from ts.context import Context, RequestProcessor
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import PredictionException

import handler
from handler import HOP_SAMPLES, RIGHT_CONTEXT, SAMPLE_RATE, SEGMENT_SAMPLES, ModelHandler, joined, measure, refusal

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NUMBER = re.compile(r"[0-9]{1,9}")
RATES = (8_000, 192_000)  # Hz
# What pieces may hold, and at how many Hz if they do not say: raw 16-bit PCM, G.711 as telephones have it, or a stream
# of Opus in WebM or Ogg, as browsers record it.
ENCODINGS = {"pcm": SAMPLE_RATE, "mulaw": 8_000, "alaw": 8_000, "opus": 48_000}
G711 = {"mulaw": "pcm_mulaw", "alaw": "pcm_alaw"}  # FFmpeg's names
CONTAINERS = {b"\x1aE\xdf\xa3": "matroska", b"OggS": "ogg"}  # how a stream of Opus begins, FFmpeg's demuxer
OPUS_OPTIONS = handler.FFMPEG_OPTIONS | {
    "format_whitelist": ",".join(CONTAINERS.values()),
    "codec_whitelist": "opus,libopus",
    # Its headers say everything, so that FFmpeg need not look into the sound before the first of it comes out.
    "probesize": "32",
    "analyzeduration": "0",
}
MAX_OPUS_BYTES = 2**21  # in a piece: more than 30 s at the highest rate
MAX_UNDECODED = 2**17  # bytes without any sound, twice as many as a page of Ogg: the stream is broken
# What raw samples are not: the beginning of a file; float32, of which 99% lie in ``FLOATS`` or are zero. As 16-bit
# samples these would have every second one in two narrow bands, on both sides of zero.
FILE = re.compile(b"|".join([*handler.BEGINNINGS, rb"fLaC[\x00\x80]\x00\x00\x22", handler.ID3.pattern]), re.DOTALL)
FLOATS, SURE, LEAST_FLOATS = (2.0**-24, 2.0), 0.99, 500
LEAST_TEXT, FOREIGN = 256, 0.1  # bytes; the most of them that may not be ASCII
MAX_PIECE_SECONDS = 30  # in one request, so that nobody makes the others of a batch wait for long
TOGETHER = 60  # seconds of sound whose features are extracted in one call: more takes hundreds of megabytes
SEQUENCE_ID = "ts_request_sequence_id"  # the request header with a sequence's name
# Ids of sequences that are over, remembered so that a late piece is told so.
REMEMBERED = 10_000
# Before the first request: batches of these many streams, some segments each, for TorchScript's optimisation.
WARM_UP_STREAMS, WARM_UP_SEGMENTS = (1, 2, 4, 1), 4
SETTINGS = handler.DEFAULTS | {
    "max_sequences": 50,  # of a process, open at a time: the next is refused
    "max_idle_seconds": 10,  # a client that is silent for longer is forgotten
    "processes": 1,  # with a model and sequences of its own each, all of this worker's
}
RETRY = 10  # seconds from the start of a process that could not load the model to the next
# Milliseconds after which an utterance ends, where a sequence asks for that: of silence before any word, of silence
# after a word, and of speech without such a silence.
RULES = {"endpoint_no_word_ms": 2400, "endpoint_silence_ms": 800, "endpoint_longest_ms": 20_000}
SETTINGS |= RULES
RULE_LIMITS = (200, 3_600_000)  # ms
# The next utterance begins with so much of the silence, at most: a word may have begun that is not written yet.
LEAD = 2 * SEGMENT_SAMPLES
# Segments whose level tells whether somebody speaks on; dB a segment by which the levels of speech and noise follow; dB
# between these levels at which one is told from the other.
LOUD_SEGMENTS, FOLLOWING, APART = 2, 0.25, 10.0
# A frame is made of the samples around its hop, as far as ``REACH`` to both sides, which ``MARGIN``, whole hops, holds.
REACH = handler.WINDOW_SAMPLES // 2
MARGIN = -(-REACH // HOP_SAMPLES) * HOP_SAMPLES

# Of a hypothesis: tokens without the leading blank, and of each its encoder frame and its log-probability.
Heard = tuple[list[int], list[int], list[float]]


# What a request brings


def name_of(headers: dict[str, str]) -> str:
    """The name of the sequence that a request belongs to; of one that begins without a name, a new one."""
    made_up = uuid.uuid4().hex if headers.get("x-piece") == "0" else ""
    return headers.get(SEQUENCE_ID, made_up)


def asked(name: str, headers: dict[str, str]) -> tuple[int, bool]:
    """The number of the piece that a request brings, and whether it is the last.

    Raises:
        PredictionException: the headers do not tell.
    """
    if not NAME.fullmatch(name):
        message = "The header ts_request_sequence_id must name the sequence: 1 to 64 letters, digits, _ or -."
        raise refusal(400, "NoSequence", message)
    number = headers.get("x-piece", "")
    if not NUMBER.fullmatch(number):
        raise refusal(400, "BadPiece", "The header x-piece must be the piece's number, counted from 0.")
    last = headers.get("x-last-piece", "false").lower()
    if last not in ("true", "false"):
        raise refusal(400, "BadPiece", "The header x-last-piece must be true or false.")
    return int(number), last == "true"


def body_of(request: dict) -> bytes | bytearray:
    """A request's body, as it came."""
    body = next((request[name] for name in ("body", "data") if name in request), None if request else b"")
    if not isinstance(body, bytes | bytearray):
        raise not_pcm("The body must be raw 16-bit PCM, sent with Content-Type: application/octet-stream.")
    return body


def not_pcm(message: str) -> PredictionException:
    return refusal(400, "NotPCM", message)


def pcm_of(body: bytes | bytearray, encoding: str) -> np.ndarray:
    """The samples (n,), int16, in a body.

    Raises:
        PredictionException: they are surely something else.
    """
    if FILE.match(body):
        message = "This is the beginning of an audio file: send its samples alone, as raw 16-bit PCM, or send Opus in"
        raise not_pcm(f"{message} WebM or Ogg with the header x-encoding: opus.")
    if encoding in G711:
        return G711_TABLES[encoding][np.frombuffer(body, dtype=np.uint8)]
    if len(body) % 2:
        message = f"These {len(body)} bytes are no whole number of 16-bit samples: a piece must not cut one in two."
        raise not_pcm(message)
    if is_text(body):
        raise not_pcm("This is text: send the samples as raw 16-bit PCM, neither in JSON nor in base64.")
    if is_float(body):
        raise not_pcm("These are floating-point samples: multiply by 32767 and send 16-bit integers, little-endian.")
    return np.frombuffer(body, dtype="<i2")


def is_text(body: bytes | bytearray) -> bool:
    """Whether bytes are text: sound has samples near zero, of which one byte is no text's, and negative ones."""
    if len(body) < LEAST_TEXT or handler.BINARY.search(body):
        return False
    foreign = np.mean(np.frombuffer(body, dtype=np.uint8) > 127)
    try:
        return bool(foreign <= FOREIGN and body.decode())
    except UnicodeDecodeError:
        return False


def is_float(body: bytes | bytearray) -> bool:
    """Whether bytes are float32 samples with both signs."""
    if len(body) % 4 or len(body) < 4 * LEAST_FLOATS:
        return False
    values = np.frombuffer(body, dtype="<f4")
    with np.errstate(invalid="ignore"):  # what is none may be no number
        level = np.abs(values)
        sounds = (level >= FLOATS[0]) & (level <= FLOATS[1])
        count, negative = int(sounds.sum()), int((sounds & (values < 0)).sum())
    likely = count + int((level == 0).sum()) >= SURE * len(values)
    return likely and count >= LEAST_FLOATS and min(negative, count - negative) >= 0.1 * count


def g711_table(codec: str) -> np.ndarray:
    """The samples (256,), int16, that FFmpeg's decoder makes of all bytes."""
    context = av.CodecContext.create(codec, "r")
    context.sample_rate, context.layout = 8_000, "mono"
    [frame] = context.decode(av.Packet(bytes(range(256))))
    return frame.to_ndarray().reshape(-1)


G711_TABLES = {encoding: g711_table(codec) for encoding, codec in G711.items()}


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
    return joined([handler.mono(frame, []) for frame in frames])


def rules_of(headers: dict[str, str], settings: dict) -> tuple[float, ...] | None:
    """The seconds of the three ``RULES`` for a sequence; None if it is to be one utterance."""
    header = headers.get("x-endpoints", "false").lower()
    if header == "false":
        return None
    given = [settings[name] for name in RULES] if header == "true" else header.replace(" ", "").split(",")
    if len(given) != len(RULES) or not all(NUMBER.fullmatch(str(each)) for each in given):
        message = "The header x-endpoints must be true, false, or the three rules' milliseconds, like 2400,800,20000."
        raise refusal(400, "BadEndpoints", message)
    least, most = RULE_LIMITS
    if header != "true" and not all(least <= int(each) <= most for each in given):
        raise refusal(400, "BadEndpoints", f"In the header x-endpoints each time must be from {least} to {most} ms.")
    return tuple(int(each) / 1000 for each in given)


def wants_words(headers: dict[str, str]) -> bool:
    """Whether every answer of a sequence shall have the words, not the last alone."""
    header = headers.get("x-words", "false").lower()
    if header not in ("true", "false"):
        raise refusal(400, "BadWords", "The header x-words must be true or false.")
    return header == "true"


# From a stream of Opus to samples


def broken(what: str) -> PredictionException:
    message = f"The stream of Opus {what}: begin another sequence with a stream's first bytes, in WebM or Ogg."
    return refusal(400, "BrokenStream", message)


def opus_decoder(longest: int) -> tuple[queue.SimpleQueue, queue.SimpleQueue]:
    """A decoder that takes a stream of up to ``longest`` seconds in pieces: what it gets, and what comes out.

    FFmpeg reads when it wants to, and a piece may end anywhere. So it has a thread of its own, which waits for the next
    piece, or for None, the end. For each there is one answer: samples (n,), or the exception with which it has ended.
    """
    fed: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    heard: queue.SimpleQueue[torch.Tensor | Exception] = queue.SimpleQueue()
    threading.Thread(target=decode_opus, args=(fed, heard, longest), daemon=True).start()
    return fed, heard


def decode_opus(fed: queue.SimpleQueue, heard: queue.SimpleQueue, longest: int) -> None:
    """What the decoder's thread does."""
    left, samples, count, undecoded, ended = fed.get() or b"", [], 0, 0, False
    while left and not ended and any(len(left) < len(mark) and mark.startswith(left) for mark in CONTAINERS):
        heard.put(torch.empty(0))  # Chromium's first piece may be a single byte
        part = fed.get()
        ended, left = part is None, left + (part or b"")
    demuxer = CONTAINERS.get(bytes(left[:4]))

    def read(size: int) -> bytes:
        nonlocal left, samples, count, undecoded, ended
        if not left and not ended and undecoded <= MAX_UNDECODED:
            heard.put(joined(samples))
            samples, count, left = [], 0, fed.get()
            ended, left = left is None, left or b""
        taken, left = left[:size], left[size:]
        undecoded += len(taken)
        return bytes(taken) if undecoded <= MAX_UNDECODED else b""  # the end, for FFmpeg

    try:
        if not demuxer:
            raise broken("does not begin as one")
        reader = types.SimpleNamespace(read=read)
        with av.open(reader, format=demuxer, options=OPUS_OPTIONS, metadata_errors="replace") as container:
            tracks = [track for track in container.streams.audio if track.codec_context]
            if not tracks or tracks[0].codec_context.codec.canonical_name != "opus":
                raise broken("has none in it")
            for new in handler.resampled(opus_frames(container, tracks[0], longest), [], size=None):
                undecoded, count = 0, count + len(new)
                samples.append(new)
                if count > MAX_PIECE_SECONDS * SAMPLE_RATE:
                    raise too_long(longest)
        if not ended:
            raise broken("is broken")
        heard.put(joined(samples))
    except MemoryError:
        heard.put(broken("asks for too much memory"))
    except (av.FFmpegError, ValueError, IndexError):
        heard.put(broken("is broken"))
    except Exception as error:
        heard.put(error)


def opus_frames(
    container: av.container.InputContainer, track: av.AudioStream, longest: int
) -> Iterator[tuple[float, av.AudioFrame]]:
    """The stream's frames, each with the seconds in which there is no sound before it, as ``handler.sound_frames``."""
    seconds, least, origin = 0.0, 0.0, (container.start_time or 0) / av.time_base
    for packet in container.demux(track):
        if time.thread_time() > handler.DECODING_SECONDS + handler.DECODING_RATE * seconds:  # as ``handler.check_time``
            raise broken("takes too much time")
        frames = packet.decode()
        least = least if frames else 0.0
        for frame in frames:
            gap = 0.0 if frame.time is None else frame.time - origin - seconds
            gap, least = gap if gap > least else 0.0, handler.GAP
            if gap > MAX_PIECE_SECONDS:
                raise too_long(longest)
            seconds += gap + frame.samples / frame.sample_rate
            yield gap, frame


def too_long(longest: int) -> PredictionException:
    message = f"Too much sound: a piece may have {MAX_PIECE_SECONDS} s, a sequence {longest} s."
    return refusal(413, "AudioTooLong", message)


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


def written(tokens: list[int], processor: Callable) -> str:
    """The text of tokens, words with a space before them; the processor drops the first, in a hypothesis blank."""
    return processor([0, *tokens], lstrip=False)


def settle(sequence: "LiveHandler.Sequence", processor: Callable) -> None:
    """Take over what the stream has settled."""
    settled, frames, log_probs = sequence.stream[4]
    sequence.tokens += settled
    sequence.frames += frames
    sequence.log_probs += log_probs
    sequence.text += written(settled, processor)


def transcript(name: str, sequence: "LiveHandler.Sequence", number: int, last: bool, naming: tuple) -> dict:
    """The answer to a piece; ``naming`` are the token processor and the delays that ``handler.words_of`` takes."""
    processor, _ = naming
    hypotheses = [tokens[1:] for tokens, *_ in sequence.stream[3][0]]
    # What they all begin with stays: so do all later ones.
    shared = itertools.takewhile(lambda ranked: len(set(ranked)) == 1, zip(*hypotheses, strict=False))
    agreed = [token for token, *_ in shared]
    text = (sequence.text + written(hypotheses[0], processor)).lstrip()
    stable = len(text) if last else len((sequence.text + written(agreed, processor)).lstrip())
    answer = {"sequence": name, "piece": number, "text": text, "stable": stable, "final": last, "words": []}
    if last or sequence.with_words:
        answer["words"] = words = heard_words(sequence, heard_tokens(sequence), naming)
        answer["speech"] = surest(words)
        if last and sequence.rules:
            if words:
                end_utterance(sequence, heard_tokens(sequence), "end", naming)
            answer |= {"text": "", "stable": 0, "words": [], "speech": 0.0}
    if sequence.rules:
        answer["utterances"], sequence.utterances = sequence.utterances, []
        answer["finished"] = (sequence.begun + sequence.heard if last else sequence.since) / SAMPLE_RATE
    return answer


def heard_tokens(sequence: "LiveHandler.Sequence", over: bool = False) -> Heard:
    """The best hypothesis of the utterance so far: tokens, their frames and log-probabilities.

    If it is ``over``, without the bonus of a phrase that has only begun, as engine/search.py's ``without_pending``.
    """
    _, _, _, (hypotheses, frames, log_probs, _, settled, matched), _ = sequence.stream
    best = 0
    if over and sequence.expected:
        pending = sequence.expected[5] - sequence.expected[6]
        ranks = [
            (h[3] - float(pending[place])) / (len(h[0]) + settled + 1)
            for h, (place, _) in zip(hypotheses, matched, strict=True)
        ]
        best = ranks.index(max(ranks))
    tokens = hypotheses[best][0][1:]
    return sequence.tokens + tokens, sequence.frames + frames[best], sequence.log_probs + log_probs[best]


def heard_words(sequence: "LiveHandler.Sequence", heard: Heard, naming: tuple) -> list[dict]:
    """The words of tokens, their times counted from the beginning of the sequence."""
    tokens, frames, log_probs = heard
    begun, words = sequence.begun / SAMPLE_RATE, []
    for word in handler.words_of(([0, *tokens], 0.0, frames, log_probs), sequence.heard / SAMPLE_RATE, *naming):
        times = {name: round(begun + word[name], 3) for name in ("start", "end")}
        words.append({"word": word["word"], **times, "probability": word["probability"]})
    return words


def surest(words: list[dict]) -> float:
    """How sure it is that somebody spoke: as sure as of the surest word."""
    return max((word["probability"] for word in words), default=0.0)


# Where an utterance ends


def end_utterance(sequence: "LiveHandler.Sequence", heard: Heard, reason: str, naming: tuple) -> None:
    """Put what was heard into the answer as an utterance that will not change any more."""
    words, (processor, _) = heard_words(sequence, heard, naming), naming
    start = (sequence.begun + sequence.cut) / SAMPLE_RATE
    end = (sequence.begun + sequence.stream[1] * SEGMENT_SAMPLES) / SAMPLE_RATE
    if words:
        start, end = words[0]["start"], words[-1]["end"]
    utterance = {"text": written(heard[0], processor).lstrip(), "start": round(start, 3), "end": round(end, 3)}
    utterance |= {"words": words, "speech": surest(words), "reason": reason}
    sequence.utterances.append(utterance)


def step_of(sequence: "LiveHandler.Sequence") -> int:
    """Samples that complete one more segment at most: after each it is asked whether the utterance has ended.

    One frame fewer than two segments with their right context hold one segment. Samples complete no more frames than
    they have hops; at the beginning of a stream one more.
    """
    fewer = 2 * SEGMENT_SAMPLES // HOP_SAMPLES + RIGHT_CONTEXT - 1
    return (fewer - max(len(sequence.stream[0]), 1)) * HOP_SAMPLES


def still_loud(sequence: "LiveHandler.Sequence", segment: torch.Tensor) -> bool:
    """Whether sound as loud as speech goes on, after one segment (samples,) more.

    The levels of speech and noise are the loudest and the quietest that was heard of late: a steady noise, however
    loud, is not speech.
    """
    level = 10 * math.log10(max(float(segment.square().mean()), 1e-9))
    sequence.levels = [*sequence.levels, level][-LOUD_SEGMENTS:]
    sequence.speech_level = speech = max(level, sequence.speech_level - FOLLOWING)
    sequence.noise_level = noise = min(level, sequence.noise_level + FOLLOWING)
    return speech - noise > APART and max(sequence.levels) > max((speech + noise) / 2, speech - 2 * APART)


def begins_of_last_word(tokens: list[int], processor: Callable) -> int:
    """The place in ``tokens`` of the first one of the last word, or of the mark before it."""
    marks, place = processor.post_process_remove_list, len(tokens)
    while place > 0:
        place -= 1
        if tokens[place] in marks or processor.sp_model.id_to_piece(tokens[place]).startswith("▁"):
            break
    while place > 0 and tokens[place - 1] in marks:
        place -= 1
    return place


def seam(sequence: "LiveHandler.Sequence", naming: tuple) -> torch.Tensor | None:
    """Look for the end of the utterance after the engine has decoded one more segment.

    After a pause the next utterance begins anew, with the last of the silence. One that is too long is cut before its
    last word, and the stream goes on as it was.

    Returns:
        Tensor or None: after a pause, the samples (n,) that were heard already and that the next utterance begins with.
    """
    processor, word_delays = naming
    decoded = sequence.stream[1] * SEGMENT_SAMPLES  # samples of this stream
    after = len(sequence.recent) - (sequence.heard - decoded)  # where they end in ``recent``
    loud = still_loud(sequence, sequence.recent[after - SEGMENT_SAMPLES : after])
    sequence.recent = sequence.recent[max(after - LEAD, 0) :].clone()
    heard = heard_tokens(sequence)
    spoken = (heard[1][-1] + 1) * handler.FRAME_SECONDS - word_delays["end"] if heard[1] else sequence.cut / SAMPLE_RATE
    no_word, pause, longest = sequence.rules
    silence = decoded / SAMPLE_RATE - spoken
    if silence >= (pause if heard[0] else no_word) * (2 if loud else 1):
        end_utterance(sequence, heard_tokens(sequence, over=True), "silence", naming)
        begin = decoded - min(LEAD, int(silence / 2 * SAMPLE_RATE))
        return sequence.recent[len(sequence.recent) - (sequence.heard - begin) :]
    if (decoded - sequence.cut) / SAMPLE_RATE >= longest:
        place = begins_of_last_word(sequence.tokens, processor)
        if place > 0:
            settled = (sequence.tokens, sequence.frames, sequence.log_probs)
            end_utterance(sequence, tuple(each[:place] for each in settled), "length", naming)
            if sequence.utterances[-1]["words"]:
                sequence.since = round(sequence.utterances[-1]["end"] * SAMPLE_RATE)
            for each in settled:
                del each[:place]
            sequence.text, sequence.cut = written(sequence.tokens, processor), decoded
    return None


# The server's side


def work(connection: multiprocessing.connection.Connection, arguments: tuple) -> None:
    """What one of several processes does: it is a ``LiveHandler`` with a model of its own, as long as its worker lives.

    ``arguments`` are those of a ``Context``. It says with None that it is ready, or what is wrong, and then answers
    batches, which come with the seconds that the one before has lasted, with what ``handle`` returns, each request's
    response, and the metrics.
    """
    context, live = Context(*arguments), LiveHandler()
    with contextlib.suppress(EOFError, ConnectionError):  # the worker has ended
        try:
            live.initialize(context)
        except Exception as error:
            connection.send(str(error))
            return
        connection.send(None)
        while True:
            data, headers, lasted = connection.recv()
            live.lasted = max(live.lasted, lasted)  # the batch before may have lasted longer for others
            metrics: list[tuple] = []
            context.metrics = types.SimpleNamespace(add_metric=lambda *a, to=metrics, **k: to.append((a, k)))
            context.request_processor = [RequestProcessor(each) for each in headers]
            connection.send((live.handle(data, context), context.request_processor, metrics))


class LiveHandler(ModelHandler):
    """A worker for live speech: a ``ModelHandler`` that keeps the sequences that are open in it.

    Attributes:
        sequences (dict[str, Sequence]): by name, those that are open or have just ended.
        over (dict[str, str]): why each of those before is over, so that a late piece is told so.
        processes (list): which do the work, if they are several: each one's process and connection, when it was begun
            (in seconds), whether it is ready, else its error, and the number of its open sequences.
    """

    known_settings = SETTINGS

    # Inside, because TorchServe takes a handler's module for broken if it defines a second class.
    @dataclasses.dataclass
    class Sequence:
        """What is kept between the pieces of sound that somebody sends."""

        stream: tuple | None = None  # the engine's state, see engine/decoder.py; None when the sequence is over
        rate: int = SAMPLE_RATE  # Hz, of its pieces
        resampler: av.AudioResampler | None = None  # to the model's rate, where that is another one
        encoding: str = "pcm"  # one of ``ENCODINGS``
        decoder: tuple | None = None  # of Opus, see ``opus_decoder``
        expected: tuple | None = None  # what the engine takes for the phrases that are expected
        rules: tuple[float, ...] | None = None  # seconds of ``RULES``, where it is told apart into utterances
        with_words: bool = False  # whether every answer has the words
        heard: int = 0  # samples so far, at the model's rate, as all below
        samples: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (n,), of frames to come
        # What has settled, see ``Decoder.advance``, and its text, with a leading space.
        tokens: list[int] = dataclasses.field(default_factory=list)
        frames: list[int] = dataclasses.field(default_factory=list)
        log_probs: list[float] = dataclasses.field(default_factory=list)
        text: str = ""
        begun: int = 0  # the sample of the sequence where the stream began: ``heard`` and ``frames`` count from there
        cut: int = 0  # the sample of the stream at which an utterance was too long and the next has begun
        since: int = 0  # the sample of the sequence from which the utterance that goes on has to be heard
        recent: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (n,), see ``seam``
        utterances: list[dict] = dataclasses.field(default_factory=list)  # that have ended since the last answer
        # dB, see ``still_loud``.
        levels: list[float] = dataclasses.field(default_factory=list)
        speech_level: float = -math.inf
        noise_level: float = math.inf
        piece: int = -1  # the last one's number
        answer: dict = dataclasses.field(default_factory=dict)  # to that piece
        used: float = 0.0  # time of the last request, in seconds

    def initialize(self, context) -> None:
        """As ``ModelHandler``'s.

        Raises:
            ValueError: what ``ModelHandler`` raises; or the model file is not one of export_model.py's, or too old.
        """
        self.sequences: dict[str, LiveHandler.Sequence] = {}
        self.over: dict[str, str] = {}
        self.lasted = 0.0  # seconds, the batch before
        self.processes: list[types.SimpleNamespace] = []
        self.settings = settings = handler.settings_of(context, self.known_settings)
        if settings["processes"] == 1:
            super().initialize(context)
            return
        own = (context.model_yaml_config.get("handler") or {}) | {"processes": 1}
        fixed, config = context.system_properties, context.model_yaml_config | {"handler": own}
        arguments = (context.model_name, fixed["model_dir"], context.manifest, fixed["batch_size"], fixed["gpu_id"])
        self.arguments = (*arguments, fixed["server_version"], True, None, config)
        self.where: dict[str, types.SimpleNamespace] = {}  # by a sequence's name, the latest last
        self.processes = [self._process() for _ in range(settings["processes"])]
        for process in self.processes:
            if not self._ready(process, wait=True):
                raise ValueError(process.error)
        self.initialized = True

    def _warm_up(self) -> None:
        if not hasattr(self.model, "advance"):
            raise ValueError("The model file does not stream: write it anew with export_model.py.")
        self.nothing = torch.empty(0, self.model.encoder.input_dim)
        self.naming = (self.tokens_to_text, self.word_delays)
        generator = torch.Generator().manual_seed(0)
        for count in WARM_UP_STREAMS:
            sequences = [self.Sequence(self.model.begin()) for _ in range(count)]
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
        if self.processes:
            return self._shared_out(data, context)
        started, begun, spent = time.perf_counter(), time.monotonic(), Counter()
        # Whose piece had to wait for the batch before was not silent.
        self._forget(begun - self.lasted)
        answers: list[dict] = [{}] * len(data)
        todo, seconds = list(range(len(data))), 0.0
        while todo:
            # Of a sequence's pieces in one batch, sent again after a broken connection, one is taken after the other.
            later, named, pieces = [], set(), {}
            for index in todo:
                headers = handler.headers_of(index, context)
                name = name_of(headers)
                if name in named:
                    later.append(index)
                    continue
                named.add(name)
                try:
                    piece = self._piece(name, headers, data[index])
                except Exception as error:
                    answers[index] = self._refused(index, context, name, error)
                    continue
                if piece is None:
                    answers[index] = self._answer(index, context, name)
                else:
                    pieces[index] = (name, *piece)
            work = [(self.sequences[name], new, last) for name, new, last, _ in pieces.values()]
            seconds += sum(len(new) for _, new, _ in work) / SAMPLE_RATE
            failures = self._hear(work, spent)
            for (index, (name, _, last, number)), error in zip(pieces.items(), failures, strict=True):
                try:
                    if error:
                        raise error
                    sequence = self.sequences[name]
                    answer = transcript(name, sequence, number, last, self.naming)
                    if last:  # nothing but the answer is kept
                        self.sequences[name] = sequence = self.Sequence()
                    sequence.piece, sequence.answer, sequence.used = number, answer, time.monotonic()
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

    def _process(self) -> types.SimpleNamespace:
        """Start one of the processes, which then loads its model."""
        spawn = multiprocessing.get_context("spawn")
        connection, other = spawn.Pipe()
        process = spawn.Process(target=work, args=(other, self.arguments), daemon=True)
        process.start()
        other.close()
        begun = time.monotonic()
        process = types.SimpleNamespace(process=process, connection=connection, begun=begun, ready=False, error="")
        process.open, process.asked = 0, begun  # sequences, and when it last got a piece
        return process

    def _replace(self, process: types.SimpleNamespace) -> None:
        """Start another one in the place of a process that has died, whose sequences are lost."""
        logger.error("Another process is started in the place of one that has died or has not loaded its model")
        self.where = {name: each for name, each in self.where.items() if each is not process}
        process.connection.close()
        self.processes[self.processes.index(process)] = self._process()

    def _ready(self, process: types.SimpleNamespace, wait: bool = False) -> bool:
        """Whether a process has loaded its model; ``wait`` until that is known."""
        if not process.ready and not process.error and (wait or process.connection.poll()):
            try:
                process.error = process.connection.recv()
            except (EOFError, ConnectionError):
                process.error = "A process died while it loaded the model."
            process.ready = process.error is None
            if process.error:
                logger.error("One of the processes has not started: %s", process.error)
        return process.ready

    def _shared_out(self, data: list[dict], context) -> list[dict]:
        """``handle``, where several processes do the work: a sequence stays with the one that got its first piece."""
        begun = time.monotonic()
        for process in list(self.processes):
            failed = process.error and time.monotonic() > process.begun + RETRY
            if failed or (process.ready and not process.process.is_alive()):
                self._replace(process)
        ready = [process for process in self.processes if self._ready(process)]
        if not ready:
            ready = [process for process in self.processes if self._ready(process, wait=True)]
        for process in ready:
            if begun - self.lasted - process.asked > self.settings["max_idle_seconds"]:
                process.open = 0  # it forgets all that it has when it is asked again
        shares: dict[int, list[int]] = {}  # by place in ``ready``
        headers = [handler.headers_of(index, context) for index in range(len(data))]
        for index, given in enumerate(headers):
            name = name_of(given)
            if name:  # which may be made up, then here
                given[SEQUENCE_ID] = name
            process = self.where.pop(name, None)
            if process not in ready:
                process = min(ready, key=lambda each: each.open, default=None)
            if process:
                process.asked = begun
                process.open += given.get("x-piece") == "0"
                self.where[name] = process
                shares.setdefault(ready.index(process), []).append(index)
        while len(self.where) > REMEMBERED:
            del self.where[next(iter(self.where))]
        answers: list[dict | None] = [None] * len(data)
        for place, indices in shares.items():
            with contextlib.suppress(OSError):  # it has died
                share = ([data[i] for i in indices], [headers[i] for i in indices], self.lasted)
                ready[place].connection.send(share)
        for place, indices in shares.items():
            process = ready[place]
            try:
                bodies, responses, metrics = process.connection.recv()
            except (EOFError, OSError):
                self._replace(process)
                continue
            for index, body, response in zip(indices, bodies, responses, strict=True):
                answers[index], context.request_processor[index] = body, response
            for given, named in metrics:
                if context.metrics is not None:
                    context.metrics.add_metric(*given, **named)
                if given[0] == "asr_open_sequences":
                    process.open = given[1]
        for index, answer in enumerate(answers):
            if answer is None:
                message = "The process that had the sequence has died: begin again, with piece 0 under another name."
                error = refusal(409, "UnknownSequence", message)
                if not ready:
                    message = "No process has loaded the model, the server's log says why: try again in some seconds."
                    error = refusal(503, "NoProcess", message)
                answers[index] = handler.refused(index, context, error)
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
                raise refusal(410, "SequenceEnded", message)
            if number > 0:
                message = f"No such sequence is open here, and this is piece {number}: begin again, with piece 0."
                raise refusal(409, "UnknownSequence", message)
        else:
            sequence.used = time.monotonic()
            if number <= sequence.piece:
                return None
            if sequence.answer["final"]:
                if number == sequence.piece + 1 and not body_of(request):
                    return None
                message = f"The sequence ended with piece {sequence.piece}: begin another one, under another name."
                raise refusal(410, "SequenceEnded", message)
            if number > sequence.piece + 1:
                message = f"Piece {sequence.piece + 1} is missing: send it before piece {number}."
                raise refusal(409, "MissingPiece", message)
        body = body_of(request)
        if sequence is None:
            sequence = self._opened(request, headers)
        longest, heard = self.settings["max_audio_seconds"], (sequence.begun + sequence.heard) / SAMPLE_RATE
        if sequence.encoding == "opus":
            new = self._decoded(name, sequence, body, last)
        else:
            pcm = pcm_of(body, sequence.encoding)
            if len(pcm) / sequence.rate > min(MAX_PIECE_SECONDS, longest - heard):
                raise too_long(longest)
            new = waveform_of(sequence, pcm, last)
        self.sequences[name] = sequence
        return new, last, number

    def _decoded(self, name: str, sequence: Sequence, body: bytes, last: bool) -> torch.Tensor:
        """The samples (n,), at the model's rate, that a piece of a stream of Opus completes.

        Raises:
            PredictionException: the stream is broken or too long. The sequence is then over, unless it was told so
                before its decoder has got the piece.
        """
        longest, samples = self.settings["max_audio_seconds"], []
        if len(body) > MAX_OPUS_BYTES:
            raise too_long(longest)
        if not body and not sequence.decoder:
            return joined(samples)
        sequence.decoder = fed, heard = sequence.decoder or opus_decoder(longest)
        try:
            with handler.limited_memory(longest):
                for part in [body] * bool(body) + [None] * last:
                    fed.put(part)
                    samples.append(heard.get())
                    if isinstance(samples[-1], Exception):
                        raise samples[-1]
            if sequence.begun + sequence.heard + sum(map(len, samples)) > longest * SAMPLE_RATE:
                raise too_long(longest)
        except Exception:
            fed.put(None)
            if name in self.sequences:
                self._drop(name, "failed")
            raise
        return joined(samples)

    def _opened(self, request: dict, headers: dict[str, str]) -> Sequence:
        most = self.settings["max_sequences"]
        if self._open() >= most:
            message = f"All {most} places are taken: try again when somebody has finished."
            raise refusal(503, "TooManySequences", message)
        encoding = headers.get("x-encoding", "pcm").lower()
        if encoding not in ENCODINGS:
            raise refusal(400, "BadEncoding", f"The header x-encoding must be one of {', '.join(ENCODINGS)}.")
        rate = headers.get("x-sample-rate", str(ENCODINGS[encoding]))
        if not NUMBER.fullmatch(rate) or not RATES[0] <= int(rate) <= RATES[1]:
            message = "The header x-sample-rate must be a number of Hz from {} to {}.".format(*RATES)
            raise refusal(400, "BadRate", message)
        resampler = None if int(rate) == SAMPLE_RATE else av.AudioResampler("flt", "mono", SAMPLE_RATE)
        return self.Sequence(
            self.model.begin(),
            int(rate),
            resampler,
            encoding,
            expected=self._expected(request, headers),
            rules=rules_of(headers, self.settings),
            with_words=wants_words(headers),
            used=time.monotonic(),
        )

    def _hear(self, work: list[tuple[Sequence, torch.Tensor, bool]], spent: Counter) -> list[Exception | None]:
        """Let sequences hear their new samples; what went wrong with each.

        Those that are told apart into utterances get them step by step: where one ends does not depend on the pieces.
        """
        failures: list[Exception | None] = [None] * len(work)
        left = {place: new for place, (_, new, _) in enumerate(work)}
        while left:
            steps = {}
            for place, new in left.items():
                sequence, _, last = work[place]
                size = step_of(sequence) if sequence.rules else len(new)
                left[place] = new[size:]
                steps[place] = (sequence, new[:size], last and len(new) <= size)
            segments = [sequence.stream[1] for sequence, _, _ in steps.values()]
            errors = self._advance(list(steps.values()), spent)
            for place, before, error in zip(steps, segments, errors, strict=True):
                sequence, new, last = steps[place]
                try:
                    if error:
                        raise error
                    settle(sequence, self.tokens_to_text)
                    if sequence.rules and not last:
                        sequence.recent = torch.cat([sequence.recent, new])
                        again = seam(sequence, self.naming) if sequence.stream[1] > before else None
                        if again is not None:
                            self._begin(sequence, again)
                            left[place] = torch.cat([again, left[place]])
                    if last or not len(left[place]):
                        del left[place]
                except Exception as error:
                    failures[place] = error
                    del left[place]
        return failures

    def _begin(self, sequence: Sequence, again: torch.Tensor) -> None:
        """Begin with the next utterance of a sequence, which will hear these samples (n,) again."""
        sequence.begun = sequence.since = sequence.begun + sequence.heard - len(again)
        sequence.stream, sequence.heard, sequence.cut, sequence.text = self.model.begin(), 0, 0, ""
        sequence.samples = sequence.recent = torch.empty(0)
        sequence.tokens, sequence.frames, sequence.log_probs = [], [], []

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
        return handler.refused(index, context, error)

    def _open(self) -> int:
        """Number of sequences that are not over."""
        return sum(sequence.stream is not None for sequence in self.sequences.values())

    def _forget(self, now: float) -> None:
        """Drop what has been idle for too long."""
        longest = self.settings["max_idle_seconds"]
        for name, sequence in list(self.sequences.items()):
            if now - sequence.used > longest:
                self._drop(name, f"was idle for more than {longest} s" if sequence.stream else "has ended")

    def _drop(self, name: str, why: str) -> None:
        if decoder := self.sequences.pop(name).decoder:
            decoder[0].put(None)  # or its thread would wait for ever
        self.over[name] = why
        if len(self.over) > REMEMBERED:
            del self.over[next(iter(self.over))]
