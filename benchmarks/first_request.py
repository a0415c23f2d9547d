"""Is the first request as fast as the tenth? Starts the archive anew and times twelve requests.

make run && .venv/bin/python benchmarks/first_request.py
"""

import sys
import time
from pathlib import Path

import requests

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import serve  # noqa: E402

AUDIO = (ROOT / "sample_audio" / "card-number.m4a").read_bytes()
CONFIG = ROOT / "config.properties"
REQUESTS = 12


def main() -> None:
    url = f"{serve.read_config(CONFIG)['inference_address']}/predictions/{serve.MODEL_NAME}"
    serve.stop()
    serve.start(CONFIG, ROOT / "model_store", ROOT / "build" / "logs")
    session = requests.Session()
    # A request that the handler refuses: TorchServe's own first-time work is done, the model is untouched.
    session.post(url)
    for number in range(1, REQUESTS + 1):
        started = time.perf_counter()
        session.post(url, data=AUDIO).raise_for_status()
        print(f"request {number:2}: {(time.perf_counter() - started) * 1000:6.1f} ms")


if __name__ == "__main__":
    main()
