"""What does the engine do on a GPU: the same as torchaudio's search there, how fast, in how much memory?

    python benchmarks/gpu.py                       # at most SECONDS and what it is measuring then
    python benchmarks/gpu.py --server              # and a request to a real TorchServe
    python benchmarks/gpu.py --device cpu --quick  # the same code without a GPU, in a minute or two

Needs no more than PyTorch, torchaudio and sentencepiece; what the handler and the server need (av, torchserve, Java) is
skipped by name where it is missing. It prints

- how many hypotheses are those of ``torchaudio.models.RNNTBeamSearch`` on the same card, in float32 without TF32, and
  by how much scores differ; and how often bfloat16 finds the tokens of float32;
- one table: seconds for a second of audio and the peak of the card's memory, the weights included. torchaudio takes one
  utterance at a time. Medians of RUNS runs; a run of more than LONG seconds is the only one;
- what an utterance of a new length costs, for which TorchScript may compile kernels (``--no-fuser`` forbids it);
- the answers of the real handler to the samples, at every precision.

The 76.7M-parameter network has random weights: its text means nothing, and its hypotheses are often equally good.
"""

import argparse
import csv
import dataclasses
import io
import logging
import statistics
import sys
import tempfile
import time
import traceback
import warnings
import wave
from collections.abc import Callable
from pathlib import Path

import torch
from torchaudio.functional import resample
from torchaudio.models import RNNT, Hypothesis, RNNTBeamSearch, emformer_rnnt_base
from torchaudio.pipelines import EMFORMER_RNNT_BASE_LIBRISPEECH

warnings.filterwarnings("ignore", category=DeprecationWarning)
ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_audio"
sys.path.insert(0, str(ROOT))
import export_model  # noqa: E402
from engine.decoder import Decoder  # noqa: E402
from engine.precision import PRECISIONS, with_precision  # noqa: E402

SECONDS = 90.0
RUNS = 3
LONG = 2.0
SAMPLE_RATE = 16_000
BEAM_WIDTHS = (1, 10)
BATCHES = (1, 8, 32)
SPEEDS = (0.8, 0.9, 1.0, 1.1, 1.25)  # at which the digits are played: to the model that is other speech
TIMED_SECONDS = 3  # of the utterance that is timed
# Of the random network: between three tokens a second at beam width 1 and some fifteen at 10 come out.
BLANK_BIAS = 2.2


def digits() -> RNNT:
    return export_model.digits(None)[0].eval()


def stand_in() -> RNNT:
    """torchaudio's base architecture, random but the same every time."""
    torch.manual_seed(0)
    model = emformer_rnnt_base(num_symbols=4097).eval()
    model.joiner.linear.bias.data[-1] += BLANK_BIAS
    return model


MODELS = {"76.7M": stand_in, "digits": digits}


@torch.inference_mode(False)
def engine_of(name: str, precision: str, device: torch.device) -> torch.jit.ScriptModule:
    """The engine as the handler has it: written by the export, loaded, moved onto the device."""
    model, file = MODELS[name](), io.BytesIO()
    blank = model.joiner.linear.out_features - 1
    torch.jit.save(torch.jit.script(with_precision(Decoder(model, blank), precision)), file)
    file.seek(0)
    return torch.jit.load(file, map_location="cpu").eval().to(device)


@torch.inference_mode(False)
def reference_of(name: str, device: torch.device) -> torch.jit.ScriptModule:
    """torchaudio's search, scripted as in its example for TorchServe."""
    model = MODELS[name]()
    blank = model.joiner.linear.out_features - 1
    return torch.jit.script(RNNTBeamSearch(model.to(device), blank)).eval()


def read(name: str) -> torch.Tensor:
    """(samples,) of a 16-bit mono WAV sample at 16 kHz, with the standard library."""
    with wave.open(str(SAMPLES / name)) as file:
        assert file.getparams()[:3] == (1, 2, SAMPLE_RATE), name
        return torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16) / 32768


def utterances(quick: bool, device: torch.device) -> list[torch.Tensor]:
    """Features (T, 80) of the digits at several speeds, the sentence, and the sentence in pieces of two seconds."""
    spoken, sentence = read("three-digits.wav"), read("sentence.wav")
    waveforms = [resample(spoken, SAMPLE_RATE, int(SAMPLE_RATE / speed)) for speed in SPEEDS]
    waveforms += [sentence, *sentence.split(2 * SAMPLE_RATE)[:3]]
    stats = str(export_model.DIGITS / "global_stats.json")
    extract = dataclasses.replace(EMFORMER_RNNT_BASE_LIBRISPEECH, _global_stats_path=stats).get_feature_extractor()
    return [extract(waveform)[0].to(device) for waveform in waveforms[: 2 if quick else None]]


