"""Keys of `LoraConfig.rank_pattern` and `alpha_pattern`, in the one form that every reader takes. Needs no torch.

A key is matched with the module path as `(.*\\.)?(KEY)$` (PEFT from 0.15 on, Axolotl 0.21, vLLM 0.33) or as `.*\\.KEY$`
(PEFT 0.14, the LoRA of ms-swift 4.6). The second never matches a key that begins with an anchor, and one without would
match in every other part of the model, such as a vision tower. So a key looks behind for its path from the root.
"""

import re


def key_of(path: str, *, inside: bool = False) -> str:
    """The key of one module, or of all that lies `inside` it. A module of the root, before which no dot is, has an
    anchor."""
    parent, _, name = path.rpartition(".")
    if inside:
        return rf"(?<=^{re.escape(path)}\.).*"
    return rf"(?<=^{re.escape(parent)}\.){re.escape(name)}" if parent else f"^{re.escape(name)}"


def loose_key(path: str, *, inside: bool = False) -> str:
    """One without an anchor, for EVA: PEFT matches its keys with names that begin above the model (PEFT 0.21)."""
    return rf"{re.escape(path)}\..*" if inside else re.escape(path)


def keys_ever(path: str, *, inside: bool = False) -> tuple[str, ...]:
    """All keys for this path that GeLoRA has written, to know them again; up to 0.2.0 they had an anchor."""
    loose = loose_key(path, inside=inside)
    return key_of(path, inside=inside), f"^{loose}", loose


def lies_inside(key: str, path: str) -> bool:
    """Whether a key that GeLoRA has written is for what lies inside the module `path`, or for a part of that."""
    return key.removeprefix("(?<=").removeprefix("^").startswith(rf"{re.escape(path)}\.")
