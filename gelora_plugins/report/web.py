"""report.html: one file that needs no network, no script and no other file. Needs no torch."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gelora_plugins.ranks.verdict import verdict
from gelora_plugins.report import chart
from gelora_plugins.report.table import COLUMNS, cells
from gelora_plugins.report.versions import versions
from gelora_plugins.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment, Template

    from gelora_plugins.dimension.profile import DimensionProfile
    from gelora_plugins.ranks.plan import RankPlan
    from gelora_plugins.report.rank_report import RankReport


def page(report: RankReport, now: datetime | None = None) -> str:
    """The report as HTML.

    Args:
        now: when it is written, with a time zone; the moment of the call if not given. A plan records no date.
    """
    plan, profile = report.plan, report.plan.profile
    return template("report").render(
        model=profile.model_name or profile.layout.model_type,
        verdict=verdict(plan),
        facts=_facts(plan, (now or datetime.now(UTC)).astimezone(UTC)),
        chart=chart.chart(plan),
        size=(chart.WIDTH, chart.HEIGHT, chart.LEFT, chart.RIGHT, *chart.DIMENSIONS, *chart.RANKS),
        caption=chart.caption(plan),
        plan=plan,
        columns=COLUMNS,
        rows=cells(plan),
        lines=report.lines(),
        settings=_settings(plan),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def template(name: str) -> Template:
    """The page of this name among the templates, which shows what others named as it is: in one line, escaped."""
    return _environment().get_template(f"{name}.html.j2")


def included(name: str) -> str:
    """What a page has of the template of this name that it includes, which takes no values."""
    return _environment().get_template(f"{name}.j2").render()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def shown(value: Any) -> Any:
        # What a macro made is HTML, whose values have been here.
        return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value

    return Environment(
        loader=PackageLoader("gelora_plugins.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,  # no control characters, no turns of the direction of writing: every value may be a stranger's
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _facts(plan: RankPlan, now: datetime) -> dict[str, str]:
    """What a reader asks first: which model, which data, what came out, when."""
    profile = plan.profile
    mean = sum(plan.ranks) / len(plan.ranks)
    return {
        "Model": f"{_model(profile)}, {len(profile.layout.blocks)} blocks",
        "Data": f"{profile.num_documents:,} documents, {profile.num_tokens:,} tokens",
        "Ranks": f"{min(plan.ranks)} to {max(plan.ranks)}, mean {mean:.2f}",
        "LoRA parameters": f"{plan.num_parameters:,}, {plan.num_parameters / plan.num_base_parameters:.0%} of those at "
        f"r = {plan.base_rank}",
        "Written": f"{now:%Y-%m-%d %H:%M} UTC",
    }


def _model(profile: DimensionProfile) -> str:
    kind = profile.layout.model_type
    return f"{profile.model_name} ({kind})" if profile.model_name else kind


def _settings(plan: RankPlan) -> dict[str, str]:
    """The options that the plan and its measurement followed, and what tells the data and the model from others."""
    settings: dict[str, Any] = {
        "r": plan.base_rank,
        "lora_alpha": f"{plan.lora_alpha:g}",
        "use_rslora": plan.use_rslora,
        **plan.followed(),
        "SHA-256 of the token ids": plan.profile.data_fingerprint,
        "fingerprint of the weights": plan.profile.model_fingerprint,
    }
    return {name: str(value) for name, value in settings.items() if value is not None}
