"""How many people may speak at a time, how fast is an answer, and when does a word appear?

    pip install -r requirements-dev.txt
    python benchmarks/live.py                  # everything, about half an hour
    python benchmarks/live.py handler delay    # some of it

- handler: a batch of 160 ms pieces, one of each of N speakers, through the handler in this process, on one thread.
- server: the real TorchServe on free ports with one worker of the live archive, held to one core; Java and this load
  generator have the others. N speakers, each a connection, send their pieces of 160 ms at the speed of speech. A time
  counts from the moment at which the piece's last sample was spoken, so also while the answer before is still out.
- loss: the same server, on all cores, under 20 speakers, each of which begins another sequence as soon as its own is
  refused. The worker is killed (``kill -9``) three times: from there to the first answer of another sequence, of the
  first and of the last speaker, and to the last speaker's refusal.
- memory: what the handler keeps of a sequence after half a minute, as tensors.
- delay: one speaker of digits; from the end of a word in the sound (where the model itself hears it end, corrected as
  in the answers) to the arrival of the first answer with that word in its text.
- endpoints: strings of the held-out clips without noise, trimmed to where they are louder than 35 dB below their peak,
  with pauses between them and white noise over all, in pieces of 160 ms: which pauses ended an utterance, how many ends
  were elsewhere, and how much sound had come after a word until the answer with its final text, beside the time that
  the answer takes.
- speech: the share of sounds about which the answer is so sure that somebody spoke: the clips, white noise at 3 levels,
  and recordings of the folder REAL_SPEECH if there is one.
- partials: the same clips alone, and strings of speakers set aside in the folder REAL_SPEECH if there is one, in pieces
  of 160 ms: the share of shown words that changed later, and how much sound had come after a word's end until it was
  stable.

The 76.7M-parameter network has random weights, its blank bias set so that about six tokens a second come out.
"""

import argparse
import asyncio
import csv
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
from torchaudio.functional import edit_distance

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import SAMPLES, Server, transcripts  # noqa: E402
from test_live import LiveWorker, headers, pcm_of  # noqa: E402
from test_quality import HELD_OUT, recordings_of_speakers_set_aside  # noqa: E402

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
PAUSES = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # seconds between the clips of a string
NOISES = (40, 20, 10)  # dB below speech
SILENCES = (None, 600, 800, 1000)  # milliseconds of the rule for silence after a word
STRINGS = 4  # of each kind
KILLS, BEREAVED = 3, 20  # how often the worker is killed, and under how many speakers
SURE = (0.3, 0.4, 0.5, 0.6, 0.8)  # what a client may ask of ``speech``


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


async def begins_anew(server: Server, pieces: list[bytes], phase: float, killed: list[float]) -> tuple[float, float]:
    """Seconds from the worker's end until a speaker is refused, and until its next sequence has the first answer."""
    speaker, number, refused = Speaker(server), 0, 0.0
    begun = time.perf_counter() + phase
    while True:
        await asyncio.sleep(max(begun + (number + 1) * PIECE - time.perf_counter(), 0))
        try:
            await speaker.send(pieces[number % (len(pieces) - 1)])
            if refused:
                served = time.perf_counter()
                await speaker.send(b"", last=True)
                return refused - killed[0], served - killed[0]
        except (RuntimeError, OSError, EOFError):
            if not killed:
                raise
            refused, speaker = time.perf_counter(), Speaker(server)
        number += 1


async def bereaved(server: Server, pieces: list[bytes]) -> tuple[float, float, float]:
    """Seconds from the worker's end to the last refusal, and to the first and the last speaker's first answer."""
    rng, killed = random.Random(0), []
    speaking = [begins_anew(server, pieces, rng.uniform(0, PIECE), killed) for _ in range(BEREAVED)]
    everybody = asyncio.gather(*speaking)
    await asyncio.sleep(WARM_UP)
    the_worker(server).kill()
    killed.append(time.perf_counter())
    refused, served = zip(*await everybody, strict=True)
    return max(refused), min(served), max(served)


def loss(name: str, model: Path, pcm: bytes) -> None:
    server = Server(model, live={})
    try:
        server.start()
        for number in range(KILLS):
            row = [name, number + 1, *(f"{each:.1f} s" for each in asyncio.run(bereaved(server, cut(pcm))))]
            print("|", " | ".join(map(str, row)), "|", flush=True)
    finally:
        server.remove()


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


