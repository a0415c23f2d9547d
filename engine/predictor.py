"""The predictor: what the tokens so far say of the next one, with the weights of torchaudio's ``_Predictor``.

search.py runs it, once for each list of tokens.

Source: RNN-T (Graves 2012, arXiv 1211.3711) with LSTM layers that normalise, as torchaudio.models implements them.
"""

import torch


class LSTMLayer(torch.nn.Module):
    """One step of torchaudio's ``_CustomLSTM``, both of its products in one."""

    def __init__(self, lstm: torch.nn.Module) -> None:
        super().__init__()
        self.gates = summed([lstm.x2g, lstm.p2g])
        self.gate_norm = lstm.g_norm
        self.cell_norm = lstm.c_norm

    def forward(
        self, input: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From (n, D) and the state, hidden and cell (n, H) each, to the next state."""
        gates = self.gate_norm(self.gates(torch.cat([input, hidden], dim=1)))
        input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, 1)
        cell = self.cell_norm(forget_gate.sigmoid() * cell + input_gate.sigmoid() * cell_gate.tanh())
        return output_gate.sigmoid() * cell.tanh(), cell


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
        before, after = state.flatten(1, 2).unbind(1), torch.jit.annotate(list[torch.Tensor], [])
        for i, lstm in enumerate(self.lstm_layers):
            output, cell = lstm(output, before[2 * i], before[2 * i + 1])
            after += [output, cell]
        return self.output_layer_norm(self.linear(output)), torch.stack(after, dim=1).reshape(state.shape)


def summed(linears: list[torch.nn.Linear]) -> torch.nn.Linear:
    """One linear layer of several inputs behind each other that adds up what each one's layer gives."""
    weight = torch.cat([linear.weight.detach() for linear in linears], dim=1)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    one = torch.nn.Linear(weight.size(1), weight.size(0), bias=len(biases) > 0)
    one.weight.data = weight
    if biases:
        one.bias.data = torch.stack(biases).sum(0)
    return one
