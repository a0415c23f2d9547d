"""The engine gives what torchaudio gives, encodings to rounding and tokens exactly, however the audio is cut."""

import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Worker, needs_bundle_assets, transcripts
from torchaudio.models import RNNT, Hypothesis, RNNTBeamSearch, emformer_rnnt_base, emformer_rnnt_model
from torchaudio.models.emformer import _EmformerAttention
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

import export_model
from engine.decoder import Decoder
from engine.precision import PRECISIONS, with_precision
from engine.search import float32
from handler import decode_audio

ALL_SAMPLES = [*transcripts("digits"), *transcripts("librispeech")]
REAL_SPEECH = Path(os.environ.get("REAL_SPEECH", "nowhere"))
CHECKPOINT = Path(torch.hub.get_dir()) / "torchaudio" / EMFORMER_RNNT_BASE_LIBRISPEECH._rnnt_path
needs_real_speech = pytest.mark.skipif(
    not list(REAL_SPEECH.rglob("1089-134686-0000.flac")),
    reason="needs a real recording: REAL_SPEECH=folder with LibriSpeech's 1089-134686-0000.flac",
)
COMPARED = {"cases": 0, "tokens": 0, "near-ties": 0, "near-ties in beams": 0}
STRIDE, SEGMENT, LEFT_CONTEXT = 4, 4, 30  # feature frames in an encoder frame; encoder frames
BLANK = 14


def scripted(model: RNNT, precision: str = "fp32") -> torch.jit.ScriptModule:
    """The engine as it is exported."""
    model = copy.deepcopy(model).eval()
    return torch.jit.script(with_precision(Decoder(model, model.joiner.linear.out_features - 1), precision))


def stand_in(seed: int) -> RNNT:
    """The 76.7M-parameter network with random weights that emit tokens at about the rate of speech."""
    torch.manual_seed(seed)
    model = emformer_rnnt_base(num_symbols=4097).eval()
    model.joiner.linear.bias.data[4096] += 1.65
    return model


@pytest.fixture(scope="module")
def digits() -> RNNT:
    return export_model.digits(None)[0].eval()


@pytest.fixture(scope="module")
def engine(digits) -> torch.jit.ScriptModule:
    return scripted(digits)


@pytest.fixture(scope="module")
def samples(worker) -> dict[str, torch.Tensor]:
    """File name -> (samples,) at 16 kHz."""
    return {file: decode_audio((SAMPLES / file).read_bytes()) for file in ALL_SAMPLES}


@pytest.fixture(scope="module")
def features(worker, samples) -> dict[str, torch.Tensor]:
    """File name -> (T, 80)."""
    return {file: worker.handler._features(waveform) for file, waveform in samples.items()}


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


class Shaken(RNNTBeamSearch):
    """torchaudio's search, every log-probability moved at random by up to 0.00025."""

    def _gen_next_token_probs(self, *args) -> torch.Tensor:
        log_probs = super()._gen_next_token_probs(*args)
        return log_probs + 5e-4 * (torch.rand_like(log_probs) - 0.5)


def token_lists(hypotheses: list[Hypothesis]) -> list[list[int]]:
    return [hypothesis[0] for hypothesis in hypotheses]


def is_near_tie(model: RNNT, utterance: torch.Tensor, beam_width: int, found: list[list[int]]) -> bool:
    """Whether torchaudio itself finds ``found``, the best or all, when its scores move by rounding errors' worth."""
    search, length = Shaken(model, model.joiner.linear.out_features - 1), torch.tensor(len(utterance))
    return any(token_lists(search(utterance, length, beam_width))[: len(found)] == found for _ in range(16))


def assert_same_beam(
    model: RNNT, utterance: torch.Tensor, beam_width: int, found: list[Hypothesis], expected: list[Hypothesis]
) -> None:
    """All hypotheses are torchaudio's, near-ties apart, which are counted."""
    if token_lists(found) != token_lists(expected):
        assert is_near_tie(model, utterance, beam_width, token_lists(found)), token_lists(expected)
        COMPARED["near-ties in beams"] += 1


