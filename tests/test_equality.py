"""The exported engine finds the tokens that torchaudio's own pipeline finds."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, Worker, needs_bundle_assets, transcripts
from torchaudio.models import RNNTBeamSearch, emformer_rnnt_base
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

import export_model

ALL_SAMPLES = [*transcripts("digits"), *transcripts("librispeech")]
REAL_SPEECH = Path(os.environ.get("REAL_SPEECH", "nowhere"))
CHECKPOINT = Path(torch.hub.get_dir()) / "torchaudio" / EMFORMER_RNNT_BASE_LIBRISPEECH._rnnt_path


def reference_tokens(model: torch.nn.Module, bundle, waveform: torch.Tensor, beam_width: int) -> list[int]:
    """Tokens of torchaudio's own extractor and unscripted ``RNNTBeamSearch``."""
    search = RNNTBeamSearch(model.eval(), model.joiner.linear.out_features - 1)
    with torch.inference_mode():
        features, length = bundle.get_feature_extractor()(waveform)
        return search(features, length, beam_width)[0][0]


def engine_tokens(worker: Worker, waveform: torch.Tensor, beam_width: int) -> list[int]:
    with torch.inference_mode():
        features, length = worker.handler.extract_features(waveform)
        return worker.handler.model(features, length, beam_width)[0][0]


@pytest.mark.parametrize("beam_width", [1, 10])
@pytest.mark.parametrize("file", ALL_SAMPLES)
def test_the_digits_model_finds_torchaudios_tokens(worker, file, beam_width):
    bundle = dataclasses.replace(
        EMFORMER_RNNT_BASE_LIBRISPEECH, _global_stats_path=str(export_model.DIGITS / "global_stats.json")
    )
    waveform = worker.handler._waveform((SAMPLES / file).read_bytes())
    expected = reference_tokens(export_model.digits(None)[0], bundle, waveform, beam_width)
    assert len(expected) > 1
    assert engine_tokens(worker, waveform, beam_width) == expected


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> tuple[torch.nn.Module, Worker]:
    """The 76.7M-parameter network with random weights that emit tokens at the rate of speech, and its export."""
    torch.manual_seed(0)
    model = emformer_rnnt_base(num_symbols=4097).eval()
    model.joiner.linear.bias.data[4096] += 1.65
    folder = tmp_path_factory.mktemp("librispeech")
    torch.save(model.state_dict(), folder / "stand-in.pt")
    export_model.export("librispeech", folder / "emformer_rnnt.pt", checkpoint=folder / "stand-in.pt")
    return model, Worker(folder / "emformer_rnnt.pt")


@needs_bundle_assets
@pytest.mark.parametrize("beam_width", [1, 10])
@pytest.mark.parametrize("file", ALL_SAMPLES)
def test_the_full_architecture_finds_torchaudios_tokens(stand_in, file, beam_width):
    model, worker = stand_in
    waveform = worker.handler._waveform((SAMPLES / file).read_bytes())
    expected = reference_tokens(model, EMFORMER_RNNT_BASE_LIBRISPEECH, waveform, beam_width)
    assert len(expected) > 1
    assert engine_tokens(worker, waveform, beam_width) == expected


@needs_bundle_assets
@pytest.mark.skipif(
    not REAL_SPEECH.is_dir(), reason="needs real recordings: REAL_SPEECH=folder with LibriSpeech .flac files"
)
@pytest.mark.parametrize("beam_width", [1, 10])
def test_real_speech_gives_torchaudios_tokens(stand_in, beam_width):
    model, worker = stand_in
    recordings = sorted(REAL_SPEECH.rglob("*.flac"))
    assert recordings
    for recording in recordings:
        waveform = worker.handler._waveform(recording.read_bytes())
        expected = reference_tokens(model, EMFORMER_RNNT_BASE_LIBRISPEECH, waveform, beam_width)
        assert engine_tokens(worker, waveform, beam_width) == expected


@needs_bundle_assets
@pytest.mark.skipif(not CHECKPOINT.is_file(), reason=f"needs {CHECKPOINT.name} (293 MB) in the torch hub cache")
@pytest.mark.skipif(
    not list(REAL_SPEECH.rglob("1089-134686-0000.flac")),
    reason="needs a real recording: REAL_SPEECH=folder with LibriSpeech's 1089-134686-0000.flac",
)
def test_the_real_librispeech_model_transcribes_the_public_sample(tmp_path):
    export_model.export("librispeech", tmp_path / "emformer_rnnt.pt")
    [recording] = REAL_SPEECH.rglob("1089-134686-0000.flac")
    assert Worker(tmp_path / "emformer_rnnt.pt").transcribe(recording.read_bytes()) == (
        "he hoped there would be stew for dinner turnips and carrots and bruised potatoes and fat mutton pieces "
        "to be ladled out in thick peppered flour fat and sauce"
    )


def test_streaming_segment_by_segment_finds_torchaudios_tokens(worker, speech):
    """``infer`` keeps torchaudio's meaning, and leaves the state it is given as it was."""
    model = export_model.digits(None)[0].eval()
    reference = RNNTBeamSearch(model, 14)
    with torch.inference_mode():
        features, _ = worker.handler.extract_features(speech)
        length = torch.tensor([20])
        state = expected_state = hypotheses = expected = None
        for start in range(0, len(features) - 20, 16):
            segment = features[start : start + 20]
            before = [[part.clone() for part in layer] for layer in state] if state else None
            again = state
            expected, expected_state = reference.infer(segment, length, 4, expected_state, expected)
            hypotheses, state = worker.handler.model.infer(segment, length, 4, state, hypotheses)
            assert [h[0] for h in hypotheses] == [h[0] for h in expected]
            if before:
                assert all(
                    torch.equal(a, b)
                    for old, kept in zip(before, again, strict=True)
                    for a, b in zip(old, kept, strict=True)
                )
    assert worker.handler.tokens_to_text(hypotheses[0][0]) == transcripts("digits")["three-digits.wav"]


@pytest.mark.parametrize("frames", range(8))
def test_features_too_short_for_one_encoder_frame_give_no_token(worker, frames):
    with torch.inference_mode():
        hypotheses = worker.handler.model(torch.zeros(frames, 80), torch.tensor([frames]), 4)
    assert hypotheses[0][0] == [14]
