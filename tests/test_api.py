"""The tables of docs/, row by row, through a real TorchServe."""

import base64
import http.client
import io
import json
import random
import re
import socket
import struct
import urllib.parse

import av
import grpc
import jsonschema
import numpy as np
import pytest
import requests
import srt
import torch
import torchaudio
import webvtt
from conftest import ROOT, SAMPLES, Server, encode, post, silent_film, transcripts, wait_until
from formats import FILES
from fuzzing import requests_of
from google.protobuf import descriptor_pb2, message_factory
from test_answers import SCHEMA
from test_hotwords import MISHEARD, SAID
from test_quality import HELD_OUT

import serve
from handler import ANSWER_FORMATS
from live import SETTINGS

THREE_DIGITS = SAMPLES / "three-digits.wav"
AUDIO = THREE_DIGITS.read_bytes()
BASE64 = base64.b64encode(AUDIO).decode()
TEXT = transcripts("digits")["three-digits.wav"]
RAW = {"Content-Type": "application/octet-stream"}
FORM = "application/x-www-form-urlencoded"


def table(*columns: str) -> list[list[str]]:
    """The rows of the only table in docs/ with these column names."""
    text = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    [rows] = re.findall(
        rf"^\| {re.escape(' | '.join(columns))} \|\n\|[-|]+\|\n((?:\|.*\n)+)",
        text,
        flags=re.M,
    )
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


# What you can send

WAYS = {
    "the file as the request body": {"data": AUDIO, "headers": RAW},
    "a form field": {"files": {"file": AUDIO}, "data": {"language": "en"}},
    "base64 text": {"data": BASE64, "headers": {"Content-Type": "text/plain"}},
    "base64 in JSON": {"json": {"data": BASE64}},
    "several files at once": {"json": {"instances": [{"data": BASE64}, {"data": BASE64}]}},
    "several files in one form": {"files": {"a": AUDIO, "b": AUDIO}},
}


@pytest.mark.parametrize("way", [row[0] for row in table("how", "with curl")])
def test_audio_is_understood_however_it_is_sent(server, way):
    request = next(request for name, request in WAYS.items() if way.startswith(name))
    answer = requests.post(server.url, **request, timeout=60)
    if way.startswith("several"):
        assert answer.json() == {"predictions": [TEXT] * 2}
    else:
        assert answer.text == TEXT


@pytest.mark.parametrize("file", [row[0] for row in table("file", "sound in it")])
def test_every_kind_of_file_is_understood(server, speech, file):
    for container, codec, rate in FILES[file]:
        samples = torchaudio.functional.resample(speech, 16_000, rate)[None].numpy()
        audio = encode(samples.repeat(2 if codec == "vorbis" else 1, axis=0), rate, container, codec)
        assert requests.post(server.url, audio, headers=RAW, timeout=60).text == TEXT, (container, codec)


# What you get


@pytest.mark.parametrize(
    ("field", "accept", "_"),
    table("`response_format`", "`Accept`", "body"),
)
def test_the_caller_chooses_the_format(server, field, accept, _):
    field = field.strip("`")
    by_field = requests.post(server.url, files={"file": AUDIO}, data={"response_format": field}, timeout=60)
    answers = [by_field]
    for value in re.findall("`(.+?)`", accept):
        answers.append(requests.post(server.url, AUDIO, headers=RAW | {"Accept": value}, timeout=60))
    if field == "text":
        answers.append(requests.post(server.url, AUDIO, headers=RAW | {"Accept": None}, timeout=60))
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] in accept
        assert answer.text == by_field.text
    if field == "text":
        assert by_field.text == TEXT
    elif field == "json":
        assert by_field.json() == {"text": TEXT}
    elif field == "verbose_json":
        jsonschema.validate(by_field.json(), SCHEMA)
        assert by_field.json()["text"] == TEXT
    elif field == "events":
        said = [json.loads(line.removeprefix("data: ")) for line in by_field.text.split("\n\n")[:-1]]
        assert [event["type"] for event in said] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
        assert "".join(event["delta"] for event in said[:-1]) == said[-1]["text"] == TEXT
        streamed = requests.post(server.url, files={"file": AUDIO}, data={"stream": "true"}, timeout=60)
        assert streamed.text == by_field.text
    else:
        parse = {"srt": srt.parse, "vtt": lambda text: webvtt.from_buffer(io.StringIO(text)).captions}[field]
        assert [getattr(cue, "content", None) or cue.text for cue in parse(by_field.text)] == [TEXT]


