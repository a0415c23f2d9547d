"""Does the server stay as it is, hour after hour? Good and bad requests at 70% load; draws soak.png.

    pip install -r benchmarks/requirements.txt
    python benchmarks/soak.py                   # ten minutes
    python benchmarks/soak.py --minutes 60
    python benchmarks/soak.py --abandoned 60    # only what hours that nobody waits for cost the others

A TorchServe of its own on free ports of 127.0.0.1, as `make run` starts it, and Grafana's k6, whose arrivals wait for
nobody. The requests go round: every sample file, some of them in other answer formats; a minute of speech; and a third
of requests that have to be refused. Every answer is compared with the one that is right. Memory
(resident), open files and threads of the worker and of Java are read every few seconds, and how much of the processors
a hypervisor takes away: on a shared machine that is where latencies come from.

With --abandoned, requests of one second arrive twice a second and wait for nobody, while clients send that many minutes
of audio and hang up: with one worker, with two, and with one that may be held for ABANDONED_LIMIT seconds.
"""

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
from benchmarks import engine  # noqa: E402
from benchmarks.serve import write  # noqa: E402
from handler import decode_audio  # noqa: E402
from tests.conftest import BIN, SAMPLES, Server, silent_film, transcripts  # noqa: E402

LOAD = 0.7
WARM_UP = 1 / 6  # of the whole time; growth and drift are counted from there
PARTS = 6  # of the time after that, for the latencies
ABANDONED = 2  # long files that are sent and not waited for
ABANDONED_LIMIT = 5  # seconds
SCRIPT = """
import http from 'k6/http';
import exec from 'k6/execution';
import { check } from 'k6';
const asked = JSON.parse(open(__ENV.REQUESTS));
for (const request of asked) { request.audio = open(request.file, 'b'); }
export const options = { scenarios: { soak: JSON.parse(__ENV.SCENARIO) } };
export default function () {
  const number = exec.scenario.iterationInTest;
  const request = asked[number % asked.length];
  const answer = http.post(__ENV.URL, request.audio, {
    headers: { 'Content-Type': 'application/octet-stream', Accept: request.accept },
    responseCallback: http.expectedStatuses(request.status), timeout: '60s',
  });
  const right = answer.status === request.status && (answer.body || '').includes(request.answer)
    && (request.accept !== 'text/plain' || request.status !== 200 || answer.body === request.answer);
  check(answer, { right: () => right });
  if (!right) { console.error(`${request.file} ${request.accept}: ${answer.status} ${answer.body || answer.error}`); }
}
export function handleSummary(data) { return { [__ENV.SUMMARY]: JSON.stringify(data.metrics) }; }
"""


