"""The engine gives what torchaudio gives, encodings to rounding and beams token for token, however the audio is cut.

Token for token means: a beam holds the token lists that torchaudio's RNNTBeamSearch finds with the same weights, the
same one is the best, and their scores differ by no more than rounding errors (SCORE), which is also all that may have
changed the order of the others. Both compute in single precision, and there the last bit can decide: over digital
silence, for instance, whether a second alignment of the same tokens, as likely as the first, is counted, which makes
ln 2 in the score, and from there on other hypotheses.
torchaudio in single precision then finds different things on different processors. So wherever the two part, torchaudio
in double precision is the judge: the engine has to have found what it finds. Where that, too, hangs on rounding errors
it is a near-tie: torchaudio in double precision has to find the same when its log-probabilities are moved by as much.
How often that was needed is printed at the end of the run, and near-ties may be one beam in a hundred.
"""

import contextlib
import copy
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from conftest import ALL_SAMPLES, transcripts
from torchaudio.models import RNNT, Hypothesis, RNNTBeamSearch, emformer_rnnt_model
from torchaudio.models.emformer import _EmformerAttention

import export_model
from engine.decoder import Decoder
from engine.precision import PRECISIONS, with_precision
from engine.search import float32

QUICK = ["three-digits.wav", "phone-number.flac", "pin.webm", "room-number.ogg"]
NOT_QUICK = [file for file in ALL_SAMPLES if file not in QUICK]
SCORE = {"abs": 1e-3, "rel": 1e-5}  # natural logarithms of probabilities, of order 1 to 1000
ORDER = {"abs": 1e-4, "rel": 1e-5}  # the same, divided by the number of tokens
COMPARED = {"beams": 0, "tokens of the best": 0, "decided in double precision": 0, "near-ties": 0}
STRIDE, SEGMENT = 4, 4  # feature frames in an encoder frame; encoder frames
ARCHITECTURE = json.loads((export_model.DIGITS / "architecture.json").read_text())  # of the digits model
LEFT_CONTEXT = ARCHITECTURE["transformer_left_context_length"]  # encoder frames
BLANK = 14


def scripted(model: RNNT, precision: str = "fp32") -> torch.jit.ScriptModule:
    """The engine as it is exported."""
    model = copy.deepcopy(model).eval()
    return torch.jit.script(with_precision(Decoder(model, model.joiner.linear.out_features - 1), precision))


@pytest.fixture(scope="module")
def digits() -> RNNT:
    return export_model.digits(None)[0].eval()


@pytest.fixture(scope="module")
def engines(digits) -> Callable[[str], torch.jit.ScriptModule]:
    """From a precision to the engine: TorchScript takes longer to compile and to profile it than most tests need it."""
    return functools.cache(lambda precision: scripted(digits, precision))


@pytest.fixture(scope="module")
def engine(engines) -> torch.jit.ScriptModule:
    return engines("fp32")


@pytest.fixture(scope="module")
def reference(digits) -> "Reference":
    return Reference(digits)


def random_features(encoder_frames: int, seed: int = 0) -> torch.Tensor:
    """(T, 80) that give so many encoder frames, their right context included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STRIDE * (encoder_frames + 1), 80, generator=generator)


def encodings(engine: torch.nn.Module, features: torch.Tensor, window_segments: int = 1_000_000) -> torch.Tensor:
    """(frames, D): the engine's encoder alone, in windows of so many segments."""
    pieces, past = [], engine.encoder.empty_past(1)
    segments = engine.encoder.segments(features)
    for first in range(0, segments, window_segments):
        window = [(0, first, min(first + window_segments, segments))]
        [piece], past = engine._encode([features], window, past)
        pieces.append(piece)
    return torch.cat(pieces)


@contextlib.contextmanager
def windows_of(engine: torch.jit.ScriptModule, segments: int) -> Iterator[None]:
    """Let the engine encode so many segments at once."""
    usual, engine.window_segments = engine.window_segments, segments
    try:
        yield
    finally:
        engine.window_segments = usual


class Shaken(RNNTBeamSearch):
    """torchaudio's search, every log-probability moved at random by up to 0.00005, as rounding errors move it."""

    generator = torch.Generator().manual_seed(0)

    def _gen_next_token_probs(self, *args) -> torch.Tensor:
        log_probs = super()._gen_next_token_probs(*args)
        return log_probs + 1e-4 * (torch.rand(log_probs.shape, generator=self.generator) - 0.5)


