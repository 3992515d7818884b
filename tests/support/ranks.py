"""The ranks of the adapter of a tiny Llama, and plans of chosen ranks for it."""

from dataclasses import replace

from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.ranks.find_adapter import find_adapter
from tests.support.plans import make_plan, make_profile
from tests.support.training import LORA, layers, peft_model

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
COST = (16 + 16) + (16 + 8) + (16 + 8) + (16 + 16) + 3 * (16 + 24)  # of one rank of a block


def layout_of(model):
    return find_transformers_layout(model)


def plan_for(model, *ranks, lora_alpha=8, use_rslora=False):
    """A plan with these ranks for the adapter of `model`, or for one of `LORA` where it has none."""
    layout = layout_of(model)
    adapter = find_adapter(model) or find_adapter(peft_model())
    return replace(
        make_plan(),
        profile=replace(make_profile([1.0] * layout.num_boundaries), layout=layout),
        sites=adapter.sites(layout),
        ranks=ranks,
        base_rank=LORA["r"],
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
    )


def block_of(name):
    return int(name.partition("layers.")[2][0])


def short(name):
    return name.removeprefix("base_model.model.")


def ranks_of(model):
    """Rank of every target module as its matrices have it."""
    found = {}
    for name, layer in layers(model).items():
        rows, columns = layer.lora_A["default"].weight.shape[0], layer.lora_B["default"].weight.shape[1]
        assert rows == columns == layer.r["default"]
        found[short(name)] = rows
    return found


def scalings_of(model):
    return {layer.scaling["default"] for layer in layers(model).values()}