def requests_to_send(folder: Path, speech: Path) -> list[dict[str, str | int]]:
    """The round: each with its file, ``Accept``, and the status and text that are right."""
    texts = transcripts("digits")
    right = [(SAMPLES / name, "text/plain", 200, text) for name, text in texts.items()]
    right += [
        (SAMPLES / "pin.webm", "text/vtt", 200, texts["pin.webm"]),
        (SAMPLES / "room-number.ogg", "application/json; profile=verbose", 200, texts["room-number.ogg"]),
        (speech, "application/json", 200, " ".join([texts["zero-to-nine.mp3"]] * 6)),
    ]
    bad = {
        "text": (SAMPLES.parent / "requirements.txt").read_bytes(),
        "empty": b"",
        "film": silent_film(),
        "head": (SAMPLES / "zero-to-nine.mp3").read_bytes()[:200],
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    wrong = [
        (folder / "text", "text/plain", 400, "NotAudio"),
        (folder / "empty", "text/plain", 400, "EmptyBody"),
        (folder / "film", "text/plain", 415, "NoAudioStream"),
        (folder / "head", "text/plain", 400, "NotAudio"),
        (SAMPLES / "pin.webm", "image/png", 406, "UnknownFormat"),
    ]
    order = [request for index, each in enumerate(right) for request in (each, *wrong[index // 2 :][: index % 2])]
    return [
        {"file": str(file), "accept": accept, "status": status, "answer": answer}
        for file, accept, status, answer in order
    ]


def k6(server: Server, asked: list[dict], **scenario: object) -> subprocess.Popen:
    """Start k6; it writes summary.json and every latency into points.csv."""
    (server.folder / "soak.js").write_text(SCRIPT)
    (server.folder / "requests.json").write_text(json.dumps(asked))
    environment = os.environ | {
        "URL": server.url,
        "REQUESTS": str(server.folder / "requests.json"),
        "SCENARIO": json.dumps(scenario),
        "SUMMARY": str(server.folder / "summary.json"),
    }
    command = [BIN / "k6", "run", "--quiet", "--no-usage-report", "--address=", "--system-tags", "status"]
    command += ["--out", f"csv={server.folder / 'points.csv'}", server.folder / "soak.js"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def state(server: Server) -> dict[str, float]:
    """MB, open files and threads of Java and of the worker."""
    java, *workers = server.processes()
    [worker] = [each for each in workers if "model_service_worker" in " ".join(each.cmdline())]
    readings = {"worker's process": worker.pid, "stolen s": getattr(psutil.cpu_times(), "steal", 0.0)}
    for name, process in (("Java", java), ("worker", worker)):
        readings |= {
            f"{name} MB": process.memory_info().rss / 1e6,
            f"{name} files": process.num_fds(),
            f"{name} threads": process.num_threads(),
        }
    return readings


def soak(server: Server, asked: list[dict], minutes: float) -> tuple[list[dict[str, float]], list[tuple[float, float]]]:
    """Load the server; returns readings over time and (time, latency in ms) of the requests answered with 200."""
    if k6(server, asked, executor="constant-vus", vus=2, duration="20s").wait(timeout=120):
        sys.exit("k6 failed.")
    rate = LOAD * json.loads((server.folder / "summary.json").read_text())["http_reqs"]["values"]["rate"]
    arrivals = {"rate": round(60 * rate), "timeUnit": "60s", "duration": f"{round(60 * minutes)}s"}
    run = k6(server, asked, executor="constant-arrival-rate", preAllocatedVUs=100, **arrivals)
    began = time.time()
    readings = []
    try:
        while run.poll() is None and time.time() - began < 60 * minutes + 120:
            readings.append({"minute": (time.time() - began) / 60} | state(server))
            time.sleep(max(1.0, minutes / 6))
    finally:
        run.kill()
    with (server.folder / "points.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["metric_name"] in ("http_req_duration", "checks")]
    checks = [float(row["metric_value"]) for row in points if row["metric_name"] == "checks"]
    metrics = json.loads((server.folder / "summary.json").read_text())
    unsent = metrics.get("dropped_iterations", {"values": {"count": 0}})["values"]["count"]
    print(f"{minutes:g} minutes at {rate:.1f} requests/s ({LOAD:.0%} of what it can answer)")
    print(f"{len(checks)} answers, {checks.count(0.0)} of them wrong; {unsent} requests that k6 could not send in time")
    latencies = [
        ((float(row["timestamp"]) - began) / 60, float(row["metric_value"]))
        for row in points
        if row["metric_name"] == "http_req_duration" and row["status"] == "200"
    ]
    return readings, latencies


def stolen(readings: list[dict[str, float]], begin: float, end: float) -> float:
    """Percent of the machine's processors that a hypervisor gave to others between two minutes."""
    own = [each["stolen s"] for each in readings if begin <= each["minute"] < end]
    return 100 * (own[-1] - own[0]) / (60 * (end - begin)) / os.cpu_count() if len(own) > 1 else 0.0


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def report(readings: list[dict[str, float]], latencies: list[tuple[float, float]], minutes: float) -> None:
    """Print what changed after the warm-up."""
    print("restarts of the worker:", len({each["worker's process"] for each in readings}) - 1)
    settled = [each for each in readings if each["minute"] >= WARM_UP * minutes]
    tenth = max(1, len(settled) // 10)
    print(f"\n{'':16} after {WARM_UP * minutes:3.0f} min     at the end     change")
    for name in [name for name in settled[0] if name not in ("minute", "worker's process", "stolen s")]:
        first, last = (statistics.mean(each[name] for each in part) for part in (settled[:tenth], settled[-tenth:]))
        print(f"{name:16} {first:14.1f} {last:14.1f} {100 * (last / first - 1):+9.2f}%")
    print("\nlatency of good requests       p50        p95        p99   ms     stolen")
    edges = [minutes * (WARM_UP + (1 - WARM_UP) * part / PARTS) for part in range(PARTS + 1)]
    for begin, end in pairwise(edges):
        own = [latency for minute, latency in latencies if begin <= minute < end]
        figures = (f"{percentile(own, percent):10.1f}" for percent in (50, 95, 99))
        print(f"minute {begin:5.1f} to {end:5.1f}  {len(own):6}", *figures, f"{stolen(readings, begin, end):12.1f}%")


def draw(readings: list[dict[str, float]], latencies: list[tuple[float, float]], minutes: float, path: Path) -> None:
    """Memory, open files and threads, and latencies over the minutes, one above the other."""
    import matplotlib.pyplot as plt

    figure, (memory, counts, latency) = plt.subplots(3, 1, sharex=True, figsize=(9, 8))
    times = [each["minute"] for each in readings]
    for name, colour in (("worker", "#2a6fb0"), ("Java", "#c06030")):
        memory.plot(times, [each[f"{name} MB"] for each in readings], color=colour, label=name)
        for what, style in (("files", "-"), ("threads", ":")):
            values = [each[f"{name} {what}"] for each in readings]
            counts.plot(times, values, style, color=colour, label=f"{name}: {what}")
    step = minutes / 60
    parts = [[ms for minute, ms in latencies if part * step <= minute < (part + 1) * step] for part in range(60)]
    for percent, style in ((50, "-"), (95, "--"), (99, ":")):
        pairs = [((i + 0.5) * step, percentile(part, percent)) for i, part in enumerate(parts) if len(part) > 20]
        latency.plot(*zip(*pairs, strict=True), style, color="#2a6fb0", label=f"p{percent}")
    for axes, label in ((memory, "resident memory, MB"), (counts, "open files, threads"), (latency, "latency, ms")):
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.4)
        axes.legend(ncols=4, loc="lower right")
    share = latency.twinx()
    shares = [stolen(readings, part * step, (part + 1) * step) for part in range(60)]
    share.fill_between([(part + 0.5) * step for part in range(60)], shares, color="#999999", alpha=0.4)
    share.set(ylabel="processors stolen, %", ylim=(0, 100))
    latency.set(xlabel="minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def latencies_of(server: Server, audio: bytes, seconds: float) -> list[float]:
    """Milliseconds that requests took which were sent twice a second for so long; infinite if they were refused."""

    def ask(_: int) -> float:
        started = time.monotonic()
        answer = requests.post(server.url, files={"file": audio}, timeout=600)
        return 1000 * (time.monotonic() - started) if answer.ok else float("inf")

    with ThreadPoolExecutor(200) as pool:
        asked = []
        for number in range(round(2 * seconds)):
            asked.append(pool.submit(ask, number))
            time.sleep(0.5)
        return [each.result() for each in asked]


def abandon(server: Server, audio: bytes) -> None:
    """Send a file and hang up."""
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/octet-stream\r\n"
        connection.sendall(f"{head}Content-Length: {len(audio)}\r\n\r\n".encode() + audio)


def abandoned(model: Path, folder: Path, minutes: float) -> None:
    """Print the latencies of short requests before and while so long ones are abandoned."""
    clip = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes())
    second = write(folder / "second.wav", clip[: engine.SAMPLE_RATE]).read_bytes()
    samples = clip.repeat(round(60 * minutes * engine.SAMPLE_RATE) // len(clip))
    long = write(folder / "long.wav", samples).read_bytes()
    print(f"{ABANDONED} of {minutes:g} minutes are abandoned; what requests of one second take, ms")
    print(f"{'':36} {'alone: p50':>15}{'p95':>15}{'beside: p50':>15}{'p95':>15}   refused", flush=True)
    for workers, limit in ((1, 900), (2, 900), (1, ABANDONED_LIMIT)):
        server = Server(model, batchSize=1, minWorkers=workers, maxWorkers=workers, max_engine_seconds=limit)
        try:
            server.start()
            latencies_of(server, second, 2)
            alone = latencies_of(server, second, 10)
            for _ in range(ABANDONED):
                abandon(server, long)
            beside = latencies_of(server, second, 30)
        finally:
            server.remove()
        figures = [percentile(own, percent) for own in (alone, beside) for percent in (50, 95)]
        label = f"{workers} workers, max_engine_seconds {limit}"
        print(
            f"{label:36} {''.join(f'{figure:15.0f}' for figure in figures)} {beside.count(float('inf')):9}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("soak.png"))
    parser.add_argument("--abandoned", type=float, help="minutes of audio: only what it costs the others")
    args = parser.parse_args()
    print(f"{engine.processor()}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "emformer_rnnt.pt")
        export_model.export("digits", model)
        if args.abandoned:
            return abandoned(model, Path(folder), args.abandoned)
        minute = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes()).repeat(6)
        asked = requests_to_send(Path(folder), write(Path(folder, "minute.wav"), minute))
        server = Server(model, batchSize=1)
        try:
            started = server.serve("start")
            if started.returncode:
                sys.exit(started.stdout + started.stderr)
            readings, latencies = soak(server, asked, args.minutes)
        finally:
            server.remove()
    report(readings, latencies, args.minutes)
    draw(readings, latencies, args.minutes, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
