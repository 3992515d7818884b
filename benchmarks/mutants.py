"""Which changes of the engine's code no test notices: benchmarks/results/mutants.json, made of what mutmut found.

    mutmut run --max-children 1 && python benchmarks/mutants.py

Each survivor stands there with the reason why it may. A reason is kept for as long as its change reads the same, and
the exit code is 1 while a survivor has none.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "results" / "mutants.json"
NOTICED = ("killed", "timeout")  # a mutant that ends in an endless loop is noticed too


def mutmut(*arguments: str) -> str:
    return subprocess.run(
        [str(Path(sys.executable).with_name("mutmut")), *arguments], check=True, capture_output=True, text=True
    ).stdout


def change_of(name: str) -> str:
    """The lines that the mutant takes out and puts in, in one line."""
    lines = [line for line in mutmut("show", name).splitlines() if line.startswith(("-", "+"))]
    return " ".join(f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith(("---", "+++")))


def main() -> int:
    known = json.loads(RECORD.read_text())["modules"] if RECORD.exists() else {}
    reasons = {
        (survivor["function"], survivor["change"]): survivor["reason"]
        for module in known.values()
        for survivor in module["survivors"]
    }
    modules: dict[str, Any] = defaultdict(lambda: {"mutants": 0, "killed": 0, "survivors": []})
    for name, status in re.findall(r"^ +(\S+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE):
        function = re.sub(r"\.x_?(.+)__mutmut_\d+$", r".\1", name).replace(".ǁ", ".").replace("ǁ", ".")
        module = modules[".".join(name.split(".")[:2])]
        module["mutants"] += 1
        if status in NOTICED:
            module["killed"] += 1
            continue
        change = change_of(name)
        reason = reasons.get((function, change), "")
        module["survivors"].append({"function": function, "change": change, "reason": reason, "status": status})
        if not reason:
            print(f"{name} ({status}) has no reason: {change}")
    totals = {key: sum(module[key] for module in modules.values()) for key in ("mutants", "killed")}
    RECORD.write_text(json.dumps({**totals, "modules": modules}, indent=1, ensure_ascii=False) + "\n")
    print(f"{totals['killed']} of {totals['mutants']} mutants were noticed; {RECORD} has the others.")
    return int(any(not survivor["reason"] for module in modules.values() for survivor in module["survivors"]))


if __name__ == "__main__":
    sys.exit(main())
