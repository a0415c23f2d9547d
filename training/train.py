"""Train the spoken-digit Emformer RNN-T on the clips that synthesise.py wrote.

    python train.py --clips data --output ../models/digits
    python train.py --clips data --output ../models/digits --polish first.pt --steps 1000 --learning-rate 4e-4

Features are exactly those of torchaudio's ``EMFORMER_RNNT_BASE_LIBRISPEECH`` extractor with our own
global statistics, so the serving code treats this model like the base model. Two losses train together:
the transducer's, and what is said in each frame, by a head that is thrown away at the end. The strings grow
longer and the recordings worse as the run goes on.

The transducer marks where a word begins and writes it where it ends. The mark is SentencePiece's ``</s>``, which
torchaudio's token processor leaves out of the text. Without it, whether "four four" is one word or two could only
be told by counting; with it, the predictor knows whether a word has begun and nothing else has to be remembered.

A run keeps ``checkpoint.pt`` (``polish.pt``) beside the clips and goes on from it when started again.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

# The process that makes the batches takes its time from the two that train: while they wait for each other they must
# sleep and not spin, which would double the time of a step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import sentencepiece
import soundfile
import torch
from augment import Augmenter, prepare_masks
from torchaudio.models import emformer_rnnt_model
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH
from tqdm import tqdm

SAMPLE_RATE = EMFORMER_RNNT_BASE_LIBRISPEECH.sample_rate
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"]

# Segment, right context, time reduction and memory are those of emformer_rnnt_base. The left context is a fifth of its:
# an Emformer has no positions, and the more words it looks back on, the more often it takes one for its neighbour.
ARCHITECTURE = {
    "input_dim": 80,
    "encoding_dim": 256,
    "num_symbols": len(WORDS) + 4,  # the words, SentencePiece's <unk> <s> </s>, and blank, which is last
    "segment_length": 16,
    "right_context_length": 4,
    "time_reduction_input_dim": 64,
    "time_reduction_stride": 4,
    "transformer_num_heads": 4,
    "transformer_ffn_dim": 512,
    "transformer_num_layers": 8,
    "transformer_dropout": 0.0,
    "transformer_activation": "gelu",
    "transformer_left_context_length": 6,
    "transformer_max_memory_size": 0,
    "transformer_weight_init_scale_strategy": "depthwise",
    "transformer_tanh_on_mem": True,
    "symbol_embedding_dim": 128,
    "num_lstm_layers": 1,
    "lstm_layer_norm": True,
    "lstm_layer_norm_epsilon": 1e-3,
    "lstm_dropout": 0.0,
}
BLANK = ARCHITECTURE["num_symbols"] - 1
BEGINS = 2  # </s>, written where a word begins
STRIDE = ARCHITECTURE["time_reduction_stride"]
PADDING = ARCHITECTURE["right_context_length"]

ROUGH_STEPS = 1200  # over these steps more and more of the utterances pass through recorded()
GROWTH = ((0.0, 3), (0.05, 6), (0.15, 10), (0.3, 16))  # share of the run, longest string in words
SINGLE = 0.35  # share of the batches that hold single words only
WITHOUT_DIGITS = 0.22  # share of the utterances in which nothing is to be written
OTHER_WORDS = 0.15  # share of the utterances in which other words are said between the digits
REPEATS = 0.2  # how often a piece that begins with the last word said is made to follow it
FORBIDDEN = -20.0  # added to the log-probability of a word outside its window
MAX_SECONDS = 16.0
WARM_UP = 300  # steps over which the learning rate rises
DECAY = 0.6  # share of the run, at its end, over which it falls
SAVE_EVERY = 120  # seconds
POOL = 8  # batches whose utterances are drawn together and sorted by length, so that little is padding
FRAME_SECONDS = STRIDE * EMFORMER_RNNT_BASE_LIBRISPEECH.hop_length / SAMPLE_RATE  # of the encoder
# Where the transducer may write, see allowed(): the mark until so many seconds after a word's beginning, the word from
# so many seconds before its end to so many after it.
MARKED = 0.25
EARLIEST = 0.1
LATEST = 0.12
ALONE = 0.7  # seconds: a clip of a single word that is longer has something else around it
FASTEST = 0.28  # seconds a word: what a synthesiser says faster than this is no longer all there
# How often an engine's clips are drawn; the robotic ones less.
ENGINE_WEIGHTS = {"espeak": 0.6, "festival": 0.6, "flite": 0.8}
REAL = 0.5  # share of the utterances that are made of recordings of real speakers


@dataclasses.dataclass
class Clip:
    """Samples (int16, 16 kHz) and the words said.

    If it is known, where to cut (words + 1 places, in samples) and where each word begins and ends to be loud.
    """

    samples: np.ndarray
    words: list[str]
    voice: str
    source: str  # of a recording; empty if it was synthesised
    cuts: list[int] | None
    spans: list[tuple[int, int]]


def loudness(samples: np.ndarray) -> np.ndarray:
    """The peak of every 5 ms."""
    return np.abs(samples[: len(samples) // 80 * 80].astype(np.float32)).reshape(-1, 80).max(1, initial=0.0)


def cuts_at_pauses(samples: np.ndarray, count: int) -> list[int] | None:
    """Cut in the middle of pauses of 90 ms or more, if there are ``count - 1`` of them."""
    frames = loudness(samples)
    loud = np.flatnonzero(frames > 0.02 * frames.max(initial=1.0))
    pauses = [(a + b) // 2 * 80 for a, b in itertools.pairwise(loud) if b - a > 18]
    return [0, *map(int, pauses), len(samples)] if len(pauses) == count - 1 else None


def cuts_at_times(samples: np.ndarray, places: list[tuple[float, float]]) -> list[int]:
    """Cut where it is quietest around the times at which the synthesiser began each word.

    It lets a word be heard 30 to 50 ms before the time that it gives (measured on first words).
    """
    frames, cuts = loudness(samples), [0]
    for (before, _), (start, _) in itertools.pairwise(places):
        low = int(max(start - 0.13, before + 0.06) * 200)
        window = np.convolve(frames[low : max(int((start - 0.01) * 200), low + 4)], np.ones(3), "same")
        cuts.append((low + int(np.argmin(window))) * 80)
    return [*cuts, len(samples)]


def loud_part(samples: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """Where a word that was cut from ``begin`` to ``end`` is less than 26 dB under its peak and above the noise."""
    frames = loudness(samples[begin:end])
    peak = frames.max(initial=1.0)
    # A word alone stands in noise; one that was cut out of a string has nothing around it that would tell of the noise.
    floor = np.percentile(frames, 10) if len(frames) > ALONE * 200 else 0.0
    loud = np.flatnonzero(frames > min(max(0.05 * peak, 2 * floor), 0.3 * peak))
    return (begin + int(loud[0]) * 80, begin + int(loud[-1] + 1) * 80) if len(loud) else (begin, end)


def load_clips(folder: Path, split: str) -> tuple[list[Clip], list[np.ndarray]]:
    """Read the clips of ``split``, without those that ``filter_clips.py`` found to be wrong, and recorded noises."""
    rejected = folder / "rejected.txt"
    wrong = set(rejected.read_text().split()) if rejected.exists() else set()
    clips, noises = [], []
    for path in sorted(folder.glob(f"{split}-*.json")):
        if path.stem in wrong:
            continue
        described = json.loads(path.read_text())
        samples, _ = soundfile.read(path.with_suffix(".wav"), dtype="int16")
        words, source = described["text"].split(), described.get("source", "")
        if described.get("kind") == "noise":
            noises.append(samples)
            continue
        fastest = 0 if source else FASTEST
        if np.abs(samples).max(initial=0) <= (50 if source else 500) or len(samples) < fastest * SAMPLE_RATE * len(
            words
        ):
            continue
        places = described["words"]
        cuts = cuts_at_times(samples, places) if places else cuts_at_pauses(samples, len(words))
        if source and not places and len(words) == 1:
            cuts = [0, len(samples)]
        spans = [loud_part(samples, *ends) for ends in itertools.pairwise(cuts)] if cuts else []
        clips.append(Clip(samples, words, described["voice"], source, cuts, spans))
    return clips, noises


def trimmed(samples: np.ndarray, rng: random.Random) -> tuple[int, int]:
    """Where to cut the silence (36 to 44 dB under the peak) at both ends, leaving up to 0.1 s of it."""
    loud = np.flatnonzero(np.abs(samples) > rng.uniform(0.006, 0.015) * np.abs(samples).max())
    if not len(loud):
        return 0, len(samples)
    margin = int(rng.uniform(-0.03, 0.1) * SAMPLE_RATE)
    return max(int(loud[0]) - margin, 0), min(int(loud[-1]) + max(margin, 1), len(samples))


def noise(length: int, rng: random.Random, generator: np.random.Generator) -> np.ndarray:
    """Unit-power noise: its spectrum falls between 0 (white) and 6 dB (brown) per octave."""
    spectrum = np.fft.rfft(generator.standard_normal(length, np.float32))
    spectrum /= np.maximum(np.arange(len(spectrum), dtype=np.float32), 50 * length / SAMPLE_RATE) ** rng.uniform(0, 1)
    wave = np.fft.irfft(spectrum, length)
    return (wave / (wave.std() + 1e-9)).astype(np.float32)


def drawn(clips: list[Clip], rng: random.Random) -> Clip:
    """One of ``clips``: a recording as often as a synthesised one."""
    real = rng.random() < 0.5
    for _ in range(20):
        clip = rng.choice(clips)
        if bool(clip.source) == real:
            break
    return clip


def without_digits(clips: list[Clip], length: int, rng: random.Random, generator: np.random.Generator) -> np.ndarray:
    """``length`` samples in which nobody says a digit: other words, tones, breath, noise or silence."""
    kind = rng.random()
    if kind < 0.8 and clips:
        pieces, missing = [], length
        while missing > 0:
            samples = drawn(clips, rng).samples
            low, high = trimmed(samples, rng)
            if high - low > missing:
                low = rng.randint(low, high - missing)
            piece = samples[low : min(high, low + missing)].astype(np.float32)
            pause = np.zeros(int(rng.choice([0.0, 0.0, 0.2]) * rng.random() * SAMPLE_RATE), np.float32)
            pieces += [piece * np.float32(10 ** (rng.uniform(-4, 4) / 20) / (np.abs(piece).max(initial=0) + 1)), pause]
            missing -= len(piece) + len(pause) + 1
        return np.concatenate(pieces)
    times = np.arange(length, dtype=np.float32) / SAMPLE_RATE
    wave = np.zeros(length, np.float32)
    if kind < 0.88:  # music, more or less: notes of a few harmonics
        start = 0
        while start < length:
            stop = start + int(rng.uniform(0.08, 0.8) * SAMPLE_RATE)
            for _ in range(rng.randint(1, 4)):
                pitch = 65 * 2 ** rng.uniform(0, 4)
                shape = np.exp(-rng.uniform(0, 6) * (times[start:stop] - times[start]))
                for harmonic in range(1, rng.randint(2, 9)):
                    wave[start:stop] += shape * np.sin(2 * np.pi * pitch * harmonic * times[start:stop]) / harmonic
            start = stop
    elif kind < 0.95:  # breath, wind, rustling, knocks: bursts of noise in a band
        for _ in range(rng.randint(1, 6)):
            size = int(rng.choice([0.02, 0.1, 0.5, 1.0]) * rng.uniform(0.5, 1.5) * SAMPLE_RATE)
            start = rng.randrange(max(length - size, 1))
            burst = noise(size, rng, generator) * np.hanning(size).astype(np.float32)
            spectrum = np.fft.rfft(burst)
            low = rng.uniform(0, 3000)
            bins = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
            spectrum[(bins < low) | (bins > low + rng.uniform(500, 5000))] *= 0.1
            burst = np.fft.irfft(spectrum, size)[: length - start] * rng.uniform(0.1, 1)
            wave[start : start + len(burst)] += burst
    elif kind < 0.99:
        wave = noise(length, rng, generator)
    return wave / (np.abs(wave).max() + 1e-9)


def draw_weights(clips: list[Clip]) -> list[float]:
    """How often each clip is drawn.

    Sources by the root of their size, strings by their words, and a word that is seldom said alone more often than
    chance.
    """
    sizes = Counter(clip.source for clip in clips)
    words = Counter((clip.source, clip.words[0]) for clip in clips if len(clip.words) == 1)
    weights = []
    for clip in clips:
        if not clip.source:
            weights.append(ENGINE_WEIGHTS.get(clip.voice.partition("-")[0], 1.0))
        else:
            rarity = (words[clip.source, clip.words[0]] * len(WORDS) / sizes[clip.source]) ** -0.5
            weight = rarity if len(clip.words) == 1 else min(len(clip.words), 5)
            weights.append(sizes[clip.source] ** -0.5 * weight)
    real = sum(weight for weight, clip in zip(weights, clips, strict=True) if clip.source)
    synthetic = sum(weights) - real
    shares = (REAL / real, (1 - REAL) / synthetic) if real and synthetic else (1.0, 1.0)
    return [weight * shares[not clip.source] for weight, clip in zip(weights, clips, strict=True)]


class Batches(torch.utils.data.Dataset):
    """Batches of the run, ``POOL`` at once, made from a seed of their own.

    Each: clean waves (batch, samples), int16; their lengths; targets; target lengths; spans.
    """

    def __init__(self, clips: list[Clip], args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank = args, rank
        self.clips = [clip for clip in clips if clip.words]
        self.others = [clip for clip in clips if not clip.words]
        self.voices: dict[str, list[Clip]] = {}
        for clip in self.clips:
            self.voices.setdefault(clip.voice, []).append(clip)
        self.cumulated = list(itertools.accumulate(draw_weights(self.clips)))

    def __len__(self) -> int:
        return -(-self.args.steps // POOL)

    def piece(self, clip: Clip, wanted: int, rng: random.Random) -> tuple[int, int] | None:
        """The first and the last (exclusive) of up to ``wanted`` words of ``clip``; None if it cannot be cut."""
        size = len(clip.words)
        if clip.cuts is None:
            return (0, size) if size <= wanted else None
        count = rng.randint(1, min(size, wanted))
        start = rng.randint(0, size - count)
        return start, start + count

    def utterance(
        self, wanted: int, mixed: bool, edge: float, rng: random.Random, generator: np.random.Generator
    ) -> tuple[np.ndarray, list[str], list[tuple[float, float, float]]]:
        """``wanted`` words of one voice, up to ``edge`` seconds before and after; if ``mixed``, other words, too.

        Returns the samples, the words, and where each is: start and stop in seconds and whether that is known (1.0) or
        only that the word is somewhere between (0.0).
        """
        if mixed and rng.random() < WITHOUT_DIGITS:
            length = int((0.3 + 0.5 * wanted * rng.uniform(0.5, 1)) * SAMPLE_RATE)
            return without_digits(self.others, length, rng, generator) * 0.3, [], []
        [chosen] = rng.choices(self.clips, cum_weights=self.cumulated)
        clips = self.voices[chosen.voice]
        pieces = [np.zeros(int(rng.uniform(0, edge) * SAMPLE_RATE), np.float32)]
        words, places, position = [], [], len(pieces[0])
        interrupted = mixed and wanted > 2 and rng.random() < OTHER_WORDS
        widest = rng.choice([0.02, 0.1, 0.3, 0.3, 1.0])

        def add(samples: np.ndarray) -> None:
            nonlocal position
            pieces.append(samples)
            position += len(samples)

        for _ in range(50):
            clip = rng.choice(clips) if words else chosen
            part = self.piece(clip, wanted - len(words), rng)
            # A word said twice is what a transducer is slowest to learn: give it more of them than chance does.
            if words and rng.random() < REPEATS:
                repeating = [other for other in clips if other.cuts and words[-1] in other.words]
                if repeating:
                    clip = rng.choice(repeating)
                    place = rng.choice([i for i, word in enumerate(clip.words) if word == words[-1]])
                    part = (place, place + 1)
            if part:
                first, last = part
                # Fewer of the word that is said least and most easily heard in others.
                if wanted == 1 and clip.words[first] == "oh" and rng.random() < 0.6:
                    continue
                if words:
                    add(np.zeros(int(rng.uniform(0, widest) * SAMPLE_RATE), np.float32))
                whole = clip.cuts is None
                begin, end = (0, len(clip.samples)) if whole else (clip.cuts[first], clip.cuts[last])
                low, high = 0, end - begin
                if clip.source and not whole and rng.random() < 0.6:  # tightly around the words, also in noise
                    before, after = (int(rng.uniform(-0.02, 0.15) * SAMPLE_RATE) for _ in range(2))
                    low = max(clip.spans[first][0] - before - begin, 0)
                    high = min(clip.spans[last - 1][1] + after, end) - begin
                elif rng.random() < 0.8:
                    low, high = trimmed(clip.samples[begin:end], rng)
                for word in range(first, last):
                    start, stop = (begin, end) if whole else clip.spans[word]
                    start, stop = max(start - begin - low, 0), min(stop - begin, high) - low
                    known = float(not whole or len(clip.words) == 1)
                    places.append(((position + start) / SAMPLE_RATE, (position + stop) / SAMPLE_RATE, known))
                piece = clip.samples[begin + low : begin + high].astype(np.float32)
                add(piece * (10 ** (rng.uniform(-4, 4) / 20) * 0.3 / (np.abs(piece).max(initial=0) + 1)))
                words = words + clip.words[first:last]
            if interrupted and self.others and rng.random() < 0.3:
                add(without_digits(self.others, int(rng.uniform(0.3, 2.5) * SAMPLE_RATE), rng, generator) * 0.3)
            if len(words) >= wanted:
                break
        if not words:
            return self.utterance(wanted, mixed, edge, rng, generator)
        add(np.zeros(int(rng.uniform(0, edge) * SAMPLE_RATE), np.float32))
        return np.concatenate(pieces), words, places

    def __getitem__(self, index: int) -> list[tuple[torch.Tensor, ...]]:
        step = index * POOL
        kinds, rng = random.Random(index), random.Random(f"{index}-{self.rank}")
        generator = np.random.default_rng((index, self.rank))
        longest = max(words for share, words in GROWTH if step >= share * self.args.steps)
        if self.args.polish:
            longest = GROWTH[-1][1]
        mixed = self.args.polish is not None or step > ROUGH_STEPS / 2
        utterances = []
        for _ in range(POOL):
            edge = kinds.choice([0.0, 0.0, 0.08, 0.2, 0.6])
            wanted = 1 if kinds.random() < SINGLE else kinds.randint(2, kinds.randint(2, longest))
            missing = self.args.seconds * SAMPLE_RATE
            while missing > 0:
                wave, words, places = self.utterance(wanted, mixed, edge, rng, generator)
                # Every word gets a frame of the encoder of its own.
                shortest = max(0.15, FRAME_SECONDS * (len(words) + 1))
                if not shortest < len(wave) / SAMPLE_RATE < min(MAX_SECONDS, 1.2 + 0.9 * wanted):
                    continue
                missing -= len(wave)
                utterances.append((wave, words, places))
        # All processes have batches of nearly the same lengths, in the same order.
        utterances.sort(key=lambda utterance: len(utterance[0]))
        ends = np.cumsum([len(wave) for wave, _, _ in utterances])
        places = np.searchsorted(ends, np.linspace(0, ends[-1], POOL + 1)[1:-1])
        batches = [self.batch(utterances[a:b]) for a, b in itertools.pairwise([0, *places, len(utterances)])]
        kinds.shuffle(batches)
        return batches

    def batch(self, utterances: list[tuple[np.ndarray, list[str], list]]) -> tuple[torch.Tensor, ...]:
        waves, texts, spans = [], [], []
        for wave, words, places in utterances:
            waves.append(torch.from_numpy(np.clip(wave * 32768, -32768, 32767).astype(np.int16)))
            texts.append(torch.tensor([3 + WORDS.index(word) for word in words], dtype=torch.int32))
            spans.append(torch.tensor(places).reshape(-1, 3))
        padded = torch.nn.utils.rnn.pad_sequence
        return (
            padded(waves, batch_first=True),
            torch.tensor([len(wave) for wave in waves]),
            padded(texts, batch_first=True),
            torch.tensor([len(text) for text in texts], dtype=torch.int32),
            padded(spans, batch_first=True),
        )


def allowed(spans: torch.Tensor, frames: torch.Tensor, length: int) -> torch.Tensor:
    """Where marks and words may be written: (batch, ``length``, 2 x words), from where words are: (batch, words, 3).

    Alignment-restricted transducer loss (Mahadeokar et al., 2021): without it a word's probability is spread over
    several frames, in none of which a narrow search finds it likelier than blank.
    """
    times = torch.arange(length, device=spans.device)[None, :, None] * FRAME_SECONDS
    start, stop, known = (part[:, None] for part in spans.unbind(2))
    last = (frames[:, None, None] - 1) * FRAME_SECONDS
    sure = known > 0
    begin = torch.minimum(start, last - FRAME_SECONDS) - FRAME_SECONDS
    marked = torch.maximum(torch.where(sure, torch.minimum(start + MARKED, stop), stop), begin + 2 * FRAME_SECONDS)
    earliest = torch.minimum(torch.where(sure, stop - EARLIEST, start), last) - FRAME_SECONDS
    latest = torch.maximum(stop + LATEST, earliest + 2 * FRAME_SECONDS)
    marks = (times >= begin) & (times <= marked)
    words = (times >= earliest) & (times <= latest)
    return torch.stack([marks, words], 3).flatten(2)


def frame_labels(spans: torch.Tensor, targets: torch.Tensor, frames: torch.Tensor, length: int) -> torch.Tensor:
    """What is said in each frame, (batch, ``length``): 0 nothing, 1 and 2 the halves of the first word, and so on.

    -100, which cross-entropy passes over, where that is not known and after the end.
    """
    times = (torch.arange(length, device=spans.device)[None, :, None] + 0.5) * FRAME_SECONDS
    start, stop, known = (part[:, None] for part in spans.unbind(2))
    inside = (times >= start) & (times < stop)
    half = (times >= (start + stop) / 2).long()
    labels = torch.zeros(len(frames), length, dtype=torch.long, device=spans.device)
    if spans.shape[1]:
        labels = (inside * (2 * (targets[:, None].long() - 3) + 1 + half)).amax(2)
        labels[(inside & (known == 0)).any(2)] = -100
    return labels.masked_fill_(torch.arange(length, device=spans.device) >= frames[:, None], -100)


def write_tokenizer(path: Path) -> None:
    """Train a word-level SentencePiece model whose piece 3 + i is ``WORDS[i]``."""
    # Pieces are numbered by falling frequency, so word i is written len(WORDS) - i times.
    sentences = [word for i, word in enumerate(WORDS) for _ in range(len(WORDS) - i)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(path.with_suffix("")),
        model_type="word",
        vocab_size=BLANK,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [pieces.id_to_piece(3 + i) for i in range(len(WORDS))] == ["\u2581" + word for word in WORDS]


def write_global_stats(path: Path, clips: list[Clip], noises: list[np.ndarray], args: argparse.Namespace) -> None:
    """Measure mean and inverse standard deviation of every mel bin over some rough batches."""
    path.write_text(json.dumps({"mean": [0.0] * 80, "invstddev": [1.0] * 80}))
    batches, augmenter = Batches(clips, args, 0), Augmenter(feature_extractor(path), noises)
    frames = []
    for step, (waves, lengths, _, words, spans) in enumerate(
        batches[len(batches) // 2] + batches[len(batches) // 2 + 1]
    ):
        features, counts, _ = augmenter(waves, lengths, spans, words, 1.0, step)
        frames += [part[:count].double() for part, count in zip(features, counts, strict=True)]
    frames = torch.cat(frames)
    stats = {"mean": frames.mean(0).tolist(), "invstddev": (1 / frames.std(0)).tolist()}
    path.write_text(json.dumps(stats, indent=1) + "\n")


def feature_extractor(global_stats: Path) -> torch.nn.Module:
    """torchaudio's extractor of the base model, with our statistics."""
    path = str(global_stats.resolve())
    return dataclasses.replace(EMFORMER_RNNT_BASE_LIBRISPEECH, _global_stats_path=path).get_feature_extractor()


