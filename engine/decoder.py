"""The engine that is exported: RNN-T beam search over an Emformer encoder, as one scriptable module.

``Decoder`` is a drop-in for ``torchaudio.models.RNNTBeamSearch``: same ``forward`` and ``infer``, same tokens, in a
time that grows with the length of the audio and not with its square, and in memory that, beside features and
tokens, does not grow at all. It takes a torchaudio ``RNNT`` and computes with its weights:

    features (T, 80) -> encoder.py, window by window -> encodings -> search.py -> hypotheses

A module is for one thread at a time: what XNNPACK packs cannot be shared (precision.py).

Source: torchaudio.models.RNNTBeamSearch, whose interface and results these are.
"""

import torch
from torchaudio.models import RNNT, Hypothesis

from engine.context import Context, context_graph
from engine.encoder import Encoder
from engine.search import Beam, BeamSearch, beam_of, without_pending

# Segments (of 160 ms) that one call of the encoder takes at most. With 5 to 15 s of audio in a call the weights
# are read seldom enough; more costs memory and gains nothing (benchmarks/engine.py windows).
WINDOW_SEGMENTS = 96

# Tokens without the leading blank, and of each its encoder frame and its log-probability.
Tokens = tuple[list[int], list[int], list[float]]
# An utterance as far as it has been heard: what ``Decoder.advance`` goes on from, and never changes. A plain tuple,
# because TorchScript makes Python a new class for every named one that it returns: a fifth of the time of many streams.
Stream = tuple[
    torch.Tensor,  # features (T, 80) that wait for the rest of their segment or its right context
    int,  # segments that are decoded
    list[torch.Tensor],  # of the encoder, see ``Encoder.forward``, for a batch of 1
    tuple[list[Hypothesis], list[list[int]], list[list[float]], int, int, list[tuple[int, float]]],  # of a ``Beam``
    Tokens,  # that have settled since the stream before
]