class Reference:
    """torchaudio's search with one model, in single and in double precision."""

    def __init__(self, model: RNNT) -> None:
        self.model, self.blank = model, model.joiner.linear.out_features - 1
        self.single = RNNTBeamSearch(model, self.blank)

    @functools.cached_property
    def double(self) -> RNNTBeamSearch:
        return RNNTBeamSearch(copy.deepcopy(self.model).double(), self.blank)

    @functools.cached_property
    def shaken(self) -> Shaken:
        return Shaken(self.double.model, self.blank)

    def assert_same_beams(self, engine: torch.nn.Module, features: torch.Tensor, beam_widths: Iterable[int]) -> int:
        """The engine's beams for (T, 80) are torchaudio's; returns the number of tokens in their best hypotheses.

        What RNNTBeamSearch does, in its two steps, so that a recording is encoded once for all beam widths.
        """
        length, emitted = torch.tensor([len(features)]), 0

        @functools.cache
        def encoded(dtype: torch.dtype) -> torch.Tensor:
            model = self.model if dtype == torch.float32 else self.double.model
            return model.transcribe(features.unsqueeze(0).to(dtype), length)[0]

        with torch.inference_mode():
            for beam_width in beam_widths:
                found = engine(features, length, beam_width)
                single = self.single._search(encoded(torch.float32), None, beam_width)
                self.assert_same(
                    found, single, lambda search, width=beam_width: search._search(encoded(torch.float64), None, width)
                )
                emitted += len(found[0][0]) - 1
        return emitted

    def assert_same(
        self,
        found: list[Hypothesis],
        single: list[Hypothesis],
        in_double_precision: Callable[[RNNTBeamSearch], list[Hypothesis]],
    ) -> None:
        """The engine's beam is torchaudio's, token for token as this file's head defines it.

        Args:
            found: the engine's.
            single: torchaudio's in single precision.
            in_double_precision: what ``double`` or ``shaken`` finds.
        """
        COMPARED["beams"] += 1
        COMPARED["tokens of the best"] += len(found[0][0]) - 1
        if is_same(found, single):
            return
        COMPARED["decided in double precision"] += 1
        double = in_double_precision(self.double)
        if is_same(found, double):
            return
        COMPARED["near-ties"] += 1
        near = any(is_same(found, in_double_precision(self.shaken)) for _ in range(16))
        assert near, [[(tokens, score) for tokens, _, _, score in beam] for beam in (found, single, double)]


def is_same(found: list[Hypothesis], expected: list[Hypothesis]) -> bool:
    """Whether two beams are the same, token for token as this file's head defines it."""

    def scores(beam: list[Hypothesis]) -> dict[tuple[int, ...], float]:
        return {tuple(tokens): score for tokens, _, _, score in beam}

    def order(beam: list[Hypothesis]) -> list[float]:
        return [score / (len(tokens) + 1) for tokens, _, _, score in beam]

    return (
        found[0][0] == expected[0][0]
        and scores(found) == pytest.approx(scores(expected), **SCORE)
        and order(found) == pytest.approx(order(expected), **ORDER)
    )


def assert_few_near_ties(record_property: Callable[[str, object], None]) -> None:
    """Of all that the tests before have compared, at most one beam in a hundred."""
    if not COMPARED["beams"]:
        pytest.skip("needs the tests above: it counts what they have compared")
    record_property("compared with torchaudio", ", ".join(f"{number} {what}" for what, number in COMPARED.items()))
    assert COMPARED["near-ties"] <= max(COMPARED["beams"] / 100, 1)


# The encoder


@pytest.mark.parametrize("window_segments", [1, 5, 8, 1_000_000])
def test_encodings_are_those_of_the_masked_forward_at_every_boundary(digits, engine, window_segments):
    around = [SEGMENT * 5, LEFT_CONTEXT, LEFT_CONTEXT + SEGMENT, 2 * SEGMENT * 8]
    lengths = [*range(1, 10), *(length + more for length in around for more in (-1, 0, 1)), 200]
    with torch.inference_mode():
        for frames in lengths:
            features = random_features(frames)
            expected, _ = digits.transcribe(features.unsqueeze(0), torch.tensor([len(features)]))
            found = encodings(engine, features, window_segments)
            assert found.shape == expected[0].shape == (frames, digits.joiner.linear.in_features)
            assert (found - expected[0]).abs().max() < 2e-5


