"""The engine that is exported: RNN-T beam search over an Emformer encoder, as one scriptable module.

``Decoder`` is a drop-in for ``torchaudio.models.RNNTBeamSearch``: same ``forward`` and ``infer``, same tokens, in a
time that grows with the length of the audio and not with its square, and in memory that, beside features and
tokens, does not grow at all. It takes a torchaudio ``RNNT`` and computes with its weights. From top to bottom:

    features (T, 80) -> Encoder, window by window -> encodings -> Decoder._search -> hypotheses

A module is for one thread at a time: what XNNPACK packs cannot be shared.

Sources: Emformer (Shi et al. 2021, arXiv 2010.10759) and RNN-T (Graves 2012, arXiv 1211.3711), both as
torchaudio.models implements them; joining several frames at once is WIND (Xu et al. 2025, arXiv 2505.13765).
"""

import math
from typing import NamedTuple

import torch
from torchaudio.models import RNNT, Hypothesis

PRECISIONS = ("fp32", "bf16", "int8")

# Segments (of 160 ms) that one call of the encoder takes at most. With 5 to 15 s of audio in a call the weights
# are read seldom enough; more costs memory and gains nothing (benchmarks/engine.py windows).
WINDOW_SEGMENTS = 96
# Segments whose queries share one product in the attention: more are fewer products with more masked in them.
BLOCK_SEGMENTS = 4
# Rows (hypotheses x frames) that one call of the joiner is filled up to: XNNPACK's widest kernel computes seven
# rows in the time in which it reads the weights once.
JOINER_ROWS = 7
# Tokens after which a frame ends, whatever the scores say; RNNTBeamSearch's step_max_tokens.
MAX_TOKENS_PER_FRAME = 100


