"""What do phrases that are expected change, and what do they cost? In the handler, one thread.

    pip install -r benchmarks/requirements.txt
    python benchmarks/hotwords.py                     # all tables; about ten minutes
    python benchmarks/hotwords.py lists weights       # some of them

The numbers are those of five digits and more in tests/held_out: voices that the digits model was not trained on, clean,
in noise and by telephone. They are expected alone, among a thousand, or not at all: then a thousand others are.
"""

import argparse
import csv
import functools
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchaudio.functional import edit_distance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
from benchmarks import engine  # noqa: E402
from handler import USUAL_WEIGHT, ModelHandler, decode_audio  # noqa: E402

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"]
BEAM_WIDTHS = (1, 4, 10)
WARM_UP = 3
HELD_OUT = ROOT / "tests" / "held_out"


def numbers() -> dict[str, str]:
    """File name -> what is said."""
    with (HELD_OUT / "transcripts.tsv").open(newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    return {row["file"]: row["text"] for row in rows if len(row["text"].split()) >= 5}


def lists() -> dict[str, list[str]]:
    said, rng = list(numbers().values()), random.Random(0)
    others = [" ".join(rng.choices(WORDS, k=len(rng.choice(said).split()))) for _ in range(1000)]
    return {
        "nothing": [],
        f"the {len(said)} numbers": said,
        "1000 with them": (said + others)[:1000],
        "1000 others": others,
    }


@functools.cache
def clips() -> list[torch.Tensor]:
    return [decode_audio((HELD_OUT / file).read_bytes()) for file in numbers()]


def heard(handler: ModelHandler, beam_width: int, expected: list[str], weight: float = USUAL_WEIGHT) -> str:
    """Word error rate, and how many numbers were right."""
    graph = handler._graph(tuple((phrase, weight) for phrase in expected)) if expected else None
    handler.settings["beam_width"] = beam_width
    beams = handler._search(clips(), [graph] * len(numbers()))
    found = [handler.tokens_to_text(tokens).split() for (tokens, *_), *_ in beams]
    pairs = list(zip((text.split() for text in numbers().values()), found, strict=True))
    wrong, words = sum(edit_distance(*pair) for pair in pairs), sum(len(said) for said, _ in pairs)
    return f"{wrong / words:7.1%} {sum(said == found for said, found in pairs):3}/{len(pairs)}"


def table_of_lists(handler: ModelHandler) -> None:
    print(f"\nword error rate, numbers right; weight {USUAL_WEIGHT}, beam width {BEAM_WIDTHS}")
    for name, expected in lists().items():
        cells = [heard(handler, beam_width, expected) for beam_width in BEAM_WIDTHS]
        print(f"{name:16} {'   '.join(cells)}", flush=True)


def table_of_weights(handler: ModelHandler) -> None:
    _, *expectations = lists().values()
    print("\nthe same at beam width 4, by weight: the numbers; 1000 with them; 1000 others")
    for weight in (0.5, 1.0, 1.5, 2.0, 3.0):
        cells = [heard(handler, 4, expected, weight) for expected in expectations]
        print(f"{weight:16} {'   '.join(cells)}", flush=True)


def table_of_costs(handler: ModelHandler) -> None:
    """A thousand phrases: what to spell them costs, once, and what they cost the engine in each request.

    The digits' are not said. The large network's have a weight of 0.0001, so that it writes what it writes without.
    """
    print(
        "\nmilliseconds of processor time: to spell 1000 phrases; the engine without, with them at beam width",
        BEAM_WIDTHS,
    )
    spoken = handler._features(decode_audio((ROOT / "sample_audio" / "card-number.m4a").read_bytes()))
    costs("digits, 6.5 s", handler, spoken, [(phrase, USUAL_WEIGHT) for phrase in lists()["1000 others"]])
    _, features, _ = engine.audio([engine.SAMPLE])
    with tempfile.TemporaryDirectory() as folder:
        network = engine.script(engine.stand_in(engine.blank_bias(features, "fp32", 1)), "fp32")
        large = engine.handler_for(engine.save(network, Path(folder) / "emformer_rnnt.pt"))
    words = [large.tokens_to_text.sp_model.id_to_piece(token)[1:] for token in range(3, engine.VOCABULARY - 1)]
    rng = random.Random(0)
    costs("76.7 M, 10 s", large, features, [(" ".join(rng.choices(words, k=3)), 0.0001) for _ in range(1000)])


def costs(name: str, handler: ModelHandler, features: torch.Tensor, hotwords: list[tuple[str, float]]) -> None:
    spell = functools.partial(handler._graph.__wrapped__, tuple(hotwords))  # not what is kept ready
    calls = itertools.product(BEAM_WIDTHS, ([None], [spell()]))
    first, *times = milliseconds(spell, *(lambda c=call: handler.model.decode([features], *c) for call in calls))
    pairs = [f"{a:7.1f} {b:7.1f}" for a, b in zip(times[::2], times[1::2], strict=True)]
    print(f"{name:16} {first:7.1f}      {'   '.join(pairs)}", flush=True)


def milliseconds(*functions: Callable[[], object]) -> list[float]:
    """Median processor time of each, all in turns; one thread's is what it takes on an idle machine."""
    times: list[list[float]] = [[] for _ in functions]
    with torch.inference_mode():
        for _ in range(WARM_UP + engine.RUNS):
            for function, own in zip(functions, times, strict=True):
                started = time.process_time()
                function()
                own.append(1000 * (time.process_time() - started))
    return [statistics.median(own[WARM_UP:]) for own in times]


TABLES = {"lists": table_of_lists, "weights": table_of_weights, "costs": table_of_costs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)}; default: all")
    args = parser.parse_args()
    if not set(args.tables) <= set(TABLES):
        parser.error(f"there are the tables {', '.join(TABLES)}")
    torch.set_num_threads(1)
    print(f"{engine.processor()}, one thread, torch {torch.__version__}; times are medians of {engine.RUNS} runs")
    with tempfile.TemporaryDirectory() as folder:
        export_model.export("digits", Path(folder) / "emformer_rnnt.pt")
        handler = engine.handler_for(Path(folder) / "emformer_rnnt.pt")
    for name in args.tables or TABLES:
        TABLES[name](handler)


if __name__ == "__main__":
    main()
