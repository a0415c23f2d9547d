"""Precisions: the linear layers of the engine as float32, bfloat16 or int8 products.

``with_precision`` replaces every ``torch.nn.Linear`` of a module by a layer that packs its weights for the processor.
export_model.py calls it on what decoder.py builds; encoder.py and search.py do not know of it.

Source: XNNPACK, oneDNN and FBGEMM, through PyTorch's operators.
"""

import torch

PRECISIONS = ("fp32", "bf16", "int8")


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


def with_precision(decoder: torch.nn.Module, precision: str) -> torch.nn.Module:
    """Convert the linear layers of ``decoder``, the predictor's LSTM included; the model it was made of changes, too.

    Args:
        decoder (engine.decoder.Decoder): in evaluation mode.
        precision (str): ``fp32``, ``bf16`` (bfloat16 weights and products) or ``int8`` (dynamic quantization:
            int8 weights per channel, one activation scale a call).

    Returns:
        engine.decoder.Decoder: the engine; everything but the linear layers stays float32.

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