def trimmed(clip: torch.Tensor) -> torch.Tensor:
    """From the first to the last 10 ms that are louder than 35 dB below the loudest."""
    hop = RATE // 100
    power = clip.unfold(0, hop, hop).square().mean(1)
    loud = (power > power.max() * 10**-3.5).nonzero().flatten().tolist()
    return clip[loud[0] * hop : (loud[-1] + 1) * hop]


def clips() -> list[tuple[str, torch.Tensor]]:
    """Text and sound (samples,) of the held-out clips without noise, equally loud."""
    with (HELD_OUT / "transcripts.tsv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if "clean" in row["file"]]
    sounds = [trimmed(decode_audio((HELD_OUT / row["file"]).read_bytes())) for row in rows]
    return [(row["text"], 0.05 * each / each.square().mean().sqrt()) for row, each in zip(rows, sounds, strict=True)]


def string(seed: int, noise: int) -> tuple[torch.Tensor, list[str], list[tuple[float, float]]]:
    """Sound (samples,) of clips with three pauses of each length, texts, and second and length of each pause."""
    rng, generator, all_clips = random.Random(seed), torch.Generator().manual_seed(seed), clips()
    lengths = rng.sample(3 * PAUSES, 3 * len(PAUSES))
    parts, texts, pauses = [], [], []
    for length in [*lengths, 1.0]:
        text, sound = rng.choice(all_clips)
        texts.append(text)
        parts += [sound, torch.zeros(round(length * RATE))]
        pauses.append((sum(map(len, parts)) / RATE - length, length))
    whole = torch.cat(parts)
    return whole + 0.05 * 10 ** (-noise / 20) * torch.randn(len(whole), generator=generator), texts, pauses[:-1]


def answers_to(worker: LiveWorker, sounds: list[torch.Tensor], **choices: str) -> list[list[tuple[float, dict]]]:
    """Of each sound, all in one batch: how many seconds of it had been sent, and the answer, for each piece."""
    told, names = [[] for _ in sounds], [uuid.uuid4().hex for _ in sounds]
    pieces = [cut(pcm_of(sound)) for sound in sounds]
    for number in range(max(map(len, pieces))):
        here = [place for place, own in enumerate(pieces) if number < len(own)]
        batch = []
        for place in here:
            head = headers(names[place], number, number == len(pieces[place]) - 1, **choices)
            batch.append((head, pieces[place][number]))
        for place, (status, answer) in zip(here, worker.answer(*batch), strict=True):
            assert status == 200, answer
            told[place].append((min((number + 1) * PIECE, len(sounds[place]) / RATE), answer))
    return told


def endpoints(name: str, model: Path, _: bytes) -> None:
    worker, strings = LiveWorker(model), [string(seed, noise) for noise in NOISES for seed in range(STRINGS)]
    for silence in SILENCES:
        choices = {"x-endpoints": f"2400,{silence},20000"} if silence else {}
        told = list(zip(strings, answers_to(worker, [sound for sound, *_ in strings], **choices), strict=True))
        for noise in NOISES:
            ended, elsewhere, delays, wrong, words = dict.fromkeys(PAUSES, 0), 0, [], 0, 0
            these, told = told[:STRINGS], told[STRINGS:]
            for (sound, texts, pauses), answers in these:
                utterances = [(at, each) for at, answer in answers for each in answer.get("utterances", [answer])]
                heard = [each["text"] for _, each in utterances if "reason" in each or each["final"]]
                said = " ".join(texts).split()
                wrong, words = wrong + edit_distance(said, " ".join(heard).split()), words + len(said)
                for at, utterance in utterances:
                    # Longer than a segment and its right context take, nothing that was heard is older.
                    where = [(begin, length) for begin, length in pauses if begin <= at <= begin + length + 0.2]
                    if utterance.get("reason") != "silence" or not utterance["text"] or at > len(sound) / RATE - 1:
                        continue
                    elsewhere += not where
                    for begin, length in where:
                        ended[length] += 1
                        delays.append(at - begin)
            row = [name, f"{silence} ms" if silence else "no endpoints", f"{noise} dB"]
            row += [f"{100 * count / 3 / STRINGS:.0f}%" if silence else "" for count in ended.values()]
            row += [elsewhere if silence else "", f"{statistics.median(delays):.2f} s" if delays else ""]
            row += [f"{p95(delays):.2f} s" if delays else "", f"{100 * wrong / words:.1f}%"]
            print("|", " | ".join(map(str, row)), "|", flush=True)


def real(kind: str) -> list[torch.Tensor]:
    """Some recordings (samples,) of speakers that were set aside, in the folder REAL_SPEECH."""
    paths = [path for _, path in recordings_of_speakers_set_aside(kind)]
    return [decode_audio(path.read_bytes()) for path in paths[:: -(-len(paths) // 100) or 1]]


def speech(name: str, model: Path, _: bytes) -> None:
    worker, generator = LiveWorker(model, max_sequences=100), torch.Generator().manual_seed(0)
    noise = [level * torch.randn(3 * RATE, generator=generator) for level in (0.003, 0.03, 0.2) for _ in range(20)]
    sources = {"synthesised strings": [sound for _, sound in clips()], "white noise": noise}
    sources |= {"real strings": real("string"), "real single digits": real("isolated"), "other words": real("negative")}
    for source, sounds in sources.items():
        if sounds:
            last = [answers[-1][1] for answers in answers_to(worker, sounds)]
            sure = sorted(answer["speech"] for answer in last if answer["words"])
            row = [
                name,
                source,
                len(sounds),
                len(sure),
                *(f"{100 * sum(s >= t for s in sure) / len(last):.0f}%" for t in SURE),
            ]
            print("|", " | ".join(map(str, row)), "|", flush=True)


def partials(name: str, model: Path, _: bytes) -> None:
    for source, sounds in (("synthesised", [sound for _, sound in clips()]), ("real", real("string"))):
        sounds = [torch.cat([sound, torch.zeros(RATE // 2)]) for sound in sounds]
        for beam_width in (1, 4, 10) if sounds else ():
            shown = changed = 0
            delays = []
            for answers in answers_to(LiveWorker(model, beam_width=beam_width, max_sequences=100), sounds):
                _, last = answers[-1]
                texts, before = [answer["text"].split() for _, answer in answers], []
                for place, text in enumerate(texts):
                    new = [k for k, word in enumerate(text) if before[k : k + 1] != [word]]
                    shown += len(new)
                    changed += sum(any(later[k : k + 1] != [text[k]] for later in texts[place:]) for k in new)
                    before = text
                for k, word in enumerate(last["words"]):
                    size = len(" ".join(last["text"].split()[: k + 1]))
                    delays.append(next(at for at, answer in answers if answer["stable"] >= size) - word["end"])
            row = [name, source, beam_width, shown, f"{100 * changed / shown:.1f}%"]
            row += [f"{1000 * statistics.median(delays):.0f} ms", f"{1000 * p95(delays):.0f} ms"]
            print("|", " | ".join(map(str, row)), "|", flush=True)


TABLES = {
    "handler": (in_the_handler, "| | speakers in a batch | median | p95 | a speaker |\n|---|---|---|---|---|"),
    "memory": (memory, "| | of a sequence | tokens |\n|---|---|---|"),
    "server": (
        through_the_server,
        "| | speakers | median | p95 | worker's cores | Java's | load generator's |\n|---|---|---|---|---|---|---|",
    ),
    "loss": (loss, "| | kill | all refused | first served | all served |\n|---|---|---|---|---|"),
    "delay": (word_delays, "| | pieces of | words | median | p95 |\n|---|---|---|---|---|"),
    "endpoints": (
        endpoints,
        f"| | silence | noise below speech | {' | '.join(f'{pause} s' for pause in PAUSES)} | elsewhere | median | p95 "
        f"| wrong words |\n{'|---' * (7 + len(PAUSES))}|",
    ),
    "speech": (
        speech,
        f"| | sound | files | with words | {' | '.join(f'{s} or more' for s in SURE)} |\n{'|---' * (4 + len(SURE))}|",
    ),
    "partials": (
        partials,
        "| | strings | beam | words shown | changed | median | p95 |\n|---|---|---|---|---|---|---|",
    ),
}
DIGITS_ONLY = ("delay", "endpoints", "speech", "partials")  # what asks for words that mean something


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)}; default: all")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    if not set(args.tables) <= set(TABLES):
        parser.error(f"there are the tables {', '.join(TABLES)}")
    torch.set_num_threads(1)
    print(f"{engine.processor()}, {os.cpu_count()} cores, one thread a worker, torch {torch.__version__}")
    _, features, _ = engine.audio([engine.SAMPLE])
    sounds = {size: sound(size) for size in ("digits", "76.7M")}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: build(name, features, Path(folder) / f"{name}.pt") for name in args.models}
        for table in args.tables or TABLES:
            measure, head = TABLES[table]
            print(f"\n{table}\n\n{head}", flush=True)
            for name, model in models.items():
                if table not in DIGITS_ONLY or name.startswith("digits"):
                    measure(name, model, sounds[name.split("-")[0]])


if __name__ == "__main__":
    main()
