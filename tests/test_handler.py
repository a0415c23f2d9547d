"""The handler in a worker's context: what it promises to a client and to TorchServe."""

import base64
import inspect
import io
import itertools
import resource
import socket
import struct
import time
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torchaudio
from conftest import SAMPLES, Worker, encode, needs_bundle_assets, silent_film, transcripts
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import list_classes_from_module

import export_model
import handler
from handler import decode_audio

THREE_DIGITS = (SAMPLES / "three-digits.wav").read_bytes()
TEXT = transcripts("digits")["three-digits.wav"]
BASE64 = base64.b64encode(THREE_DIGITS).decode()


def wav(samples: np.ndarray, channels: int, width: int, encoding: int) -> bytes:
    """A 16 kHz WAV file: interleaved samples of ``width`` bytes; encoding 1 is PCM, 3 is float."""
    data, block = samples.tobytes(), channels * width
    header = struct.pack("<HHIIHH", encoding, channels, 16_000, 16_000 * block, block, 8 * width)
    chunks = b"fmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def quiet_noise(seconds: float) -> np.ndarray:
    """(1, samples) of quiet noise at 16 kHz: a valid file in which nothing is said."""
    return np.random.default_rng(0).normal(0, 0.001, (1, int(seconds * 16_000))).astype(np.float32)


# The contract with TorchServe


def test_the_module_defines_one_class_with_the_expected_interface():
    assert list_classes_from_module(handler) == [handler.ModelHandler]
    assert not hasattr(handler, "handle")  # TorchServe would take it for a function entry point
    assert not issubclass(handler.ModelHandler, BaseHandler)
    assert list(inspect.signature(handler.ModelHandler.initialize).parameters) == ["self", "context"]
    assert list(inspect.signature(handler.ModelHandler.handle).parameters) == ["self", "data", "context"]


def test_a_fresh_handler_is_not_initialized_and_a_loaded_one_is(worker):
    fresh = handler.ModelHandler()
    assert (fresh.model, fresh.device, fresh.initialized) == (None, None, False)
    assert isinstance(worker.handler.model, torch.jit.ScriptModule)
    assert (worker.handler.device, worker.handler.initialized) == (torch.device("cpu"), True)


@pytest.mark.parametrize("file", transcripts("digits"))
def test_every_sample_is_transcribed_exactly(worker, file):
    assert worker.transcribe((SAMPLES / file).read_bytes()) == transcripts("digits")[file]


def test_a_batch_is_answered_in_order(worker):
    files = [*transcripts("digits").items()] * 2
    answers = worker.answer(*({"body": bytearray((SAMPLES / file).read_bytes())} for file, _ in files))
    assert answers == [(200, text) for _, text in files]


def test_a_bad_file_does_not_spoil_its_batch(worker):
    good, bad = {"body": bytearray(THREE_DIGITS)}, {"body": bytearray(b"this is no audio")}
    answers = worker.answer(good, bad, {"body": None}, good)
    assert [status for status, _ in answers] == [200, 400, 400, 200]
    assert answers[0][1] == answers[3][1] == TEXT


def test_a_failure_inside_the_engine_is_one_500_and_the_rest_of_the_batch_is_answered(worker, monkeypatch):
    model = worker.handler.model

    class FailsOnShort:
        begin = model.begin

        def advance(self, streams: list, features: list[torch.Tensor], ended: list[bool], beam_width: int) -> list:
            if min(map(len, features)) < 100:
                raise RuntimeError("secret detail")
            return model.advance(streams, features, ended, beam_width)

    monkeypatch.setattr(worker.handler, "model", FailsOnShort())
    short = {"body": encode(quiet_noise(0.5), 16_000, "wav", "pcm_s16le")}
    first, (status, body), last = worker.answer({"body": THREE_DIGITS}, short, {"body": THREE_DIGITS})
    assert (status, body["code"], body["type"]) == (500, 500, "InternalError")
    assert "secret" not in body["message"]
    assert first == last == (200, TEXT)


def test_answers_are_typed_for_the_client(worker):
    worker.answer({"body": THREE_DIGITS}, {"body": b""})
    assert worker.context.get_response_content_type(0) == "text/plain; charset=utf-8"
    assert worker.context.get_response_content_type(1) == "application/json"


