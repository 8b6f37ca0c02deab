"""Imported models compute what Hugging Face's do, alone and on meshes; what is exported is what was imported."""

import itertools
import json
import shutil

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is not installed: pip install -e .[dev]")

from models.hf_peers import PEERS, build, config_of, disk_gradients, read, save, tokens  # noqa: E402

from baton.configs.errors import UserError  # noqa: E402
from baton.configs.loading import load_config  # noqa: E402
from baton.launcher.conversion.from_hf import convert_from_hf  # noqa: E402
from baton.models.foreign import is_exact  # noqa: E402
from baton.models.hf import HFCheckpoint, load_hf, save_hf, write_checkpoint  # noqa: E402
from baton.models.hf.families import read_config, write_config  # noqa: E402
from baton.models.hf.tensors import hf_tensors  # noqa: E402
from baton.models.hybrid import build_model  # noqa: E402
from helpers import relative_error, tiny_config  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    return {kind: save(build(kind), tmp_path_factory.mktemp("hf") / kind) for kind in PEERS}


def compare_gradients(found, model, folder):
    """Every gradient of ours, by their names, with those of the library's model."""
    reference = disk_gradients(model, folder)
    assert found.keys() <= reference.keys()
    assert {name for name in reference if name not in found} <= {name for name in reference if "e_score_correction_bias" in name}
    for name, gradient in found.items():
        assert relative_error(gradient, reference[name]) <= 1e-5, name


@pytest.mark.parametrize("kind", PEERS)
def test_logits_losses_and_every_gradient(kind, folders, tmp_path):
    ids, labels = tokens()
    model = build(kind)
    expected = model(ids, labels=labels)
    expected.loss.backward()
    found = load_hf(folders[kind], dtype=torch.float32)
    assert relative_error(found(ids).detach(), expected.logits.detach()) <= 1e-5
    losses = found.loss(ids, labels)
    assert relative_error(losses["loss"].detach(), expected.loss.detach()) <= 1e-5
    cross_entropy = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative_error(losses["cross_entropy"].detach(), cross_entropy.detach()) <= 1e-5
    aux_loss = getattr(expected, "aux_loss", None)
    assert (aux_loss is None) == (kind not in ("jamba", "granitemoehybrid"))
    if aux_loss is None:
        assert losses["aux_loss"].item() == 0
    else:
        assert relative_error(losses["aux_loss"].detach(), aux_loss.detach()) <= 1e-5
        assert float((losses["loss"] - losses["cross_entropy"]).detach()) > 0.1
    losses["loss"].backward()
    compare_gradients(found.hf_tensors(gradients=True), model, tmp_path / "gradients")


BOUNDARIES = [[0, 7, 8, 24, 40], [0, 40]]


@pytest.mark.parametrize("kind", PEERS)
def test_packed_documents_are_what_theirs_are_alone(kind, tmp_path):
    """Without the balancing loss, which is not a sum over documents."""
    changed = {"router_aux_loss_coef": 0.0} if "router_aux_loss_coef" in PEERS[kind] else {}
    model, (ids, labels) = build(kind, **changed), tokens()
    found = load_hf(save(model, tmp_path / kind))
    logits, total, count = torch.empty(*ids.shape, 60), 0.0, 0
    for row, boundaries in enumerate(BOUNDARIES):
        for start, stop in itertools.pairwise(boundaries):
            part = model(ids[row : row + 1, start:stop]).logits[0]
            logits[row, start:stop] = part.detach()
            wanted = labels[row, start + 1 : stop]
            total = total + F.cross_entropy(part[:-1], wanted, reduction="sum")
            count += int((wanted != -100).sum())
    (total / count).backward()
    assert relative_error(found(ids, cu_seqlens=BOUNDARIES).detach(), logits) <= 1e-5
    losses = found.loss(ids, labels, cu_seqlens=BOUNDARIES)
    assert relative_error(losses["loss"].detach(), (total / count).detach()) <= 1e-5
    losses["loss"].backward()
    compare_gradients(found.hf_tensors(gradients=True), model, tmp_path / "gradients")
    assert torch.equal(found(ids[:1], cu_seqlens=torch.tensor(BOUNDARIES[0])), found(ids[:1], cu_seqlens=BOUNDARIES[:1]))


def test_boundaries_must_be_of_the_sequences(folders):
    model, (ids, _) = load_hf(folders["mamba2"]), tokens()
    for wrong, message in (([0, 40], "of 1 sequences, allowed: a row for each of the 2"), ([[0, 40], [0, 39]], "end at .39.")):
        with pytest.raises(ValueError, match=f"cu_seqlens.* {message}"):
            model(ids, cu_seqlens=wrong)


