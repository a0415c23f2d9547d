"""The commands of the pages and of the Dockerfile do what stands there, all of them, in order; links lead somewhere."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ROOT, SAMPLES, post, wait_until

import serve

TIMEOUT = 900
# In the order in which their commands are run: docs/live.md goes on with the server that README.md has started last,
# the other pages of docs/ share one, and the commands of SECURITY.md change the configuration.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md"), key=lambda page: (page.name != "live.md", page.name)),
    ROOT / "SECURITY.md",
    ROOT / "deploy" / "README.md",
]
CARDS = [ROOT / "models" / "digits" / "README.md", ROOT / "training" / "README.md"]  # their links are checked, too
# What no test can run: it does not end, takes long, or needs a microphone, a screen, a download, recordings or Docker;
# what test_transcribe.py and test_deploy.py run. All else is in blocks that are run.
NOT_RUN = [
    "$ make check",
    "$ make test",
    "$ .venv/bin/pip install -r benchmarks/requirements.txt",
    "$ .venv/bin/python benchmarks/engine.py speed",
    "$ .venv/bin/python clients/live.py",
    "$ .venv/bin/python -m http.server 8000 --bind 127.0.0.1 --directory clients",
    "$ xdg-open http://127.0.0.1:8000/live.html",
    "$ .venv/bin/python training/evaluate.py --data FOLDER...",
    "$ .venv/bin/pip install -r requirements-bulk.txt",
    "$ .venv/bin/python transcribe.py sample_audio --output results",
    "$ make run-proxy",
    "$ export no_proxy=localhost,127.0.0.1,::1",
    "$ make run MODEL=librispeech",
    '$ docker build -t emformer-asr --build-arg INDEX_URL="$PYTORCH_CPU_WHEELS" .',
    "$ docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8080:8080 emformer-asr",
    "$ bash deploy/image.sh",
    "$ kubectl kustomize --load-restrictor LoadRestrictionsNone deploy/kubernetes/overlays/digits | kubectl apply -f -",
    "$ prometheus --config.file=deploy/monitoring/prometheus.yml --web.listen-address=127.0.0.1:9090",
    "$ promtool test rules deploy/monitoring/rules-test.yml",
    "$ .venv/bin/python deploy/monitoring/dashboard.py > deploy/monitoring/dashboard.json",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MARK = "=== block"


def text_of_pages() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind in all pages."""
    return [content for found, content in FENCE.findall(text_of_pages()) if found == kind]


def promises() -> list[tuple[str, str]]:
    """Each shell block, with the output that stands right behind it, if any does."""
    shell = re.compile(r"^```sh\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", flags=re.M | re.S)
    return shell.findall(text_of_pages())


def alike(line: str) -> str:
    """A line without what differs from run to run: hashes, a model file's size, numbers of processes."""
    return re.sub(r"\b[0-9a-f]{64}\b|[\d,]+(?= bytes$)|(?<=process )\d+", "#", line).strip()


