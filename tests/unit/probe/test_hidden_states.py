import warnings

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from peft import LoraConfig, get_peft_model

from gelora_plugins.probe import pooling
from gelora_plugins.probe.documents import choose_documents
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.probe.hidden_states import input_device
from tests.support import probing
from tests.support.probing import CONFIG, LENGTHS, features_of_rows, is_seq2seq, random_rows
from tests.support.tiny import BLOCKS, build

TEXT_FAMILIES = ["llama", "gemma3_text", "gpt2", "opt", "bert", "roberta", "deberta-v2", "modernbert", "t5", "bart"]
POOLINGS = {
    "mean": (pooling.mean, lambda hidden: hidden.mean(dim=0)),
    "first": (pooling.first, lambda hidden: hidden[0]),
    "last": (pooling.last, lambda hidden: hidden[-1]),
}


def reference(model, rows, pool):
    """One row at a time through the model with its head, without padding; longest first, as the batches are."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    documents = [hidden_states(model, {name: torch.tensor([value]) for name, value in row.items()}) for row in ordered]
    return [torch.stack([pool(hidden[0]) for hidden in boundary]) for boundary in zip(*documents, strict=True)]


def hidden_states(model, inputs):
    found = []

    def before(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = []
    for stack in find_transformers_layout(model).stacks:
        blocks = [model.get_submodule(block.name) for block in stack]
        handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        handles += [block.register_forward_hook(after) for block in blocks]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_points_are_those_of_documents_read_one_by_one(family, name):
    model = build(family)
    rows = random_rows(is_seq2seq(model))
    ours, plain = POOLINGS[name]
    theirs = reference(model, rows, plain)
    points = features_of_rows(model, rows, ours).points
    assert len(points) == len(theirs)
    for boundary, (mine, expected) in enumerate(zip(points, theirs, strict=True)):
        assert torch.allclose(mine, expected, atol=1e-5, rtol=1e-5), boundary
    assert points[-1].std(dim=0).min() > 1e-2, "these documents cannot be told apart"


def left_padded(row, pad):
    missing = 14 - len(row["input_ids"])
    return {"input_ids": [pad] * missing + row["input_ids"], "attention_mask": [0] * missing + [1] * (14 - missing)}


def right_padded_with_other_tokens(row, pad):
    missing = 14 - len(row["input_ids"])
    return {"input_ids": row["input_ids"] + [42] * missing, "attention_mask": [1] * (14 - missing) + [0] * missing}


@pytest.mark.parametrize("padded", [left_padded, right_padded_with_other_tokens])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_of_rows_does_not_change_the_points(family, padded):
    model = build(family)
    rows = random_rows(is_seq2seq(model))
    with_padding = [{**row, **padded(row, model.config.pad_token_id)} for row in rows]
    assert_same(features_of_rows(model, with_padding), features_of_rows(model, rows))


def test_a_batch_that_is_padded_on_the_left_gives_the_same_points():
    model = build("llama")
    row = random_rows()[0]
    layout = find_transformers_layout(model)
    left = {name: torch.tensor([value]) for name, value in left_padded(row, 0).items()}
    for name, (pool, plain) in POOLINGS.items():
        for ours, theirs in zip(
            probing.features_of(model, layout, [left], pool).points, reference(model, [row], plain), strict=True
        ):
            assert torch.allclose(ours, theirs, atol=1e-5), name


def test_token_types_of_pairs_reach_the_model():
    model = build("bert")
    rows = [{**row, "token_type_ids": [int(i > 0) for i in range(len(row["input_ids"]))]} for row in random_rows()]
    typed = features_of_rows(model, rows).points
    untyped = features_of_rows(model, random_rows()).points
    for ours, theirs, other in zip(
        typed, reference(model, rows, lambda hidden: hidden.mean(dim=0)), untyped, strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(ours, other, atol=1e-2)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_decoder_mask_comes_from_labels_that_a_collator_padded(family):
    model = build(family)
    rows = random_rows(seq2seq=True)[:2]
    batch = {
        "input_ids": torch.tensor([rows[0]["input_ids"], rows[1]["input_ids"] + [0] * 5]),
        "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5]),
        "labels": torch.tensor([rows[0]["labels"] + [-100] * 5, rows[1]["labels"]]),
    }
    features = probing.features_of(model, find_transformers_layout(model), [batch], pooling.mean)
    for ours, theirs in zip(features.points, reference(model, rows, lambda hidden: hidden.mean(dim=0)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert features.num_tokens == 9 + 4 + 5 + 10


def test_an_image_model_counts_every_patch():
    model = build("vit").eval()
    images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    features = probing.features_of(model, find_transformers_layout(model), [images], pooling.mean)
    with torch.no_grad():
        hidden = model.vit(**images, output_hidden_states=True).hidden_states
    assert torch.allclose(features.points[1], hidden[1].mean(dim=1), atol=1e-5)
    assert features.num_tokens == 2 * (1 + 4)  # [CLS] and 2 x 2 patches


def test_a_fresh_adapter_does_not_change_the_points():
    rows = random_rows()
    adapted = get_peft_model(build("llama"), LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    plain = build("llama")
    batches = choose_documents(rows, CONFIG, plain.config, None).batches
    layout = find_transformers_layout(adapted)
    assert_same(
        probing.features_of(adapted, layout, batches(3), pooling.mean),
        probing.features_of(plain, layout, batches(3), pooling.mean),
    )


def test_dropout_is_off_while_measuring():
    dropping = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    assert_same(features_of_rows(dropping, random_rows()), features_of_rows(build("gpt2"), random_rows()))


def test_every_real_token_is_counted_once():
    assert features_of_rows(build("llama"), random_rows()).num_tokens == sum(LENGTHS)


def test_half_precision_gives_finite_float32_points_without_gradients():
    half = features_of_rows(build("llama").to(torch.bfloat16), random_rows()).points
    full = features_of_rows(build("llama"), random_rows()).points
    for ours, theirs in zip(half, full, strict=True):
        assert ours.dtype is torch.float32
        assert ours.isfinite().all()
        assert not ours.requires_grad
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.95


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "t5"])
def test_no_cache_of_keys_and_values_is_made(family):
    model = build(family)
    caches = []
    backbone = model.get_submodule(find_transformers_layout(model).backbone)
    backbone.register_forward_hook(lambda m, args, output: caches.append(output.past_key_values))
    features_of_rows(model, random_rows(is_seq2seq(model)))
    assert caches
    assert set(caches) == {None}
    inputs = {"input_ids": torch.tensor([[5, 6]])}
    model(**inputs, **({"labels": torch.tensor([[5]])} if is_seq2seq(model) else {}), use_cache=True)
    assert caches[-1] is not None, "this model never makes one"


def test_the_head_and_its_loss_are_not_computed():
    model = build("llama")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    features_of_rows(model, [{**row, "labels": row["input_ids"]} for row in random_rows()])
    assert not calls


def test_labels_are_kept_from_a_model_that_is_its_own_backbone():
    model = build("t5")
    losses = []
    model.register_forward_hook(lambda m, args, output: losses.append(output.loss))
    features_of_rows(model, random_rows(seq2seq=True))
    assert losses
    assert set(losses) == {None}


def test_the_head_of_a_model_that_is_its_own_backbone_reads_one_token_and_no_more():
    model = build("t5")
    read = []
    model.lm_head.register_forward_hook(lambda module, args, output: read.append(output.shape[1]))
    rows = random_rows(seq2seq=True)
    features_of_rows(model, rows)
    assert set(read) == {1}
    model(**{name: torch.tensor([value]) for name, value in rows[0].items()})
    assert read[-1] == len(rows[0]["labels"]) > 1


@pytest.mark.parametrize("name", POOLINGS)
def test_what_stands_at_padding_has_no_say_even_when_it_is_not_a_number(name):
    ours, plain = POOLINGS[name]
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    expected = torch.stack([plain(hidden[0, :2]), plain(hidden[1, 1:])])
    hidden[~mask] = float("nan")
    assert torch.allclose(ours(hidden, mask), expected)


def test_the_mean_is_summed_in_float32():
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16)  # bfloat16 stops counting ones at 256
    hidden[:, ::2] += 2**-7
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert pooling.mean(hidden, mask).item() == 1 + 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_runs_in_its_own_dtype(dtype):
    model, seen = build("llama").to(dtype), []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    features_of_rows(model, random_rows())
    assert set(seen) == {dtype}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_gradient_checkpointing_changes_nothing_and_warns_of_nothing(family, reentrant, caplog):
    model = build(family)
    rows = random_rows(is_seq2seq(model))
    plain = features_of_rows(model, rows)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(features_of_rows(model, rows), plain)
    assert not caplog.records
    assert model.is_gradient_checkpointing
    assert not any(points.requires_grad for points in features_of_rows(model, rows).points)


# Weights that are elsewhere between calls


def offloaded(model, how, directory):
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        return accelerate.disk_offload(model, directory, execution_device=torch.device("cpu"))
    whole = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(BLOCKS)}
    return accelerate.dispatch_model(model, {**whole, **layers}, main_device="cpu", offload_dir=directory)


@pytest.mark.parametrize("how", ["cpu", "disk", "some layers on disk"])
def test_offloaded_weights_are_measured_and_go_back(how, tmp_path):
    plain = features_of_rows(build("llama"), random_rows())
    model = offloaded(build("llama"), how, str(tmp_path))
    devices = {name: p.device for name, p in model.named_parameters()}
    assert torch.device("meta") in devices.values()
    layout = find_transformers_layout(model)
    batches = choose_documents(random_rows(), CONFIG, build("llama").config, None).batches(CONFIG.probe_batch_size)
    assert_same(probing.features_of(model, layout, batches, pooling.mean), plain)
    assert {name: p.device for name, p in model.named_parameters()} == devices


def test_inputs_go_where_the_first_parameters_are_needed():
    model = build("llama")
    assert input_device(model.model) == torch.device("cpu")
    for name, device in (("model", None), ("model.embed_tokens", "meta"), ("model.norm", "cpu")):
        hook = AlignDevicesHook(io_same_device=True)  # None: wherever the inputs are
        hook.execution_device = device
        model.get_submodule(name)._hf_hook = SequentialHook(ModelHook(), hook)
    assert input_device(model.model) == torch.device("meta")


def assert_same(features, others):
    assert features.num_tokens == others.num_tokens
    for ours, theirs in zip(features.points, others.points, strict=True):
        assert torch.equal(ours, theirs)
