"""nginx as deploy/nginx.conf sets it, before a live server and before one that only writes down what it gets."""

import contextlib
import http.client
import http.server
import json
import shutil
import socket
import subprocess
import threading

import openai
import pytest
import requests
from conftest import ROOT, SAMPLES, Server, needs_nginx, origin, run, transcripts
from openai.types.audio import Transcription, TranscriptionVerbose

import serve
from handler import ANSWER_FORMATS

pytestmark = needs_nginx
THREE_DIGITS = SAMPLES / "three-digits.wav"
AUDIO = THREE_DIGITS.read_bytes()
TEXT = transcripts("digits")["three-digits.wav"]
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def whole(digits_pt):
    """A server for whole files and live speech."""
    server = Server(digits_pt, live={})
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def proxy(whole) -> str:
    return origin(whole)


@pytest.fixture
def client(proxy) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy}/v1", api_key="none is asked for", max_retries=0)


# OpenAI's client


@pytest.mark.parametrize("response_format", ["json", "text", "verbose_json", "srt", "vtt"])
def test_openais_client_gets_every_format(client, whole, response_format):
    answer = client.audio.transcriptions.create(
        model="whisper-1", file=THREE_DIGITS, response_format=response_format, language="en", prompt="x", temperature=0
    )
    form = {"files": {"file": AUDIO}, "data": {"response_format": response_format}}
    direct = requests.post(whole.url, **form, timeout=300)
    if response_format == "json":
        assert isinstance(answer, Transcription) and answer.text == TEXT
    elif response_format == "verbose_json":
        assert isinstance(answer, TranscriptionVerbose) and answer.text == TEXT
        assert [word.word for word in answer.words] == TEXT.split()
        assert [segment.text for segment in answer.segments] == [TEXT]
    else:
        assert answer == direct.text


def test_openais_client_gets_json_if_it_chooses_nothing(client, proxy):
    assert client.audio.transcriptions.create(model="emformer_asr", file=THREE_DIGITS).text == TEXT
    bare = requests.post(f"{proxy}/v1/audio/transcriptions", files={"file": AUDIO}, timeout=300)
    assert bare.json() == {"text": TEXT}


@pytest.mark.parametrize("granularities", [["word"], ["segment"], ["word", "segment"]])
def test_openais_client_gets_times_of_every_granularity(client, granularities):
    answer = client.audio.transcriptions.create(
        model="whisper-1", file=THREE_DIGITS, response_format="verbose_json", timestamp_granularities=granularities
    )
    assert len(answer.words) == 3 and len(answer.segments) == 1
    assert answer.segments[0].start == answer.words[0].start < answer.words[0].end <= answer.words[1].start


def test_openais_client_streams(client):
    events = list(client.audio.transcriptions.create(model="whisper-1", file=THREE_DIGITS, stream=True))
    assert [event.type for event in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == TEXT


def test_openais_client_finds_the_model(client):
    assert [model.id for model in client.models.list()] == ["emformer_asr"]
    assert client.models.retrieve("emformer_asr").id == "emformer_asr"
    with pytest.raises(openai.NotFoundError, match="There is nothing at this address"):
        client.models.retrieve("whisper-1")


def test_openais_client_is_told_what_was_wrong(client):
    with pytest.raises(openai.BadRequestError, match="is not audio I can read"):
        client.audio.transcriptions.create(model="whisper-1", file=("bad.wav", b"RIFF" + bytes(1000)))


def test_openais_key_is_torchserves_token(new_server, digits_pt):
    server = new_server(digits_pt)
    text = server.config.read_text().replace("disable_token_authorization=true", "disable_token_authorization=false")
    server.config.write_text(text)
    server.start()
    key = json.loads((server.home / "key_file.json").read_text())["inference"]["key"]
    url = f"{origin(server)}/v1"
    with openai.OpenAI(base_url=url, api_key=key) as client:
        assert client.audio.transcriptions.create(model="whisper-1", file=THREE_DIGITS).text == TEXT
    with openai.OpenAI(base_url=url, api_key="wrong") as client, pytest.raises(openai.BadRequestError, match="Token"):
        client.audio.transcriptions.create(model="whisper-1", file=THREE_DIGITS)


# One address for all


@pytest.mark.parametrize("path", ["/predictions/emformer_asr", "/v1/audio/transcriptions"])
@pytest.mark.parametrize("response_format", ANSWER_FORMATS)
def test_a_query_chooses_the_format(proxy, whole, path, response_format):
    query = {"response_format": response_format, "audio_track": "1"}
    answer = requests.post(proxy + path, AUDIO, params=query, headers=RAW, timeout=300)
    form = {"files": {"file": AUDIO}, "data": {"response_format": response_format}}
    assert answer.text == requests.post(whole.url, **form, timeout=300).text
    wrong = requests.post(proxy + path, AUDIO, params={"response_format": "pdf"}, headers=RAW, timeout=300)
    assert (wrong.status_code, wrong.json()["type"]) == (406, "UnknownFormat")
    wrong = requests.post(proxy + path, AUDIO, params={"audio_track": "2"}, headers=RAW, timeout=300)
    assert (wrong.status_code, wrong.json()["type"]) == (400, "NoSuchTrack")


def test_page_live_speech_and_kserves_first_protocol_are_at_the_same_address(proxy):
    page = requests.get(f"{proxy}/", timeout=300)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == (ROOT / "clients" / "live.html").read_text()
    said = run(ROOT / "clients" / "live.py", THREE_DIGITS, "--server", proxy)
    assert (said.returncode, said.stdout) == (0, f"{TEXT}\n"), said.stderr
    assert requests.get(f"{proxy}/ping", timeout=300).json() == {"status": "Healthy"}


@pytest.mark.parametrize(
    "path", ["/models", "/models/emformer_asr", "/metrics", "/invocations", "/live.py", "/../serve.py"]
)
def test_nothing_else_can_be_reached(proxy, path):
    host, port = proxy.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=300)
    connection.request("GET", path)
    assert connection.getresponse().status in (400, 404)