@pytest.mark.parametrize("kind", PEERS)
def test_what_goes_in_comes_out(kind, folders, tmp_path):
    """Bit by bit, by the same names; and the library reads it, all of it."""
    save_hf(load_hf(folders[kind]), tmp_path / "out")
    before, after = read(folders[kind]), read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    kept = {key: value for key, value in config_of(tmp_path / "out").items() if key in config_of(folders[kind])}
    assert kept == config_of(folders[kind])
    loader = transformers.AutoModelForCausalLM
    again, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, _ = tokens()
    assert torch.equal(again(ids).logits, build(kind)(ids).logits)


def test_bf16_keeps_what_must_be_exact(tmp_path):
    source = save(build("jamba").to(torch.bfloat16), tmp_path / "bf16", max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    model = load_hf(source)
    dtypes = {name: p.dtype for name, p in model.model.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.rsplit(".", 1)[-1] for name in exact} == {"A_log", "D", "dt_bias"}
    assert {dtypes[name] for name in dtypes if name not in exact} == {torch.bfloat16}
    save_hf(model, tmp_path / "out")
    before, after = read(source), read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].to(torch.bfloat16)) for name in before)
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    wide = load_hf(source, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_several_files(folders, tmp_path):
    """As many as are needed, with an index; read as one is."""
    source = HFCheckpoint(folders["granitemoehybrid"])
    arguments = source.model, source.read, source.dtypes, source.values
    write_checkpoint(tmp_path / "out", *arguments, shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2
    # A tensor that is larger is a file by itself.
    assert all(file.stat().st_size < 70_000 or len(read_one(file)) == 1 for file in files)
    assert {name: file.name for file in files for name in read_one(file)} == index["weight_map"]
    before, after = read(folders["granitemoehybrid"]), read(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = HFCheckpoint(tmp_path / "out")
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.ours)


def read_one(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias is True, allowed: False"),
        ("jamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu', allowed: 'silu'"),
        ("jamba", {"num_experts_per_tok": 5}, "num_experts_per_tok: is 5, allowed: at most model.moe.experts, 4"),
        ("jamba", {"num_key_value_heads": 3}, "num_key_value_heads: is 3, allowed: a divisor of attention.heads, 4"),
        ("jamba", {"vocab_size": "many"}, "vocab_size: is 'many': Input should be a valid integer"),
        ("bamba", {"attention_bias": True}, "attention_bias is True, allowed: False"),
        ("bamba", {"z_loss_coefficient": 0.1}, "z_loss_coefficient is 0.1, allowed: 0.0"),
        ("bamba", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type is 'yarn'"),
        ("bamba", {"rope_scaling": {"type": "linear"}}, "rope_scaling.rope_type is 'linear', allowed: 'default'"),
        ("jamba", {"attn_layer_period": 0}, "attn_layer_period is 0, allowed: 1 and more"),
        ("jamba", {"attn_layer_period": "8"}, "values that do not make a model: "),
        ("bamba", {"time_step_limit": [0.0]}, "time_step_limit is [0.0], allowed: two numbers"),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "Mm"}, "hybrid_override_pattern has 'm', allowed: M"),
        ("granitemoehybrid", {"layer_types": ["mamba", "conv"]}, "layer_types has 'conv', allowed: mamba, linear_attention"),
        (
            "granitemoehybrid",
            {"position_embedding_type": "alibi"},
            "position_embedding_type is 'alibi', allowed: null",
        ),
        ("mamba2", {"use_bias": True}, "use_bias is True, allowed: False"),
        ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size is 8, allowed: None"),
        ("nemotron_h", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1, allowed: 0"),
        ("nemotron_h", {"layers_block_type": ["mlp", "mamba"]}, "the list of layers: letter 1 of '-M', '-', must follow a mixer"),
        ("nemotron_h", {"topk_group": 1, "n_group": 8}, "n_group: is 8, allowed: groups of two experts and more"),
        ("mamba2", {"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba', allowed: jamba, mamba2, bamba"),
    ],
)
def test_what_is_not_supported_is_named(kind, changed, message, folders):
    with pytest.raises(UserError) as caught:
        read_config(config_of(folders[kind]) | changed, "config.json")
    assert str(caught.value).startswith(f"config.json: {message}")


def damaged(source, folder, change):
    """A copy whose tensors are changed."""
    from safetensors.torch import save_file

    shutil.copytree(source, folder)
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), ": model.layers.1.self_attn.q_proj.weight is missing"),
        (lambda t: t.update(more=torch.ones(1)), ": more is of no part of a jamba as config.json has it"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2, 3)}), r": lm_head.weight is \[2, 3\], expected \[60, 32\] by config"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, folders, tmp_path):
    with pytest.raises(UserError, match=message):
        load_hf(damaged(folders["jamba"], tmp_path / "damaged", change))


