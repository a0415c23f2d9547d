"""Train the spoken-digit Emformer RNN-T on the clips that synthesise.py wrote.

    python train.py --clips data --output ../models/digits
    python train.py --clips data --output ../models/digits --polish first.pt --steps 1000 --learning-rate 4e-4

Features are exactly those of torchaudio's ``EMFORMER_RNNT_BASE_LIBRISPEECH`` extractor with our own
global statistics, so the serving code treats this model like the base model. RNN-T loss alone does not
move for thousands of steps from a cold start: a CTC head (thrown away at the end) leads for the first
steps on clean clips of one or two words, then both losses train together while the strings grow longer
and the recordings worse.

A run keeps ``checkpoint.pt`` (``polish.pt``) beside the clips and goes on from it when started again.
"""

import argparse
import copy
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
import torchaudio
from torchaudio.models import emformer_rnnt_model
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

SAMPLE_RATE = EMFORMER_RNNT_BASE_LIBRISPEECH.sample_rate
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"]

# Segment, right context, time reduction, left context and memory are those of emformer_rnnt_base.
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
    "transformer_num_layers": 6,
    "transformer_dropout": 0.0,
    "transformer_activation": "gelu",
    "transformer_left_context_length": 30,
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
STRIDE = ARCHITECTURE["time_reduction_stride"]
PADDING = ARCHITECTURE["right_context_length"]

CTC_STEPS = 400  # steps with the CTC loss alone, on clean clips of one or two words
GROWTH = ((0.0, 2), (0.18, 4), (0.3, 7), (0.45, 12))  # share of the run, longest string in words
POLISH_WORDS = 7  # longest string of a polishing run
ROUGH_STEPS = 1000  # over these steps more and more of the utterances pass through recorded()
REPEATS = 0.4  # how often a clip that begins with the last word said is made to follow it
BATCH_FRAMES = 10_000  # feature frames (10 ms) a step


def load_clips(folder: Path, split: str) -> dict[str, list[tuple[np.ndarray, list[str]]]]:
    """Read the clips of ``split``: voice -> [(int16 samples at 16 kHz, words)]."""
    voices: dict[str, list[tuple[np.ndarray, list[str]]]] = {}
    for path in sorted(folder.glob(f"{split}-*.json")):
        clip = json.loads(path.read_text())
        samples, _ = soundfile.read(path.with_suffix(".wav"), dtype="int16")
        if np.abs(samples).max(initial=0) > 500:
            voices.setdefault(clip["voice"], []).append((samples, clip["text"].split()))
    return voices


