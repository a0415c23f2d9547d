"""What is promised of live speech: the whole's text from any pieces, and a clear answer to every piece."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import SAMPLES, transcripts
from ts.context import Context, RequestProcessor

from handler import ModelHandler

IDLE = {"sequenceBatching": True, "sequenceMaxIdleMSec": 10_000}


class LiveWorker:
    """One handler of the live archive, driven as TorchServe's worker does it."""

    def __init__(self, model, **settings: int) -> None:
        config = IDLE | {"handler": settings}
        manifest = {"model": {"serializedFile": model.name}}
        self.context = Context("emformer_asr_live", str(model.parent), manifest, 1, None, "0", model_yaml_config=config)
        self.handler = ModelHandler()
        self.handler.initialize(self.context)

    def answer(self, *pieces: tuple[dict, bytes]) -> list[tuple[int, dict]]:
        """(status, body) for each of a batch of (headers, PCM)."""
        self.context.request_processor = [RequestProcessor(headers) for headers, _ in pieces]
        self.context.request_ids = {i: str(i) for i in range(len(pieces))}
        bodies = self.handler.handle([{"body": bytearray(pcm)} for _, pcm in pieces], self.context)
        json.dumps(bodies)  # or the whole batch would fail
        return [(self.context.get_response_status(i)[0], body) for i, body in enumerate(bodies)]

    def ends(self, index: int = 0) -> bool:
        """Whether the answer told TorchServe that the sequence is over."""
        return "ts_request_sequence_end" in self.context.get_response_headers(index)


def headers(name: str, piece: int, last: bool = False, **others: str) -> dict[str, str]:
    return {"ts_request_sequence_id": name, "x-piece": str(piece), "x-last-piece": str(last).lower()} | others


def pcm_of(waveform: torch.Tensor) -> bytes:
    """16-bit PCM of (samples,)."""
    return (waveform * 32_768).round().clamp(-32_768, 32_767).numpy().astype("<i2").tobytes()


def cut(pcm: bytes, sizes: random.Random, longest: float = 3.0) -> list[bytes]:
    """``pcm`` in pieces of random sizes, one sample to ``longest`` seconds, as often short as long."""
    pieces = []
    while pcm:
        size = 2 * int(np.exp(sizes.uniform(0, np.log(longest * 16_000))))
        pieces.append(pcm[:size])
        pcm = pcm[size:]
    return pieces


def say(worker: LiveWorker, name: str, pieces: list[bytes]) -> dict:
    """Send all pieces; the final answer. What was called stable has to stay."""
    kept = ""
    for number, pcm in enumerate(pieces):
        [(status, answer)] = worker.answer((headers(name, number, number == len(pieces) - 1), pcm))
        assert status == 200, answer
        assert answer["text"].startswith(kept) and answer["stable"] >= len(kept)
        kept = answer["text"][: answer["stable"]]
    assert answer["final"] and kept == answer["text"]
    return answer


@pytest.fixture(scope="module")
def live(digits_pt) -> LiveWorker:
    return LiveWorker(digits_pt)


@pytest.fixture(scope="module")
def strings(worker) -> list[bytes]:
    """PCM of fifty strings of one to six samples, quiet and loud, that end anywhere."""
    rng = random.Random(8)
    sounds = [worker.handler._waveform((SAMPLES / name).read_bytes()) for name in sorted(transcripts("digits"))]
    made = []
    for _ in range(50):
        string = torch.cat([rng.choice(sounds) * rng.uniform(0.1, 1.0) for _ in range(rng.randint(1, 6))])
        made.append(pcm_of(string[: rng.randint(200, 12 * 16_000)]))
    return made


def whole(worker, pcm: bytes, beam_width: int = 1) -> list:
    """The hypotheses for PCM in one request, the best first: (tokens, score, frames, log_probs)."""
    waveform = torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32)) / 32_768
    features = [worker.handler._features(waveform)]
    with torch.inference_mode():
        return worker.handler.model.decode(features, beam_width)[0]


@pytest.mark.parametrize("name", sorted(transcripts("digits")))
def test_every_sample_in_pieces_gives_the_text_and_the_words_of_the_whole(live, worker, name):
    pcm = pcm_of(worker.handler._waveform((SAMPLES / name).read_bytes()))
    sizes = random.Random(name)
    for repeat in range(3):
        answer = say(live, f"{name[:-4].replace('.', '-')}-{repeat}", cut(pcm, sizes))
        assert answer["text"] == transcripts("digits")[name]
        assert " ".join(word["word"] for word in answer["words"]) == answer["text"]
    tokens = whole(worker, pcm).hypotheses[0][0]
    assert worker.handler.tokens_to_text(tokens) == answer["text"]
