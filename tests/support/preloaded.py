"""What the server of forks.py imports: what its processes run, and what that imports when it is first used.

No tensor is computed here: threads of a parallel loop would not be there any more in the forked processes.
"""

import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in (
    "tests.faults.runs",
    "tests.support.groups",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
    "rich.console",
    "rich.table",
):
    import_module(name)
get_checkpoint_conversion_mapping("llama")  # compiles some thousand patterns the first time
gc.freeze()  # as in tests/conftest.py
