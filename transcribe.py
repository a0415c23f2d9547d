"""Transcribe many audio files with every core there is, on this machine or on a Ray cluster.

    python transcribe.py recordings/ 'more/**/*.flac' s3://bucket/calls --output results

Each actor of a Ray Data pool is one process with the handler of ``handler.py`` and one engine; files go to whoever is
free, the largest first. This process alone writes the results, a line a file. So a file has one row, whatever dies:
what has no row when the actors are done, or when the job starts again, is taken again. docs/bulk.md tells the rest.
"""

import argparse
import fcntl
import fnmatch
import glob
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__":  # read when Ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_worker_niceness", "0")  # as this process: `nice python transcribe.py` makes room
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not any(argument.startswith("--addr") for argument in sys.argv):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what starts here listens on loopback only
try:
    import pyarrow as pa
    import pyarrow.fs
    import pyarrow.parquet
    import ray
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"transcribe.py needs Ray Data ({error}). Install it: pip install -r requirements-bulk.txt")

ROOT = Path(__file__).resolve().parent
TASK_BYTES, TASK_FILES = 2_000_000, 16  # that an actor takes at once: a minute of PCM, or a few short files
MAX_BYTES = 4_000_000_000  # of a file: it is decoded in memory
MAX_BLOCKS = 4096  # in Ray's hands at once, of several tasks each where there are more
PART_ROWS = 10_000  # of one file of results
GROUP_BYTES = 2**23  # of JSON lines that become a group of rows in Parquet
MAGIC = re.compile(r"[*?[]")
ATTEMPTS = 3  # at a file whose process dies on it
CONTENT = "application/json;profile=verbose"
# A row, as Parquet has it; JSON lines have the same fields.
WORD = pa.struct([("word", pa.string()), *((name, pa.float64()) for name in ("start", "end", "probability"))])
SEGMENT = [("id", pa.int64()), ("seek", pa.int64()), ("start", pa.float64()), ("end", pa.float64())]
SEGMENT += [("text", pa.string()), ("tokens", pa.list_(pa.int64()))]
SEGMENT += [(name, pa.float64()) for name in ("temperature", "avg_logprob", "compression_ratio", "no_speech_prob")]
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("file", "text", "error", "task", "language", "model")),
        ("duration", pa.float64()),
        ("segments", pa.list_(pa.struct(SEGMENT))),
        ("words", pa.list_(WORD)),
        ("alternatives", pa.list_(pa.struct([("text", pa.string()), ("score", pa.float64())]))),
        ("notes", pa.list_(pa.string())),
    ]
)


# Which files


def file_system(address: str) -> tuple[pa.fs.FileSystem, str]:
    """The file system of an address (a path, or ``s3://``, ``gs://``, ...) and the path in it."""
    if "://" in address:
        return pa.fs.FileSystem.from_uri(address)
    return pa.fs.LocalFileSystem(), address