def test_files_that_are_damaged_are_named(folders, tmp_path):
    copy = shutil.copytree(folders["jamba"], tmp_path / "copy")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"copy/model.safetensors: cannot be read: "):
        load_hf(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="copy: neither model.safetensors nor model.safetensors.index.json is there"):
        load_hf(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"copy/config.json: no JSON: "):
        load_hf(copy)


def test_older_names(folders, tmp_path):
    """Of Codestral's embedding, and NemotronH's as the library has them in memory."""
    for kind, old, new in (("mamba2", "backbone.embeddings.", "backbone.embedding."), ("nemotron_h", "backbone.", "model.")):

        def rename(tensors, old=old, new=new):
            for name in [name for name in tensors if name.startswith(old)]:
                tensors[name.replace(old, new, 1)] = tensors.pop(name)

        renamed, plain = load_hf(damaged(folders[kind], tmp_path / kind, rename)), load_hf(folders[kind])
        assert all(torch.equal(a, b) for a, b in zip(renamed.parameters(), plain.parameters(), strict=True))


HUB = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "rope_parameters": None, "rope_theta": 10000},
    "bamba": {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mamba_d_head": "auto"},
    "mamba2": {"norm_before_gate": True, "rms_norm": True, "residual_in_fp32": True},
    "nemotron_h": {"layers_block_type": None, "hybrid_override_pattern": "ME*-M*E", "time_step_min": None, "mamba_dt_min": 0.05},
    "jamba": {"mamba_dt_rank": "auto", "torch_dtype": "bfloat16", "sliding_window": None},
}
"""Keys as files on the hub, which older versions have written, have them."""


@pytest.mark.parametrize("kind", HUB)
def test_older_files_mean_the_same(kind, folders):
    values = config_of(folders[kind])
    expected, found = read_config(values, "new"), read_config(values | HUB[kind], "old")
    if kind == "jamba":
        expected = expected.model_copy(update={"mamba": expected.mamba.model_copy(update={"dt_rank": None})})
    assert found == expected


def test_null_is_no_value(folders):
    """As transformers takes it: the default, or as many heads of keys as of queries."""
    for kind in ("bamba", "granitemoehybrid"):
        found = read_config(config_of(folders[kind]) | {"num_key_value_heads": None, "tie_word_embeddings": None}, "config.json")
        assert found.attention.kv_heads == found.attention.heads == 4
        assert not found.tied_embeddings
    without = {key: value for key, value in config_of(folders["granitemoehybrid"]).items() if key != "num_key_value_heads"}
    assert read_config(without, "config.json").attention.kv_heads == 4


def test_routers_count_whole_tokens(tmp_path):
    """bf16 has 8 bits: hits of 1001 tokens do not fit."""
    model = load_hf(save(build("jamba").to(torch.bfloat16), tmp_path / "bf16"))
    model(torch.randint(0, 60, (1, 1001)))
    loads = [module.load for module in model.model.modules() if hasattr(module, "load")]
    assert [float(load.sum()) for load in loads] == [2002.0] * 2


OWN = {
    "jamba": ["model.pattern=m-mEm-*E", "model.padding_token=0", "model.mlp.hidden=16"],
    "mamba2": ["model.pattern=MMM"],
    "bamba": ["model.pattern=M-*-", "model.attention.rope={theta: 100.0, fraction: 0.5}", "model.mamba2.dt_max=0.5"],
    "granitemoehybrid": [
        "model.pattern=ME*E",
        "model.moe={experts: 4, top_k: 2, hidden: 16, shared_hidden: 8, renormalize: true}",
        "model.residual_scale=0.3",
        "model.attention.rope={}",
    ],
    "nemotron_h": [
        "model.pattern=MEM-*",
        "model.mlp.activation=relu2",
        "model.moe={experts: 4, top_k: 2, hidden: 16, shared_hidden: 8, scores: sigmoid, activation: relu2, bias_rate: 0.1}",
        "model.attention.rope=null",
        "model.mamba2.heads=10",
        "model.mamba2.dt_min=0.01",
    ],
}
"""Models that began here."""


