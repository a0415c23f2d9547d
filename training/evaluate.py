"""Word error rate of the digits model on clips that synthesise.py wrote, or on real recordings.

python evaluate.py --clips data                # held-out voices
python evaluate.py --recordings FOLDER         # files named DIGIT_SPEAKER_TAKE.wav, one spoken digit each
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import soundfile
import torch
import torchaudio
from torchaudio.models import emformer_rnnt_model
from train import SAMPLE_RATE, WORDS, feature_extractor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from decoder import PRECISIONS, Decoder, with_precision  # noqa: E402


def load(folder: Path, precision: str) -> tuple[Decoder, torch.nn.Module, list[str]]:
    """The model in ``folder`` as the exporter builds it, its feature extractor and its vocabulary."""
    architecture = json.loads((folder / "architecture.json").read_text())
    model = emformer_rnnt_model(**architecture)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    words = ["<unk>", "<s>", "</s>", *WORDS]
    decoder = torch.jit.script(with_precision(Decoder(model.eval(), len(words)), precision))
    return decoder, feature_extractor(folder / "global_stats.json"), words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clips", type=Path, help="folder that synthesise.py wrote")
    source.add_argument("--recordings", type=Path, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "digits")
    parser.add_argument("--beam-width", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--silence", type=float, default=0.0, help="seconds of silence put before and after")
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoder, extractor, words = load(args.model, args.precision)

    if args.clips:
        clips = [(path.with_suffix(".wav"), json.loads(path.read_text())) for path in args.clips.glob("heldout-*.json")]
        items = [(path, clip["voice"], clip["text"].split()) for path, clip in clips]
    else:
        items = [
            (path, path.stem.split("_")[1], [WORDS[int(path.stem[0])]]) for path in args.recordings.rglob("?_*_*.wav")
        ]
    errors, counts = defaultdict(int), defaultdict(int)
    for path, voice, text in items:
        samples, rate = soundfile.read(path, dtype="float32")
        wave = torchaudio.functional.resample(torch.from_numpy(samples), rate, SAMPLE_RATE)
        silence = int(args.silence * SAMPLE_RATE)
        wave = torch.nn.functional.pad(wave, (silence, max(silence, 2560 - len(wave))))
        with torch.inference_mode():
            tokens = decoder(*extractor(wave), args.beam_width)[0][0]
        heard = [words[token] for token in tokens[1:]]
        for key in (voice, "all"):
            errors[key] += torchaudio.functional.edit_distance(text, heard)
            counts[key] += len(text)
    for voice in sorted(counts):
        print(f"{voice:14} {counts[voice]:5} words  WER {100 * errors[voice] / counts[voice]:5.1f}%")


if __name__ == "__main__":
    main()