def listed(address: str) -> Iterator[tuple[str, int]]:
    """Address and bytes of the files that are meant: a file, those in a folder, or those that a pattern matches.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    remote = urlsplit(address) if "://" in address else None
    if not remote:
        address = os.path.abspath(os.path.expanduser(address))
        if not os.path.lexists(address) and glob.has_magic(address):
            for path in glob.iglob(address, recursive=True):
                if os.path.isfile(path):
                    yield path, os.path.getsize(path)
            return
    pattern = remote and MAGIC.search(remote.path) and f"{remote.netloc}{remote.path}"
    if pattern:
        folder = remote.path[: MAGIC.search(remote.path).start()].rpartition("/")[0]
        system, place = file_system(remote._replace(path=folder).geturl())
    else:
        system, place = file_system(address)
    info = system.get_file_info(place)
    if info.type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"There is no {address}.")
    if info.type == pa.fs.FileType.Directory:
        infos = system.get_file_info(pa.fs.FileSelector(place, recursive=True))
    else:
        infos = [info]
    for info in infos:
        hidden = any(part.startswith(".") for part in info.path[len(place) :].split("/"))
        if info.is_file and not hidden and (not pattern or fnmatch.fnmatchcase(info.path, pattern)):
            # A remote path begins with the bucket; what follows the question mark are the file system's options.
            where = f"{remote.scheme}://{info.path}{remote.query and '?' + remote.query}" if remote else info.path
            yield where, info.size


def named(manifest: str) -> Iterator[tuple[str, int]]:
    """Address and bytes of the files in a manifest: a path or address a line, or JSON with ``audio_filepath``.

    A path that is not absolute begins at the manifest's folder. Of a file that is not there the bytes are 0.
    """
    system, place = file_system(manifest)
    base = manifest.rpartition("/")[0]
    with system.open_input_stream(place) as stream:
        for line in stream.read().decode().splitlines():
            line = line.strip()
            if line.startswith("{"):
                line = json.loads(line)["audio_filepath"]
            if not line:
                continue
            address = line if "://" in line or line.startswith("/") else f"{base}/{line}" if base else line
            if "://" not in address:
                address = os.path.abspath(address)
            yield address, os.path.getsize(address) if os.path.isfile(address) else 0


def printable(address: str) -> str:
    """An address as a row has it: file names need not be UTF-8."""
    return os.fsencode(address).decode("utf-8", "backslashreplace")


def tasks_of(sizes: dict[str, int], alone: bool) -> list[str]:
    """JSON lists of addresses, each for an actor to take at once, the largest first; ``alone``: of one file each."""
    tasks, size = [], math.inf
    for address, length in sorted(sizes.items(), key=lambda item: -item[1]):
        if alone or size + length > TASK_BYTES or len(tasks[-1]) >= TASK_FILES:
            tasks.append([])
            size = 0
        tasks[-1].append(address)
        size += length
    return [json.dumps(task) for task in tasks]


# From files to rows


class Transcriber:
    """An actor: the handler, driven as TorchServe's worker does it, a file at a time."""

    def __init__(self, model: "ray.ObjectRef", settings: dict[str, int]) -> None:
        """``model`` refers to the bytes that export_model.py wrote, ``settings`` are the handler's."""
        from ts.context import Context

        from handler import ModelHandler

        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "emformer_rnnt.pt").write_bytes(ray.get(model))
            manifest = {"model": {"serializedFile": "emformer_rnnt.pt"}}
            config = {"handler": settings}
            self.context = Context("emformer_asr", folder, manifest, 1, None, "0", model_yaml_config=config)
            self.handler = ModelHandler()
            self.handler.initialize(self.context)

    def __call__(self, batch: dict) -> dict[str, list]:
        rows = [self.row(address) for task in batch["task"] for address in json.loads(task)]
        return {
            "file": [row["file"] for row in rows],
            "line": [json.dumps(row, ensure_ascii=False) for row in rows],
            "failed": [row["error"] is not None for row in rows],
            "seconds": [row.get("duration", 0.0) for row in rows],
        }

    def row(self, address: str) -> dict:
        """What became of a file, as a line of the results says it."""
        from ts.context import RequestProcessor

        failed = {"file": printable(address), "text": None}
        try:
            system, place = file_system(address)
            with system.open_input_file(place) as stream:
                if stream.size() > MAX_BYTES:
                    return failed | {"error": f"TooLarge: The file has more than {MAX_BYTES} bytes: compress it."}
                audio = stream.read()
            self.context.request_processor = [RequestProcessor({"accept": CONTENT})]
            [answer] = self.handler.handle([{"body": audio}], self.context)
        except Exception as error:
            return failed | {"error": f"{type(error).__name__}: {error}"}
        if self.context.get_response_status(0)[0] != 200:
            return failed | {"error": f"{answer['type']}: {answer['message']}"}
        return {"file": printable(address), "text": answer["text"], "error": None} | answer


# From rows to files