def assert_same_tokens(model: RNNT, engine: torch.nn.Module, cases: Iterator[tuple[torch.Tensor, int]]) -> None:
    """The engine's tokens are those of torchaudio's search, near-ties apart, which are counted."""
    reference = torch.jit.script(RNNTBeamSearch(model, model.joiner.linear.out_features - 1))
    count = emitted = 0
    with torch.inference_mode():
        for utterance, beam_width in cases:
            length = torch.tensor([len(utterance)])
            expected = reference(utterance, length, beam_width)
            found = engine(utterance, length, beam_width)
            count, emitted = count + 1, emitted + len(expected[0][0]) - 1
            if found[0][0] != expected[0][0]:
                assert is_near_tie(model, utterance, beam_width, [found[0][0]]), (count, beam_width)
                COMPARED["near-ties"] += 1
            else:
                assert found[0][3] == pytest.approx(expected[0][3], abs=0.02, rel=1e-5)
    assert emitted > 2 * count
    COMPARED["cases"] += count
    COMPARED["tokens"] += emitted


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
        for frames, window_segments in ((3, 8), (31, 8), (250, 8), (250, 100)):
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
    architecture = json.loads((export_model.DIGITS / "architecture.json").read_text())
    small = {"transformer_num_layers": 3, "encoding_dim": 32, "time_reduction_input_dim": 16}
    model = emformer_rnnt_model(**architecture | small | changes).eval()
    engine = scripted(model)
    search = RNNTBeamSearch(model, model.joiner.linear.out_features - 1)
    with torch.inference_mode():
        for frames in (1, 2, 5, 8, 16, 61, 203):
            features = random_features(frames - 1 + engine.encoder.right_context)
            expected, _ = model.transcribe(features.unsqueeze(0), torch.tensor([len(features)]))
            for window_segments in (1, 4, 100):
                found = encodings(engine, features, window_segments)
                assert found.shape == expected[0].shape
                assert (found - expected[0]).abs().max() < 2e-5
            for beam_width in (1, 3):
                expected_beam = search(features, torch.tensor([len(features)]), beam_width)
                found_beam = engine(features, torch.tensor([len(features)]), beam_width)
                assert_same_beam(model, features, beam_width, found_beam, expected_beam)
                assert [h[3] for h in found_beam] == pytest.approx([h[3] for h in expected_beam], rel=1e-5, abs=1e-4)


def test_an_encoder_frame_depends_on_nothing_after_its_right_context(engine):
    features = random_features(100)
    changed = features.clone()
    changed[STRIDE * 41 :] += 1  # the segment of frames 36 to 39 sees frame 40
    with torch.inference_mode():
        difference = (encodings(engine, features) - encodings(engine, changed)).abs().amax(1)
    assert difference[:40].max() < 1e-5
    assert difference[40:].min() > 1e-2


# The search


@pytest.mark.parametrize("beam_width", range(1, 15))
def test_every_sample_gives_torchaudios_tokens(digits, engine, features, beam_width):
    assert_same_tokens(digits, engine, ((utterance, beam_width) for utterance in features.values()))


def test_a_hundred_strings_give_torchaudios_tokens(digits, engine, worker, samples):
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
    cases = ((utterance, beam) for i, utterance in enumerate(strings) for beam in (1, 2 + i % 13))
    assert_same_tokens(digits, engine, cases)


@pytest.mark.parametrize("seed", range(5))
def test_the_full_architecture_gives_torchaudios_tokens(features, seed):
    model = stand_in(seed)
    cases = ((features[file], beam) for file in ALL_SAMPLES[-5:] for beam in (1, 2, 4, 10))
    assert_same_tokens(model, scripted(model), cases)


def test_every_beam_width_up_to_20_gives_torchaudios_tokens(features):
    model, utterance = stand_in(0), features["three-digits.wav"]
    assert_same_tokens(model, scripted(model), ((utterance, beam) for beam in range(1, 21)))


def test_a_model_that_never_stops_emitting_is_stopped_where_torchaudio_stops_it(digits):
    """After 100 tokens in a frame."""
    talkative = copy.deepcopy(digits)
    talkative.joiner.linear.bias.data[BLANK] -= 60
    features = random_features(3)
    with torch.inference_mode():
        for beam_width in (1, 3):
            expected = RNNTBeamSearch(talkative, BLANK)(features, torch.tensor([16]), beam_width)
            assert len(expected[0][0]) > 200
            found = scripted(talkative)(features, torch.tensor([16]), beam_width)
            assert [h[0] for h in found] == [h[0] for h in expected]


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
            engine.window_segments = window_segments
            try:
                windowed = engine.decode([utterance], beam_width)[0]
            finally:
                engine.window_segments = 96
        assert len(whole.hypotheses) == len(windowed.hypotheses) == beam_width
        assert [h[0] for h in windowed.hypotheses] == [h[0] for h in whole.hypotheses]
        assert (windowed.frames, windowed.searched) == (whole.frames, whole.searched)