@pytest.mark.parametrize("kind", OWN)
def test_models_of_our_own_go_out(kind, tmp_path):
    rope = [] if any("rope" in key for key in OWN[kind]) else ["model.attention.rope=null"]
    config = tiny_config([*rope, *OWN[kind]]).model
    model = build_model(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = model.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert write_checkpoint(tmp_path / "out", config, tensors.__getitem__, dtypes) == kind
    loader = transformers.AutoModelForCausalLM
    theirs, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, _ = tokens()
    assert relative_error(model(ids).detach(), theirs(ids).logits.detach()) <= 1e-5


def test_what_no_family_computes_is_said():
    with pytest.raises(UserError) as caught:
        write_config(tiny_config([]).model)
    for reason in ("jamba: model.", "mamba2: model.", "bamba: model.", "granitemoehybrid: model.", "nemotron_h: model."):
        assert reason in str(caught.value)
    aperiodic = tiny_config(["model.pattern=m-*-*-m-", "model.attention.rope=null"]).model
    with pytest.raises(UserError, match="jamba: its layers with attention do not come at one period"):
        write_config(aperiodic, "jamba")


def gradients_on_mesh(rank, file, overrides, rows):
    """Of a checkpoint on the config's mesh: whole gradients by our names, and the sum of losses as training weighs them."""
    from baton.launcher.training.checkpoint import Checkpointer
    from baton.launcher.training.optimizer import build_optimizer
    from baton.models.hybrid import MicroStep
    from baton.models.stages import build_stages
    from baton.parallel.layout import Layout
    from baton.parallel.mesh import build_mesh

    config = load_config(file, overrides, torch.distributed.get_world_size())
    mesh, device = build_mesh(config.parallel, "cpu"), torch.device("cpu")
    stages = build_stages(config, mesh, device)
    checkpointer = Checkpointer(config, stages, build_optimizer(stages.named_parameters(), config.optimizer))
    checkpointer.load_weights(file.parent)
    layout, place = Layout(config.parallel.layout, mesh.size("cp")), mesh.rank("cp")
    parts = [[layout.shard(tensor, place) for tensor in row] for row in rows]
    positions = layout.positions(place, rows[0][0].shape[1])
    micro_steps = [MicroStep(*part, positions, None) for part in parts]
    count = torch.tensor(sum(int((labels != -100).sum()) for _, labels in rows))
    losses = stages.forward_backward(micro_steps, count)
    torch.distributed.all_reduce(losses.cross_entropy, group=mesh.group("cp"))
    loss = losses.cross_entropy / count + losses.auxiliary / len(rows)
    return {name: p.grad.full_tensor() for name, p in stages.named_parameters()}, loss


@pytest.mark.parametrize("mesh", ["{tp: 2}", "{cp: 2, layout: zigzag}", "{pp: 2}"])
@pytest.mark.parametrize("kind", PEERS)
def test_imported_onto_a_mesh(pool, mesh, kind, folders, tmp_path):
    """Two sequences, a micro-step each: the loss and every gradient are theirs."""
    convert_from_hf(folders[kind], tmp_path / "out")
    ids, labels = tokens()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    rows = [(ids[i : i + 1], shifted[i : i + 1]) for i in range(2)]
    overrides = [f"parallel={mesh}", "batch={sequences: 2, micro_steps: 2}", "data={folder: nowhere, context: 40}"]
    overrides.append("model.mamba2.chunk_size=8")
    found = pool.run(2, gradients_on_mesh, tmp_path / "out" / "config.yaml", overrides, rows)
    model, count, total = build(kind), int((shifted != -100).sum()), 0.0
    for row, wanted in rows:
        out = model(row)
        total = total + F.cross_entropy(out.logits[0], wanted[0], reduction="sum") / count
        if getattr(out, "aux_loss", None) is not None:
            total = total + 0.1 * out.aux_loss / 2
    total.backward()
    reference = disk_gradients(model, tmp_path / "gradients")
    gradients = {name: tensor for rank, _ in found for name, tensor in rank.items()}
    assert all(relative_error(loss, total.detach()) <= 1e-5 for _, loss in found)
    source = HFCheckpoint(folders[kind])
    for theirs in hf_tensors(source.model, kind):
        if not all(is_exact(part.ours) and part.ours.endswith("feed_forward.bias") for part in theirs.parts):
            assert relative_error(theirs.join(gradients), reference[theirs.name]) <= 1e-5, theirs.name