class Results:
    """The folder of results: the only writer of its rows, which knows those of earlier runs."""

    def __init__(self, folder: Path, job: dict) -> None:
        """Open the folder for a job, whose description has to be that of the earlier runs.

        Raises:
            ValueError: the folder has the results of another job, or another process writes to it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.part, self.rows, self.parquet = folder, None, 0, job["format"] == "parquet"
        self.lock = (folder / "job.json").open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another transcribe.py writes to {folder}.") from None
        self.lock.seek(0)
        earlier = self.lock.read()
        if earlier and json.loads(earlier) != job:
            raise ValueError(f"{folder} has results of another job, {earlier}, not {json.dumps(job)}: name another.")
        if not earlier:
            self.lock.write(json.dumps(job))
            self.lock.flush()
        self.done = set(self._recover())

    def _recover(self) -> Iterator[str]:
        """The files that have a row; a line that was being written when the job was killed is taken away."""
        for whole in self.folder.glob("part-*.parquet"):
            whole.with_suffix(".jsonl").unlink(missing_ok=True)  # killed between the two
            yield from pa.parquet.read_table(whole, columns=["file"])["file"].to_pylist()
        for part in sorted(self.folder.glob("part-*.jsonl")):
            end = rows = 0
            with part.open("rb+") as lines:
                for line in lines:
                    if line.endswith(b"\n"):
                        end, rows = end + len(line), rows + 1
                        yield json.loads(line)["file"]
                lines.truncate(end)
            if rows < PART_ROWS:
                self.part, self.rows = part.open("a", encoding="utf-8"), rows
            else:
                self._finish(part)

    def add(self, file: str, line: str) -> None:
        """Write a file's row, so that it is there whatever happens to this process."""
        if self.part is None:
            number = 1 + max((int(path.stem[5:]) for path in self.folder.glob("part-*.*")), default=-1)
            self.part, self.rows = (self.folder / f"part-{number:05}.jsonl").open("w", encoding="utf-8"), 0
        self.part.write(line + "\n")
        self.part.flush()
        self.done.add(file)
        self.rows += 1
        if self.rows == PART_ROWS:
            self.close()

    def close(self) -> None:
        """End the part that is being written; in Parquet, if that was asked for."""
        if self.part is not None:
            self.part.close()
            self._finish(Path(self.part.name))
            self.part = None

    def _finish(self, part: Path) -> None:
        if not self.parquet:
            return
        partial = part.with_suffix(".parquet.partial")
        with part.open("rb") as lines, pa.parquet.ParquetWriter(partial, SCHEMA) as writer:
            while some := lines.readlines(GROUP_BYTES):
                writer.write_table(pa.Table.from_pylist([json.loads(line) for line in some], schema=SCHEMA))
        partial.rename(part.with_suffix(".parquet"))
        part.unlink()


# The job


def start(args: argparse.Namespace) -> int:
    """Start Ray on this machine's loopback address, or join a cluster; returns the number of actors."""
    options = {"address": args.address}
    if not args.address:
        cores = args.actors or len(os.sched_getaffinity(0))
        options = {"address": "local", "num_cpus": cores, "include_dashboard": False, "object_store_memory": 2**30}
    code = {"py_modules": [str(ROOT / "handler.py")]}
    ray.init(runtime_env=code, logging_level="ERROR", log_to_driver=False, **options)
    logging.disable(logging.ERROR)  # Ray Data's; its log is in the session's folder, too
    warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)  # of ray_remote_args_fn, below
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # the rows of a task are handed over when it is done
    context.max_errored_blocks = -1  # of tasks whose actor died: their files get no row, and are taken again
    return args.actors or max(int(ray.cluster_resources()["CPU"]), 1)


def rows_of(tasks: list[str], actors: int, model: "ray.ObjectRef", settings: dict[str, int]) -> Iterator[dict]:
    """What ``Transcriber`` makes of ``tasks``, as it comes; nothing of those whose actor dies."""
    blocks = min(len(tasks), MAX_BLOCKS)
    pool = ray.data.ActorPoolStrategy(size=min(actors, blocks), max_tasks_in_flight_per_actor=2)
    dataset = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=blocks).map_batches(
        Transcriber,
        fn_constructor_args=(model, settings),
        batch_size=1,
        compute=pool,
        num_cpus=1,
        # An actor that dies starts again, elsewhere if need be; what it was at waits until all else is done.
        ray_remote_args_fn=lambda: {"scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": 0},
    )
    none = True
    try:
        for row in dataset.iter_rows():
            none = False
            yield row
    except ray.exceptions.RayError as error:
        if none:  # not a node that died with rows in its hands: the actors do not even start
            sys.exit(f"The model cannot be loaded: {str(error).strip().splitlines()[-1]}")