def test_encodings_are_exact_in_double_precision(digits, monkeypatch):
    def softmax(self, weights, mask, padding_mask):  # torchaudio's, without its rounding to float32
        return weights.masked_fill(mask.unsqueeze(0), self.negative_inf).softmax(dim=-1)

    monkeypatch.setattr(_EmformerAttention, "_gen_attention_probs", softmax)
    model = copy.deepcopy(digits).double()
    engine = Decoder(copy.deepcopy(model), BLANK).eval()
    with torch.inference_mode():
        for frames, window_segments in ((3, 8), (LEFT_CONTEXT + 1, 8), (250, 8), (250, 100)):
            features = random_features(frames).double()
            expected, _ = model.transcribe(features.unsqueeze(0), torch.tensor([len(features)]))
            assert (encodings(engine, features, window_segments) - expected[0]).abs().max() < 1e-9


GEOMETRIES = [
    {"segment_length": 16, "right_context_length": 4, "transformer_left_context_length": 30},
    {"segment_length": 12, "right_context_length": 8, "transformer_left_context_length": 7},
    {"segment_length": 20, "right_context_length": 0, "transformer_left_context_length": 5},
    {"segment_length": 4, "right_context_length": 4, "transformer_left_context_length": 0, "lstm_layer_norm": False},
    {"segment_length": 8, "right_context_length": 12, "transformer_left_context_length": 2, "num_lstm_layers": 3},
    {"transformer_activation": "relu", "transformer_tanh_on_mem": True, "num_symbols": 4, "symbol_embedding_dim": 16},
]


@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_other_architectures_give_torchaudios_encodings_and_whole_beams(changes):
    torch.manual_seed(0)
    small = {"transformer_num_layers": 3, "encoding_dim": 32, "time_reduction_input_dim": 16}
    model = emformer_rnnt_model(**ARCHITECTURE | small | changes).eval()
    engine = scripted(model)
    reference = Reference(model)
    with torch.inference_mode():
        for frames in (1, 2, 5, 8, 16, 61, 203):
            features = random_features(frames - 1 + engine.encoder.right_context)
            expected, _ = model.transcribe(features.unsqueeze(0), torch.tensor([len(features)]))
            for window_segments in (1, 4, 100):
                found = encodings(engine, features, window_segments)
                assert found.shape == expected[0].shape
                assert (found - expected[0]).abs().max() < 2e-5
            reference.assert_same_beams(engine, features, (1, 3))


def test_an_encoder_frame_depends_on_nothing_after_its_right_context(engine):
    features = random_features(100)
    changed = features.clone()
    changed[STRIDE * 41 :] += 1  # the segment of frames 36 to 39 sees frame 40
    with torch.inference_mode():
        difference = (encodings(engine, features) - encodings(engine, changed)).abs().amax(1)
    assert difference[:40].max() < 1e-5
    assert difference[40:].min() > 1e-2


# The search


# torchaudio takes a second and a half for each: half of them wait for `make test`.
@pytest.mark.parametrize("file", [*QUICK, *(pytest.param(file, marks=pytest.mark.slow) for file in NOT_QUICK)])
def test_every_sample_gives_torchaudios_beams_of_every_width(reference, engine, features, file):
    widths = range(1, BLANK + 1)
    assert reference.assert_same_beams(engine, features[file], widths) > 2 * len(widths)


@pytest.mark.slow
def test_a_hundred_strings_give_torchaudios_beams(reference, engine, worker, samples):
    """Strings of pieces of the samples at random, at random levels, in noise, cut anywhere."""
    generator = torch.Generator().manual_seed(0)

    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def string() -> torch.Tensor:
        pieces = []
        for _ in range(int(number(1, 4))):
            waveform = samples[ALL_SAMPLES[int(number(0, len(ALL_SAMPLES)))]]
            begin, length = int(number(0, len(waveform))), int(number(0.2, 2.5) * 16_000)
            pieces += [number(0.2, 1.5) * waveform[begin : begin + length], torch.zeros(int(number(0, 8_000)))]
        waveform = torch.cat(pieces)
        return waveform + number(0, 0.01) * torch.randn(len(waveform), generator=generator)

    strings = [worker.handler._features(string()) for _ in range(100)]
    emitted = [
        reference.assert_same_beams(engine, utterance, (1, 2 + i % (BLANK - 1))) for i, utterance in enumerate(strings)
    ]
    assert sum(emitted) > 2 * 2 * len(strings)


def test_a_model_that_never_stops_emitting_is_stopped_where_torchaudio_stops_it(digits):
    """After 100 tokens in a frame."""
    talkative = copy.deepcopy(digits)
    talkative.joiner.linear.bias.data[BLANK] -= 60
    widths = (1, 3)
    emitted = Reference(talkative).assert_same_beams(scripted(talkative), random_features(3), widths)
    assert emitted > 200 * len(widths)