@pytest.fixture
def copy(tmp_path, new_server, digits_pt):
    """The repository as somebody cloned it, with a space in its path, with ports that are free."""
    folder = tmp_path / "emformer asr"
    left_out = (".git", ".venv", "build", "logs", "model_store", "*.pt", "data", "engines", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    shutil.copytree(ROOT / "models", folder / "models", dirs_exist_ok=True)  # its weights are a .pt
    (folder / ".venv").symlink_to(sys.prefix)
    server = new_server(digits_pt)  # its configuration has free ports, its folder is for temporary files
    ports = [str(port) for _, port in serve.ports(serve.read_config(server.config))]
    (folder / "config.properties").write_text(server.config.read_text())
    shims = tmp_path / "bin"
    shims.mkdir()
    (shims / "python3").write_text("#!/bin/sh\n# the virtual environment is there\n")
    (shims / "useradd").write_text("#!/bin/sh\n")
    for shim in shims.iterdir():
        shim.chmod(0o755)
    environment = os.environ | server.environment
    environment |= {"PATH": f"{shims}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("JAVA_HOME", None)
    yield folder, dict(zip(("8080", "8081", "8082", "7070", "7071"), ports, strict=True)), environment, server
    for process in psutil.process_iter():  # what the pages have started and not stopped
        with contextlib.suppress(OSError, psutil.Error):
            if serve.MODEL_SERVER in process.cmdline() and Path(process.cwd()).is_relative_to(tmp_path):
                family = [process, *process.children(recursive=True)]
                process.terminate()
                for left in psutil.wait_procs(family, timeout=60)[1]:
                    left.kill()


def with_ports(text: str, ports: dict[str, str]) -> str:
    return re.sub(r"(?<=:)(8080|8081|8082|7070|7071)\b", lambda found: ports[found[0]], text)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.M)
    texts = [LINK.sub(lambda link: link[0][link[0].index("[") + 1 : link[0].index("]")], each) for each in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES + CARDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT.resolve()) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_commands_that_are_not_run_are_known():
    assert "".join(blocks("console")).splitlines() == NOT_RUN


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("curl")), reason="needs make and curl")
def test_every_command_runs_and_prints_what_stands_behind_it(copy):
    folder, ports, environment, _ = copy
    script = "set -e\n"
    for number, (commands, _) in enumerate(promises()):
        commands = commands.replace("make test", ": # this is what runs here")
        script += f"echo; echo '{MARK} {number}'\n{with_ports(commands, ports)}"
    output = folder.parent / "output"
    with output.open("w") as file:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        ended = shell.wait(timeout=TIMEOUT)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    said = output.read_text()
    assert ended == 0, said[-3000:]
    shown = re.split(rf"^{MARK} \d+$", said, flags=re.M)[1:]
    elsewhere = ("Creating .venv", "Installing requirements.txt", "...")  # said on a new machine; left out
    for (commands, expected), printed in zip(promises(), shown, strict=True):
        lines = {alike(line) for line in printed.splitlines()}
        for line in with_ports(expected, ports).splitlines():
            assert line.startswith(elsewhere) or alike(line) in lines, (commands, line, printed)


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of the Dockerfile's lines."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r" *\\\n *", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def test_the_dockerfiles_steps_make_a_server_that_is_healthy_and_answers(copy, tmp_path):
    repository, ports, environment, server = copy
    stages = []
    venv = tmp_path / "venv"
    venv.symlink_to(sys.prefix)

    def here(text: str) -> str:
        return text.replace("/opt/venv/java", str(tmp_path / "java")).replace("/opt/venv", str(venv))

    settings = {}
    for name, arguments in instructions():
        if name == "FROM":
            stages.append(tmp_path / f"stage{len(stages)}")
            stages[-1].mkdir()
        elif name == "COPY":
            *sources, target = arguments.removeprefix("--from=build ").split()
            root = stages[0] if "--from=build" in arguments else repository
            for source in sources:
                if source.startswith("/opt/venv"):
                    continue
                source = root / source.removeprefix("/srv/emformer-asr/")
                goal = stages[-1] / target / ("" if source.is_dir() else source.name)
                shutil.copytree(source, goal) if source.is_dir() else shutil.copy2(source, goal)
        elif name == "RUN" and "-m venv" not in arguments:
            subprocess.run(["sh", "-ec", here(arguments)], check=True, cwd=stages[-1], env=environment)
        elif name == "ENV":
            settings |= dict(each.split("=", 1) for each in here(arguments).split())
    settings["PATH"] = settings["PATH"].replace("$PATH", environment["PATH"])
    config = stages[-1] / "config.properties"
    inference = serve.read_config(config)["inference_address"]
    assert inference == f"http://0.0.0.0:{ports['8080']}"
    assert serve.read_config(config)["management_address"] == f"http://127.0.0.1:{ports['8081']}"
    config.write_text(config.read_text().replace("0.0.0.0", "127.0.0.1"))  # a test stays on loopback
    server.config = config
    command, health = (
        [here(part) for part in json.loads(arguments.split("CMD ")[-1])]
        for name, arguments in reversed(instructions())
        if name in ("CMD", "HEALTHCHECK")
    )
    health = [with_ports(part, ports) for part in health]
    with (tmp_path / "container").open("w") as output:
        running = subprocess.Popen(
            command,
            executable=BIN / command[0],
            cwd=stages[-1],
            env=environment | settings,
            stdout=output,
            # As in a container; tests that a shell runs in the background inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        server.worker()
        healthy = partial(subprocess.run, health, executable=sys.executable, cwd=stages[-1], timeout=300)
        wait_until(lambda: healthy().returncode == 0, "its health check to pass")
        assert post(server, SAMPLES / "three-digits.wav").text == "four seven two"
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(timeout=300)
    log = (tmp_path / "container").read_text()
    assert "WORKER_MODEL_LOADED" in log and "/predictions/emformer_asr HTTP/1.1" in log
