"""Speak to the server and watch the text grow, or let it hear a file at the speed of speech.

    python clients/live.py speech.wav    # 16-bit mono PCM
    python clients/live.py               # the microphone; needs the package sounddevice

What may still change is in grey. Needs requests.
"""

import argparse
import queue
import sys
import time
import uuid
import wave
from collections.abc import Iterator

import requests

PIECE = 0.16  # seconds
GREY, PLAIN, ERASE = "\033[90m", "\033[0m", "\r\033[K"


def file_pieces(path: str) -> tuple[int, Iterator[bytes]]:
    """The rate in Hz and the pieces of a WAV file, each when it would have been spoken."""
    file = wave.open(path, "rb")  # noqa: SIM115 (read until the program ends)
    if (file.getnchannels(), file.getsampwidth()) != (1, 2):
        sys.exit(f"{path} is not 16-bit mono PCM: convert it, with ffmpeg -i {path} -ac 1 -c:a pcm_s16le out.wav.")

    def pieces() -> Iterator[bytes]:
        begun, spoken = time.monotonic(), 0.0
        while piece := file.readframes(int(PIECE * file.getframerate())):
            spoken += len(piece) / 2 / file.getframerate()
            time.sleep(max(begun + spoken - time.monotonic(), 0))
            yield piece

    return file.getframerate(), pieces()


def microphone_pieces(rate: int = 16_000) -> tuple[int, Iterator[bytes]]:
    """The rate in Hz and what the microphone has heard since the piece before, until Ctrl-C."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: without PortAudio
        sys.exit(f"The microphone needs sounddevice ({error}): pip install sounddevice, or name a WAV file.")

    def pieces() -> Iterator[bytes]:
        heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        microphone = sounddevice.RawInputStream(
            rate, int(PIECE * rate), channels=1, dtype="int16", callback=lambda data, *_: heard.put(bytes(data))
        )
        try:
            with microphone:
                while True:
                    piece = heard.get()
                    while not heard.empty():
                        piece += heard.get()
                    yield piece
        except KeyboardInterrupt:
            return

    return rate, pieces()


def send(session: requests.Session, url: str, headers: dict[str, str], pcm: bytes) -> dict:
    """One piece; sent again if the connection breaks, for a repeated piece does not count twice."""
    for attempt in range(4):
        try:
            response = session.post(url, pcm, headers=headers, timeout=60)
            break
        except requests.ConnectionError:
            if attempt == 3:
                sys.exit(f"\nNo server answers at {url}: start it with make run-live.")
            time.sleep(0.5)
    if not response.ok:
        sys.exit(f"\nThe server says {response.status_code}: {response.json().get('message', response.text)}")
    return response.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a WAV file, 16-bit mono PCM; without it the microphone")
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    args = parser.parse_args()
    rate, pieces = file_pieces(args.file) if args.file else microphone_pieces()
    url, session = f"{args.server}/predictions/emformer_asr_live", requests.Session()
    common = {"ts_request_sequence_id": uuid.uuid4().hex, "x-sample-rate": str(rate)}
    common["Content-Type"] = "application/octet-stream"
    number = 0
    for pcm in pieces:
        answer = send(session, url, common | {"x-piece": str(number)}, pcm)
        text, stable = answer["text"], answer["stable"]
        if sys.stdout.isatty():
            print(f"{ERASE}{text[:stable]}{GREY}{text[stable:]}{PLAIN}", end="", flush=True)
        number += 1
    answer = send(session, url, common | {"x-piece": str(number), "x-last-piece": "true"}, b"")
    print(f"{ERASE if sys.stdout.isatty() else ''}{answer['text']}")


if __name__ == "__main__":
    main()
