"""How fast is the engine beside others? torchaudio, ONNX Runtime and faster-whisper, in turns on the same core.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --audio speech.flac --whisper whisper/base.en    # some minutes; prints one table

The network and the sound are those of engine.py: torchaudio's 76.7M-parameter architecture with random weights, at
about six tokens a second, and 10 s of the file. Each has a process of its own with one thread, all pinned to one core,
and is called in turns with the others; a figure is the median of RUNS runs after a warm-up. Milliseconds are of
processor time, which on an idle core is the clock's. A whole request goes from the samples to tokens or text.

- torchaudio: the scripted ``RNNTBeamSearch``, and its encoder alone. "times" is how often the others are as fast:
  as its encoder, as its request at that beam width, or at beam width 1 if there is none.
- ONNX Runtime: torchaudio's encoder at full length, exported with ``torch.onnx`` for this number of frames; int8 is
  ``quantize_dynamic`` with one scale for each output of a weight, as the engine's. There is no search to compare.
- faster-whisper: Whisper base.en, int8, from the folder ``--whisper``, without it not at all (training/README.md tells
  where it comes from). It is another network, and it hears: only its time is comparable.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

# PyTorch is imported where it is needed: the processes of the others have to do without, and their memory is theirs.
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RUNS, WARM_UP = 5, 3
REFERENCE = "torchaudio `fp32`"
ENCODER = "encoder alone"
PACKAGES = ("torch", "torchaudio", "onnxruntime", "faster-whisper", "ctranslate2")

Calls = dict[str, Callable[[], int | np.ndarray]]  # what is timed, by name; gives a number of tokens or encodings


def request(beam_width: int) -> str:
    return f"whole request, beam {beam_width}"


def prepare(folder: Path, audio: Path, beam_widths: tuple[int, ...]) -> float:
    """Write models, waveform (samples,) and features (T, 80) of ``audio`` into ``folder``; give its seconds."""
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from torchaudio.models import RNNTBeamSearch

    from benchmarks import engine

    torch.set_num_threads(1)
    waveform, features, _ = engine.audio([audio])
    np.save(folder / "waveform.npy", waveform.numpy())
    np.save(folder / "features.npy", features.numpy())
    for beam_width in beam_widths:
        for precision in engine.PRECISIONS:
            bias = engine.blank_bias(features, precision, beam_width)
            module = engine.script(engine.stand_in(bias), precision)
            engine.save(module, folder / f"engine-{precision}-{beam_width}.pt")
            if precision == "fp32":
                module = torch.jit.script(RNNTBeamSearch(engine.stand_in(bias), engine.VOCABULARY - 1))
                engine.save(module, folder / f"torchaudio-{beam_width}.pt")
    # The newer exporter needs one more package. This one follows the encoder through one call, for one length.
    arguments = (features.unsqueeze(0), torch.tensor([len(features)]))
    names = {"input_names": ["features", "lengths"], "output_names": ["encodings", "encoded_lengths"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and tells of each number that it takes for a constant
        torch.onnx.export(engine.stand_in(0.0).transcriber, arguments, folder / "fp32.onnx", dynamo=False, **names)
    # Quantising without this step warns; here it changes neither time nor result.
    quant_pre_process(folder / "fp32.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
    quantize_dynamic(folder / "prepared.onnx", folder / "int8.onnx", per_channel=True)
    return len(waveform) / engine.SAMPLE_RATE


def torch_model(folder: Path, name: str, beam_width: int) -> Calls:
    """A whole request in the handler, with the engine or with torchaudio's search; at beam width 1 its encoder, too."""
    import torch

    from benchmarks import engine

    torch.set_num_threads(1)
    handler = engine.handler_for(folder / name)
    handler.settings["beam_width"] = beam_width
    waveform, features = (torch.from_numpy(np.load(folder / f"{each}.npy")) for each in ("waveform", "features"))
    model = handler.model

    def search() -> int:
        return len(handler._search([waveform])[0][0][0]) - 1

    @torch.inference_mode()
    def encode() -> np.ndarray:
        if not handler.has_times:  # torchaudio's
            return model.model.transcribe(features.unsqueeze(0), torch.tensor([len(features)]))[0][0].numpy()
        window = [(0, 0, model.encoder.segments(features))]
        return model._encode([features], window, model.encoder.empty_past(1))[0][0].numpy()

    return {request(beam_width): search} | ({ENCODER: encode} if beam_width == 1 else {})


