"""Phrases that are expected: a context graph over tokens, whose bonus the beam search adds to a hypothesis' score.

In a list of tokens the phrases are looked for from left to right, the longest first, as whole words and without
overlaps. One that is found adds its weight times the number of its tokens to the bonus. So does, with the tokens that
are there, the beginning of one at the end of the list, if that is more than the phrases inside it. So the bonus grows
token by token, is taken back when a phrase breaks off, and no token adds more than a weight. It depends on the tokens
alone; silent ones, which are no text, are left out.

Source: the automaton of Aho and Corasick 1975 (doi 10.1145/360825.360855), for the longest match from the left.
"""

import torch

# A state is a beginning of a phrase: the tokens that are not yet decided on; 0 is the empty one. States stand in the
# order of their lengths, and those that one token leads to from the same state next to each other.
Context = tuple[
    torch.Tensor,  # (states,) int64: the token that leads there
    torch.Tensor,  # (states + 1,) int64: the first of the states that lie behind each
    torch.Tensor,  # (states,) int64: where it falls back to, when no phrase goes on with the next token
    torch.Tensor,  # (states,): the bonus of phrases that are found with that
    torch.Tensor,  # (states,): the bonus of the phrase that the state is, 0 if it is none
    torch.Tensor,  # (states,): the bonus as long as nothing is decided
    torch.Tensor,  # (states,): of that, what stays if nothing follows
    torch.Tensor,  # (vocabulary without blank,) int64: 0 for a token that begins a word, 1 if it goes on, 2 if silent
]


def context_graph(phrases: list[list[int]], weights: list[float], kinds: torch.Tensor) -> Context:
    """The graph of ``phrases``, each with its weight, over tokens of these ``kinds`` (vocabulary without blank,)."""
    vocabulary = kinds.numel()
    kind: list[int] = kinds.tolist()
    tokens, parents, depths, first = [-1], [0], [0], torch.jit.annotate(list[int], [])
    members = [list(range(len(phrases)))]  # of each state: the phrases that begin with it
    children: dict[int, int] = {}  # state * vocabulary + token -> state
    state = 0
    while state < len(tokens):
        first.append(len(tokens))
        for phrase in members[state]:
            if depths[state] < len(phrases[phrase]):
                token = phrases[phrase][depths[state]]
                key = state * vocabulary + token
                if key not in children:
                    children[key] = len(tokens)
                    tokens.append(token)
                    parents.append(state)
                    depths.append(depths[state] + 1)
                    members.append(torch.jit.annotate(list[int], []))
                members[children[key]].append(phrase)
        state += 1
    first.append(len(tokens))

    back, found, whole, bonus, sure = [0], [0.0], [0.0], [0.0], [0.0]
    for state in range(1, len(tokens)):
        token, place, kept = tokens[state], parents[state], 0.0
        # From the state before it falls back at least once: this one lies behind it.
        fallen = place == 0
        while place > 0 and (not fallen or place * vocabulary + token not in children):
            decided = whole[place] > 0 and kind[token] == 0
            kept += whole[place] if decided else found[place]
            place, fallen = 0 if decided else back[place], True
        back.append(0 if parents[state] == 0 else children.get(place * vocabulary + token, 0))
        found.append(kept)
        one, part = 0.0, 0.0
        for phrase in members[state]:
            weight = weights[phrase] * depths[state]
            if len(phrases[phrase]) == depths[state]:
                one = max(one, weight)
            else:
                part = max(part, weight)
        whole.append(one)
        bonus.append(max(part, one if one > 0 else kept + bonus[back[state]]))
        sure.append(one if one > 0 else kept + sure[back[state]])
    return (
        torch.tensor(tokens),
        torch.tensor(first),
        torch.tensor(back),
        torch.tensor(found),
        torch.tensor(whole),
        torch.tensor(bonus),
        torch.tensor(sure),
        kinds,
    )


def steps(context: Context, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token but blank: the state that it leads to from ``state``, and by how much the bonus changes."""
    tokens, first, back, found, whole, bonus, _, kinds = context
    after = torch.full_like(kinds, state)  # where it is silent
    gain = torch.zeros(kinds.numel())
    for kind in range(2):
        places, kept = [state], [0.0]
        while places[-1] > 0:
            place = places[-1]
            one = float(whole[place])
            decided = one > 0 and kind == 0
            places.append(0 if decided else int(back[place]))
            kept.append(kept[-1] + (one if decided else float(found[place])))
        leads, adds = torch.zeros_like(kinds), torch.full_like(gain, kept[-1])
        for i in range(len(places) - 1, -1, -1):  # the longest is the last word
            begin, end = int(first[places[i]]), int(first[places[i] + 1])
            leads[tokens[begin:end]] = torch.arange(begin, end)
            adds[tokens[begin:end]] = kept[i]
        after = torch.where(kinds == kind, leads, after)
        gain = torch.where(kinds == kind, adds + bonus[leads] - bonus[state], gain)
    return after, gain
