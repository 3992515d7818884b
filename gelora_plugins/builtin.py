"""What the package brings for each hook, registered as a stranger's would be."""

from typing import TYPE_CHECKING, Any

from gelora_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from gelora_plugins.layout import ModelLayout
    from gelora_plugins.report.rank_report import RankReport


@hookimpl
def register_estimators() -> dict[str, Any]:
    from gelora_plugins.dimension import estimators

    return {
        "twonn": estimators.twonn,
        "twonn_mle": estimators.twonn_mle,
        "gride": estimators.gride,
        "mle": estimators.mle,
    }


@hookimpl
def register_poolings() -> dict[str, Any]:
    from gelora_plugins.probe import pooling

    return {"mean": pooling.mean, "last": pooling.last, "first": pooling.first}


@hookimpl
def register_rank_policies() -> dict[str, Any]:
    from gelora_plugins.ranks import policies

    return {"gelora": policies.gelora, "budget": policies.budget, "uniform": policies.uniform}


@hookimpl
def register_training_methods() -> dict[str, Any]:
    from gelora_plugins.methods import adalora, beamlora, diffora, flat_lora, sora

    return {
        "adalora": adalora.AdaLoRA,
        "beamlora": beamlora.BeamLoRA,
        "diffora": diffora.DiffoRA,
        "flat_lora": flat_lora.FlatLoRA,
        "sora": sora.SoRA,
    }


@hookimpl(trylast=True)
def find_model_layout(model: "nn.Module") -> "ModelLayout":
    from gelora_plugins.probe.find_blocks import find_transformers_layout

    return find_transformers_layout(model)


@hookimpl
def write_report(report: "RankReport", output_dir: str) -> None:
    report.write(output_dir)
