"""Configs: every wrong one ends in one line that names file, line, key, value, and what is allowed."""

from pathlib import Path

import pytest

from baton.configs.loading import PRESETS, ConfigError, load_config
from baton.configs.pattern import parse_pattern

QUICKSTART = (PRESETS / "quickstart.yaml").read_text()


def line_of(text):
    return next(i for i, line in enumerate(QUICKSTART.splitlines(), 1) if line.strip().startswith(text))


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ("d_model: 128", "d_model: wide", "d_model:", "model.d_model is 'wide', allowed: a valid integer"),
        ("groups: 2", "groups: 3", "groups:", "model.mamba2.groups is 3, allowed: a divisor of the Mamba-2 heads, 8"),
        ("top_k: 2", "top_k: 9", "top_k:", "model.moe.top_k is 9, allowed: at most model.moe.experts, 4"),
        ("  clip: 1.0", "  clap: 1.0", "clip:", "optimizer.clap is no key of this section; allowed: lr, betas"),
        ('"M-MEM-*E" ', '"M-MxM-*E" ', "pattern:", "model.pattern letter 4 of 'M-MxM-*E', 'x', is none of M mamba2, * attention"),
        ("  pp: 1", "  pp: 2", "pp:", "parallel.pp is 2: degrees beyond 1 on this axis are not available yet; allowed: 1"),
        ("  ep: 1", "  ep: 4", "ep:", "parallel.ep is 4: degrees beyond 1 on this axis are not available yet"),
        ("layout: zigzag", "layout: spiral", "layout:", "parallel.layout is 'spiral', allowed: 'contiguous' or 'zigzag'"),
        ("  clip: 1.0", "  clip-norm: 1.0", "clip:", "optimizer.clip-norm is no key of this section; allowed: lr, betas"),
        ("betas: [0.9, 0.95]", "betas: [1.0, 0.95]", "betas:", "optimizer.betas.0 is 1.0, allowed: less than 1"),
        ("lr: 6.0e-3", "lr: .inf", "lr:", "optimizer.lr is inf, allowed: a finite number"),
        ("seed: 0", "seed: true", "seed:", "seed is True, allowed: a valid integer"),
        ("  dp: auto", "  dp: 0", "dp:", "parallel.dp is 0, allowed: auto, or 1 and more"),
        ("micro_steps: 1", "micro_steps: 2", "micro_steps:", "batch.micro_steps is 2, allowed: a divisor of batch.sequences, 1"),
        ("  tp: 1", "  tp: 3", "tp:", "parallel.tp is 3, which does not divide model.vocab_size"),
        ("  experts: 4", "  experts: 5000", "experts:", "model.moe.experts is 5000, more than a micro-step's 4096 tokens"),
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
    ],
)
def test_degrees_that_do_not_fit_say_what_would(overrides, world, message):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", overrides, world)
    assert message in str(caught.value)


def test_auto_takes_what_is_left():
    assert load_config("quickstart", ["parallel.tp=2"], 4).parallel.cp == 2
    assert load_config("quickstart", ["parallel.cp=2", "batch.sequences=2"], 4).parallel.dp == 2


def test_a_config_survives_its_own_yaml(tmp_path):
    config = load_config("quickstart", ["model.attention.rope={}", "data.input=[a b.txt]", "parallel.cp=2"], 2)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(Path(tmp_path / "again.yaml")) == config


def test_pattern():
    assert [tuple(layer) for layer in parse_pattern("M-*EM")] == [("mamba2", "mlp"), ("attention", "moe"), ("mamba2", None)]
    for wrong in ("-M", "M--", "", "M|M"):
        with pytest.raises(ValueError, match="letter|no layer"):
            parse_pattern(wrong)
