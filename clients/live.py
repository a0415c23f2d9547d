"""Speak to the server and watch the text grow, or let it hear a file at the speed of speech.

    python clients/live.py speech.wav                # 16-bit mono PCM
    python clients/live.py                           # the microphone, until Ctrl-C; needs the package sounddevice
    python clients/live.py --endpoints speech.wav    # a line an utterance, as soon as its speaker has paused

What may still change is in grey. In a program, with chunks of 16-bit mono PCM from anywhere:

    from live import transcribe
    for text in transcribe(chunks):
        print(text)
"""

import argparse
import queue
import shutil
import signal
import sys
import time
import uuid
import wave
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

import requests

SERVER = "http://127.0.0.1:8080"
PIECE = 0.16  # seconds
LONGEST = 20  # seconds in a request; the server takes 30
AGAIN = 60  # seconds of one utterance, at most, that are sent again after a loss
# Seconds until a piece without an answer is sent again, then until the next time: the network may have lost it, or
# TorchServe with its worker. The first time comes before the server forgets a sequence that it takes for silent (10 s);
# later ones leave it time to replace its worker.
UNANSWERED = (8, 30, 240)
# The server does not know the sequence any more, because its worker died or the client was silent for too long.
LOST = {409, 410, 500, 507}
MOST_LOST = 3  # before all of what is sent has been answered
BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)  # before or in an answer
BUSY = 503  # all places are taken, or too many pieces wait: that passes, after a loss within seconds
PAUSES = (0.2, 0.5, 1.0)  # seconds between the tries of a piece
MORE_PAUSES = (2.0, 4.0, 8.0)  # the same, where the server has answered before
GREY, PLAIN, ERASE = "\033[90m", "\033[0m", "\r\033[K"


class LiveError(Exception):
    """No text will come any more; the message is a sentence that says why."""


class LostError(LiveError):
    """The server has lost the sequence."""


class Speech:
    """Sound that is sent piece by piece, and the text of it.

    It is one sequence, and another one whenever the server has lost it. That one begins with the sound of the utterance
    that goes on. Of one longer than ``AGAIN``, as there may be without endpoints, the text stays instead, and what was
    heard since the last word came is sent again. Times count from the beginning of the sound all the same.

    Args:
        rate: Hz, of the sound.
        server: where TorchServe is, without a path.
        token: TorchServe's for inference, where it asks for one.
        endpoints: whether the server tells utterances apart; or the rules' milliseconds, like ``2400,800,20000``.
        words: whether every answer has the words with their times, not the last alone.
        hotwords: phrases that are expected, as docs/hotwords.md has them: ``four seven two, nine one one: 2``.
    """

    def __init__(
        self,
        rate: int = 16_000,
        server: str = SERVER,
        token: str | None = None,
        endpoints: bool | str = False,
        words: bool = False,
        hotwords: str = "",
    ) -> None:
        self.url, self.session, self.rate = f"{server}/predictions/emformer_asr_live", requests.Session(), rate
        host = urlsplit(server).hostname or ""
        self.session.trust_env = host not in ("localhost", "::1") and not host.startswith("127.")  # no proxy to here
        self.headers = {"Content-Type": "application/octet-stream"}
        self.headers |= {"x-sample-rate": str(rate), "x-endpoints": str(endpoints), "x-words": str(words)}
        self.headers |= {"Authorization": f"Bearer {token}"} if token else {}
        expected = ",".join(hotwords.splitlines()).strip().encode()  # or requests takes some letters, not all
        self.expected = {"x-hotwords": expected} if expected else {}  # with a sequence's first piece
        self.kept = self.text = ""  # of an utterance that is too long: before the sequence, and from it
        self.recent, self.whole = b"", True  # what is to be sent again, and whether it is all of the utterance
        self.new = b""  # what has come since the text has changed
        self.pauses = PAUSES
        self.begun = self.sent = 0  # samples before the sequence, and in it
        self._begin()

    def send(self, pcm: bytes, last: bool = False) -> dict:
        """The answer to the next piece, as docs/live.md has it, also if that has to be sent to another sequence.

        The piece is sent again if the connection breaks, or the server is busy or silent: it does not count twice.

        Args:
            pcm: 16-bit little-endian mono samples.
            last: whether no other will come.

        Raises:
            LiveError: the server refuses the piece, or does not answer, or has lost ``MOST_LOST`` sequences.
        """
        size, utterances, lost, answer = 2 * LONGEST * self.rate, [], 0, None
        while pcm or answer is None:
            try:
                answer = self._posted(pcm[:size], last and len(pcm) <= size)
            except LostError:
                lost += 1
                if lost == MOST_LOST:
                    raise
                pcm, answer = self.recent + pcm, None
                self._begin()
                continue
            self._keep(pcm[:size], answer)
            utterances += answer.get("utterances", [])
            pcm = pcm[size:]
        return answer | {"utterances": utterances} if "utterances" in answer else answer

    def _begin(self) -> None:
        self.kept = self.kept if self.whole else f"{self.kept} {self.text}".strip()
        self.begun += self.sent - len(self.recent) // 2  # which is sent again
        self.text, self.piece, self.sent, self.whole = "", 0, 0, True
        self.recent = self.new = b""
        self.headers["ts_request_sequence_id"] = uuid.uuid4().hex

    def _keep(self, pcm: bytes, answer: dict) -> None:
        """Keep what a loss would take away, and put what was kept over the last one into the answer."""
        again, changed, utterances = self.recent + pcm, answer["text"] != self.text, answer.get("utterances", [])
        self.piece, self.text = self.piece + 1, answer["text"]
        for utterance in utterances:
            utterance["text"], self.kept, self.whole = f"{self.kept} {utterance['text']}".strip(), "", True
        self.sent += len(pcm) // 2
        if "finished" in answer:
            needed = 2 * (self.sent - round(answer["finished"] * self.rate))
            self.whole = self.whole and needed <= len(again)
            again = again[max(len(again) - needed, 0) :]
        self.whole = self.whole and len(again) <= 2 * AGAIN * self.rate
        self.new = b"" if changed else (self.new + pcm)[-2 * LONGEST * self.rate :]
        self.recent = again if self.whole else self.new
        for each in (*answer["words"], *utterances, *(word for one in utterances for word in one["words"])):
            each |= {name: round(each[name] + self.begun / self.rate, 3) for name in ("start", "end")}
        if "finished" in answer:
            answer["finished"] += self.begun / self.rate
        if self.kept:
            answer["text"] = f"{self.kept} {self.text}".rstrip()
            answer["stable"] = min(answer["stable"] + len(self.kept) + 1, len(answer["text"]))

    def _posted(self, pcm: bytes, last: bool) -> dict:
        headers = self.headers | {"x-piece": str(self.piece), "x-last-piece": str(last).lower()}
        headers |= self.expected if self.piece == 0 else {}
        pauses, (patience, *longer) = iter(self.pauses), UNANSWERED
        while True:
            try:
                response = self.session.post(self.url, pcm, headers=headers, timeout=patience)
                if response.ok:
                    self.pauses = PAUSES + MORE_PAUSES
                    return response.json()
                pause = next(pauses, None) if response.status_code == BUSY else None
                if pause is None:
                    message = response.json()["message"] if response.content else response.reason
                    error = LostError if response.status_code in LOST else LiveError
                    raise error(f"The server says {response.status_code}: {message}")
            except requests.ReadTimeout:
                if not longer:
                    break
                pause, patience = 0.0, longer.pop(0)
            except requests.RequestException as error:
                pause = next(pauses, None) if isinstance(error, BROKEN) else None
                if pause is None:
                    break
            time.sleep(pause)
        raise LiveError(f"No server answers at {self.url}: start it with make run-live.")


