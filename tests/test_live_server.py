"""Live speech through TorchServe: each sequence gets its own text, whatever happens to the others."""

import contextlib
import json
import os
import pty
import random
import re
import socket
import subprocess
import sys
import time
import uuid
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psutil
import pytest
import requests
from conftest import ROOT, SAMPLES, Server, transcripts, wait_until
from test_api import grpc_call
from test_hotwords import MISHEARD, SAID, spoken_clip
from test_live import ENCODINGS, cut, headers, pcm_of, spoken_as

from clients.live import UNANSWERED, LiveError, transcribe
from handler import decode_audio

IDLE = 60  # seconds after which a silent client is forgotten: none that only waits for a slow machine
SOON = 5  # where that is what a test is about
PLACES = 24  # of a process
PROCESSES = 2


@pytest.fixture(scope="module")
def live(digits_pt):
    """The server with both archives."""
    settings = {"max_idle_seconds": IDLE, "max_sequences": PLACES, "processes": PROCESSES}
    server = Server(digits_pt, live=settings, config=(ROOT / "cors.properties").read_text())
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def spoken(worker) -> dict[str, bytes]:
    """Text -> PCM of every sample."""
    sounds = transcripts("digits")
    return {text: pcm_of(decode_audio((SAMPLES / name).read_bytes())) for name, text in sounds.items()}


def base(server: Server) -> str:
    return server.url.removesuffix("/predictions/emformer_asr")


def the_worker(server: Server) -> psutil.Process:
    """The live model's, once it is ready."""

    def ready() -> psutil.Process | None:
        [model] = requests.get(server.management_url + "/models/emformer_asr_live", timeout=300).json()
        workers = [psutil.Process(each["pid"]) for each in model["workers"] if each["status"] == "READY"]
        return workers[0] if workers and workers[0].is_running() else None

    return wait_until(ready, "a live worker")


class Speaker:
    """One client of the live server."""

    def __init__(self, server: Server, name: str | None = None) -> None:
        self.url, self.name, self.session = server.live_url, name or uuid.uuid4().hex, requests.Session()

    def send(self, piece: int, pcm: bytes, last: bool = False, timeout: float = 300) -> requests.Response:
        chosen = headers(self.name, piece, last) | {"Content-Type": "application/octet-stream"}
        return self.session.post(self.url, pcm, headers=chosen, timeout=timeout)


def test_twenty_at_once_are_not_mixed_up_whatever_they_do(live, spoken):
    """Some repeat pieces, some leave one out, some stop and come back, some disappear; the others' text is right."""

    def speak(number: int) -> None:
        rng, speaker = random.Random(number), Speaker(live)
        text = rng.choice(sorted(spoken))
        pieces = cut(spoken[text], rng, longest=1.0)
        for piece, pcm in enumerate(pieces):
            last = piece == len(pieces) - 1
            time.sleep(rng.uniform(0, 0.05))
            if number % 4 == 1 and not last:  # the one after it, too early
                early = speaker.send(piece + 1, b"") if piece else None
                assert early is None or (early.status_code, early.json()["type"]) == (409, "MissingPiece")
            if number % 5 == 4 and piece == len(pieces) // 2:
                return disappear(pcm, piece)
            answers = [speaker.send(piece, pcm, last) for _ in range(1 if last else rng.randint(1, 3))]
            for answer in answers:
                assert answer.status_code == 200, answer.text
                assert answer.json() == answers[0].json()
            assert (answer.json()["sequence"], answer.json()["piece"]) == (speaker.name, piece)
            assert text.startswith(answer.json()["text"])
        assert (answer.json()["text"], answer.json()["final"]) == (text, True)
        assert " ".join(word["word"] for word in answer.json()["words"]) == text

    def disappear(pcm: bytes, piece: int) -> None:
        """Begin to send a piece, and hang up."""
        address = urlsplit(live.live_url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            lines = [f"POST {address.path} HTTP/1.1", "Host: here", f"Content-Length: {len(pcm) + 9}"]
            lines += [f"{name}: {value}" for name, value in headers(uuid.uuid4().hex, piece).items()]
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + pcm)

    with ThreadPoolExecutor(20) as pool:
        for done in [pool.submit(speak, number) for number in range(20)]:
            done.result()