def learning_rate(step: int, done: float, peak: float) -> float:
    """Rises over the first steps, stays, and falls in a straight line over the last part (``DECAY``).

    ``done`` is the share of the run that lies behind.
    """
    return peak * max(min((step + 1) / WARM_UP, 1.0, (1 - done) / DECAY), 0.0)


def average_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """Replace every gradient by its mean over the processes."""
    if processes > 1:
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(processes).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def transducer_loss(
    model: torch.nn.Module,
    encoded: torch.Tensor,
    frames: torch.Tensor,
    targets: torch.Tensor,
    target_lengths: torch.Tensor,
    spans: torch.Tensor,
) -> torch.Tensor:
    """Of every utterance, (batch,): of the likeliest way to write its marks and words in the frames allowed.

    The sum over all ways (Graves, 2012) leaves a word's probability shared among the frames of its window, in none of
    which a search of one hypothesis finds it likelier than blank.

    The predictor is told that a word was written, but not which: digits follow each other at random, and a joiner that
    expects the word that was heard before loses every word after one that it missed. Where nobody says a digit, blank
    is to be written after a mark, too, so that a wrong mark stays without a word.
    """
    written = torch.stack([torch.full_like(targets, BEGINS), targets], 2).flatten(1).long()
    history = torch.randint_like(targets, 3, BLANK)
    history = torch.stack([torch.full_like(history, BEGINS), history], 2).flatten(1)
    start = torch.full((len(targets), 1), BLANK, dtype=torch.int32, device=targets.device)
    history = torch.cat([start, history, torch.full_like(start, BEGINS)], 1)
    predicted, _, _ = model.predict(history, 2 * target_lengths + 2, None)
    length = encoded.shape[1]
    times = torch.arange(length, device=frames.device)
    symbols = torch.arange(written.shape[1], device=frames.device)
    inside = times < frames[:, None]

    def log_probs(sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model.joiner.linear(model.joiner.activation(sources + targets)).float().log_softmax(-1)

    def rows(encodings: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return encodings.gather(1, places[..., None].expand(-1, -1, encodings.shape[2]))

    with torch.no_grad():
        lattice = log_probs(encoded[:, :, None], predicted[:, None, :-1])
        emitted = lattice[:, :, :-1].gather(3, written[:, None, :, None].expand(-1, length, -1, 1))[..., 0]
        emitted += FORBIDDEN * ~allowed(spans, frames, length)
        places = best_path(emitted, lattice[..., BLANK], frames.long(), 2 * target_lengths.long())
        moments = ((places[:, None] <= symbols[:, None]) & inside[:, None]).sum(2)  # when each symbol is written
        begin, end = (part * (1 / FRAME_SECONDS) for part in (spans[..., 0] - 0.1, spans[..., 1] + LATEST))
        said = ((times[:, None] >= begin[:, None]) & (times[:, None] <= end[:, None])).any(2)
        unmarked = inside & (places % 2 == 0) & ~said
    waits = log_probs(encoded, rows(predicted, places))[..., BLANK] * inside
    waits = waits + log_probs(encoded, rows(predicted, places + 1))[..., BLANK] * unmarked
    used = symbols < 2 * target_lengths[:, None]
    writes = log_probs(rows(encoded, moments.clamp(max=length - 1)), predicted[:, :-2])
    writes = writes.gather(2, written[..., None])[..., 0] * used
    return -waits.sum(1) - writes.sum(1)


def best_path(
    emitted: torch.Tensor, blanks: torch.Tensor, frames: torch.Tensor, written_lengths: torch.Tensor
) -> torch.Tensor:
    """How much of the text is written when a frame's blank is taken, (batch, frames), on the likeliest way.

    From the log-probabilities of the text's next symbol, (batch, frames, symbols), and of blank, (batch, frames,
    symbols + 1), in every frame after every number of symbols.
    """
    # What was written in frame t: from place u to place v of the text is worth sums[v] - sums[u].
    sums = torch.nn.functional.pad(emitted.cumsum(2), (1, 0))
    forward, origins = sums[:, 0], []
    for frame in range(1, emitted.shape[1]):
        best, origin = (forward + blanks[:, frame - 1] - sums[:, frame]).cummax(1)
        forward = sums[:, frame] + best
        origins.append(origin)
    place, places = written_lengths, [written_lengths]
    for frame in range(emitted.shape[1] - 1, 0, -1):
        before = origins[frame - 1].gather(1, place[:, None])[:, 0]
        place = torch.where(frame < frames, before, place)
        places.append(place)
    return torch.stack(places[::-1], 1)


def grown(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an encoder with fewer layers, made to fit one with more: what comes after the last changes nothing.

    A new layer adds nothing to what it is given until it has learned to, and its last normalisation has the mean and
    the deviation of that of the layer before.
    """
    weights = {name: value.float() for name, value in weights.items()}
    prefix = "transcriber.transformer.emformer_layers."
    layers = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in weights if name.startswith(prefix))
    for name in wanted.keys() - weights.keys():
        _, _, rest = name[len(prefix) :].partition(".")
        value = weights[f"{prefix}{layers - 1}.{rest}"]
        if rest.startswith(("attention.out_proj", "pos_ff.4")):
            value = torch.zeros_like(value)
        if rest.startswith("layer_norm_output"):
            scale, shift = (weights[f"{prefix}{layers - 1}.layer_norm_output.{part}"] for part in ("weight", "bias"))
            mean, power = shift.mean(), (scale.square() + shift.square()).mean()
            value = torch.full_like(value, mean if rest.endswith("bias") else (power - mean**2).sqrt())
        weights[name] = value
    return weights


def train(rank: int, args: argparse.Namespace, clips: list[Clip] | None = None, noises: list | None = None) -> None:
    """What one process does: the first, of ``rank`` 0, writes files and reports."""
    torch.manual_seed(rank)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")  # on a GPU that has TF32
    device = torch.device(args.device)
    if args.processes > 1:
        address = f"tcp://127.0.0.1:{args.port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=args.processes)
    if clips is None:
        clips, noises = load_clips(args.clips, "train")
    clips = [clip for clip in clips if clip.source not in args.without]
    checkpoint, first, saved = args.clips / ("polish.pt" if args.polish else "checkpoint.pt"), 0, {}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        first = saved.pop("step")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(Batches(clips, args, rank), range(first // POOL, -(-args.steps // POOL))),
        batch_size=None,
        num_workers=args.loaders,
        prefetch_factor=2 if args.loaders else None,
        multiprocessing_context="fork" if args.loaders else None,
        pin_memory=device.type == "cuda",
    )
    pools = iter(loader)  # before the GPU is used: a process that holds one takes seconds to fork
    model = emformer_rnnt_model(**ARCHITECTURE)
    frame_head = torch.nn.Linear(ARCHITECTURE["encoding_dim"], 1 + 2 * len(WORDS))
    if args.polish:
        model.load_state_dict(grown(torch.load(args.polish, weights_only=True), model.state_dict()))
    model.to(device), frame_head.to(device)
    # An exponential moving average of the weights is what is kept in the end.
    average = copy.deepcopy(model).requires_grad_(False)
    parameters = [*model.parameters(), *frame_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    trained = {"model": model, "frame": frame_head, "average": average, "optimizer": optimizer}
    for name, state in saved.items():
        trained[name].load_state_dict(state)
    if args.processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)
    augmenter = Augmenter(feature_extractor(args.output / "global_stats.json"), noises).to(device)
    prepare_masks(model, device)

    def save(step: int, done: float) -> None:
        # Written beside and moved into place: a run that is cut while it writes leaves the one before.
        state = {"step": step, **{name: part.state_dict() for name, part in trained.items()}}
        kept = [checkpoint]
        if done <= 1 - DECAY:
            kept.append(checkpoint.with_name("before-decay.pt"))  # from here a run can be made longer
        for path in kept:
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        # Half precision halves the file; the rounding is far below what changes a transcript.
        weights = {name: value.half().cpu() for name, value in average.state_dict().items()}
        torch.save(weights, args.output / "weights.pt")

    losses, started, saved_at = [], None, time.monotonic()
    batches = itertools.islice(itertools.chain.from_iterable(pools), args.steps - first)
    progress = tqdm(batches, initial=first, total=args.steps, unit="step", mininterval=30, disable=rank > 0)
    for step, batch in enumerate(progress, start=first):
        started = started or time.monotonic()
        done = torch.tensor((time.monotonic() - started) / 60 / args.minutes if args.minutes else step / args.steps)
        if args.minutes and args.processes > 1:
            torch.distributed.broadcast(done, 0)  # they stop together
        done = done.item()
        if done >= 1:
            break
        _, lengths, _, words, _ = batch
        waves, _, targets, target_lengths, spans = (part.to(device, non_blocking=True) for part in batch)
        roughness = 1.0 if args.polish else min(1.0, step / ROUGH_STEPS)
        seed = step * args.processes + rank
        features, frames, spans = augmenter(waves, lengths, spans, words, roughness, seed)
        longest = int(frames.max()) // STRIDE
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            encoded, frames = model.transcribe(features, frames.to(device, non_blocking=True))
        encoded, frames = encoded[:, :longest].float(), frames.int()
        labels = frame_labels(spans, targets, frames, encoded.shape[1])
        said = torch.nn.functional.cross_entropy(frame_head(encoded).transpose(1, 2), labels, ignore_index=-100)
        transducer = transducer_loss(model, encoded, frames, targets, target_lengths, spans)
        loss = (transducer / target_lengths.clamp(min=1)).mean() + said
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters, args.processes)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        for parameter in parameters:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # no waiting for a GPU to tell
        losses.append(torch.stack([loss.detach(), said.detach(), norm.isfinite().float()]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done, args.learning_rate)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if rank == 0 and (step + 1) % 50 == 0:
            total, framewise, finite = torch.stack(losses[-50:]).mean(0).tolist()
            progress.write(f"step {step + 1}: loss {total:.3f}, of which frames {framewise:.3f}")
            if finite < 1:
                progress.write(f"{1 - finite:.0%} of the gradients were not finite")
        if rank == 0 and time.monotonic() - saved_at > SAVE_EVERY:
            save(step + 1, done)
            saved_at = time.monotonic()
    if rank == 0:
        save(step + 1, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("../models/digits"))
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--minutes", type=float, help="of the run, in place of --steps")
    parser.add_argument("--seconds", type=int, default=40, help="of audio in a batch, padding included")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="for processors that multiply bfloat16 (AVX-512 BF16, AMX)")
    parser.add_argument("--polish", type=Path, help="weights to go on from at full difficulty, without the warm-up")
    parser.add_argument("--without", nargs="+", default=[], help="sources of recordings to leave out")
    parser.add_argument("--processes", type=int, default=2, help="as many batches at once; one for each core")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--loaders", type=int, default=0, help="processes that make batches, for each that trains")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=29_500, help="on which the processes find each other")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    clips, noises = load_clips(args.clips, "train")
    for source, chosen in itertools.groupby(sorted(clips, key=lambda clip: clip.source), lambda clip: clip.source):
        part = list(chosen)
        hours = sum(len(clip.samples) for clip in part) / SAMPLE_RATE / 3600
        voices = len({clip.voice for clip in part})
        print(f"{source or 'synthesised'}: {len(part)} clips, {hours:.2f} h, {voices} voices", flush=True)
    tokenizer, stats = args.output / "tokenizer.model", args.output / "global_stats.json"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    if not stats.exists():
        write_global_stats(stats, clips, noises, args)
    (args.output / "architecture.json").write_text(json.dumps(ARCHITECTURE, indent=1) + "\n")
    if args.processes == 1:
        train(0, args, clips, noises)
    else:
        torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
