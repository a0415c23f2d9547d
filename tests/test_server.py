"""A real TorchServe on free ports: exported, archived, started, asked and stopped as the README says."""

import base64
import concurrent.futures
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import grpc
import psutil
import pytest
import requests
from conftest import ROOT, SAMPLES, run, transcripts
from fuzzing import requests_of
from google.protobuf import descriptor_pb2, message_factory

import export_model
import serve

BIN = Path(sys.executable).parent
THREE_DIGITS = SAMPLES / "three-digits.wav"


class Server:
    """A folder with everything one TorchServe needs, apart from any other that runs on this machine."""

    def __init__(self, folder: Path, model: Path, beam_width: int = 1) -> None:
        self.folder = folder
        self.config = folder / "config.properties"
        self.store = folder / "model_store"
        self.store.mkdir()
        # TorchServe keeps its pid file, its sockets and the unpacked archive there.
        self.environment = {"TMPDIR": str(folder), "TEMP": str(folder)}
        ports = free_ports(5)
        text = re.sub(
            r"(?<=_address=http://127.0.0.1):\d+$",
            lambda _: f":{ports.pop()}",
            (ROOT / "config.properties").read_text(),
            flags=re.M,
        )
        text = re.sub(r"port=\d+$", lambda _: f"port={ports.pop()}", text, flags=re.M)
        self.config.write_text(text)
        self.url = serve.read_config(self.config)["inference_address"] + "/predictions/emformer_asr"
        command = [BIN / "torch-model-archiver", "--model-name", "emformer_asr", "--version", "1.0"]
        command += ["--serialized-file", model, "--handler", ROOT / "handler.py"]
        # A batch of several requests is what the tests are after.
        settings = re.sub(r"batchSize: \d+", "batchSize: 8", (ROOT / "model-config.yaml").read_text())
        settings = re.sub(r"beam_width: \d+", f"beam_width: {beam_width}", settings)
        (folder / "model-config.yaml").write_text(settings)
        command += ["--config-file", folder / "model-config.yaml", "--export-path", self.store]
        subprocess.run(command, check=True, env=os.environ | self.environment)

    def serve(self, command: str) -> subprocess.CompletedProcess[str]:
        options = ["--config", self.config, "--model-store", self.store, "--logs", self.folder / "logs"]
        return run("serve.py", command, *options, **self.environment)

    def processes(self) -> list[psutil.Process]:
        """TorchServe and its workers."""
        pid = int((self.folder / ".model_server.pid").read_text())
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def new_server():
    """Make servers in short folders (a socket's path has at most 107 characters); leave none behind."""
    servers = []

    def make(model: Path, beam_width: int = 1) -> Server:
        servers.append(Server(Path(tempfile.mkdtemp(prefix="ts-")), model, beam_width))
        return servers[-1]

    yield make
    for server in servers:
        server.serve("stop")
        shutil.rmtree(server.folder)


@pytest.fixture(scope="module")
def server(digits_pt):
    folder = Path(tempfile.mkdtemp(prefix="ts-"))
    server = Server(folder, digits_pt)
    started = server.serve("start")
    assert started.returncode == 0, started.stdout + started.stderr
    yield server
    server.serve("stop")
    shutil.rmtree(folder)


def post(server: Server, path: Path) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(server.url, data=path.read_bytes(), headers=headers, timeout=60)


@pytest.mark.parametrize("file", transcripts("digits"))
def test_every_sample_comes_back_as_its_text(server, file):
    answer = post(server, SAMPLES / file)
    assert (answer.status_code, answer.text) == (200, transcripts("digits")[file])
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(("precision", "beam_width"), [("fp32", 10), ("int8", 1), ("int8", 10)])
def test_every_sample_is_right_at_other_precisions_and_beam_widths(new_server, tmp_path, precision, beam_width):
    model = tmp_path / "emformer_rnnt.pt"
    export_model.export("digits", model, precision)
    server = new_server(model, beam_width)
    started = server.serve("start")
    assert started.returncode == 0, started.stdout + started.stderr
    heard = {file: post(server, SAMPLES / file).text for file in transcripts("digits")}
    assert heard == transcripts("digits")


def test_sixteen_at_once_get_each_its_own_text(server):
    files = ([*transcripts("digits")] * 3)[:16]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda file: post(server, SAMPLES / file), files))
    assert [answer.text for answer in answers] == [transcripts("digits")[file] for file in files]


def test_a_bad_file_among_good_ones_is_the_only_one_refused(server, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF" + bytes(1000))
    paths = [THREE_DIGITS, tmp_path / "bad.wav"] * 6
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda path: post(server, path), paths))
    assert [answer.status_code for answer in answers] == [200, 400] * 6
    assert {answer.text for answer in answers[::2]} == {"four seven two"}
    for refused in answers[1::2]:
        assert refused.headers["content-type"] == "application/json"
        assert refused.json().keys() == {"code", "type", "message"}