class Decoder(torch.nn.Module):
    """RNN-T beam search decoder.

    Args:
        model (torchaudio.models.RNNT): Emformer RNN-T, in evaluation mode.
        blank (int): index of the blank token, which is the last one of the vocabulary.

    Raises:
        ValueError: blank is another token, or the model's encoder has memory vectors.
    """

    def __init__(self, model: RNNT, blank: int) -> None:
        super().__init__()
        self.encoder = Encoder(model.transcriber)
        self.search = BeamSearch(model, blank)
        self.window_segments: int = WINDOW_SEGMENTS

    def forward(self, input: torch.Tensor, length: torch.Tensor, beam_width: int) -> list[Hypothesis]:
        """Transcribe one utterance.

        Args:
            input (Tensor): features (T, 80) or (1, T, 80), right context included, as the bundle's extractor gives
                them.
            length (Tensor): () or (1,), the number of frames; as in torchaudio, all of ``input`` is taken.
            beam_width (int): hypotheses kept after each frame; at most the number of non-blank tokens.

        Returns:
            list[Hypothesis]: the best first: (tokens with the leading blank, predictor output, predictor
            state, score), see ``torchaudio.models.RNNTBeamSearch``.
        """
        return self.decode([self._unbatched(input, length)], beam_width, None)[0].hypotheses

    @torch.jit.export
    def context(self, phrases: list[list[int]], weights: list[float], kinds: torch.Tensor) -> Context:
        """Phrases that are expected, for ``decode`` and ``advance``.

        Args:
            phrases (list[list[int]]): the tokens of each, at least one.
            weights (list[float]): of each, above 0: what one of its tokens adds to a score, a natural logarithm.
            kinds (Tensor): (vocabulary without blank,), int64: 0 for a token that begins a word, 1 for one that goes
                on with it, 2 for one that is no text.

        Raises:
            ValueError: a list is of another length.
        """
        if len(phrases) != len(weights) or kinds.numel() != self.search.blank:
            raise ValueError("context needs a weight for each phrase and a kind for each token but blank")
        return context_graph(phrases, weights, kinds)

    @torch.jit.export
    def decode(
        self, features: list[torch.Tensor], beam_width: int, contexts: list[Context | None] | None = None
    ) -> list[Beam]:
        """Transcribe many utterances of any lengths.

        Args:
            features (list[Tensor]): (T, 80) each, right context included, finite.
            beam_width (int): as in ``forward``.
            contexts (list[Context or None] or None): of each utterance what ``context`` gave for its phrases. Their
                bonus chooses and orders its hypotheses; the scores and log-probabilities are the model's own.

        Returns:
            list[Beam]: one for each utterance.

        Raises:
            ValueError: features of another shape, or a beam width below 1.
        """
        if beam_width < 1:
            raise ValueError("beam_width must be at least 1")
        for utterance in features:
            if utterance.dim() != 2 or utterance.size(1) != self.encoder.input_dim:
                raise ValueError("features must be of shape (T, D), D as the model's")
        if contexts is None:
            contexts = torch.jit.annotate(list[Context | None], [None for _ in features])
        beams = [self.search.first_beam()] * len(features)
        past = self.encoder.empty_past(1)
        for window in self._windows([self.encoder.segments(utterance) for utterance in features]):
            encodings, past = self._encode(features, window, past)
            for i, (utterance, _, _) in enumerate(window):
                beams[utterance] = self.search(encodings[i], beams[utterance], beam_width, contexts[utterance])
        for i, context in enumerate(contexts):
            if context is not None:
                beams[i] = without_pending(beams[i], context)
        return beams

    @torch.jit.export
    def infer(
        self,
        input: torch.Tensor,
        length: torch.Tensor,
        beam_width: int,
        state: list[list[torch.Tensor]] | None = None,
        hypothesis: list[Hypothesis] | None = None,
    ) -> tuple[list[Hypothesis], list[list[torch.Tensor]]]:
        """Transcribe one segment of a stream, going on from ``state`` and ``hypothesis``.

        Args:
            input (Tensor): (T, 80) or (1, T, 80): one segment (16 frames) and its right context (4 frames).
            length (Tensor): () or (1,), the number of frames.
            beam_width (int): as in ``forward``.
            state (list[list[Tensor]] or None): what the call for the segment before returned; it is not changed.
            hypothesis (list[Hypothesis] or None): the hypotheses after the segment before.

        Returns:
            (list[Hypothesis], list[list[Tensor]]): the hypotheses and the encoder's state after this segment: the
            number of segments, then each layer's keys and values.
        """
        features = self._unbatched(input, length)
        if features.size(0) // self.encoder.stride != self.encoder.width or features.size(1) != self.encoder.input_dim:
            raise ValueError("input must hold the features of one segment and its right context")
        if state is None:
            index, past = torch.zeros(1, 1, dtype=torch.int64, device=features.device), self.encoder.empty_past(1)
        else:
            index, past = state[0][0], [layer[0] for layer in state[1:]]
        rows = self.encoder.rows(features, 0, 1).unsqueeze(0)
        encodings, past = self.encoder(rows, index, torch.full_like(index, self.encoder.segment), past)
        beam = self.search.first_beam() if hypothesis is None else beam_of(hypothesis)
        beam = self.search(encodings[0], beam, beam_width)
        return beam.hypotheses, [[index + 1]] + [[layer] for layer in past]

    @torch.jit.export
    def begin(self) -> Stream:
        """The stream of an utterance of which nothing has been heard yet."""
        features = torch.empty(0, self.encoder.input_dim, device=self.search.predictor.embedding.weight.device)
        return stream_of(features, 0, self.encoder.empty_past(1), self.search.first_beam())

    @torch.jit.export
    def advance(
        self,
        streams: list[Stream],
        features: list[torch.Tensor],
        ended: list[bool],
        beam_width: int,
        contexts: list[Context | None] | None = None,
    ) -> list[Stream]:
        """Go on with many streams at once, as far as their features go.

        When a stream has ended, its beam is the one that ``decode`` gives for all its features, in whatever pieces
        they came: a segment is computed when its right context is there, so it always sees the same. What all
        hypotheses agree on can never change again: it is told once and taken out of them, so that a stream costs no
        more after an hour than at the beginning.

        Args:
            streams (list[Stream]): from ``begin`` or ``advance``.
            features (list[Tensor]): (T, 80) each, what has come since, T from 0; the last ones include the right
                context, as in ``decode``.
            ended (list[bool]): whether these are the last ones.
            beam_width (int): as in ``forward``.
            contexts (list[Context or None] or None): as in ``decode``, for a stream the same in all calls.

        Returns:
            list[Stream]: the streams after that; ``streams`` are as they were.
        """
        encoder = self.encoder
        if contexts is None:
            contexts = torch.jit.annotate(list[Context | None], [None for _ in streams])
        waiting = [torch.cat([stream[0], new]) for stream, new in zip(streams, features)]  # noqa: B905
        left: list[int] = []  # segments that can be computed
        for utterance, end in zip(waiting, ended):  # noqa: B905 (TorchScript)
            left.append(encoder.segments(utterance) if end else encoder.frames(utterance) // encoder.segment)
        done = [0] * len(streams)
        numbers = [stream[1] for stream in streams]
        pasts = [stream[2] for stream in streams]
        beams: list[Beam] = []
        for _, _, _, beam, _ in streams:
            beams.append(Beam(beam[0], beam[1], beam[2], beam[3], beam[4], beam[5]))
        while any([segments > 0 for segments in left]):
            group: list[int] = []
            for i in range(len(streams)):
                if left[i] > 0:
                    group.append(i)
            count = min([left[i] for i in group] + [max(self.window_segments // len(group), 1)])
            rows = torch.stack([encoder.rows(waiting[i], done[i], done[i] + count) for i in group])
            index = torch.tensor([numbers[i] + done[i] for i in group], device=rows.device).unsqueeze(1)
            frames = torch.tensor(
                [encoder.frames(waiting[i]) - done[i] * encoder.segment for i in group], device=rows.device
            ).unsqueeze(1)
            steps = torch.arange(count, device=rows.device)
            lengths = (frames - steps * encoder.segment).clamp(max=encoder.segment)
            past = [torch.cat([pasts[i][layer] for i in group]) for layer in range(len(encoder.layers))]
            encodings, past = encoder(rows, index + steps, lengths, past)
            for place, i in enumerate(group):
                last = min(count * encoder.segment, encoder.frames(waiting[i]) - done[i] * encoder.segment)
                beams[i] = self.search(encodings[place, :last], beams[i], beam_width, contexts[i])
                # Its own: a slice would keep those of all the others in memory.
                pasts[i] = [layer[place : place + 1].clone() for layer in past]
                done[i] += count
                left[i] -= count
        advanced: list[Stream] = []
        for i, (beam, context) in enumerate(zip(beams, contexts)):  # noqa: B905 (TorchScript)
            if ended[i] and context is not None:
                beam = without_pending(beam, context)
            rest = waiting[i][done[i] * encoder.segment * encoder.stride :].clone()
            advanced.append(stream_of(rest, numbers[i] + done[i], pasts[i], beam))
        return advanced

    def _unbatched(self, input: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """(T, 80) of what ``forward`` or ``infer`` was given."""
        if input.dim() != 2 and not (input.dim() == 3 and input.size(0) == 1):
            raise ValueError("input must be of shape (T, D) or (1, T, D)")
        if length.numel() != 1:
            raise ValueError("length must be of shape () or (1,)")
        return input if input.dim() == 2 else input[0]

    def _windows(self, segments: list[int]) -> list[list[tuple[int, int, int]]]:
        """Share utterances of these many segments out to windows of about one size.

        Returns:
            list[list[(int, int, int)]]: for each window its pieces: the utterance, its first segment in the
            window, its last + 1.
        """
        windows = torch.jit.annotate(list[list[tuple[int, int, int]]], [])
        total = sum(segments)
        size = -(-total // max(-(-total // self.window_segments), 1))
        room = 0
        for utterance in range(len(segments)):
            first = 0
            while first < segments[utterance]:
                if room == 0:
                    windows.append(torch.jit.annotate(list[tuple[int, int, int]], []))
                    room = size
                last = min(first + room, segments[utterance])
                windows[-1].append((utterance, first, last))
                room -= last - first
                first = last
        return windows

    def _encode(
        self, features: list[torch.Tensor], window: list[tuple[int, int, int]], past: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Encodings (frames, D) of each piece of ``window``, and the stream's new ``past``."""
        encoder = self.encoder
        rows = torch.cat([encoder.rows(features[utterance], first, last) for utterance, first, last in window])
        index = torch.cat([torch.arange(first, last, device=rows.device) for _, first, last in window])
        frames = torch.cat([torch.full([b - a], encoder.frames(features[u]), device=rows.device) for u, a, b in window])
        lengths = (frames - index * encoder.segment).clamp(max=encoder.segment)
        encodings, past = encoder(rows.unsqueeze(0), index.unsqueeze(0), lengths.unsqueeze(0), past)
        pieces: list[torch.Tensor] = []
        begin = 0
        for utterance, first, last in window:
            end = min(last * encoder.segment, encoder.frames(features[utterance]))
            pieces.append(encodings[0, begin : begin + end - first * encoder.segment])
            begin += (last - first) * encoder.segment
        return pieces, past


def stream_of(features: torch.Tensor, segments: int, past: list[torch.Tensor], beam: Beam) -> Stream:
    """The stream with ``beam``, out of whose hypotheses what they agree on is taken: tokens and frames."""
    best, best_frames, best_log_probs = beam.hypotheses[0][0], beam.frames[0], beam.log_probs[0]
    count = len(best_frames)
    for hypothesis, frames in zip(beam.hypotheses, beam.frames):  # noqa: B905 (TorchScript)
        same = 0
        while same < min(count, len(frames)):
            if hypothesis[0][same + 1] != best[same + 1] or frames[same] != best_frames[same]:
                break
            same += 1
        count = same
    settled = (best[1 : count + 1], best_frames[:count], best_log_probs[:count])
    hypotheses = [(h[0][:1] + h[0][count + 1 :], h[1], h[2], h[3]) for h in beam.hypotheses]
    frames = [each[count:] for each in beam.frames]
    log_probs = [each[count:] for each in beam.log_probs]
    rest = (hypotheses, frames, log_probs, beam.searched, beam.settled + count, beam.matched)
    return features, segments, past, rest, settled
