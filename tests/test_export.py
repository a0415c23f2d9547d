"""export_model.py: what it writes and what it says when it cannot."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import torchaudio
from conftest import SAMPLES, Worker, run, transcripts

import export_model
from engine.precision import PRECISIONS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_transcribes_every_sample_at_beam_widths_1_and_10(tmp_path, precision):
    path = tmp_path / "emformer_rnnt.pt"
    export_model.export("digits", path, precision)
    for beam_width in (1, 10):
        worker = Worker(path, {"beam_width": beam_width})
        heard = {file: worker.transcribe((SAMPLES / file).read_bytes()) for file in transcripts("digits")}
        assert heard == transcripts("digits"), beam_width


def test_an_int8_model_on_a_processor_without_its_products_stops_the_worker_with_a_sentence(tmp_path, monkeypatch):
    """As on ARM, where PyTorch is built without FBGEMM."""
    export_model.export("digits", tmp_path / "emformer_rnnt.pt", "int8")
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    with pytest.raises(ValueError, match=r"FBGEMM.*export fp32 or bf16"):
        Worker(tmp_path / "emformer_rnnt.pt")


def test_a_smaller_precision_makes_a_smaller_file(tmp_path):
    sizes = []
    for precision in ("fp32", "bf16", "int8"):
        export_model.export("digits", tmp_path / precision, precision)
        sizes.append((tmp_path / precision).stat().st_size)
    assert sizes[0] > 1.8 * sizes[1] > 1.8 * 1.5 * sizes[2]


def test_the_file_carries_all_that_the_handler_needs(digits_pt):
    files = dict.fromkeys(["metadata.json", "global_stats.json", "tokenizer.model"], "")
    torch.jit.load(str(digits_pt), _extra_files=files)
    metadata = json.loads(files["metadata.json"])
    assert metadata["model"] == "digits"
    assert metadata["precision"] == "fp32"
    assert metadata["sample_rate"] == 16_000
    assert files["global_stats.json"] == (export_model.DIGITS / "global_stats.json").read_bytes()
    assert files["tokenizer.model"] == (export_model.DIGITS / "tokenizer.model").read_bytes()


def test_the_command_prints_what_it_made(tmp_path):
    output = tmp_path / "new" / "emformer_rnnt.pt"
    done = run("export_model.py", "--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    content = output.read_bytes()
    for fact in ("digits", "fp32", f"{len(content):,} bytes", hashlib.sha256(content).hexdigest()):
        assert fact in done.stdout
    parameters = int(re.search(r"parameters ([\d,]+)", done.stdout)[1].replace(",", ""))
    assert parameters == sum(p.numel() for p in export_model.digits(None)[0].parameters())


def test_another_checkpoint_of_the_same_shape_is_used(tmp_path):
    model, _, _ = export_model.digits(None)
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "zeros.pt")
    export_model.export("digits", tmp_path / "out.pt", checkpoint=tmp_path / "zeros.pt")
    exported = torch.jit.load(str(tmp_path / "out.pt")).state_dict()
    assert exported and not any(value.any() for value in exported.values())


def wrong_checkpoints(folder) -> dict[str, str]:
    """Checkpoint file -> what the error line must name."""
    weights = export_model.digits(None)[0].state_dict()
    (folder / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"state_dict": weights}, folder / "nested.pt")
    torch.save(weights | {"joiner.linear.bias": torch.zeros(4097)}, folder / "shape.pt")
    torch.save({name: value for name, value in weights.items() if name != "joiner.linear.bias"}, folder / "lacks.pt")
    for name, value in (("nan", float("nan")), ("infinite", -float("inf"))):
        changed = weights["joiner.linear.weight"].clone()
        changed[3, 5] = value
        torch.save(weights | {"joiner.linear.weight": changed}, folder / f"{name}.pt")
    torch.save({"encoder.layers.0.weight": torch.zeros(3, 4)}, folder / "other.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "script.pt"))
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    for name, whole in (("cut", "shape"), ("cut-old", "old")):
        content = (folder / f"{whole}.pt").read_bytes()
        (folder / f"{name}.pt").write_bytes(content[: len(content) // 2])
    (folder / "cut-early.pt").write_bytes((folder / "shape.pt").read_bytes()[:300])
    (folder / "empty.pt").touch()
    return {
        "absent.pt": "No such file",
        "text.pt": "not a PyTorch state dict",
        "list.pt": "not a state dict",
        "nested.pt": "not a state dict",
        "script.pt": "not a PyTorch state dict but a TorchScript model",
        "nan.pt": "values in joiner.linear.weight that are not finite",
        "infinite.pt": "values in joiner.linear.weight that are not finite",
        "other.pt": "another architecture",
        **dict.fromkeys(["cut.pt", "cut-old.pt", "cut-early.pt", "empty.pt"], "is cut off: download or copy it again."),
        "shape.pt": "joiner.linear.bias the model expects [15], the file has [4097]",
        "lacks.pt": "joiner.linear.bias the model expects [15], the file lacks it",
    }


def test_a_wrong_checkpoint_ends_in_one_line(tmp_path, monkeypatch, capsys):
    for name, complaint in wrong_checkpoints(tmp_path).items():
        arguments = ["export_model.py", "--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "out.pt")]
        monkeypatch.setattr("sys.argv", arguments)
        assert export_model.main() == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error and complaint in error
        assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("where", ["file/model.pt", "folder"])
def test_an_output_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch, capsys, where):
    (tmp_path / "file").write_text("a file, where a folder would be needed")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("sys.argv", ["export_model.py", "--output", str(tmp_path / where)])
    assert export_model.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot write {tmp_path / where}" in error


def test_an_unreachable_download_ends_in_one_line_that_says_what_to_do(tmp_path):
    # A proxy that nobody runs makes every download fail at once, with or without a network.
    done = run("export_model.py", "--model", "librispeech", TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be downloaded" in done.stderr and f"put it at {tmp_path}" in done.stderr


@pytest.mark.parametrize("cut", ["emformer_rnnt_base_librispeech.pt", "global_stats_rnnt", "spm_bpe"])
def test_a_download_that_was_cut_off_does_not_stay_in_the_cache(tmp_path, monkeypatch, capsys, cut):
    """The bundle's three files as a connection that breaks leaves them: torch.hub keeps what came."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    files = {
        "global_stats_rnnt_librispeech.json": (export_model.DIGITS / "global_stats.json").read_bytes(),
        "spm_bpe_4096_librispeech.model": (export_model.DIGITS / "tokenizer.model").read_bytes(),
        "emformer_rnnt_base_librispeech.pt": (export_model.DIGITS / "weights.pt").read_bytes(),
    }

    def download(key: str, path: Path, progress: bool) -> None:
        content = files[path.name]
        path.write_bytes(content[: len(content) // 2] if path.name.startswith(cut) else content)

    monkeypatch.setattr(torchaudio.utils.download, "_download", download)
    monkeypatch.setattr("sys.argv", ["export_model.py", "--model", "librispeech", "--output", str(tmp_path / "out.pt")])
    assert export_model.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and cut in error and "has been removed: run this again" in error
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(cut)]
    cut = "nothing"
    assert export_model.main() == 1  # whole, though not of the bundle's architecture
    assert "another architecture" in capsys.readouterr().err


def test_the_embedded_weights_are_small_and_safe_to_load():
    path = export_model.DIGITS / "weights.pt"
    assert path.stat().st_size < 10e6
    weights = torch.load(path, weights_only=True)
    parameters = sum(value.numel() for value in weights.values())
    assert parameters < 5e6
    assert f"{parameters:,}" in (export_model.DIGITS / "README.md").read_text()
