"""What the caller gets: the formats, held against parsers that others wrote."""

import base64
import io
import json

import jsonschema
import numpy as np
import pytest
import srt
import torch
import webvtt
from conftest import SAMPLES, Worker, encode, transcripts

import handler

THREE_DIGITS = (SAMPLES / "three-digits.wav").read_bytes()
TEXT = transcripts("digits")["three-digits.wav"]
SECONDS = {"type": "number", "minimum": 0}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["text", "duration", "language", "model", "segments", "words"],
    "properties": {
        "text": {"type": "string"},
        "duration": SECONDS,
        "language": {"const": "english"},
        "model": {"const": "digits"},
        "notes": {"type": "array", "items": {"type": "string"}},
        "segments": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "start", "end", "text", "avg_logprob"],
                "properties": {"id": {"type": "integer"}, "start": SECONDS, "end": SECONDS, "text": {"type": "string"}},
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
    assert worker.context.get_response_content_type(0) == handler.FORMATS[name][0]


@pytest.mark.parametrize(
    ("request_fields", "headers"),
    [
        ({"response_format": "diarized_json"}, {}),
        ({"response_format": bytearray(b"\xff\xfe\n[METRICS]")}, {}),
        ({"response_format": ["text"]}, {}),
        ({}, {"Accept": "application/pdf"}),
        ({}, {"Accept": "text/plain;q=0"}),
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
    """Three digits a second later are told a second later."""
    first = verbose(worker, encode(speech[None].numpy(), 16_000, "wav", "pcm_s16le"))
    late = verbose(worker, encode(pad(speech, 1.0)[None].numpy(), 16_000, "wav", "pcm_s16le"))
    for before, after in zip(first["words"], late["words"], strict=True):
        assert abs(after["start"] - before["start"] - 1.0) <= 0.12
        assert abs(after["end"] - before["end"] - 1.0) <= 0.12


def pad(speech: torch.Tensor, seconds: float) -> torch.Tensor:
    """``seconds`` of silence and then ``speech``."""
    return torch.nn.functional.pad(speech, (int(16_000 * seconds), 0))


def test_subtitles_are_read_by_others_and_break_at_pauses(worker, speech):
    long = torch.cat([pad(speech, 1.5) for _ in range(8)])
    audio = encode(long[None].numpy(), 16_000, "wav", "pcm_s16le")
    [(_, as_srt)] = worker.answer({"file": audio, "response_format": "srt"})
    [(_, as_vtt)] = worker.answer({"file": audio, "response_format": "vtt"})
    cues = list(srt.parse(as_srt))
    assert srt.compose(cues).strip() == as_srt.strip()
    captions = webvtt.from_buffer(io.StringIO(as_vtt)).captions
    assert [cue.content for cue in cues] == [caption.text for caption in captions] == [TEXT] * 8
    for cue, caption in zip(cues, captions, strict=True):
        assert cue.start.total_seconds() == pytest.approx(caption.start_in_seconds, abs=1)
        assert cue.start < cue.end


def test_a_subtitle_holds_at_most_seven_seconds_and_two_lines(worker):
    words = [
        {"word": "abcdefgh", "start": 0.3 * i, "end": 0.3 * i + 0.2, "log_probs": [-0.1], "probability": 0.9}
        for i in range(100)
    ]
    for segment in worker.handler._segments(words):
        assert segment["end"] - segment["start"] <= 7.0
        assert len(segment["text"]) <= 84


def test_silence_has_no_words_in_any_format(worker):
    silence = encode(np.zeros((1, 32_000), np.float32), 16_000, "wav", "pcm_s16le")
    body = verbose(worker, silence)
    assert (body["text"], body["words"], body["segments"]) == ("", [], [])
    assert worker.answer({"file": silence, "response_format": "srt"}) == [(200, "")]
    [(_, vtt)] = worker.answer({"file": silence, "response_format": "vtt"})
    assert webvtt.from_buffer(io.StringIO(vtt)).captions == []


def test_many_tiny_files_may_not_fill_the_memory(digits_pt):
    """A file of one sample is computed as a segment of 160 ms, and counts as one."""
    worker = Worker(digits_pt, {"max_audio_seconds": 3})
    click = encode(np.zeros((1, 1), np.float32), 16_000, "wav", "pcm_s16le")
    one = {"data": base64.b64encode(click).decode()}
    assert worker.answer({"body": {"instances": [one] * 18}})[0][0] == 200
    [(status, body)] = worker.answer({"body": {"instances": [one] * 20}})
    assert (status, body["type"]) == (413, "AudioTooLong")


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
    json.dumps(body)


@pytest.mark.parametrize("instances", [[], {}, "text", [{}], [17], [{"data": None}], [{"data": ""}]])
def test_instances_without_audio_get_a_400(worker, instances):
    [(status, body)] = worker.answer({"body": {"instances": instances}})
    assert (status, body["code"]) == (400, 400)


def test_several_files_together_may_not_be_longer_than_one(digits_pt):
    worker = Worker(digits_pt, {"max_audio_seconds": 3})
    one = {"data": base64.b64encode(THREE_DIGITS).decode()}
    assert worker.answer({"body": {"instances": [one]}})[0][0] == 200
    assert worker.answer({"body": {"instances": [one] * 4}})[0][0] == 413
