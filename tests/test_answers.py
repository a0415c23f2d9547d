"""What the caller gets: the formats, held against parsers that others wrote."""

import base64
import io
import math
import random
import statistics
import textwrap
import zlib

import jsonschema
import numpy as np
import pytest
import srt
import torch
import webvtt
from conftest import SAMPLES, Worker, encode, transcripts

import handler
from handler import segments_of, words_of

THREE_DIGITS = (SAMPLES / "three-digits.wav").read_bytes()
TEXT = transcripts("digits")["three-digits.wav"]
SECONDS = {"type": "number", "minimum": 0}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["task", "text", "duration", "language", "model", "segments", "words"],
    "properties": {
        "task": {"const": "transcribe"},
        "text": {"type": "string"},
        "duration": SECONDS,
        "language": {"const": "english"},
        "model": {"const": "digits"},
        "notes": {"type": "array", "items": {"type": "string"}},
        "segments": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": [
                    *("id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob"),
                    *("compression_ratio", "no_speech_prob"),
                ],
                "properties": {
                    "id": {"type": "integer"},
                    "seek": {"const": 0},
                    "start": SECONDS,
                    "end": SECONDS,
                    "text": {"type": "string"},
                    "tokens": {"type": "array", "items": {"type": "integer"}},
                    "temperature": {"const": 0.0},
                    "avg_logprob": {"type": "number", "maximum": 0},
                    "compression_ratio": {"type": "number", "exclusiveMinimum": 0},
                    "no_speech_prob": {"const": 0.0},
                },
            },
        },
        "words": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["word", "start", "end", "probability"],
                "properties": {
                    "word": {"type": "string", "pattern": "^[a-z]+$"},
                    "start": SECONDS,
                    "end": SECONDS,
                    "probability": {"type": "number", "minimum": 0, "maximum": 1},
                },
            },
        },
        "alternatives": {
            "type": "array",
            "items": {"type": "object", "required": ["text", "score"]},
        },
    },
}


def verbose(worker: Worker, audio: bytes) -> dict:
    [(status, body)] = worker.answer({"file": bytearray(audio), "response_format": bytearray(b"verbose_json")})
    assert status == 200
    jsonschema.validate(body, SCHEMA)
    return body


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/plain; charset=utf-8"),
        ("", "text/plain; charset=utf-8"),
        ("*/*", "text/plain; charset=utf-8"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "text/plain; charset=utf-8"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/plain;q=0.5, application/json;q=0.9", "application/json"),
        ("application/json; profile=verbose", "application/json"),
        ('application/json; profile="verbose"', "application/json"),
        ("application/x-subrip", "application/x-subrip; charset=utf-8"),
        ("TEXT/VTT", "text/vtt; charset=utf-8"),
    ],
)
@pytest.mark.parametrize("name", ["Accept", "accept"])
def test_the_accept_header_chooses_the_format(worker, name, accept, content_type):
    [(status, body)] = worker.answer({"body": THREE_DIGITS}, headers={name: accept} if accept else {})
    assert (status, worker.context.get_response_content_type(0)) == (200, content_type)
    assert TEXT in (body["text"] if isinstance(body, dict) else body)
    assert ("words" in body) == ("profile" in str(accept))


@pytest.mark.parametrize("name", ["text", "json", "verbose_json", "srt", "vtt"])
@pytest.mark.parametrize("kind", [str, bytearray], ids=["text field", "bytes field"])
def test_the_form_field_chooses_the_format_before_the_header(worker, name, kind):
    field = name if kind is str else bytearray(name.encode())
    request = {"response_format": field, "file": bytearray(THREE_DIGITS)}
    [(status, body)] = worker.answer(request, headers={"Accept": "application/pdf"})
    assert status == 200
    assert isinstance(body, dict) == name.endswith("json")
    assert worker.context.get_response_content_type(0) == handler.ANSWER_FORMATS[name][0]


@pytest.mark.parametrize(
    ("request_fields", "headers"),
    [
        ({"response_format": "diarized_json"}, {}),
        ({"response_format": bytearray(b"\xff\xfe\n[METRICS]")}, {}),
        ({"response_format": ["text"]}, {}),
        ({}, {"Accept": "application/pdf"}),
        ({}, {"Accept": "text/plain;q=0"}),
        ({}, {"Accept": "text/plain;q=0, */*"}),
        ({}, {"Accept": ";;,;q=one,"}),
    ],
)
def test_an_unknown_format_gets_a_406_with_the_list(worker, request_fields, headers):
    [(status, body)] = worker.answer({"data": THREE_DIGITS} | request_fields, headers=headers)
    assert (status, body["code"], body["type"]) == (406, 406, "UnknownFormat")
    assert all(name in body["message"] for name in ("text", "json", "verbose_json", "srt", "vtt", "text/vtt"))
    assert "METRICS" not in body["message"]


