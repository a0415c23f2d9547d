"""Fixtures: exported models, a handler in a context as TorchServe gives it, sample and synthetic audio."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from ts.context import Context, RequestProcessor

import export_model
from handler import ModelHandler

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_audio"


def transcripts(model: str) -> dict[str, str]:
    """File name -> text of the samples meant for ``model``."""
    with (SAMPLES / "transcripts.tsv").open() as table:
        return {row["file"]: row["text"] for row in csv.DictReader(table, delimiter="\t") if row["model"] == model}


def encode(samples: np.ndarray, rate: int, container: str, codec: str, sample_format: str | None = None) -> bytes:
    """Encode (channels, samples) float32 as an audio file."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
    frame.rate = rate
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        options = {"format": sample_format} if sample_format else {}
        stream = output.add_stream(codec, rate=rate, layout=layout, **options)
        for part in (frame, None):
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
    return worker.handler._waveform((SAMPLES / "three-digits.wav").read_bytes())


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


def pytest_addoption(parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, help="requests that tests/test_fuzz.py sends to the handler")
