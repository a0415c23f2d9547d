"""How fast is the engine, and what does it need? Against torchaudio's own search, in the same process.

    pip install -r benchmarks/requirements.txt
    python benchmarks/engine.py                        # all tables and scaling.png; about half an hour
    python benchmarks/engine.py speed streaming        # some of them
    python benchmarks/engine.py --audio speech.flac    # on speech of your own, about 10 s of it; one or more files

The network is torchaudio's 76.7M-parameter architecture with random weights. Its text means nothing, its speed is that
of the real one at the same rate of tokens: the blank bias is set so that about six tokens a second come out.
The reference is ``torch.jit.script(torchaudio.models.RNNTBeamSearch(model))``. One thread; every figure is the median
of RUNS runs after a warm-up, those of a table taken in turns. The peaks of memory and the times
of the long recordings are of one run each, in processes of their own.
"""

import argparse
import copy
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch
from torchaudio.functional import edit_distance
from torchaudio.models import RNNT, RNNTBeamSearch, emformer_rnnt_base

warnings.filterwarnings("ignore", category=DeprecationWarning)
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
from engine.decoder import Decoder  # noqa: E402
from engine.precision import PRECISIONS, with_linears, with_precision  # noqa: E402
from handler import ModelHandler, decode_audio  # noqa: E402

RUNS = 5
SAMPLE = ROOT / "sample_audio" / "sentence.wav"
SECONDS = 10.0
SAMPLE_RATE = 16_000
VOCABULARY = 4097
TOKENS_PER_SECOND = 6
SCALING_MINUTES = (1 / 6, 1, 5, 20, 60)
# The reference's attention matrices grow with the square of the length: it stops before they fill the machine.
REFERENCE_MINUTES = (1 / 6, 1, 2)


def stand_in(blank_bias: float, seed: int = 0) -> RNNT:
    """The 76.7M-parameter network, random but the same every time, its blank bias raised."""
    torch.manual_seed(seed)
    model = emformer_rnnt_base(num_symbols=VOCABULARY).eval()
    model.joiner.linear.bias.data[-1] += blank_bias
    return model


def script(model: RNNT, precision: str) -> torch.jit.ScriptModule:
    return torch.jit.script(with_precision(Decoder(model, VOCABULARY - 1), precision))


def handler_for(path: Path) -> ModelHandler:
    """The handler as a worker has it, with this model file."""
    handler = ModelHandler()
    properties = {"model_dir": str(path.parent), "gpu_id": None}
    manifest = {"model": {"serializedFile": path.name}}
    handler.initialize(SimpleNamespace(system_properties=properties, manifest=manifest, model_yaml_config={}))
    return handler


def save(module: torch.jit.ScriptModule, path: Path, tokenizer: bytes | None = None) -> Path:
    """Save with the digits model's feature statistics, since what the features are does not matter here.

    Args:
        tokenizer: a SentencePiece model; if None, one of made-up words, as many as the stand-in has symbols.
    """
    if tokenizer is None:
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"word{number}" for number in range(VOCABULARY)),
            model_writer=written,
            model_type="word",
            vocab_size=VOCABULARY - 1,
            minloglevel=1,
        )
        tokenizer = written.getvalue()
    statistics_of_features = (export_model.DIGITS / "global_stats.json").read_bytes()
    files = {"global_stats.json": statistics_of_features, "tokenizer.model": tokenizer, "metadata.json": b"{}"}
    export_model.save(module, path, files)
    return path


