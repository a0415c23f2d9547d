"""A real TorchServe on free ports: exported, archived, started, asked and stopped as the pages say."""

import concurrent.futures
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import requests
from conftest import ROOT, SAMPLES, free_ports, post, run, transcripts

import export_model
import serve

THREE_DIGITS = SAMPLES / "three-digits.wav"


@pytest.mark.parametrize("file", transcripts("digits"))
def test_every_sample_comes_back_as_its_text(server, file):
    answer = post(server, SAMPLES / file)
    assert (answer.status_code, answer.text) == (200, transcripts("digits")[file])
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_every_sample_is_right_at_another_precision_and_beam_width(new_server, tmp_path):
    export_model.export("digits", tmp_path / "emformer_rnnt.pt", "int8")
    server = new_server(tmp_path / "emformer_rnnt.pt", beam_width=10)
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
    """Two processes that only look like TorchServe: that of serve.py, and one that was started by hand."""
    home, keys = tmp_path / "h", tmp_path / "h" / "key_file.json"
    home.mkdir()
    shutil.copy(ROOT / "serve.py", home)
    keys.write_text("{}")
    temporary = run("-c", f"import sys; sys.path.insert(0, {str(home)!r}); import serve; print(serve.TEMPORARY)").stdout
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", serve.MODEL_SERVER]
    options = [[f"-Djava.io.tmpdir={temporary.strip()}"], []]
    servers = [subprocess.Popen([*sleep, *each], cwd=home) for each in options]
    for server in servers:  # or they would be there, as zombies, after they have ended
        threading.Thread(target=server.wait, daemon=True).start()
    try:
        for server, kept in zip(servers, (True, False), strict=True):
            assert "has stopped" in run(home / "serve.py", "stop").stdout
            assert server.wait() and keys.exists() is kept
        assert "not running" in run(home / "serve.py", "stop").stdout
    finally:
        for server in servers:
            server.kill()


def test_a_port_in_use_is_named_in_one_sentence_with_who_uses_it(new_server, digits_pt):
    server = new_server(digits_pt)
    host, port = serve.ports(serve.read_config(server.config))[0]
    with socket.socket() as other:
        other.bind((host, port))
        other.listen()
        started = server.serve("start")
    assert started.returncode == 1
    assert started.stderr.count("\n") == 1 and f"Port {port} on {host} is not free" in started.stderr
    assert f"(process {os.getpid()}) listens there" in started.stderr
    assert re.search(r"choose other ports: make run PORT=\d+\.$", started.stderr)


@pytest.fixture
def port() -> int:
    """The first of five free ports in a row."""
    while True:
        [first] = free_ports(1)
        if not any(serve.taken("127.0.0.1", first + number) for number in range(5)):
            return first


def test_other_ports_are_chosen_with_one_number(new_server, digits_pt, port):
    server = new_server(digits_pt)
    started = server.serve("start", "--port", str(port))
    assert started.returncode == 0, started.stderr
    said = run(server.home / "serve.py", "samples")  # finds them by itself
    assert f"curl -X POST http://127.0.0.1:{port}/predictions/emformer_asr" in said.stdout, said.stderr
    listening = {each.laddr.port for each in server.processes()[0].net_connections("inet") if each.status == "LISTEN"}
    assert listening == {port + number for number in range(5)}
    assert "running already" in server.serve("start", "--port", str(port)).stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("target", ["run", "run-live"])
