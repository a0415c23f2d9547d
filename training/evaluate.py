"""Word error rate of the digits model on a folder of audio files, through the exported file and the handler.

    python evaluate.py                       # the model card's table
    python evaluate.py --data ~/recordings --precision fp32 --beam-width 1

The folder holds audio files of any kind and ``transcripts.tsv``: columns ``file`` and ``text``, and ``speaker`` if
there are several. Where every text is empty, inserted words a minute are counted instead.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import av
import jiwer
import torch
from tqdm import tqdm
from ts.context import Context, RequestProcessor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
from engine.precision import PRECISIONS  # noqa: E402
from handler import ModelHandler  # noqa: E402

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"]
NOTHING = "-"


def read_transcripts(folder: Path) -> list[dict[str, str]]:
    """The rows of ``transcripts.tsv``: file, text, speaker (empty if there is no such column)."""
    with (folder / "transcripts.tsv").open(newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [{"file": row["file"], "text": row["text"] or "", "speaker": row.get("speaker") or ""} for row in rows]


class Recogniser:
    """The handler with an exported model, called as TorchServe calls it."""

    def __init__(self, precision: str, beam_width: int, model: Path | None = None) -> None:
        export_model.DIGITS = model or export_model.DIGITS
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "emformer_rnnt.pt"
            export_model.export("digits", path, precision)
            manifest = {"model": {"serializedFile": path.name}}
            config = {"handler": {"beam_width": beam_width}}
            self.context = Context("emformer_asr", folder, manifest, 1, None, "0", model_yaml_config=config)
            self.handler = ModelHandler()
            self.handler.initialize(self.context)

    def __call__(self, path: Path) -> str:
        self.context.request_processor = [RequestProcessor({})]
        [answer] = self.handler.handle([{"body": path.read_bytes()}], self.context)
        if not isinstance(answer, str):
            raise ValueError(f"{path.name}: {answer['message']}")
        return answer


def errors(texts: list[str], heard: list[str]) -> tuple[int, int, int, int]:
    """Words, insertions, deletions and substitutions over all files."""
    counted = jiwer.process_words(texts, heard)
    words = counted.hits + counted.substitutions + counted.deletions
    return words, counted.insertions, counted.deletions, counted.substitutions


def confusions(texts: list[str], heard: list[str]) -> Counter[tuple[str, str]]:
    """How often each word was heard as which; ``NOTHING`` stands for a deletion or an insertion."""
    table: Counter[tuple[str, str]] = Counter()
    counted = jiwer.process_words(texts, heard)
    for reference, hypothesis, chunks in zip(counted.references, counted.hypotheses, counted.alignments, strict=True):
        for chunk in chunks:
            said = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            written = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            length = max(len(said), len(written))
            said += [NOTHING] * (length - len(said))
            written += [NOTHING] * (length - len(written))
            table.update(zip(said, written, strict=True))
    return table


def print_confusions(table: Counter[tuple[str, str]]) -> None:
    columns = [*WORDS, NOTHING]
    print("said \\ heard" + "".join(f"{word:>7}" for word in columns))
    for said in columns:
        if any(table[said, heard] for heard in columns):
            print(f"{said:12}" + "".join(f"{table[said, heard] or '.':>7}" for heard in columns))


def seconds(path: Path) -> float:
    with av.open(str(path)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="folders with transcripts.tsv; default: data/test/*")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp32", "int8"])
    parser.add_argument("--beam-width", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--model", type=Path, help="a folder that train.py wrote, instead of models/digits")
    parser.add_argument("--every", type=int, default=1, help="take every n-th file only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = args.data or sorted(path.parent for path in Path("data/test").glob("*/transcripts.tsv"))
    sets = {folder: read_transcripts(folder)[:: args.every] for folder in folders}
    settings = [(precision, beam_width) for precision in args.precision for beam_width in args.beam_width]
    table = {folder: [describe(folder, rows)] for folder, rows in sets.items()}
    for precision, beam_width in settings:
        recognise = Recogniser(precision, beam_width, args.model)
        for folder, rows in sets.items():
            label = f"{folder.name}, {precision}, beam {beam_width}"
            heard = [recognise(folder / row["file"]) for row in tqdm(rows, desc=label, leave=False, unit="file")]
            result = measured(folder, rows, heard)
            table[folder].append(result)
            print(f"{label}: {result}", flush=True)
            if (precision, beam_width) == settings[0]:
                print_details(rows, heard)
    print("\n| |" + "".join(f" `{precision}`, beam {beam_width} |" for precision, beam_width in settings))
    print("|---|" + "---|" * len(settings))
    for cells in table.values():
        print(f"| {' | '.join(cells)} |")


def describe(folder: Path, rows: list[dict[str, str]]) -> str:
    """The name of a set, and how many words or minutes it has."""
    words = sum(len(row["text"].split()) for row in rows)
    return f"{folder.name}, " + (f"{words} words" if words else f"{minutes(folder, rows):.1f} min")


def minutes(folder: Path, rows: list[dict[str, str]]) -> float:
    return sum(seconds(folder / row["file"]) for row in rows) / 60


def measured(folder: Path, rows: list[dict[str, str]], heard: list[str]) -> str:
    """Word error rate with (insertions, deletions, substitutions), or words a minute where nothing is to be heard."""
    texts = [row["text"] for row in rows]
    if not any(texts):
        return f"{sum(len(text.split()) for text in heard) / minutes(folder, rows):.2f} words a minute"
    words, *kinds = errors(texts, heard)
    return f"{100 * sum(kinds) / words:.1f}% ({', '.join(map(str, kinds))})"


def print_details(rows: list[dict[str, str]], heard: list[str]) -> None:
    """What went wrong: by source, by speaker, by word."""
    pairs = [(row["text"], text) for row, text in zip(rows, heard, strict=True)]
    if not any(text for text, _ in pairs):
        for row, text in zip(rows, heard, strict=True):
            if text:
                print(f"    {row['file']}: {text}")
        return
    groups = defaultdict(list)
    for row, pair in zip(rows, pairs, strict=True):
        source, _, name = row["speaker"].rpartition("-")
        groups[source + "-*" if source else row["speaker"]].append(pair)  # a source's speakers begin with its name
        if source:
            groups[row["speaker"]].append(pair)
    for name, chosen in sorted(groups.items()):
        words, *kinds = errors(*map(list, zip(*chosen, strict=True)))
        if sum(kinds):
            print(f"    {name:32} {100 * sum(kinds) / words:6.2f}% of {words}")
    print_confusions(confusions(*map(list, zip(*pairs, strict=True))))


if __name__ == "__main__":
    main()