def test_scores_are_rounded_to_single_precision():
    generator = torch.Generator().manual_seed(0)
    numbers = 100 * torch.randn(1000, generator=generator, dtype=torch.float64)
    assert [float32(number) for number in numbers.tolist()] == numbers.float().double().tolist()
    assert [float32(-math.inf), float32(0.0)] == [-math.inf, 0.0]


@pytest.mark.parametrize("window_segments", [1, 2, 7, 96])
def test_windows_change_no_token(engine, features, window_segments):
    utterance = features["phone-number.flac"]
    for beam_width in (1, 5):
        with torch.inference_mode():
            whole = engine.decode([utterance], beam_width)[0]
            with windows_of(engine, window_segments):
                windowed = engine.decode([utterance], beam_width)[0]
        assert len(whole.hypotheses) == beam_width
        assert is_same(windowed.hypotheses, whole.hypotheses)
        assert (windowed.frames, windowed.searched) == (whole.frames, whole.searched)


@pytest.mark.slow
def test_minutes_of_audio_give_torchaudios_beams(reference, engine, worker, samples):
    """More than one window, more than one piece of features."""
    waveform = torch.cat([samples[file] for file in ALL_SAMPLES] * 3)
    assert len(waveform) > 90 * 16_000
    assert reference.assert_same_beams(engine, worker.handler._features(waveform), (1, 4)) > 100


def test_speech_cut_at_every_boundary_gives_torchaudios_beams(reference, engine, features):
    """1 to 9 encoder frames; one more and one less than segments, the left context, and windows of 8 segments."""
    speech = features["zero-to-nine.mp3"]
    around = [5 * SEGMENT, LEFT_CONTEXT, LEFT_CONTEXT + SEGMENT, 8 * SEGMENT, 16 * SEGMENT]
    lengths = [*range(1, 10), *(length + more for length in around for more in (-1, 0, 1))]
    with windows_of(engine, 8):
        emitted = [reference.assert_same_beams(engine, speech[: STRIDE * (frames + 1)], (1, 4)) for frames in lengths]
    assert sum(emitted) > 50


@pytest.mark.parametrize("frames", range(2 * STRIDE))
def test_features_too_short_for_one_encoder_frame_give_no_token(engine, frames):
    with torch.inference_mode():
        hypotheses = engine(torch.zeros(frames, 80), torch.tensor([frames]), 4)
    assert [h[0] for h in hypotheses] == [[BLANK]]


def test_a_beam_wider_than_the_vocabulary_is_cut(engine, features):
    utterance = features["three-digits.wav"]
    with torch.inference_mode():
        widest, wider = (engine.decode([utterance], beam)[0].hypotheses for beam in (14, 20))
    assert [h[0] for h in wider] == [h[0] for h in widest]


# Where the tokens were emitted


def test_frames_and_log_probabilities_are_those_of_the_model(digits, engine, features):
    for file in ("phone-number.flac", "sentence.wav"):
        utterance = features[file]
        with torch.inference_mode():
            beam = engine.decode([utterance], 4)[0]
            encoded = encodings(engine, utterance)
            for (tokens, *_), frames, log_probs in zip(beam.hypotheses, beam.frames, beam.log_probs, strict=True):
                assert len(tokens) - 1 == len(frames) == len(log_probs) > 3
                assert frames == sorted(frames) and frames[0] >= 0 and frames[-1] < len(encoded)
                predicted, _, _ = digits.predict(torch.tensor([tokens]), torch.tensor([len(tokens)]), None)
                joined = digits.joiner.linear(torch.relu(encoded[frames] + predicted[0, :-1])).log_softmax(1)
                expected = joined[torch.arange(len(frames)), tokens[1:]]
                torch.testing.assert_close(torch.tensor(log_probs), expected, atol=1e-4, rtol=1e-4)


def test_two_seconds_of_silence_before_the_speech_move_every_token_by_two_seconds(engine, worker, samples):
    waveform = samples["three-digits.wav"]
    late = torch.cat([torch.zeros(2 * 16_000), waveform])
    with torch.inference_mode():
        frames, moved = (engine.decode([worker.handler._features(w)], 1)[0].frames[0] for w in (waveform, late))
    assert all(abs(b - a - 50) <= 2 for a, b in zip(frames, moved, strict=True))  # 50 frames of 40 ms


