"""How many people may speak at a time, how fast is an answer, and when does a word appear?

    pip install -r requirements-dev.txt
    python benchmarks/live.py                  # everything, about fifteen minutes
    python benchmarks/live.py handler delay    # some of it

- handler: a batch of 160 ms pieces, one of each of N speakers, through the handler in this process, on one thread.
- server: the real TorchServe on free ports with one worker of the live archive, held to one core; Java and this load
  generator have the others. N speakers, each a connection, send their pieces of 160 ms at the speed of speech. A time
  counts from the moment at which the piece's last sample was spoken, so also while the answer before is still out.
- memory: what the handler keeps of a sequence after half a minute, as tensors.
- delay: one speaker of digits; from the end of a word in the sound (where the model itself hears it end, corrected as
  in the answers) to the arrival of the first answer with that word in its text.

The 76.7M-parameter network has random weights, its blank bias set so that about six tokens a second come out.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import SAMPLES, Server, transcripts  # noqa: E402
from test_live import LiveWorker, headers, pcm_of  # noqa: E402

from benchmarks import engine  # noqa: E402
from benchmarks.serve import MODELS, build  # noqa: E402
from handler import decode_audio  # noqa: E402

PIECE = 0.16  # seconds
SECONDS = 15  # of each measurement
WARM_UP = 3  # seconds before it
SPEAKERS = {"digits": (1, 10, 25, 50, 75, 100, 150), "76.7M": (1, 2, 4, 6, 8, 12, 16, 20, 24)}
BATCHES = {"digits": (1, 10, 25, 50), "76.7M": (1, 2, 4, 8)}
LIMIT = 160.0  # milliseconds: with 95% of the answers after that, a core does not keep up
RATE = engine.SAMPLE_RATE


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]


def sound(size: str) -> bytes:
    """Some minute of speech as PCM: the digit samples for the digits model, else the sentence."""
    names = sorted(transcripts("digits")) if size == "digits" else ["sentence.wav"]
    waveform = torch.cat([decode_audio((SAMPLES / name).read_bytes()) for name in names])
    return pcm_of(waveform.repeat(-(-60 * RATE // len(waveform))))


def cut(pcm: bytes, seconds: float = PIECE) -> list[bytes]:
    size = 2 * round(seconds * RATE)
    return [pcm[i : i + size] for i in range(0, len(pcm), size)]


def in_the_handler(name: str, model: Path, pcm: bytes) -> None:
    worker, pieces = LiveWorker(model, max_sequences=1000), cut(pcm)
    for count in BATCHES[name.split("-")[0]]:
        speakers, times = [uuid.uuid4().hex for _ in range(count)], []
        for number in range(round((SECONDS + WARM_UP) / PIECE)):
            batch = [
                (headers(speaker, number), pieces[(17 * place + number) % (len(pieces) - 1)])
                for place, speaker in enumerate(speakers)
            ]
            started = time.perf_counter()
            answers = worker.answer(*batch)
            if number * PIECE >= WARM_UP:
                times.append(1000 * (time.perf_counter() - started))
            assert all(status == 200 for status, _ in answers)
        worker.handler.sequences.clear()
        median = statistics.median(times)
        print(f"| {name} | {count} | {median:.1f} ms | {p95(times):.1f} ms | {median / count:.2f} ms |", flush=True)


def the_worker(server: Server) -> psutil.Process:
    model = requests.get(f"{server.management_url}/models/emformer_asr_live", timeout=30).json()[0]
    return psutil.Process(model["workers"][0]["pid"])


def memory(name: str, model: Path, pcm: bytes) -> None:
    worker = LiveWorker(model)
    for number, piece in enumerate(cut(pcm)[: round(30 / PIECE)]):
        worker.answer((headers("memory", number), piece))
    [sequence] = worker.handler.sequences.values()
    features, _, past, ([(_, *states, _)], *_), _ = sequence.stream
    tensors = [sequence.samples, features, *past, states[0]]
    tensors += [tensor for layer in states[1] for tensor in layer]
    kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    print(f"| {name} | {kept / 1e6:.2f} MB | {len(sequence.tokens)} |", flush=True)


@contextmanager
def one_worker(model: Path) -> Iterator[Server]:
    """The server, its live worker held to the first core, all else to the others."""
    live = {"batchSize": 200, "max_sequences": 200}
    server = Server(model, live=live)
    try:
        started = server.serve("start")
        if started.returncode:
            sys.exit(started.stdout + started.stderr)
        first, *others = sorted(psutil.Process().cpu_affinity())
        worker = the_worker(server)
        for process in server.processes():
            for thread in process.threads():
                os.sched_setaffinity(thread.id, [first] if process == worker else others or [first])
        os.sched_setaffinity(0, others or [first])
        yield server
        os.sched_setaffinity(0, [first, *others])
    finally:
        server.remove()


class Speaker:
    """A client on a connection of its own, as light as can be: there are many of them in one process."""

    def __init__(self, server: Server) -> None:
        self.address, self.name, self.number = urlsplit(server.live_url), uuid.uuid4().hex, 0

    async def send(self, pcm: bytes, last: bool = False) -> dict:
        if self.number == 0:
            self.reader, self.writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        lines = [f"POST {self.address.path} HTTP/1.1", "Host: here", f"Content-Length: {len(pcm)}"]
        lines += ["Content-Type: application/octet-stream"]
        lines += [f"{name}: {value}" for name, value in headers(self.name, self.number, last).items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + pcm)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await self.reader.readexactly(int(head.split("content-length:")[1].split()[0]))
        if " 200 " not in head.splitlines()[0]:
            raise RuntimeError(body.decode())
        self.number += 1
        if last:
            self.writer.close()
        return json.loads(body)


async def speak(server: Server, pieces: list[bytes], phase: float, seconds: float) -> list[tuple[float, float]]:
    """(when a piece was spoken, milliseconds until its answer) for each."""
    speaker, heard = Speaker(server), []
    begun = time.perf_counter() + phase
    for number in range(round(seconds / PIECE)):
        spoken = begun + (number + 1) * PIECE
        await asyncio.sleep(max(spoken - time.perf_counter(), 0))
        await speaker.send(pieces[number % (len(pieces) - 1)])
        heard.append((number * PIECE, 1000 * (time.perf_counter() - spoken)))
    await speaker.send(b"", last=True)
    return heard


async def crowd(server: Server, pieces: list[bytes], count: int) -> list[float]:
    rng = random.Random(count)
    rotated = [pieces[k:] + pieces[:k] for k in (rng.randrange(len(pieces)) for _ in range(count))]
    speaking = [speak(server, own, rng.uniform(0, PIECE), WARM_UP + SECONDS) for own in rotated]
    return [ms for heard in await asyncio.gather(*speaking) for when, ms in heard if when >= WARM_UP]


def used(process: psutil.Process) -> float:
    """Seconds of processor time."""
    return sum(process.cpu_times()[:2])


def through_the_server(name: str, model: Path, pcm: bytes) -> None:
    with one_worker(model) as server:
        worker, java = the_worker(server), server.processes()[0]
        for count in SPEAKERS[name.split("-")[0]]:
            before, own = (used(worker), used(java)), time.process_time()
            started = time.perf_counter()
            times = asyncio.run(crowd(server, cut(pcm), count))
            wall = time.perf_counter() - started
            cores = [(used(worker) - before[0]) / wall, (used(java) - before[1]) / wall]
            cores.append((time.process_time() - own) / wall)
            row = [name, count, f"{statistics.median(times):.0f} ms", f"{p95(times):.0f} ms"]
            print("|", " | ".join(map(str, row + [f"{each:.2f}" for each in cores])), "|", flush=True)
            if p95(times) > LIMIT:
                break


async def delays(server: Server, pcm: bytes, seconds: float) -> list[float]:
    """Milliseconds from the end of each word to the answer that has it."""
    speaker, pieces, seen = Speaker(server), cut(pcm, seconds), []
    begun = time.perf_counter()
    for number, piece in enumerate(pieces):
        await asyncio.sleep(max(begun + (number + 1) * seconds - time.perf_counter(), 0))
        answer = await speaker.send(piece, last=number == len(pieces) - 1)
        seen.append((time.perf_counter() - begun, answer["text"].split()))
    words = [word["word"] for word in answer["words"]]
    appeared = [next(at for at, text in seen if text[: k + 1] == words[: k + 1]) for k in range(len(words))]
    return [1000 * (at - word["end"]) for at, word in zip(appeared, answer["words"], strict=True)]


def word_delays(name: str, model: Path, pcm: bytes) -> None:
    with one_worker(model) as server:
        for seconds in (0.04, PIECE, 0.32):
            times = asyncio.run(delays(server, pcm, seconds))
            row = [name, f"{1000 * seconds:.0f} ms", len(times)]
            print(
                "|",
                " | ".join(map(str, row)),
                f"| {statistics.median(times):.0f} ms | {p95(times):.0f} ms |",
                flush=True,
            )


TABLES = {
    "handler": (in_the_handler, "| | speakers in a batch | median | p95 | a speaker |\n|---|---|---|---|---|"),
    "memory": (memory, "| | of a sequence | tokens |\n|---|---|---|"),
    "server": (
        through_the_server,
        "| | speakers | median | p95 | worker's cores | Java's | load generator's |\n|---|---|---|---|---|---|---|",
    ),
    "delay": (word_delays, "| | pieces of | words | median | p95 |\n|---|---|---|---|---|"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)}; default: all")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    if not set(args.tables) <= set(TABLES):
        parser.error(f"there are the tables {', '.join(TABLES)}")
    torch.set_num_threads(1)
    print(f"{engine.processor()}, {os.cpu_count()} cores, one thread a worker, torch {torch.__version__}")
    _, features = engine.audio(None)
    sounds = {size: sound(size) for size in ("digits", "76.7M")}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: build(name, features, Path(folder) / f"{name}.pt") for name in args.models}
        for table in args.tables or TABLES:
            measure, head = TABLES[table]
            print(f"\n{table}\n\n{head}", flush=True)
            for name, model in models.items():
                if table != "delay" or name.startswith("digits"):
                    measure(name, model, sounds[name.split("-")[0]])


if __name__ == "__main__":
    main()
