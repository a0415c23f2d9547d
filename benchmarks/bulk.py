"""How much audio does transcribe.py transcribe in an hour of a core, and what does Ray cost?

    pip install -r requirements-bulk.txt -r benchmarks/requirements.txt
    python benchmarks/bulk.py cores     # one process, one and two actors, the server asked by eight connections
    python benchmarks/bulk.py short     # 10,000 files of two seconds
    python benchmarks/bulk.py long      # one file of ten hours

The digits model in float32. Times of transcribe.py are those that it prints: from the moment at which Ray runs to the
last row, its actors' start included; what it takes from the first row to the last is the second figure.
"""

import argparse
import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import wave
from pathlib import Path

import psutil
import requests
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
from handler import SAMPLE_RATE, decode_audio  # noqa: E402
from tests.conftest import SAMPLES, Server, Worker  # noqa: E402

CONNECTIONS = 8
MINUTE = 60  # seconds of each file of ``cores``


def write(path: Path, samples: torch.Tensor, times: int = 1) -> Path:
    """Write (samples,) at 16 kHz, so many times in a row, as a 16-bit WAV file."""
    sound = (samples * 32767).clamp(-32768, 32767).short().numpy().tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, times * len(samples), "NONE", ""))
        for _ in range(times):
            file.writeframesraw(sound)
    return path


def bulk(model: Path, audio: Path, output: Path, actors: int) -> dict[str, float]:
    """Run transcribe.py: seconds of audio, seconds in all and between the first row and the last, GB at most."""
    command = [sys.executable, "transcribe.py", audio, "--model", model, "--output", output, "--actors", actors]
    started, first, last, peak = time.monotonic(), None, None, {}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    ended = threading.Event()

    def watch() -> None:
        nonlocal first, last
        size = 0
        while not ended.wait(0.2):
            parts = sum(part.stat().st_size for part in output.glob("part-*"))
            if parts > size:
                size, last = parts, time.monotonic()
                first = first or last
            for each in psutil.Process(process.pid).children(recursive=True):
                try:
                    name = each.cmdline()[0] if "Transcriber" in each.cmdline()[0] else each.name()
                    peak[name] = max(peak.get(name, 0), each.memory_info().rss / 1e9)
                except (psutil.Error, IndexError):
                    continue
            peak["driver"] = max(peak.get("driver", 0), psutil.Process(process.pid).memory_info().rss / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0].decode()
    ended.set()
    watcher.join()
    rows = [json.loads(line) for part in output.glob("*.jsonl") for line in part.read_text().splitlines()]
    if process.returncode or not rows or any(row["error"] for row in rows):
        sys.exit(f"{said}\n{[row['error'] for row in rows if row['error']][:3]}")
    actor = max((size for name, size in peak.items() if "Transcriber" in name), default=0.0)
    return {
        "files": len(rows),
        "audio": sum(row["duration"] for row in rows),
        "seconds": float(re.search(r"in (\S+) s", said)[1]),
        "steady": last - first,
        "all": time.monotonic() - started,
        "actor GB": actor,
        "driver GB": peak["driver"],
    }


def report(name: str, cores: int, audio: float, seconds: float, more: str = "") -> float:
    """Print a line; returns hours of audio an hour of a core."""
    speed = audio / seconds / cores
    print(f"{name:44} {audio / 3600:6.2f} h in {seconds:7.1f} s: {speed:6.1f} h an hour of a core{more}", flush=True)
    return speed


def cores(folder: Path, model: Path, files: int) -> None:
    """The same minutes of digits through one process, actors, and the server."""
    digits = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes())
    audio = folder / "audio"
    audio.mkdir()
    minute = digits.repeat(-(-MINUTE * SAMPLE_RATE // len(digits)))[: MINUTE * SAMPLE_RATE]
    paths = [write(audio / f"{number:04}.wav", minute) for number in range(files)]
    torch.set_num_threads(1)
    worker = Worker(model)
    started = time.monotonic()
    for path in paths[: files // 2]:
        worker.transcribe(path.read_bytes())
    report("one process, the handler alone", 1, MINUTE * (files // 2), time.monotonic() - started)
    speeds = {}
    for actors in (1, 2):
        given = bulk(model, audio, folder / f"results{actors}", actors)
        # The first row comes when the first file is done: what follows is all but one file an actor.
        done = given["audio"] * (1 - actors / given["files"])
        speeds[actors] = report(f"transcribe.py, {actors} actors, first row to last", actors, done, given["steady"])
        report(f"transcribe.py, {actors} actors, with their start", actors, given["audio"], given["seconds"])
    print(f"two actors against one: {speeds[2] / speeds[1]:.0%}")
    server = Server(model, minWorkers=2, maxWorkers=2, batchSize=1)
    try:
        server.start()

        def ask(path: Path) -> None:
            headers = {"Accept": "application/json;profile=verbose", "Content-Type": "application/octet-stream"}
            requests.post(server.url, data=path.read_bytes(), headers=headers, timeout=600).raise_for_status()

        with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(ask, paths[:CONNECTIONS]))
            started = time.monotonic()
            list(pool.map(ask, paths))
            report(f"server, 2 workers, {CONNECTIONS} connections", 2, MINUTE * files, time.monotonic() - started)
    finally:
        server.remove()


def short(folder: Path, model: Path, files: int) -> None:
    """Very many short files."""
    audio = folder / "audio"
    audio.mkdir()
    one = write(
        folder / "two-seconds.wav", decode_audio((SAMPLES / "three-digits.wav").read_bytes())[: 2 * SAMPLE_RATE]
    )
    for number in range(files):
        (audio / f"{number:06}.wav").hardlink_to(one)
    given = bulk(model, audio, folder / "results", 2)
    more = f"; {given['files'] / given['steady']:.0f} files a second, driver {given['driver GB']:.2f} GB"
    report(f"{files} files of 2 s, 2 actors", 2, given["audio"], given["steady"], more)


def long(folder: Path, model: Path, hours: int) -> None:
    """One very long file."""
    minute = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes())
    times = round(hours * 3600 * SAMPLE_RATE / len(minute))
    given = bulk(model, write(folder / "long.wav", minute, times), folder / "results", 1)
    more = f"; actor {given['actor GB']:.2f} GB, driver {given['driver GB']:.2f} GB"
    report(f"one file of {hours} h", 1, given["audio"], given["seconds"], more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cores", "short", "long"))
    parser.add_argument("--size", type=int, help="files of `cores` (200), of `short` (10,000); hours of `long` (10)")
    args = parser.parse_args()
    measure, size = {"cores": (cores, 200), "short": (short, 10_000), "long": (long, 10)}[args.what]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "emformer_rnnt.pt")
        export_model.export("digits", model)
        measure(Path(folder), model, args.size or size)


if __name__ == "__main__":
    main()
