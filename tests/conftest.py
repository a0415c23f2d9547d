"""Fixtures: exported models, a handler in a context as TorchServe gives it, sample and synthetic audio."""

import contextlib
import csv
import io
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
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import requests
import torch
from ts.context import Context, RequestProcessor

import export_model
import serve
from handler import ModelHandler, decode_audio

ROOT = Path(__file__).parents[1]
# Nothing that a test sends to this machine goes through a proxy.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"
SAMPLES = ROOT / "sample_audio"
BIN = Path(sys.executable).parent


def transcripts(model: str) -> dict[str, str]:
    """File name -> text of the samples meant for ``model``."""
    with (SAMPLES / "transcripts.tsv").open() as table:
        return {row["file"]: row["text"] for row in csv.DictReader(table, delimiter="\t") if row["model"] == model}


ALL_SAMPLES = [*transcripts("digits"), *transcripts("librispeech")]


def encode(
    samples: np.ndarray, rate: int, container: str, codec: str, sample_format: str | None = None, **options: str
) -> bytes:
    """Encode (channels, samples) float32 as an audio file."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
    frame.rate = rate
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        chosen = {"format": sample_format} if sample_format else {}
        stream = output.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"}, **chosen)
        if codec.startswith("wma"):
            stream.bit_rate = 96_000  # there is none by default
        for part in (frame, None):
            output.mux(stream.encode(part))
    return file.getvalue()


def silent_film() -> bytes:
    """A Matroska file with pictures and no sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for part in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24"), None):
            output.mux(stream.encode(part))
    return file.getvalue()


class Worker:
    """One handler, driven as TorchServe's worker does it: every batch gets fresh request headers."""

    def __init__(self, model: Path, handler_settings: dict | None = None) -> None:
        manifest = {"model": {"serializedFile": model.name}}
        config = {"handler": handler_settings} if handler_settings is not None else {}
        self.context = Context("emformer_asr", str(model.parent), manifest, 1, None, "0", model_yaml_config=config)
        self.handler = ModelHandler()
        self.handler.initialize(self.context)

    def answer(self, *requests: dict, headers: dict | None = None) -> list[tuple[int, str | dict]]:
        """(status, body) of each request of one batch, all with the same headers."""
        self.context.request_processor = [RequestProcessor(dict(headers or {})) for _ in requests]
        bodies = self.handler.handle(list(requests), self.context)
        assert len(bodies) == len(requests)
        json.dumps(bodies)  # one body that JSON cannot take would fail the whole batch
        return [(self.context.get_response_status(i)[0], body) for i, body in enumerate(bodies)]

    def transcribe(self, audio: bytes) -> str:
        """The transcript of one file sent as the raw body."""
        [(status, body)] = self.answer({"body": bytearray(audio)})
        assert status == 200, body
        return body


@pytest.fixture(scope="session")
def digits_pt(tmp_path_factory) -> Path:
    """The digits model, exported as a user does it."""
    path = tmp_path_factory.mktemp("digits") / "emformer_rnnt.pt"
    export_model.export("digits", path)
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As a worker has it by default."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worker(digits_pt) -> Worker:
    return Worker(digits_pt)


@pytest.fixture(scope="session")
def speech(worker) -> torch.Tensor:
    """(samples,) of the 16 kHz mono WAV sample."""
    return decode_audio((SAMPLES / "three-digits.wav").read_bytes())


@pytest.fixture(scope="session")
def samples(worker) -> dict[str, torch.Tensor]:
    """File name -> (samples,) at 16 kHz."""
    return {file: decode_audio((SAMPLES / file).read_bytes()) for file in ALL_SAMPLES}


@pytest.fixture(scope="session")
def features(worker, samples) -> dict[str, torch.Tensor]:
    """File name -> (T, 80)."""
    return {file: worker.handler._features(waveform) for file, waveform in samples.items()}


def bundle_assets_cached() -> bool:
    """Whether the torch hub cache holds the LibriSpeech bundle's two small files."""
    folder = Path(torch.hub.get_dir()) / "torchaudio" / "pipeline-assets"
    names = ("global_stats_rnnt_librispeech.json", "spm_bpe_4096_librispeech.model")
    return all((folder / name).is_file() for name in names)


