"""The table and the picture of a plan in the real trackers, each in a training of its own: what it then has on disk.

python benchmarks/trackers.py, in an environment with tensorboard, wandb, trackio and mlflow-skinny.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What a folder holds afterwards, by the end of a file's name or by what stands in the file.
EXPECTED = {
    "tensorboard": {"events": b"gelora/picture"},
    "wandb": {".table.json": b"dimension in", ".png": b"PNG"},
    "trackio": {".db": b"dimension in", ".png": b"PNG"},
    "mlflow": {"plan.json": b"dimension in", "picture.png": b"PNG"},
}
FOLDERS = ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "TRACKIO_DIR")


def train(tracker: str) -> None:
    """A tiny model, two steps."""
    from gelora_plugins import GeLoRACallback
    from tests.support.training import peft_model, trainer_for

    with tempfile.TemporaryDirectory() as output:
        trainer_for(peft_model(), Path(output), GeLoRACallback(), report_to=[tracker], max_steps=2).train()


def main() -> int:
    lacking = []
    for tracker, expected in EXPECTED.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = dict.fromkeys(FOLDERS, folder) | {"MLFLOW_TRACKING_URI": Path(folder, "runs").as_uri()}
            settings |= {"WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true"}
            command = [sys.executable, __file__, tracker]
            subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
            files = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        for part, words in expected.items():
            if not any(part in name and words in held for name, held in files.items()):
                lacking.append(f"{tracker} has no file {part} with {words.decode()}")
    print("\n".join(lacking) or f"{', '.join(EXPECTED)} have the table and the picture.")
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1]) if len(sys.argv) > 1 else main())
