"""Read by pytest before any test imports torch or transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads only wait for each other