def test_a_sequence_hears_the_phrases_that_its_first_piece_names(live):
    """And the one beside it, without any, does not."""
    half, texts = len(spoken_clip(MISHEARD)) // 4 * 2, []
    speakers, pieces = [Speaker(live), Speaker(live)], [spoken_clip(MISHEARD)[:half], spoken_clip(MISHEARD)[half:]]
    speakers[0].session.headers["x-hotwords"] = SAID
    with ThreadPoolExecutor(2) as pool:
        for number, pcm in enumerate(pieces):
            answers = pool.map(lambda speaker, n=number, pcm=pcm: speaker.send(n, pcm, last=n == 1), speakers)
            texts = [answer.json()["text"] for answer in answers]
    assert texts[0] == SAID != texts[1]


def test_the_last_piece_too_may_be_sent_again_one_after_the_other_or_at_once(live, spoken):
    [(text, pcm)] = [(text, pcm) for text, pcm in spoken.items() if text == "four seven two"]
    for _ in range(5):
        speaker = Speaker(live)
        assert speaker.send(0, pcm[:40_000]).status_code == 200
        with ThreadPoolExecutor(3) as pool:
            ends = list(pool.map(lambda name: Speaker(live, name).send(1, pcm[40_000:], last=True), [speaker.name] * 3))
        ends += [speaker.send(1, pcm[40_000:], last=True) for _ in range(2)]
        ends += [speaker.send(2, b"")]  # the client has it; the place is free
        assert [(end.status_code, end.json()["text"], end.json()["final"]) for end in ends] == 6 * [(200, text, True)]


def test_a_form_without_the_sound_is_refused(live):
    speaker = Speaker(live)
    answer = requests.post(speaker.url, files={"file": bytes(5120)}, headers=headers(speaker.name, 0), timeout=300)
    assert (answer.status_code, answer.json()["type"]) == (400, "NotPCM")