def transcribe(chunks: Iterable[bytes], rate: int = 16_000, server: str = SERVER, **options) -> Iterator[str]:
    """The text of each utterance, as soon as its speaker has paused.

    Args:
        chunks: 16-bit little-endian mono samples, of any length, as they are recorded.
        rate: Hz, of the sound.
        server: where TorchServe is, without a path.
        options: ``token``, ``endpoints`` and ``hotwords``, as for ``Speech``.

    Raises:
        LiveError: as ``Speech.send``.
    """
    speech = Speech(rate, server, **({"endpoints": True} | options))
    for chunk in chunks:
        yield from texts(speech.send(chunk))
    yield from texts(speech.send(b"", last=True))


def texts(answer: dict) -> list[str]:
    """What an answer has of text that will not change any more and that none has had before."""
    ended = answer.get("utterances", []) + ([answer] if answer["final"] else [])  # the rest, after a loss
    return [utterance["text"] for utterance in ended if utterance["text"]]


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
            while not heard.empty() and len(piece) < 2 * rate * LONGEST:
                piece += heard.get()
            yield rate, piece


def show(answer: dict, endpoints: bool) -> None:
    """Let the line of the terminal grow; what has ended is a line of its own on the standard output."""
    terminal = sys.stderr if endpoints else sys.stdout
    erase = ERASE if terminal.isatty() else ""
    for text in texts(answer) if endpoints else []:
        print(erase, end="", file=terminal, flush=True)
        print(text, flush=True)
    if answer["final"]:
        print(erase if endpoints else f"{erase}{answer['text']}\n", end="", file=terminal, flush=True)
    elif erase:
        text, stable = answer["text"], answer["stable"]
        first = max(len(text) - shutil.get_terminal_size().columns + 1, 0)  # what a line holds of it
        line = f"{text[first:stable]}{GREY}{text[max(first, stable) :]}{PLAIN}"
        print(f"{erase}{line}", end="", file=terminal, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a WAV file, 16-bit mono PCM; without it the microphone")
    parser.add_argument("--server", default=SERVER)
    parser.add_argument("--token", help="TorchServe's for inference, where it asks for one")
    parser.add_argument("--endpoints", action="store_true", help="a line of text for each utterance")
    parser.add_argument("--hotwords", default="", help="phrases that are expected: 'four seven two, nine one one: 2'")
    args = parser.parse_args()
    speech, stopped, chosen = None, [], (args.server, args.token, args.endpoints, False, args.hotwords)
    # Ctrl-C ends the sound, and a second one the program.
    signal.signal(signal.SIGINT, lambda *_: stopped.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
    try:
        for rate, pcm in file_pieces(args.file) if args.file else microphone_pieces():
            speech = speech or Speech(rate, *chosen)
            show(speech.send(pcm), args.endpoints)
            if stopped:
                break
        speech = speech or Speech(16_000, *chosen)
        show(speech.send(b"", last=True), args.endpoints)
    except LiveError as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