# Batches


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_gives_what_each_utterance_gives_alone(engines, features, precision):
    """Unequal lengths: none at all, less than a segment, odd ends, more than a window."""
    engine = engines(precision)
    speech = list(features.values())
    batch = [speech[0], random_features(0), random_features(3), *speech[1:], torch.cat([*speech, speech[0][:37]])]
    for beam_width in (1, 4):
        with torch.inference_mode():
            together = engine.decode(batch, beam_width)
            alone = [engine.decode([utterance], beam_width)[0] for utterance in batch]
        for one, other in zip(together, alone, strict=True):
            assert is_same(one.hypotheses, other.hypotheses)
            assert one.frames == other.frames
        assert [len(beam.hypotheses[0][0]) > 1 for beam in together if beam.searched > 3] == [True] * (len(speech) + 1)


def test_short_utterances_share_a_window(engine):
    segments = [5, 0, 7, 90]
    [together, rest] = engine._windows(segments)
    assert [utterance for utterance, _, _ in together] == [0, 2, 3]
    assert sum(last - first for _, first, last in together + rest) == sum(segments)


def bits(beam) -> tuple:
    """All of a beam that somebody reads: tokens, scores, frames, log-probabilities."""
    return [(tokens, score) for tokens, _, _, score in beam.hypotheses], beam.frames, beam.log_probs


def streamed(
    engine: torch.jit.ScriptModule,
    utterances: list[torch.Tensor],
    beam_width: int,
    seed: int,
    contexts: list[tuple | None] | None = None,
) -> list[tuple]:
    """``bits`` of utterances that come in pieces of 1 to 60 feature frames, all of them at once while they last."""
    generator = torch.Generator().manual_seed(seed)
    streams, heard = [engine.begin() for _ in utterances], [0] * len(utterances)
    settled: list[tuple[list, list, list]] = [([], [], []) for _ in utterances]
    while speaking := [i for i, utterance in enumerate(utterances) if heard[i] < len(utterance)]:
        pieces = []
        for i in speaking:
            size = int(torch.randint(1, 61, (), generator=generator))
            pieces.append(utterances[i][heard[i] : heard[i] + size])
            heard[i] += size
        ended = [heard[i] >= len(utterances[i]) for i in speaking]
        expected = [contexts[i] if contexts else None for i in speaking]
        advanced = engine.advance([streams[i] for i in speaking], pieces, ended, beam_width, expected)
        for i, stream in zip(speaking, advanced, strict=True):
            streams[i] = stream
            for so_far, new in zip(settled[i], stream[4], strict=True):
                so_far += new
    found = []
    for (tokens, frames, log_probs), (_, _, _, (hypotheses, last_frames, last_log_probs, *_), _) in zip(
        settled, streams, strict=True
    ):
        found.append(
            (
                [(h[0][:1] + tokens + h[0][1:], h[3]) for h in hypotheses],
                [frames + each for each in last_frames],
                [log_probs + each for each in last_log_probs],
            )
        )
    return found


@pytest.mark.parametrize("beam_width", [1, 4, 10])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_no_company_changes_a_bit_at_less_than_single_precision(engines, features, precision, beam_width):
    """Alone, in a batch, in windows of any size, in pieces of streams beside others: the same scores to the bit."""
    engine = engines(precision)
    utterances = [features["three-digits.wav"], random_features(0), random_features(37), features["phone-number.flac"]]
    with torch.inference_mode():
        alone = [bits(engine.decode([utterance], beam_width)[0]) for utterance in utterances]
        assert [bits(beam) for beam in engine.decode(utterances, beam_width)] == alone
        assert [bits(beam) for beam in engine.decode(utterances[::-1], beam_width)] == alone[::-1]
        for window_segments in (1, 2, 7):
            with windows_of(engine, window_segments):
                assert [bits(beam) for beam in engine.decode(utterances, beam_width)] == alone
        for seed in (0, 1):
            assert streamed(engine, utterances, beam_width, seed) == alone
        assert streamed(engine, utterances[:1], beam_width, 2) == alone[:1]
    assert len(alone[0][0][0][0]) > 3


def test_forward_gives_the_hypotheses_of_decode_also_outside_inference_mode(engine, features):
    utterance = features["three-digits.wav"]
    with torch.inference_mode():
        expected = engine.decode([utterance], 3)[0].hypotheses
    for shaped in (utterance.clone(), utterance.clone().unsqueeze(0)):
        for length in (torch.tensor(len(utterance)), torch.tensor([len(utterance)])):
            found = engine(shaped, length, 3)
            assert [(h[0], h[3]) for h in found] == [(h[0], h[3]) for h in expected]