def test_make_passes_the_port_on(target):
    said = subprocess.run(["make", "-n", target, "PORT=9080"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(r"serve\.py start .*--port 9080$", said, flags=re.M)


@pytest.mark.parametrize("address", ["[::1]", "[::]"])
def test_an_ipv6_address_is_refused_in_one_sentence(new_server, digits_pt, address):
    server = new_server(digits_pt)
    text = server.config.read_text()
    server.config.write_text(re.sub(r"(inference_address=http://)127\.0\.0\.1", rf"\g<1>{address}", text))
    started = server.serve("start")
    assert started.returncode == 1 and started.stderr.count("\n") == 1
    assert started.stderr.startswith(f"TorchServe takes no IPv6 address ({address.strip('[]')})")


# Its neighbours on the machine


def test_no_proxy_hears_of_requests_to_this_machine(new_server, digits_pt):
    server = new_server(digits_pt, live={})
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        server.environment |= dict.fromkeys(names, address) | {"no_proxy": "", "NO_PROXY": ""}
        server.start()
        whole = run(server.home / "serve.py", "samples", **server.environment)
        assert whole.returncode == 0 and "four seven two" in whole.stdout, whole.stderr
        if shutil.which("curl"):  # what the user types himself would go there
            assert f"curl --noproxy '*' -X POST {server.url} " in whole.stdout
        live = server.serve("samples")
        assert (live.returncode, live.stdout.splitlines()[0]) == (0, "four seven two"), live.stderr
        assert server.serve("health").returncode == 0
        assert "has stopped" in server.serve("stop").stdout
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_two_servers_run_side_by_side_whatever_the_temporary_folder(new_server, digits_pt):
    servers = [new_server(digits_pt) for _ in range(2)]
    servers[1].environment = servers[0].environment
    for server in servers:
        server.start()
    for server in servers:
        assert post(server, THREE_DIGITS).text == "four seven two"
        torchserve, *workers = server.processes()
        temporary = server.home / "build" / "tmp"
        assert f"-Djava.io.tmpdir={temporary}" in torchserve.cmdline()
        assert all(any(f"{temporary}/.ts.sock" in argument for argument in worker.cmdline()) for worker in workers)
    assert not {path.name for path in servers[0].folder.iterdir()} & {".model_server.pid", "models"}
    servers[0].serve("stop")
    assert post(servers[1], THREE_DIGITS).text == "four seven two"
    assert not (servers[0].home / "build" / "tmp").exists()


def test_what_a_killed_server_left_behind_is_gone_at_the_next_start(new_server, digits_pt):
    server = new_server(digits_pt)
    server.start()
    torchserve, *workers = server.processes()
    for worker in workers:
        worker.suspend()  # so that they do not notice
    torchserve.kill()
    left = server.home / "build" / "tmp" / "models"
    before = set(left.iterdir())
    assert before
    (left.parent / ".model_server.pid").write_text(str(os.getpid()))  # as if the number had been given to another one
    assert "not running" in server.serve("stop").stdout
    server.start()
    assert post(server, THREE_DIGITS).text == "four seven two"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    assert not before & set(left.iterdir())


def test_a_folder_that_cannot_be_written_is_named_in_one_sentence(new_server, digits_pt):
    server = new_server(digits_pt)
    (server.home / "build").write_text("in the way")
    started = server.serve("start")
    assert started.returncode == 1
    assert re.fullmatch(r"/\S+/home/build/tmp cannot be written \(.+\): .+ one of your own\.\n", started.stderr)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_checkout_that_cannot_be_written_is_named_in_one_sentence():
    folder = Path(tempfile.mkdtemp())  # one that others reach, too
    shutil.copy(ROOT / "Makefile", folder)
    folder.chmod(0o555)
    other = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}  # root may write anywhere
    said = subprocess.run(["make", "run"], cwd=folder, capture_output=True, text=True, **other)
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "This folder cannot be written, and everything is built in it" in said.stderr


def test_a_full_disk_is_named_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "HERE", tmp_path)
    monkeypatch.setattr(serve, "TEMPORARY", tmp_path / "tmp")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
    (tmp_path / "model.mar").write_bytes(bytes(2**20))
    with pytest.raises(SystemExit, match=r"tmp has 1 MB left, and the server needs 18 MB: free some space there\.$"):
        serve.make_temporary([tmp_path / "model.mar"])


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/a/b", "a/memory.max"), ("4:memory:/a/b", "memory/a/b/memory.limit_in_bytes"), ("0::/", "memory.max")],
)
def test_too_little_memory_is_named_in_one_sentence(tmp_path, monkeypatch, new_server, digits_pt, line, file):
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    limit = tmp_path / "cgroups" / file
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{500 * 2**20}\n")
    monkeypatch.setattr(serve, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(serve, "CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(serve, "running_server", lambda: None)
    server = new_server(digits_pt)
    with pytest.raises(SystemExit, match=rf"^There are 500 MB .* needs {serve.LEAST_MEMORY} MB: raise the limit\.$"):
        serve.start(server.config, server.store, tmp_path / "logs")


def java_options(torchserve: psutil.Process) -> list[str]:
    return torchserve.environ()["JAVA_TOOL_OPTIONS"].split()


def test_java_may_have_a_quarter_of_the_memory(server):
    assert f"-Xmx{max(serve.LEAST_HEAP, serve.memory() // 4)}m" in java_options(server.processes()[0])


def test_with_the_least_memory_an_hour_of_pcm_can_be_uploaded(new_server, digits_pt):
    """Bytes of that size that are no audio come back as such."""
    server = new_server(digits_pt)
    path = server.home / "serve.py"
    path.write_text(path.read_text().replace("limits = [psutil.virtual_memory().total]", "limits = [1024 * 2**20]"))
    server.start()
    assert "-Xmx384m" in java_options(server.processes()[0])
    for _ in range(2):
        answer = requests.post(server.url, bytes(115_200_044), headers={"Content-Type": "audio/wav"}, timeout=300)
        assert (answer.status_code, answer.json()["type"]) == (400, "NotAudio")


def test_any_folder_will_do_whatever_the_locale(new_server, digits_pt):
    """One with a space, a letter beyond ASCII, and a name longer than a socket's path may be."""
    server = new_server(digits_pt, prefix="a b-\u00fc-" + "long-" * 20)
    server.environment = {"LC_ALL": "C"}
    server.start()
    assert post(server, THREE_DIGITS).text == "four seven two"
    said = run(server.home / "serve.py", "samples", **server.environment)
    assert said.returncode == 0 and "four seven two" in said.stdout, said.stderr
    assert "has stopped" in server.serve("stop").stdout


def test_a_server_that_starts_is_given_up_when_it_is_missed_twice_in_a_row(tmp_path, monkeypatch):
    """On a busy machine the list of processes has once lacked one that was there."""
    looks = [True, False, True, False]
    monkeypatch.setattr(serve, "running_server", lambda: looks.pop(0))
    monkeypatch.setattr(serve, "has_ready_worker", lambda *_: not looks)
    serve.wait_until_ready({}, ["emformer_asr"], tmp_path)
    (tmp_path / serve.CONSOLE).write_text("Exception in thread main\n")
    looks += [True, False, False, False]
    with pytest.raises(SystemExit, match="TorchServe ended while it started"):
        serve.wait_until_ready({}, ["emformer_asr"], tmp_path)


def test_a_worker_that_dies_while_loading_ends_the_start_with_its_reason(new_server, tmp_path):
    (tmp_path / "emformer_rnnt.pt").write_text("not a TorchScript file")
    server = new_server(tmp_path / "emformer_rnnt.pt")
    started = server.serve("start")
    assert started.returncode == 1
    assert "Traceback" in started.stderr  # the log's last lines
    assert "The worker died while it loaded the model: PytorchStreamReader" in started.stderr.splitlines()[-1]
    assert "not running" in server.serve("stop").stdout
