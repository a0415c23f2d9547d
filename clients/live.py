"""Speak to the server and watch the text grow, or let it hear a file at the speed of speech.

    python clients/live.py speech.wav    # 16-bit mono PCM
    python clients/live.py               # the microphone, until Ctrl-C; needs the package sounddevice

What may still change is in grey.
"""

import argparse
import queue
import shutil
import signal
import sys
import time
import uuid
import wave
from collections.abc import Iterator
from urllib.parse import urlsplit

import requests

PIECE = 0.16  # seconds
# Seconds for an answer: a piece that comes while the server replaces its worker waits for the new one.
PATIENCE = 300
# The server does not know the sequence any more, because its worker died or the client was silent for too long.
LOST = {409, 410, 500, 507}
MOST_LOST = 3  # one after the other, without an answer
AGAIN = 5  # seconds, at most, that are heard again after a loss: since the last word came
GREY, PLAIN, ERASE = "\033[90m", "\033[0m", "\r\033[K"


def file_pieces(path: str) -> Iterator[tuple[int, bytes]]:
    """(rate in Hz, PCM) of each piece of a WAV file, when it would have been spoken."""
    try:
        file = wave.open(path, "rb")  # noqa: SIM115 (read until the program ends)
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise wave.Error
    except (OSError, wave.Error, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is not 16-bit mono PCM in a WAV file"
        sys.exit(f"{path} cannot be read: {reason}.")
    begun, spoken, rate = time.monotonic(), 0.0, file.getframerate()
    while piece := file.readframes(int(PIECE * rate)):
        spoken += len(piece) / 2 / rate
        time.sleep(max(begun + spoken - time.monotonic(), 0))
        yield rate, piece


def microphone_pieces(rate: int = 16_000) -> Iterator[tuple[int, bytes]]:
    """(rate in Hz, PCM) of what the microphone has heard since the piece before."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: without PortAudio
        sys.exit(f"The microphone needs sounddevice ({error}): pip install sounddevice, or name a WAV file.")
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    options = {"channels": 1, "dtype": "int16", "callback": lambda data, *_: heard.put(bytes(data))}
    with sounddevice.RawInputStream(rate, int(PIECE * rate), **options):
        while True:
            piece = heard.get()
            while not heard.empty():
                piece += heard.get()
            yield rate, piece


class LostError(Exception):
    """The server has lost the sequence: begin another one."""


def send(session: requests.Session, url: str, headers: dict[str, str], pcm: bytes) -> dict:
    """One piece; sent again if the connection breaks: it does not count twice.

    Raises:
        LostError: see there.
        SystemExit: the server refuses the piece, or does not answer.
    """
    for pause in (0.2, 0.5, 1.0, None):
        try:
            response = session.post(url, pcm, headers=headers, timeout=PATIENCE)
            if response.ok:
                return response.json()
            message = response.json()["message"] if response.content else response.reason
            message = f"The server says {response.status_code}: {message}"
            if response.status_code in LOST:
                raise LostError(message)
            sys.exit(f"\n{message}")
        except requests.RequestException as error:
            if pause is None or not isinstance(error, requests.ConnectionError):
                break
            time.sleep(pause)
    sys.exit(f"\nNo server answers at {url}: start it with make run-live.")


class Speech:
    """Speech that is sent piece by piece: one sequence, and another one whenever the server has lost it.

    Attributes:
        kept (str): the text of sequences that were lost, which does not change any more.
        recent (bytes): PCM since the last word came, which a lost sequence has heard in vain.
    """

    def __init__(self, session: requests.Session, url: str, headers: dict[str, str]) -> None:
        self.session, self.url, self.headers = session, url, headers
        self.kept = self.text = ""
        self.recent = b""
        self.begin()

    def begin(self) -> None:
        self.kept, self.text, self.number = f"{self.kept} {self.text}".strip(), "", 0
        self.name = uuid.uuid4().hex

    def hear(self, rate: int, pcm: bytes, last: bool = False) -> dict:
        """The answer to a piece; its ``text`` begins with what was kept.

        Raises:
            SystemExit: as ``send``; or the server has lost ``MOST_LOST`` sequences without an answer.
        """
        for left in reversed(range(MOST_LOST)):
            headers = {"ts_request_sequence_id": self.name, "x-piece": str(self.number)}
            headers |= {"x-last-piece": str(last).lower(), "x-sample-rate": str(rate)}
            try:
                answer = send(self.session, self.url, self.headers | headers, pcm)
                break
            except LostError as error:
                if not left:
                    sys.exit(f"\n{error}")
                self.begin()
                pcm, self.recent = self.recent + pcm, b""
        self.recent = (self.recent + pcm)[-2 * AGAIN * rate :] if self.text == answer["text"] else b""
        self.number, self.text = self.number + 1, answer["text"]
        kept = f"{self.kept} " if self.kept else ""
        return answer | {"text": (kept + self.text).rstrip(), "stable": len(kept) + answer["stable"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a WAV file, 16-bit mono PCM; without it the microphone")
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--token", help="TorchServe's for inference, where it asks for one")
    args = parser.parse_args()
    url, session, rate, stopped = f"{args.server}/predictions/emformer_asr_live", requests.Session(), 16_000, []
    host = urlsplit(args.server).hostname or ""
    session.trust_env = host not in ("localhost", "::1") and not host.startswith("127.")  # no proxy to this machine
    common = {"Content-Type": "application/octet-stream"}
    common |= {"Authorization": f"Bearer {args.token}"} if args.token else {}
    # Ctrl-C ends the sound, and a second one the program.
    signal.signal(signal.SIGINT, lambda *_: stopped.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
    speech = Speech(session, url, common)
    for rate, pcm in file_pieces(args.file) if args.file else microphone_pieces():
        answer = speech.hear(rate, pcm)
        if sys.stdout.isatty():
            text, stable = answer["text"], answer["stable"]
            first = max(len(text) - shutil.get_terminal_size().columns + 1, 0)  # what a line holds of it
            print(f"{ERASE}{text[first:stable]}{GREY}{text[max(first, stable) :]}{PLAIN}", end="", flush=True)
        if stopped:
            break
    answer = speech.hear(rate, b"", last=True)
    print(f"{ERASE if sys.stdout.isatty() else ''}{answer['text']}", flush=True)


if __name__ == "__main__":
    main()