@pytest.mark.parametrize(("policy", "warned"), [(None, True), ("ACTIVE", True), ("passive", False), ("PASSIVE", False)])
def test_threads_that_would_wait_busily_are_warned_of(digits_pt, monkeypatch, caplog, policy, warned):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(handler, "WARM_UP_RUNS", 0)  # with threads that really wait busily here
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    threads = torch.get_num_threads()
    try:
        Worker(digits_pt, {"num_threads": 2})
    finally:
        torch.set_num_threads(threads)
    assert ("OMP_WAIT_POLICY=passive" in caplog.text) is warned


# What arrives from TorchServe


@pytest.mark.parametrize(
    "request_fields",
    [
        {"body": bytearray(THREE_DIGITS)},
        {"body": THREE_DIGITS},
        {"data": bytearray(THREE_DIGITS)},
        {"speech_file": bytearray(THREE_DIGITS)},
        {"language": bytearray(b"en"), "file": bytearray(THREE_DIGITS)},
        {"data": bytearray(), "audio": bytearray(THREE_DIGITS), "note": None},
        {"body": base64.b64encode(THREE_DIGITS).decode()},
        {"body": {"data": base64.b64encode(THREE_DIGITS).decode()}},
        {"body": {"data": "data:audio/wav;base64," + base64.b64encode(THREE_DIGITS).decode()}},
        {"body": {"data": base64.urlsafe_b64encode(THREE_DIGITS).decode().rstrip("=")}},
        {"prompt": bytearray(bytes(200_000)), "file": bytearray(THREE_DIGITS)},
    ],
    ids=[
        "bytearray",
        "bytes",
        "form field data",
        "form field of any name",
        "text field first",
        "empty field first",
        "base64 text",
        "json",
        "data URI",
        "URL-safe base64 without padding",
        "usual name before longer field",
    ],
)
def test_audio_is_found_however_it_was_sent(worker, request_fields):
    assert worker.answer(request_fields) == [(200, TEXT)]


@pytest.mark.parametrize(
    ("request_fields", "kind", "advice"),
    [
        ({}, "EmptyBody", "-T speech.wav"),
        ({"body": None}, "EmptyBody", "-T speech.wav"),
        ({"body": bytearray()}, "EmptyBody", "application/octet-stream"),
        ({"body": ""}, "EmptyBody", "-T speech.wav"),
        ({"file": bytearray(), "response_format": bytearray(b"json")}, "EmptyBody", "-T speech.wav"),
        ({"file": bytearray(), "language": bytearray(b"en")}, "EmptyBody", "-T speech.wav"),
        ({"response_format": bytearray(b"json")}, "EmptyBody", "-T speech.wav"),
        ({"body": {}}, "EmptyBody", "-T speech.wav"),
        ({"body": "good morning!"}, "NotAudio", "base64"),
        ({"body": {"data": 17}}, "NotAudio", '"data"'),
        ({"body": {"sound": BASE64}}, "NotAudio", "b64, base64, input, inputs, instances"),
        ({"body": {"data": {"sound": BASE64}}}, "NotAudio", '"data"'),
        ({"body": {"inputs": [{"name": "x", "data": [1, 2]}]}}, "NotAudio", '"data"'),
        ({"body": {"response_format": "json"}}, "NotAudio", '"data"'),
        ({"body": [[[[[[[[[BASE64]]]]]]]]]}, "NotAudio", '"data"'),
        ({"body": [1, 2, 3]}, "NotAudio", '"data"'),
        ({"body": b"\x00\xff" * 500}, "NotAudio", "WAV"),
        ({"body": b"RIFF\x24\x00\x00\x00WAVE"}, "NotAudio", "WAV"),
    ],
)
def test_what_is_no_audio_gets_a_400_that_says_what_to_send(worker, request_fields, kind, advice):
    [(status, body)] = worker.answer(request_fields)
    assert (status, body["code"], body["type"]) == (400, 400, kind)
    assert advice in body["message"]