def test_an_empty_body_gets_a_400(server):
    answer = requests.post(server.url, timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (400, "EmptyBody")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize(
    "options",
    [
        ["-T", THREE_DIGITS],
        ["-F", f"data=@{THREE_DIGITS}"],
        ["-H", "Content-Type: audio/wav", "--data-binary", f"@{THREE_DIGITS}"],
    ],
    ids=["-T", "-F", "--data-binary with a type"],
)
def test_curl_gets_the_text(server, options):
    done = subprocess.run(["curl", "-sS", "-X", "POST", server.url, *options], capture_output=True, text=True)
    assert done.stdout == "four seven two"


def test_the_readmes_python_client_prints_the_text(server):
    [client] = re.findall(r"^python -c '(.*?requests\.post.*?)'$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    client = client.replace("http://localhost:8080/predictions/emformer_asr", server.url)
    done = subprocess.run([sys.executable, "-c", client], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("four seven two\n", "")


def test_the_server_listens_on_loopback_only(server):
    listening = {
        connection.laddr.ip
        for process in server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_models_cannot_be_registered_over_http(server):
    management = serve.read_config(server.config)["management_address"]
    archive = (server.store / "emformer_asr.mar").as_uri()
    assert requests.post(f"{management}/models", params={"url": archive}, timeout=60).status_code in (403, 405)
    assert requests.delete(f"{management}/models/emformer_asr", timeout=60).status_code in (403, 405)
    assert post(server, THREE_DIGITS).text == "four seven two"


def test_metrics_are_prometheus_text(server):
    metrics = requests.get(serve.read_config(server.config)["metrics_address"] + "/metrics", timeout=60).text
    assert re.search(r'^ts_inference_requests_total\{model_name="emformer_asr"', metrics, flags=re.M)


# The formats of the answer


@pytest.mark.parametrize(
    ("accept", "field", "content_type"),
    [
        (None, "text", "text/plain; charset=utf-8"),
        ("application/json", "json", "application/json"),
        ("application/json; profile=verbose", "verbose_json", "application/json"),
        ("application/x-subrip", "srt", "application/x-subrip; charset=utf-8"),
        ("text/vtt", "vtt", "text/vtt; charset=utf-8"),
    ],
)
def test_the_caller_chooses_the_format(server, accept, field, content_type):
    headers = {"Content-Type": "application/octet-stream"} | ({"Accept": accept} if accept else {})
    by_header = requests.post(server.url, THREE_DIGITS.read_bytes(), headers=headers, timeout=60)
    form = {"file": ("speech.wav", THREE_DIGITS.read_bytes())}
    by_field = requests.post(server.url, files=form, data={"response_format": field}, timeout=60)
    for answer in (by_header, by_field):
        assert (answer.status_code, answer.headers["content-type"]) == (200, content_type)
        assert "four seven two" in answer.text
    assert by_header.text == by_field.text


def test_an_unknown_format_gets_a_406(server):
    headers = {"Content-Type": "application/octet-stream", "Accept": "application/pdf"}
    answer = requests.post(server.url, THREE_DIGITS.read_bytes(), headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (406, "UnknownFormat")


def test_several_files_in_json_are_answered_in_order(server):
    files = list(transcripts("digits").items())
    instances = [{"data": base64.b64encode((SAMPLES / file).read_bytes()).decode()} for file, _ in files]
    answer = requests.post(server.url, json={"instances": instances}, timeout=60)
    assert answer.json() == {"predictions": [text for _, text in files]}


# Metrics


def metrics(server: Server) -> dict[str, float]:
    """What the server says of our model: metric and outcome to value."""
    url = serve.read_config(server.config)["metrics_address"] + "/metrics"
    lines = requests.get(url, timeout=60).text.splitlines()
    found = [re.match(r'(asr_\w+)\{(?:.*Outcome="(\w+)")?.*\} (\S+)$', line) for line in lines if "le=" not in line]
    return {f"{match[1]} {match[2] or ''}".strip(): float(match[3]) for match in found if match}


def test_metrics_count_what_was_asked(new_server, digits_pt):
    server = new_server(digits_pt)
    assert server.serve("start").returncode == 0
    for _ in range(3):
        assert post(server, THREE_DIGITS).status_code == 200
    assert post(server, ROOT / "README.md").status_code == 400
    deadline = time.monotonic() + 30  # TorchServe reads them from the worker's log, a little later
    while metrics(server).get("asr_requests NotAudio") is None and time.monotonic() < deadline:
        time.sleep(0.5)
    found = metrics(server)
    with av.open(str(THREE_DIGITS)) as file:
        duration = file.duration / 1e6
    assert found["asr_requests ok"] == 3
    assert found["asr_requests NotAudio"] == 1
    assert found["asr_audio_seconds"] == pytest.approx(3 * duration, abs=0.01)
    assert found["asr_batch_size_count"] == found["asr_handler_seconds_count"] == 4
    for name in ("decode_seconds", "features_seconds", "engine_seconds", "real_time_factor"):
        assert found[f"asr_{name}_count"] == 3
        assert found[f"asr_{name}_sum"] > 0


# Attacks


def test_strange_requests_are_answered_and_the_next_one_is_right(server, speech):
    workers = {process.pid for process in server.processes()}
    rng = random.Random(3)
    types = ["application/octet-stream", "audio/wav", "text/plain", "application/json", "multipart/form-data", "x", ""]
    with requests.Session() as session:
        for number, (fields, _) in enumerate(requests_of(speech, 300, seed=3)):
            [content] = [value for name, value in fields.items() if name != "response_format"] or [b""]
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


def test_no_client_can_forge_a_metric(server):
    forged = b"\n[METRICS]asr_requests.count:1000000|#Outcome:ok,ModelName:emformer_asr,Level:Model|#type:COUNTER\n"
    for content_type in ("application/octet-stream", "text/plain", "application/json"):
        requests.post(server.url, forged, headers={"Content-Type": content_type}, timeout=60)
    requests.post(server.url, files={"\n[METRICS]x": forged}, timeout=60)
    time.sleep(3)
    assert metrics(server).get("asr_requests ok", 0) < 1_000_000


# gRPC


def grpc_call(server: Server, method: str, fields: dict[str, bytes]) -> list[bytes]:
    """Call TorchServe's inference service, without the code that is generated from its .proto file."""
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package="test", syntax="proto3")
    asked = file.message_type.add(name="PredictionsRequest")
    asked.field.add(name="model_name", number=1, type=9, label=1)
    asked.field.add(name="model_version", number=2, type=9, label=1)
    asked.field.add(name="input", number=3, type=11, label=3, type_name=".test.PredictionsRequest.InputEntry")
    entry = asked.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=12, label=1)
    file.message_type.add(name="PredictionResponse").field.add(name="prediction", number=1, type=12, label=1)
    messages = message_factory.GetMessages([file])
    config = serve.read_config(server.config)
    with grpc.insecure_channel(f"127.0.0.1:{config['grpc_inference_port']}") as channel:
        call = (channel.unary_stream if method.startswith("Stream") else channel.unary_unary)(
            f"/org.pytorch.serve.grpc.inference.InferenceAPIsService/{method}",
            request_serializer=messages["test.PredictionsRequest"].SerializeToString,
            response_deserializer=messages["test.PredictionResponse"].FromString,
        )
        answer = call(messages["test.PredictionsRequest"](model_name="emformer_asr", input=fields), timeout=60)
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


def test_a_second_start_finds_the_server_running(server):
    before = server.processes()[0].pid
    again = server.serve("start")
    assert again.returncode == 0 and "running already" in again.stdout
    assert server.processes()[0].pid == before


def test_a_start_while_a_killed_worker_recovers_leaves_the_server_alone(server):
    torchserve, *workers = server.processes()
    for process in workers:
        process.kill()
    psutil.wait_procs(workers)
    again = server.serve("start")
    assert again.returncode == 0 and "running already" in again.stdout
    assert server.processes()[0] == torchserve
    assert post(server, THREE_DIGITS).text == "four seven two"


def test_stop_leaves_no_process_behind(new_server, digits_pt):
    server = new_server(digits_pt)
    assert server.serve("start").returncode == 0
    family = server.processes()
    assert len(family) >= 2  # the server and a worker
    assert "has stopped" in server.serve("stop").stdout
    assert not [process for process in family if process.is_running()]


def test_a_port_in_use_is_named_in_one_sentence(new_server, digits_pt):
    server = new_server(digits_pt)
    host, port = serve.ports(serve.read_config(server.config))[0]
    with socket.socket() as other:
        other.bind((host, port))
        other.listen()
        started = server.serve("start")
    assert started.returncode == 1
    assert started.stderr.count("\n") == 1 and f"Port {port} on {host} is not free" in started.stderr


def test_a_worker_that_dies_while_loading_ends_the_start_with_its_reason(new_server, tmp_path):
    (tmp_path / "emformer_rnnt.pt").write_text("not a TorchScript file")
    server = new_server(tmp_path / "emformer_rnnt.pt")
    started = server.serve("start")
    assert started.returncode == 1
    assert "Traceback" in started.stderr  # the log's last lines
    assert "The worker died while it loaded the model: PytorchStreamReader" in started.stderr.splitlines()[-1]
    assert "not running" in server.serve("stop").stdout