@pytest.mark.parametrize("file", transcripts("digits"))
def test_words_are_those_of_the_text_in_order_and_inside_the_audio(worker, file):
    body = verbose(worker, (SAMPLES / file).read_bytes())
    assert body["text"] == transcripts("digits")[file]
    assert [word["word"] for word in body["words"]] == body["text"].split()
    assert " ".join(segment["text"] for segment in body["segments"]) == body["text"]
    for parts in (body["words"], body["segments"]):
        times = [time for part in parts for time in (part["start"], part["end"])]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= body["duration"]


def test_words_are_where_they_are_said(worker, speech):
    """The sample says its digits with silence around them, which is where the waveform is loud."""
    for before in (0.0, 1.0):
        words = verbose(worker, encode(pad(speech, before)[None].numpy(), 16_000, "wav", "pcm_s16le"))["words"]
        loud = (pad(speech, before).abs() > 0.02).nonzero() / 16_000
        assert words[0]["start"] == pytest.approx(float(loud.min()), abs=0.12)
        assert words[-1]["end"] == pytest.approx(float(loud.max()), abs=0.25)


def pad(speech: torch.Tensor, seconds: float) -> torch.Tensor:
    """``seconds`` of silence and then ``speech``."""
    return torch.nn.functional.pad(speech, (int(16_000 * seconds), 0))


def test_subtitles_are_read_by_others_and_break_at_pauses(worker, speech):
    long = torch.cat([pad(speech, 1.6) for _ in range(8)])
    audio = encode(long[None].numpy(), 16_000, "wav", "pcm_s16le")
    [(_, as_srt)] = worker.answer({"file": audio, "response_format": "srt"})
    [(_, as_vtt)] = worker.answer({"file": audio, "response_format": "vtt"})
    cues = list(srt.parse(as_srt))
    assert srt.compose(cues).strip() == as_srt.strip()
    captions = webvtt.from_buffer(io.StringIO(as_vtt)).captions
    assert [cue.content for cue in cues] == [caption.text for caption in captions] == [TEXT] * 8
    for cue, caption in zip(cues, captions, strict=True):
        assert f"0{cue.start}000"[:12] == caption.start and f"0{cue.end}000"[:12] == caption.end
        assert cue.start < cue.end


@pytest.mark.parametrize("seconds", [0.1, 0.3, 1.0])
def test_a_subtitle_holds_at_most_seven_seconds_and_two_lines(worker, seconds):
    names, rng = ["oh", "one", "four", "three", "seven", "extraordinary", "a" * 50], random.Random(0)
    words = [
        {
            "word": rng.choice(names),
            "start": seconds * i,
            "end": seconds * (i + 0.7),
            "log_probs": [-0.1],
            "tokens": [i],
        }
        for i in range(1000)
    ]
    segments = segments_of(words)
    assert " ".join(segment["text"] for segment in segments) == " ".join(word["word"] for word in words)
    assert [token for segment in segments for token in segment["tokens"]] == list(range(1000))
    assert [segment["id"] for segment in segments] == list(range(len(segments)))
    for segment in segments:
        assert segment["end"] - segment["start"] <= 7.0
        lines = textwrap.wrap(segment["text"], 42, break_long_words=False)
        assert len(lines) <= 2


def naming(worker) -> tuple:
    """What ``words_of`` needs of a handler."""
    return worker.handler.tokens_to_text, worker.handler.word_delays


def test_probabilities_are_those_of_the_tokens(worker, speech):
    [[(tokens, _, _, log_probs), *_]] = worker.handler._search([speech])
    body = verbose(worker, THREE_DIGITS)
    # Each word is a mark and a token.
    assert len(log_probs) == len(tokens) - 1 == 2 * len(body["words"])
    for i, word in enumerate(body["words"]):
        assert word["probability"] == pytest.approx(math.exp(log_probs[2 * i] + log_probs[2 * i + 1]), abs=1e-4)
    assert body["segments"][0]["avg_logprob"] == pytest.approx(statistics.fmean(log_probs), abs=1e-4)


def test_probabilities_without_marks_are_those_of_the_tokens_alone(worker, speech):
    [[(tokens, score, frames, _), *_]] = worker.handler._search([speech])
    tokens, frames = tokens[:1] + tokens[2::2], frames[1::2]
    words = words_of((tokens, score, frames, [-1.0] * len(frames)), 3.0, *naming(worker))
    assert [word["word"] for word in words] == TEXT.split()
    assert [word["probability"] for word in words] == [round(math.exp(-1), 4)] * 3
    assert segments_of(words)[0]["avg_logprob"] == -1.0