@pytest.mark.parametrize(
    "body",
    [
        *({name: BASE64} for name in ("data", "b64", "base64", "audio", "file", "input", "inputs", "content")),
        {"inputs": [{"name": "audio", "shape": [1], "datatype": "BYTES", "data": [BASE64]}], "id": "1"},
        {"inputs": {"audio": BASE64}},
        {"data": {"b64": BASE64}},
        {"audio": {"content": BASE64}, "config": {"languageCode": "en"}},
        {"input_audio": None, "audio": {"data": BASE64, "format": "wav"}},
        {"data": "", "audio": BASE64},
        [BASE64],
        {"audio": "data:audio/wav;base64," + BASE64},
        {"audio": "data:audio/ogg;codecs=opus;base64," + BASE64},
        {"audio": "DATA:;Base64," + BASE64},
        {"audio": "data:audio/x-wav;name=a%20b.wav;base64," + "\r\n".join([BASE64[:76], BASE64[76:]])},
        BASE64,
    ],
)
def test_json_is_understood_under_every_usual_name(worker, body):
    assert worker.answer({"body": body}) == [(200, TEXT)]


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [BASE64, BASE64]},
        {"instances": [{"b64": BASE64}, {"data": {"b64": BASE64}}]},
        {"instances": [{"audio": BASE64}, BASE64]},
        {"inputs": [{"name": "audio", "shape": [2], "datatype": "BYTES", "data": [BASE64, BASE64]}]},
        {"inputs": [BASE64, BASE64]},
        [BASE64, BASE64],
    ],
)
def test_several_files_in_json_are_answered_in_order(worker, body):
    assert worker.answer({"body": body}) == [(200, {"predictions": [TEXT, TEXT]})]


def test_one_instance_is_answered_as_kserve_does_it(worker):
    assert worker.answer({"body": {"instances": [{"b64": BASE64}]}}) == [(200, {"predictions": [TEXT]})]


def test_files_under_several_names_of_a_form_are_all_answered(worker, speech):
    others = [encode(resampled(speech.repeat(count), 16_000), 16_000, "flac", "flac") for count in (2, 3)]
    form = {"a": bytearray(THREE_DIGITS), "language": bytearray(b"en"), "file": others[0], "z": others[1]}
    answer = {"predictions": [TEXT, f"{TEXT} {TEXT}", f"{TEXT} {TEXT} {TEXT}"]}
    assert worker.answer(form) == [(200, answer)]
    assert worker.context.get_response_content_type(0) == "application/json"


def form_headers(form: dict, more: int = 0) -> dict[str, str]:
    """As of a form's body with ``more`` bytes than its fields and their usual heads."""
    size = sum(200 + len(value) for value in form.values()) + 60 + more
    return {"Content-Type": "multipart/form-data; boundary=xyz", "Content-Length": str(size)}


def test_a_second_file_under_the_same_name_is_missed(worker):
    form = {"file": bytearray(THREE_DIGITS), "response_format": bytearray(b"json"), "language": bytearray(b"en")}
    assert worker.answer(form, headers=form_headers(form)) == [(200, {"text": TEXT})]
    assert worker.answer(form, headers=form_headers(form, 1500)) == [(200, {"text": TEXT})]  # long names of files
    for more in (6_000, len(THREE_DIGITS)):
        [(status, body)] = worker.answer(form, headers=form_headers(form, more))
        assert (status, body["type"]) == (400, "LostFile") and "name" in body["message"]
    text = "\u4e2d" * 5000  # a part that declares itself to be text arrives as such
    headers = form_headers(form, 200 + len(text.encode()))
    assert worker.answer(form | {"prompt": text}, headers=headers) == [(200, {"text": TEXT})]
    for length in ("", "many", "-1", "1e9", "\u0662" * 9):
        headers = {"content-type": "multipart/form-data; boundary=x", "content-length": length}
        assert worker.answer(form, headers=headers) == [(200, {"text": TEXT})]
    assert worker.answer({"body": THREE_DIGITS}, headers={"Content-Length": "9999999"}) == [(200, TEXT)]


def test_a_query_string_that_torchserve_passes_on_is_understood(worker):
    """It does for /invocations and /NAME/predict, as fields beside the body."""
    query = {"response_format": bytearray(b"json"), "audio_track": bytearray(b"1"), "language": bytearray(b"en")}
    assert worker.answer({"body": bytearray(THREE_DIGITS)} | query) == [(200, {"text": TEXT})]


def test_a_client_text_never_reaches_the_answer_or_the_log(worker, caplog):
    [(_, body)] = worker.answer({"body": b"[METRICS]evil.Count:1|#Level:Host"})
    assert "METRICS" not in body["message"] + caplog.text


# Audio files