def test_minutes_of_audio_give_torchaudios_tokens(digits, engine, worker, samples):
    """More than one window, more than one piece of features."""
    waveform = torch.cat([samples[file] for file in ALL_SAMPLES] * 3)
    assert len(waveform) > 90 * 16_000
    assert_same_tokens(digits, engine, ((worker.handler._features(waveform), beam) for beam in (1, 4)))


def test_speech_cut_at_every_boundary_gives_torchaudios_tokens(digits, features):
    """1 to 9 encoder frames; one more and one less than segments, the left context, and windows of 8 segments."""
    speech, engine = features["zero-to-nine.mp3"], scripted(digits)
    engine.window_segments = 8
    around = [5 * SEGMENT, LEFT_CONTEXT, LEFT_CONTEXT + SEGMENT, 8 * SEGMENT, 16 * SEGMENT]
    search, emitted = RNNTBeamSearch(digits, BLANK), 0
    with torch.inference_mode():
        for frames in [*range(1, 10), *(length + more for length in around for more in (-1, 0, 1))]:
            cut = speech[: STRIDE * (frames + 1)]
            for beam_width in (1, 4):
                expected = search(cut, torch.tensor([len(cut)]), beam_width)
                found = engine(cut, torch.tensor([len(cut)]), beam_width)
                assert_same_beam(digits, cut, beam_width, found, expected)
                emitted += len(expected[0][0]) - 1
    assert emitted > 50


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
def test_a_batch_gives_what_each_utterance_gives_alone(digits, features, precision):
    """Unequal lengths: none at all, less than a segment, odd ends, more than a window."""
    engine = scripted(digits, precision)
    speech = list(features.values())
    batch = [speech[0], random_features(0), random_features(3), *speech[1:], torch.cat([*speech, speech[0][:37]])]
    for beam_width in (1, 4):
        with torch.inference_mode():
            together = engine.decode(batch, beam_width)
            alone = [engine.decode([utterance], beam_width)[0] for utterance in batch]
        for one, other in zip(together, alone, strict=True):
            assert [h[0] for h in one.hypotheses] == [h[0] for h in other.hypotheses]
            assert one.frames == other.frames
            assert [h[3] for h in one.hypotheses] == pytest.approx([h[3] for h in other.hypotheses], abs=1e-3)
        assert [len(beam.hypotheses[0][0]) > 1 for beam in together if beam.searched > 3] == [True] * (len(speech) + 1)


def test_short_utterances_share_a_window_at_fp32_only(digits):
    segments = [5, 0, 7, 90]
    [together, rest] = scripted(digits)._windows(segments)
    assert [utterance for utterance, _, _ in together] == [0, 2, 3]
    assert sum(last - first for _, first, last in together + rest) == sum(segments)
    for precision in ("bf16", "int8"):
        assert scripted(digits, precision)._windows(segments) == [[(0, 0, 5)], [(2, 0, 7)], [(3, 0, 90)]]


def test_a_batch_of_the_full_architecture_gives_what_each_utterance_gives_alone(features):
    engine = scripted(stand_in(1))
    batch = [features[file] for file in ALL_SAMPLES[:4]]
    with torch.inference_mode():
        together = [beam.hypotheses[0][0] for beam in engine.decode(batch, 2)]
        assert together == [engine.decode([utterance], 2)[0].hypotheses[0][0] for utterance in batch]


def test_forward_gives_the_hypotheses_of_decode_also_outside_inference_mode(engine, features):
    utterance = features["three-digits.wav"]
    with torch.inference_mode():
        expected = engine.decode([utterance], 3)[0].hypotheses
    for shaped in (utterance.clone(), utterance.clone().unsqueeze(0)):
        for length in (torch.tensor(len(utterance)), torch.tensor([len(utterance)])):
            found = engine(shaped, length, 3)
            assert [(h[0], h[3]) for h in found] == [(h[0], h[3]) for h in expected]


