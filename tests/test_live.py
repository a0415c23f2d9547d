"""What is promised of live speech: the whole's text from any pieces, and a clear answer to every piece."""

import base64
import functools
import json
import random
import re
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, SAMPLES, Worker, encode, transcripts
from ts.context import Context, RequestProcessor

import clients.live
import export_model
from benchmarks import engine
from engine.precision import PRECISIONS
from handler import decode_audio, words_of
from live import SETTINGS, LiveHandler, opus_decoder
from live import pcm_of as pcm_in


class LiveWorker:
    """One handler of the live archive, driven as TorchServe's worker does it."""

    def __init__(self, model, **settings: int) -> None:
        config = {"handler": settings}
        manifest = {"model": {"serializedFile": model.name}}
        self.context = Context("emformer_asr_live", str(model.parent), manifest, 1, None, "0", model_yaml_config=config)
        self.handler = LiveHandler()
        self.handler.initialize(self.context)

    def answer(self, *pieces: tuple[dict, bytes]) -> list[tuple[int, dict]]:
        """(status, body) for each of a batch of (headers, PCM)."""
        self.context.request_processor = [RequestProcessor(headers) for headers, _ in pieces]
        self.context.request_ids = {i: str(i) for i in range(len(pieces))}
        bodies = self.handler.handle([{"body": bytearray(pcm)} for _, pcm in pieces], self.context)
        json.dumps(bodies)  # or the whole batch would fail
        return [(self.context.get_response_status(i)[0], body) for i, body in enumerate(bodies)]


def headers(name: str, piece: int, last: bool = False, **others: str) -> dict[str, str]:
    return {"ts_request_sequence_id": name, "x-piece": str(piece), "x-last-piece": str(last).lower()} | others


def pcm_of(waveform: torch.Tensor) -> bytes:
    """16-bit PCM of (samples,)."""
    return (waveform * 32_768).round().clamp(-32_768, 32_767).numpy().astype("<i2").tobytes()


def cut(pcm: bytes, sizes: random.Random, longest: float = 3.0) -> list[bytes]:
    """``pcm`` in pieces of random sizes, one sample to ``longest`` seconds, as often short as long."""
    pieces = []
    while pcm:
        size = 2 * int(np.exp(sizes.uniform(0, np.log(longest * 16_000))))
        pieces.append(pcm[:size])
        pcm = pcm[size:]
    return pieces


def say(worker: LiveWorker, name: str, pieces: list[bytes], **others: str) -> dict:
    """Send all pieces; the final answer. What was called stable has to stay."""
    kept = ""
    for number, pcm in enumerate(pieces):
        [(status, answer)] = worker.answer((headers(name, number, number == len(pieces) - 1, **others), pcm))
        assert status == 200, answer
        assert answer["text"].startswith(kept) and answer["stable"] >= len(kept)
        kept = answer["text"][: answer["stable"]]
    assert answer["final"] and kept == answer["text"]
    return answer


@pytest.fixture(scope="module")
def live(digits_pt) -> LiveWorker:
    return LiveWorker(digits_pt)


@pytest.fixture(scope="module")
def at_width(digits_pt, live, worker) -> Callable[[int], tuple[LiveWorker, Worker]]:
    """From a beam width to a worker for live speech and one for whole files."""

    @functools.cache
    def workers(beam_width: int) -> tuple[LiveWorker, Worker]:
        if beam_width == 1:
            return live, worker
        return LiveWorker(digits_pt, beam_width=beam_width), Worker(digits_pt, {"beam_width": beam_width})

    return workers


@pytest.fixture(scope="module")
def strings(worker) -> list[bytes]:
    """PCM of fifty strings of one to six samples, quiet and loud, that end anywhere."""
    rng = random.Random(8)
    sounds = [decode_audio((SAMPLES / name).read_bytes()) for name in sorted(transcripts("digits"))]
    made = []
    for _ in range(50):
        string = torch.cat([rng.choice(sounds) * rng.uniform(0.1, 1.0) for _ in range(rng.randint(1, 6))])
        made.append(pcm_of(string[: rng.randint(200, 12 * 16_000)]))
    return made


def whole(worker, pcm: bytes, beam_width: int = 1) -> list:
    """The hypotheses for PCM in one request, the best first: (tokens, score, frames, log_probs)."""
    features = [worker.handler._features(waveform_of(pcm))]
    with torch.inference_mode():
        return worker.handler.model.decode(features, beam_width)[0]


def assert_same(worker, pcm: bytes, sequence_answer: dict) -> None:
    """The final answer has the tokens, times and probabilities of the whole sound in one request."""
    [(tokens, score, frames, log_probs), *_] = worker.handler._search([waveform_of(pcm)])[0]
    naming = (worker.handler.tokens_to_text, worker.handler.word_delays)
    words = words_of((tokens, score, frames, log_probs), len(pcm) / 32_000, *naming)
    assert sequence_answer["text"] == worker.handler.tokens_to_text(tokens)
    assert [[word["word"], word["start"], word["end"]] for word in sequence_answer["words"]] == [
        [word["word"], word["start"], word["end"]] for word in words
    ]
    probabilities = [word["probability"] for word in words]
    assert [word["probability"] for word in sequence_answer["words"]] == pytest.approx(probabilities, abs=0.001)


def waveform_of(pcm: bytes) -> torch.Tensor:
    """PCM as (samples,), which the handler makes of a whole file."""
    return torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32)) / 32_768


@pytest.mark.parametrize("name", sorted(transcripts("digits")))
def test_every_sample_in_pieces_gives_the_text_and_the_words_of_the_whole(live, worker, name):
    pcm = pcm_of(decode_audio((SAMPLES / name).read_bytes()))
    sizes = random.Random(name)
    for repeat in range(3):
        answer = say(live, f"{Path(name).stem}-{repeat}", cut(pcm, sizes))
        assert answer["text"] == transcripts("digits")[name]
        assert_same(worker, pcm, answer)


