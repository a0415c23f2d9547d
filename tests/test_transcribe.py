"""The promises of transcribe.py: a row for each file, whatever the file is and whatever dies. Most need Ray."""

import contextlib
import json
import secrets
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SAMPLES, free_ports, run, transcripts, wait_until

try:
    import transcribe
except SystemExit:  # it says how Ray is installed, and ends
    transcribe = None

needs_ray = pytest.mark.skipif(transcribe is None, reason="needs requirements-bulk.txt")
JOB = {"model": "0", "format": "jsonl"}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for part in sorted(folder.glob("*.jsonl")) for line in part.read_text().splitlines()]


def command(model: Path, output: Path, *more: str | Path) -> list[str]:
    options = ["--model", model, "--output", output, "--actors", 2, *more]
    return [sys.executable, "transcribe.py", *map(str, options)]


@contextlib.contextmanager
def started(*arguments) -> subprocess.Popen:
    """The job, in a session of its own; nothing that it started outlives the test."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    children = {}
    try:
        yield process, lambda: children.update({each.pid: each for each in psutil.Process(process.pid).children(True)})
    finally:
        for each in children.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()
        process.wait()
        process.stdout.close()


def many(folder: Path, count: int) -> Path:
    """A folder with so many names of a file with 7 s of digits."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.mp3").symlink_to(SAMPLES / "zero-to-nine.mp3")
    return folder


def test_without_ray_it_says_how_to_install_it(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('No module named ray')")
    asked = run("transcribe.py", "sample_audio", "--output", tmp_path / "results", PYTHONPATH=str(tmp_path))
    assert asked.returncode == 1 and "pip install -r requirements-bulk.txt" in asked.stderr
    assert asked.stderr.count("\n") == 1


@needs_ray
def test_files_folders_patterns_and_manifests_give_a_row_for_each_file(tmp_path, digits_pt):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "notes.txt").write_text("no sound")
    manifest = tmp_path / "manifest"
    manifest.write_text(f'{SAMPLES}/pin.webm\n{{"audio_filepath": "empty.wav"}}\n\nlost.wav\n')
    paths = [SAMPLES / "three-digits.wav", SAMPLES / "*.[wm]*", SAMPLES, tmp_path / "notes.txt", "--manifest", manifest]
    for kind in ("jsonl", "parquet"):
        done = subprocess.run(command(digits_pt, tmp_path / kind, "--format", kind, *paths), cwd=ROOT)
        assert done.returncode == 0
    found = {row["file"]: row for row in rows(tmp_path / "jsonl")}
    assert len(found) == len(rows(tmp_path / "jsonl")) == len(list(SAMPLES.iterdir())) + 3
    for name, text in transcripts("digits").items():
        row = found[str(SAMPLES / name)]
        assert row["text"] == text and row["error"] is None
        assert [word["word"] for word in row["words"]] == text.split()
    errors = {Path(name).name: row["error"].split(":")[0] for name, row in found.items() if row["error"]}
    assert errors == {
        "empty.wav": "EmptyBody",
        "lost.wav": "FileNotFoundError",
        "notes.txt": "NotAudio",
        "transcripts.tsv": "NotAudio",
    }
    [part] = (tmp_path / "parquet").glob("part-*")
    table = {row["file"]: row for row in transcribe.pa.parquet.read_table(part).to_pylist()}
    assert table.keys() == found.keys()
    for file, row in found.items():
        assert {name: value for name, value in table[file].items() if value is not None} == {
            name: value for name, value in row.items() if value is not None
        }


@needs_ray
@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_without_losing_or_doubling_a_row(tmp_path, digits_pt):
    audio, output = many(tmp_path / "audio", 200), tmp_path / "results"
    with started(digits_pt, output, audio) as (process, remember):
        wait_until(lambda: len(list(output.glob("*.jsonl"))) and len(rows(output)) > 20, "some rows")
        remember()
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = (output / "part-00000.jsonl").read_bytes()
    assert 20 < before.count(b"\n") < 200
    with (output / "part-00000.jsonl").open("ab") as part:
        part.write(b'{"file": "/a line that was being wri')
    again = subprocess.run(command(digits_pt, output, audio), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"200 files, {before.count(bytes([10]))} of them have their row" in again.stdout
    assert (output / "part-00000.jsonl").read_bytes().startswith(before)
    assert Counter(row["file"] for row in rows(output)) == Counter(map(str, audio.iterdir()))
    assert {row["text"] for row in rows(output)} == {transcripts("digits")["zero-to-nine.mp3"]}


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_costs_no_row_and_doubles_none(tmp_path, digits_pt, monkeypatch):
    """Two nodes of a cluster on this machine, an actor on each."""
    audio, output = many(tmp_path / "audio", 300), tmp_path / "results"
    ray, [port] = Path(sys.executable).with_name("ray"), free_ports(1)
    # Ray's head listens on all addresses: whoever has not the token gets nothing.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    options = ["--num-cpus=1", "--object-store-memory=200000000", "--block"]
    options += ["--min-worker-port=0", "--max-worker-port=0"]
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.2", "--include-dashboard=false"]
    nodes = []
    try:
        for place in (head, [f"--address=127.0.0.2:{port}", "--node-ip-address=127.0.0.3"]):
            command = [ray, "start", *place, *options]
            nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            said = []
            while "--block" not in "".join(said):
                said.append(nodes[-1].stdout.readline())
                assert said[-1], "".join(said)
        address = ["--address", f"127.0.0.2:{port}"]
        with started(digits_pt, output, audio, *address) as (process, _):
            wait_until(lambda: len(list(output.glob("*.jsonl"))) and len(rows(output)) > 20, "some rows")
            for each in [*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]]:
                each.kill()
            said = process.communicate()[0].decode()
        assert process.returncode == 0, said
    finally:
        for node in nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*psutil.Process(node.pid).children(recursive=True), node]:
                    each.kill()
            node.wait()
    assert Counter(row["file"] for row in rows(output)) == Counter(map(str, audio.iterdir()))
    assert {row["error"] for row in rows(output)} == {None}


