"""A real TorchServe on free ports: exported, archived, started, asked and stopped as the pages say."""

import concurrent.futures
import re
import shutil
import socket
import subprocess
import sys
import threading

import psutil
import pytest
import requests
from conftest import ROOT, SAMPLES, post, run, transcripts

import export_model
import serve

THREE_DIGITS = SAMPLES / "three-digits.wav"


@pytest.mark.parametrize("file", transcripts("digits"))
def test_every_sample_comes_back_as_its_text(server, file):
    answer = post(server, SAMPLES / file)
    assert (answer.status_code, answer.text) == (200, transcripts("digits")[file])
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(("precision", "beam_width"), [("fp32", 10), ("int8", 1), ("int8", 10)])
def test_every_sample_is_right_at_other_precisions_and_beam_widths(new_server, tmp_path, precision, beam_width):
    model = tmp_path / "emformer_rnnt.pt"
    export_model.export("digits", model, precision)
    server = new_server(model, beam_width=beam_width)
    server.start()
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
    answer = requests.post(server.url, timeout=300)
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


def test_the_python_client_prints_the_text(server):
    page = (ROOT / "docs" / "requests.md").read_text()
    [client] = re.findall(r"^\.venv/bin/python -c '(.*?requests\.post.*?)'$", page, flags=re.M | re.S)
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
    assert requests.post(f"{management}/models", params={"url": archive}, timeout=300).status_code in (403, 405)
    assert requests.delete(f"{management}/models/emformer_asr", timeout=300).status_code in (403, 405)
    assert post(server, THREE_DIGITS).text == "four seven two"


def test_a_second_start_finds_the_server_running(server):
    before = server.processes()[0].pid
    again = server.serve("start")
    assert again.returncode == 0 and "running already" in again.stdout
    assert server.processes()[0].pid == before


def test_a_start_while_a_killed_worker_recovers_leaves_the_server_alone(server):
    torchserve, *workers = server.processes()
    for process in workers:
        process.kill()
    assert not psutil.wait_procs(workers, timeout=300)[1]
    again = server.serve("start")
    if "a worker is missing" in again.stderr:  # on a slow machine it may be back after serve.py has waited long enough
        server.worker()
        again = server.serve("start")
    assert again.returncode == 0 and "running already" in again.stdout
    assert server.processes()[0] == torchserve
    assert post(server, THREE_DIGITS).text == "four seven two"


def test_stop_leaves_no_process_behind(new_server, digits_pt):
    server = new_server(digits_pt)
    server.start()
    family = server.processes()
    assert len(family) >= 2  # the server and a worker
    assert "has stopped" in server.serve("stop").stdout
    assert not [process for process in family if process.is_running()]


def test_stop_leaves_the_tokens_of_another_server_in_the_same_folder(tmp_path):
    """Two processes that only look like TorchServe, with pid files of their own, as the temporary folder says."""
    home, keys = tmp_path / "home", tmp_path / "home" / "key_file.json"
    home.mkdir()
    shutil.copy(ROOT / "serve.py", home)
    keys.write_text("{}")
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", serve.MODEL_SERVER]
    servers = [subprocess.Popen(sleep, cwd=home) for _ in range(2)]
    for server in servers:  # or they would be there, as zombies, after they have ended
        threading.Thread(target=server.wait, daemon=True).start()
    try:
        for number, (server, kept) in enumerate(zip(servers, (True, False), strict=True)):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / ".model_server.pid").write_text(str(server.pid))
            assert "has stopped" in run(home / "serve.py", "stop", TMPDIR=str(folder)).stdout
            assert server.wait() and keys.exists() is kept
            assert "not running" in run(home / "serve.py", "stop", TMPDIR=str(folder)).stdout
    finally:
        for server in servers:
            server.kill()


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