def trimmed(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """Cut the silence (40 dB under the peak) at both ends, leaving up to 0.1 s of it."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    margin = int(rng.uniform(-0.01, 0.1) * SAMPLE_RATE)
    return samples[max(loud[0] - margin, 0) : loud[-1] + max(margin, 1)]


def noise(length: int, rng: random.Random, generator: np.random.Generator) -> np.ndarray:
    """Unit-power noise, its spectrum falling between 0 (white) and 6 dB (brown) per octave."""
    spectrum = np.fft.rfft(generator.standard_normal(length, np.float32))
    spectrum /= np.maximum(np.arange(len(spectrum), dtype=np.float32), 50 * length / SAMPLE_RATE) ** rng.uniform(0, 1)
    coloured = np.fft.irfft(spectrum, length)
    return coloured / (coloured.std() + 1e-9)


def filtered(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(wave) * response, len(wave))


def recorded(wave: np.ndarray, rng: random.Random, generator: np.random.Generator) -> np.ndarray:
    """Put a clean wave through what a room, a microphone and a line do to it."""
    if rng.random() < 0.5:  # pitch, formants and tempo together
        ratio = rng.choice([17, 18, 19, 21, 22, 23])
        wave = torchaudio.functional.resample(torch.from_numpy(wave), 20, ratio).numpy()
    if rng.random() < 0.35:  # a room: exponentially decaying noise after the direct sound
        decay = rng.uniform(0.05, 0.5)
        tail = generator.standard_normal(int(decay * SAMPLE_RATE), np.float32)
        tail *= 10 ** (-3 * np.arange(len(tail)) / len(tail)) * rng.uniform(0.01, 0.06)
        tail[0] = 1.0
        size = -(-(len(wave) + len(tail)) // 1600) * 1600
        wave = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)]
    wave = np.pad(wave, (0, -len(wave) % 1600))  # a length that FFTs are fast at
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE).astype(np.float32)
    if rng.random() < 0.5:  # a microphone's tilt, in dB per octave around 1 kHz
        tilt = rng.uniform(-5, 5) * np.log2(np.maximum(frequency, 60) / 1000)
        wave = filtered(wave, 10 ** (np.clip(tilt, -20, 20) / 20))
    speech_power = np.sqrt(np.mean(wave**2)) + 1e-9
    if rng.random() < 0.7:
        snr = rng.uniform(5, 45)
        wave = wave + noise(len(wave), rng, generator) * speech_power * 10 ** (-snr / 20)
    wave = wave / (np.abs(wave).max() + 1e-9)
    if rng.random() < 0.08:
        wave = np.clip(wave * rng.uniform(1.2, 4), -1, 1)
    # Band limits come last: a clip recorded at 8 kHz has nothing at all above 4 kHz.
    limit = rng.random()
    if limit < 0.25:
        wave = filtered(wave, (frequency > rng.uniform(100, 350)) & (frequency < rng.uniform(3200, 3600)))
    elif limit < 0.5:
        wave = filtered(wave, frequency < 3950)
    if rng.random() < 0.1:  # 8-bit mu-law, as on a telephone line
        compressed = np.sign(wave) * np.log1p(255 * np.abs(wave)) / math.log(256)
        compressed = np.round(compressed * 127) / 127
        wave = np.sign(compressed) * (256 ** np.abs(compressed) - 1) / 255
    return wave / (np.abs(wave).max() + 1e-9) * 10 ** (rng.uniform(-30, 0) / 20)


class Batches(torch.utils.data.Dataset):
    """Batch ``step`` of the run, made from its own seed: features, lengths, targets, target lengths."""

    def __init__(
        self, voices: dict[str, list[tuple[np.ndarray, list[str]]]], steps: int, polish: bool, extractor
    ) -> None:
        self.voices, self.steps, self.polish, self.extractor = voices, steps, polish, extractor
        self.names = list(voices)
        # A voice with many clips is heard more often, but not in proportion.
        self.weights = [math.sqrt(len(clips)) for clips in voices.values()]

    def __len__(self) -> int:
        return self.steps

    def utterance(
        self, wanted: int, roughness: float, rng: random.Random, generator: np.random.Generator
    ) -> tuple[np.ndarray, list[str]]:
        """About ``wanted`` words of one voice, put through ``recorded`` with probability ``roughness``."""
        clips = self.voices[rng.choices(self.names, self.weights)[0]]
        pieces, words = [], []
        widest = rng.choice([0.05, 0.3, 0.3, 1.0])
        for _ in range(50):
            samples, text = rng.choice(clips)
            # A word said twice is what a transducer is slowest to learn: give it more of them than chance does.
            if words and rng.random() < REPEATS:
                repeating = [clip for clip in clips if clip[1][0] == words[-1]]
                samples, text = rng.choice(repeating or [(samples, text)])
            if len(words) + len(text) <= wanted + 1:
                piece = trimmed(samples, rng).astype(np.float32) / 32768
                pieces += [np.zeros(int(rng.uniform(0, widest) * SAMPLE_RATE), np.float32), piece]
                words += text
            if len(words) >= wanted:
                break
        if not words:
            return self.utterance(wanted, roughness, rng, generator)
        edge = 0.0 if rng.random() < 0.3 else 0.6
        silence = [np.zeros(int(rng.uniform(0, edge) * SAMPLE_RATE), np.float32) for _ in range(2)]
        wave = np.concatenate([silence[0], *pieces[1:], silence[1]])
        if rng.random() < roughness:
            wave = recorded(wave, rng, generator)
        return wave.astype(np.float32), words

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rng, generator = random.Random(step), np.random.default_rng(step)
        longest = max(words for share, words in GROWTH if step >= share * self.steps)
        roughness = min(1.0, max(0, step - CTC_STEPS) / ROUGH_STEPS)
        if self.polish:
            longest, roughness = POLISH_WORDS, 1.0
        elif step < CTC_STEPS:
            longest = 2
        wanted = rng.randint(1, longest)  # one length a batch: little is padding
        features, texts, frames = [], [], 0
        while frames < BATCH_FRAMES and len(features) < 32:
            wave, words = self.utterance(wanted, roughness, rng, generator)
            if len(wave) < 0.2 * SAMPLE_RATE or len(wave) > 20 * SAMPLE_RATE:
                continue
            with torch.no_grad():
                features.append(self.extractor(torch.from_numpy(wave))[0])
            if rng.random() < 0.3:  # SpecAugment, one band of mel bins
                low, width = rng.randrange(70), rng.randint(1, 10)
                features[-1][:, low : low + width] = 0.0
            texts.append(torch.tensor([3 + WORDS.index(word) for word in words], dtype=torch.int32))
            frames += len(features[-1])
        # The extractor's last four frames are right context: they are not counted in the length.
        lengths = torch.tensor([len(f) - PADDING for f in features], dtype=torch.int32)
        return (
            torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            lengths,
            torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
            torch.tensor([len(t) for t in texts], dtype=torch.int32),
        )


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


def write_global_stats(path: Path, voices: dict[str, list[tuple[np.ndarray, list[str]]]]) -> None:
    """Measure mean and inverse standard deviation of every mel bin over 600 augmented utterances."""
    path.write_text(json.dumps({"mean": [0.0] * 80, "invstddev": [1.0] * 80}))
    batches = Batches(voices, 1, True, feature_extractor(path))
    rng, generator = random.Random("stats"), np.random.default_rng(0)
    waves = [batches.utterance(rng.randint(1, 8), 1.0, rng, generator)[0] for _ in range(600)]
    frames = torch.cat([batches.extractor(torch.from_numpy(wave))[0][:-PADDING] for wave in waves]).double()
    stats = {"mean": frames.mean(0).tolist(), "invstddev": (1 / frames.std(0)).tolist()}
    path.write_text(json.dumps(stats, indent=1) + "\n")


def feature_extractor(global_stats: Path) -> torch.nn.Module:
    """torchaudio's extractor of the base model, with our statistics."""
    path = str(global_stats.resolve())
    return dataclasses.replace(EMFORMER_RNNT_BASE_LIBRISPEECH, _global_stats_path=path).get_feature_extractor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("../models/digits"))
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--polish", type=Path, help="weights to go on from at full difficulty, without the warm-up")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(2)

    voices = load_clips(args.clips, "train")
    print(f"{sum(map(len, voices.values()))} clips of {len(voices)} voices", flush=True)
    tokenizer, stats = args.output / "tokenizer.model", args.output / "global_stats.json"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    if not stats.exists():
        write_global_stats(stats, voices)
    (args.output / "architecture.json").write_text(json.dumps(ARCHITECTURE, indent=1) + "\n")

    model = emformer_rnnt_model(**ARCHITECTURE)
    ctc_head = torch.nn.Linear(ARCHITECTURE["encoding_dim"], BLANK + 1)
    if args.polish:
        model.load_state_dict(torch.load(args.polish, weights_only=True))
    # An exponential moving average of the weights is what is kept in the end.
    average = copy.deepcopy(model).requires_grad_(False)
    parameters = [*model.parameters(), *ctc_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05, anneal_strategy="cos"
    )
    checkpoint, first = args.clips / ("polish.pt" if args.polish else "checkpoint.pt"), 0
    trained = {"model": model, "ctc": ctc_head, "average": average, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("step")
        for name, part in trained.items():
            part.load_state_dict(saved[name])
    batches = Batches(voices, args.steps, args.polish is not None, feature_extractor(stats))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(batches, range(first, args.steps)), batch_size=None, num_workers=1, prefetch_factor=8
    )

    def save(step: int) -> None:
        torch.save({"step": step, **{name: part.state_dict() for name, part in trained.items()}}, checkpoint)
        # Half precision halves the file; the rounding is far below what changes a transcript.
        weights = {name: value.half() for name, value in average.state_dict().items()}
        torch.save(weights, args.output / "weights.pt")

    started, losses = time.time(), []
    for step, (features, lengths, targets, target_lengths) in enumerate(loader, start=first):
        with torch.autocast("cpu", torch.bfloat16):
            encoded, frames = model.transcribe(features, lengths)
        encoded, frames = encoded.float(), frames.int()
        log_probs = ctc_head(encoded).log_softmax(2)
        loss = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1), targets, frames, target_lengths, BLANK, zero_infinity=True
        )
        if args.polish or step >= CTC_STEPS:
            start = torch.full((len(targets), 1), BLANK, dtype=torch.int32)
            predicted, _, _ = model.predict(torch.cat([start, targets], 1), target_lengths + 1, None)
            logits, _, _ = model.join(encoded, frames, predicted, target_lengths + 1)
            transducer = torchaudio.functional.rnnt_loss(
                logits, targets, frames, target_lengths, blank=BLANK, reduction="none"
            )
            loss = (0.0 if args.polish else 0.3) * loss + (transducer / target_lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            pace = (time.time() - started) / (step + 1 - first)
            print(f"step {step + 1}: loss {np.mean(losses[-50:]):.3f}, {pace:.2f} s a step", flush=True)
        if (step + 1) % 250 == 0:
            save(step + 1)
    save(args.steps)


if __name__ == "__main__":
    main()
