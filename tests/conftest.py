"""Fixtures: exported models, a handler in a context as TorchServe gives it, sample and synthetic audio."""

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
SAMPLES = ROOT / "sample_audio"
BIN = Path(sys.executable).parent


def transcripts(model: str) -> dict[str, str]:
    """File name -> text of the samples meant for ``model``."""
    with (SAMPLES / "transcripts.tsv").open() as table:
        return {row["file"]: row["text"] for row in csv.DictReader(table, delimiter="\t") if row["model"] == model}


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


class Server:
    """A folder with everything one TorchServe needs, apart from any other that runs on this machine."""

    def __init__(
        self,
        model: Path,
        handler: Path = ROOT / "handler.py",
        config: str = "",
        live: dict[str, int] | None = None,
        **settings: int,
    ) -> None:
        """``settings`` are lines of model-config.yaml, ``live`` of model-config-live.yaml, if that archive is to be
        served, too; ``config`` more lines for config.properties.
        """
        self.folder = folder = Path(tempfile.mkdtemp(prefix="ts-"))  # short: a socket's path has at most 107 characters
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
        self.config.write_text(text + config)
        addresses = serve.read_config(self.config)
        self.url = addresses["inference_address"] + "/predictions/emformer_asr"
        self.management_url, self.metrics_url = (
            addresses["management_address"],
            addresses["metrics_address"] + "/metrics",
        )
        self.live = live is not None
        self.live_url = self.url + "_live"
        # A batch of several requests is what the tests are after.
        self.archive("emformer_asr", model, handler, ROOT / "model-config.yaml", {"batchSize": 8} | settings)
        if live is not None:
            extra = ["--extra-files", ROOT / "handler.py"]
            self.archive("emformer_asr_live", model, ROOT / "live.py", ROOT / "model-config-live.yaml", live, extra)

    def archive(
        self, name: str, model: Path, handler: Path, config: Path, settings: dict[str, int], extra: Sequence = ()
    ) -> None:
        """Write an archive into its model store."""
        command = [BIN / "torch-model-archiver", "--model-name", name, "--version", "1.0"]
        command += ["--serialized-file", model, "--handler", handler, *extra]
        text = config.read_text()
        for setting, value in settings.items():
            text, found = re.subn(rf"^( *{setting}): \S+", rf"\1: {value}", text, flags=re.M)
            assert found == 1, setting
        config = self.folder / config.name
        config.write_text(text)
        command += ["--config-file", config, "--export-path", self.store]
        subprocess.run(command, check=True, env=os.environ | self.environment)

    def serve(self, command: str) -> subprocess.CompletedProcess[str]:
        options = ["--config", self.config, "--model-store", self.store, "--logs", self.folder / "logs"]
        options += ["--live"] * self.live
        return run("serve.py", command, *options, **self.environment)

    def processes(self) -> list[psutil.Process]:
        """TorchServe and its workers."""
        pid = int((self.folder / ".model_server.pid").read_text())
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]

    def worker(self) -> psutil.Process:
        """Its only worker, once there is one that has loaded the model."""
        config = serve.read_config(self.config)
        for _ in range(120):
            if serve.has_ready_worker(config):
                [worker] = [each for each in self.processes() if "model_service_worker" in " ".join(each.cmdline())]
                return worker
            time.sleep(0.5)
        raise TimeoutError("no worker after a minute")

    def remove(self) -> None:
        """Stop it and leave nothing behind."""
        self.serve("stop")
        shutil.rmtree(self.folder)


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
    started = server.serve("start")
    assert started.returncode == 0, started.stdout + started.stderr
    yield server
    server.remove()


def post(server: Server, path: Path) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(server.url, data=path.read_bytes(), headers=headers, timeout=60)


def pytest_addoption(parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, help="requests that tests/test_fuzz.py sends to the handler")
    parser.addoption("--screenshot", type=Path, help="where tests/test_page.py puts a picture of the page")