def test_one_that_hangs_up_before_its_answer_may_come_back(live, spoken):
    [(text, pcm)] = [(text, pcm) for text, pcm in spoken.items() if text == "four seven two"]
    speaker, address = Speaker(live), urlsplit(live.live_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        lines = [f"POST {address.path} HTTP/1.1", "Host: here", "Content-Length: 40000"]
        lines += ["Content-Type: application/octet-stream"]
        lines += [f"{name}: {value}" for name, value in headers(speaker.name, 0).items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + pcm[:40_000])
    assert speaker.send(0, pcm[:40_000]).status_code == 200
    assert speaker.send(1, pcm[40_000:], last=True).json()["text"] == text


def test_a_silent_client_is_forgotten_and_its_place_is_free(new_server, digits_pt):
    settings = {"max_idle_seconds": SOON, "max_sequences": PLACES}
    server = new_server(digits_pt, live=settings)
    server.start()
    silent = [Speaker(server) for _ in range(2 * PLACES)]
    with ThreadPoolExecutor(len(silent)) as pool:
        opened = list(pool.map(lambda speaker: speaker.send(0, bytes(5120)), silent))
    assert {answer.status_code for answer in opened} <= {200, 503}
    silent = [speaker for speaker, answer in zip(silent, opened, strict=True) if answer.status_code == 200]
    assert len(silent) >= PLACES
    time.sleep(2 * SOON)
    late = [speaker.send(1, bytes(5120)) for speaker in silent[:6]]
    assert {(answer.status_code, answer.json()["type"]) for answer in late} == {(410, "SequenceEnded")}
    assert Speaker(server).send(0, bytes(5120), last=True).status_code == 200


def test_when_all_places_are_taken_the_next_gets_503_and_those_inside_go_on(live, spoken):
    crowd = [Speaker(live) for _ in range(2 * PROCESSES * PLACES)]
    [(text, pcm)] = [(text, pcm) for text, pcm in spoken.items() if text == "four seven two"]
    with ThreadPoolExecutor(len(crowd)) as pool:
        opened = list(pool.map(lambda speaker: speaker.send(0, pcm[:20_000]), crowd))
        inside = [speaker for speaker, answer in zip(crowd, opened, strict=True) if answer.status_code == 200]
        assert 1 <= len(inside) <= PROCESSES * PLACES
        assert {answer.status_code for answer in opened} == {200, 503}
        ended = pool.map(lambda speaker: speaker.send(1, pcm[20_000:], last=True), inside)
        assert {answer.json()["text"] for answer in ended} == {text}
    assert Speaker(live).send(0, bytes(5120), last=True).status_code == 200  # at once: who has ended takes no place


def test_without_a_name_the_sequence_gets_one_that_the_answer_tells(live, spoken):
    [(text, pcm)] = [(text, pcm) for text, pcm in spoken.items() if text == "four seven two"]
    raw = {"Content-Type": "application/octet-stream", "x-piece": "0"}
    name = requests.post(live.live_url, pcm[:40_000], headers=raw, timeout=300).json()["sequence"]
    assert Speaker(live, name).send(1, pcm[40_000:], last=True).json()["text"] == text


@pytest.mark.parametrize("sent", [b"\xff" * 3, b"", b"{}", b"RIFF" + bytes(997)], ids=["3 bytes", "none", "2", "odd"])
def test_strange_bodies_are_answered(live, sent):
    for content in ("application/octet-stream", "text/plain", "application/json", "audio/wav"):
        speaker = Speaker(live)
        answer = requests.post(
            speaker.url, sent, headers=headers(speaker.name, 0) | {"Content-Type": content}, timeout=300
        )
        assert answer.status_code in (200, 400), answer.text
        assert answer.status_code == 200 or answer.json()["type"] in ("NotPCM", "BadRequestException")
        speaker.send(1, b"", last=True)  # or it would keep its place


@pytest.mark.parametrize("name", ["a b", "\x7f", "x" * 4000, "\N{LATIN SMALL LETTER E WITH ACUTE}".encode()])
def test_strange_names_are_refused_and_take_no_place(live, name):
    for _ in range(3):
        answer = requests.post(live.live_url, bytes(5120), headers=headers(name, 0), timeout=300)
        assert (answer.status_code, answer.json()["type"]) == (400, "NoSequence")
    assert Speaker(live).send(0, bytes(5120), last=True).status_code == 200


@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
def test_over_grpc_where_there_are_no_headers_the_answer_says_what_is_missing(live, method):
    for _ in range(3):
        [answer] = grpc_call(live, method, {"data": bytes(5120)}, "emformer_asr_live", timeout=60)
        assert json.loads(answer)["type"] == "NoSequence"
    assert Speaker(live).send(0, bytes(5120), last=True).status_code == 200


def test_a_worker_that_torchserve_loses_over_grpc_is_seen_by_the_health_check(new_server, digits_pt):
    """StreamPredictions2 fails in TorchServe itself, which then ends a worker for good, now and then."""
    server = new_server(digits_pt, live={})
    server.start()
    for _ in range(3):
        with contextlib.suppress(grpc.RpcError):
            grpc_call(server, "StreamPredictions2", {"data": bytes(5120)}, "emformer_asr_live", timeout=60)

    def served_or_told() -> bool:
        with contextlib.suppress(requests.Timeout):
            return Speaker(server).send(0, bytes(5120), last=True, timeout=20).status_code == 200
        return server.serve("health").returncode == 1

    wait_until(served_or_told, "an answer, or the health check to say that there is none")


@pytest.mark.parametrize(("encoding", "rate", "container", "codec"), ENCODINGS)
def test_every_format_of_the_page_is_heard(live, encoding, rate, container, codec):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs" / "live.md").read_text(), flags=re.M)
    wanted = container.replace("webm", "WebM").replace("ogg", "Ogg") if encoding == "opus" else str(rate)
    assert any(name == encoding and wanted in what.replace(" Hz", "") for name, what in rows), (encoding, wanted)
    _, sent = spoken_as(rate, container, codec)
    speaker, half = Speaker(live), len(sent) // 4 * 2
    told = {"x-encoding": encoding, "Content-Type": "application/octet-stream"}
    told |= {"x-sample-rate": str(rate)} if encoding == "pcm" else {}
    for piece, part in enumerate([sent[:half], sent[half:], b""]):
        answer = requests.post(speaker.url, part, headers=headers(speaker.name, piece, piece == 2) | told, timeout=300)
    assert answer.json()["text"] == "four seven two"


def test_a_wav_file_sent_as_pcm_is_refused(live):
    sound = (SAMPLES / "three-digits.wav").read_bytes()
    answer = Speaker(live).send(0, sound, last=True)
    assert (answer.status_code, answer.json()["type"]) == (400, "NotPCM")
    assert "x-encoding: opus" in answer.json()["message"]


def test_nothing_that_a_client_chose_is_in_the_logs(live):
    speaker, access = Speaker(live, f"name-{uuid.uuid4().hex}"), live.folder / "logs" / "access_log.log"
    lines = len(access.read_text().splitlines()) if access.exists() else 0
    speaker.send(0, bytes(5120))
    speaker.send(2, bytes(5120))
    assert speaker.send(1, bytes(5120), last=True).status_code == 200
    wait_until(lambda: len(access.read_text().splitlines()) >= lines + 3, "its lines in the log")
    for log in access.parent.iterdir():
        assert speaker.name not in log.read_text(errors="replace"), log


def test_the_client_prints_the_text(live):
    command = [sys.executable, ROOT / "clients" / "live.py", SAMPLES / "three-digits.wav"]
    said = subprocess.run([*command, "--server", base(live)], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "four seven two\n"), said.stderr


def test_the_client_names_phrases_that_are_expected(live, tmp_path):
    with wave.open(str(tmp_path / "said.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(spoken_clip(MISHEARD))
    command = [sys.executable, ROOT / "clients" / "live.py", tmp_path / "said.wav", "--server", base(live)]
    said = subprocess.run([*command, "--hotwords", f"{SAID}, oh oh: 1"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, f"{SAID}\n"), said.stderr
    said = subprocess.run([*command, "--hotwords", "\N{EURO SIGN}"], capture_output=True, text=True)
    assert said.returncode == 1 and "cannot write hotword 1" in said.stderr


def test_the_client_lets_the_text_grow_in_a_terminal(live):
    command = [sys.executable, ROOT / "clients" / "live.py", SAMPLES / "three-digits.wav"]
    terminal, inside = pty.openpty()
    with subprocess.Popen([*command, "--server", base(live)], stdout=inside) as client:
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(terminal, 1000):
                shown += part
    assert client.returncode == 0
    lines = [re.sub("\033\\[[0-9]*m", "", line) for line in shown.decode().split("\r\033[K")]
    grown = list(dict.fromkeys(lines))
    assert grown == ["", "four", "four seven", "four seven two", "four seven two\r\n"]


@pytest.fixture
def two_sentences(tmp_path, spoken) -> tuple[Path, list[str]]:
    """A WAV file of two samples with a pause between them, and their texts."""
    texts, path = ["four seven two", "seven three zero two"], tmp_path / "two.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(48_000).join(spoken[text] for text in texts))
    return path, texts


def test_the_client_writes_a_line_for_each_utterance_and_nothing_else(live, two_sentences):
    path, texts = two_sentences
    command = [sys.executable, ROOT / "clients" / "live.py", "--endpoints", path]
    said = subprocess.run(
        [*command, "--server", live.url.removesuffix("/predictions/emformer_asr")], capture_output=True, text=True
    )
    assert (said.returncode, said.stdout.splitlines(), said.stderr) == (0, texts, "")


def test_a_program_gets_each_utterance_as_soon_as_its_speaker_has_paused(live, two_sentences):
    path, texts = two_sentences
    sent = []

    def chunks() -> Iterator[bytes]:
        with wave.open(str(path)) as file:
            while chunk := file.readframes(3000):
                sent.append(chunk)
                yield chunk

    heard = []
    for text in transcribe(chunks(), server=live.url.removesuffix("/predictions/emformer_asr")):
        heard.append((text, sum(map(len, sent)) / 32_000))
    assert [text for text, _ in heard] == texts
    assert heard[0][1] < heard[1][1] - 1  # while the second was still to come
    with pytest.raises(LiveError, match="No server answers"):
        next(transcribe([bytes(3200)], server="http://127.0.0.1:9"))


def test_the_client_whose_worker_dies_begins_anew_and_loses_no_word(live):
    command = [sys.executable, ROOT / "clients" / "live.py", SAMPLES / "three-digits.wav", "--server", base(live)]
    terminal, inside = pty.openpty()
    with subprocess.Popen(command, stdout=inside) as client:
        os.close(inside)
        shown, worker = b"", the_worker(live)
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(terminal, 1000):
                shown += part
                if worker and b"four" in shown:
                    worker = worker.kill()
    assert client.returncode == 0 and worker is None
    assert shown.decode().split("\r\033[K")[-1] == "four seven two\r\n"


MICROPHONE = """
import os, signal, threading, time, wave
class RawInputStream:
    def __init__(self, rate, size, channels, dtype, callback):
        assert (rate, channels, dtype) == (16_000, 1, "int16")
        self.size, self.callback = size, callback
    def __enter__(self):
        threading.Thread(target=self.speak).start()
    def __exit__(self, *_):
        pass
    def speak(self):
        with wave.open(os.environ["SPEECH"]) as file:
            while piece := file.readframes(self.size):
                self.callback(bytearray(piece), self.size, None, None)
                time.sleep(0.02)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(3):
            self.callback(bytearray(2 * self.size), self.size, None, None)
            time.sleep(0.1)
"""


def test_the_client_hears_the_microphone_until_ctrl_c(live, tmp_path):
    """A module in place of the package sounddevice plays the sample, then presses Ctrl-C."""
    (tmp_path / "sounddevice.py").write_text(MICROPHONE)
    command = [
        sys.executable,
        ROOT / "clients" / "live.py",
        "--server",
        base(live),
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "SPEECH": str(SAMPLES / "three-digits.wav")}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (said.returncode, said.stdout) == (0, "four seven two\n"), said.stderr


def test_the_client_says_what_is_wrong(live, tmp_path):
    client = [sys.executable, ROOT / "clients" / "live.py"]
    for arguments, sentence in [
        ([SAMPLES / "three-digits.wav", "--server", "http://127.0.0.1:9"], "No server answers"),
        ([SAMPLES / "three-digits.wav", "--server", "127.0.0.1:9"], "No server answers"),
        ([ROOT / "README.md"], "it is not 16-bit mono PCM"),
        ([tmp_path / "nothing.wav"], "cannot be read"),
    ]:
        said = subprocess.run([*client, *arguments], capture_output=True, text=True)
        assert said.returncode == 1 and sentence in said.stderr and "Traceback" not in said.stderr


def test_only_the_page_s_origin_is_allowed_by_cors(live):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-piece"}
    for url in (live.live_url, live.url):
        answer = requests.options(url, headers=asked | {"Origin": "http://127.0.0.1:8000"}, timeout=300)
        assert answer.headers["Access-Control-Allow-Origin"] == "http://127.0.0.1:8000"
        assert "x-piece" in answer.headers["Access-Control-Allow-Headers"]
        other = requests.options(url, headers=asked | {"Origin": "https://elsewhere.example"}, timeout=300)
        assert other.headers["Access-Control-Allow-Origin"] == "http://127.0.0.1:8000"  # which a browser refuses


def test_open_sequences_are_counted(live):
    speakers = [Speaker(live) for _ in range(6)]
    for speaker in speakers:
        assert speaker.send(0, bytes(5120)).status_code == 200

    def counted() -> bool:
        metrics = requests.get(live.metrics_url, timeout=300).text
        open_now = re.findall(r"^asr_open_sequences\{.*\} (\S+)$", metrics, flags=re.M)
        return sum(map(float, open_now)) >= len(speakers)

    wait_until(counted, "six open sequences")
    for speaker in speakers:
        speaker.send(1, b"", last=True)


@pytest.mark.parametrize("what", ["worker", "process"])
def test_of_twenty_speakers_those_whose_worker_dies_are_told_so_and_begin_anew(live, spoken, what):
    """What the worker held gets 500 or 507, or, sent again, 409, as the next piece does, and all may begin at once.

    What TorchServe was just collecting for a worker that dies it loses, so that a client has to send it again.
    """
    [(text, pcm)] = [(text, pcm) for text, pcm in spoken.items() if text == "four seven two"]
    worker, victim, told, begun = the_worker(live), None, [], []

    def sent(speaker: Speaker, piece: int, part: bytes, last: bool) -> requests.Response:
        for patience in UNANSWERED:
            with contextlib.suppress(requests.ReadTimeout):
                return speaker.send(piece, part, last, timeout=patience)
        raise AssertionError("no answer, however often it was sent")

    def speak(number: int) -> str:
        for _ in range(100):
            speaker = Speaker(live)
            for piece, begin in enumerate(range(0, len(pcm), 5120)):
                answer = sent(speaker, piece, pcm[begin : begin + 5120], begin + 5120 >= len(pcm))
                if answer.status_code != 200:
                    told.append((answer.status_code, answer.json()["type"]))
                    break
                begun.append(number)
                time.sleep(0.1)
            else:
                if victim:  # it has heard all of it after the worker was lost
                    return answer.json()["text"]
        raise AssertionError("nobody was told that the worker is lost")

    with ThreadPoolExecutor(20) as pool:
        texts = [pool.submit(speak, number) for number in range(20)]
        wait_until(lambda: len(set(begun)) == 20, "all to speak")
        victim = worker
        if what == "process":
            victim = next(each for each in worker.children() if "spawn_main" in " ".join(each.cmdline()))
        victim.kill()
        assert {done.result() for done in texts} == {text}
    assert told and {status for status, _ in told} <= ({409, 500, 507} if what == "worker" else {409})
    assert live.serve("health").returncode == 0
