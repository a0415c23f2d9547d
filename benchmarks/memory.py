"""How much memory do TorchServe and its worker need, and what is answered where there is less?

    python benchmarks/memory.py                                        # the digits model
    python benchmarks/memory.py --model 76.7M-int8 --minutes 1         # random weights in the place of LibriSpeech's
    python benchmarks/memory.py --limits 900 1000 1200 1500 2000       # as root: in a cgroup with so many MB

A TorchServe of its own on free ports of 127.0.0.1, as `make run` starts it, Java's heap at the least that it gets. WAV
files of 16 kHz PCM are sent one after the other. Printed is the most that was resident during each request.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import psutil
import requests
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
import serve  # noqa: E402
from benchmarks import engine  # noqa: E402
from benchmarks.serve import MODELS, write  # noqa: E402
from handler import decode_audio  # noqa: E402
from tests.conftest import SAMPLES, Server  # noqa: E402

GROUPS = Path("/sys/fs/cgroup")


def peak(process: psutil.Process) -> float:
    """MB that were resident at most since the last call."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


def ask(server: Server, audio: Path) -> str:
    """The status of the answer to a file, or what became of the request."""
    headers = {"Content-Type": "application/octet-stream"}
    try:
        answer = requests.post(server.url, data=audio.read_bytes(), headers=headers, timeout=1200)
    except requests.RequestException as error:
        return type(error).__name__
    return f"{answer.status_code}{'' if answer.ok else ' ' + answer.json()['type']}"


def measure(server: Server, files: dict[str, Path], place: Path | None) -> None:
    """Start the server, in the cgroup ``place`` if there is one, and print a line for each of ``files``."""
    if place:
        (place / "cgroup.procs").write_text("0")  # this process, and so what it starts
    started = server.serve("start")
    if place:
        (place.parent / "cgroup.procs").write_text("0")
    if started.returncode:
        print("  does not start:", started.stderr.strip().splitlines()[-1])
        return
    java, worker = server.processes()[0], server.worker()
    print(f"  {'ready':10} {'':28} Java {java.memory_info().rss / 1e6:5.0f} MB   worker {peak(worker):5.0f} MB")
    for name, audio in files.items():
        status = ask(server, audio)
        try:
            print(f"  {name:10} {status:28} Java {peak(java):5.0f} MB   worker {peak(worker):5.0f} MB", flush=True)
        except OSError:  # the kernel has killed one of them
            print(f"  {name:10} {status:28} a process was killed", flush=True)
            if not java.is_running() or java.status() == psutil.STATUS_ZOMBIE:
                return
            worker = server.worker()


def group(megabytes: int) -> Path:
    """A new cgroup, of version 1 or 2, whose processes may have so many MB together."""
    memory = GROUPS / "memory"
    folder = (memory if memory.is_dir() else GROUPS) / f"emformer-{megabytes}"
    folder.mkdir(exist_ok=True)
    name = "memory.limit_in_bytes" if memory.is_dir() else "memory.max"
    (folder / name).write_text(str(megabytes * 2**20))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="digits-fp32")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 40, 60])
    parser.add_argument("--limits", type=int, nargs="+", help="MB of cgroups; this machine's memory unless told")
    parser.add_argument("--handler", type=Path, default=ROOT / "handler.py", help="another one, to compare")
    args = parser.parse_args()
    size, precision = args.model.split("-")
    print(f"{engine.processor()}; {args.model}, Java's heap {serve.LEAST_HEAP} MB")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "emformer_rnnt.pt")
        if size == "digits":
            export_model.export("digits", model, precision)
        else:
            engine.save(engine.script(engine.stand_in(1.65), precision), model)
        clip = decode_audio((SAMPLES / "zero-to-nine.mp3").read_bytes())
        files = {}
        for minutes in args.minutes:
            samples = int(minutes * 60 * engine.SAMPLE_RATE)
            audio = clip.repeat(-(-samples // len(clip)))[:samples]
            files[f"{minutes:g} min"] = write(Path(folder, f"{minutes:g}.wav"), audio)
        for limit in args.limits or [None]:
            server = Server(model, args.handler, batchSize=1)
            server.environment["JAVA_TOOL_OPTIONS"] = f"-Xmx{serve.LEAST_HEAP}m"
            place = group(limit) if limit else None
            print(f"{limit} MB" if limit else "no limit", flush=True)
            try:
                measure(server, files, place)
            finally:
                server.remove()
                if place:
                    place.rmdir()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