# Streaming


def test_streaming_segment_by_segment_finds_torchaudios_tokens(digits, engine, features, worker):
    """``infer`` keeps torchaudio's meaning, and leaves the state it is given as it was."""
    utterance = features["three-digits.wav"]
    reference, shaken = RNNTBeamSearch(digits, BLANK), Shaken(digits, BLANK)
    length = torch.tensor([20])
    state = expected_state = hypotheses = expected = None
    with torch.inference_mode():
        for start in range(0, len(utterance) - 20, 16):
            segment = utterance[start : start + 20]
            given, before = state, copy.deepcopy(state)
            hypotheses, state = engine.infer(segment, length, 4, state, hypotheses)
            if given is not None:
                torch.testing.assert_close(given, before, atol=0, rtol=0)
            # torchaudio's changes the state that it is given.
            again = [copy.deepcopy((expected_state, expected)) for _ in range(32)]
            expected, expected_state = reference.infer(segment, length, 4, expected_state, expected)
            if token_lists(hypotheses) != token_lists(expected):
                near = [token_lists(shaken.infer(segment, length, 4, *its)[0]) for its in again]
                assert token_lists(hypotheses) in near
                COMPARED["near-ties in beams"] += 1
                hypotheses = expected  # or the two would part
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
        assert [h[0] for h in hypotheses] == [h[0] for h in expected]


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


def test_near_ties_are_at_most_one_case_in_a_hundred(capsys):
    """What all comparisons above have counted."""
    if not COMPARED["cases"]:
        pytest.skip("needs the tests above: it counts what they have compared")
    with capsys.disabled():
        print(f" {COMPARED} ", end="")
    assert COMPARED["near-ties"] <= max(COMPARED["cases"] / 100, 1)


# What the handler feeds it


@pytest.mark.parametrize("hops_more", [-4, -1, 0, 1, 3])
def test_features_in_pieces_are_those_of_the_whole(worker, hops_more):
    generator = torch.Generator().manual_seed(hops_more + 9)
    for samples_more in (0, 1, 159):
        waveform = torch.randn(160 * (2 * 6000 + hops_more) + samples_more, generator=generator)
        expected, _ = worker.handler.extract_features(waveform)
        found = worker.handler._features(waveform)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# The LibriSpeech model


@needs_bundle_assets
@needs_real_speech
@pytest.mark.parametrize("beam_width", [1, 10])
def test_real_speech_through_the_handler_gives_torchaudios_tokens(tmp_path, beam_width):
    """The 76.7M-parameter architecture, exported from a checkpoint, with the bundle's own features."""
    model = stand_in(0)
    torch.save(model.state_dict(), tmp_path / "stand-in.pt")
    export_model.export("librispeech", tmp_path / "emformer_rnnt.pt", checkpoint=tmp_path / "stand-in.pt")
    handler = Worker(tmp_path / "emformer_rnnt.pt", {"beam_width": beam_width}).handler
    search = RNNTBeamSearch(model, 4096)
    for recording in sorted(REAL_SPEECH.rglob("*.flac")):
        waveform = decode_audio(recording.read_bytes())
        with torch.inference_mode():
            features, length = EMFORMER_RNNT_BASE_LIBRISPEECH.get_feature_extractor()(waveform)
            expected = search(features, length, beam_width)[0][0]
        assert len(expected) > 1
        assert handler._search([handler._features(waveform)])[0][0][0] == expected


@needs_bundle_assets
@pytest.mark.skipif(not CHECKPOINT.is_file(), reason=f"needs {CHECKPOINT.name} (293 MB) in the torch hub cache")
@needs_real_speech
def test_the_real_librispeech_model_transcribes_the_public_sample(tmp_path):
    export_model.export("librispeech", tmp_path / "emformer_rnnt.pt")
    [recording] = REAL_SPEECH.rglob("1089-134686-0000.flac")
    assert Worker(tmp_path / "emformer_rnnt.pt").transcribe(recording.read_bytes()) == (
        "he hoped there would be stew for dinner turnips and carrots and bruised potatoes and fat mutton pieces "
        "to be ladled out in thick peppered flour fat and sauce"
    )
