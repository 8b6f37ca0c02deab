"""Presets: each loads for the ranks that its first lines name, fits them, and has the sizes that these say."""

import itertools
import re
from typing import NamedTuple

import pytest
import torch

from baton.configs.loading import PRESETS, ConfigError, load_config
from baton.launcher.planner.estimate import Estimator
from baton.launcher.planner.machine import GiB, build_machine
from baton.launcher.planner.search import search
from baton.models.hf.families import read_config, write_config
from baton.models.hybrid import HybridModel


class Preset(NamedTuple):
    parameters: int
    active: int
    """Of them, those that a token passes: all but the experts that it does not choose."""
    ranks: int


TABLE = {
    "quickstart": Preset(1_453_640, 1_158_728, 2),
    "jamba_tiny": Preset(1_646_072, 1_252_856, 2),
    "jamba_1b": Preset(1_295_502_096, 616_024_848, 8),
    "mamba2_2.7b": Preset(2_702_599_680, 2_702_599_680, 8),
    "nemotron_h_30b": Preset(31_577_937_344, 3_580_073_408, 32),
    "jamba_v0.1": Preset(51_570_323_328, 12_110_311_296, 64),
    "jamba_52b": Preset(51_316_861_696, 11_856_849_664, 64),
    "jamba_52b_256k": Preset(51_316_861_696, 11_856_849_664, 64),
    "jamba_52b_1m": Preset(51_316_861_696, 11_856_849_664, 64),
}
ON_GPUS = [name for name in TABLE if name not in ("quickstart", "jamba_tiny")]


def first_lines(name):
    """The comment that a preset begins with."""
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def h200(name):
    return build_machine("h200", TABLE[name].ranks, "bf16", None, "ib_ndr", [])


def test_the_table_has_all_presets():
    assert sorted(TABLE) == sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("name", TABLE)
def test_parameters(name):
    model = load_config(name).model
    with torch.device("meta"):
        parameters = dict(HybridModel(model).named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    stacked = sum(parameter.numel() for key, parameter in parameters.items() if ".experts.stacked." in key)
    assert (total, total - stacked + stacked * model.moe.top_k // model.moe.experts) == TABLE[name][:2]


@pytest.mark.parametrize("name", ["jamba_tiny", *ON_GPUS])
def test_first_lines_say_the_sizes(name):
    text, sizes, units = first_lines(name), TABLE[name], {"B": 1e9, "M": 1e6}
    parameters, unit, active, other = re.search(r"([\d.]+) ([BM]) parameters, ([\d.]+) ([BM]) active", text).groups()
    assert parameters == f"{sizes.parameters / units[unit]:.3f}"
    assert active == f"{sizes.active / units[other]:.3f}"
    assert f"# {sizes.ranks} {'x H200.' if name in ON_GPUS else 'CPU processes,'}" in text


def refusal(name, world):
    """Of so many ranks; empty where they are allowed."""
    try:
        load_config(name, [], world)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", TABLE)
def test_loads_for_its_ranks(name):
    """As it stands; others are allowed, or refused in one line with the key and what is allowed."""
    assert refusal(name, TABLE[name].ranks) == ""
    said = [refusal(name, world) for world in (1, 2, 3, 4, 7, 16)]
    assert name not in ON_GPUS or all(said)
    for line in filter(None, said):
        assert re.fullmatch(rf".*{re.escape(name)}\.yaml:\d+: parallel\..*(allowed: | or cp of ).+", line), line


@pytest.mark.parametrize("name", ON_GPUS)
def test_fits_as_its_first_lines_say(name):
    """Memory, a step's time and MFU are the planner's for the preset's own mesh; the commands are for its GPUs."""
    machine, text, ranks = h200(name), first_lines(name), TABLE[name].ranks
    config = load_config(name, [], ranks)
    found = Estimator(config, machine).estimate(config)
    assert found.largest <= machine.memory
    said = f"{found.largest / GiB:.0f} of {machine.memory / GiB:.0f} GiB a GPU, {found.seconds:.3g} s a step, {found.mfu:.0%} MFU"
    assert f"Planned, not measured: {said} (`baton plan {name} --gpus {ranks}`)." in text
    assert f"--nproc-per-node {machine.per_node}" in text
    assert f"--nnodes {machine.nodes}" in text or machine.nodes == 1
    assert f"--no-python baton train {name} --input FOLDER" in text


@pytest.mark.parametrize("name", ON_GPUS)
def test_has_the_best_plan(name):
    """What `baton plan` finds for its GPUs, whatever mesh the preset has, is that mesh."""
    preset = load_config(name, [], TABLE[name].ranks)
    best = search(load_config(name, ["parallel={}", "batch.micro_steps=1"]), h200(name), {}).best[0].config
    assert (best.parallel, best.batch) == (preset.parallel, preset.batch)


PUBLISHED = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 65536,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 256,
}
"""Of AI21's config.json, what a model is made by; `pad_token_id`: not trained."""


def test_jamba_is_as_published():
    """Both ways, and Jamba's balance of experts over all layers."""
    model = load_config("jamba_v0.1").model
    assert write_config(model) == PUBLISHED
    again = read_config(PUBLISHED, "config.json")
    assert again.layers == model.layers
    sizes = ("vocab_size", "d_model", "norm_eps", "padding_token", "tied_embeddings", "mamba", "attention", "mlp", "moe")
    assert again.model_dump(include=set(sizes)) == model.model_dump(include=set(sizes))


@pytest.mark.parametrize(
    ("name", "family"),
    [("jamba_tiny", "jamba"), ("jamba_52b", "jamba"), ("mamba2_2.7b", "mamba2"), ("nemotron_h_30b", "nemotron_h")],
)
def test_is_one_of_hugging_faces(name, family):
    assert write_config(load_config(name).model)["model_type"] == family
