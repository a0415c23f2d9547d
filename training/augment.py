"""What rooms, microphones and lines do to speech, and the features of it: for whole batches, on any device."""

import functools

import numpy as np
import torch
import torchaudio
from torchaudio.functional import resample
from torchaudio.models import emformer

SAMPLE_RATE = 16_000
HOP = 160  # samples of a feature frame
BLOCK = 16  # frames: lengths of batches are multiples of it, so that the encoder's masks can be kept
FAST = 1600  # samples: lengths that FFTs are fast at are multiples of it
SPEEDS = (17, 18, 19, 21, 22, 23)  # twentieths of the length
LEAST_FRAMES = 8  # of an utterance, and for each of its words


def filtered(waves: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft(torch.fft.rfft(waves) * response, waves.shape[1])


def power(waves: torch.Tensor) -> torch.Tensor:
    return waves.square().mean(1, keepdim=True).sqrt() + 1e-9


class Augmenter(torch.nn.Module):
    """Waves of a batch to features of one, each utterance changed in its own random way.

    Args:
        extractor: torchaudio's feature extractor of the base model, with our statistics.
        noises: Recorded noises, int16 at 16 kHz.
    """

    def __init__(self, extractor: torch.nn.Module, noises: list[np.ndarray]) -> None:
        super().__init__()
        self.spectrogram, _, self.compress, self.normalise, self.pad = extractor.pipeline
        bank = np.stack([np.resize(noise, SAMPLE_RATE) for noise in noises or [np.zeros(1, np.int16)]])
        self.register_buffer("bank", torch.from_numpy(bank).float())
        self.recorded_noises = bool(noises)
        self.generator = torch.Generator()
        self.rough = torch.zeros(0, dtype=torch.bool)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Random numbers, (batch, 1) or (batch, *shape)."""
        numbers = torch.rand(len(self.rough), *(shape or (1,)), generator=self.generator)
        return self.moved(low + (high - low) * numbers)

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device. What happens to which row is drawn on the CPU, so that nothing waits for a GPU."""
        return tensor.to(self.bank.device, non_blocking=True)

    def chosen(self, probability: float, among: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers of the rows that something happens to: of rough ones, and of ``among`` if given."""
        rows = self.rough & (torch.rand(len(self.rough), generator=self.generator) < probability)
        return self.moved((rows if among is None else rows & among).nonzero()[:, 0])

    def noise(self, length: int) -> torch.Tensor:
        """Unit-power noise, (batch, length): white to brown, recorded, with hum, or coming and going."""
        size, device = (len(self.rough), length), self.bank.device
        spectrum = torch.fft.rfft(torch.randn(size, device=device))
        bins = torch.arange(spectrum.shape[1], device=device).clamp(min=50 * length / SAMPLE_RATE)
        waves = torch.fft.irfft(spectrum * bins ** -self.uniform(0, 1), length)
        if self.recorded_noises and len(rows := self.chosen(0.35)):
            which = self.uniform(0, len(self.bank) - 0.01)[rows, 0].long()
            times = torch.arange(length, device=device) + self.uniform(0, SAMPLE_RATE)[rows].long()
            waves[rows] = self.bank[which].gather(1, times % SAMPLE_RATE)
        waves = waves / power(waves)
        if len(rows := self.chosen(0.15)):
            times = torch.arange(length, device=device) / SAMPLE_RATE
            mains = torch.where(self.uniform(0, 1)[rows] < 0.5, 50.0, 60.0)
            loud, count = self.uniform(0, 1, 8)[rows], self.uniform(2, 8)[rows]
            for harmonic in range(1, 8):
                height = loud[:, harmonic, None] * (harmonic < count)
                waves[rows] += height * torch.sin(2 * torch.pi * mains * harmonic * times)
        if len(rows := self.chosen(0.2)):
            steps = self.uniform(0.1, 1, 10)[rows, None]
            waves[rows] *= torch.nn.functional.interpolate(steps, length, mode="linear", align_corners=True)[:, 0]
        return waves / power(waves)

    def speed(self, waves: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pitch, formants and tempo together: the waves, and how much longer each became, (batch,) on the CPU."""
        changed = self.rough & (torch.rand(len(waves), generator=self.generator) < 0.4)
        speeds = torch.tensor(SPEEDS)[torch.randint(len(SPEEDS), (len(waves),), generator=self.generator)]
        ratios = torch.where(changed, speeds, 20)
        longest = int((lengths * ratios / 20).max()) + HOP
        longest += -longest % FAST
        result = waves.new_zeros(len(waves), longest)
        for ratio in ratios.unique().tolist():
            rows = self.moved((ratios == ratio).nonzero()[:, 0])
            part = waves[rows] if ratio == 20 else resample(waves[rows], 20, ratio)
            size = min(part.shape[1], longest)
            result[rows, :size] = part[:, :size]
        return result, ratios / 20

    def recorded(self, waves: torch.Tensor, inside: torch.Tensor, wordless: torch.Tensor) -> torch.Tensor:
        """Put clean waves through a room, a microphone and a line.

        Args:
            waves: (batch, samples).
            inside: (batch, samples), False behind the end of an utterance.
            wordless: (batch,) on the CPU, in which utterances nobody says a digit.
        """
        length, device = waves.shape[1], waves.device
        frequency = torch.fft.rfftfreq(length, 1 / SAMPLE_RATE, device=device)
        if len(rows := self.chosen(0.3)):  # a room: exponentially decaying noise after the direct sound
            times = torch.arange(SAMPLE_RATE // 2, device=device) / SAMPLE_RATE
            decay = self.uniform(0.05, 0.5)[rows]
            tails = torch.randn(len(rows), len(times), device=device) * 10 ** (-3 * times / decay)
            tails *= self.uniform(0.01, 0.06)[rows] * (times < decay)
            tails[:, 0] = 1.0
            size = length + len(times)
            spectrum = torch.fft.rfft(waves[rows], size) * torch.fft.rfft(tails, size)
            waves[rows] = torch.fft.irfft(spectrum, size)[:, :length]
        if len(rows := self.chosen(0.5)):  # a microphone: a tilt around 1 kHz, waves in its response, its low end
            octaves = (frequency.clamp(min=60) / 1000).log2()
            gain = self.uniform(-5, 5)[rows] * octaves
            for wave in range(3):
                height = self.uniform(0, 5)[rows] * (self.uniform(0, 4)[rows] > wave + 1)
                phase = octaves * self.uniform(0.2, 1.2)[rows] + self.uniform(0, 1)[rows]
                gain += height * torch.cos(2 * torch.pi * phase)
            gain -= 10 * torch.log10(1 + (self.uniform(20, 300)[rows] / frequency.clamp(min=1)) ** 4)
            waves[rows] = filtered(waves[rows], 10 ** (gain.clamp(-30, 20) / 20))
        speech = (waves.square().sum(1, keepdim=True) / inside.sum(1, keepdim=True)).sqrt() + 1e-9
        if len(rows := self.chosen(0.75)):
            waves[rows] += (self.noise(length) * speech * 10 ** (-self.uniform(3, 42) / 20))[rows]
        if len(rows := self.chosen(0.25)):  # rumble, as of a fan, a table or a badly earthed cable
            rumble = filtered(self.noise(length)[rows], frequency < self.uniform(50, 200)[rows])
            waves[rows] += rumble / power(rumble) * (speech * 10 ** (-self.uniform(-8, 20) / 20))[rows]
        others = self.moved(wordless.nonzero()[:, 0])
        if len(others) and len(rows := self.chosen(0.06)):  # somebody else in the background
            which = others[self.uniform(0, len(others) - 0.01)[rows, 0].long()]
            other = waves[which].roll(length // 3, 1)
            waves[rows] += other / power(other) * (speech * 10 ** (-self.uniform(12, 30) / 20))[rows]
        waves = waves * inside
        waves /= waves.abs().amax(1, keepdim=True) + 1e-9
        if len(rows := self.chosen(0.08)):
            waves[rows] = (waves[rows] * self.uniform(1.2, 4)[rows]).clamp(-1, 1)
        waves *= 10 ** (self.uniform(-36, 0) / 20)
        if len(rows := self.chosen(0.08)):  # a constant, as of a cheap sound card
            waves[rows] += self.uniform(-0.05, 0.05)[rows] * waves[rows].abs().amax(1, keepdim=True)
        waves = (waves * 32768).round() / 32768  # 16 bits
        # Band limits come last: a clip recorded at 8 kHz has nothing at all above 4 kHz.
        limit = torch.rand(len(waves), generator=self.generator)
        if len(rows := self.chosen(1.0, limit < 0.15)):
            low, high = self.uniform(100, 350)[rows], self.uniform(3200, 3600)[rows]
            waves[rows] = filtered(waves[rows], (frequency > low) & (frequency < high))
        if len(rows := self.chosen(1.0, (limit >= 0.15) & (limit < 0.45))):
            waves[rows] = filtered(waves[rows], frequency < self.uniform(3800, 3980)[rows])
        if len(rows := self.chosen(1.0, (limit >= 0.45) & (limit < 0.52))):
            waves[rows] = filtered(waves[rows], frequency < self.uniform(4500, 7500)[rows])
        if len(rows := self.chosen(0.08)):  # 8-bit mu-law, as on a telephone line
            codes = torchaudio.functional.mu_law_encoding(waves[rows].clamp(-1, 1), 256)
            waves[rows] = torchaudio.functional.mu_law_decoding(codes, 256)
        return waves

    def warped(
        self, features: torch.Tensor, frames: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Another tempo and another vocal tract: the features, (batch, frames, 80), stretched along both axes.

        Returns them, their lengths and how much longer each became. Lengths and numbers of words are on the CPU.
        """
        numbers = torch.rand(4, len(frames), generator=self.generator)
        tract = torch.where(self.rough & (numbers[0] < 0.5), 0.87 + 0.28 * numbers[1], 1.0)
        tempo = torch.where(self.rough & (numbers[2] < 0.4), 0.7 * 2.1 ** numbers[3], 1.0)
        stretched = torch.maximum((frames * tempo).long(), torch.minimum(LEAST_FRAMES * (words + 1), frames))
        tempo = stretched / frames
        longest = int(stretched.max())
        longest += -longest % BLOCK
        bins, height = features.shape[2], features.shape[1]
        across = (torch.arange(bins, device=features.device) * self.moved(tract[:, None])).clamp(max=bins - 1.0)
        along = torch.arange(longest, device=features.device) / self.moved(tempo[:, None])
        along = torch.minimum(along, self.moved(frames[:, None] - 1.0))
        size = (len(features), longest, bins)
        places = [2 * across[:, None] / (bins - 1) - 1, 2 * along[:, :, None] / max(height - 1, 1) - 1]
        grid = torch.stack([place.expand(size) for place in places], 3)
        return torch.nn.functional.grid_sample(features[:, None], grid, align_corners=True)[:, 0], stretched, tempo

    @torch.no_grad()
    def forward(
        self,
        waves: torch.Tensor,
        lengths: torch.Tensor,
        spans: torch.Tensor,
        words: torch.Tensor,
        roughness: float,
        seed: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of a batch.

        Args:
            waves: (batch, samples), int16, clean.
            lengths: (batch,) on the CPU, their samples.
            spans: (batch, words, 3), where each word begins and ends in seconds, and whether that is known.
            words: (batch,) on the CPU, how many there are in each.
            roughness: The share of the utterances that are changed.
            seed: Of everything random.

        Returns:
            (batch, frames + right context, 80), their lengths in frames (on the CPU), and the spans as they are now.
        """
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)
        self.rough = torch.rand(len(waves), generator=self.generator) < roughness
        waves, ratios = self.speed(waves.float() / 32768, lengths)
        lengths = (lengths * ratios).long()
        inside = torch.arange(waves.shape[1], device=waves.device) < self.moved(lengths[:, None])
        waves = self.recorded(waves * inside, inside, words == 0)
        features = self.normalise(self.compress(self.spectrogram(waves).transpose(1, 2)))
        features, frames, tempo = self.warped(features, 1 + lengths // HOP, words)
        bins = torch.arange(features.shape[2], device=waves.device)
        for _ in range(2):  # SpecAugment: bands of mel bins, and a moment
            if len(rows := self.chosen(0.3)):
                low = self.uniform(0, 72)[rows]
                band = (bins >= low) & (bins < low + self.uniform(1, 12)[rows])
                features[rows] = features[rows].masked_fill(band[:, None], 0.0)
        times, ends = torch.arange(features.shape[1], device=waves.device), self.moved(frames[:, None])
        if len(rows := self.chosen(0.15)):
            start = self.uniform(0, 1)[rows] * ends[rows]
            moment = (times >= start) & (times < start + self.uniform(1, 6)[rows])
            features[rows] = features[rows].masked_fill(moment[:, :, None], 0.0)
        features = features.masked_fill((times >= ends)[:, :, None], 0.0)
        stretch = self.moved((ratios * tempo)[:, None, None])
        return self.pad(features), frames.int(), torch.cat([spans[..., :2] * stretch, spans[..., 2:]], 2)


def prepare_masks(model: torch.nn.Module, device: torch.device) -> None:
    """Let torchaudio's Emformer make its masks for batches that are longer than their longest utterance.

    The attention mask is built of hundreds of pieces, so once for each length. The padding mask is made anew here: that
    of torchaudio takes the longest utterance for the length of the batch, and waits for a GPU to tell it.
    """
    transformer = model.transcriber.transformer
    make = transformer._gen_attention_mask
    masks = functools.lru_cache(None)(lambda size: make(torch.empty(size, 0, device=device)))
    transformer._gen_attention_mask = lambda frames: masks(frames.shape[0])

    def padding_mask(
        utterance: torch.Tensor, right_context: torch.Tensor, _: torch.Tensor, lengths: torch.Tensor, *__: object
    ) -> torch.Tensor:
        keys = torch.arange(right_context.shape[0] + utterance.shape[0], device=utterance.device)
        return keys >= lengths[:, None] + right_context.shape[0]

    emformer._gen_padding_mask = padding_mask
