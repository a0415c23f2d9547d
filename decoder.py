"""The engine that is exported: RNN-T beam search over an Emformer encoder, as one scriptable module.

``Decoder`` is a drop-in for ``torchaudio.models.RNNTBeamSearch``: same signatures, same tokens. It still
computes as torchaudio does; what runs inside may change, what ``forward`` and ``infer`` return may not.
"""

import torch
from torchaudio.models import RNNT, Hypothesis, RNNTBeamSearch

PRECISIONS = ("fp32", "bf16", "int8")


class Decoder(torch.nn.Module):
    """RNN-T beam search decoder.

    Args:
        model (torchaudio.models.RNNT): Emformer RNN-T, in evaluation mode.
        blank (int): index of the blank token; it is the last one of the vocabulary.
    """

    def __init__(self, model: RNNT, blank: int) -> None:
        super().__init__()
        self.search = RNNTBeamSearch(model, blank)
        # Feature frames that one encoder frame is made of.
        self.stride: int = model.transcriber.time_reduction.stride
        self.right_context: int = model.transcriber.transformer.right_context_length
        self.max_beam_width: int = blank

    def forward(self, features: torch.Tensor, length: torch.Tensor, beam_width: int) -> list[Hypothesis]:
        """Transcribe one utterance.

        Args:
            features (Tensor): (T, 80) or (1, T, 80), right context included, as the bundle's extractor gives them.
            length (Tensor): () or (1,), the number of frames.
            beam_width (int): hypotheses kept after each frame; at most the number of non-blank tokens.

        Returns:
            list[Hypothesis]: the best first: (tokens with the leading blank, predictor output, predictor
            state, score), see ``torchaudio.models.RNNTBeamSearch``.
        """
        beam_width = min(beam_width, self.max_beam_width)
        # torchaudio's encoder fails on features that leave no encoder frame; nothing was said in them.
        if features.size(-2) // self.stride <= self.right_context:
            return self.search._init_b_hypos(features.device)
        return self.search(features, length, beam_width)

    @torch.jit.export
    def infer(
        self,
        features: torch.Tensor,
        length: torch.Tensor,
        beam_width: int,
        state: list[list[torch.Tensor]] | None = None,
        hypothesis: list[Hypothesis] | None = None,
    ) -> tuple[list[Hypothesis], list[list[torch.Tensor]]]:
        """Transcribe one segment of a stream, going on from ``state`` and ``hypothesis``.

        Args:
            features (Tensor): (T, 80) or (1, T, 80): one segment (16 frames) and its right context (4 frames).
            length (Tensor): () or (1,), the number of frames.
            beam_width (int): as in ``forward``.
            state (list[list[Tensor]] or None): the encoder's state after the segment before; it is not changed.
            hypothesis (list[Hypothesis] or None): the hypotheses after the segment before.

        Returns:
            (list[Hypothesis], list[list[Tensor]]): the hypotheses and the encoder's state after this segment.
        """
        if state is not None:  # torchaudio's encoder replaces the entries of the lists that it is given
            state = [[part for part in layer] for layer in state]
        return self.search.infer(features, length, min(beam_width, self.max_beam_width), state, hypothesis)


class BFloat16Linear(torch.nn.Module):
    """A linear layer that multiplies in bfloat16; its input and output keep the caller's type."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input.to(self.weight.dtype), self.weight, self.bias).to(input.dtype)


def with_precision(model: RNNT, precision: str) -> RNNT:
    """Convert the linear layers of ``model``, in place where it can be.

    Args:
        model (torchaudio.models.RNNT): float32 model in evaluation mode.
        precision (str): ``fp32``, ``bf16`` (bfloat16 weights and products) or ``int8`` (dynamic quantization:
            int8 weights per channel, one activation scale a call).

    Returns:
        RNNT: the model; everything but the linear layers stays float32.
    """
    if precision == "int8":
        per_channel = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(model, per_channel)
    if precision == "bf16":
        linears = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, torch.nn.Linear)
        ]
        for parent, name, child in linears:
            setattr(parent, name, BFloat16Linear(child))
    return model