needs_bundle_assets = pytest.mark.skipif(
    not bundle_assets_cached(),
    reason="needs global_stats_rnnt_librispeech.json and spm_bpe_4096_librispeech.model in the torch hub cache",
)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts with this Python and these additional environment variables."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


# What is said when a port is not free: by serve.py, or by TorchServe if it was taken after serve.py had looked.
PORT_TAKEN = re.compile(r"Port \d+ on \S+ is not free|BindException|Address already in use")


class Server:
    """A folder with everything one TorchServe needs, apart from any other that runs on this machine."""

    def __init__(
        self,
        model: Path,
        handler: Path = ROOT / "handler.py",
        config: str = "",
        live: dict[str, int] | None = None,
        prefix: str = "ts-",
        **settings: int,
    ) -> None:
        """``settings`` are lines of model-config.yaml, ``live`` of model-config-live.yaml, if that archive is to be
        served, too; ``config`` more lines for config.properties; ``prefix`` begins the folder's name.
        """
        self.folder = folder = Path(
            tempfile.mkdtemp(prefix=prefix)
        )  # short: a socket's path has at most 107 characters
        self.config = folder / "config.properties"
        self.store = folder / "model_store"
        self.store.mkdir()
        # For what is started by hand: its pid file, its sockets and the unpacked archive.
        self.environment = {"TMPDIR": str(folder), "TEMP": str(folder)}
        # serve.py's folder: the server that was started in it is the one that it knows.
        self.home = folder / "home"
        self.home.mkdir()
        for path in ROOT.iterdir():
            if path.name not in ("serve.py", "key_file.json", "build"):
                (self.home / path.name).symlink_to(path)
        shutil.copy(ROOT / "serve.py", self.home)
        text = (ROOT / "config.properties").read_text()
        # Java's optimising compiler makes each start a second longer, which a few requests never repay.
        self.config.write_text(text.replace("vmargs=", "vmargs=-XX:TieredStopAtLevel=1 ") + config)
        self.take_ports()
        self.live = live is not None
        # A batch of several requests is what the tests are after.
        self.archive("emformer_asr", model, handler, ROOT / "model-config.yaml", {"batchSize": 8} | settings)
        if live is not None:
            extra = ["--extra-files", ROOT / "handler.py"]
            self.archive("emformer_asr_live", model, ROOT / "live.py", ROOT / "model-config-live.yaml", live, extra)

    def take_ports(self) -> None:
        """Write ports that are free into its configuration."""
        ports = free_ports(5)
        text = self.config.read_text()
        for address in (r"_address=https?://127\.0\.0\.1:", "_port="):
            text = re.sub(rf"({address})\d+$", lambda found: f"{found[1]}{ports.pop()}", text, flags=re.M)
        self.config.write_text(text)

    @property
    def addresses(self) -> dict[str, str]:
        """Of ``inference``, ``management`` and ``metrics``."""
        config = serve.read_config(self.config)
        return {name: config[f"{name}_address"] for name in ("inference", "management", "metrics")}

    @property
    def url(self) -> str:
        return self.addresses["inference"] + "/predictions/emformer_asr"

    @property
    def live_url(self) -> str:
        return self.url + "_live"

    @property
    def management_url(self) -> str:
        return self.addresses["management"]

    @property
    def metrics_url(self) -> str:
        return self.addresses["metrics"] + "/metrics"

    def archive(
        self, name: str, model: Path, handler: Path, config: Path, settings: dict[str, int], extra: Sequence = ()
    ) -> None:
        """Write an archive into its model store."""
        command = [BIN / "torch-model-archiver", "--model-name", name, "--version", "1.0"]
        command += ["--serialized-file", model, "--handler", handler, *extra]
        command += ["--archive-format", "zip-store"]  # to compress the model takes four seconds
        text = config.read_text()
        for setting, value in settings.items():
            text, found = re.subn(rf"^( *{setting}): \S+", rf"\1: {value}", text, flags=re.M)
            assert found == 1, setting
        config = self.folder / config.name
        config.write_text(text)
        command += ["--config-file", config, "--export-path", self.store]
        subprocess.run(command, check=True, env=os.environ | self.environment)

    def serve(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        options = ["--config", self.config, "--model-store", self.store, "--logs", self.folder / "logs"]
        options += ["--live"] * self.live
        return run(self.home / "serve.py", command, *options, *more, **self.environment)

    def start(self) -> None:
        """Start it, on other ports if somebody has taken one of its own in the meantime."""
        started = self.serve("start")
        for _ in range(3):
            if started.returncode and PORT_TAKEN.search(started.stderr):
                self.take_ports()
                started = self.serve("start")
        assert started.returncode == 0, started.stdout + started.stderr

    def processes(self) -> list[psutil.Process]:
        """TorchServe and its workers."""
        pid = int((self.home / "build" / "tmp" / ".model_server.pid").read_text())
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]

    def worker(self) -> psutil.Process:
        """Its only worker, once there is one that has loaded the model."""

        def ready() -> psutil.Process | None:
            try:
                [model] = requests.get(f"{self.management_url}/models/emformer_asr", timeout=60).json()
                [worker] = [psutil.Process(each["pid"]) for each in model["workers"] if each["status"] == "READY"]
                return worker if worker.status() != psutil.STATUS_ZOMBIE else None
            except (OSError, ValueError, psutil.Error):  # it does not listen, or has no worker
                return None

        return wait_until(ready, "a worker")

    def remove(self) -> None:
        """Stop it and leave nothing behind."""
        self.serve("stop")

        def removed() -> bool:  # what was killed may write a last line
            shutil.rmtree(self.folder, ignore_errors=True)
            return not self.folder.exists()

        wait_until(removed, f"{self.folder} to be removed")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 300):
    """What ``condition`` returns, once that is true; however slow the machine, a test waits for what it needs."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses or will be given: none of those for clients, others for each of pytest's workers."""
    workers, number = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    first_for_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000 + int(number.removeprefix("gw")), first_for_clients, int(workers))
    found = []
    for port in random.Random().sample(candidates, len(candidates)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no port is free")


def origin(server: Server, *options: str) -> str:
    """The address of a proxy that was started before a server; another port if that was taken in the meantime."""
    for _ in range(4):
        [port] = free_ports(1)
        started = server.serve("proxy", "--port", str(port), *options)
        if started.returncode == 0:
            return f"{'https' if options else 'http'}://127.0.0.1:{port}"
    raise AssertionError(started.stdout + started.stderr)


needs_nginx = pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"),
    reason="needs nginx, Debian's package nginx-light",
)


@pytest.fixture
def new_server():
    """Make servers that are not started yet; leave none behind."""
    servers = []

    def make(model: Path, **settings) -> Server:
        servers.append(Server(model, **settings))
        return servers[-1]

    yield make
    for server in servers:
        server.remove()


@pytest.fixture(scope="session")
def server(digits_pt):
    server = Server(digits_pt)
    server.start()
    yield server
    server.remove()


def post(server: Server, path: Path) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(server.url, data=path.read_bytes(), headers=headers, timeout=60)


def pytest_addoption(parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, help="requests that tests/test_fuzz.py sends to the handler")
    parser.addoption("--screenshot", type=Path, help="where tests/test_page.py puts a picture of the page")


# The longest first, so that pytest's workers end together: pytest -n 3 --dist loadfile --no-loadscope-reorder.
LONGEST = ["test_equality", "test_live", "test_server", "test_full_size", "test_faults", "test_page", "test_readme"]
LONGEST += ["test_live_server", "test_fuzz", "test_api", "test_quality"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files; mark tests that need a server: with a fixture that starts one, or in a file that imports it."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if {"server", "new_server"}.intersection(item.fixturenames) or hasattr(item.module, "Server"):
            item.add_marker("server")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests have recorded with ``record_property``."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
