"""examples/plugin, installed as the distribution that it is."""

import subprocess
import sys
from pathlib import Path

from tests.support.forks import run_script, start, wait

PLUGIN = Path(__file__).parents[3] / "examples" / "plugin"
CODE = """
import sys
sys.path.insert(0, sys.argv[1])  # before plugins are looked for

from torch import nn
from gelora_plugins import GeLoRAConfig, select_ranks
from gelora_plugins.plugins import available, plugin_manager
from tests.support.training import rows
from tests.support.tiny import build

print(sorted(available("estimator")))
print(select_ranks(build("llama"), rows(), GeLoRAConfig(estimator="participation_ratio"), progress=False).ranks)

class MyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

print([block.name for block in plugin_manager().hook.find_model_layout(model=MyModel()).blocks])
"""


def test_an_installed_plugin_adds_an_estimator_and_a_layout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "plugin"
    source.mkdir()
    for path in PLUGIN.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(source)], check=True)
    (tmp_path / "script.py").write_text(CODE)
    log = tmp_path / "log.txt"
    assert wait(start(run_script, tmp_path / "script.py", [str(tmp_path / "site")], log=log)) == 0, log.read_text()
    estimators, ranks, blocks = log.read_text().strip().splitlines()
    assert estimators == "['gride', 'mle', 'participation_ratio', 'twonn', 'twonn_mle']"
    assert len(eval(ranks)) == 3
    assert blocks == "['blocks.0', 'blocks.1']"
