"""Precisions: the linear layers of the engine as float32, bfloat16 or int8 products.

``with_precision`` replaces every ``torch.nn.Linear`` of a module by a layer that packs its weights for the processor.
export_model.py calls it on what decoder.py builds; encoder.py and search.py do not know of it.

Whatever the precision, a row's result does not depend on what other rows share the call. The layers pack at their
first call and not before, because weights are loaded onto any device, and give the memory of the weights as they were
loaded back: a module that has computed on a CPU cannot be saved or moved any more.

Source: XNNPACK and oneDNN, through PyTorch's operators.
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

    A row x becomes bytes q, x = scale * (q - zero) + lowest, with the scale that its largest element asks for. With
    w the int8 weights, what the layer gives is scale * (sum of (q - zero) * w) + (lowest * sum of w + bias), the sums
    in integers and so exact, in whatever order and company. Where inputs can be of any sign, lowest is 0 and zero is
    128; behind an activation function with a least value, lowest is that and zero 0, and no bit is spent on the sign.

    Args:
        linear (torch.nn.Linear): the layer.
        lowest (float or None): what its inputs are never below, if there is such a number.
    """

    packed: list[torch.Tensor]

    def __init__(self, linear: torch.nn.Linear, lowest: float | None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.signed: bool = lowest is None
        self.lowest: float = lowest or 0.0
        self.levels: float = 0.0  # these two depend on the processor
        self.shift: int = -128
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))  # (outputs, inputs)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", torch.zeros(len(scale), dtype=torch.int64))
        sums = (self.weight.double().sum(1) * scale).float()  # of each output's weights
        self.register_buffer("sums", sums)
        self.register_buffer("bias", self.lowest * sums + (0 if linear.bias is None else linear.bias.detach()))
        self.packed = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu":  # where there is no such product
            weight = self.weight.to(input.dtype) * self.scale.unsqueeze(1)
            return torch.nn.functional.linear(input, weight, self.bias - self.lowest * self.sums)
        if len(self.packed) == 0:
            self._pack()
        rows = input.flatten(0, -2)
        largest = rows.amax(1, keepdim=True)
        # From the lowest; where there is none, of either sign.
        largest = torch.maximum(largest, -rows.amin(1, keepdim=True)) if self.signed else largest - self.lowest
        largest = largest.clamp(min=1e-30)
        steps = self.levels / largest
        numbers = rows * steps
        if not self.signed:
            numbers.add_(-self.lowest * steps - 128)
        # By way of int8, because PyTorch has no fast conversion from float32 to uint8.
        bytes = numbers.round_().to(torch.int8).add_(self.shift).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            bytes,
            1.0,  # scale and
            0,  # zero of all the input
            self.packed[0],
            self.scale,
            self.zero_points,
            self.packed[1],
            1.0,  # scale and
            0,  # zero of an output that is no float32
            torch.float32,
            "none",
            [],
            "",
        )
        product = product.mul_(largest / self.levels).add_(self.bias)
        return product.reshape(input.shape[:-1] + product.shape[1:])

    def _pack(self) -> None:
        """Pack for this processor, and use as many of the inputs' bits as its products take."""
        few_bits = saturates()
        zero = 0.0
        if self.signed:
            # What is added to an int8 to make a byte of it: 128 is -128 there.
            self.levels, self.shift, zero = (63.0, 64, 64.0) if few_bits else (127.0, -128, 128.0)
        else:
            self.levels = 127.0 if few_bits else 255.0
        # Packed for a number of rows it serves all others.
        self.packed.append(torch.ops.onednn.qlinear_prepack(self.weight, [256, self.weight.size(1)]))
        self.packed.append(-zero * self.sums)
        self.weight = torch.empty(0)


def saturates() -> bool:
    """Whether this processor adds up products of bytes by pairs in 16 bits, in which 2 * 255 * 127 has no place.

    That is so without VNNI. The product itself is asked, because oneDNN may have been told not to use what is there.
    """
    ones = torch.ones(64)
    packed = torch.ops.onednn.qlinear_prepack(torch.full([64, 64], 127, dtype=torch.int8), [16, 64])
    product = torch.ops.onednn.qlinear_pointwise(
        torch.full([16, 64], 255, dtype=torch.uint8),
        1.0,
        0,
        packed,
        ones,
        torch.zeros(64, dtype=torch.int64),
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
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