def test_localhost_is_both_of_its_addresses(proxy):
    with contextlib.suppress(OSError):  # of a machine without IPv6
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        answer = requests.get(f"http://[::1]:{proxy.rsplit(':', 1)[1]}/ping", timeout=300)
        assert answer.json() == {"status": "Healthy"}


# What it does with requests, seen from behind


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers with what it got; under /predictions/emformer_asr as TorchServe does whose queue is full."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        first = self.rfile.read(1)
        self.server.paths.append(self.path)
        self.server.begun.set()
        body = first + self.rfile.read(int(self.headers["Content-Length"]) - 1)
        said = json.dumps({"headers": dict(self.headers), "bytes": len(body)}).encode()
        self.send_response(200 if self.path.endswith("_live") else 503)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def behind(new_server, digits_pt):
    """(the proxy's server, what is behind it)"""
    server = new_server(digits_pt)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as upstream:
        upstream.begun, upstream.paths = threading.Event(), []
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        config = server.config.read_text().splitlines()
        config = [line for line in config if not line.startswith("inference_address")]
        server.config.write_text("\n".join([*config, f"inference_address=http://127.0.0.1:{upstream.server_port}"]))
        yield server, upstream
        upstream.shutdown()


def test_token_and_sequence_are_passed_on_and_nothing_is_held_back(behind):
    server, upstream = behind
    host, port = origin(server).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        head = "POST /predictions/emformer_asr_live HTTP/1.1\r\nHost: here\r\nContent-Length: 10000\r\n"
        head += "Authorization: Bearer secret\r\nts_request_sequence_id: name\r\nx-piece: 0\r\n\r\n"
        connection.sendall(head.encode() + bytes(5000))
        assert upstream.begun.wait(300)  # half of the piece is enough for it to be passed on
        connection.sendall(bytes(5000))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        got = json.loads(answer.read())
    assert got["bytes"] == 10_000
    sent = {"Authorization": "Bearer secret", "ts_request_sequence_id": "name", "x-piece": "0", "Host": "here"}
    assert sent.items() <= got["headers"].items()


def test_whole_files_come_together_before_they_are_passed_on(behind):
    server, upstream = behind
    host, port = origin(server).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(
            b"POST /predictions/emformer_asr HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n" + bytes(10_000)
        )
        requests.post(f"http://{host}:{port}/predictions/emformer_asr_live", b"x", headers=RAW, timeout=300)
        assert upstream.paths == ["/predictions/emformer_asr_live"]  # which came later
        upstream.begun.clear()
        connection.sendall(bytes(10_000))
        assert upstream.begun.wait(300)


def test_a_full_queue_tells_when_to_come_again(behind):
    server, _ = behind
    answer = requests.post(f"{origin(server)}/predictions/emformer_asr", b"x", headers=RAW, timeout=300)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_server_that_is_not_there_is_told_in_a_sentence(new_server, digits_pt):
    answer = requests.post(f"{origin(new_server(digits_pt))}/v1/audio/transcriptions", b"x", timeout=300)
    assert (answer.status_code, answer.json()["type"], answer.headers["retry-after"]) == (503, "NoServer", "5")


def test_a_request_that_is_too_large_is_refused_before_it_is_sent(proxy):
    host, port = proxy.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=300)
    connection.putrequest("POST", "/predictions/emformer_asr")
    connection.putheader("Content-Length", "120000001")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["type"]) == (413, "TooLarge")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_it_speaks_tls(behind, tmp_path):
    server, _ = behind
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    url = origin(server, "--certificate", str(certificate), "--key", str(key))
    answer = requests.post(f"{url}/predictions/emformer_asr_live", b"x", verify=str(certificate), timeout=300)
    assert answer.json()["bytes"] == 1


# Starting and stopping it


def test_a_port_in_use_is_named_in_one_sentence(new_server, digits_pt):
    server = new_server(digits_pt)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        started = server.serve("proxy", "--port", str(port))
    assert started.returncode == 1 and started.stderr.count("\n") == 1
    assert started.stderr.startswith(f"Port {port} on 127.0.0.1 is not free: ") and "PROXY_PORT=" in started.stderr


def test_stop_ends_it_too(new_server, digits_pt):
    server = new_server(digits_pt)
    url = origin(server)
    assert requests.get(f"{url}/v1/models", timeout=300).ok
    assert "nginx has stopped." in server.serve("stop").stdout
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/v1/models", timeout=300)


def test_its_limits_are_those_of_the_server():
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    largest = serve.read_config(ROOT / "config.properties")["max_request_size"]
    assert f"client_max_body_size {largest};" in text
