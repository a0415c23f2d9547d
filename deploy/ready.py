"""Exits with 0 if each model that TorchServe serves has a worker that takes requests: the container's health check.

/ping, which Kubernetes asks to know whether the server lives, is healthy before the first worker is.
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
address = re.search(r"^management_address=(\S+)$", Path("config.properties").read_text(), re.M)[1]


def get(path: str) -> dict | list:
    with opener.open(address + path, timeout=4) as answer:
        return json.load(answer)


try:
    names = [model["modelName"] for model in get("/models")["models"]]
    ready = [any(worker["status"] == "READY" for worker in get(f"/models/{name}")[0]["workers"]) for name in names]
except OSError as error:
    sys.exit(f"TorchServe does not answer: {error}")
sys.exit(0 if ready and all(ready) else "A model has no worker that is ready.")
