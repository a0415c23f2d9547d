"""Word error rate of the digits model on a folder of audio files, through the exported file and the handler.

    python evaluate.py --data data/test/heldout-clean
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

    def __init__(self, precision: str, beam_width: int, checkpoint: Path | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "emformer_rnnt.pt"
            export_model.export("digits", path, precision, checkpoint)
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
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders with transcripts.tsv")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp32", "int8"])
    parser.add_argument("--beam-width", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--checkpoint", type=Path, help="state dict instead of models/digits/weights.pt")
    parser.add_argument("--every", type=int, default=1, help="take every n-th file only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = {folder: read_transcripts(folder)[:: args.every] for folder in args.data}
    settings = [(precision, beam_width) for precision in args.precision for beam_width in args.beam_width]
    for precision, beam_width in settings:
        recognise = Recogniser(precision, beam_width, args.checkpoint)
        for folder, rows in sets.items():
            label = f"{folder.name}, {precision}, beam {beam_width}"
            heard = [recognise(folder / row["file"]) for row in tqdm(rows, desc=label, leave=False, unit="file")]
            report(
                label,
                folder,
                rows,
                heard,
                tables=(precision, beam_width) == settings[0],
            )


def report(label: str, folder: Path, rows: list[dict[str, str]], heard: list[str], tables: bool) -> None:
    texts = [row["text"] for row in rows]
    if not any(texts):
        minutes = sum(seconds(folder / row["file"]) for row in rows) / 60
        inserted = sum(len(text.split()) for text in heard)
        print(f"{label}: {inserted} words inserted in {minutes:.1f} minutes, {inserted / minutes:.2f} a minute")
        for row, text in zip(rows, heard, strict=True):
            if tables and text:
                print(f"    {row['file']}: {text}")
        return
    words, insertions, deletions, substitutions = errors(texts, heard)
    wrong = sum(text != answer for text, answer in zip(texts, heard, strict=True))
    total = insertions + deletions + substitutions
    print(
        f"{label}: WER {100 * total / words:.2f}% of {words} words "
        f"({insertions} inserted, {deletions} deleted, {substitutions} substituted); {wrong} of {len(rows)} files wrong"
    )
    if not tables:
        return
    speakers = defaultdict(list)
    for row, text in zip(rows, heard, strict=True):
        speakers[row["speaker"]].append((row["text"], text))
    if len(speakers) > 1:
        for speaker, pairs in sorted(speakers.items()):
            words, *kinds = errors(*map(list, zip(*pairs, strict=True)))
            print(f"    {speaker:32} {100 * sum(kinds) / words:6.2f}% of {words}")
    print_confusions(confusions(texts, heard))


if __name__ == "__main__":
    main()