def test_the_proxy_knows_every_format():
    """What it asks the server for is tried where there is an nginx, in test_proxy.py."""
    [known] = re.findall(r"map \$arg_response_format .*\{([^}]*)\}", (ROOT / "deploy" / "nginx.conf").read_text())
    assert {*re.findall(r"^ *(\w+) ", known, re.MULTILINE)} == {*ANSWER_FORMATS, "default"}


def test_phrases_that_are_expected_are_heard(server):
    """As a form's field and as a header; the next request is none the wiser."""
    file = {"file": (HELD_OUT / MISHEARD).read_bytes()}
    assert requests.post(server.url, files=file, timeout=60).text != SAID
    assert requests.post(server.url, files=file, data={"hotwords": f"oh oh oh\n{SAID}: 2"}, timeout=60).text == SAID
    assert requests.post(server.url, files=file, headers={"x-hotwords": SAID}, timeout=60).text == SAID
    assert requests.post(server.url, files=file, timeout=60).text != SAID


def tiny_packets() -> bytes:
    """A file of a packet a sample: 3.5 million of them, where those of the first seconds cost too much."""
    file = bytearray(encode(np.zeros((1, 18 * 192_000), np.float32), 192_000, "caf", "pcm_s16le"))
    at = file.index(b"lpcm") + 8
    file[at : at + 8] = struct.pack(">II", 2, 3)
    return bytes(file)


REFUSED = {
    "EmptyBody": {"data": b""},
    "NotAudio": {"data": b"RIFF" + bytes(1000)},
    "NoSuchTrack": {"data": AUDIO, "headers": {"x-audio-track": "2"}},
    "BadHotwords": {"data": AUDIO, "headers": {"x-hotwords": "hello"}},
    "LostFile": {"files": [("file", AUDIO), ("file", AUDIO)]},
    "NoSamples": {"data": AUDIO[: AUDIO.index(b"data")] + b"data" + bytes(4)},
    "UnknownFormat": {"data": AUDIO, "headers": {"Accept": "application/pdf"}},
    "AudioTooLong": {"data": encode(np.zeros((1, 200_000), np.float32), 8_000, "flac", "flac", "s16")},
    "TooCostly": {"data": tiny_packets()},
    "TooManyFiles": {"json": {"instances": [{"data": "UklGRg=="}] * 65}},
    "NoAudioStream": {"data": silent_film()},
    "NoDecoder": {"data": encode(np.zeros((1, 9_000), np.float32), 16_000, "mov", "alac").replace(b"alac", b"drms")},
}
# What no request can bring about is in test_handler.py and test_hotwords.py.
ELSEWHERE = {"`NoTimes`", "`NoHotwords`", "`InternalError`"}
REFUSALS = [row[:2] for row in table("status", "`type`", "when") if row[1] not in ELSEWHERE]


@pytest.fixture(scope="module")
def strict(digits_pt):
    """A server whose model takes 20 seconds of audio at most, with a wide beam."""
    server = Server(digits_pt, beam_width=4, max_audio_seconds=20)
    server.start()
    yield server
    server.remove()


@pytest.mark.parametrize(("status", "kind"), REFUSALS)
def test_what_cannot_be_answered_gets_its_status_and_a_sentence(strict, status, kind):
    kind = kind.strip("`")
    request = REFUSED[kind]
    if "json" in request or "files" in request:
        answer = requests.post(strict.url, **request, timeout=60)
    else:
        answer = requests.post(strict.url, request["data"], headers=RAW | request.get("headers", {}), timeout=60)
    body = answer.json()
    assert (answer.status_code, body["code"], body["type"]) == (int(status), int(status), kind)
    assert answer.headers["content-type"] == "application/json"
    assert body["message"].endswith((".", ").")) and len(body["message"]) > 40


def test_a_wide_beam_tells_alternatives(strict):
    answer = requests.post(strict.url, files={"file": AUDIO}, data={"response_format": "verbose_json"}, timeout=60)
    jsonschema.validate(answer.json(), SCHEMA)
    assert answer.json()["alternatives"][0]["text"] == TEXT


