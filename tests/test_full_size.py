"""The 76.7M-parameter architecture of the LibriSpeech bundle: the engine gives with it what torchaudio gives."""

import os
from pathlib import Path

import pytest
import torch
from conftest import ALL_SAMPLES, Worker, needs_bundle_assets
from test_equality import Reference, assert_few_near_ties, bits, is_same, scripted, streamed, windows_of
from torchaudio.models import RNNT, Hypothesis, emformer_rnnt_base
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

import export_model
from engine.precision import PRECISIONS
from handler import decode_audio

pytestmark = pytest.mark.slow
REAL_SPEECH = Path(os.environ.get("REAL_SPEECH", "nowhere"))
LIBRISPEECH = sorted(REAL_SPEECH.rglob("1089-134686-*.flac"))
CHECKPOINT = Path(torch.hub.get_dir()) / "torchaudio" / EMFORMER_RNNT_BASE_LIBRISPEECH._rnnt_path
needs_real_speech = pytest.mark.skipif(
    not LIBRISPEECH,
    reason="needs a real recording: REAL_SPEECH=folder with LibriSpeech's 1089-134686-0000.flac",
)


def stand_in(seed: int) -> RNNT:
    """The 76.7M-parameter network with random weights that emit tokens at about the rate of speech."""
    torch.manual_seed(seed)
    model = emformer_rnnt_base(num_symbols=4097).eval()
    model.joiner.linear.bias.data[4096] += 1.65
    return model


@pytest.fixture(scope="module", params=range(5), ids="seed {}".format)
def large(request) -> tuple[int, Reference, torch.jit.ScriptModule]:
    """A stand-in, its number and its engine; one at a time, because each takes a gigabyte."""
    model = stand_in(request.param)
    return request.param, Reference(model), scripted(model)


def test_the_full_architecture_gives_torchaudios_beams(large, features):
    """25 pairs of weights and recordings at widths 1, 2 and 4; every other width up to 20 with one of the pairs.

    Of each recording a second and a half, at the other widths one: torchaudio takes as long for them.
    """
    seed, reference, engine = large
    others = [*range(20, 4, -1), 3]
    for place, file in enumerate(ALL_SAMPLES[-5:]):
        pair = 5 * place + seed
        for length, widths in ((150, (1, 2, 4)), (100, others[pair : pair + 1])):
            assert reference.assert_same_beams(engine, features[file][:length], widths) >= 8 * len(widths)


def test_a_batch_of_the_full_architecture_gives_what_each_utterance_gives_alone(large, features):
    _, _, engine = large
    batch = [features[file][:length] for file, length in zip(ALL_SAMPLES, (250, 300, 87, 170), strict=False)]
    with torch.inference_mode():
        together = engine.decode(batch, 2)
        alone = [engine.decode([utterance], 2)[0] for utterance in batch]
    for one, other in zip(together, alone, strict=True):
        assert is_same(one.hypotheses, other.hypotheses)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_no_company_changes_a_bit_of_the_full_architecture(precision, features):
    engine = scripted(stand_in(0), precision)
    utterances = [features[file][:length] for file, length in zip(ALL_SAMPLES, (120, 83, 50), strict=False)]
    with torch.inference_mode():
        for beam_width in (1, 10):
            alone = [bits(engine.decode([utterance], beam_width)[0]) for utterance in utterances]
            assert [bits(beam) for beam in engine.decode(utterances, beam_width)] == alone
            with windows_of(engine, 3):
                assert [bits(beam) for beam in engine.decode(utterances, beam_width)] == alone
            assert streamed(engine, utterances, beam_width, beam_width) == alone


# The LibriSpeech model


@needs_bundle_assets
@needs_real_speech
def test_real_speech_through_the_handler_gives_torchaudios_beams(tmp_path):
    """The 76.7M-parameter architecture, exported from a checkpoint, with the bundle's own features."""
    model = stand_in(0)
    torch.save(model.state_dict(), tmp_path / "stand-in.pt")
    export_model.export("librispeech", tmp_path / "emformer_rnnt.pt", checkpoint=tmp_path / "stand-in.pt")
    handler, reference = Worker(tmp_path / "emformer_rnnt.pt").handler, Reference(model)

    def heard(features: torch.Tensor, length: torch.Tensor, beam_width: int) -> list[Hypothesis]:
        handler.settings["beam_width"] = beam_width
        [beam] = handler._search([waveform])
        return [(tokens, features, [], score) for tokens, score, _, _ in beam]

    for recording in LIBRISPEECH:
        waveform = decode_audio(recording.read_bytes())
        with torch.inference_mode():
            features, _ = EMFORMER_RNNT_BASE_LIBRISPEECH.get_feature_extractor()(waveform)
        assert reference.assert_same_beams(heard, features, (1, 10)) > 2


@needs_bundle_assets
@pytest.mark.skipif(not CHECKPOINT.is_file(), reason=f"needs {CHECKPOINT.name} (293 MB) in the torch hub cache")
@needs_real_speech
def test_the_real_librispeech_model_transcribes_the_public_sample(tmp_path):
    export_model.export("librispeech", tmp_path / "emformer_rnnt.pt")
    [recording] = [path for path in LIBRISPEECH if path.name == "1089-134686-0000.flac"]
    assert Worker(tmp_path / "emformer_rnnt.pt").transcribe(recording.read_bytes()) == (
        "he hoped there would be stew for dinner turnips and carrots and bruised potatoes and fat mutton pieces "
        "to be ladled out in thick peppered flour fat and sauce"
    )


# All of them


def test_near_ties_are_at_most_one_beam_in_a_hundred(record_property):
    assert_few_near_ties(record_property)
