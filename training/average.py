"""Write the weighted mean of weights that train.py wrote, of runs that began with the same ones.

    python average.py --weights first.pt 0.7 second.pt 0.3 --blank -0.8 --output ../models/digits/weights.pt

Averaging what a high learning rate leaves in different places does what a longer fall of it would (Wortsman et al.,
"Model soups", 2022). ``--blank`` is added to blank's score: where to stand between words that are not written and words
that nobody said.
"""

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, help="files, each with its share behind it")
    parser.add_argument("--blank", type=float, default=0.0, help="added to blank's score")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    mean: dict[str, torch.Tensor] = {}
    for path, share in zip(args.weights[::2], map(float, args.weights[1::2]), strict=True):
        for name, value in torch.load(path, weights_only=True).items():
            mean[name] = mean.get(name, 0.0) + share * value.float()
    mean["joiner.linear.bias"][-1] += args.blank  # blank is the last symbol
    torch.save({name: value.half() for name, value in mean.items()}, args.output)


if __name__ == "__main__":
    main()
