"""Configs: every wrong one ends in one line that names file, line, key, value, and what is allowed."""

from pathlib import Path

import pytest

from baton.configs.loading import PRESETS, ConfigError, load_config
from baton.configs.pattern import parse_pattern

QUICKSTART = (PRESETS / "quickstart.yaml").read_text()
PIPELINE = ["parallel.pp=2", "batch={sequences: 4, micro_steps: 4}"]
INTERLEAVED = [*PIPELINE, "parallel.schedule=interleaved_1f1b"]


def line_of(text):
    return next(i for i, line in enumerate(QUICKSTART.splitlines(), 1) if line.strip().startswith(text))


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ("d_model: 128", "d_model: wide", "d_model:", "model.d_model is 'wide', allowed: a valid integer"),
        ("groups: 2", "groups: 3", "groups:", "model.mamba2.groups is 3, allowed: a divisor of the Mamba-2 heads, 8"),
        ("top_k: 2", "top_k: 9", "top_k:", "model.moe.top_k is 9, allowed: at most model.moe.experts, 4"),
        ("  clip: 1.0", "  clap: 1.0", "clip:", "optimizer.clap is no key of this section; allowed: lr, betas"),
        (
            '"M-MEM-*E" ',
            '"M-MxM-*E" ',
            "pattern:",
            "model.pattern letter 4 of 'M-MxM-*E', 'x', is none of M mamba2, m mamba, * attention",
        ),
        ("  pp: 1", "  pp: 0", "pp:", "parallel.pp is 0, allowed: greater than or equal to 1"),
        ("  pp: 1", "  pp: 5", "pp:", "parallel.pp gives 5 stages, allowed: at most one for each of the 4 layers"),
        ("  pp: 1", "  pp: 2", "micro_steps:", "batch.micro_steps is 1, allowed: at least one for each of the 2 stages"),
        ("  ep: 1", "  ep: 3", "ep:", "parallel.ep is 3, allowed: a divisor of model.moe.experts, 4"),
        (
            '"M-MEM-*E" ',
            '"M|-" ',
            "pattern:",
            "model.pattern letter 3 of 'M|-', '-', must follow a mixer (M mamba2, m mamba, * attention)",
        ),
        ('"M-MEM-*E" ', '"M||M" ', "pattern:", "model.pattern letter 3 of 'M||M', '|', cuts nothing; allowed: after a layer"),
        ('"M-MEM-*E" ', '"|MM" ', "pattern:", "model.pattern letter 1 of '|MM', '|', cuts nothing; allowed: after a layer"),
        ("schedule: 1f1b", "schedule: gpipe", "schedule:", "parallel.schedule is 'gpipe', allowed: '1f1b' or 'interleaved_1f1b'"),
        ("zero: 3", "zero: 1", "zero:", "parallel.zero is 1, allowed: 2 or 3"),
        ("balance: layer", "balance: token", "balance:", "model.moe.balance is 'token', allowed: 'layer' or 'pooled'"),
        ("capacity: null", "capacity: 0", "capacity:", "model.moe.capacity is 0, allowed: greater than 0"),
        (
            "implementation: auto",
            "implementation: sgd",
            "implementation:",
            "optimizer.implementation is 'sgd', allowed: ",
        ),
        ("layout: zigzag", "layout: spiral", "layout:", "parallel.layout is 'spiral', allowed: 'contiguous' or 'zigzag'"),
        ("  clip: 1.0", "  clip-norm: 1.0", "clip:", "optimizer.clip-norm is no key of this section; allowed: lr, betas"),
        ("betas: [0.9, 0.95]", "betas: [1.0, 0.95]", "betas:", "optimizer.betas.0 is 1.0, allowed: less than 1"),
        ("lr: 6.0e-3", "lr: .inf", "lr:", "optimizer.lr is inf, allowed: a finite number"),
        ("seed: 0", "seed: true", "seed:", "seed is True, allowed: a valid integer"),
        ("seed: 0", "seed: 9223372036854775808", "seed:", "seed is 9223372036854775808, allowed: less than 9223372036854775808"),
        ("run: runs/quickstart", "run: 3", "run:", "run is 3, allowed: a path"),
        ("  dp: auto", "  dp: 0", "dp:", "parallel.dp is 0, allowed: auto, or 1 and more"),
        ("micro_steps: 1", "micro_steps: 2", "micro_steps:", "batch.micro_steps is 2, allowed: a divisor of batch.sequences, 1"),
        ("  tp: 1", "  tp: 3", "tp:", "parallel.tp is 3, which does not divide model.vocab_size"),
        ("  experts: 4", "  experts: 5000", "experts:", "model.moe.experts is 5000, allowed: at most a micro-step's tokens, 4096"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, old, new, at, message):
    file = tmp_path / "wrong.yaml"
    assert QUICKSTART.count(old) == 1, "the preset has changed"
    file.write_text(QUICKSTART.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}:{line_of(at)}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\nseed: 2", ":2: no YAML: "),
        ("", ":1: holds no keys"),
        ("- 1", ":1: holds no keys"),
        ("seed: !foo 0\n", ":1: no YAML: could not determine a constructor for the tag '!foo'"),
        ("run: 2024-13-45\n", "no YAML: month must be in 1..12"),
        ("? [1, 2]\n: 3\n", ":1: no YAML: found unhashable key"),
        ("seed: 1\nseed: 2\n", ":2: seed is written twice"),
        ("seed: 1\n", ": run is missing"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_lists_the_presets():
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file; allowed: a YAML file, or a preset: .*quickstart"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.cp", "override 'parallel.cp': allowed: dotted.key=value"),
        ("model..d_model=1", "allowed: dotted.key=value"),
        ("seed.x=1", "override 'seed.x=1': seed holds a value, no keys"),
        ("model.d_model=yes", "override model.d_model=yes: model.d_model is True, allowed: a valid integer"),
        ("model.mamba2.head_dim=48", "override model.mamba2.head_dim=48: model.mamba2.head_dim is 48, allowed: a divisor"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.cp=2"], 3, "parallel.cp gives tp 1 * cp 2 = 2 on 3 ranks; allowed: a multiple of 2 ranks"),
        (["parallel.cp=2", "parallel.dp=1"], 4, "parallel.dp gives tp 1 * cp 2 * dp 1 = 2 on 4 ranks"),
        (["parallel.cp=2"], 4, "parallel.dp is 2, allowed: a divisor of a micro-step's sequences, 1"),
        ([], 3, "parallel.cp is 3, whose 6 zigzag segments do not divide data.context (4096); data.context=4092 would"),
        (["parallel.cp=512", "parallel.layout=contiguous", "data.context=1024"], 512, "shorter than the conv's reach, 3"),
        (["parallel.cp=8", "data.context=448"], 8, "more ranks than the 7 chunks of model.mamba2.chunk_size (64)"),
        (["parallel.cp=8", "parallel.attention=ulysses"], 8, "4 heads (model.attention.heads over tp 1) do not divide over cp 8"),
        (["parallel.cp=4", "parallel.tp=2", "parallel.attention=ulysses"], 8, "allowed: usp, ring, allgather, auto, or cp of 1, 2"),
        (["parallel.tp=8"], 8, "allowed: 1, 2, 4"),
        (["parallel.tp=2", "model.moe.shared_hidden=9"], 2, "does not divide model.moe.shared_hidden (9); allowed: 1"),
        (PIPELINE, 3, "parallel.pp gives tp 1 * pp 2 = 2 on 3 ranks; allowed: a multiple of 2 ranks"),
        ([*PIPELINE, "parallel.cp=2"], 2, "parallel.cp gives tp 1 * pp 2 * cp 2 = 4 on 2 ranks; allowed: a multiple of 4 ranks"),
        ([*PIPELINE, "parallel.cp=2"], 12, "parallel.dp is 3, allowed: a divisor of a micro-step's sequences, 1"),
        (
            ["parallel.dp=2", "batch.sequences=2", "parallel.replicate=2", "parallel.ep=2"],
            2,
            "parallel.ep is 2, allowed: a divisor of dp * cp / replicate, 1",
        ),
        (["parallel.ep=4"], 2, "parallel.ep is 4, allowed: a divisor of dp * cp, 2"),
        (["parallel.ep=2", "model.pattern=M-"], 2, "parallel.ep is 2, and model.pattern has no experts (E); allowed: 1"),
        (
            ["parallel.dp=6", "parallel.cp=1", "batch.sequences=6", "parallel.ep=2"],
            6,
            "over the 3 ranks that hold the same experts, which do not divide model.d_model (128); allowed: 1",
        ),
        (
            ["parallel.dp=6", "parallel.cp=1", "batch.sequences=6", "parallel.ep=2", "model.moe.experts=6"],
            6,
            "model.d_model (128); allowed: 1, 3, 6",
        ),
        (["parallel.replicate=2"], 2, "parallel.replicate is 2, allowed: a divisor of parallel.dp, 1"),
        (
            ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.layout=contiguous", "data.context=66"],
            4,
            "parallel.sequence_parallel is True: 33 tokens of a cp rank do not divide over tp 2; allowed: false, or for "
            "data.context a multiple of cp * tp, 4",
        ),
    ],
)
def test_degrees_that_do_not_fit_say_what_would(overrides, world, message):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", overrides, world)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*PIPELINE, "parallel.stages_per_rank=2"],
            "parallel.stages_per_rank is 2, allowed: 1 with 1f1b; 2 and more with",
        ),
        (INTERLEAVED, "parallel.stages_per_rank is 1, allowed: 2 and more with interleaved_1f1b"),
        (
            ["parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=2"],
            "parallel.schedule is interleaved_1f1b, allowed with parallel.pp 1: 1f1b",
        ),
        (
            [*INTERLEAVED, "parallel.stages_per_rank=2", "batch={sequences: 5, micro_steps: 5}"],
            "batch.micro_steps is 5, allowed with interleaved_1f1b: a multiple of pp, 2",
        ),
        (
            [*PIPELINE, "model.pattern=M|M", "model.repeat=2"],
            "parallel.pp gives 2 stages (parallel.stages_per_rank is 1), and the | of model.pattern (model.repeat is 2) make 3; "
            "allowed: 3 stages, or a pattern without |",
        ),
        (
            [*INTERLEAVED, "parallel.stages_per_rank=2", "model.pattern=M|MMM"],
            "parallel.pp gives 4 stages (parallel.stages_per_rank is 2), and the | of model.pattern (model.repeat is 1) make 2",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_says_what_can(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["zbv", "ZBVZeroBubble", "ScheduleInterleavedZeroBubble", "zero_bubble", "zero-bubble", "zb1p", "zb-h1", "dualpipev"]
)
def test_zero_bubble_is_refused_by_name(name):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [f"parallel.schedule={name}"])
    assert f"parallel.schedule is {name!r}, allowed: 1f1b, interleaved_1f1b; not zero-bubble schedules" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "repeat", "cuts"),
    [
        ("M-M", 2, []),
        ("M-|*E", 1, [1]),
        ("M-|*E", 2, [1, 3]),
        ("M-*E|", 1, []),
        ("M-*E|", 3, [2, 4]),
        ("M|M-|*", 2, [1, 2, 4, 5]),
    ],
)
def test_cuts_stand_before_the_layers_that_follow(pattern, repeat, cuts):
    model = load_config("quickstart", [f'model.pattern="{pattern}"', f"model.repeat={repeat}"]).model
    assert model.cuts == cuts
    assert model.layers == [*parse_pattern(pattern.replace("|", "")) * repeat]