class EncoderLayer(torch.nn.Module):
    """One Emformer layer over blocks of segments.

    Args:
        layer (torchaudio.models.emformer._EmformerLayer): whose weights are used.
        width (int): rows of a segment, right context included.
        past_rows (int): rows before a block that it may attend to.
    """

    def __init__(self, layer: torch.nn.Module, width: int, past_rows: int) -> None:
        super().__init__()
        attention = layer.attention
        self.width, self.past_rows, self.num_heads = width, past_rows, attention.num_heads
        self.layer_norm_input = layer.layer_norm_input
        self.query_key_value = stacked([attention.emb_to_query, attention.emb_to_key_value], dim=0)
        self.out_proj = attention.out_proj
        self.feed_forward = layer.pos_ff
        self.layer_norm_output = layer.layer_norm_output

    def forward(
        self, rows: torch.Tensor, past: torch.Tensor, mask: torch.Tensor, block_segments: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the layer for ``rows`` (N, R, D) after ``past`` (N, past_rows, 2 D), keys and values.

        Returns:
            (Tensor, Tensor): (N, R, D) and the ``past`` of the rows that come next.
        """
        batch, count, dim = rows.shape
        query, key_value = self.query_key_value(self.layer_norm_input(rows)).split([dim, 2 * dim], dim=2)
        key_value = torch.cat([past, key_value], dim=1)  # (N, past_rows + R, 2 D)
        past = key_value[:, count:].clone()

        # A block's keys and values are a slice of ``key_value`` that overlaps its neighbours': nothing is copied.
        block = block_segments * self.width
        missing = -count % block
        if missing > 0:
            query = torch.nn.functional.pad(query, (0, 0, 0, missing))
            key_value = torch.nn.functional.pad(key_value, (0, 0, 0, missing))
        heads, keys = self.num_heads, self.past_rows + block
        query = query.reshape(-1, block, heads, dim // heads).transpose(1, 2)  # (blocks, heads, block, d)
        key_value = key_value.unfold(1, keys, block)  # (N, blocks / N, 2 D, keys)
        key, value = key_value.reshape(-1, 2, heads, dim // heads, keys).transpose(3, 4).unbind(1)
        attention = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attention = attention.transpose(1, 2).reshape(batch, count + missing, dim)[:, :count]

        rows = rows + self.out_proj(attention)
        rows = rows + self.feed_forward(rows)
        return self.layer_norm_output(rows), past


class Encoder(torch.nn.Module):
    """torchaudio's Emformer encoder, computed segment by segment, many segments at once.

    torchaudio's forward attends under one (T, T) mask. With no memory vectors, that mask lets segment i see its
    own frames, its own copy of the right context, and ``left_context`` frames before it, in every layer, and
    nothing else. So the layers' keys and values of the last ``history`` segments are all that segment i needs of
    the past, and none of the future: segments can be computed in windows of any length, one after the other,
    and the result is the masked one.

    Here a segment is ``width`` consecutive rows: its frames, then its right context. Those of all utterances
    stand behind each other in one stream, and a segment looks back no further than its own utterance's start.

    Args:
        encoder (torchaudio.models.rnnt._EmformerEncoder): whose weights are used.

    Raises:
        ValueError: the encoder has memory vectors.
    """

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        emformer = encoder.transformer
        if emformer.use_mem:
            raise ValueError("An Emformer with memory vectors (max_memory_size > 0) is not supported.")
        self.input_dim: int = encoder.input_linear.in_features
        self.stride: int = encoder.time_reduction.stride  # feature frames in one encoder frame
        self.segment: int = emformer.segment_length  # encoder frames
        self.right_context: int = emformer.right_context_length
        self.left_context: int = emformer.left_context_length
        self.width: int = self.segment + self.right_context  # rows
        self.history: int = -(-self.left_context // self.segment)  # segments that hold the left context
        self.block_segments: int = BLOCK_SEGMENTS
        self.input_linear = encoder.input_linear
        self.layers = torch.nn.ModuleList(
            EncoderLayer(layer, self.width, self.history * self.width) for layer in emformer.emformer_layers
        )
        self.output_linear = encoder.output_linear
        self.layer_norm = encoder.layer_norm

    def frames(self, features: torch.Tensor) -> int:
        """Number of encoder frames that (T, 80) features, right context included, give."""
        return max(features.size(0) // self.stride - self.right_context, 0)

    def segments(self, features: torch.Tensor) -> int:
        """Number of segments that (T, 80) features have; the last one may be shorter."""
        return -(-self.frames(features) // self.segment)

    def rows(self, features: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Input rows (S, width, D) of segments ``first`` to ``last`` - 1 of (T, 80) features."""
        frames, begin = self.frames(features), first * self.segment
        end = min(last * self.segment, frames) + self.right_context
        taken = self.input_linear(features[begin * self.stride : end * self.stride])
        taken = taken.reshape(end - begin, -1)  # (frames, D)
        starts = torch.arange(first, last, device=features.device).unsqueeze(1) * self.segment
        # A last segment that is shorter is filled up with rows that the mask hides.
        own = (starts + torch.arange(self.segment, device=features.device)).clamp(max=begin + len(taken) - 1)
        right = (starts + self.segment).clamp(max=frames) + torch.arange(self.right_context, device=features.device)
        return taken[torch.cat([own, right], dim=1) - begin]

    def empty_past(self, batch: int) -> list[torch.Tensor]:
        """The ``past`` of a stream that begins, for ``forward``."""
        weight = self.layer_norm.weight
        dim = self.layers[0].layer_norm_input.weight.size(0)
        size = [batch, self.history * self.width, 2 * dim]
        return [torch.zeros(size, dtype=weight.dtype, device=weight.device) for _ in self.layers]

    def forward(
        self, rows: torch.Tensor, index: torch.Tensor, lengths: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Encode the next segments of each of N streams.

        Args:
            rows (Tensor): (N, S, width, D), from ``rows``.
            index (Tensor): (N, S), the segment's number in its utterance.
            lengths (Tensor): (N, S), the segment's number of frames.
            past (list[Tensor]): each layer's keys and values of the segments before.

        Returns:
            (Tensor, list[Tensor]): (N, S * segment, D'), the encodings, and the new ``past``.
        """
        batch, segments, width, dim = rows.shape
        block_segments = min(self.block_segments, segments)
        mask = self._mask(index, lengths, block_segments).to(rows.dtype)
        rows = rows.reshape(batch, segments * width, dim)
        new_past: list[torch.Tensor] = []
        for i, layer in enumerate(self.layers):
            rows, layer_past = layer(rows, past[i], mask, block_segments)
            new_past.append(layer_past)
        encodings = rows.reshape(batch, segments, width, dim)[:, :, : self.segment].flatten(1, 2)
        return self.layer_norm(self.output_linear(encodings)), new_past

    def _mask(self, index: torch.Tensor, lengths: torch.Tensor, block_segments: int) -> torch.Tensor:
        """What each block's queries may attend to: (blocks, 1, queries, keys), 0 or minus infinity."""
        missing = -index.size(1) % block_segments
        index = torch.nn.functional.pad(index, (0, missing)).reshape(-1, block_segments, 1, 1)
        lengths = torch.nn.functional.pad(lengths, (0, missing)).reshape(-1, block_segments, 1, 1)
        # What follows is (blocks, query segments, key segments, rows of a key segment).
        keys = torch.arange(self.history + block_segments, device=index.device)
        back = (keys[self.history :].unsqueeze(1) - keys).unsqueeze(2)  # segments from the key to the query
        frame = torch.arange(self.segment, device=index.device)
        left = (back > 0) & (back <= index) & (back * self.segment - frame <= self.left_context)
        own = (back == 0) & (frame < lengths)
        right = (back == 0).expand(left.size(0), -1, -1, self.right_context)
        seen = torch.cat([left | own, right], dim=3).flatten(2)  # (blocks, query segments, keys)
        mask = torch.zeros(seen.shape, device=index.device).masked_fill(~seen, float("-inf"))
        return mask.unsqueeze(2).expand(-1, -1, self.width, -1).flatten(1, 2).unsqueeze(1)


class LSTMLayer(torch.nn.Module):
    """One step of torchaudio's ``_CustomLSTM``, both of its products in one."""

    def __init__(self, lstm: torch.nn.Module) -> None:
        super().__init__()
        self.gates = stacked([lstm.x2g, lstm.p2g], dim=1)
        self.gate_norm = lstm.g_norm
        self.cell_norm = lstm.c_norm

    def forward(self, input: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """From (n, D) and (n, 2, H), hidden and cell, to the next (n, 2, H)."""
        hidden, cell = state.unbind(1)
        gates = self.gate_norm(self.gates(torch.cat([input, hidden], dim=1)))
        input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, 1)
        cell = self.cell_norm(forget_gate.sigmoid() * cell + input_gate.sigmoid() * cell_gate.tanh())
        return torch.stack([output_gate.sigmoid() * cell.tanh(), cell], dim=1)


class Predictor(torch.nn.Module):
    """torchaudio's ``_Predictor``, one token at a time, its state in one tensor."""

    def __init__(self, predictor: torch.nn.Module) -> None:
        super().__init__()
        self.embedding = predictor.embedding
        self.input_layer_norm = predictor.input_layer_norm
        self.lstm_layers = torch.nn.ModuleList(LSTMLayer(lstm) for lstm in predictor.lstm_layers)
        self.hidden_dim: int = predictor.lstm_layers[0].hidden_dim
        self.linear = predictor.linear
        self.output_layer_norm = predictor.output_layer_norm

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From tokens (n,) and state (n, layers, 2, H) to outputs (n, D) and the next state."""
        output = self.input_layer_norm(self.embedding(tokens))
        states: list[torch.Tensor] = []
        for i, lstm in enumerate(self.lstm_layers):
            states.append(lstm(output, state[:, i]))
            output = states[-1][:, 0]
        return self.output_layer_norm(self.linear(output)), torch.stack(states, dim=1)


class Beam(NamedTuple):
    """What the search carries from one window of encodings to the next, the best hypothesis first."""

    hypotheses: list[Hypothesis]
    frames: list[list[int]]  # of each hypothesis: the encoder frame at which each token was emitted
    log_probs: list[list[float]]  # of each hypothesis: the log-probability of each token there
    searched: int  # encoder frames so far
    settled: int  # tokens that all of them begin with and that were taken out, see ``Decoder.advance``


class PrefixTree:
    """The token lists of a search, each one a node, and what the predictor makes of them.

    That depends on the tokens alone, so it is computed once a node, however many paths come by.
    """

    def __init__(self, vocabulary: int, root_length: int) -> None:
        self.vocabulary = vocabulary
        self.children: dict[int, int] = {}  # node * vocabulary + token -> node
        self.lengths = [root_length]  # number of tokens, the leading blank included
        self.outputs = [torch.empty(0)]  # predictor output (D,), empty until it is computed
        self.states = [torch.empty(0)]  # predictor state (layers, 2, H)

    def child(self, node: int, token: int) -> int:
        """The node of ``node``'s tokens and ``token``."""
        key = node * self.vocabulary + token
        if key not in self.children:
            self.children[key] = len(self.lengths)
            self.lengths.append(self.lengths[node] + 1)
            self.outputs.append(torch.empty(0))
            self.states.append(torch.empty(0))
        return self.children[key]


class Emission(NamedTuple):
    """A token that a path has emitted."""

    before: int  # the emission before it
    token: int
    frame: int  # of the encodings that are searched
    log_prob: float


class Path(NamedTuple):
    """A hypothesis inside ``Decoder._search``."""

    node: int  # in the prefix tree: equal nodes are equal token lists
    last: int  # its last emission
    score: float
    start: int  # the frame that the next three begin with
    blank: list[float]  # of each frame: log-probability of blank
    best: list[float]  # of each frame: log-probability of the best other token
    log_probs: torch.Tensor  # (frames, vocabulary)


# Tokens without the leading blank, and of each its encoder frame and its log-probability.
Tokens = tuple[list[int], list[int], list[float]]
# An utterance as far as it has been heard: what ``Decoder.advance`` goes on from, and never changes. A plain tuple,
# because TorchScript makes Python a new class for every named one that it returns: a fifth of the time of many streams.
Stream = tuple[
    torch.Tensor,  # features (T, 80) that wait for the rest of their segment or its right context
    int,  # segments that are decoded
    list[torch.Tensor],  # of the encoder, see ``Encoder.forward``, for a batch of 1
    tuple[list[Hypothesis], list[list[int]], list[list[float]], int, int],  # what ``Beam`` names
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
        if blank != model.joiner.linear.out_features - 1:
            raise ValueError("The blank token must be the last one of the vocabulary.")
        self.encoder = Encoder(model.transcriber)
        self.predictor = Predictor(model.predictor)
        self.joiner = model.joiner.linear
        self.activation = model.joiner.activation
        self.blank = blank
        # TorchScript sees attributes, not this file's constants.
        self.window_segments: int = WINDOW_SEGMENTS
        self.joiner_rows: int = JOINER_ROWS
        self.max_tokens_per_frame: int = MAX_TOKENS_PER_FRAME
        # Whether one call of the encoder may hold several utterances; see ``with_precision``.
        self.packs = True

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
        return self.decode([self._unbatched(input, length)], beam_width)[0].hypotheses

    @torch.jit.export
    def decode(self, features: list[torch.Tensor], beam_width: int) -> list[Beam]:
        """Transcribe many utterances of any lengths.

        Args:
            features (list[Tensor]): (T, 80) each, right context included, finite.
            beam_width (int): as in ``forward``.

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
        beams = [self._first_beam()] * len(features)
        past = self.encoder.empty_past(1)
        for window in self._windows([self.encoder.segments(utterance) for utterance in features]):
            encodings, past = self._encode(features, window, past)
            for i, (utterance, _, _) in enumerate(window):
                beams[utterance] = self._search(encodings[i], beams[utterance], beam_width)
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
        beam = self._first_beam() if hypothesis is None else beam_of(hypothesis)
        beam = self._search(encodings[0], beam, beam_width)
        return beam.hypotheses, [[index + 1]] + [[layer] for layer in past]

    @torch.jit.export
    def begin(self) -> Stream:
        """The stream of an utterance of which nothing has been heard yet."""
        features = torch.empty(0, self.encoder.input_dim, device=self.predictor.embedding.weight.device)
        return stream_of(features, 0, self.encoder.empty_past(1), self._first_beam())

    @torch.jit.export
    def advance(
        self, streams: list[Stream], features: list[torch.Tensor], ended: list[bool], beam_width: int
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

        Returns:
            list[Stream]: the streams after that; ``streams`` are as they were.
        """
        encoder = self.encoder
        waiting = [torch.cat([stream[0], new]) for stream, new in zip(streams, features)]  # noqa: B905
        left: list[int] = []  # segments that can be computed
        for utterance, end in zip(waiting, ended):  # noqa: B905 (TorchScript)
            left.append(encoder.segments(utterance) if end else encoder.frames(utterance) // encoder.segment)
        done = [0] * len(streams)
        numbers = [stream[1] for stream in streams]
        pasts = [stream[2] for stream in streams]
        beams = [Beam(stream[3][0], stream[3][1], stream[3][2], stream[3][3], stream[3][4]) for stream in streams]
        while any([segments > 0 for segments in left]):
            group: list[int] = []
            for i in range(len(streams)):
                if left[i] > 0 and (self.packs or len(group) == 0):
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
                beams[i] = self._search(encodings[place, :last], beams[i], beam_width)
                # Its own: a slice would keep those of all the others in memory.
                pasts[i] = [layer[place : place + 1].clone() for layer in past]
                done[i] += count
                left[i] -= count
        advanced: list[Stream] = []
        for i, beam in enumerate(beams):
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
        everything = list(range(len(segments)))
        for stream in [everything] if self.packs else [[utterance] for utterance in everything]:
            total = sum([segments[utterance] for utterance in stream])
            size = -(-total // max(-(-total // self.window_segments), 1))
            room = 0
            for utterance in stream:
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

    def _first_beam(self) -> Beam:
        """One hypothesis: no token but the leading blank."""
        device, layers = self.predictor.embedding.weight.device, len(self.predictor.lstm_layers)
        state = torch.zeros(1, layers, 2, self.predictor.hidden_dim, device=device)
        output, state = self.predictor(torch.tensor([self.blank], device=device), state)
        return beam_of([self._hypothesis([self.blank], output[0], state[0], 0.0)])

    def _hypothesis(self, tokens: list[int], output: torch.Tensor, state: torch.Tensor, score: float) -> Hypothesis:
        """As ``RNNTBeamSearch`` gives it, from a predictor output (D,) and state (layers, 2, H)."""
        return tokens, output.unsqueeze(0), [[part.unsqueeze(0) for part in layer.unbind(0)] for layer in state], score

    def _search(self, encodings: torch.Tensor, beam: Beam, beam_width: int) -> Beam:
        """Go on from ``beam`` over (T, D) encodings, by ``RNNTBeamSearch``'s rules.

        In a frame, every active path ends with blank; the best extensions of the active paths by a token that
        beat the ``beam_width``-th best ended path become the active paths, until there is none.
        """
        beam_width = min(beam_width, self.blank)
        common = common_length(beam.hypotheses)
        tree = PrefixTree(self.blank + 1, common + beam.settled)
        # The first ones stand for ``beam``'s hypotheses, with nothing before them.
        emissions: list[Emission] = []
        paths: list[Path] = []
        for tokens, output, state, score in beam.hypotheses:
            node = 0
            for token in tokens[common:]:
                node = tree.child(node, token)
            tree.outputs[node] = output[0]
            tree.states[node] = torch.stack([torch.cat(layer) for layer in state])
            paths.append(Path(node, len(emissions), float32(score), 0, [], [], torch.empty(0)))
            emissions.append(Emission(-1, -1, -1, 0.0))

        for t in range(encodings.size(0)):
            active, ended = paths, torch.jit.annotate(list[Path], [])
            place: dict[int, int] = {}  # of a node in ``ended``
            for emitted in range(self.max_tokens_per_frame + 1):
                active = self._joined(active, tree, encodings, t)
                for path in active:
                    path = with_score(path, path.score + path.blank[t - path.start])
                    if path.node in place:  # the same tokens, emitted at other frames: their probabilities add up
                        other = ended[place[path.node]]
                        better, worse = (path, other) if path.score > other.score else (other, path)
                        score = better.score + math.log1p(math.exp(worse.score - better.score))
                        ended[place[path.node]] = with_score(better, score)
                    else:
                        place[path.node] = len(ended)
                        ended.append(path)
                if emitted < self.max_tokens_per_frame:
                    threshold = -math.inf
                    if len(ended) >= beam_width:
                        threshold = sorted([path.score for path in ended])[-beam_width]
                    active = self._extended(active, threshold, beam_width, tree, emissions, t)
                if len(active) == 0:
                    break
            paths = ended if len(ended) <= beam_width else best_paths(ended, tree, beam_width)

        hypotheses: list[Hypothesis] = []
        frames: list[list[int]] = []
        log_probs: list[list[float]] = []
        for path in best_paths(paths, tree, beam_width):
            own: list[Emission] = []
            last = path.last
            while emissions[last].before >= 0:
                own.append(emissions[last])
                last = emissions[last].before
            own.reverse()
            tokens = beam.hypotheses[last][0] + [emission.token for emission in own]
            hypotheses.append(self._hypothesis(tokens, tree.outputs[path.node], tree.states[path.node], path.score))
            frames.append(beam.frames[last] + [beam.searched + emission.frame for emission in own])
            log_probs.append(beam.log_probs[last] + [emission.log_prob for emission in own])
        return Beam(hypotheses, frames, log_probs, beam.searched + encodings.size(0), beam.settled)

    def _extended(
        self,
        paths: list[Path],
        threshold: float,
        beam_width: int,
        tree: PrefixTree,
        emissions: list[Emission],
        t: int,
    ) -> list[Path]:
        """The ``beam_width`` best extensions of ``paths`` by a token, of those that beat ``threshold``."""
        # A path whose best token does not beat the threshold has none that does: at most frames nothing is left,
        # and nothing has to be sorted.
        growing = torch.jit.annotate(list[Path], [])
        for path in paths:
            if float32(path.score + path.best[t - path.start]) > threshold:
                growing.append(path)
        extensions = torch.jit.annotate(list[Path], [])
        if len(growing) == 0:
            return extensions

        log_probs = torch.stack([path.log_probs[t - path.start] for path in growing])[:, : self.blank]
        scores = torch.tensor([path.score for path in growing]).unsqueeze(1) + log_probs
        best, index = scores.flatten().topk(beam_width)
        best_scores: list[float] = best.tolist()
        best_index: list[int] = index.tolist()
        best_log_probs: list[float] = log_probs.flatten()[index].tolist()
        new_nodes: list[int] = []
        new_tokens: list[int] = []
        parents: list[torch.Tensor] = []
        for score, i, log_prob in zip(best_scores, best_index, best_log_probs):  # noqa: B905 (TorchScript)
            if score > threshold:
                path, token = growing[i // self.blank], i % self.blank
                node = tree.child(path.node, token)
                if tree.outputs[node].numel() == 0:
                    new_nodes.append(node)
                    new_tokens.append(token)
                    parents.append(tree.states[path.node])
                extensions.append(Path(node, len(emissions), score, t, [], [], torch.empty(0)))
                emissions.append(Emission(path.last, token, t, log_prob))
        if len(new_nodes) > 0:
            outputs, states = self.predictor(torch.tensor(new_tokens, device=parents[0].device), torch.stack(parents))
            for i, node in enumerate(new_nodes):
                tree.outputs[node], tree.states[node] = outputs[i], states[i]
        return extensions

    def _joined(self, paths: list[Path], tree: PrefixTree, encodings: torch.Tensor, t: int) -> list[Path]:
        """``paths``, each with its log-probabilities for frame ``t``.

        They depend on the path's tokens and the frame alone, so a path gets those of the next frames in the
        same product and keeps them for as long as it lives. (At int8, what shares a call rounds a little otherwise.)
        """
        missing: list[torch.Tensor] = []
        for path in paths:
            if t >= path.start + len(path.blank):
                missing.append(tree.outputs[path.node])
        if len(missing) == 0:
            return paths
        source = encodings[t : t + max(self.joiner_rows // len(missing), 1)]  # (W, D)
        target = torch.stack(missing).unsqueeze(1)  # (paths, 1, D)
        log_probs = torch.log_softmax(self.joiner(self.activation(source + target)), dim=2).cpu()  # (paths, W, V)
        blank: list[list[float]] = log_probs[:, :, self.blank].tolist()
        best: list[list[float]] = log_probs[:, :, : self.blank].amax(2).tolist()
        joined: list[Path] = []
        row = 0
        for path in paths:
            if t >= path.start + len(path.blank):
                joined.append(Path(path.node, path.last, path.score, t, blank[row], best[row], log_probs[row]))
                row += 1
            else:
                joined.append(path)
        return joined


def best_paths(paths: list[Path], tree: PrefixTree, beam_width: int) -> list[Path]:
    """The ``beam_width`` best of ``paths`` by score for their length, the best first."""
    scores = torch.tensor([path.score / (tree.lengths[path.node] + 1) for path in paths])
    order: list[int] = scores.topk(min(beam_width, len(paths))).indices.tolist()
    return [paths[i] for i in order]


def common_length(hypotheses: list[Hypothesis]) -> int:
    """Number of leading tokens that all hypotheses share, or fewer."""
    shortest = min([len(hypothesis[0]) for hypothesis in hypotheses])
    common, back = shortest, 1
    while any([hypothesis[0][:common] != hypotheses[0][0][:common] for hypothesis in hypotheses]):
        common, back = max(shortest - back, 0), back * 2
    return common


def beam_of(hypotheses: list[Hypothesis]) -> Beam:
    """A beam that begins with ``hypotheses``; where their tokens were emitted is not known."""
    frames = [torch.jit.annotate(list[int], []) for _ in hypotheses]
    log_probs = [torch.jit.annotate(list[float], []) for _ in hypotheses]
    return Beam(hypotheses, frames, log_probs, 0, 0)


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
    return features, segments, past, (hypotheses, frames, log_probs, beam.searched, beam.settled + count), settled


def with_score(path: Path, score: float) -> Path:
    """``path`` with another score."""
    return Path(path.node, path.last, float32(score), path.start, path.blank, path.best, path.log_probs)


def float32(number: float) -> float:
    """Round to single precision, as ``RNNTBeamSearch`` does with every score (Dekker 1971, Veltkamp's splitting)."""
    if math.isinf(number):
        return number
    scaled = 536870913.0 * number  # 2 ** 29 + 1: double has 29 bits more than single
    return scaled - (scaled - number)


def stacked(linears: list[torch.nn.Linear], dim: int) -> torch.nn.Linear:
    """One linear layer for several: of the same input (``dim`` 0), or of inputs whose outputs are added (1)."""
    weight = torch.cat([linear.weight.detach() for linear in linears], dim=dim)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    one = torch.nn.Linear(weight.size(1), weight.size(0), bias=len(biases) > 0)
    one.weight.data = weight
    if biases:
        one.bias.data = torch.cat(biases) if dim == 0 else torch.stack(biases).sum(0)
    return one


class PackedLinear(torch.nn.Module):
    """A float32 linear layer that XNNPACK computes on a CPU, or MKL.

    For the few rows of the search XNNPACK is several times faster than MKL; for the many of the encoder it is faster
    with AVX-512, and takes twice as long without. In either, a row's result does not depend on what other rows
    share the call, except that MKL adds up fewer than four in another order.

    Args:
        linear (torch.nn.Linear): the layer.
        many_rows (bool): it is one of the encoder's.
    """

    packed: list[torch.classes.xnnpack.LinearOpContext]

    def __init__(self, linear: torch.nn.Linear, many_rows: bool) -> None:
        super().__init__()
        self.many_rows = many_rows
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.packed = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu":
            return torch.nn.functional.linear(input, self.weight, self.bias)
        if self.many_rows and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # which tells whether it has AVX-512
            rows = input.flatten(0, -2)
            few = rows.size(0)
            if few < 4:
                rows = torch.nn.functional.pad(rows, (0, 0, 0, 4 - few))
            product = torch.nn.functional.linear(rows, self.weight, self.bias)
            return product[:few].reshape(input.shape[:-1] + product.shape[1:])
        if len(self.packed) == 0:  # here and not before, because the weights are loaded onto any device
            self.packed.append(torch.ops.prepacked.linear_clamp_prepack(self.weight, self.bias, None, None))
        return torch.ops.prepacked.linear_clamp_run(input, self.packed[0])


class BFloat16Linear(torch.nn.Module):
    """A linear layer that multiplies in bfloat16; its input and output keep the caller's type.

    On a CPU with AVX-512 oneDNN computes it with weights that it packs, after which it cannot be saved any more.
    """

    packed: list[torch.Tensor]

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())
        self.packed = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.to(self.weight.dtype)
        if input.device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.nn.functional.linear(rows, self.weight, self.bias).to(input.dtype)
        if len(self.packed) == 0:
            self.packed.append(torch.ops.mkldnn._reorder_linear_weight(self.weight, None))
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed[0], self.bias, "none", [], "").to(input.dtype)


def with_precision(decoder: Decoder, precision: str) -> Decoder:
    """Convert the linear layers of ``decoder``, the predictor's LSTM included; the model it was made of changes, too.

    Args:
        decoder (Decoder): in evaluation mode.
        precision (str): ``fp32``, ``bf16`` (bfloat16 weights and products) or ``int8`` (dynamic quantization:
            int8 weights per channel, one activation scale a call).

    Returns:
        Decoder: the engine; everything but the linear layers stays float32.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}.")
    # What shares a call with an int8 row changes its scale and so its result, and bfloat16 rounds whatever small
    # difference a product of another size makes: there, a call holds one utterance, so that it gives the same
    # result alone and in a batch.
    decoder.packs = precision == "fp32"
    decoder.requires_grad_(False)  # the packed layers take no input that does
    if precision == "int8":
        per_channel = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(decoder, per_channel)
    linears = [
        (path, parent, name, child)
        for path, parent in decoder.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.Linear)
    ]
    for path, parent, name, child in linears:
        in_encoder = path.startswith("encoder")
        setattr(parent, name, BFloat16Linear(child) if precision == "bf16" else PackedLinear(child, in_encoder))
    return decoder
