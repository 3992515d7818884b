"""What the package brings for each hook, registered as a stranger's would be."""

from typing import TYPE_CHECKING, Any

from gelora_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from gelora_plugins.layout import ModelLayout
    from gelora_plugins.ranks.plan import RankPlan
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
def register_rank_rules() -> dict[str, Any]:
    from gelora_plugins.ranks import totals

    return {
        "auto": totals.auto,
        "rows": totals.rows,
        "tokens": totals.tokens,
        "dimension_mean": totals.dimension_mean,
        "dimension_max": totals.dimension_max,
        "dimension_last": totals.dimension_last,
    }


@hookimpl
def register_training_methods() -> dict[str, Any]:
    from gelora_plugins.methods import adalora, beamlora, cola, diffora, flat_lora, lora_pro, rm_lora, sora, xgblora

    return {
        "adalora": adalora.AdaLoRA,
        "beamlora": beamlora.BeamLoRA,
        "cola": cola.COLA,
        "diffora": diffora.DiffoRA,
        "flat_lora": flat_lora.FlatLoRA,
        "lora_pro": lora_pro.LoRAPro,
        "rm_lora": rm_lora.RMLoRA,
        "sora": sora.SoRA,
        "xgblora": xgblora.XGBLoRA,
    }


@hookimpl(trylast=True)
def find_model_layout(model: "nn.Module") -> "ModelLayout":
    from gelora_plugins.probe.find_blocks import find_transformers_layout

    return find_transformers_layout(model)


@hookimpl(trylast=True)
def draw_plan(plan: "RankPlan") -> "Figure":
    from gelora_plugins.report.pictures import figure

    return figure(plan)


@hookimpl
def write_report(report: "RankReport", output_dir: str) -> None:
    report.write(output_dir)
