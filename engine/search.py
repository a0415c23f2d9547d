"""The RNN-T beam search: encodings to hypotheses, with the tokens and scores of torchaudio's ``RNNTBeamSearch``.

``BeamSearch`` holds the predictor and the joiner and goes on from a ``Beam`` over as many encoder frames as it gets. It
knows nothing of features or streams: decoder.py hands it encodings, one utterance at a time.

Sources: RNN-T (Graves 2012, arXiv 1211.3711), as torchaudio.models.RNNTBeamSearch searches it; joining several frames
at once is WIND (Xu et al. 2025, arXiv 2505.13765).
"""

import math
from typing import NamedTuple

import torch
from torchaudio.models import RNNT, Hypothesis

from engine.context import Context, steps
from engine.predictor import Predictor

# Rows (a hypothesis in a frame each) that one call of the joiner is filled up to, and that XNNPACK's widest kernel
# computes in the time in which it reads the weights once: at fp32, more are filled up to a multiple of it.
JOINER_ROWS = 7
# Tokens after which a frame ends, whatever the scores say; RNNTBeamSearch's step_max_tokens.
MAX_TOKENS_PER_FRAME = 100
# The same where phrases are expected: their bonus can make more tokens likelier than fewer, frame after frame.
MAX_EXPECTED_PER_FRAME = 10


class Beam(NamedTuple):
    """What the search carries from one window of encodings to the next, the best hypothesis first."""

    hypotheses: list[Hypothesis]
    frames: list[list[int]]  # of each hypothesis: the encoder frame at which each token was emitted
    log_probs: list[list[float]]  # of each hypothesis: the log-probability of each token there
    searched: int  # encoder frames so far
    settled: int  # tokens that all of them begin with and that were taken out, see ``Decoder.advance``
    matched: list[tuple[int, float]]  # of each hypothesis: its state in the context graph, and the bonus in its score


class PrefixTree:
    """The token lists of a search, each one a node, and what the predictor makes of them.

    That depends on the tokens alone, so it is computed once a node, however many paths come by. So does what a context
    graph makes of them.
    """

    def __init__(self, vocabulary: int, root_length: int, context: Context | None) -> None:
        self.vocabulary = vocabulary
        self.context = context
        self.matched = [(0, 0.0)]  # state in the context graph, and the bonus
        self.steps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of a state, see ``engine.context.steps``
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
            self.matched.append((0, 0.0))
        return self.children[key]

    def gains(self, node: int) -> torch.Tensor:
        """What each token but blank adds to the bonus, (vocabulary - 1,)."""
        context, state = self.context, self.matched[node][0]
        if context is not None and state not in self.steps:
            self.steps[state] = steps(context, state)
        return self.steps[state][1]

    def match(self, node: int, parent: int, token: int) -> float:
        """Set what the context graph makes of ``node``, the child of ``parent``; what the token adds to the bonus."""
        gain = float(self.gains(parent)[token])
        state, bonus = self.matched[parent]
        self.matched[node] = (int(self.steps[state][0][token]), bonus + gain)
        return gain


class Emission(NamedTuple):
    """A token that a path has emitted."""

    before: int  # the emission before it
    token: int
    frame: int  # of the encodings that are searched
    log_prob: float


class Path(NamedTuple):
    """A hypothesis inside ``BeamSearch``."""

    node: int  # in the prefix tree: equal nodes are equal token lists
    last: int  # its last emission
    score: float
    start: int  # the frame that the next three begin with
    blank: list[float]  # of each frame: log-probability of blank
    best: list[float]  # of each frame: log-probability of the best other token
    log_probs: torch.Tensor  # (frames, vocabulary)


