"""Find clips that came out wrong: those that a digits model and Whisper both do not hear as what was to be said.

    python filter_clips.py --clips data --model ../models/digits --whisper whisper/tiny.en

Whisper is slow and writes short strings of digits badly, so it is only asked about the clips in which the digits
model gets more than a third of the words wrong; one that neither hears right is listed in ``rejected.txt`` beside the
clips, and train.py leaves it out.
"""

import argparse
import json
from pathlib import Path

import jiwer
import torch
from compare import normalised, whisper
from evaluate import Recogniser
from tqdm import tqdm

from handler import decode_audio

ENOUGH = 1 / 3  # word error rate above which a clip counts as not heard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("data"))
    parser.add_argument("--model", type=Path, help="a folder that train.py wrote, instead of models/digits")
    parser.add_argument("--whisper", type=Path, required=True, help="a folder that faster-whisper reads")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours = Recogniser("fp32", 1, args.model)
    suspects = []
    for path in tqdm(sorted(args.clips.glob("train-*.json")), unit="clip", desc="digits model"):
        text = json.loads(path.read_text())["text"]
        if text and jiwer.wer(text, ours(path.with_suffix(".wav"))) > ENOUGH:
            suspects.append((path, text))
    recognise, rejected = whisper(args.whisper), []
    for path, text in tqdm(suspects, unit="clip", desc="Whisper"):
        heard = recognise(decode_audio(path.with_suffix(".wav").read_bytes()))
        if jiwer.wer(normalised(text), normalised(heard)) > ENOUGH:
            rejected.append(path.stem)
    (args.clips / "rejected.txt").write_text("".join(f"{name}\n" for name in rejected))
    print(f"{len(suspects)} suspects, {len(rejected)} rejected")


if __name__ == "__main__":
    main()
