"""The published TorchServe example's way to serve this model, repaired so that it answers: serve.py compares with it.

torchaudio's own feature extractor, its scripted ``RNNTBeamSearch`` and its token processor, request after request.
The repair: PyAV reads the file, since ``torchaudio.load`` has no decoder of its own any more; every request of a batch
is answered; one thread, as the handler has it.
"""

import io
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from torchaudio.pipelines import rnnt_pipeline
from torchaudio.transforms import MelSpectrogram
from ts.context import Context

BEAM_WIDTH = 1
RIGHT_PADDING = 4


class ModelHandler:
    def initialize(self, context: Context) -> None:
        torch.set_num_threads(context.model_yaml_config["handler"]["num_threads"])
        files = {"global_stats.json": "", "tokenizer.model": ""}
        path = Path(context.system_properties["model_dir"], context.manifest["model"]["serializedFile"])
        self.decoder = torch.jit.load(path, _extra_files=files)
        with tempfile.TemporaryDirectory() as folder:  # torchaudio wants paths
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            normalise = rnnt_pipeline._GlobalStatsNormalization(Path(folder, "global_stats.json"))
            self.token_processor = rnnt_pipeline._SentencePieceTokenProcessor(str(Path(folder, "tokenizer.model")))
        steps = (
            MelSpectrogram(sample_rate=16_000, n_fft=400, n_mels=80, hop_length=160),
            rnnt_pipeline._FunctionalModule(lambda x: x.transpose(1, 0)),
            rnnt_pipeline._FunctionalModule(lambda x: rnnt_pipeline._piecewise_linear_log(x * rnnt_pipeline._gain)),
            normalise,
            rnnt_pipeline._FunctionalModule(lambda x: torch.nn.functional.pad(x, (0, 0, 0, RIGHT_PADDING))),
        )
        self.feature_extractor = rnnt_pipeline._ModuleFeatureExtractor(torch.nn.Sequential(*steps))

    def handle(self, data: list[dict], context: Context) -> list[str]:
        with torch.inference_mode():
            return [self.transcribe(request.get("data") or request["body"]) for request in data]

    def transcribe(self, audio: bytes) -> str:
        with av.open(io.BytesIO(audio)) as container:
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        features, length = self.feature_extractor(torch.from_numpy(samples).float() / 32768)
        hypotheses = self.decoder(features, length, BEAM_WIDTH)
        return self.token_processor(hypotheses[0][0])
