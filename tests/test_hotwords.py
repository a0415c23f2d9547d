"""Phrases that are expected: found as promised, heard, live, too, and nobody else's business."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from conftest import Worker
from making import riff
from test_equality import Reference, Shaken, bits, scripted, streamed
from test_live import LiveWorker, cut, headers, pcm_of, say
from test_quality import HELD_OUT
from torchaudio.models import RNNTBeamSearch

import export_model
from engine.context import context_graph, steps
from handler import MAX_HOTWORDS, decode_audio

BLANK, MARK = 14, 2
KINDS = [2, 2, 2, *[0] * 11]  # of the digits model's tokens
# In held-out speech: said, and heard otherwise by the model at beam width 1.
CLIPS = {
    "04-noise-10db.ogg": "three four two four nine one two three five nine seven",
    "12-clean.ogg": "two zero six zero seven two nine six six four",
    "39-clean.ogg": "three six five one seven three zero oh eight five",
    "16-noise-10db.ogg": "zero one oh three oh",
}
MISHEARD = "04-noise-10db.ogg"
SAID = CLIPS[MISHEARD]

Phrases = list[tuple[list[int], float]]


def bonus(tokens: tuple[int, ...], phrases: Phrases, kinds: list[int], over: bool = False) -> float:
    """What engine/context.py says of its bonus, in as many words; ``over``: nothing more will be said."""
    if not tokens:
        return 0.0
    beginning = [len(tokens) * weight for phrase, weight in phrases if begins(phrase, tokens) and not over]
    found = [
        (len(phrase), weight)
        for phrase, weight in phrases
        if tokens[: len(phrase)] == tuple(phrase) and not (kinds[(*tokens, 0)[len(phrase)]] and tokens[len(phrase) :])
    ]
    length, weight = max(found, default=(1, 0.0))
    return max([length * weight + bonus(tokens[length:], phrases, kinds, over), *beginning])


def begins(phrase: list[int], tokens: tuple[int, ...]) -> bool:
    return len(phrase) > len(tokens) and tuple(phrase[: len(tokens)]) == tokens


class Expecting(RNNTBeamSearch):
    """torchaudio's search; the bonus is computed anew for every hypothesis and each token that may follow."""

    phrases: Phrases

    def of(self, tokens: list[int], over: bool = False) -> float:
        spoken = tuple(token for token in tokens[1:] if KINDS[token] < 2)
        return bonus(spoken, self.phrases, KINDS, over)

    def _gen_next_token_probs(self, enc_out, hypos, device) -> torch.Tensor:
        log_probs = super()._gen_next_token_probs(enc_out, hypos, device)
        for row, (tokens, *_) in zip(log_probs, hypos, strict=True):
            row[:BLANK] += torch.tensor([self.of([*tokens, token]) for token in range(BLANK)]) - self.of(tokens)
        return log_probs

    def _search(self, *args) -> list:
        found = super()._search(*args)
        found.sort(key=lambda h: -(h[3] - self.of(h[0]) + self.of(h[0], over=True)) / (len(h[0]) + 1))
        return [(*h[:3], h[3] - self.of(h[0])) for h in found]


class ShakenExpecting(Expecting, Shaken):
    """The same, every log-probability moved as rounding errors move it."""


@pytest.fixture(scope="module")
def digits():
    return export_model.digits(None)[0].eval()


@pytest.fixture(scope="module")
def engines(digits):
    """From a precision to the engine."""
    return functools.cache(lambda precision: scripted(digits, precision))


@pytest.fixture(scope="module")
def engine(engines):
    return engines("fp32")


@pytest.fixture(scope="module")
def features(worker) -> dict[str, torch.Tensor]:
    """File name -> (T, 80)."""
    return {file: worker.handler._features(decode_audio((HELD_OUT / file).read_bytes())) for file in CLIPS}


def tokens_of(worker: Worker, text: str) -> list[int]:
    return worker.handler.tokens_to_text.sp_model.encode(text)


def graph(engine, phrases: Phrases) -> tuple:
    return engine.context([phrase for phrase, _ in phrases], [weight for _, weight in phrases], torch.tensor(KINDS))


# The engine


def test_the_graphs_bonus_is_that_of_the_phrases_found_from_left_to_right():
    rng = random.Random(0)
    build, follow = torch.jit.script(context_graph), torch.jit.script(steps)
    taken_back = 0
    for _ in range(100):
        vocabulary = rng.randint(3, 7)
        kinds = [*rng.choices([0, 0, 1], k=vocabulary - 1), 2]
        phrases = [(rng.choices(range(vocabulary - 1), k=rng.randint(1, 5)), rng.choice([0.5, 1.5])) for _ in range(6)]
        context = build([phrase for phrase, _ in phrases], [weight for _, weight in phrases], torch.tensor(kinds))
        state, total, tokens = 0, 0.0, ()
        for token in rng.choices(range(vocabulary), k=40):
            after, gain = follow(context, state)
            state, total = int(after[token]), total + float(gain[token])
            tokens += (token,) * (kinds[token] < 2)
            taken_back += float(gain[token]) < 0
            assert total == pytest.approx(bonus(tokens, phrases, kinds), abs=1e-4)
            undecided = float(context[5][state] - context[6][state])
            assert total - undecided == pytest.approx(bonus(tokens, phrases, kinds, over=True), abs=1e-4)
    assert taken_back > 100


