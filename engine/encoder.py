"""The Emformer encoder: features to encodings, in time that grows with the length and not with its square.

``Encoder`` takes torchaudio's and computes with its weights, many segments at once. decoder.py decides which segments
share a call and carries what the layers remember from one call to the next.

Source: Emformer (Shi et al. 2021, arXiv 2010.10759), as torchaudio.models.emformer implements it.
"""

import torch

# Segments whose queries share one product in the attention: more are fewer products with more masked in them.
BLOCK_SEGMENTS = 4


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
        self.query_key_value = stacked([attention.emb_to_query, attention.emb_to_key_value])
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
        key_value = key_value.unfold(1, keys, block).transpose(2, 3)  # (N, blocks / N, keys, 2 D)
        key, value = key_value.reshape(-1, keys, 2, heads, dim // heads).transpose(1, 3).unbind(2)
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


def stacked(linears: list[torch.nn.Linear]) -> torch.nn.Linear:
    """One linear layer that gives the outputs of several, of the same input, behind each other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    one = torch.nn.Linear(weight.size(1), weight.size(0))
    one.weight.data, one.bias.data = weight, torch.cat([linear.bias.detach() for linear in linears])
    return one
