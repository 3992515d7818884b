"""What the commands say of their progress, and before they begin."""

from pathlib import Path

import pytest

from gelora_plugins.cli import demo
from tests.support.commands import run


@pytest.mark.parametrize("more", [(), ("--sensitivity",)])
def test_probe_tells_a_log_how_far_it_is_unless_it_is_to_be_quiet(
    tmp_path: Path,
    model: Path,
    data: Path,
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, "probe", model, data, "-o", tmp_path / "profile.json", *more)
    assert "\nGeLoRA probe: 8 of 8" in capsys.readouterr().err
    run(monkeypatch, "probe", model, data, "-o", tmp_path / "profile.json", "--quiet", *more)
    said = capsys.readouterr()
    assert "8 of 8" not in said.err
    assert "%" not in said.err  # no bar of transformers or datasets either
    assert "profile.json" in said.out


@pytest.mark.parametrize(
    ("options", "samples", "steps"), [((), 512, 10), (("--quick",), 64, 2), (("--quick", "--steps", "1"), 64, 1)]
)
def test_demo_says_beforehand_how_long_it_takes(
    options: tuple[str, ...],
    samples: int,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, object] = {}

    def begun(output: Path, **arguments: object) -> None:
        given.update(arguments, said=capsys.readouterr().out)

    monkeypatch.setattr(demo, "run", begun)
    run(monkeypatch, "demo", "--quiet", *options)
    assert (given["samples"], given["steps"], given["progress"]) == (samples, steps, False)
    assert f"{samples} passages to measure on and {steps} step" in str(given["said"])
    assert str(given["said"]).endswith(" on one core.\n")
