"""Precisions: the linear layers of the engine as float32, bfloat16 or int8 products.

``with_precision`` replaces every ``torch.nn.Linear`` of a module by a layer that packs its weights for the processor.
export_model.py calls it on what decoder.py builds; encoder.py and search.py do not know of it.

Whatever the precision, a row's result does not depend on what other rows share the call. The layers pack at their
first call and not before, because weights are loaded onto any device, and give the memory of the weights as they were
loaded back: a module that has computed on a CPU cannot be saved or moved any more.

Source: XNNPACK, oneDNN and FBGEMM, through PyTorch's operators.
"""

import itertools

import torch

PRECISIONS = ("fp32", "bf16", "int8")
# The least that an activation function gives; None is anything. GELU's minimum is -0.16997.
LOWEST = {torch.nn.ReLU: 0.0, torch.nn.GELU: -0.17}


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
        if len(self.packed) == 0:
            self.packed.append(torch.ops.prepacked.linear_clamp_prepack(self.weight, self.bias, None, None))
            # XNNPACK holds on to the tensor that it was given, so another one in its place would free nothing.
            self.weight.set_(torch.empty(0))
        return torch.ops.prepacked.linear_clamp_run(input, self.packed[0])


class BFloat16Linear(torch.nn.Module):
    """A linear layer that multiplies in bfloat16; its input and output keep the caller's type.

    On a CPU with AVX-512 oneDNN computes it. Where that has no bfloat16 instructions oneDNN adds up a lone row in
    another order than several, so there is never a lone one.
    """

    packed: list[torch.Tensor]

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())
        self.packed = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.flatten(0, -2).to(torch.bfloat16)
        count = rows.size(0)
        if count == 1:
            rows = rows.expand(2, -1).contiguous()
        if input.device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            product = torch.nn.functional.linear(rows, self.weight, self.bias)
        else:
            if len(self.packed) == 0:
                self.packed.append(torch.ops.mkldnn._reorder_linear_weight(self.weight, None))
                self.weight = torch.empty(0)
            product = torch.ops.mkldnn._linear_pointwise(rows, self.packed[0], self.bias, "none", [], "")
        return product[:count].to(input.dtype).reshape(input.shape[:-1] + product.shape[1:])


class Int8Linear(torch.nn.Module):
    """A linear layer that multiplies in int8: weights with one scale an output, inputs with one scale a row.

    A row x becomes bytes q, x = scale * (q - zero), with the finest scale that has room for all of x. The products of
    bytes are added up in integers, and so exactly, in whatever order and company. Where inputs can be of any sign
    zero is in the middle of the bytes; behind an activation function with a least value it is at their lower end.

    Args:
        linear (torch.nn.Linear): the layer.
        lowest (float or None): what its inputs are never below, if there is such a number.
    """

    packed: list[torch.classes.quantized.LinearPackedParamsBase]

    def __init__(self, linear: torch.nn.Linear, lowest: float | None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.signed: bool = lowest is None
        self.zero: int = 128 if lowest is None else 32 if lowest < 0 else 0
        self.top: float = 255.0 - self.zero  # what the largest element becomes, above zero; the same for a processor
        # No row is taken for smaller than this, or its lowest element would not have room below zero.
        self.least: float = -lowest * self.top / self.zero if lowest else 1e-30
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))  # (outputs, inputs)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros(len(scale)) if linear.bias is None else linear.bias.detach())
        self.packed = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu":  # where there is no such product
            return torch.nn.functional.linear(input, self.weight * self.scale.unsqueeze(1), self.bias)
        if len(self.packed) == 0:
            self._pack()
        largest = (input.abs() if self.signed else input).amax(-1, keepdim=True).clamp(min=self.least)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            input * largest.reciprocal(), 1 / self.top, self.zero, self.packed[0]
        )
        return torch.addcmul(self.bias, product, largest, out=product)  # in one pass

    def _pack(self) -> None:
        zeros = torch.zeros(self.scale.size(0), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, 0)
        self.packed.append(torch.ops.quantized.linear_prepack(weight, None))
        self.weight = torch.empty(0, dtype=torch.int8)
        if saturates():
            self.top, self.zero = (self.top - 1) // 2, self.zero // 2


def saturates() -> bool:
    """Whether this processor adds up products of bytes in pairs of 16 bits, in which 2 * 255 * 127 has no place.

    That is so without VNNI; there, inputs have to do with bytes up to 127. The product itself is asked, because FBGEMM
    may have been told not to use what the processor has.
    """
    ones, zeros = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(torch.full([64, 64], 127, dtype=torch.int8), ones, zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    rows = torch.full([2, 64], 255.0)
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, 0, packed)
    return bool((product != 64.0 * 255 * 127).any())


def with_precision(decoder: torch.nn.Module, precision: str) -> torch.nn.Module:
    """Convert the linear layers of ``decoder``, the predictor's LSTM included; the model it was made of changes, too.

    Args:
        decoder (engine.decoder.Decoder): in evaluation mode.
        precision (str): ``fp32``, ``bf16`` (bfloat16 weights and products) or ``int8`` (weights with one scale an
            output, inputs with one scale a row).

    Returns:
        engine.decoder.Decoder: the engine; everything but the linear layers stays float32.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}.")
    if precision != "fp32":
        # In which order attention adds up a segment's keys depends on its place in a block, and thus on what shares the
        # call. These precisions make more of that last bit: alone in its block, a segment has one place.
        decoder.encoder.block_segments = 1
        decoder.search.joiner_tile = 1  # a row costs what it costs: none is computed ahead of its time to fill a tile
    return with_linears(decoder, precision)


def with_linears(module: torch.nn.Module, precision: str) -> torch.nn.Module:
    """``module`` with its linear layers converted, those of its ``encoder`` for many rows; it changes itself."""
    module.requires_grad_(False)  # the packed layers take no input that does
    lowest = lowest_inputs(module)
    linears = [
        (path, parent, name, child)
        for path, parent in module.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.Linear)
    ]
    for path, parent, name, child in linears:
        if precision == "fp32":
            layer = PackedLinear(child, many_rows=path.startswith("encoder"))
        else:
            layer = BFloat16Linear(child) if precision == "bf16" else Int8Linear(child, lowest.get(child))
        setattr(parent, name, layer)
    return module


def lowest_inputs(module: torch.nn.Module) -> dict[torch.nn.Module, float]:
    """Of the linear layers that stand behind an activation function in a ``Sequential``: the least that it gives."""
    found = {}
    for sequence in [each for each in module.modules() if isinstance(each, torch.nn.Sequential)]:
        layers = [layer for layer in sequence if not isinstance(layer, torch.nn.Dropout)]
        for before, layer in itertools.pairwise(layers):
            if type(before) in LOWEST:
                found[layer] = LOWEST[type(before)]
    return found
