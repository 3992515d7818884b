"""Record DADApy's TwoNN (its defaults: linear fit on the smallest 90 % of the mu) and GRIDE on the clean sets.

DADApy needs numpy < 2, so it cannot live in the environment of the tests. To record again, from the repository root:

    python -m venv dadapy-env
    dadapy-env/bin/pip install dadapy "numpy<2"
    dadapy-env/bin/python tests/reference/record_dadapy.py

This writes tests/reference/dadapy.json: the versions, and for each set its checksum, its dimension by TwoNN and by
GRIDE at scales 1, 2, 4, 8.
"""

import json
from importlib.metadata import version
from pathlib import Path

from clean_sets import checksum, clean_sets
from dadapy import Data

sets = {}
for name, points in clean_sets():
    gride = Data(points).return_id_scaling_gride(range_max=16, eps=1e-10)[0]
    sets[name] = {
        "checksum": checksum(points),
        "twonn": float(Data(points).compute_id_2NN()[0]),
        "gride": [float(dimension) for dimension in gride],
    }
    print(f"{name}: {sets[name]['twonn']:.3f}")
record = {**{tool: version(tool) for tool in ("dadapy", "numpy", "scipy")}, "sets": sets}
Path(__file__).with_name("dadapy.json").write_text(json.dumps(record, indent=1) + "\n")