@pytest.mark.parametrize("beam_width", [1, 4, 10])
def test_beams_are_those_of_torchaudios_search_with_the_bonus(digits, engine, features, worker, beam_width):
    """Token for token as test_equality.py has it, with the model's own scores; and most of the best ones change."""
    rng = random.Random(beam_width)
    changed = 0
    for file, utterance in features.items():
        words = CLIPS[file].split()
        said = [words, words[:4], words[2:3], words[1:3], rng.choices(words, k=4), rng.choices(words, k=2)]
        phrases = [(tokens_of(worker, " ".join(phrase)), rng.uniform(0.5, 2.0)) for phrase in said]
        reference = Reference(digits)
        reference.single = Expecting(digits, BLANK, step_max_tokens=10)
        reference.double = Expecting(copy.deepcopy(digits).double(), BLANK, step_max_tokens=10)
        reference.shaken = ShakenExpecting(reference.double.model, BLANK, step_max_tokens=10)
        for search in (reference.single, reference.double, reference.shaken):
            search.phrases = phrases
        context = graph(engine, phrases)

        def heard(features, _, beam_width, context=context):
            return engine.decode([features], beam_width, [context])[0].hypotheses

        assert reference.assert_same_beams(heard, utterance, [beam_width]) > 3
        with torch.inference_mode():
            plain, expecting = (engine.decode([utterance], beam_width, c)[0].hypotheses[0] for c in (None, [context]))
        changed += plain[0] != expecting[0]
    assert changed >= 2


@pytest.mark.parametrize(("precision", "beam_width"), [("fp32", 4), ("int8", 1), ("int8", 4)])
def test_a_batch_of_different_phrases_gives_what_each_gives_alone(engines, features, worker, precision, beam_width):
    """Beside those without phrases, which get to the bit what they get where nobody has any; and in pieces."""
    engine, utterances = engines(precision), list(features.values())
    contexts = [graph(engine, [(tokens_of(worker, CLIPS[file]), 1.5)]) for file in features]
    contexts[1], contexts[2] = None, graph(engine, [])
    with torch.inference_mode():
        alone = [bits(engine.decode([u], beam_width, [c])[0]) for u, c in zip(utterances, contexts, strict=True)]
        without = [bits(engine.decode([utterance], beam_width)[0]) for utterance in utterances]
        together = [bits(beam) for beam in engine.decode(utterances, beam_width, contexts)]
        pieces = streamed(engine, utterances, beam_width, 0, contexts)
    assert [a == b for a, b in zip(alone, without, strict=True)] == [False, True, True, False]
    if precision == "int8":
        assert together == pieces == alone
    for found in (together, pieces):  # at fp32 scores differ by rounding errors
        assert [beam[0][0][0] for beam in found] == [beam[0][0][0] for beam in alone]
        assert [beam[1][0] for beam in found] == [beam[1][0] for beam in alone]


def test_a_context_that_does_not_fit_is_refused(engine):
    with pytest.raises(torch.jit.Error, match="a weight for each phrase"):
        engine.context([[3]], [], torch.tensor(KINDS))
    with pytest.raises(torch.jit.Error, match="a kind for each token"):
        engine.context([[3]], [1.0], torch.tensor(KINDS[1:]))


# The handler

AUDIO = (HELD_OUT / MISHEARD).read_bytes()


@pytest.mark.parametrize(
    "request_of",
    [
        lambda body: ({"data": body, "hotwords": f"oh oh oh\n{SAID}:2,".encode()}, {}),
        lambda body: ({"data": body, "hotwords": bytearray(SAID.title().encode())}, {}),
        lambda body: ({"body": body}, {"X-Hotwords": f"{SAID}: 1.5, oh oh oh : 0.5"}),
        lambda body: ({"body": {"data": body, "hotwords": ["oh oh oh", f"{SAID}:2"]}}, {}),
        lambda body: ({"body": {"data": body, "hotwords": {"oh oh oh": None, SAID: 2}}}, {}),
        lambda body: ({"body": {"data": body, "hotwords": SAID}}, {"x-hotwords": "oh"}),
    ],
    ids=["form", "capitals", "header", "list", "object", "the field wins"],
)
def test_a_phrase_that_is_expected_is_heard_however_it_is_sent(worker, request_of):
    request, sent = request_of(bytearray(AUDIO))
    assert worker.transcribe(AUDIO) != SAID
    assert worker.answer(request, headers=sent) == [(200, SAID)]