def onnx_model(folder: Path, name: str) -> Calls:
    """torchaudio's encoder in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    features = np.load(folder / "features.npy")[None]
    inputs = {"features": features, "lengths": np.array([features.shape[1]])}
    return {ENCODER: lambda: session.run(["encodings"], inputs)[0][0]}


def whisper(folder: Path, model: Path) -> Calls:
    """Whisper in faster-whisper, with its defaults."""
    from faster_whisper import WhisperModel

    recogniser = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=1)
    waveform = np.load(folder / "waveform.npy")

    def transcribe(beam_width: int) -> int:
        segments, _ = recogniser.transcribe(waveform, beam_size=beam_width)
        return sum(len(segment.tokens) for segment in segments)

    return {request(beam_width): lambda b=beam_width: transcribe(b) for beam_width in (1, 5)}


def answer(connection: Connection, load: Callable[..., Calls], *arguments: object) -> None:
    """In a process of its own: load, tell the names of the calls, and time each that is asked for, until None is."""
    calls = load(*arguments)
    connection.send(list(calls))
    for name in iter(connection.recv, None):
        started = time.process_time()
        result = calls[name]()
        connection.send((1000 * (time.process_time() - started), result))


def measure(contenders: dict[str, tuple], seconds: float) -> list[str]:
    """The table's rows for ``contenders``, by name: the function that loads each, and its arguments."""
    context = multiprocessing.get_context("spawn")
    processes, rows = {}, []
    for name, (load, *arguments) in contenders.items():
        connection, other = context.Pipe()
        process = context.Process(target=answer, args=(other, load, *arguments), daemon=True)
        process.start()
        other.close()  # so that a process that ends is noticed
        processes[name] = process, connection
        rows += [(what, name) for what in connection.recv()]
    times: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    results = {}
    for _ in range(WARM_UP + RUNS):
        for what, name in rows:
            connection = processes[name][1]
            connection.send(what)
            spent, results[what, name] = connection.recv()
            times[what, name].append(spent)
    resident = {name: psutil.Process(process.pid).memory_info().rss for name, (process, _) in processes.items()}
    for process, connection in processes.values():
        connection.send(None)
        process.join()
    medians = {row: statistics.median(own[WARM_UP:]) for row, own in times.items()}
    order = list(dict.fromkeys(what for what, _ in rows))
    lines = []
    for what, name in sorted(rows, key=lambda row: order.index(row[0])):
        own, result = medians[what, name], results[what, name]
        reference = medians.get((what, REFERENCE), medians[rows[0]])
        if isinstance(result, int):
            found = f"{result} tokens"
        elif name == REFERENCE:
            found = ""
        else:
            error = np.abs(result - results[what, REFERENCE])
            found = f"error {error.mean():.1e}, at most {error.max():.1e}"
        lines.append(
            f"| {what} | {name} | {own:.0f} | {reference / own:.2f} x | {own / seconds / 1000:.3f} "
            f"| {resident[name] / 1e6:.0f} MB | {found} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = ROOT / "sample_audio" / "sentence.wav"
    parser.add_argument("--audio", type=Path, default=sample, help="speech to measure on; default: a sample")
    parser.add_argument("--whisper", type=Path, help="folder with Whisper base.en, as faster-whisper reads it")
    args = parser.parse_args()
    if args.whisper and not (args.whisper / "model.bin").is_file():
        parser.error(f"{args.whisper} has no model.bin: training/README.md tells where base.en comes from")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and so those of the processes that this one starts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = prepare(folder, args.audio, (1, 10))
        from benchmarks import engine

        versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
        print(f"{engine.processor()}, one thread, medians of {RUNS} runs; {versions}\n")
        print("| | | ms | times | real-time factor | resident | what came out |")
        print("|---|---|---|---|---|---|---|")
        for beam_width in (1, 10):
            contenders = {REFERENCE: (torch_model, folder, f"torchaudio-{beam_width}.pt", beam_width)}
            for precision in engine.PRECISIONS:
                model = f"engine-{precision}-{beam_width}.pt"
                contenders[f"engine `{precision}`"] = torch_model, folder, model, beam_width
            if beam_width == 1:
                for precision in ("fp32", "int8"):
                    contenders[f"ONNX Runtime `{precision}`"] = onnx_model, folder, f"{precision}.onnx"
                if args.whisper:
                    contenders["Whisper base.en `int8`"] = whisper, folder, args.whisper
            print("\n".join(measure(contenders, seconds)), flush=True)


if __name__ == "__main__":
    main()