def test_what_was_mended_is_told(server, speech):
    audio = bytearray(encode(torch.cat([speech] * 4)[None].numpy(), 16_000, "adts", "aac"))
    audio[len(audio) // 2 : len(audio) // 2 + 400] = bytes(400)
    answer = requests.post(server.url, bytes(audio), headers=RAW, timeout=60)
    assert "damaged" in answer.headers["x-audio-notes"]
    assert answer.text.startswith(TEXT) and answer.text.endswith(TEXT)
    form = {"files": {"file": bytes(audio)}, "data": {"response_format": "verbose_json"}}
    assert requests.post(server.url, **form, timeout=60).json()["notes"] == [answer.headers["x-audio-notes"]]


# Settings


def test_every_setting_is_told_with_its_default():
    told = {}
    for names, defaults, _ in table("`handler:`", "default", "what"):
        told |= zip(names.split(", "), defaults.split(", "), strict=True)
    assert told == {f"`{name}`": "none" if value is None else str(value) for name, value in SETTINGS.items()}


# Metrics


def metrics(server: Server) -> dict[str, float]:
    """What the server says of our model: metric and outcome to value."""
    lines = requests.get(server.metrics_url, timeout=60).text.splitlines()
    found = [re.match(r'(asr_\w+)\{(?:.*Outcome="(\w+)")?.*\} (\S+)$', line) for line in lines if "le=" not in line]
    return {f"{match[1]} {match[2] or ''}".strip(): float(match[3]) for match in found if match}


def test_metrics_count_what_was_asked(new_server, digits_pt):
    server = new_server(digits_pt)
    server.start()
    for _ in range(3):
        assert post(server, THREE_DIGITS).status_code == 200
    assert post(server, ROOT / "README.md").status_code == 400
    # TorchServe reads them from the worker's log, a little later.
    wait_until(lambda: metrics(server).get("asr_requests NotAudio"), "the last request's metrics")
    found = metrics(server)
    assert found["asr_requests ok"] == 3
    assert found["asr_requests NotAudio"] == 1
    with av.open(str(THREE_DIGITS)) as file:
        assert found["asr_audio_seconds"] == pytest.approx(3 * file.duration / 1e6, abs=0.01)
    documented = {name.strip("`"): kind for name, kind, _ in table("metric", "type", "what")}
    assert documented.keys() == {re.sub("( .*|_count|_sum)$", "", name) for name in found}
    for name, kind in documented.items():
        if kind == "histogram":
            assert found[f"{name}_count"] == (3 if name == "asr_real_time_factor" else 4)
            assert found[f"{name}_sum"] > 0


def test_torchserves_own_metrics_are_still_there(server):
    assert post(server, THREE_DIGITS).status_code == 200
    text = requests.get(server.metrics_url, timeout=60).text
    assert re.search(r'^ts_inference_requests_total\{model_name="emformer_asr"', text, flags=re.M)
    assert "\nRequests2XX" in text and "# TYPE QueueTime gauge" in text


# Attacks


def test_strange_requests_are_answered_and_the_next_one_is_right(server, speech):
    workers = {process.pid for process in server.processes()}
    rng = random.Random(3)
    types = ["application/octet-stream", "audio/wav", "text/plain", "application/json", "multipart/form-data", "x", ""]
    with requests.Session() as session:
        for number, (fields, _) in enumerate(requests_of(speech, 300, seed=3)):
            content, *_ = [value for name, value in fields.items() if name != "response_format"] or [b""]
            if isinstance(content, str):
                content = content.encode()
            elif not isinstance(content, bytes | bytearray):
                content = json.dumps(content).encode()
            headers = {"Content-Type": rng.choice(types)}
            answer = session.post(server.url, bytes(content), headers=headers, timeout=60)
            # 500 and 503 would be a handler that raised; TorchServe gives 400 to forms and JSON that it cannot read.
            assert answer.status_code in {200, 400, 406, 413, 415}, (number, headers, answer.text)
            if number % 25 == 0:
                assert post(server, THREE_DIGITS).text == "four seven two"
    assert workers == {process.pid for process in server.processes()}


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predictions/emformer_asr HTTP/1.0\r\nContent-Length: %d\r\n",
        b"POST /predictions/emformer_asr HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAccept: \xff\xfe, */*\r\n",
        b"POST /predictions/emformer_asr HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nts_stream_next: true\r\n",
        b"POST /predictions/emformer_asr HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nX: " + b"y" * 7000 + b"\r\n",
    ],
    ids=["HTTP/1.0 without a header", "header that is not UTF-8", "header of TorchServe's own", "long header"],
)
def test_odd_heads_are_answered(server, head):
    audio = THREE_DIGITS.read_bytes()
    head = head.replace(b"%d", str(len(audio)).encode())
    host, port = serve.read_config(server.config)["inference_address"].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head + b"\r\n" + audio)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, answer.read()) == (200, b"four seven two")