def test_pipelines_that_fit():
    assert load_config("quickstart", PIPELINE, 4).parallel.stages == 2
    assert load_config("quickstart", [*PIPELINE, "model.pattern=M|M|", "model.repeat=1"], 2).model.cuts == [1]
    assert load_config("quickstart", [*INTERLEAVED, "parallel.stages_per_rank=2", "model.pattern=M|M|", "model.repeat=2"], 2)
    # One rank ignores the cuts: a checkpoint of a pipeline goes on there.
    assert load_config("quickstart", ["model.pattern=M|M"], 1).parallel.stages == 1


def test_auto_takes_what_is_left():
    assert load_config("quickstart", [*PIPELINE, "parallel.tp=2"], 8).parallel.cp == 2
    assert load_config("quickstart", ["parallel.tp=2"], 4).parallel.cp == 2
    assert load_config("quickstart", ["parallel.cp=2", "batch.sequences=2"], 4).parallel.dp == 2


def test_a_config_survives_its_own_yaml(tmp_path):
    config = load_config("quickstart", ["model.attention.rope={}", "data.input=[a b.txt]", "parallel.cp=2"], 2)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(Path(tmp_path / "again.yaml")) == config


def test_pattern():
    assert [tuple(layer) for layer in parse_pattern("M-*EM")] == [("mamba2", "mlp"), ("attention", "moe"), ("mamba2", None)]
    for wrong in ("-M", "M--", "", "M|-", "M||M", "|M", "|"):
        with pytest.raises(ValueError, match="letter|no layer"):
            parse_pattern(wrong)
