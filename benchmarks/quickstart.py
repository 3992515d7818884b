"""Record what the README's quickstart says, and draw its picture: python -m benchmarks.quickstart"""

import json
import os
import re
import tempfile
from pathlib import Path

from benchmarks.machine import RESULTS, record
from gelora_plugins import RankPlan
from gelora_plugins.demo import MODEL, smollm2
from gelora_plugins.report.pictures import draw

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    first = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert first is not None
    code = compile(first[1].replace(MODEL, smollm2()), "README.md", "exec")
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        exec(code, {"__name__": "quickstart"})
        report = json.loads(Path("out/gelora/report.json").read_text(encoding="utf-8"))
        os.chdir(RESULTS)
    record("quickstart", {"report": report})
    draw(RankPlan.from_dict(report["plan"]), RESULTS / "ranks.png")


if __name__ == "__main__":
    main()