def transcribe(sizes: dict[str, int], results: Results, run: Callable[[list[str]], Iterator[dict]]) -> None:
    """Write a row for each of the files in ``sizes`` (address: bytes); ``run`` makes rows of tasks."""
    started, hours, errors, count, state = time.monotonic(), 0.0, 0, 0, ""
    known = {printable(address): address for address in sizes}
    interval = 1 if sys.stderr.isatty() else 30
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, mininterval=interval) as bar:

        def add(file: str, line: str, failed: bool, seconds: float) -> None:
            nonlocal hours, errors, count, state
            results.add(file, line)
            hours, errors, count = hours + seconds / 3600, errors + failed, count + 1
            speed = hours * 3600 / (time.monotonic() - started)
            state = f"{count}/{len(sizes)} files, {hours:.2f} h of audio, {speed:.0f} x real time, {errors} errors"
            bar.set_postfix_str(state, refresh=False)
            bar.update(sizes[known[file]])

        for attempt in range(ATTEMPTS):
            left = {known[file]: sizes[known[file]] for file in known if file not in results.done}
            for row in run(tasks_of(left, alone=attempt > 0)) if left else ():
                if row["file"] not in results.done:
                    add(**row)
        for file in known.keys() - results.done:
            error = f"The process that transcribed it died, {ATTEMPTS} times: it may need more memory than there is."
            add(file, json.dumps({"file": file, "text": None, "error": error}, ensure_ascii=False), True, 0.0)
    print(f"{state}, in {time.monotonic() - started:.1f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Transcribe many audio files, with every core there is.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a file, folder, glob, or address: s3://, gs://, ...")
    parser.add_argument("--manifest", action="append", default=[], metavar="FILE", help="names a file a line")
    parser.add_argument("--output", type=Path, required=True, help="folder; a job that was killed goes on in it")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "emformer_rnnt.pt", help="of export_model.py")
    parser.add_argument("--beam-width", type=int, default=1)
    parser.add_argument("--max-audio-seconds", type=int, default=12 * 3600, help="of a file; by default 12 hours")
    parser.add_argument("--actors", type=int, help="processes, each with a core; by default as many as cores")
    parser.add_argument("--address", help="of a Ray cluster to join; without it Ray starts on this machine")
    args = parser.parse_args()
    if not args.paths and not args.manifest:
        parser.error("name a PATH or a --manifest")
    if args.actors is not None and args.actors < 1:
        parser.error("--actors is a number from 1")
    return args


def main() -> None:
    args = arguments()
    if not args.model.is_file():
        sys.exit(f"There is no model file {args.model}. Write it: python export_model.py --output {args.model}")
    model = args.model.read_bytes()
    settings = {"beam_width": args.beam_width, "max_audio_seconds": args.max_audio_seconds}
    job = {"model": hashlib.sha256(model).hexdigest(), **settings, "format": args.format}
    try:
        sizes = {file: size for path in args.paths for file, size in listed(path)}
        sizes |= {file: size for manifest in args.manifest for file, size in named(manifest)}
        results = Results(args.output, job)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(str(error))
    if not sizes:
        sys.exit("There is no file in what was named.")
    total = len(sizes)
    sizes = {file: size for file, size in sizes.items() if printable(file) not in results.done}
    print(f"{total} files, {total - len(sizes)} of them have their row in {args.output} already.", flush=True)
    if sizes:
        settings["max_engine_seconds"] = args.max_audio_seconds  # nobody waits behind it
        actors, model = start(args), ray.put(model)
        transcribe(sizes, results, lambda tasks: rows_of(tasks, actors, model, settings))
    results.close()


if __name__ == "__main__":
    main()
