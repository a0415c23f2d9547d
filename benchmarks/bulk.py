"""How much audio does transcribe.py transcribe in an hour of a core, and what does Ray cost?

    pip install -r requirements-bulk.txt -r benchmarks/requirements.txt
    python benchmarks/bulk.py cores     # one process, one and two actors, the server asked by eight connections
    python benchmarks/bulk.py short     # 10,000 files of two seconds
    python benchmarks/bulk.py long      # one file of ten hours

The digits model in float32. An hour of a core is an hour of processor time, of all processes together, Ray's and Java's
too, so that the figures hold on a machine that others use. It is counted from the first row to the last: what starting
Ray and its actors takes stands beside it.
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
    """Run transcribe.py: files, seconds of audio, of processor time and of the clock, files a second, most GB."""
    command = [sys.executable, "transcribe.py", audio, "--model", model, "--output", output, "--actors", actors]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    used, memory, marks = {}, {"actor": 0.0, "driver": 0.0}, []  # marks: rows, processor time, clock
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            try:
                for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                    with each.oneshot():
                        times, name = each.cpu_times(), "driver" if each.pid == process.pid else "actor"
                        used[each.pid] = times.user + times.system
                        memory[name] = max(memory[name], each.memory_info().rss / 1e9)
            except psutil.Error:
                continue
            rows = sum(part.read_bytes().count(b"\n") for part in output.glob("*.jsonl"))
            if rows and (not marks or rows > marks[-1][0]):
                marks[1:] = [(rows, sum(used.values()), time.monotonic())]

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0].decode()
    ended.set()
    watcher.join()
    rows = [json.loads(line) for part in output.glob("*.jsonl") for line in part.read_text().splitlines()]
    if process.returncode or not rows or any(row["error"] for row in rows):
        sys.exit(f"{said}\n{[row['error'] for row in rows if row['error']][:3]}")
    (first, start, began), (last, end, ended_at) = marks[0], marks[-1]
    # At the first row the other actors are, on average, half-way through a file.
    done = last - first - (actors - 1) / 2
    return {
        "files": len(rows),
        "heard": sum(row["duration"] for row in rows),
        "audio": done * rows[0]["duration"],
        "processor": end - start,
        "starting": start,
        "rate": (last - first) / (ended_at - began) if last > first else 0.0,
        "clock": float(re.search(r"in (\S+) s", said)[1]),
    } | memory


def report(name: str, audio: float, processor: float, more: str = "") -> float:
    """Print a line; returns hours of audio an hour of a core."""
    speed = audio / processor
    print(
        f"{name:40} {audio / 3600:6.2f} h of audio, {processor:7.1f} s: {speed:6.1f} h an hour of a core{more}",
        flush=True,
    )
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
    started = time.process_time()
    for path in paths[: files // 2]:
        worker.transcribe(path.read_bytes())
    alone = report("one process, the handler alone", MINUTE * (files // 2), time.process_time() - started)
    server = Server(model, minWorkers=2, maxWorkers=2, batchSize=1)
    try:
        server.start()

        def ask(path: Path) -> None:
            headers = {"Accept": "application/json;profile=verbose", "Content-Type": "application/octet-stream"}
            requests.post(server.url, data=path.read_bytes(), headers=headers, timeout=600).raise_for_status()

        def processor() -> float:
            return sum(sum(each.cpu_times()[:2]) for each in server.processes())

        with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(ask, paths[:CONNECTIONS]))
            started = processor()
            list(pool.map(ask, paths))
            report(f"server, 2 workers, {CONNECTIONS} connections", MINUTE * files, processor() - started)
    finally:
        server.remove()
    speeds = {}
    for actors in (1, 2):
        given = bulk(model, audio, folder / f"results{actors}", actors)
        more = f"; {given['starting']:.0f} s more to start and for the first file"
        speeds[actors] = report(f"transcribe.py, actors: {actors}", given["audio"], given["processor"], more)
    print(f"two actors against one: {speeds[2] / speeds[1]:.0%}; against one process: {speeds[2] / alone:.0%}")


def short(folder: Path, model: Path, files: int) -> None:
    """Very many short files."""
    audio = folder / "audio"
    audio.mkdir()
    digits = decode_audio((SAMPLES / "three-digits.wav").read_bytes())
    one = write(folder / "two-seconds.wav", digits[: 2 * SAMPLE_RATE])
    for number in range(files):
        (audio / f"{number:06}.wav").hardlink_to(one)
    given = bulk(model, audio, folder / "results", 2)
    more = f"; {given['rate']:.0f} files a second; {given['driver']:.2f} GB at most in transcribe.py"
    report(f"{files} files of 2 s, actors: 2", given["audio"], given["processor"], more)


def long(folder: Path, model: Path, hours: int) -> None:
    """One very long file."""
    sample = (SAMPLES / "zero-to-nine.mp3").read_bytes()
    seconds = len(decode_audio(sample)) / SAMPLE_RATE
    times = round(hours * 3600 / seconds)
    audio = folder / "long.mp3"
    audio.write_bytes(sample * times)  # MP3s that are joined are one
    given = bulk(model, audio, folder / "results", 1)
    more = f", start included; {given['actor']:.2f} GB at most in its actor"
    report(f"one file of {hours} h", given["heard"], given["starting"], more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cores", "short", "long"))
    parser.add_argument("--size", type=int, help="files of `cores` (60), of `short` (10,000); hours of `long` (10)")
    args = parser.parse_args()
    measure, size = {"cores": (cores, 60), "short": (short, 10_000), "long": (long, 10)}[args.what]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "emformer_rnnt.pt")
        export_model.export("digits", model)
        measure(Path(folder), model, args.size or size)


if __name__ == "__main__":
    main()
