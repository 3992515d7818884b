"""Write the training data of axolotl.yml: English prose from Python's own library, one paragraph group a line."""

import json
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

CHARACTERS = 400  # about 100 tokens


def documents() -> list[str]:
    """Consecutive paragraphs, joined until they are long enough."""
    made, current = [], ""
    for name in sorted(topics):
        for paragraph in textwrap.dedent(topics[name]).split("\n\n"):
            current = f"{current}\n\n{paragraph}".strip()
            if len(current) >= CHARACTERS:
                made.append(current)
                current = ""
    return made


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "prose.jsonl")
    rows = documents()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    print(f"{len(rows)} documents in {path}")
