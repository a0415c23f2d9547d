"""The container's first process: starts TorchServe, and on SIGTERM lets it answer what it was asked before it ends.

TorchServe itself closes its connections at once. Here it goes on until nobody is connected any more, or until
DRAIN_SECONDS (25) have passed: less than the 30 that Kubernetes gives. Docker gives 10: `docker stop --time 30`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

MODELS = ["emformer_asr=emformer_asr.mar", "emformer_asr_live=emformer_asr_live.mar"]
COMMAND = ["torchserve", "--start", "--foreground", "--ncs", "--ts-config", "config.properties"]
COMMAND += ["--log-config", "log4j2.xml", "--model-store", "model_store", "--models", *MODELS]
ESTABLISHED = "01"


def connections(port: int) -> int:
    """How many clients are connected to ``port``, as Linux tells it."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            _, local, _, state, *_ = line.split()
            count += state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port
    return count


def main() -> None:
    port = int(re.search(r"^inference_address=.*:(\d+)$", Path("config.properties").read_text(), re.M)[1])
    server = subprocess.Popen(COMMAND, start_new_session=True)  # signals reach it from here only

    def end(*_: object) -> None:
        deadline = time.monotonic() + float(os.environ.get("DRAIN_SECONDS", 25))
        while connections(port) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(3)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    sys.exit(server.wait())


if __name__ == "__main__":
    main()