@needs_ray
def test_a_file_on_which_processes_die_is_a_row_with_its_error(tmp_path, capsys):
    results, tasks = transcribe.Results(tmp_path, JOB), []

    def dying(given: list[str]):
        """Like Ray: no row of a task with the file that nobody survives; what is handed over twice is one row."""
        tasks.append([json.loads(task) for task in given])
        for task in tasks[-1]:
            for file in task * 2 if "/deadly" not in task else []:
                yield {"file": file, "line": json.dumps({"file": file}), "failed": False, "seconds": 1.0}

    transcribe.transcribe({"/a": 1, "/deadly": 2, "/b": 3, "/long": 10**9}, results, dying)
    results.close()
    assert tasks == [[["/long"], ["/b", "/deadly", "/a"]], [["/b"], ["/deadly"], ["/a"]], [["/deadly"]]]
    assert sorted(row["file"] for row in rows(tmp_path)) == ["/a", "/b", "/deadly", "/long"]
    [deadly] = [row for row in rows(tmp_path) if row["file"] == "/deadly"]
    assert "died" in deadly["error"] and "4/4 files" in capsys.readouterr().out


@needs_ray
def test_a_folder_takes_one_job_and_one_process_at_a_time(tmp_path):
    results = transcribe.Results(tmp_path, JOB)
    with pytest.raises(ValueError, match=r"Another transcribe\.py writes"):
        transcribe.Results(tmp_path, JOB)
    results.add("/a", '{"file": "/a"}')
    results.lock.close()
    with pytest.raises(ValueError, match="results of another job"):
        transcribe.Results(tmp_path, JOB | {"model": "1"})
    assert transcribe.Results(tmp_path, JOB).done == {"/a"}


@needs_ray
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_full_part_ends_and_the_next_begins(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(transcribe, "PART_ROWS", 3)
    job = JOB | {"format": kind}
    for first in (0, 4):  # a job, and the same that goes on
        results = transcribe.Results(tmp_path, job)
        assert results.done == {str(number) for number in range(first)}
        for number in range(first, first + 4):
            results.add(str(number), json.dumps({"file": str(number)}))
        results.lock.close()
    results.close()
    assert len(list(tmp_path.glob(f"part-*.{kind}"))) == 3 and not list(tmp_path.glob("*.partial"))
    assert transcribe.Results(tmp_path, job).done == {str(number) for number in range(8)}


@needs_ray
def test_an_object_store_is_listed_and_read(monkeypatch):
    server = pytest.importorskip("moto.server", reason="needs deploy/requirements.txt")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    store = server.ThreadedMotoServer(port=0, ip_address="127.0.0.1")
    store.start()
    try:
        host, port = store.get_host_and_port()
        options = f"?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
        system, bucket = transcribe.file_system(f"s3://calls{options}")
        system.create_dir(bucket)
        for name in ("monday/a.webm", "monday/b.txt", "friday/c.webm"):
            with system.open_output_stream(f"calls/{name}") as stream:
                stream.write((SAMPLES / "pin.webm").read_bytes())
        listed = [address.split("?")[0] for address, _ in transcribe.listed(f"s3://calls/*.webm{options}")]
        assert sorted(listed) == ["s3://calls/friday/c.webm", "s3://calls/monday/a.webm"]
        assert len(list(transcribe.listed(f"s3://calls/monday{options}"))) == 2
        [(one, size)] = transcribe.listed(f"s3://calls/monday/a.webm{options}")
        assert size == (SAMPLES / "pin.webm").stat().st_size
        system, place = transcribe.file_system(one)
        assert system.open_input_file(place).read() == (SAMPLES / "pin.webm").read_bytes()
    finally:
        store.stop()