def audio(paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Waveform (samples,) and features (T, 80): the first file, over and over, for SECONDS; features of each file."""
    with tempfile.TemporaryDirectory() as folder:
        export_model.export("digits", Path(folder) / "emformer_rnnt.pt")
        handler = handler_for(Path(folder) / "emformer_rnnt.pt")
    waveforms = [decode_audio(path.read_bytes()) for path in paths]
    samples = int(SECONDS * SAMPLE_RATE)
    waveform = waveforms[0].repeat(-(-samples // len(waveforms[0])))[:samples]
    return waveform, handler._features(waveform), [handler._features(each) for each in waveforms]


def milliseconds(*functions: Callable[[], object], runs: int = RUNS, warm_up: int = 3) -> list[float]:
    """Median time of each function, all of them measured in turns."""
    times: list[list[float]] = [[] for _ in functions]
    with torch.inference_mode():
        for run in range(warm_up + runs):
            for function, own in zip(functions, times, strict=True):
                started = time.perf_counter()
                function()
                if run >= warm_up:
                    own.append((time.perf_counter() - started) * 1000)
    return [statistics.median(own) for own in times]


def blank_bias(features: torch.Tensor, precision: str, beam_width: int) -> float:
    """The blank bias at which about TOKENS_PER_SECOND come out; for all but torchaudio and fp32 it is another one.

    From the highest down, and no further than where they do: far below, every frame emits as much as it may.
    """
    decoder = with_precision(Decoder(stand_in(0.0), VOCABULARY - 1), precision)
    joiner = stand_in(0.0).joiner

    def rate(bias: float) -> float:
        raised = copy.deepcopy(joiner.linear)
        raised.bias[-1] += bias
        decoder.search.joiner = with_linears(torch.nn.Sequential(joiner.activation, raised), precision)
        tokens = decoder.search(encodings, decoder.search.first_beam(), beam_width).hypotheses[0][0]
        return (len(tokens) - 1) * 100 / len(features)

    with torch.inference_mode():
        window = [(0, 0, decoder.encoder.segments(features))]
        [encodings], _ = decoder._encode([features], window, decoder.encoder.empty_past(1))
        rates: dict[float, float] = {}
        bias = 2.8
        while not rates or max(rates.values()) < TOKENS_PER_SECOND:
            rates[bias] = rate(bias)
            bias -= 0.05
        return min(rates, key=lambda bias: abs(rates[bias] - TOKENS_PER_SECOND))


def speed(features: torch.Tensor) -> None:
    """Whole decode of one utterance, and of twelve times it."""
    peaks = {precision: peak(precision) for precision in PRECISIONS}
    print("\nthis core's peak: " + ", ".join(f"{name} {own / 1e9:.0f} GOP/s" for name, own in peaks.items()))
    print("limit: the products that the network needs for this audio, at that pace")
    print("\n                          milliseconds    times  real-time factor  tokens/s  limit / time")
    long = torch.cat([features] * round(12_000 / len(features)))
    for utterance, beam_width in ((features, 1), (features, 10), (long, 1)):
        biases = {precision: blank_bias(utterance, precision, beam_width) for precision in PRECISIONS}
        reference = torch.jit.script(RNNTBeamSearch(stand_in(biases["fp32"]), VOCABULARY - 1))
        modules = {"torchaudio": reference} | {p: script(stand_in(bias), p) for p, bias in biases.items()}
        needed = {p: operations(utterance, p, beam_width, bias) for p, bias in biases.items()}
        seconds = len(utterance) / 100
        arguments = (utterance, torch.tensor([len(utterance)]), beam_width)
        with torch.inference_mode():
            tokens = [len(module(*arguments)[0][0]) - 1 for module in modules.values()]
        runs = [lambda m=module, a=arguments: m(*a) for module in modules.values()]
        times = milliseconds(*runs, warm_up=2 if utterance is features else 0)  # and the one for the tokens
        for name, own, count in zip(modules, times, tokens, strict=True):
            label = f"{seconds:5.1f} s  beam {beam_width:2}  {name}"
            ratio, factor = times[0] / own, own / seconds / 1000
            line = f"{label:28} {own:9.0f} {ratio:6.2f} x {factor:17.4f} {count / seconds:9.1f}"
            if name in needed:
                limit = 1000 * needed[name] / peaks[name]
                line += f"  {limit:4.0f} ms ({needed[name] / 1e9:.1f} GOP): {limit / own:.0%}"
            print(line, flush=True)


def peak(precision: str) -> float:
    """Operations a second, two a multiplication, of this core's fastest product of a layer's size, inputs at hand."""
    rates = []
    for rows in (64, 128, 325):
        for linear in layer_linears():
            linear.requires_grad_(False)
            input = torch.randn(rows, linear.in_features)
            layer = with_linears(torch.nn.Sequential(copy.deepcopy(linear)), precision)
            products = [lambda layer=layer, input=input: layer(input)]
            if precision == "fp32":
                products.append(lambda linear=linear, input=input: linear(input))
            elif precision == "int8":
                weight = torch.randint(-127, 128, linear.weight.shape, dtype=torch.int8)
                ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
                packed = torch.ops.onednn.qlinear_prepack(weight, list(input.shape))
                numbers = torch.randint(0, 128, input.shape, dtype=torch.uint8)
                after = [None, 1.0, 0, torch.float32, "none", [], ""]  # neither bias nor another output
                fixed = (numbers, 1.0, 0, packed, ones, zeros, *after)
                products.append(lambda fixed=fixed: torch.ops.onednn.qlinear_pointwise(*fixed))
            with torch.inference_mode():
                for product in products:
                    times = []
                    for _ in range(20):
                        started = time.perf_counter()
                        product()
                        times.append(time.perf_counter() - started)
                    rates.append(2 * rows * linear.in_features * linear.out_features / min(times))
    return max(rates)


def operations(features: torch.Tensor, precision: str, beam_width: int, bias: float) -> int:
    """Those of the products that the network needs for ``features``, as the engine finds them out: no row twice."""
    decoder = with_precision(Decoder(stand_in(bias), VOCABULARY - 1), precision)
    decoder.search.joiner_rows = decoder.search.joiner_tile = 1  # nothing ahead of its time
    counted = [0]

    def count(_, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        counted[0] += 2 * output.numel() * inputs[0].size(-1)

    for module in decoder.modules():
        if hasattr(module, "packed"):
            module.register_forward_hook(count)
    encoder = decoder.encoder
    rows = encoder.segments(features) * encoder.width
    keys = encoder.left_context + encoder.width
    attention = 2 * 2 * rows * keys * encoder.layers[0].layer_norm_input.weight.numel()
    with torch.inference_mode():
        decoder.decode([features], beam_width)
    return counted[0] + len(encoder.layers) * attention


def accuracy(spoken: list[torch.Tensor]) -> None:
    """How far from float32: encodings, the joiner's log-probabilities, and tokens.

    The errors are of ``spoken``, mean and largest. The tokens are of ``spoken`` and the samples, five sets of random
    weights, beam widths 1 and 4: one less the edit distance to float32's, divided by float32's number of tokens.
    """
    print("\n        encodings           log-probabilities   the same tokens   (of how many; in how many beams)")
    names = sorted(path for path in (ROOT / "sample_audio").iterdir() if path.suffix != ".tsv")
    clips = spoken + audio(names)[2]
    found: dict[str, list[list[int]]] = {precision: [] for precision in PRECISIONS}
    computed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for seed in range(5):
        for precision in PRECISIONS:
            engine = script(stand_in(1.65, seed), precision)
            with torch.inference_mode():
                for clip in clips:
                    for beam_width in (1, 4):
                        found[precision].append(engine.decode([clip], beam_width)[0].hypotheses[0][0][1:])
                if seed == 0:
                    windows = [[(i, 0, engine.encoder.segments(clip))] for i, clip in enumerate(spoken)]
                    past = engine.encoder.empty_past(1)
                    encodings = torch.cat([engine._encode(spoken, window, past)[0][0] for window in windows])
                    joined = engine.search.joiner(encodings + engine.search.first_beam().hypotheses[0][1])
                    computed[precision] = encodings, joined.log_softmax(1)
    tokens = sum(map(len, found["fp32"]))
    for precision in PRECISIONS[1:]:
        errors = [(own - exact).abs() for own, exact in zip(computed[precision], computed["fp32"], strict=True)]
        shown = "  ".join(f"{error.mean():8.4f} {error.max():8.4f}" for error in errors)
        pairs = list(zip(found[precision], found["fp32"], strict=True))
        distance = sum(edit_distance(own, exact) for own, exact in pairs)
        print(f"{precision} {shown} {1 - distance / tokens:12.1%}   ({tokens}; {len(pairs)})", flush=True)


def parts(features: torch.Tensor) -> None:
    """Where the engine's time goes, at beam width 1, beside what the products of the encoder's layers alone take.

    Those are measured with the weights of one layer, 20 times over: with all 20 layers' they can only be slower.
    """
    print("\nbeam 1        encoder     search   products of the encoder's layers alone")
    window = [(0, 0, -(-(len(features) // 4 - 1) // 4))]
    rows = window[0][2] * 5
    operations = 20 * sum(2 * rows * linear.in_features * linear.out_features for linear in layer_linears())
    inputs = [torch.randn(rows, linear.in_features) for linear in layer_linears()]

    def products(layer: torch.nn.Module) -> None:
        for _ in range(20):
            for linear, input in zip(layer, inputs, strict=True):
                linear(input)

    def floor(layer: torch.nn.Module) -> str:
        [own] = milliseconds(lambda: products(layer))
        return f"{own:6.0f} ms  ({operations / 1e9:.1f} GFLOP at {operations / own / 1e6:.0f} GFLOP/s)"

    for precision in PRECISIONS:
        engine = script(stand_in(blank_bias(features, precision, 1)), precision)
        past = engine.encoder.empty_past(1)
        with torch.inference_mode():
            [encodings], _ = engine._encode([features], window, past)
            first = engine.search.first_beam()
        times = milliseconds(
            lambda e=engine, p=past: e._encode([features], window, p),
            lambda e=engine, x=encodings, f=first: e.search(x, f, 1),
        )
        encoder = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(*layer_linears())})
        layer = with_linears(encoder, precision)["encoder"]
        print(f"{precision:10} {times[0]:7.0f} ms {times[1]:7.0f} ms {floor(layer)}", flush=True)
    print(f"torch.nn.Linear, as in torchaudio {floor(torch.nn.Sequential(*layer_linears()))}", flush=True)


def layer_linears() -> list[torch.nn.Linear]:
    """The linear layers of one of the 20 layers."""
    return [torch.nn.Linear(*size) for size in ((512, 1536), (512, 512), (512, 2048), (2048, 512))]


def batch(features: torch.Tensor) -> None:
    """Eight utterances of 1 to 8 seconds, in one call and in eight."""
    print("\neight utterances of 1 to 8 s    eight calls   one call   times")
    utterances = [features[: 100 * seconds] for seconds in range(1, 9)]
    for precision in PRECISIONS:
        engine = script(stand_in(blank_bias(features, precision, 1)), precision)
        times = milliseconds(
            lambda e=engine: [e.decode([utterance], 1) for utterance in utterances],
            lambda e=engine: e.decode(utterances, 1),
        )
        print(
            f"{precision}  beam 1                 {times[0]:9.0f} ms {times[1]:7.0f} ms {times[0] / times[1]:6.2f} x",
            flush=True,
        )


def streaming(features: torch.Tensor) -> None:
    """``infer``, one segment of 160 ms after the other."""
    print("\nsegment of 160 ms   torchaudio's infer   engine's infer   (beam 1)")
    segments = (len(features) - 4) // 16
    reference = torch.jit.script(RNNTBeamSearch(stand_in(blank_bias(features, "fp32", 1)), VOCABULARY - 1))

    def stream(module: torch.jit.ScriptModule) -> None:
        state = hypotheses = None
        for start in range(0, 16 * segments, 16):
            piece = features[start : start + 20]
            hypotheses, state = module.infer(piece, torch.tensor([20]), 1, state, hypotheses)

    for precision in PRECISIONS:
        engine = script(stand_in(blank_bias(features, precision, 1)), precision)
        times = milliseconds(lambda: stream(reference), lambda e=engine: stream(e))
        print(f"{precision} {times[0] / segments:29.1f} ms {times[1] / segments:13.1f} ms", flush=True)


def digits(features: torch.Tensor) -> None:
    """What a wider beam costs the digits model: a whole request in the handler (6.5 s of M4A), and the engine alone."""
    print("\ndigits model: milliseconds for a request (engine alone) at beam width  1, 4, 10")
    audio_file = (ROOT / "sample_audio" / "card-number.m4a").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = Path(folder) / "emformer_rnnt.pt"
            export_model.export("digits", path, precision)
            handler = handler_for(path)
            spoken = [handler._features(decode_audio(audio_file))]

            def engine(beam_width: int, handler=handler, spoken=spoken) -> None:
                handler.settings["beam_width"] = beam_width
                handler.model.decode(spoken, beam_width)

            def request(beam_width: int, handler=handler) -> None:
                handler.settings["beam_width"] = beam_width
                handler._search([decode_audio(audio_file)])

            calls = [
                lambda f=function, b=beam_width: f(b) for beam_width in (1, 4, 10) for function in (request, engine)
            ]
            times = milliseconds(*calls)
            pairs = zip(times[::2], times[1::2], strict=True)
            print(f"{precision}  " + "  ".join(f"{whole:6.1f} ({alone:.1f})" for whole, alone in pairs), flush=True)


def windows(features: torch.Tensor) -> None:
    """A minute of audio in windows of various sizes: why WINDOW_SEGMENTS is what it is."""
    sizes = (8, 16, 32, 64, 96, 128, 192, 384)
    print("\nmilliseconds for a minute in windows of up to segments  " + "".join(f"{size:7}" for size in sizes))
    minute = torch.cat([features] * round(6000 / len(features)))
    for precision in PRECISIONS:
        engine = script(stand_in(blank_bias(features, precision, 1)), precision)

        def run(size: int, engine=engine) -> None:
            engine.window_segments = size
            engine.decode([minute], 1)

        times = milliseconds(*(lambda s=size, r=run: r(s) for size in sizes), warm_up=1)
        print(f"{precision}  beam 1" + " " * 43 + "".join(f"{t:7.0f}" for t in times), flush=True)


def size(features: torch.Tensor) -> None:
    """The file, and what a process that has loaded and warmed it up holds in memory, PyTorch included."""
    print("\n             file      process   without 1.3 x the file")
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = save(script(stand_in(1.65), precision), Path(folder) / f"{precision}.pt")
            own, resident = path.stat().st_size / 1e6, in_a_process("engine", path, 1 / 6)["resident"] / 1e6
            print(f"{precision}   {own:8.1f} MB  {resident:8.0f} MB  {resident - 1.3 * own:8.0f} MB", flush=True)


def in_a_process(kind: str, model: Path, minutes: float, waveform: Path | None = None) -> dict[str, float]:
    """``measure_once`` in a process of its own, so that its peak of memory is its own."""
    arguments = [sys.executable, __file__, "--measure", kind, str(model), str(minutes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"WAVEFORM": str(waveform)} if waveform else {})
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_once(kind: str, model: Path, minutes: float) -> dict[str, float]:
    """Seconds for features and decoding, and the peak of memory in bytes, the waveform and whole features apart."""
    torch.set_num_threads(1)
    handler = handler_for(model)
    source = os.environ.get("WAVEFORM")
    one = torch.load(source) if source else torch.randn(int(SECONDS * SAMPLE_RATE)) * 0.1
    samples = int(minutes * 60 * SAMPLE_RATE)
    waveform = one.repeat(-(-samples // len(one)))[:samples].clone()
    handler._search([one])
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without that of loading
    resident = memory("VmRSS")
    started = time.perf_counter()
    with torch.inference_mode():
        if kind == "engine":
            tokens, own = handler._search([waveform])[0][0][0], waveform.numel()
        else:
            features, length = handler.extract_features(waveform)
            tokens, own = handler.model(features, length, 1)[0][0], waveform.numel() + features.numel()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "memory": memory("VmHWM") - 4 * own,
        "own": 4 * own,
        "resident": resident,
        "tokens": len(tokens) - 1,
    }


def memory(name: str) -> int:
    """Bytes of this process, as /proc counts them: ``VmRSS`` now, ``VmHWM`` at most. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def scaling(features: torch.Tensor, waveform: torch.Tensor) -> None:
    """Time and memory from seconds to an hour; writes scaling.png."""
    print("\n             minutes   seconds  per second of audio  memory beside waveform and features (these)")
    results: dict[str, list[tuple[float, float, float]]] = {}  # name -> (minutes, seconds, bytes)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(waveform, Path(folder) / "waveform.pt")
        bias = {precision: blank_bias(features, precision, 1) for precision in ("fp32", "int8")}
        reference = torch.jit.script(RNNTBeamSearch(stand_in(bias["fp32"]), VOCABULARY - 1))
        models = [
            ("torchaudio", "reference", save(reference, Path(folder) / "reference.pt"), REFERENCE_MINUTES),
            *(
                (f"engine {p}", "engine", save(script(stand_in(b), p), Path(folder) / f"{p}.pt"), SCALING_MINUTES)
                for p, b in bias.items()
            ),
        ]
        for name, kind, path, lengths in models:
            for minutes in lengths:
                once = in_a_process(kind, path, minutes, Path(folder) / "waveform.pt")
                results.setdefault(name, []).append((minutes, once["seconds"], once["memory"]))
                print(
                    f"{name:12} {minutes:7.2f} {once['seconds']:9.1f} {once['seconds'] / minutes / 60:20.4f}"
                    f"  {once['memory'] / 1e6:8.0f} MB ({once['own'] / 1e6:.0f} MB)",
                    flush=True,
                )
    draw(results)


def draw(results: dict[str, list[tuple[float, float, float]]]) -> None:
    """scaling.png, from (minutes, seconds, bytes) by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, points in results.items():
        minutes, seconds, memories = zip(*points, strict=True)
        time_axes.loglog(minutes, seconds, "o-", label=name)
        memory_axes.semilogx(minutes, [own / 1e9 for own in memories], "o-", label=name)
    memory_axes.set_ylim(bottom=0)
    for axes, label in ((time_axes, "seconds to transcribe"), (memory_axes, "GB beside waveform and features")):
        axes.set(xlabel="minutes of audio", ylabel=label, xticks=SCALING_MINUTES)
        axes.set_xticklabels(["10 s", "1", "5", "20", "60"])
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"76.7 M parameters, beam width 1, one thread, {processor()}")
    figure.savefig(Path(__file__).parent / "scaling.png", dpi=110)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


TABLES = {
    "speed": speed,
    "accuracy": accuracy,
    "parts": parts,
    "batch": batch,
    "streaming": streaming,
    "size": size,
    "digits": digits,
    "windows": windows,
    "scaling": scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)}; default: all")
    parser.add_argument(
        "--audio", type=Path, nargs="+", default=[SAMPLE], help="speech to measure on; default: a sample"
    )
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "MODEL", "MINUTES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, model, minutes = args.measure
        print(json.dumps(measure_once(kind, Path(model), float(minutes))))
        return
    if not set(args.tables) <= set(TABLES):
        parser.error(f"there are the tables {', '.join(TABLES)}")
    torch.set_num_threads(1)
    print(f"{processor()}, one thread, torch {torch.__version__}, medians of {RUNS} runs")
    waveform, features, clips = audio(args.audio)
    for name in args.tables or TABLES:
        if name == "accuracy":
            accuracy(clips)
        else:
            TABLES[name](features, waveform) if name == "scaling" else TABLES[name](features)


if __name__ == "__main__":
    main()
