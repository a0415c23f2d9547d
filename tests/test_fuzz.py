"""Whatever is sent, every request is answered, with 200 or a 4xx of ours, and the next one as if nothing had been.

pytest tests/test_fuzz.py --fuzz 100000     # as many cases as wanted
"""

import logging
import time

import psutil
import pytest
from conftest import SAMPLES, Worker, transcripts
from fuzzing import requests_of

pytestmark = pytest.mark.slow
THREE_DIGITS = (SAMPLES / "three-digits.wav").read_bytes()
TEXT = transcripts("digits")["three-digits.wav"]
STATUSES = {200, 400, 406, 413, 415}
SLOWEST = 20  # seconds of processor time for one request: a hang, not a speed
MOST_MEMORY = 1_000_000_000  # bytes more than before, after any request


@pytest.fixture(scope="module")
def strict(digits_pt) -> Worker:
    """A worker that takes a minute of audio at most."""
    return Worker(digits_pt, {"max_audio_seconds": 60})


def memory() -> int:
    """What this process has in memory, in bytes."""
    return psutil.Process().memory_info().rss


def test_every_request_is_answered_and_the_next_one_is_right(strict, speech, caplog, request):
    caplog.set_level(logging.INFO)
    before, seen = memory(), set()
    for number, (fields, headers) in enumerate(requests_of(speech, request.config.getoption("fuzz"), seed=1)):
        started = time.process_time()
        [(status, body)] = strict.answer(fields, headers=headers)
        assert time.process_time() - started < SLOWEST, number
        assert status in STATUSES, (number, status, body)
        assert memory() - before < MOST_MEMORY, number
        seen.add(status)
        if status != 200:
            assert body.keys() == {"code", "type", "message"} and body["code"] == status, number
        assert "METRICS" not in str(body) + caplog.text, number
        caplog.clear()
        if number % 20 == 0:
            assert strict.transcribe(THREE_DIGITS) == TEXT, number
    assert seen == STATUSES


def test_the_good_ones_of_a_mixed_batch_get_what_they_get_alone(strict, speech):
    cases = requests_of(speech, 600, seed=2)
    good = [(file, text) for file, text in transcripts("digits").items()]
    for number in range(200):
        batch = [next(cases)[0] for _ in range(3)]
        file, text = good[number % len(good)]
        batch.insert(number % 4, {"body": (SAMPLES / file).read_bytes()})
        answers = strict.answer(*batch)
        assert answers[number % 4] == (200, text)
        assert {status for status, _ in answers} <= STATUSES
        for fields, answer in zip(batch, answers, strict=True):
            if number % 10 == 0:
                assert strict.answer(fields) == [answer]