@pytest.mark.parametrize("beam_width", [1, 4])
def test_fifty_strings_in_random_pieces_give_what_the_whole_gives(at_width, strings, beam_width):
    live, offline = at_width(beam_width)
    sizes, words = random.Random(beam_width), 0
    for number, pcm in enumerate(strings):
        answer = say(live, f"string-{number}", cut(pcm, sizes))
        assert_same(offline, pcm, answer)
        words += len(answer["words"])
    assert words > 300  # or this would compare nothing


def test_sample_by_sample_gives_what_the_whole_gives(live, worker, strings):
    pcm = strings[0][: 2 * 4000]
    assert_same(worker, pcm, say(live, "one-by-one", [pcm[i : i + 2] for i in range(0, len(pcm), 2)]))


@pytest.mark.parametrize("samples", [0, 1, 199, 200, 201, 202, 519, 520, 2559, 2560, 2561, 3199, 3200, 3201, 5760])
def test_the_end_may_be_anywhere(live, worker, strings, samples):
    pcm = strings[1][: 2 * samples]
    for cuts, pieces in enumerate([[pcm], [pcm, b""], [b"", pcm[: samples // 2 * 2], pcm[samples // 2 * 2 :]]]):
        answer = say(live, f"end-{samples}-{cuts}", pieces)
        if samples:
            assert_same(worker, pcm, answer)
        else:
            assert (answer["text"], answer["words"]) == ("", [])


# Of the table in docs/live.md: x-encoding, rate in Hz, container and codec of a whole file that holds the same.
ENCODINGS = [("pcm", rate, "wav", "pcm_s16le") for rate in (8_000, 16_000, 24_000, 44_100, 48_000)]
ENCODINGS += [("mulaw", 8_000, "wav", "pcm_mulaw"), ("alaw", 8_000, "wav", "pcm_alaw")]
ENCODINGS += [("opus", 48_000, "webm", "libopus"), ("opus", 48_000, "ogg", "libopus")]


def spoken_as(rate: int, container: str, codec: str) -> tuple[bytes, bytes]:
    """The sample as a file, and what of it goes into pieces: all of a stream of Opus, else without the header."""
    resampler, parts = av.AudioResampler(format="flt", layout="mono", rate=rate), []
    with av.open(str(SAMPLES / "three-digits.wav")) as file:
        for frame in [*file.decode(audio=0), None]:
            parts += [part.to_ndarray() for part in resampler.resample(frame)]
    whole = encode(np.concatenate(parts, axis=1), rate, container, codec)
    return whole, whole if codec == "libopus" else whole[whole.index(b"data") + 8 :]


@pytest.mark.parametrize(("encoding", "rate", "container", "codec"), ENCODINGS)
def test_every_format_gives_what_the_whole_file_gives(live, worker, encoding, rate, container, codec):
    whole, sent = spoken_as(rate, container, codec)
    pieces = cut(sent, random.Random(rate), longest=3.0)
    answer = say(live, f"{container}-{codec}-{rate}", pieces, **{"x-encoding": encoding, "x-sample-rate": str(rate)})
    pcm = decode_audio(whole)
    assert answer["text"] == "four seven two"
    [(tokens, score, frames, log_probs), *_] = worker.handler._search([pcm])[0]
    hypothesis, naming = (tokens, score, frames, log_probs), (worker.handler.tokens_to_text, worker.handler.word_delays)
    words = words_of(hypothesis, len(pcm) / 16_000, *naming)
    assert [[word["word"], word["start"], word["end"]] for word in answer["words"]] == [
        [word["word"], word["start"], word["end"]] for word in words
    ]


@pytest.mark.parametrize("container", ["webm", "ogg"])
def test_a_stream_of_opus_in_pieces_has_the_samples_of_the_whole(container):
    whole, sent = spoken_as(48_000, container, "libopus")
    for size in (1000, 7, 3, 1, len(sent)):
        fed, heard = opus_decoder(3600)
        pieces = []
        for part in [sent[i : i + size] for i in range(0, len(sent), size)] + [None]:
            fed.put(part)
            pieces.append(heard.get(timeout=60))
        assert torch.equal(torch.cat(pieces), decode_audio(whole))
        assert size == len(sent) or len([piece for piece in pieces if len(piece)]) > 2  # not all at the end


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_at_once_get_what_each_gets_alone(tmp_path, strings, precision):
    export_model.export("digits", tmp_path / "emformer_rnnt.pt", precision)
    live, sizes = LiveWorker(tmp_path / "emformer_rnnt.pt"), random.Random(20)
    sounds = {f"voice-{i}": cut(pcm, sizes) for i, pcm in enumerate(strings[:20])}
    alone = {name: say(live, f"{name}-alone", pieces) for name, pieces in sounds.items()}
    together, waiting = {}, {name: list(enumerate(pieces)) for name, pieces in sounds.items()}
    while waiting:
        batch = sizes.sample(sorted(waiting), sizes.randint(1, len(waiting)))
        pieces = [(name, *waiting[name].pop(0)) for name in batch]
        sent = [(headers(name, number, number == len(sounds[name]) - 1), pcm) for name, number, pcm in pieces]
        for (status, answer), (name, number, _) in zip(live.answer(*sent), pieces, strict=True):
            assert (status, answer["sequence"], answer["piece"]) == (200, name, number)
            together[name] = answer
        waiting = {name: left for name, left in waiting.items() if left}
    for name in sounds:
        assert together[name]["text"] == alone[name]["text"]
        assert len(together[name]["words"]) == len(alone[name]["words"])


def test_long_pieces_of_many_in_one_batch_give_what_the_whole_gives(digits_pt, worker, strings):
    """As after a pause of the network; the encoder's windows get small then."""
    live = LiveWorker(digits_pt, window_segments=16)
    batch = [(headers(f"long-{number}", 0, True), pcm) for number, pcm in enumerate(strings[:30])]
    for (status, answer), pcm in zip(live.answer(*batch), strings, strict=False):
        assert status == 200
        assert_same(worker, pcm, answer)


@pytest.mark.slow
@pytest.mark.parametrize("beam_width", [1, 4])
def test_the_large_model_gives_the_whole_s_tokens_from_any_pieces(tmp_path, worker, beam_width):
    """The 76.7 M architecture with random weights, three seconds of four voices at once, in pieces of any sizes."""
    file = engine.save(engine.script(engine.stand_in(1.65), "fp32"), tmp_path / "emformer_rnnt.pt")
    live, offline = LiveWorker(file, beam_width=beam_width), Worker(file, {"beam_width": beam_width})
    names = ["sentence.wav", "three-digits.wav", "pin.webm", "telephone.wav"]
    sounds = {name.split(".")[0]: pcm_of(decode_audio((SAMPLES / name).read_bytes())[:48_000]) for name in names}
    sizes, words = random.Random(76), 0
    left = {name: list(enumerate(cut(pcm, sizes))) for name, pcm in sounds.items()}
    while left:
        pieces = [(name, *left[name].pop(0)) for name in left]
        answers = live.answer(*((headers(name, number, not left[name]), pcm) for name, number, pcm in pieces))
        for (status, answer), (name, *_) in zip(answers, pieces, strict=True):
            assert (status, answer.get("sequence")) == (200, name), answer
            if answer["final"]:
                assert_same(offline, sounds[name], answer)
                words += len(answer["words"])
                del left[name]
    assert words > 20


# Utterances


PAUSE = 1.5  # seconds


@pytest.fixture(scope="module")
def told_apart() -> tuple[list[str], list[float], bytes]:
    """Texts, the seconds at which each begins, and the PCM of some samples in a room, with pauses between them."""
    generator, texts, begins, parts = torch.Generator().manual_seed(1), [], [], []
    for name in ("three-digits.wav", "pin.webm", "room-number.ogg", "zero-to-nine.mp3"):
        texts.append(transcripts("digits")[name])
        begins.append(sum(map(len, parts)) / 16_000)
        parts += [decode_audio((SAMPLES / name).read_bytes()), torch.zeros(int(PAUSE * 16_000))]
    sound = torch.cat(parts)
    return texts, begins, pcm_of(sound + 0.0005 * torch.randn(len(sound), generator=generator))


def utterances(worker: LiveWorker, name: str, pieces: list[bytes], rules: str = "true") -> list[dict]:
    """All that the answers tell; each piece is sent twice, and answered so."""
    told = []
    for number, pcm in enumerate(pieces):
        sent = (headers(name, number, number == len(pieces) - 1, **{"x-endpoints": rules}), pcm)
        [(status, answer)], again = worker.answer(sent), worker.answer(sent)
        assert status == 200 and again == [(status, answer)]
        told += answer["utterances"]
    assert answer["final"] and answer["text"] == ""
    return told


@pytest.mark.parametrize("beam_width", [1, 4])
def test_an_utterance_ends_where_somebody_pauses_whatever_the_pieces(at_width, told_apart, beam_width):
    (live, _), (texts, begins, pcm) = at_width(beam_width), told_apart
    ways = [cut(pcm, random.Random(1)), [pcm], [pcm[i : i + 5120] for i in range(0, len(pcm), 5120)]]
    first, *others = (utterances(live, f"apart-{beam_width}-{i}", pieces) for i, pieces in enumerate(ways))
    assert [utterance["text"] for utterance in first] == texts
    assert [utterance["reason"] for utterance in first] == ["silence"] * len(texts)
    for utterance, begin, after in zip(first, begins, [*begins[1:], len(pcm) / 32_000], strict=True):
        words = utterance["words"]
        assert begin - 0.2 < utterance["start"] == words[0]["start"]
        assert words[-1]["end"] == utterance["end"] < after - PAUSE + 0.2
        assert " ".join(word["word"] for word in words) == utterance["text"]
        assert utterance["speech"] == max(word["probability"] for word in words) > 0.6
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert [one[name] for name in ("text", "start", "end")] == [same[name] for name in ("text", "start", "end")]


def test_a_pause_that_is_shorter_than_asked_for_ends_nothing(live, told_apart):
    texts, _, pcm = told_apart
    told = utterances(live, "shorter", cut(pcm, random.Random(2)), "5000,3000,60000")
    assert [utterance["text"] for utterance in told] == [" ".join(texts)]


def test_an_utterance_that_is_too_long_is_cut_between_words_and_none_is_lost(live, worker, strings):
    pcm = b"".join(strings[:6])
    told = utterances(live, "too-long", cut(pcm, random.Random(3)), "3600000,3600000,3000")
    assert {utterance["reason"] for utterance in told[:-1]} == {"length"} and len(told) > 5
    words = [word for utterance in told for word in utterance["words"]]
    whole = say(live, "too-long-whole", cut(pcm, random.Random(4)))["words"]
    assert [[word["word"], word["start"]] for word in words] == [[word["word"], word["start"]] for word in whole]
    assert all(one["end"] - one["start"] < 4 for one in told[:-1])


def test_what_is_not_finished_sent_again_under_another_name_gives_the_text_it_would_have_had(live, told_apart):
    """So that a client whose sequence is lost, wherever that is, loses no word and hears none twice."""
    texts, _, pcm = told_apart
    pieces, told = [pcm[i : i + 20_000] for i in range(0, len(pcm), 20_000)], []
    for number, piece in enumerate(pieces[:-1]):
        [(_, answer)] = live.answer((headers("lost", number, **{"x-endpoints": "true"}), piece))
        told += [each["text"] for each in answer["utterances"]]
        if number % 3 == 2:
            again = pcm[2 * round(16_000 * answer["finished"]) :]
            rest = [each["text"] for each in utterances(live, f"found-{number}", [again])]
            assert [text for text in told + rest if text] == texts, number


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_the_client_s_times_count_from_the_beginning_whatever_is_lost(live, told_apart, monkeypatch, rate):
    _, _, pcm = told_apart
    pcm = pcm if rate == 16_000 else np.frombuffer(pcm, "<i2")[::2].tobytes()
    pieces = [pcm[i : i + 6_000] for i in range(0, len(pcm), 6_000)]

    def utterances_of(lost: set[int]) -> list[dict]:
        asked = []

        def posted(speech: clients.live.Speech, pcm: bytes, last: bool) -> dict:
            asked.append(pcm)
            if len(asked) in lost:
                raise clients.live.LostError
            told = {"x-endpoints": "true", "x-words": "true", "x-sample-rate": str(rate)}
            head = headers(speech.headers["ts_request_sequence_id"], speech.piece, last, **told)
            return json.loads(json.dumps(live.answer((head, pcm))[0][1]))

        monkeypatch.setattr(clients.live.Speech, "_posted", posted)
        speech = clients.live.Speech(rate, endpoints=True, words=True)
        answers = [speech.send(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
        assert answers[-1]["finished"] == pytest.approx(len(pcm) / 2 / rate, abs=0.001)
        return [each for answer in answers for each in answer["utterances"] if each["text"]]

    whole, mended = utterances_of(set()), utterances_of({9, 31, 32, 60})
    assert len(whole) > 2
    for one, other in zip(whole, mended, strict=True):
        assert one["text"] == other["text"]
        assert [other["start"], other["end"]] == pytest.approx([one["start"], one["end"]], abs=0.1)
        for word, same in zip(one["words"], other["words"], strict=True):
            assert same["start"] == pytest.approx(word["start"], abs=0.1)


@pytest.mark.parametrize(
    ("endpoints", "again", "size"), [(True, 60, 12_000), (False, 60, 12_000), (False, 1, 12_000), (False, 3, 5120)]
)
def test_the_client_whose_sequences_are_lost_goes_on(live, told_apart, monkeypatch, endpoints, again, size):
    """It loses no word; of an utterance that is too long to be heard again it keeps the text."""
    texts, _, pcm = told_apart
    monkeypatch.setattr(clients.live, "AGAIN", again)
    asked, lost = [], (12, 30) if size > 5120 else (20, 50)  # requests; the 20th is the first behind 3 s

    def posted(speech: clients.live.Speech, pcm: bytes, last: bool) -> dict:
        asked.append(pcm)
        if len(asked) in lost:
            raise clients.live.LostError
        head = headers(speech.headers["ts_request_sequence_id"], speech.piece, last, **{"x-endpoints": str(endpoints)})
        [(status, answer)] = live.answer((head, pcm))
        assert status == 200, answer
        return answer

    monkeypatch.setattr(clients.live.Speech, "_posted", posted)
    pieces = [pcm[i : i + size] for i in range(0, len(pcm), size)]
    said = " ".join(clients.live.transcribe(pieces, endpoints=endpoints)).split()
    words = " ".join(texts).split()
    assert len(asked) > max(lost)
    if again == 60:
        assert said == words
    else:  # of a word that was being spoken a part may be lost
        assert (said[0], said[-1]) == (words[0], words[-1]) and 0 <= len(words) - len(said) <= len(lost)


def response_of(status: int, answer: dict) -> requests.Response:
    response = requests.Response()
    response.status_code, response._content = status, json.dumps(answer).encode()
    return response


def assert_right_through(live: LiveWorker, pcm: bytes, monkeypatch, post: Callable) -> None:
    """The client has the right text of three pieces that it sends through ``post``."""
    speech = clients.live.Speech()
    monkeypatch.setattr(speech.session, "post", post)
    pieces = [pcm[:12_000], pcm[12_000:24_000], pcm[24_000:]]
    answers = [speech.send(piece, last=piece is pieces[-1]) for piece in pieces]
    [(_, whole)] = live.answer((headers(f"whole-{uuid.uuid4().hex}", 0, True), pcm))
    assert answers[-1]["text"] == whole["text"] != ""


def test_the_client_waits_for_a_server_that_is_busy(live, strings, monkeypatch):
    """As after a loss, while the places of the other worker are taken; at the beginning it soon says so."""
    asked, waited = [], []

    def post(url: str, pcm: bytes, headers: dict, timeout: float) -> requests.Response:
        asked.append(pcm)
        status, answer = 503, {"message": "All places are taken."}
        if not 3 <= len(asked) < 8:
            [(status, answer)] = live.answer((headers, pcm))
        return response_of(status, answer)

    monkeypatch.setattr(clients.live.time, "sleep", waited.append)
    assert_right_through(live, max(strings, key=len), monkeypatch, post)
    assert len(asked) == 3 + 5 and sum(waited) > 5
    late = clients.live.Speech()
    monkeypatch.setattr(late.session, "post", post)
    del asked[3:], waited[:]
    with pytest.raises(clients.live.LiveError, match="503: All places are taken"):
        late.send(bytes(5120))
    assert sum(waited) < 2


def test_the_client_sends_a_piece_again_that_gets_no_answer(live, strings, monkeypatch):
    """First the piece is lost and then its answer, of the sequence's first and of its last."""
    asked, waited = [], []

    def post(url: str, pcm: bytes, headers: dict, timeout: float) -> requests.Response:
        asked.append(headers["x-piece"])
        waited.append(timeout)
        if len(asked) % 4 == 1:
            raise requests.ReadTimeout
        [(status, answer)] = live.answer((headers, pcm))
        if len(asked) % 4 == 2:
            raise requests.ReadTimeout
        return response_of(status, answer)

    assert_right_through(live, max(strings, key=len), monkeypatch, post)
    first, *longer = clients.live.UNANSWERED
    assert asked == ["0", "0", "0", "1", "2", "2", "2"] and waited[:4] == [first, *longer, first]
    assert first < SETTINGS["max_idle_seconds"]  # or the sequence is forgotten before the second try


def test_the_client_says_so_where_no_answer_ever_comes(monkeypatch):
    monkeypatch.setattr(clients.live, "UNANSWERED", (0.1, 0.2, 0.4))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        speech = clients.live.Speech(server=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(clients.live.LiveError, match="No server answers"):
            speech.send(bytes(5120))
        silent.setblocking(False)
        for _ in clients.live.UNANSWERED:
            silent.accept()[0].close()  # each time it was tried, on a connection of its own


def test_after_one_that_was_too_long_the_next_is_what_comes_after_its_last_word(live, strings):
    pcm, rules, end = b"".join(strings[:3]), {"x-endpoints": "3600000,3600000,3000"}, 0.0
    for number, begin in enumerate(range(0, len(pcm), 20_000)):
        [(_, answer)] = live.answer((headers("too-long-finished", number, **rules), pcm[begin : begin + 20_000]))
        end = next((each["end"] for each in reversed(answer["utterances"])), end)
        assert answer["finished"] == pytest.approx(end, abs=0.001)
    assert end > 3


def test_where_nobody_speaks_the_utterance_is_empty(live):
    told = utterances(live, "nobody", [bytes(5120)] * 40, "1000,800,20000")
    assert told == utterances(live, "nobody-at-once", [bytes(5120 * 40)], "1000,800,20000")
    assert len(told) >= 5 and {(one["text"], one["speech"], one["reason"]) for one in told} == {("", 0.0, "silence")}


@pytest.mark.parametrize("below", [40, 10], ids=lambda below: f"{below} dB below speech")
def test_a_steady_noise_holds_nothing_open(live, told_apart, below):
    texts, _, pcm = told_apart
    sound = torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32)) / 32_768
    loud = sound.unfold(0, 1600, 1600).square().mean(1)
    level = loud[loud > 0.01 * loud.max()].mean().sqrt()  # of speech
    noise = torch.randn(len(sound), generator=torch.Generator().manual_seed(2)) * level * 10 ** (-below / 20)
    told = utterances(live, f"noise-{below}", [pcm_of(sound + noise)])
    assert len([utterance for utterance in told if utterance["text"]]) == len(texts)


def test_while_sound_as_loud_as_speech_goes_on_an_utterance_ends_later_but_ends(live):
    speech = decode_audio((SAMPLES / "three-digits.wav").read_bytes())
    time = torch.arange(16_000) / 16_000
    tone = speech.square().mean().sqrt() * torch.sin(2 * torch.pi * 300 * time)
    ends = []
    for name, after in (("silence", torch.zeros(16_000)), ("tone", tone)):
        pcm = pcm_of(torch.cat([torch.zeros(8000), speech, after, torch.zeros(32_000)]))
        pieces = [pcm[i : i + 5120] for i in range(0, len(pcm), 5120)]
        answers = [live.answer((headers(name, i, **{"x-endpoints": "true"}), piece)) for i, piece in enumerate(pieces)]
        said = [i for i, [(_, answer)] in enumerate(answers) for each in answer["utterances"] if each["text"]]
        ends.append(0.16 * said[0])
        assert len(said) == 1
    assert ends[0] + 0.3 < ends[1] < ends[0] + 1.3


def test_an_hour_of_utterances_takes_no_more_memory_than_one(live, told_apart):
    _, _, pcm = told_apart
    kept, count = [], 0
    for number in range(12):
        [(status, answer)] = live.answer((headers("an-hour", number, **{"x-endpoints": "true"}), pcm))
        assert status == 200
        count += len(answer["utterances"])
        sequence = live.handler.sequences["an-hour"]
        tensors = [sequence.samples, sequence.recent, sequence.stream[0], *sequence.stream[2]]
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert len(sequence.tokens) < 40 and not sequence.utterances
    assert count >= 40 and max(kept) < 1.1 * max(kept[:2]) and max(kept) < 1_000_000


def test_who_wants_the_words_gets_them_in_every_answer(live, worker, strings):
    pcm, before = strings[0], []
    pieces = [pcm[i : i + 16_000] for i in range(0, len(pcm), 16_000)]
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        [(status, answer)] = live.answer((headers("words", number, last, **{"x-words": "true"}), piece))
        words = [word["word"] for word in answer["words"]]
        assert status == 200 and " ".join(words) == answer["text"]
        assert words[: len(before)] == before
        assert answer["speech"] == max([word["probability"] for word in answer["words"]], default=0.0)
        before = words
    assert_same(worker, pcm, answer)


# The answers to what is not the next piece

SECOND = bytes(32_000)


def test_a_repeated_piece_is_answered_again_and_not_counted_twice(live, worker, strings):
    pcm, answers = strings[2], []
    pieces = [pcm[i : i + 9_000] for i in range(0, len(pcm), 9_000)]
    for number, piece in enumerate(pieces):
        for _ in range(3):
            [(status, answer)] = live.answer((headers("again", number, number == len(pieces) - 1), piece))
            assert status == 200
            answers.append(answer)
        assert answers[-1] == answers[-2] == answers[-3]
    assert_same(worker, pcm, answers[-1])


def test_a_repeated_piece_in_the_batch_of_its_first_is_answered_too(live):
    batch = [(headers("twice", 0), SECOND), (headers("twice", 0), SECOND), (headers("twice", 1, True), SECOND)]
    (_, first), (_, second), (status, last) = live.answer(*batch)
    assert first == second and (status, last["piece"], last["final"]) == (200, 1, True)


@pytest.mark.parametrize(
    ("sent", "status", "kind"),
    [
        ({"ts_request_sequence_id": ""}, 400, "NoSequence"),
        ({"ts_request_sequence_id": "a b"}, 400, "NoSequence"),
        ({"ts_request_sequence_id": "x" * 65}, 400, "NoSequence"),
        ({"x-piece": ""}, 400, "BadPiece"),
        ({"x-piece": "-1"}, 400, "BadPiece"),
        ({"x-piece": "\u0661"}, 400, "BadPiece"),
        ({"x-last-piece": "maybe"}, 400, "BadPiece"),
        ({"x-sample-rate": "fast"}, 400, "BadRate"),
        ({"x-sample-rate": "7999"}, 400, "BadRate"),
        ({"x-endpoints": "maybe"}, 400, "BadEndpoints"),
        ({"x-endpoints": "2400,800"}, 400, "BadEndpoints"),
        ({"x-endpoints": "2400,199,20000"}, 400, "BadEndpoints"),
        ({"x-words": "1"}, 400, "BadWords"),
        ({"x-piece": "1"}, 409, "UnknownSequence"),
    ],
    ids=lambda sent: "-".join(f"{name}={value[:9]}" for name, value in sent.items()) if isinstance(sent, dict) else "",
)
def test_a_wrong_first_piece_is_refused_with_a_sentence(live, sent, status, kind):
    [(code, error)] = live.answer((headers("wrong", 0) | sent, SECOND))
    assert (code, error["code"], error["type"]) == (status, status, kind)
    assert len(error["message"]) > 30
    assert sent.get("ts_request_sequence_id", "wrong") not in live.handler.sequences  # and takes no place


def test_bytes_that_are_no_pcm_are_refused_and_the_sequence_goes_on(live, worker, strings):
    pcm = strings[3][:64_000]
    assert live.answer((headers("odd", 0), pcm[:3001]))[0][1]["type"] == "NotPCM"
    assert live.answer((headers("odd", 0), pcm[:30_000]))[0][0] == 200
    assert live.answer((headers("odd", 1), pcm[:3001]))[0][1]["type"] == "NotPCM"
    [(status, answer)] = live.answer((headers("odd", 1, True), pcm[30_000:]))
    assert status == 200
    assert_same(worker, pcm, answer)


def no_pcm() -> dict[str, bytes]:
    """What clients send for PCM, at whole numbers of samples."""
    speech = decode_audio((SAMPLES / "three-digits.wav").read_bytes())
    sent = {name: (SAMPLES / name).read_bytes() for name in transcripts("digits")}
    sent["an MP3 with a tag"] = b"ID3\x04" + bytes(300)
    sent["FLAC"] = encode(speech[None].numpy(), 16_000, "flac", "flac", "s16")
    sent["JSON"] = json.dumps({"data": [round(float(x), 4) for x in speech[:5000]]}).encode()
    sent["base64"] = base64.b64encode(pcm_of(speech))
    sent["text"] = "Le temps est très beau hier soir. ".encode() * 40
    sent["float32"] = speech.numpy().tobytes()
    sent["float32, quiet"] = (speech * 0.01 + torch.randn(len(speech)) * 1e-5).numpy().tobytes()
    return {name: data[: len(data) // 4 * 4] for name, data in sent.items()}


@pytest.mark.parametrize("name", sorted(no_pcm()))
def test_what_is_no_pcm_is_refused_with_a_sentence_and_the_sequence_may_begin(live, name):
    sequence = uuid.uuid4().hex
    [(status, error)] = live.answer((headers(sequence, 0), no_pcm()[name]))
    assert (status, error["type"]) == (400, "NotPCM") and len(error["message"]) > 30
    assert live.answer((headers(sequence, 0, True), SECOND))[0][0] == 200


def test_whatever_is_pcm_is_taken_for_it():
    """Speech, noise of every level, tones, square waves and silence, in pieces of a few samples to three seconds."""
    rng, time_axis = np.random.default_rng(27), np.arange(48_000)
    sounds = [decode_audio((SAMPLES / name).read_bytes()).numpy() for name in sorted(transcripts("digits"))]
    sounds += [rng.standard_normal(48_000) * level for level in (1.5e-5, 1e-4, 1e-3, 0.03, 0.3, 1.0, 30.0)]
    sounds += [np.zeros(48_000), np.full(48_000, 1 / 32_768), rng.choice([-1.0, 1.0], 48_000)]
    for level in np.linspace(0.01, 1.0, 34):  # whatever it is, half of the samples of some look like float32's
        sounds += [level * np.sin(np.pi * share * time_axis + 0.7) for share in (0.01, 0.25, 0.5, 0.999, 1.0)]
        sounds += [level * np.sign(np.sin(np.pi * share * time_axis + 0.7)) for share in (0.01, 0.25, 0.5, 1.0)]
    for sound in sounds:
        pcm = (sound * 32_768).round().clip(-32_768, 32_767).astype("<i2").tobytes()
        for size in (20, 200, 5120, 20_000, 96_000):
            assert pcm_in(pcm[:size], "pcm").tobytes() == pcm[:size]
            assert len(pcm_in(pcm[:size], "mulaw")) == len(pcm_in(pcm[:size], "alaw")) == len(pcm[:size])


def test_an_unknown_encoding_is_refused(live):
    [(status, error)] = live.answer((headers("format", 0, **{"x-encoding": "mp3"}), SECOND))
    assert (status, error["type"]) == (400, "BadEncoding") and "mulaw" in error["message"]


OPUS = {"x-encoding": "opus"}


def test_a_broken_stream_of_opus_gets_one_clear_error_and_leaves_nothing_behind(live):
    threads, (whole, _) = threading.active_count(), spoken_as(48_000, "webm", "libopus")
    noise = np.random.default_rng(1).bytes(300_000)
    matroska = encode(np.zeros((1, 48_000)), 48_000, "matroska", "pcm_s16le", "s16")
    long = encode(np.zeros((1, 48_000 * 40)), 48_000, "ogg", "libopus")
    for name, pieces, wanted in [
        ("pcm", [SECOND], (400, "BrokenStream")),
        ("not-opus", [matroska, b"", matroska], (400, "BrokenStream")),
        ("noise-within", [whole[:2000], noise[:100_000], noise[100_000:]], (400, "BrokenStream")),
        ("forty-seconds", [long], (413, "AudioTooLong")),
    ]:
        answers = [live.answer((headers(name, number, **OPUS), piece))[0] for number, piece in enumerate(pieces)]
        errors = [(status, answer["type"]) for status, answer in answers if status != 200]
        assert errors[0] == wanted, (name, answers)
        assert all(error in ((410, "SequenceEnded"), (409, "UnknownSequence")) for error in errors[1:]), (name, errors)
    assert live.answer((headers("huge", 0, **OPUS), whole[:1000] + bytes(3_000_000)))[0][0] == 413
    for number, last in enumerate((False, True)):
        assert live.answer((headers("empty", number, last, **OPUS), b""))[0][0] == 200
    deadline = time.monotonic() + 60
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_a_missing_piece_is_asked_for_and_the_sequence_goes_on(live):
    assert live.answer((headers("gap", 0), SECOND))[0][0] == 200
    [(status, error)] = live.answer((headers("gap", 2), SECOND))
    assert (status, error["type"]) == (409, "MissingPiece") and "Piece 1 is missing" in error["message"]
    assert [live.answer((headers("gap", n, n == 2), SECOND))[0][0] for n in (1, 2)] == [200, 200]


def test_after_the_end_there_is_no_piece(live):
    assert live.answer((headers("ended", 0, True), SECOND))[0][0] == 200
    [(status, error)] = live.answer((headers("ended", 1), SECOND))
    assert (status, error["type"]) == (410, "SequenceEnded")


def test_the_last_piece_may_be_sent_again(live):
    [(_, answer)] = live.answer((headers("kept", 0, True), SECOND))
    for _ in range(3):
        assert live.answer((headers("kept", 0, True), SECOND)) == [(200, answer)]
    assert live.answer((headers("kept", 1), b"")) == [(200, answer)]


@pytest.mark.parametrize("header", ["Ts_request_sequence_id", "TS_REQUEST_SEQUENCE_ID", "Ts_Request_Sequence_Id"])
def test_the_name_s_header_may_be_spelled_in_any_case(live, header):
    [(status, answer)] = live.answer(({header: f"mine-{header}", "x-piece": "0", "x-last-piece": "true"}, SECOND))
    assert (status, answer["sequence"]) == (200, f"mine-{header}")


def test_a_form_without_the_sound_is_refused(live):
    live.context.request_processor = [RequestProcessor(headers("form", 0, True))]
    live.context.request_ids = {0: "0"}
    [error] = live.handler.handle([{"file": bytearray(SECOND)}], live.context)
    assert (error["code"], error["type"]) == (400, "NotPCM")


def test_a_silent_client_is_forgotten_and_told_so(digits_pt, monkeypatch):
    live, now = LiveWorker(digits_pt), time.monotonic()
    assert live.answer((headers("silent", 0), SECOND), (headers("done", 0, True), SECOND))[0][0] == 200
    monkeypatch.setattr(time, "monotonic", lambda: now + 300)
    [(status, error)] = live.answer((headers("silent", 1), SECOND))
    assert (status, error["type"]) == (410, "SequenceEnded") and "idle for more than 10 s" in error["message"]
    assert live.answer((headers("done", 1), SECOND))[0][0] == 410
    assert live.handler.sequences == {}


def test_who_has_to_wait_for_a_long_batch_is_not_forgotten(digits_pt, monkeypatch):
    live, now = LiveWorker(digits_pt), [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for name in ("slow", "waits"):
        assert live.answer((headers(name, 0), SECOND))[0][0] == 200
    advance = live.handler._advance
    with monkeypatch.context() as busy:  # so many that they take a minute
        busy.setattr(live.handler, "_advance", lambda *work: (advance(*work), now.append(now.pop() + 60))[0])
        assert live.answer((headers("slow", 1), SECOND))[0][0] == 200
    assert [status for status, _ in live.answer((headers("waits", 1), SECOND), (headers("slow", 2), SECOND))] == [
        200,
        200,
    ]
    now[0] += 11
    assert live.answer((headers("waits", 2), SECOND))[0][0] == 410


def test_when_all_places_are_taken_the_next_gets_503_until_one_is_free(digits_pt):
    live = LiveWorker(digits_pt, max_sequences=3)
    opened = [live.answer((headers(f"s{i}", 0), SECOND))[0] for i in range(4)]
    assert [status for status, _ in opened] == [200, 200, 200, 503]
    assert opened[3][1]["type"] == "TooManySequences"
    assert live.answer((headers("s0", 1, True), SECOND))[0][0] == 200
    assert live.answer((headers("s3", 0), SECOND))[0][0] == 200


def test_too_much_sound_is_refused(digits_pt):
    live = LiveWorker(digits_pt, max_audio_seconds=3)
    assert live.answer((headers("long", 0), bytes(32_000 * 31)))[0][1]["type"] == "AudioTooLong"
    assert [live.answer((headers("long", i), SECOND))[0][0] for i in range(4)] == [200, 200, 200, 413]
    assert live.answer((headers("long", 3, True), b""))[0][0] == 200


def test_of_several_processes_one_that_dies_takes_its_sequences_along_and_is_replaced(digits_pt, strings, worker):
    live = LiveWorker(digits_pt, processes=2, max_idle_seconds=600)
    processes = [process.process for process in live.handler.processes]
    connection = live.handler.processes[0].connection
    try:
        long = [pcm for pcm in strings if len(pcm) > 5 * 16_000][:8]
        sounds = {f"voice-{i}": [pcm[j : j + 16_000] for j in range(0, len(pcm), 16_000)] for i, pcm in enumerate(long)}
        for number in range(2):  # whose pieces have come to the one that has their sequence
            answers = live.answer(*((headers(name, number), pieces[number]) for name, pieces in sounds.items()))
            assert [(status, answer["piece"]) for status, answer in answers] == [(200, number)] * 8
        processes[0].kill()
        answers = live.answer(*((headers(name, 2), pieces[2]) for name, pieces in sounds.items()))
        lost = [name for name, (status, _) in zip(sounds, answers, strict=True) if status != 200]
        assert len(lost) == 4
        assert {(s, a["type"]) for s, a in answers if s != 200} == {(409, "UnknownSequence")}
        for name, pieces in sounds.items():
            if name in lost:
                assert live.answer((headers(name, 3), pieces[3]))[0][1]["type"] == "UnknownSequence"
                assert_same(worker, b"".join(pieces), say(live, f"{name}-anew", pieces))
            else:
                for number, piece in list(enumerate(pieces))[3:]:
                    [(_, answer)] = live.answer((headers(name, number, number == len(pieces) - 1), piece))
                assert_same(worker, b"".join(pieces), answer)
        replaced = [process for process in live.handler.processes if process.process not in processes]
        assert connection.closed  # nothing is held of the dead one
        assert len(replaced) == 1 and live.handler._ready(replaced[0], wait=True)
        batch = live.answer(*((headers(f"later-{i}", 0, True), SECOND) for i in range(8)))
        assert [status for status, _ in batch] == [200] * 8
        processes.append(replaced[0].process)
    finally:
        for process in processes:
            process.kill()


def test_where_no_process_can_load_the_model_any_more_clients_are_told_to_wait(digits_pt, tmp_path):
    live = LiveWorker(digits_pt, processes=2)
    (tmp_path / "emformer_rnnt.pt").write_text("not a TorchScript file")
    name, _, *others = live.handler.arguments
    live.handler.arguments = (name, str(tmp_path), *others)
    for each in live.handler.processes:
        each.process.kill()
        each.process.join()
    for piece in (0, 1):
        [(status, answer)] = live.answer((headers("waits", piece), SECOND))
        assert (status, answer["type"]) == (503, "NoProcess")


def test_processes_that_cannot_load_the_model_say_why(tmp_path):
    (tmp_path / "emformer_rnnt.pt").write_text("not a TorchScript file")
    with pytest.raises(ValueError, match=r"emformer_rnnt\.pt|archive|zip|pickle|PytorchStreamReader"):
        LiveWorker(tmp_path / "emformer_rnnt.pt", processes=2)


def test_one_that_fails_is_dropped_and_harms_nobody(digits_pt, strings, worker, monkeypatch):
    live = LiveWorker(digits_pt)
    pcm = strings[4][:64_000]
    live.answer((headers("good", 0), pcm[:32_000]), (headers("bad", 0), pcm[:32_000]))
    bad = live.handler.sequences["bad"]
    bad.stream = (*bad.stream[:2], [], *bad.stream[3:])
    good, failed = live.answer((headers("good", 1, True), pcm[32_000:]), (headers("bad", 1), pcm[32_000:]))
    assert (good[0], failed[0], failed[1]["type"]) == (200, 500, "InternalError")
    assert_same(worker, pcm, good[1])
    assert live.answer((headers("bad", 2), SECOND))[0][0] == 410


@pytest.mark.parametrize("beam_width", [1, 4])
def test_what_has_settled_is_not_carried_along(at_width, strings, beam_width):
    """Each hypothesis begins where they part, however long the sound; the answer has all."""
    live, offline = at_width(beam_width)
    pcm, carried = b"".join(strings[:12]), []
    pieces = [pcm[i : i + 20_000] for i in range(0, len(pcm), 20_000)]
    for number, piece in enumerate(pieces):
        [(status, answer)] = live.answer((headers(f"settled-{beam_width}", number, number == len(pieces) - 1), piece))
        assert status == 200
        if not answer["final"]:
            _, _, _, (hypotheses, frames, *_), _ = live.handler.sequences[f"settled-{beam_width}"].stream
            tokens = [hypothesis[0][1:] for hypothesis in hypotheses]  # without the leading blank
            carried.append(max(map(len, tokens)))
            first = {(*own[:1], *when[:1]) for own, when in zip(tokens, frames, strict=True)}
            assert not carried[-1] or len(first) > 1  # they agree on no token and its frame any more
    assert_same(offline, pcm, answer)
    # At a wider beam how long they part is the model's doing: one that is sure of all that follows keeps an old doubt.
    most = 40 if beam_width == 1 else 2 * len(answer["words"]) / 3
    assert len(answer["words"]) > 60 and statistics.median(carried) < most


def test_what_a_sequence_keeps_does_not_grow_with_its_sound(live):
    kept = []
    for number in range(60):
        live.answer((headers("memory", number), SECOND))
        sequence = live.handler.sequences["memory"]
        features, _, past, *_ = sequence.stream
        tensors = [sequence.samples, features, *past]
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert max(kept[1:]) < 1.01 * max(kept[:5]) and max(kept) < 1_000_000


def test_a_model_file_that_cannot_stream_is_refused(tmp_path):
    files = {name: (export_model.DIGITS / name).read_bytes() for name in ("global_stats.json", "tokenizer.model")}
    torch.jit.save(torch.jit.script(torch.nn.Identity()), str(tmp_path / "emformer_rnnt.pt"), _extra_files=files)
    with pytest.raises(ValueError, match="write it anew"):
        LiveWorker(tmp_path / "emformer_rnnt.pt")


def test_the_page_lists_every_error():
    documented = set()
    page = (ROOT / "docs" / "live.md").read_text()
    for line in page.split("| status | live `type` | when |\n")[1].split("\n\n")[0].splitlines():
        documented |= {
            (int(line[2:5]), kind) for kind in re.findall(r"`(\w+)`", line.split("|")[2]) if line[2:5].isdigit()
        }
    raised = re.findall(r'refusal\((\d+), "(\w+)"', (ROOT / "live.py").read_text())
    raised.append(("500", "InternalError"))  # what handler.py's refused() makes of any other exception
    assert documented == {(int(status), kind) for status, kind in raised}