def test_the_models_settings_name_phrases_and_a_request_others(digits_pt):
    worker = Worker(digits_pt, {"hotwords": [SAID, "four two: 0.5"]})
    assert worker.transcribe(AUDIO) == SAID
    [(_, without)] = worker.answer({"body": bytearray(AUDIO)}, headers={"x-hotwords": ""})
    [(_, others)] = worker.answer({"body": bytearray(AUDIO)}, headers={"x-hotwords": "oh oh oh"})
    assert SAID not in (without, others)
    for wrong, sentence in (
        (7, "hotwords must be phrases"),
        ([7], "hotwords .* must be phrases"),
        ("hello", "model-config.yaml: handler: The model cannot write hotword 1: leave"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Worker(digits_pt, {"hotwords": wrong})


@pytest.mark.parametrize(
    ("hotwords", "sentence"),
    [
        ("one,hello", "The model cannot write hotword 2: leave it out or spell it otherwise."),
        ("one: two", "The weight of hotword 1 must be a number above 0, at most 5."),
        ("one: 0", "The weight of hotword 1 must be a number above 0, at most 5."),
        ("one: 5.1", "The weight of hotword 1 must be a number above 0, at most 5."),
        ("one: nan", "The weight of hotword 1 must be a number above 0, at most 5."),
        ({"one": 10**400}, "The weight of hotword 1 must be a number above 0, at most 5."),
        ({"one": [1]}, "The weight of hotword 1 must be a number above 0, at most 5."),
        ("one," + "two " * 26, "Hotword 2 must have 1 to 100 characters."),
        (": 2", "Hotword 1 must have 1 to 100 characters."),
        ("one," * (MAX_HOTWORDS + 1), "There are more than 1000 hotwords, the most for a request."),
        ([["one"]], "hotwords (or the header x-hotwords) must be phrases with commas between them, as in: "),
        (7, "hotwords (or the header x-hotwords) must be phrases with commas between them, as in: "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_phrases_that_cannot_be_used_are_refused_with_a_sentence(worker, hotwords, sentence):
    """And not the others of the batch."""
    bad = {"body": {"data": bytearray(AUDIO), "hotwords": hotwords}}
    good = {"body": {"data": bytearray(AUDIO), "hotwords": [SAID]}}
    (status, answer), *others = worker.answer(bad, good, {"body": bytearray(AUDIO)})
    assert (status, answer["type"]) == (400, "BadHotwords")
    assert answer["message"].startswith(sentence)
    assert others == [(200, SAID), (200, worker.transcribe(AUDIO))]


def test_a_thousand_phrases_are_heard_for(worker):
    rng = random.Random(0)
    words = [worker.handler.tokens_to_text.sp_model.id_to_piece(token)[1:] for token in range(3, BLANK)]
    others = {" ".join(rng.choices(words, k=12)): 1.5 for _ in range(MAX_HOTWORDS - 1)}
    [(status, text)] = worker.answer({"body": {"data": bytearray(AUDIO), "hotwords": others | {SAID: 3}}})
    assert (status, text) == (200, SAID)


def test_a_model_file_from_before_refuses_phrases_and_nothing_else(worker, monkeypatch):
    monkeypatch.setattr(worker.handler, "model", Old(worker.handler.model))
    [(status, answer)] = worker.answer({"body": bytearray(AUDIO)}, headers={"x-hotwords": "one two three four five"})
    assert (status, answer["type"]) == (400, "NoHotwords")
    assert worker.answer({"body": bytearray(AUDIO)})[0][0] == 200


class Old:
    """An engine that was exported before there were phrases."""

    def __init__(self, model) -> None:
        self.begin = model.begin
        self.advance = lambda streams, features, ended, beam_width: model.advance(streams, features, ended, beam_width)


# Live


@functools.cache
def spoken_clip(file: str) -> bytes:
    return pcm_of(decode_audio((HELD_OUT / file).read_bytes()))


def test_a_sequence_hears_its_own_phrases(digits_pt):
    """Named with its first piece; beside one that has none. Phrases that cannot be used do not begin one."""
    live, whole = LiveWorker(digits_pt, beam_width=4), Worker(digits_pt, {"beam_width": 4})
    sound = spoken_clip(MISHEARD)
    pieces = cut(sound, random.Random(1), 1.0)
    assert say(live, "expecting", pieces, **{"x-hotwords": SAID})["text"] == SAID
    plain = say(live, "plain", pieces)["text"]
    assert plain == whole.transcribe(riff(np.frombuffer(sound, "<i2"))) != SAID
    for number, pcm in enumerate(pieces):
        last = number == len(pieces) - 1
        both = [headers("a", number, last, **{"x-hotwords": SAID}), headers("b", number, last)]
        (_, expecting), (_, other) = live.answer(*((each, pcm) for each in both))
    assert (expecting["text"], other["text"]) == (SAID, plain)
    [(status, answer)] = live.answer((headers("c", 0, **{"x-hotwords": "hello"}), b""))
    assert (status, answer["type"]) == (400, "BadHotwords")
    [(status, answer)] = live.answer((headers("c", 0, **{"x-hotwords": "one"}), b""))
    assert status == 200
