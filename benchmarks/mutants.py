"""Which changes of the engine's code no test notices: benchmarks/results/mutants.json, made of what mutmut found.

    mutmut run --max-children 1 && python -m benchmarks.mutants

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
STRICT = re.compile(r",( strict=\w+| )\)")
EQUAL_LENGTHS = "Both are of one length wherever this is reached: strict=True is there to say so."


def mutmut(*arguments: str) -> str:
    return subprocess.run(
        [str(Path(sys.executable).with_name("mutmut")), *arguments], check=True, capture_output=True, text=True
    ).stdout


def change_of(name: str) -> tuple[str, str]:
    """The lines that the mutant takes out, and those that it puts in."""
    diff = [line for line in mutmut("show", name).splitlines() if not line.startswith(("---", "+++"))]
    out, put = (" ".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+")
    return out, put


def main() -> int:
    known = json.loads(RECORD.read_text())["modules"] if RECORD.exists() else {}
    reasons = {
        (survivor["function"], survivor["line"], survivor["mutant"]): survivor["reason"]
        for module in known.values()
        for survivor in module["survivors"]
    }
    modules: dict[str, Any] = defaultdict(lambda: {"mutants": 0, "killed": 0, "survivors": []})
    for name, status in re.findall(r"^ +(\S+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE):
        function = re.sub(r"\.x_?(.+)__mutmut_\d+$", r".\1", name).replace(".ǁ", ".").replace("ǁ", ".")
        module = modules[".".join(name.split(".")[:3])]
        module["mutants"] += 1
        if status in NOTICED:
            module["killed"] += 1
            continue
        line, mutant = change_of(name)
        reason = reasons.get((function, line, mutant), "")
        if STRICT.sub(")", line) == STRICT.sub(")", mutant):
            reason = EQUAL_LENGTHS
        module["survivors"].append({"function": function, "line": line, "mutant": mutant, "reason": reason})
        if not reason:
            print(f"{name} ({status}) has no reason:\n  {line}\n  {mutant}")
    totals = {key: sum(module[key] for module in modules.values()) for key in ("mutants", "killed")}
    RECORD.write_text(json.dumps({**totals, "modules": modules}, indent=1, ensure_ascii=False) + "\n")
    print(f"{totals['killed']} of {totals['mutants']} mutants were noticed; {RECORD} has the others.")
    return int(any(not survivor["reason"] for module in modules.values() for survivor in module["survivors"]))


if __name__ == "__main__":
    sys.exit(main())
