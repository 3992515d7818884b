"""What `import gelora_plugins` and `gelora --help` cost beyond Python's start: python -m benchmarks.speed.startup"""

import statistics
import subprocess
import sys
import time

from benchmarks.machine import record

COMMANDS = {
    "python": ["-c", "pass"],
    "import gelora_plugins": ["-c", "import gelora_plugins"],
    "gelora --help": ["-m", "gelora_plugins.cli", "--help"],
    "import torch": ["-c", "import torch"],
}
ROUNDS = 15


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():  # side by side, so that a busy moment meets all of them
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if round_:  # the first round fills the caches
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        beyond = 1000 * (median - medians["python"])
        print(f"{name:24s} {1000 * median:7.0f} ms median of {ROUNDS}, {beyond:7.0f} ms beyond python")
    record("startup", {"rounds": ROUNDS, "median_seconds": medians})


if __name__ == "__main__":
    main()