# Streaming


def as_type(hypotheses: list[Hypothesis], dtype: torch.dtype) -> list[Hypothesis]:
    """The same hypotheses, for a model of another precision."""
    return [
        (tokens, output.to(dtype), [[part.to(dtype) for part in layer] for layer in state], score)
        for tokens, output, state, score in hypotheses
    ]


@pytest.mark.parametrize("beam_width", [1, 4, 10])
def test_streaming_segment_by_segment_gives_torchaudios_beams(engine, reference, features, worker, beam_width):
    """``infer`` keeps torchaudio's meaning, and leaves the state it is given as it was."""
    utterance, length = features["three-digits.wav"], torch.tensor([20])
    state = single_state = double_state = hypotheses = single = double = None

    def torchaudios(search, segment, state, hypotheses):
        """With a copy of the state, which torchaudio changes."""
        return search.infer(segment, length, beam_width, copy.deepcopy(state), hypotheses)

    with torch.inference_mode():
        for start in range(0, len(utterance) - 20, 16):
            segment = utterance[start : start + 20]
            given, before = state, copy.deepcopy(state)
            hypotheses, state = engine.infer(segment, length, beam_width, state, hypotheses)
            if given is not None:
                torch.testing.assert_close(given, before, atol=0, rtol=0)
            so_far = (segment.double(), double_state, double)
            single, single_state = torchaudios(reference.single, segment, single_state, single)
            double, double_state = torchaudios(reference.double, *so_far)
            reference.assert_same(hypotheses, single, lambda search, so_far=so_far: torchaudios(search, *so_far)[0])
            # Whoever has parted from double precision goes on from there, or all that follows would differ.
            hypotheses, single = (
                own if is_same(own, double) else as_type(double, torch.float32) for own in (hypotheses, single)
            )
    assert worker.handler.tokens_to_text(hypotheses[0][0]) == transcripts("digits")["three-digits.wav"]


@pytest.mark.parametrize("beam_width", [1, 4])
def test_streaming_ends_with_the_tokens_of_forward(engine, features, beam_width):
    for utterance in features.values():
        whole_segments = utterance[: 16 * ((len(utterance) - 4) // 16) + 4]
        state = hypotheses = None
        with torch.inference_mode():
            for start in range(0, len(whole_segments) - 4, 16):
                segment = whole_segments[start : start + 20]
                hypotheses, state = engine.infer(segment, torch.tensor(20), beam_width, state, hypotheses)
            expected = engine(whole_segments, torch.tensor([len(whole_segments)]), beam_width)
        assert is_same(hypotheses, expected)


def test_what_has_another_shape_is_refused(digits, engine):
    features, length = random_features(9), torch.tensor([40])
    for call, message in (
        (lambda: engine.infer(features[:16], torch.tensor([16]), 1), "one segment and its right context"),
        (lambda: engine(features[:, :40], length, 1), r"features must be of shape"),
        (lambda: engine(features.expand(2, -1, -1), length, 1), r"input must be of shape"),
        (lambda: engine(features, torch.tensor([40, 40]), 1), r"length must be of shape"),
        (lambda: engine.decode([features, features.unsqueeze(0)], 1), r"features must be of shape"),
        (lambda: engine(features, length, 0), r"beam_width must be at least 1"),
    ):
        with pytest.raises(torch.jit.Error, match=message):
            call()
    with pytest.raises(ValueError, match="last one of the vocabulary"):
        Decoder(digits, 0)
    with pytest.raises(ValueError, match="fp32, bf16, int8"):
        scripted(digits, "fp16")


# What the handler feeds it


@pytest.mark.parametrize("hops_more", [-4, -1, 0, 1, 3])
def test_features_in_windows_are_those_of_the_whole(worker, hops_more):
    generator = torch.Generator().manual_seed(hops_more + 9)
    for samples_more in (0, 1, 159):
        waveform = torch.randn(160 * (4 * 96 * 16 + hops_more) + samples_more, generator=generator)
        expected, _ = worker.handler.extract_features(waveform)
        windows, ended = zip(*worker.handler._windows(waveform), strict=True)
        found = torch.cat(windows)
        assert len(windows) in (4, 5) and ended == (False,) * (len(windows) - 1) + (True,)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# All of them


def test_near_ties_are_at_most_one_beam_in_a_hundred(record_property):
    assert_few_near_ties(record_property)
