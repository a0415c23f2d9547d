"""How far does it go? TorchServe's front end alone, queues against their simulation, and what a number of users needs.

    pip install -r benchmarks/requirements.txt -r deploy/requirements.txt
    python benchmarks/capacity.py front     # requests a second of a model that does nothing, one and two workers
    python benchmarks/capacity.py queue     # latencies under load, and as SimPy has them from lone requests
    python benchmarks/capacity.py plan      # cores, memory, network and core-hours, from measured costs

`queue` first sends requests one by one, which gives the times of service with TorchServe's part. The simulation knows
nothing else: workers that take such times, arrivals as k6 makes them, one queue. Both are printed for each load.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import requests

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import engine  # noqa: E402
from benchmarks import serve as benchmark  # noqa: E402
from handler import decode_audio  # noqa: E402
from tests.conftest import SAMPLES, Server  # noqa: E402

NOTHING = "def handle(data, context):\n    return ['' for _ in data or ()]\n"
SECONDS = 15  # of each measurement
LONE = 100  # requests one by one
LOADS = (0.3, 0.5, 0.7, 0.9)  # of what the workers can do
SIMULATED = 20_000  # requests
# What a core does: live speakers at a time within 160 ms and the large model's hours of audio an hour from
# docs/performance.md, the digits' hours from docs/bulk.md; and the GB of its worker.
COSTS = {"digits, fp32": (50, 177, 0.6), "76.7 M, int8": (8, 13.9, 0.8)}
PIECES, JAVA_SECONDS = 6.25, 0.0008  # a speaker's pieces a second; Java's processor time for a request, from `front`
POD_WORKERS, JAVA_GB = 2, 0.6
PCM, FLAC = 256, 140  # kbit/s of live pieces as they are sent, 16 kHz and 16 bit; of files, about


def front(folder: Path) -> None:
    """Requests a second of a model that does nothing."""
    handler, model = folder / "nothing.py", folder / "nothing.pt"
    handler.write_text(NOTHING)
    model.touch()
    small, large = folder / "small", folder / "large"
    small.write_bytes(bytes(5120))  # 160 ms of PCM
    large.write_bytes(bytes(320_000))  # 10 s
    for workers in (1, 2):
        server = Server(model, handler=handler, minWorkers=workers, maxWorkers=workers, batchSize=1)
        try:
            server.start()
            for body in (small, large):
                for clients in (1, 16):
                    benchmark.load(server, body, executor="constant-vus", vus=clients, duration="5s")
                    before = benchmark.snapshot(server)
                    found = benchmark.load(server, body, executor="constant-vus", vus=clients, duration=f"{SECONDS}s")
                    after = benchmark.snapshot(server)
                    wall = after["time"] - before["time"]
                    handled = wall * found["rate"]
                    java, worker = (1000 * (after[name] - before[name]) / handled for name in ("java", "workers"))
                    print(
                        f"{workers} workers, {body.stat().st_size:6} bytes, {clients:2} clients: {found['rate']:4.0f} "
                        f"a second; processor time of each: Java {java:.2f} ms, worker {worker:.2f} ms",
                        flush=True,
                    )
        finally:
            server.remove()


def simulated(times: list[float], workers: int, rate: float) -> list[float]:
    """Latencies in seconds of requests that come evenly, ``rate`` a second, each served for one of ``times``."""
    import simpy

    environment, found, chance = simpy.Environment(), [], random.Random(0)
    pool = simpy.Resource(environment, workers)

    def request(comes: float):
        with pool.request() as turn:
            yield turn
            yield environment.timeout(chance.choice(times))
        found.append(environment.now - comes)

    def arrivals():
        for _ in range(SIMULATED):
            environment.process(request(environment.now))
            yield environment.timeout(1 / rate)

    environment.process(arrivals())
    environment.run()
    return found


def queue(folder: Path) -> None:
    """Latencies of the digits model under load, and as the simulation has them."""
    model = benchmark.export(folder / "digits.pt")
    digits = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes())
    audio = benchmark.write(folder / "digits.wav", digits)
    for workers in (1, 2):
        server = Server(model, minWorkers=workers, maxWorkers=workers, batchSize=1)
        try:
            server.start()
            times, session = [], requests.Session()
            headers = {"Content-Type": "application/octet-stream"}
            for number in range(LONE + 10):
                started = time.monotonic()
                session.post(server.url, data=audio.read_bytes(), headers=headers, timeout=60).raise_for_status()
                times += [time.monotonic() - started] if number >= 10 else []
            print(f"{workers} workers; a lone request: mean {1000 * statistics.mean(times):.0f} ms")
            for load in LOADS:
                rate = max(1, round(60 * load * workers / statistics.mean(times)))  # a minute
                arrivals = {"rate": rate, "timeUnit": "60s", "duration": f"{SECONDS}s"}
                more = {"preAllocatedVUs": 100, "maxVUs": 100}
                found = benchmark.load(server, audio, executor="constant-arrival-rate", **arrivals, **more)
                cuts = statistics.quantiles(simulated(times, workers, rate / 60), n=100)
                print(f"  load {load:.0%}, {rate / 60:5.1f} requests/s", end="")
                for name, place in (("p50", 49), ("p95", 94), ("p99", 98)):
                    print(f"   {name} {found[name]:5.0f} ms, simulated {1000 * cuts[place]:5.0f} ms", end="")
                print(flush=True)
        finally:
            server.remove()


def plan(_: Path) -> None:
    """What numbers of users need."""
    print(f"{'':32}{'':14}{'cores':>10}{'pods':>9}{'memory':>11}{'network in':>13}{'core-hours a day':>18}")
    works = [(f"{count:,} live speakers", count, None) for count in (100, 10_000, 1_000_000)]
    works.append(("1,000,000 hours of audio a day", None, 1_000_000 / 24))
    for (name, speakers, hours), (model, (live, bulk, memory)) in itertools.product(works, COSTS.items()):
        workers = math.ceil(speakers / live if speakers else hours / bulk)
        java = speakers * PIECES * JAVA_SECONDS if speakers else 0.0
        cores, pods = math.ceil(workers + java), math.ceil(workers / POD_WORKERS)
        gigabytes = workers * memory + pods * JAVA_GB
        network = speakers * PCM / 1e6 if speakers else hours * FLAC / 1e6
        print(f"{name:32}{model:14}{cores:10,.0f}{pods:9,.0f}{gigabytes:8,.0f} GB", end="")
        print(f"{network:8,.2f} Gbit/s{24 * cores:18,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("front", "queue", "plan"))
    args = parser.parse_args()
    print(engine.processor())
    with tempfile.TemporaryDirectory() as folder:
        {"front": front, "queue": queue, "plan": plan}[args.what](Path(folder))


if __name__ == "__main__":
    main()
