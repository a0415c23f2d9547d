"""How far the words' times of the digits model are from the truth, on synthesised clips whose word times are known.

    python word_times.py --clips data

The clips are those that synthesise.py wrote and training never saw (``heldout-*.wav``). Only clips that are understood
word for word are counted. The medians of the first part are what export_model.py writes into the model file, as
``WORD_DELAYS``; the second part is what is left when handler.py has subtracted them.
"""

import argparse
import json
from collections import defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
from evaluate import Recogniser
from ts.context import RequestProcessor

HEADERS = {"Accept": "application/json; profile=verbose"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--beam-width", type=int, default=1)
    args = parser.parse_args()
    recogniser = Recogniser(args.precision, args.beam_width)
    for title, delays in (
        ("as emitted", {"start": 0.0, "end": 0.0}),
        ("corrected", recogniser.handler.word_delays),
    ):
        recogniser.handler.word_delays = delays
        late: dict[str, dict[str, list[float]]] = {"start": defaultdict(list), "end": defaultdict(list)}
        for path in sorted(args.clips.glob("heldout-*.json")):
            clip = json.loads(path.read_text())
            if not clip["words"]:
                continue
            recogniser.context.request_processor = [RequestProcessor(HEADERS)]
            body = {"body": path.with_suffix(".wav").read_bytes()}
            [answer] = recogniser.handler.handle([body], recogniser.context)
            if answer["text"] != clip["text"]:
                continue
            for heard, (start, end) in zip(answer["words"], clip["words"], strict=True):
                late["start"][clip["voice"]].append(heard["start"] - start)
                late["end"][clip["voice"]].append(heard["end"] - end)
        print(f"\n{title}, seconds behind the truth\n{'':12s}  words  median     10%     25%     75%     90%")
        for edge, voices in late.items():
            for voice, values in [("all", list(chain.from_iterable(voices.values()))), *sorted(voices.items())]:
                percentiles = np.percentile(values, [50, 10, 25, 75, 90])
                print(f"{edge:5s} {voice:12s} {len(values):5d}", *(f"{value:+7.3f}" for value in percentiles))


if __name__ == "__main__":
    main()