def resampled(speech: torch.Tensor, rate: int) -> np.ndarray:
    """(1, samples) of ``speech`` at ``rate``."""
    return torchaudio.functional.resample(speech, 16_000, rate)[None].numpy()


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_any_sample_rate_is_understood(worker, speech, rate):
    assert worker.transcribe(encode(resampled(speech, rate), rate, "wav", "pcm_s16le")) == TEXT


def test_a_wav_file_with_an_extensible_header_is_understood(worker, speech):
    data = (speech.numpy() * 32767).astype("<i2").tobytes()
    guid = b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"  # PCM
    header = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16_000, 32_000, 2, 16, 22, 16, 4) + guid
    chunks = b"fmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    assert worker.transcribe(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks) == TEXT


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_the_sound_track_of_a_film_is_understood(worker, speech, container):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        picture = output.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuv420p"
        sound = output.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(speech[None].numpy(), format="fltp", layout="mono")
        frame.rate = 16_000
        for part in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24"), None):
            output.mux(picture.encode(part))
        for part in (frame, None):
            output.mux(sound.encode(part))
    assert worker.transcribe(file.getvalue()) == TEXT


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_equal_channels_give_the_mono_samples(worker, speech, channels):
    audio = encode(speech[None].repeat(channels, 1).numpy(), 16_000, "wav", "pcm_f32le")
    assert torch.allclose(decode_audio(audio), speech, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 8, 16])