class BeamSearch(torch.nn.Module):
    """Goes on from one beam to the next, see ``forward``.

    Args:
        model (torchaudio.models.RNNT): whose predictor and joiner are used.
        blank (int): index of the blank token, which is the last one of the vocabulary.

    Raises:
        ValueError: blank is another token.
    """

    def __init__(self, model: RNNT, blank: int) -> None:
        super().__init__()
        if blank != model.joiner.linear.out_features - 1:
            raise ValueError("The blank token must be the last one of the vocabulary.")
        self.predictor = Predictor(model.predictor)
        self.joiner = torch.nn.Sequential(model.joiner.activation, model.joiner.linear)
        self.blank = blank
        # TorchScript sees attributes, not this file's constants.
        self.joiner_rows: int = JOINER_ROWS
        self.joiner_tile: int = JOINER_ROWS  # see ``with_precision``
        self.max_tokens_per_frame: int = MAX_TOKENS_PER_FRAME
        self.max_expected_per_frame: int = MAX_EXPECTED_PER_FRAME

    def first_beam(self) -> Beam:
        """One hypothesis: no token but the leading blank."""
        device, layers = self.predictor.embedding.weight.device, len(self.predictor.lstm_layers)
        state = torch.zeros(1, layers, 2, self.predictor.hidden_dim, device=device)
        output, state = self.predictor(torch.tensor([self.blank], device=device), state)
        return beam_of([hypothesis_of([self.blank], output[0], state[0], 0.0)])

    def forward(self, encodings: torch.Tensor, beam: Beam, beam_width: int, context: Context | None = None) -> Beam:
        """Go on from ``beam`` over (T, D) encodings, by ``RNNTBeamSearch``'s rules.

        With a ``context``, what a token adds to the bonus of its phrases adds to the token's log-probability, and the
        beam's scores hold the bonus until ``without_pending`` takes it out.

        In a frame, every active path ends with blank; the best extensions of the active paths by a token that
        beat the ``beam_width``-th best ended path become the active paths, until there is none.
        """
        beam_width = min(beam_width, self.blank)
        common = common_length(beam.hypotheses)
        tree = PrefixTree(self.blank + 1, common + beam.settled, context)
        # The first ones stand for ``beam``'s hypotheses, with nothing before them.
        emissions: list[Emission] = []
        paths: list[Path] = []
        for (tokens, output, state, score), matched in zip(beam.hypotheses, beam.matched):  # noqa: B905 (TorchScript)
            node = 0
            for token in tokens[common:]:
                node = tree.child(node, token)
            tree.matched[node] = matched
            tree.outputs[node] = output[0]
            tree.states[node] = torch.stack([torch.cat(layer) for layer in state])
            paths.append(Path(node, len(emissions), float32(score), 0, [], [], torch.empty(0)))
            emissions.append(Emission(-1, -1, -1, 0.0))

        most = self.max_tokens_per_frame if context is None else self.max_expected_per_frame
        for t in range(encodings.size(0)):
            active, ended = paths, torch.jit.annotate(list[Path], [])
            place: dict[int, int] = {}  # of a node in ``ended``
            for emitted in range(most + 1):
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
                if emitted < most:
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
        matches: list[tuple[int, float]] = []
        for path in best_paths(paths, tree, beam_width):
            own: list[Emission] = []
            last = path.last
            while emissions[last].before >= 0:
                own.append(emissions[last])
                last = emissions[last].before
            own.reverse()
            tokens = beam.hypotheses[last][0] + [emission.token for emission in own]
            hypotheses.append(hypothesis_of(tokens, tree.outputs[path.node], tree.states[path.node], path.score))
            frames.append(beam.frames[last] + [beam.searched + emission.frame for emission in own])
            log_probs.append(beam.log_probs[last] + [emission.log_prob for emission in own])
            matches.append(tree.matched[path.node])
        return Beam(hypotheses, frames, log_probs, beam.searched + encodings.size(0), beam.settled, matches)

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
                if tree.context is not None:
                    log_prob -= tree.match(node, path.node, token)
                extensions.append(Path(node, len(emissions), score, t, [], [], torch.empty(0)))
                emissions.append(Emission(path.last, token, t, log_prob))
        if len(new_nodes) > 0:
            outputs, states = self.predictor(torch.tensor(new_tokens, device=parents[0].device), torch.stack(parents))
            for node, output, state in zip(new_nodes, outputs.unbind(0), states.unbind(0)):  # noqa: B905
                tree.outputs[node], tree.states[node] = output, state
        return extensions

    def _joined(self, paths: list[Path], tree: PrefixTree, encodings: torch.Tensor, t: int) -> list[Path]:
        """``paths``, each with its log-probabilities for frame ``t``.

        They depend on the path's tokens and the frame alone, so a path gets those of the next frames in the
        same product and keeps them for as long as it lives.
        """
        missing: list[int] = []  # places in ``paths``
        for place, path in enumerate(paths):
            if t >= path.start + len(path.blank):
                missing.append(place)
        if len(missing) == 0:
            return paths
        # Calls are filled up to whole tiles; of what is left over the first paths get more.
        room = -(-max(len(missing), self.joiner_rows) // self.joiner_tile) * self.joiner_tile
        counts: list[int] = []
        frames: list[int] = []
        targets: list[torch.Tensor] = []
        gains: list[torch.Tensor] = []
        for i, place in enumerate(missing):
            node = paths[place].node
            count = min(room // len(missing) + int(i < room % len(missing)), encodings.size(0) - t)
            counts.append(count)
            frames += [t + frame for frame in range(count)]
            targets += [tree.outputs[node]] * count
            if tree.context is not None:
                gains += [tree.gains(node)] * count
        rows = encodings[torch.tensor(frames, device=encodings.device)] + torch.stack(targets)  # (rows, D)
        log_probs = torch.log_softmax(self.joiner(rows), dim=1).cpu()  # (rows, V)
        if len(gains) > 0:
            log_probs[:, : self.blank] += torch.stack(gains)
        blank: list[float] = log_probs[:, self.blank].tolist()
        best: list[float] = log_probs[:, : self.blank].amax(1).tolist()
        joined, first = paths[:], 0
        for place, own in zip(missing, log_probs.split(counts)):  # noqa: B905 (TorchScript)
            path, last = paths[place], first + own.size(0)
            joined[place] = Path(path.node, path.last, path.score, t, blank[first:last], best[first:last], own)
            first = last
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


def hypothesis_of(tokens: list[int], output: torch.Tensor, state: torch.Tensor, score: float) -> Hypothesis:
    """As ``RNNTBeamSearch`` gives it, from a predictor output (D,) and state (layers, 2, H)."""
    return tokens, output.unsqueeze(0), [[part.unsqueeze(0) for part in layer.unbind(0)] for layer in state], score


def without_pending(beam: Beam, context: Context) -> Beam:
    """``beam`` at the end of an utterance: no phrase goes on, and the scores are the model's own again."""
    hypotheses: list[Hypothesis] = []
    ranks: list[float] = []
    for (tokens, output, state, score), (place, bonus) in zip(beam.hypotheses, beam.matched):  # noqa: B905
        ranks.append((score - float(context[5][place] - context[6][place])) / (len(tokens) + beam.settled + 1))
        hypotheses.append((tokens, output, state, score - bonus))
    order: list[int] = torch.tensor(ranks).sort(descending=True, stable=True).indices.tolist()
    return Beam(
        [hypotheses[i] for i in order],
        [beam.frames[i] for i in order],
        [beam.log_probs[i] for i in order],
        beam.searched,
        beam.settled,
        [beam.matched[i] for i in order],
    )


def beam_of(hypotheses: list[Hypothesis]) -> Beam:
    """A beam that begins with ``hypotheses``; where their tokens were emitted is not known."""
    frames = [torch.jit.annotate(list[int], []) for _ in hypotheses]
    log_probs = [torch.jit.annotate(list[float], []) for _ in hypotheses]
    return Beam(hypotheses, frames, log_probs, 0, 0, [(0, 0.0)] * len(hypotheses))


def with_score(path: Path, score: float) -> Path:
    """``path`` with another score."""
    return Path(path.node, path.last, float32(score), path.start, path.blank, path.best, path.log_probs)


def float32(number: float) -> float:
    """Round to single precision, as ``RNNTBeamSearch`` does with every score (Dekker 1971, Veltkamp's splitting)."""
    if math.isinf(number):
        return number
    scaled = 536870913.0 * number  # 2 ** 29 + 1: double has 29 bits more than single
    return scaled - (scaled - number)