def whole(module: torch.jit.ScriptModule, features: torch.Tensor, beam_width: int) -> list[Hypothesis]:
    return module(features, torch.tensor([len(features)], device=features.device), beam_width)


def agreement(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> str:
    """In how many places of the beams the tokens are the same, and how far apart the scores are."""
    pairs = [pair for beams in zip(found, expected, strict=True) for pair in zip(*beams, strict=True)]
    same = [abs(mine[3] - other[3]) for mine, other in pairs if mine[0] == other[0]]
    others = [abs(mine[3] - other[3]) for mine, other in pairs if mine[0] != other[0]]
    best = sum(mine[0][0] == other[0][0] for mine, other in zip(found, expected, strict=True))
    text = f"{best} of {len(found)} best hypotheses, {len(same)} of {len(pairs)} in all"
    text += f"; scores differ by {max(same, default=0.0):.1e} at most"
    if others:
        text += f", those of other tokens in the same place by {min(others):.1e} to {max(others):.1e}"
    return text


def seconds_of(run: Callable[[], object], device: torch.device, warm_up: int, runs: int) -> tuple[float, float]:
    """Median time of ``run``, and the peak of the card's memory in bytes."""
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while len(times) < warm_up + runs and not (len(times) > warm_up and times[-1] > LONG):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return statistics.median(times[warm_up:]), peak


def equality(name: str, speech: list[torch.Tensor], device: torch.device) -> None:
    """Print how often the engine finds what torchaudio finds, and bfloat16 what float32 finds."""
    reference = reference_of(name, device)
    single, half = (engine_of(name, precision, device) for precision in ("fp32", "bf16"))
    for beam_width in BEAM_WIDTHS:
        expected = [whole(reference, features, beam_width) for features in speech]
        found = [whole(single, features, beam_width) for features in speech]
        batch = [beam.hypotheses for beam in single.decode(speech, beam_width)]
        rounded = [whole(half, features, beam_width) for features in speech]
        tokens = sum(len(beam[0][0]) - 1 for beam in expected)
        label = f"{name}, beam {beam_width}"
        print(f"{label}, as torchaudio ({tokens} tokens): {agreement(found, expected)}")
        print(f"{label}, all in one batch, as torchaudio: {agreement(batch, expected)}")
        print(f"{label}, bf16 as fp32: {agreement(rounded, found)}", flush=True)


def new_lengths(name: str, features: torch.Tensor, device: torch.device) -> None:
    """Print what the first two calls with an utterance of another length take."""
    module = engine_of(name, "fp32", device)
    for _ in range(4):  # as the handler warms up
        whole(module, features, 1)
    lengths = range(len(features) - 16, len(features) // 3, -23)
    calls = [[seconds_of(lambda n=n: whole(module, features[:n], 1), device, 0, 1)[0] for n in lengths] for _ in "12"]
    first, second = ([statistics.median(each) * 1000, max(each) * 1000] for each in calls)
    print(
        f"{name}, beam 1, {len(lengths)} utterances of new lengths: {first[0]:.0f} ms, at most {first[1]:.0f}; "
        f"the same again: {second[0]:.0f} ms, at most {second[1]:.0f}",
        flush=True,
    )


def table(names: list[str], speech: dict[str, torch.Tensor], device: torch.device, quick: bool, end: float) -> None:
    """Print the time for a second of audio and the peak of memory, row by row."""
    runs, batches = (1, BATCHES[:2]) if quick else (RUNS, BATCHES)
    print("\n| model | beam | batch | torchaudio | | `fp32` | | `bf16` | | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        features = speech[name]
        length = len(features) / 100
        reference = reference_of(name, device)
        engines = [engine_of(name, precision, device) for precision in ("fp32", "bf16")]
        every = sum(weights(module) for module in (reference, *engines))

        def measured(module, run: Callable[[], object], warm_up: int, every=every) -> tuple[float, str]:
            """Seconds, and the memory that it would take if its weights were alone on the card."""
            taken, peak = seconds_of(run, device, warm_up, runs)
            return taken, f"{(peak - every + weights(module)) / 1e6:.0f} MB" if peak else "-"

        alone = {}  # torchaudio's time for a second at each beam width
        for batch in batches:
            for beam_width in BEAM_WIDTHS:
                if time.perf_counter() > end:
                    print(f"| {name} | {beam_width} | {batch} | not measured: the time is over |")
                    continue
                cells = ["", ""]
                if batch == 1:
                    run = lambda b=beam_width, r=reference, f=features: whole(r, f, b)  # noqa: E731
                    taken, memory = measured(reference, run, 2)
                    alone[beam_width] = taken / length
                    cells = [f"{alone[beam_width] * 1000:.1f} ms", memory]
                for module in engines:
                    run = lambda m=module, b=beam_width, f=features, n=batch: m.decode([f] * n, b)  # noqa: E731
                    taken, memory = measured(module, run, 3 if batch == 1 else 1)
                    taken /= length * batch
                    cells += [f"{taken * 1000:.2f} ms, {alone[beam_width] / taken:.1f} x", memory]
                tokens = len(whole(engines[0], features, beam_width)[0][0]) - 1
                cells.append(f"{tokens / length:.1f}")
                print(f"| {name} | {beam_width} | {batch} | " + " | ".join(cells) + " |", flush=True)
    print(flush=True)


def weights(module: torch.jit.ScriptModule) -> int:
    """Bytes that a module holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def transcripts() -> dict[str, str]:
    """File name -> text of the digit samples."""
    with (SAMPLES / "transcripts.tsv").open() as file:
        return {row["file"]: row["text"] for row in csv.DictReader(file, delimiter="\t") if row["model"] == "digits"}


def handler_answers(device: torch.device) -> None:
    """Print what the real handler answers to the digit samples, one request each."""
    try:
        from ts.context import Context, RequestProcessor

        from handler import ModelHandler
    except ImportError as error:
        print(f"handler: skipped, {error}")
        return
    gpu_id = 0 if device.type == "cuda" else None
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            export_model.export("digits", Path(folder) / "model.pt", precision)
            manifest = {"model": {"serializedFile": "model.pt"}}
            context = Context("emformer_asr", folder, manifest, 1, gpu_id, "0", model_yaml_config={})
            handler = ModelHandler()
            handler.initialize(context)
        right, times = 0, []
        for name, text in transcripts().items():
            context.request_processor = [RequestProcessor({})]
            audio = bytearray((SAMPLES / name).read_bytes())
            started = time.perf_counter()
            [answer] = handler.handle([{"body": audio}], context)
            times.append((time.perf_counter() - started) * 1000)
            right += answer == text
            if answer != text:
                print(f"handler, {precision}, {name}: {answer!r}, not {text!r}")
        print(
            f"handler, {precision}, on {handler.device}: {right} of {len(times)} samples right; "
            f"first request {times[0]:.0f} ms, median {statistics.median(times):.0f} ms",
            flush=True,
        )


def server_answer() -> None:
    """Print what a TorchServe with the project's own configuration answers, and the device that it chose."""
    try:
        from tests.conftest import Server, post
    except ImportError as error:
        print(f"server: skipped, {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        export_model.export("digits", Path(folder) / "emformer_rnnt.pt")
        server = Server(Path(folder) / "emformer_rnnt.pt")
        try:
            server.start()
            answer = post(server, SAMPLES / "three-digits.wav")
            log = "".join(path.read_text() for path in (server.folder / "logs").glob("model_log*"))
        finally:
            server.remove()
    loaded = next((line for line in log.splitlines() if "Loaded " in line), "nothing about it in the log")
    print(f"server: {answer.status_code} {answer.text!r}, expected {transcripts()['three-digits.wav']!r}; {loaded}")


def attempt(step: Callable[..., None], *arguments: object) -> bool:
    """Whether ``step`` has gone through; where not, it has printed why, and the next ones can."""
    try:
        step(*arguments)
    except Exception:
        print(f"FAILED: {step.__name__}")
        traceback.print_exc(file=sys.stdout)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the digits model and few runs")
    parser.add_argument("--no-fuser", action="store_true", help="TorchScript compiles no kernels of its own")
    parser.add_argument("--joiner-rows", type=int, help="what the engine takes for search.JOINER_ROWS")
    parser.add_argument("--server", action="store_true", help="also start TorchServe, if it is installed")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    started = time.perf_counter()
    device = torch.device(args.device)
    torch.set_num_threads(1)  # as a worker has it
    torch.set_float32_matmul_precision("highest")  # no TF32
    if args.no_fuser:
        torch._C._jit_set_texpr_fuser_enabled(False)
        torch._C._jit_override_can_fuse_on_gpu(False)
    if args.joiner_rows:
        import engine.search

        engine.search.JOINER_ROWS = args.joiner_rows
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}; fuser {'off' if args.no_fuser else 'on'}", flush=True)

    names = ["digits"] if args.quick else list(MODELS)
    with torch.inference_mode():
        speech = utterances(args.quick, device)
        timed = dict.fromkeys(names, speech[0]) if args.quick else {"76.7M": speech[5], "digits": speech[2]}
        timed = {name: features[: 100 * TIMED_SECONDS] for name, features in timed.items()}
        done = [attempt(equality, name, speech, device) for name in names]
        done.append(attempt(table, names, timed, device, args.quick, started + SECONDS))
        done.append(attempt(new_lengths, names[0], timed[names[0]], device))
    done.append(attempt(handler_answers, device))
    if args.server:
        done.append(attempt(server_answer))
    print(f"took {time.perf_counter() - started:.0f} s")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
