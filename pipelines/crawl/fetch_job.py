"""Runs img2dataset in a process of its own: ``python fetch_job.py < settings.json``.

A script that imports nothing of ours, because img2dataset may live in another environment: its requirements
(webdataset below 0.3, among others) do not go with all of ours.
"""

import json
import os
import signal
import sys
import threading
import time

LOOK_EVERY_S = 0.5


def die_with(parent: int) -> None:
    """End this process and those it started when the one that started it is gone: no orphan writes beside a rerun."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Download as the settings on stdin say."""
    settings = json.load(sys.stdin)
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    from img2dataset import download

    download(**settings)


if __name__ == "__main__":
    main()
