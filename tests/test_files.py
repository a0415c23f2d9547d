"""Files as people send them: every kind, joined, cut up by editors, damaged, with several tracks or a broken header."""

import base64
import io
import struct

import av
import numpy as np
import pytest
import torch
from av.format import ContainerFormat, formats_available
from conftest import SAMPLES, Worker, encode, transcripts
from formats import FILES, KEPT_OUT, UNMADE
from making import RATE, at, eight_svx, film, id3, nist, riff, with_edits

import handler
from handler import decode_audio

TEXT = transcripts("digits")["three-digits.wav"]


@pytest.fixture(scope="session")
def other(worker) -> torch.Tensor:
    """(samples,) at 16 kHz in which something else is said than in ``speech``."""
    return decode_audio((SAMPLES / "pin.webm").read_bytes())


@pytest.fixture(scope="session")
def heard(speech, other):
    """Which of the two is where in a file: their names in order, found by correlation, whatever the model hears."""

    def find(file: bytes | torch.Tensor, notes: list[str] | None = None, **options: int) -> str:
        waveform = (file if isinstance(file, torch.Tensor) else decode_audio(file, notes, **options)).double().numpy()
        found = {}
        for name, phrase in (("speech", speech.double().numpy()), ("other", other.double().numpy())):
            size, length = len(waveform) + len(phrase), len(phrase)
            spectrum = np.fft.rfft(waveform, size) * np.fft.rfft(phrase, size).conj()
            energy = np.cumsum(np.pad(waveform**2, (1, length)))
            energy = np.maximum(energy[length:] - energy[:-length], 1e-3)
            likeness = np.fft.irfft(spectrum, size)[: len(energy)] / np.sqrt(energy * np.sum(phrase**2))
            while likeness.max() > 0.7:
                place = int(likeness.argmax())
                found[place] = name
                likeness[max(place - length // 2, 0) : place + length // 2] = 0
        find.places = sorted(found)
        return " ".join(found[place] for place in find.places)

    return find


def answer(worker: Worker, file: bytes, **fields: object) -> tuple[int, str | dict, str]:
    """Status, body and notes of a file sent as a form's field."""
    [(status, body)] = worker.answer({"file": bytearray(file)} | fields)
    return status, body, worker.context.get_response_headers(0).get("x-audio-notes", "")


# Kinds of files


@pytest.mark.parametrize("row", FILES)
def test_every_kind_of_file_is_understood(worker, speech, row):
    for container, codec, rate in FILES[row]:
        file = encode(at(speech, rate, 2 if codec == "vorbis" else 1), rate, container, codec)
        assert answer(worker, file) == (200, TEXT, ""), (container, codec)


def test_what_no_encoder_makes_has_its_decoder():
    for decoder in UNMADE.values():
        assert av.Codec(decoder, "r").type == "audio"


def test_every_demuxer_is_taken_or_kept_out_for_a_reason():
    taken = set(handler.FFMPEG_OPTIONS["format_whitelist"].split(","))
    kept_out = {name for names in KEPT_OUT.values() for name in names.split()}
    assert not taken & kept_out and taken >= UNMADE.keys()
    for name in formats_available:
        try:
            kind = ContainerFormat(name, "r")
        except ValueError:
            continue  # a muxer only
        names = set(kind.name.split(","))
        alias = names <= {"mp4", "m4a", "3gp", "3g2", "mj2", "webm"}  # of mov and matroska
        assert not kind.is_input or alias or names & (taken | kept_out) or name.endswith("_pipe"), name


@pytest.mark.parametrize("made", [nist, eight_svx])
def test_files_of_corpora_and_old_machines_are_understood(worker, speech, made):
    samples = (speech * 32_767).to(torch.int16).numpy()
    assert answer(worker, made(samples)) == (200, TEXT, "")


@pytest.mark.parametrize(
    ("container", "picture", "codec"),
    [
        *(("avi", "mpeg4", "mp3"), ("asf", "wmv2", "wmav2"), ("flv", "flv", "aac"), ("mpegts", "mpeg2video", "aac")),
        *(("mpeg", "mpeg1video", "mp2"), ("vob", "mpeg2video", "ac3"), ("matroska", "mpeg4", "ac3")),
    ],
)
def test_the_sound_of_a_film_of_any_kind_is_understood(worker, speech, container, picture, codec):
    assert answer(worker, film(container, picture, codec, [speech]))[:2] == (200, TEXT)


# Several tracks


@pytest.mark.parametrize(("container", "picture"), [("matroska", "mpeg4"), ("mp4", "mpeg4"), ("matroska", None)])
def test_the_default_track_is_transcribed_and_the_others_are_told(worker, speech, other, container, picture):
    file = film(container, picture, "aac", [other, speech], default=1)
    status, text, notes = answer(worker, file)
    assert (status, text) == (200, TEXT) and "2 sound tracks" in notes and "number 2" in notes
    assert answer(worker, film(container, picture, "aac", [speech]))[2] == ""


@pytest.mark.parametrize("sent", ["field", "number", "JSON", "header"])
def test_a_request_chooses_another_track(worker, speech, other, sent):
    file = film("mp4", "mpeg4", "aac", [other, speech])
    form = {"field": {"audio_track": bytearray(b"2")}, "number": {"audio_track": 2}}.get(sent, {})
    headers = {"X-Audio-Track": "2"} if sent == "header" else {}
    request = {"file": file} | form
    if sent == "JSON":
        request = {"body": {"data": base64.b64encode(file).decode(), "audio_track": 2}}
    assert worker.answer(request, headers=headers) == [(200, TEXT)]
    assert "x-audio-notes" not in worker.context.get_response_headers(0)


@pytest.mark.parametrize("track", ["3", "0", "-1", "two", "1.5", "9" * 5000, "\n[METRICS]", "\u0662", "true"])
def test_a_track_that_there_is_not_gets_a_sentence(worker, speech, other, track):
    status, body, _ = answer(worker, film("mp4", None, "aac", [speech, other]), audio_track=track)
    assert (status, body["type"]) == (400, "NoSuchTrack") and "METRICS" not in body["message"]


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
def test_a_silent_track_is_passed_over(worker, speech, container):
    file = film(container, None, "ac3", [torch.zeros_like(speech), speech])
    assert answer(worker, file)[:2] == (200, TEXT)
    assert answer(worker, file, audio_track="1")[:2] == (200, "")
    assert answer(worker, film(container, None, "ac3", [torch.zeros_like(speech)] * 2))[:2] == (200, "")


def test_a_commentary_comes_last(worker, speech, other):
    assert answer(worker, film("matroska", None, "aac", [other, speech], default=None, aside=(0,)))[:2] == (200, TEXT)


@pytest.mark.parametrize(("container", "name"), [("matroska", b"A_AAC"), ("mp4", b"mp4a")])
def test_a_track_that_cannot_be_decoded_is_passed_over(worker, speech, other, container, name):
    file = film(container, None, "aac", [other, speech])
    unknown = file.replace(name, name[:2] + b"X" * (len(name) - 2), 1).replace(
        b"esds", b"free", 1
    )  # esds would tell the codec, too
    status, text, notes = answer(worker, unknown)
    assert (status, text) == (200, TEXT) and "number 2" in notes
    status, body, _ = answer(worker, unknown, audio_track="1")
    assert (status, body["type"]) == (415, "NoDecoder")


# Edit lists


MP4 = [("ipod", None, "aac"), ("ipod", None, "alac"), ("mov", None, "pcm_s16le"), ("mp4", "mpeg4", "aac")]


@pytest.mark.parametrize(("container", "picture", "codec"), MP4)
def test_what_an_editor_cut_away_is_not_transcribed(heard, speech, other, container, picture, codec):
    file = film(container, picture, codec, [torch.cat([speech, other, speech])])
    first, second, notes = len(speech) / RATE, len(other) / RATE, []
    cases = {
        "other": [(first, second)],
        "speech other": [(0.0, first + second)],
        "speech speech": [(0.0, first), (first + second, first)],
        "other speech": [(first, second), (0.0, first)],
        "speech speech speech": [(0.0, first)] * 3,
    }
    for text, edits in cases.items():
        assert heard(with_edits(file, *edits), notes) == text
    assert heard(with_edits(file, (first, second), wide=True, flags=7), notes) == "other" and not notes


def test_edits_are_exact_to_the_sample(speech):
    """FFmpeg itself cuts at packets: of ALAC, 93 ms."""
    ramp = torch.linspace(-0.5, 0.5, 4 * RATE)
    file = film("ipod", None, "alac", [ramp], rate=RATE)
    edited = decode_audio(with_edits(file, (1.0, 0.5), (None, 0.25), (3.0, 0.125), (0.5, 0.25)))
    pieces = [
        ramp[RATE : RATE * 3 // 2],
        torch.zeros(RATE // 4),
        ramp[3 * RATE : 3 * RATE + RATE // 8],
        ramp[8000:12000],
    ]
    assert torch.allclose(edited, torch.cat(pieces), atol=1e-4)


def test_an_edit_list_that_plays_nothing_or_no_end_is_no_obstacle(worker, speech):
    file = film("ipod", None, "aac", [speech])
    for edits in ([], [(100.0, 1.0)], [(0.0, 0.0)], [(0.0, 1e4)], [(0.0, 9.0), (50.0, 1.0)], [(None, 0.0), (0.0, 0.0)]):
        assert answer(worker, with_edits(file, *edits)) == (200, TEXT, "")


def test_sound_that_begins_later_in_a_film_has_the_films_times(worker, speech):
    file = film("mp4", "mpeg4", "aac", [speech])
    [(_, late)] = worker.answer({"file": with_edits(file, (None, 5.0), (0.0, 9.0)), "response_format": "verbose_json"})
    [(_, soon)] = worker.answer({"file": file, "response_format": "verbose_json"})
    assert late["text"] == soon["text"] == TEXT
    assert late["words"][0]["start"] == pytest.approx(soon["words"][0]["start"] + 5, abs=0.05)


def test_edit_lists_cost_no_more_than_what_they_play(digits_pt, speech):
    worker = Worker(digits_pt, {"max_audio_seconds": 60})
    file = film("ipod", None, "aac", [speech])
    assert answer(worker, with_edits(file, *[(0.0, 0.001)] * 300_000))[0] == 200
    for edits in ([(0.0, 2.0)] * 300_000, [(None, 1e5), (0.0, 1.0)], [(0.0, 2.0)] * 40):
        status, body, _ = answer(worker, with_edits(file, *edits))
        assert (status, body["type"]) == (413, "AudioTooLong")


# Damage


DAMAGED = [
    *(("ipod", "aac", 44_100), ("ipod", "alac", 44_100), ("matroska", "aac", 48_000), ("webm", "libopus", 48_000)),
    *(("flv", "aac", 44_100), ("avi", "ac3", 48_000), ("mpegts", "aac", 48_000), ("mpeg", "mp2", 44_100)),
    *(("mp3", "mp3", 44_100), ("adts", "aac", 44_100), ("eac3", "eac3", 48_000), ("caf", "alac", 44_100)),
]


@pytest.mark.parametrize(("container", "codec", "rate"), DAMAGED)
@pytest.mark.parametrize("damage", ["ones", "zeros", "head"])
def test_a_damaged_packet_costs_that_packet(heard, speech, other, container, codec, rate, damage):
    room = torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.0003
    file = bytearray(encode(at(torch.cat([speech, room, other]), rate), rate, container, codec))
    with av.open(io.BytesIO(file)) as source:
        begin = (source.start_time or 0) / av.time_base
        packets = [(packet.pts * packet.time_base - begin, bytes(packet)) for packet in source.demux() if packet.pts]
    packet = next(packet for time, packet in packets if time > len(speech) / RATE + 0.3 and packet[:100] in file)
    place, count = file.index(packet[:100]), 1 if damage == "head" else min(len(packet), 100)
    file[place : place + count] = {"head": b"\x4c", "ones": b"\xff" * count, "zeros": bytes(count)}[damage]
    notes = []
    assert heard(file, notes) == "speech other"
    if container not in ("adts", "mp3", "eac3"):  # these do not tell the time
        assert heard.places[1] - heard.places[0] == pytest.approx(len(speech) + RATE, abs=0.03 * RATE)
    assert all("damaged" in note for note in notes)


def test_an_error_of_any_kind_costs_one_packet_and_its_time_is_silence(speech, monkeypatch):
    """Every other packet of a second fails: the sound after it does not move, and the decoder is flushed."""
    file, failed, notes = encode(at(speech, RATE), RATE, "adts", "aac"), [], []
    errors = [
        av.error.PatchWelcomeError,
        av.error.UndefinedError,
        av.error.ArgumentError,
        av.error.EOFError,
        av.error.BugError,
    ]

    class Fails:
        def __init__(self, packet: av.Packet) -> None:
            self.packet = packet

        def decode(self) -> list:
            frames = self.packet.decode()
            if 20 <= len(failed) < 30 and frames:
                failed.append(frames)
                if len(failed) % 2:
                    raise errors[len(failed) // 2 % len(errors)](1, "as if damaged")
            elif frames:
                failed.append(frames)
            return frames

    packets = handler.packets_of
    monkeypatch.setattr(handler, "packets_of", lambda *arguments: map(Fails, packets(*arguments)))
    waveform = decode_audio(file, notes)
    monkeypatch.undo()
    whole = decode_audio(file)
    assert len(notes) == 1 and "damaged" in notes[0]
    assert len(waveform) == pytest.approx(len(whole), abs=RATE // 100)
    assert torch.allclose(waveform[-RATE // 2 :], whole[-RATE // 2 :], atol=0.02)


@pytest.mark.parametrize(
    "error", [av.error.PatchWelcomeError(1, "another stream"), IndexError("list index out of range")]
)
def test_what_the_demuxer_stumbles_over_does_not_cost_what_follows(speech, monkeypatch, error):
    class Stumbles:
        """A container whose demuxer fails behind every packet, and for good after ``packets``."""

        def __init__(self, container: av.container.InputContainer, packets: int) -> None:
            self.container, self.left = container, packets

        def demux(self, stream: av.AudioStream):
            for packet in self.container.demux(stream):
                if self.left:
                    self.left -= 1
                    yield packet
                raise error if self.left else av.error.InvalidDataError(1, "the end is cut off")

    file, packets_of = encode(at(speech, 44_100), 44_100, "wav", "pcm_s16le"), handler.packets_of
    whole, notes = decode_audio(file), []
    for packets, seconds in ((10, 10 * 4096 / 44_100), (10_000, len(whole) / RATE)):
        monkeypatch.setattr(
            handler, "packets_of", lambda source, *rest, count=packets: packets_of(Stumbles(source, count), *rest)
        )
        waveform = decode_audio(file, notes)
        assert len(waveform) == pytest.approx(seconds * RATE, abs=1000)  # the resampler is flushed, too
        assert torch.allclose(waveform[:-50], whole[: len(waveform) - 50], atol=1e-6)
    assert all("damaged" in note for note in notes)


# Files joined end to end


CODECS = {
    **{"wav": "pcm_s16le", "aiff": "pcm_s16be", "mp3": "mp3", "ogg": "libopus", "flac": "flac", "adts": "aac"},
    **{"w64": "pcm_s16le", "caf": "pcm_s16le", "mp4": "aac", "matroska": "aac", "webm": "libopus", "flv": "aac"},
    **{"asf": "wmav2", "mpegts": "aac", "avi": "mp3"},
}


@pytest.mark.parametrize("container", CODECS)
def test_files_joined_end_to_end_are_heard_one_after_the_other(heard, speech, other, container):
    rate = 48_000 if CODECS[container] == "libopus" else 44_100
    first, second = (encode(at(part, rate), rate, container, CODECS[container]) for part in (speech, other))
    assert heard(first + second) == "speech other"
    assert heard(first + second + first) == "speech other speech"


@pytest.mark.parametrize("container", ["wav", "aiff", "mp3", "flac", "adts", "mp4", "matroska"])
@pytest.mark.parametrize(("rate", "channels"), [(22_050, 1), (44_100, 2), (16_000, 2)])
def test_joined_files_may_have_other_rates_and_channels(heard, speech, other, container, rate, channels):
    codec = CODECS[container]
    first, second = encode(at(speech, 44_100), 44_100, container, codec), at(other, rate, channels)
    assert heard(first + encode(second, rate, container, codec)) == "speech other"


@pytest.mark.parametrize("codec", ["libopus", "vorbis"])
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (24_000, 2), (24_000, 1)])
def test_chained_ogg_may_go_on_with_another_rate_or_channel_count(worker, heard, speech, other, codec, rate, channels):
    channels = 2 if codec == "vorbis" else channels
    first = encode(at(speech, 48_000, 2 if codec == "vorbis" else 1), 48_000, "ogg", codec)
    second = encode(at(other, rate, channels), rate, "ogg", codec)
    notes = []
    assert heard(first + second, notes) == "speech other" and not notes
    assert answer(worker, first + second[:20])[:2] == (200, TEXT)
    status, text, notes = answer(worker, first + second[:150])
    assert (status, text) == (200, TEXT) and "damaged" in notes


def test_files_of_different_kinds_may_be_joined(heard, speech, other):
    first = encode(at(speech, 44_100), 44_100, "mp3", "mp3")
    assert heard(first + encode(at(other, RATE), RATE, "wav", "pcm_s16le")) == "speech other"


def test_too_many_joined_files_are_refused(worker, speech):
    part = encode(at(speech[:800], RATE), RATE, "wav", "pcm_s16le")
    assert answer(worker, part * 1000)[0] == 200
    status, body, _ = answer(worker, part * 1001)
    assert (status, body["type"]) == (413, "TooManyFiles")


def test_joined_files_together_may_not_be_longer_than_one(digits_pt, speech):
    worker = Worker(digits_pt, {"max_audio_seconds": round(2.5 * len(speech) / RATE)})
    part = encode(at(speech, RATE), RATE, "wav", "pcm_s16le")
    assert answer(worker, part * 2)[0] == 200
    assert answer(worker, part * 3)[1]["type"] == "AudioTooLong"


# WAV's relatives, and tags


@pytest.fixture(scope="session")
def pcm(speech) -> np.ndarray:
    return (speech * 32_767).to(torch.int16).numpy()


@pytest.mark.parametrize("kind", ["8", "16", "32", "float", "stereo", "extensible", "A-law"])
def test_big_endian_wav_is_understood(worker, pcm, speech, kind):
    samples, form = {
        "8": ((pcm // 256 + 128).astype("u1"), (1, 1, RATE, 1)),
        "32": (pcm.astype("i4") << 16, (1, 1, RATE, 4)),
        "float": (speech.numpy(), (3, 1, RATE, 4)),
        "stereo": (pcm.repeat(2), (1, 2, RATE, 2)),
        "A-law": (np.frombuffer(encode(at(speech, RATE), RATE, "alaw", "pcm_alaw"), "u1"), (6, 1, RATE, 1)),
    }.get(kind, (pcm, (1, 1, RATE, 2)))
    file = riff(samples, b"RIFX", form=form, extensible=kind == "extensible")
    assert answer(worker, file) == (200, TEXT, "")
    if kind in ("16", "stereo", "extensible"):
        assert np.array_equal(decode_audio(file).numpy() * 32_768, pcm)


DS64 = {
    "right": lambda size: b"ds64" + struct.pack("<IQQQI", 28, size + 72, size, size // 2, 0),
    "zero": lambda size: b"ds64" + struct.pack("<IQQQI", 28, 0, 0, 0, 0),
    "huge": lambda size: b"ds64" + struct.pack("<IQQQI", 28, 2**63, 2**64 - 1, 2**63, 0),
    "cut": lambda size: b"ds64" + struct.pack("<II", 4, 0),
    "missing": lambda size: b"",
}


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
@pytest.mark.parametrize("sizes", DS64)
def test_a_large_files_wav_is_understood_whatever_it_says_of_its_size(worker, pcm, name, sizes):
    unknown = 0xFFFFFFFF
    for data in (unknown, 0):
        file = riff(pcm, name, before=DS64[sizes](pcm.nbytes), sizes=(unknown, data))
        assert answer(worker, file) == (200, TEXT, "")
    tail = b"LIST" + struct.pack("<I", 4000) + bytes(range(250)) * 16
    file = riff(pcm, name, before=DS64["right"](pcm.nbytes), sizes=(unknown, unknown))
    assert np.array_equal(decode_audio(file + tail).numpy() * 32_768, pcm)


@pytest.mark.parametrize("size", [1, 27, 611, 70_001])
@pytest.mark.parametrize("pad", [b"", b"\0"], ids=["no pad byte", "pad byte"])
@pytest.mark.parametrize("place", ["before", "between"])
def test_a_chunk_of_odd_size_is_passed_over(worker, pcm, size, pad, place):
    chunk = b"bext" + struct.pack("<I", size) + b"x" * size + pad
    assert np.array_equal(decode_audio(riff(pcm, **{place: chunk})).numpy() * 32_768, pcm)
    assert np.array_equal(decode_audio(riff(pcm, before=chunk, between=chunk * 3)).numpy() * 32_768, pcm)


def test_a_header_of_odd_size_is_understood(pcm):
    file = riff(pcm)
    for pad in (b"", b"\0"):
        odd = file[:16] + struct.pack("<I", 17) + file[20:36] + b"\0" + pad + file[36:]
        assert np.array_equal(decode_audio(odd).numpy() * 32_768, pcm)


@pytest.mark.parametrize(
    "sizes", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (36, 0), (0, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFFF)]
)
def test_a_recording_that_was_never_closed_is_transcribed(worker, pcm, sizes):
    assert np.array_equal(decode_audio(riff(pcm, sizes=sizes)).numpy() * 32_768, pcm)
    odd = b"LIST" + struct.pack("<I", 5) + b"abcde"
    assert np.array_equal(decode_audio(riff(pcm, sizes=sizes, between=odd)).numpy() * 32_768, pcm)


@pytest.mark.parametrize("container", [*CODECS, "ac3", "amr"])
@pytest.mark.parametrize("tag", ["small", "large", "two", "with a footer", "padded"])
def test_a_tag_before_a_file_of_any_kind_is_no_obstacle(worker, speech, container, tag):
    codec = {"ac3": "ac3", "amr": "libopencore_amrnb"}.get(container) or CODECS[container]
    rate = {"libopus": 48_000, "ac3": 48_000, "libopencore_amrnb": 8_000}.get(codec, 44_100)
    before = {
        **{"small": id3(500), "large": id3(1_200_000), "two": id3(1_200_000) + id3(500)},
        **{"with a footer": id3(1000, 4, footer=True), "padded": id3(500) + bytes(3000)},
    }
    file = encode(at(speech, rate), rate, container, codec)
    status, text, notes = answer(worker, before[tag] + file)
    assert (status, text) == (200, TEXT)
    assert not notes or container in ("adts", "ac3", "mp3")


def test_a_tag_alone_is_no_audio(worker):
    for tag in (id3(500), id3(500)[:200], id3(500) + bytes(100), id3(0) * 50):
        status, body, _ = answer(worker, tag)
        assert (status, body["type"]) == (400, "NotAudio")


# Phases


@pytest.mark.parametrize("gain", [-1.0, -0.9, -0.6])
@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "mp3")])
def test_channels_of_opposite_phases_do_not_cancel(worker, speech, gain, container, codec):
    samples = np.concatenate([at(speech, 44_100), gain * at(speech, 44_100)])
    status, text, notes = answer(worker, encode(samples, 44_100, container, codec))
    assert (status, text) == (200, TEXT) and "opposite phases" in notes


def test_phases_may_be_opposite_in_a_part_of_a_file(heard, speech, other):
    silence = torch.zeros(8 * RATE)
    left = torch.cat([speech, silence, other, silence, speech])
    right = torch.cat([speech, silence, -other, silence, speech])
    file = encode(torch.stack([left, right]).numpy(), RATE, "wav", "pcm_s16le")
    assert heard(file) == "speech other speech"


def test_the_loudest_of_six_channels_is_taken_where_two_cancel(worker, speech):
    samples = torch.stack([speech, -speech, *[torch.zeros_like(speech)] * 4]).numpy()
    assert answer(worker, encode(samples, RATE, "wav", "pcm_s16le"))[:2] == (200, TEXT)


def test_channels_that_do_not_cancel_are_averaged():
    rng = np.random.default_rng(5)
    for channels in (rng.normal(0, 0.1, (2, 20_000)), np.stack([np.zeros(20_000), rng.normal(0, 0.1, 20_000)])):
        notes = []
        waveform = decode_audio(encode(channels.astype(np.float32), RATE, "wav", "pcm_f32le"), notes)
        assert np.allclose(waveform.numpy(), channels.mean(axis=0), atol=1e-6) and not notes