def test_verbose_json_has_the_types_of_openais_client(worker, speech):
    types = pytest.importorskip("openai.types.audio", reason="needs the package openai, see requirements-dev.txt")
    long = torch.cat([pad(speech, 1.6) for _ in range(4)])
    body = verbose(worker, encode(long[None].numpy(), 16_000, "wav", "pcm_s16le"))
    read = types.TranscriptionVerbose.model_validate(body, strict=True)  # a client only constructs, whatever is missing
    assert (read.text, read.duration, read.language) == (body["text"], body["duration"], "english")
    assert [segment.text for segment in read.segments] == [TEXT] * 4
    assert [word.word for word in read.words] == f"{TEXT} {TEXT} {TEXT} {TEXT}".split()
    for model, part in ((types.TranscriptionSegment, body["segments"]), (types.TranscriptionWord, body["words"])):
        assert all(field in part[0] for field in model.model_fields)
    unread = set(types.TranscriptionVerbose.model_fields) - body.keys()
    assert unread <= {"usage"}
    assert types.Transcription.model_validate(worker.answer({"file": THREE_DIGITS, "response_format": "json"})[0][1])


def test_what_a_segment_says_of_itself_is_true(worker, speech):
    [segment] = verbose(worker, THREE_DIGITS)["segments"]
    assert worker.handler.tokens_to_text(segment["tokens"]) == TEXT
    [[(tokens, *_), *_]] = worker.handler._search([speech])
    assert segment["tokens"] == tokens[1:]
    text = TEXT.encode()
    assert segment["compression_ratio"] == pytest.approx(len(text) / len(zlib.compress(text)), abs=1e-4)


def test_silence_has_no_words_in_any_format(worker):
    silence = encode(np.zeros((1, 32_000), np.float32), 16_000, "wav", "pcm_s16le")
    body = verbose(worker, silence)
    assert (body["text"], body["words"], body["segments"]) == ("", [], [])
    assert worker.answer({"file": silence, "response_format": "srt"}) == [(200, "")]
    [(_, vtt)] = worker.answer({"file": silence, "response_format": "vtt"})
    assert webvtt.from_buffer(io.StringIO(vtt)).captions == []


def test_a_request_has_at_most_64_files(worker):
    """A file of one sample is computed as a segment of 160 ms: thousands would cost more than they are long."""
    click = encode(np.zeros((1, 1), np.float32), 16_000, "wav", "pcm_s16le")
    one = {"data": base64.b64encode(click).decode()}
    assert worker.answer({"body": {"instances": [one] * 64}}) == [(200, {"predictions": [""] * 64})]
    [(status, body)] = worker.answer({"body": {"instances": [one] * 65}})
    assert (status, body["type"]) == (413, "TooManyFiles")


def test_what_was_mended_of_several_files_is_told_in_few_words(worker, speech):
    damaged = encode(speech.repeat(4)[None].numpy(), 16_000, "adts", "aac")
    damaged = damaged[: len(damaged) // 2] + bytes(400) + damaged[len(damaged) // 2 + 400 :]
    instances = [{"data": base64.b64encode(audio).decode()} for audio in [THREE_DIGITS] + [damaged] * 63]
    [(_, body)] = worker.answer({"body": {"instances": instances, "response_format": "verbose_json"}})
    assert ["notes" in prediction for prediction in body["predictions"]] == [False] + [True] * 63
    assert worker.context.get_response_headers(0)["x-audio-notes"].startswith("63 of the files")


def test_a_wide_beam_tells_alternatives(digits_pt):
    body = verbose(Worker(digits_pt, {"beam_width": 4}), THREE_DIGITS)
    assert body["alternatives"][0]["text"] == body["text"]
    assert len({each["text"] for each in body["alternatives"]}) == len(body["alternatives"]) <= 4


def test_several_files_in_kserves_way_are_answered_in_order(worker):
    files = list(transcripts("digits").items())[:3]
    instances = [{"data": base64.b64encode((SAMPLES / file).read_bytes()).decode()} for file, _ in files]
    assert worker.answer({"body": {"instances": instances}}) == [(200, {"predictions": [text for _, text in files]})]
    [(_, body)] = worker.answer({"body": {"instances": instances, "response_format": "json"}})
    assert body == {"predictions": [{"text": text} for _, text in files]}
    assert worker.context.get_response_content_type(0) == "application/json"


@pytest.mark.parametrize("instances", [[], {}, "text", [{}], [17], [{"data": None}], [{"data": ""}]])
def test_instances_without_audio_get_a_400(worker, instances):
    [(status, body)] = worker.answer({"body": {"instances": instances}})
    assert (status, body["code"]) == (400, 400)


def test_several_files_together_may_not_be_longer_than_one(digits_pt):
    worker = Worker(digits_pt, {"max_audio_seconds": 3})
    one = {"data": base64.b64encode(THREE_DIGITS).decode()}
    assert worker.answer({"body": {"instances": [one]}})[0][0] == 200
    assert worker.answer({"body": {"instances": [one] * 4}})[0][0] == 413