def test_no_client_can_forge_a_metric_or_a_log_line(server):
    metric = "[METRICS]asr_requests.count:1000000|#Outcome:ok,ModelName:emformer_asr,Level:Model|#type:COUNTER"
    lines = f"\n{metric}\n2026-01-01T00:00:00,000 [INFO ] forged\n"
    quoted = urllib.parse.quote(lines, safe="")
    for content_type in ("application/octet-stream", "text/plain", "application/json", "audio/wav"):
        for body in (lines, json.dumps({"data": lines}), json.dumps({"data": BASE64, "response_format": lines})):
            requests.post(server.url, body.encode(), headers={"Content-Type": content_type}, timeout=60)
    requests.post(server.url, files={lines: (lines, lines)}, data={"response_format": lines}, timeout=60)
    requests.post(server.url, f"{quoted}={quoted}", headers={"Content-Type": FORM}, timeout=60)
    for url in (f"{server.url}?{quoted}", f"{server.url}/{quoted}", f"{server.url}{quoted}"):
        requests.post(url, AUDIO, headers=RAW | {"Accept": metric}, timeout=60)
    grpc_call(server, "Predictions", {lines: lines.encode(), "response_format": lines.encode()})
    # Metrics and log lines arrive a little later, in order: when the last request's are there, all are.
    refused = metrics(server).get("asr_requests NoAudioStream", 0)
    assert requests.post(server.url, silent_film(), headers=RAW, timeout=60).status_code == 415
    wait_until(lambda: metrics(server).get("asr_requests NoAudioStream", 0) > refused, "the last request's metrics")
    assert metrics(server).get("asr_requests ok", 0) < 1_000_000
    for log in (server.folder / "logs").iterdir():
        for line in log.read_text(errors="replace").splitlines():
            # The access log has the address as it was sent, which cannot break a line.
            line = line.replace(quoted, "")
            assert "forged" not in line and "1000000|" not in line, log


def test_json_of_any_depth_is_refused_and_the_worker_lives(server):
    workers = {process.pid for process in server.processes()}
    for depth in (900, 1_100, 100_000):
        for body in ("[" * depth + "]" * depth, '{"data":' * depth + "1" + "}" * depth):
            answer = requests.post(server.url, body, headers={"Content-Type": "application/json"}, timeout=60)
            assert (answer.status_code, answer.json()["type"]) == (400, "NotAudio")
    assert workers == {process.pid for process in server.processes()}


# gRPC


def grpc_call(
    server: Server, method: str, fields: dict[str, bytes], model: str = "emformer_asr", timeout: float = 60
) -> list[bytes]:
    """Call TorchServe's inference service, without the code that is generated from its .proto file."""
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package="test", syntax="proto3")
    asked = file.message_type.add(name="PredictionsRequest")
    asked.field.add(name="model_name", number=1, type=9, label=1)
    asked.field.add(name="model_version", number=2, type=9, label=1)
    asked.field.add(name="input", number=3, type=11, label=3, type_name=".test.PredictionsRequest.InputEntry")
    asked.field.add(name="sequence_id", number=4, type=9, label=1)
    entry = asked.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=12, label=1)
    file.message_type.add(name="PredictionResponse").field.add(name="prediction", number=1, type=12, label=1)
    messages = message_factory.GetMessages([file])
    config = serve.read_config(server.config)
    with grpc.insecure_channel(f"127.0.0.1:{config['grpc_inference_port']}") as channel:
        kinds = {"Predictions": channel.unary_unary, "StreamPredictions": channel.unary_stream}
        call = kinds.get(method, channel.stream_stream)(
            f"/org.pytorch.serve.grpc.inference.InferenceAPIsService/{method}",
            request_serializer=messages["test.PredictionsRequest"].SerializeToString,
            response_deserializer=messages["test.PredictionResponse"].FromString,
        )
        request = messages["test.PredictionsRequest"](model_name=model, input=fields, sequence_id="grpc")
        answer = call(iter([request]) if method == "StreamPredictions2" else request, timeout=timeout)
        return [part.prediction for part in (answer if method.startswith("Stream") else [answer])]


@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
def test_grpc_is_answered_by_the_same_handler(server, method):
    assert b"".join(grpc_call(server, method, {"data": THREE_DIGITS.read_bytes()})) == b"four seven two"
    [as_json] = grpc_call(server, method, {"data": THREE_DIGITS.read_bytes(), "response_format": b"json"})
    assert json.loads(as_json) == {"text": "four seven two"}
    assert post(server, THREE_DIGITS).text == "four seven two"


def test_an_error_over_grpc_is_in_the_body(server):
    [answer] = grpc_call(server, "Predictions", {"data": b"this is no audio"})
    assert json.loads(answer)["type"] == "NotAudio"