def test_recordings_of_many_microphones_are_mixed(worker, channels):
    samples = (np.random.default_rng(2).normal(0, 0.1, (8000, channels)) * 32767).astype("<i2")
    waveform = decode_audio(wav(samples, channels, 2, 1))
    assert np.allclose(waveform.numpy(), samples.mean(axis=1) / 32768, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_sound_get_a_400(worker, value):
    (status, body), good = worker.answer({"body": wav(np.full(16_000, value, "<f4"), 1, 4, 3)}, {"body": THREE_DIGITS})
    assert (status, body["type"], good) == (400, "NotAudio", (200, TEXT))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_few_samples_that_are_no_numbers_do_no_harm_and_are_told(worker, speech, value):
    samples = speech.numpy().astype("<f4")
    samples[::4000] = value
    assert worker.transcribe(wav(samples, 1, 4, 3)) == TEXT
    assert "not numbers" in worker.context.get_response_headers(0)["x-audio-notes"]


def test_float_samples_that_nobody_scaled_are_understood_and_told(worker, speech):
    assert worker.transcribe(wav((speech.numpy() * 32768).astype("<f4"), 1, 4, 3)) == TEXT
    assert "full scale" in worker.context.get_response_headers(0)["x-audio-notes"]


CUT = {
    **{"wav": "pcm_s16le", "w64": "pcm_s16le", "aiff": "pcm_s16be", "au": "pcm_s16be", "caf": "pcm_s16le"},
    **{"flac": "flac", "mp3": "mp3", "adts": "aac", "mp4": "aac", "mov": "aac", "matroska": "aac"},
    **{"ogg": "libopus", "webm": "libopus"},
}


@pytest.mark.parametrize("container", CUT)
def test_a_file_whose_tail_is_cut_off_is_transcribed_as_far_as_it_goes(worker, speech, container):
    codec = CUT[container]
    rate = 48_000 if codec == "libopus" else 16_000
    # As browsers record: a head for every piece, not one for all at the end, which would be what was cut off.
    options = {"movflags": "frag_keyframe+empty_moov"} if container in ("mp4", "mov") else {}
    audio = encode(resampled(torch.cat([speech] * 4), rate), rate, container, codec, **options)
    heard = worker.transcribe(audio[: len(audio) * 7 // 10]).split()
    assert heard[:6] == TEXT.split() * 2 and len(heard) < 12


@pytest.mark.parametrize("container", ["adts", "flac", "matroska", "ogg", "mp3"])
def test_damage_in_the_middle_is_skipped_and_told(worker, speech, container):
    codec = CUT[container]
    rate = 48_000 if codec == "libopus" else 16_000
    audio = bytearray(encode(resampled(torch.cat([speech] * 6), rate), rate, container, codec))
    audio[len(audio) // 4 : len(audio) // 2] = bytes(len(audio) // 2 - len(audio) // 4)
    [(status, body)] = worker.answer({"file": audio, "response_format": "verbose_json"})
    words = [word["word"] for word in body["words"]]
    assert (status, words[:3], words[-3:]) == (200, TEXT.split(), TEXT.split())
    assert "damaged" in worker.context.get_response_headers(0)["x-audio-notes"]
    if container in ("flac", "matroska", "ogg"):  # these tell the time; the others' sound moves together
        length = len(speech) / 16_000
        assert body["words"][-1]["start"] - body["words"][0]["start"] == pytest.approx(5 * length + 0.9, abs=0.3)


def test_words_of_a_film_whose_sound_begins_later_have_the_films_times(worker, speech):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        picture = output.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuv420p"
        sound = output.add_stream("flac", rate=16_000, layout="mono", format="s16")
        samples = (speech[None].numpy() * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.rate, frame.pts, frame.time_base = 16_000, 5 * 16_000, Fraction(1, 16_000)
        for part in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24"), None):
            output.mux(picture.encode(part))
        for part in (frame, None):
            output.mux(sound.encode(part))
    [(_, late)] = worker.answer({"file": file.getvalue(), "response_format": "verbose_json"})
    [(_, soon)] = worker.answer({"file": THREE_DIGITS, "response_format": "verbose_json"})
    assert late["text"] == soon["text"] == TEXT
    for after, before in zip(late["words"], soon["words"], strict=True):
        assert after["start"] == pytest.approx(before["start"] + 5, abs=0.05)
    assert "x-audio-notes" not in worker.context.get_response_headers(0)


def test_one_wrong_sample_does_not_silence_the_file(worker, speech):
    samples = speech.numpy().astype("<f4")
    samples[20_000] = 1e6
    assert worker.transcribe(wav(samples, 1, 4, 3)) == TEXT


def test_one_silent_channel_does_not_hide_the_speech(worker, speech):
    audio = encode(torch.stack([speech, torch.zeros_like(speech)]).numpy(), 16_000, "wav", "pcm_s16le")
    assert worker.transcribe(audio) == TEXT


def test_pcm_at_16_khz_arrives_bit_for_bit(worker):
    samples = np.random.default_rng(1).integers(-32768, 32768, (1, 20_000)).astype(np.int16)
    audio = encode(samples / np.float32(32768), 16_000, "wav", "pcm_s16le")
    assert np.array_equal(decode_audio(audio).numpy() * 32768, samples[0])


@pytest.mark.parametrize(("container", "codec", "rate"), [("flac", "flac", 16_000), ("adts", "aac", 16_000)])
def test_a_stream_may_change_its_channels_midway(worker, speech, container, codec, rate):
    mono = resampled(speech, rate)
    parts = [encode(samples, rate, container, codec) for samples in (mono, mono.repeat(2, axis=0))]
    assert worker.transcribe(b"".join(parts)) == f"{TEXT} {TEXT}"


def test_tags_in_an_old_encoding_are_no_obstacle(worker, speech):
    audio = encode(resampled(speech, 16_000), 16_000, "mp3", "mp3")
    latin = "M\u00fcller".encode("latin-1")
    tag = b"TIT2" + len(b"\x03" + latin).to_bytes(4, "big") + b"\x00\x00\x03" + latin  # says UTF-8, is not
    assert worker.transcribe(b"ID3\x03\x00\x00\x00\x00\x00" + bytes([len(tag)]) + tag + audio) == TEXT


@pytest.mark.parametrize("samples", [1, 100, 160, 201, 480, 1000, 2559, 2560, 2561])
def test_audio_shorter_than_a_segment_is_answered(worker, samples):
    click = np.zeros((1, samples), np.float32)
    click[0, samples // 2] = 0.9
    status_and_text = worker.answer({"body": encode(click, 16_000, "wav", "pcm_s16le")})
    assert status_and_text == [(200, "")]


def test_silence_is_an_empty_transcript(worker):
    assert worker.transcribe(encode(np.zeros((1, 48_000), np.float32), 16_000, "wav", "pcm_s16le")) == ""


def test_a_file_of_zero_samples_gets_a_400(worker):
    empty = THREE_DIGITS[: THREE_DIGITS.index(b"data")] + b"data" + bytes(4)
    [(status, body)] = worker.answer({"body": empty})
    assert (status, body["type"]) == (400, "NoSamples")


def test_a_video_without_sound_gets_a_415(worker):
    [(status, body)] = worker.answer({"body": silent_film()})
    assert (status, body["type"]) == (415, "NoAudioStream")


@pytest.mark.parametrize("target", ["file", "http"])
@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXT-X-MAP:URI="{}"\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n',
        "ffconcat version 1.0\nfile '{}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\na=control:{}\n",
        "<?xml version='1.0'?><MPD><Period><AdaptationSet><Representation><BaseURL>{}</BaseURL></Representation>"
        "</AdaptationSet></Period></MPD>",
        "[playlist]\nFile1={}\nNumberOfEntries=1\n",
        "RTSPtext\r\n{}\r\n",
        "1\n00:00:00,000 --> 00:00:09,000\n{}\n",
    ],
    ids=["hls", "hls with a map", "concat", "sdp", "dash", "pls", "rtsp", "subtitle"],
)
def test_a_playlist_opens_nothing(worker, tmp_path, playlist, target):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(THREE_DIGITS)
    read = secret.stat().st_atime_ns
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        url = {"file": f"file://{secret}", "http": f"http://127.0.0.1:{listener.getsockname()[1]}/secret.wav"}[target]
        [(status, body)] = worker.answer({"body": playlist.replace("{}", url).encode()})
        assert (status, body["type"]) == (400, "NotAudio")
        with pytest.raises(TimeoutError):
            listener.accept()
    assert secret.stat().st_atime_ns == read


@pytest.mark.parametrize("reference", ["file", "http"])
def test_a_film_whose_sound_is_in_another_file_opens_nothing(worker, tmp_path, speech, reference):
    """QuickTime can name another file for a track's data, in its dref box."""
    (tmp_path / "secret.wav").write_bytes((SAMPLES / "telephone.wav").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        place = {"file": f"file://{tmp_path}/secret.wav", "http": f"http://127.0.0.1:{listener.getsockname()[1]}/a"}
        url = place[reference].encode() + b"\0"
        film = bytearray(encode(resampled(speech, 16_000), 16_000, "mov", "pcm_s16le"))
        boxes = [film.index(box) - 4 for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")]
        at = boxes[-1] + 16  # behind size, "dref", version and flags, number of entries
        assert film[at + 4 : at + 8] == b"url "
        film[at : at + 12] = struct.pack(">I", 12 + len(url)) + b"url " + bytes(4) + url  # flags: not in this file
        for box in boxes:
            film[box : box + 4] = struct.pack(">I", struct.unpack(">I", film[box : box + 4])[0] + len(url))
        [(status, body)] = worker.answer({"body": film})
        assert (status, body) in [(200, TEXT), (400, body)]  # FFmpeg may take what is in the film itself
        with pytest.raises(TimeoutError):
            listener.accept()


# Settings


def test_audio_over_the_limit_gets_a_413(digits_pt):
    worker = Worker(digits_pt, {"max_audio_seconds": 2})
    long = encode(quiet_noise(2.5), 16_000, "wav", "pcm_s16le")
    (status, body), short = worker.answer({"body": long}, {"body": encode(quiet_noise(1), 16_000, "wav", "pcm_s16le")})
    assert (status, body["type"], short) == (413, "AudioTooLong", (200, ""))
    assert "2 s" in body["message"]


def test_a_small_file_that_claims_hours_is_refused_before_it_is_unpacked(digits_pt, monkeypatch):
    def resample(*_):
        raise MemoryError

    worker = Worker(digits_pt, {"max_audio_seconds": 60})
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:  # one frame of 65 seconds
        stream = output.add_stream("flac", rate=1000, layout="stereo", format="s16", options={"frame_size": "65535"})
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 65_535 * 2), np.int16), format="s16", layout="stereo")
        frame.rate = 1000
        for part in (frame, None):
            output.mux(stream.encode(part))
    assert len(file.getvalue()) < 10_000
    monkeypatch.setattr(av, "AudioResampler", lambda **_: types.SimpleNamespace(resample=resample))
    [(status, body)] = worker.answer({"body": file.getvalue()})
    assert (status, body["type"]) == (413, "AudioTooLong")


@pytest.mark.parametrize("rate", [1, 7, 1_073_757_824])
def test_an_absurd_sample_rate_is_no_audio(worker, speech, rate):
    samples = (speech.numpy() * 32767).astype(">i2").tobytes()
    file = b".snd" + struct.pack(">IIIII", 24, len(samples), 3, rate, 1) + samples
    [(status, body)] = worker.answer({"body": file})
    assert (status, body["type"]) == (400, "NotAudio")


def test_audio_of_exactly_the_limit_is_answered(digits_pt):
    worker = Worker(digits_pt, {"max_audio_seconds": 20})
    for rate in (8_000, 11_025, 16_000, 44_100):
        exact = encode(np.zeros((1, 20 * rate), np.float32), rate, "wav", "pcm_s16le")
        longer = encode(np.zeros((1, 20 * rate + rate // 100), np.float32), rate, "wav", "pcm_s16le")
        assert [status for status, _ in worker.answer({"body": exact}, {"body": longer})] == [200, 413]


def costly_files(speech: torch.Tensor) -> dict[str, bytes]:
    """Small files that would keep a worker busy for minutes."""
    caf = bytearray(encode(resampled(speech.repeat(9), 16_000), 16_000, "caf", "pcm_s16le"))
    at = caf.index(b"lpcm") + 8
    assert caf[at : at + 8] == struct.pack(">II", 2, 1)  # bytes and frames a packet
    caf[at : at + 8] = struct.pack(">II", 2, 3)  # FFmpeg then hands them over one by one
    rates = b"".join(encode(np.zeros((1, 2048), np.float32), rate, "adts", "aac") for rate in (88_200, 96_000))
    return {"a packet a sample": bytes(caf), "another rate every few packets": rates * 1500}


def test_a_small_file_that_costs_much_is_refused(worker, speech, monkeypatch):
    # What is promised is that there is a limit, not which: a hundredth of what the files take, for fast machines.
    monkeypatch.setattr(handler, "DECODING_SECONDS", 0.05)
    monkeypatch.setattr(handler, "DECODING_RATE", 0.0)
    for name, file in costly_files(speech).items():
        [(status, body)] = worker.answer({"body": file})
        assert (status, isinstance(body, dict) and body["type"]) == (413, "TooCostly"), name


def test_a_header_that_claims_millions_of_samples_gets_no_memory_for_them(worker):
    """A QuickTime file's table of samples, all of the same size, is a number and needs no bytes."""

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I", 8 + sum(map(len, parts))) + kind + b"".join(parts)

    count = 400_000_000
    entry = box(b"sowt", bytes(6), struct.pack(">H", 1), bytes(8), struct.pack(">HHHHI", 1, 16, 0, 0, 16_000 << 16))
    table = [
        box(b"stsd", bytes(4), struct.pack(">I", 1), entry),
        box(b"stts", bytes(4), struct.pack(">III", 1, count, 1)),
        box(b"stsc", bytes(4), struct.pack(">IIII", 1, 1, count, 1)),
        box(b"stsz", bytes(4), struct.pack(">II", 1, count)),
        box(b"stco", bytes(4), struct.pack(">II", 1, 48)),
    ]
    minf = box(b"minf", box(b"smhd", bytes(8)), box(b"stbl", *table))
    mdhd = box(b"mdhd", bytes(12), struct.pack(">II", 16_000, count), bytes(4))
    mdia = box(b"mdia", mdhd, box(b"hdlr", bytes(4), b"mhlrsoun", bytes(13)), minf)
    tkhd = box(b"tkhd", b"\0\0\0\1", bytes(8), struct.pack(">I", 1), bytes(4), struct.pack(">I", 10**6), bytes(60))
    mvhd = box(b"mvhd", bytes(12), struct.pack(">II", 1000, 10**6), bytes(80))
    head = box(b"ftyp", b"qt  ", bytes(4), b"qt  ")
    file = head + box(b"mdat", bytes(100)) + box(b"moov", mvhd, box(b"trak", tkhd, mdia))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [(status, _)] = worker.answer({"body": file})
    assert status in (200, 400)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB; the table needs 9.6 GB
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert worker.transcribe(THREE_DIGITS) == TEXT


def test_a_wider_beam_hears_the_samples_too(digits_pt):
    worker = Worker(digits_pt, {"beam_width": 10})
    assert worker.transcribe(THREE_DIGITS) == TEXT


@pytest.mark.parametrize(
    "settings",
    [{"beam_width": 0}, {"beam_width": 1.5}, {"beam_width": "4"}, {"num_threads": True}, {"beam": 4}, ["beam_width"]],
)
def test_a_wrong_setting_stops_the_worker_with_a_sentence(digits_pt, settings):
    with pytest.raises(ValueError, match=r"model-config\.yaml"):
        Worker(digits_pt, settings)


def test_the_encoders_window_is_a_setting_and_changes_no_word(digits_pt, worker):
    small = Worker(digits_pt, {"window_segments": 3})
    assert (small.handler.model.window_segments, worker.handler.model.window_segments) == (3, 96)
    audio = (SAMPLES / "card-number.m4a").read_bytes()
    assert small.transcribe(audio) == worker.transcribe(audio) != ""


def test_what_the_engine_has_not_heard_in_time_is_refused_and_its_batch_is_answered(digits_pt, monkeypatch):
    worker, seconds = Worker(digits_pt, {"max_engine_seconds": 5, "window_segments": 20}), itertools.count()
    clock = types.SimpleNamespace(
        monotonic=lambda: next(seconds), perf_counter=time.perf_counter, thread_time=time.thread_time
    )
    monkeypatch.setattr(handler, "time", clock)  # as if every window took a second
    long = {"body": encode(quiet_noise(60), 16_000, "wav", "pcm_s16le")}
    first, (status, body), last = worker.answer({"body": THREE_DIGITS}, long, {"body": THREE_DIGITS})
    assert (status, body["type"], first, last) == (413, "TooCostly", (200, TEXT), (200, TEXT))
    assert "5 s" in body["message"]
    assert worker.answer({"body": THREE_DIGITS}) == [(200, TEXT)]


def test_a_worker_uses_the_threads_it_is_given(digits_pt):
    try:
        Worker(digits_pt, {"num_threads": 2})
        assert torch.get_num_threads() == 2
    finally:
        Worker(digits_pt)
    assert torch.get_num_threads() == 1


def test_the_network_is_never_used(digits_pt, monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Worker(digits_pt).transcribe(THREE_DIGITS) == TEXT


# Model files that others exported


def plain_beam_search(path, model, blank) -> None:
    """Save a scripted ``RNNTBeamSearch`` without extra files, as older examples do."""
    torch.jit.save(torch.jit.script(torchaudio.models.RNNTBeamSearch(model, blank)), str(path))


def test_a_plain_scripted_beam_search_is_served_with_the_bundles_assets(tmp_path, monkeypatch):
    # A torch hub cache whose LibriSpeech files are ours, so that the text can be checked without the real ones.
    assets = tmp_path / "hub" / "torchaudio" / "pipeline-assets"
    assets.mkdir(parents=True)
    model, blank, files = export_model.digits(None)
    (assets / "global_stats_rnnt_librispeech.json").write_bytes(files["global_stats.json"])
    (assets / "spm_bpe_4096_librispeech.model").write_bytes(files["tokenizer.model"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    plain_beam_search(tmp_path / "decoder_jit.pt", model.eval(), blank)
    worker = Worker(tmp_path / "decoder_jit.pt")
    assert worker.transcribe(THREE_DIGITS) == TEXT
    # Its time and memory grow with the square of the length.
    long = encode(quiet_noise(121), 16_000, "wav", "pcm_s16le")
    assert [status for status, _ in worker.answer({"body": long}, {"body": THREE_DIGITS})] == [413, 200]
    # It does not say when a word was said.
    [(status, body), as_json] = worker.answer(
        {"body": THREE_DIGITS, "response_format": "srt"}, {"body": THREE_DIGITS, "response_format": "json"}
    )
    assert (status, body["type"], as_json) == (406, "NoTimes", (200, {"text": TEXT}))


@needs_bundle_assets
def test_a_plain_scripted_beam_search_gets_the_real_bundles_assets(tmp_path):
    model, blank, _ = export_model.digits(None)
    plain_beam_search(tmp_path / "decoder_jit.pt", model.eval(), blank)
    worker = Worker(tmp_path / "decoder_jit.pt")
    assert worker.handler.tokens_to_text.sp_model.vocab_size() == 4096


def test_an_archive_without_its_model_stops_the_worker_with_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file emformer_rnnt\.pt"):
        Worker(tmp_path / "emformer_rnnt.pt")
