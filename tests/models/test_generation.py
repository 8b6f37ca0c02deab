"""Generation is what the full forward says, token by token: in chunks, in batches, over tp and cp, and of imported models."""

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from baton.models.generation import Sampler, generate, greedy, join, new_state, read, read_sharded, restore
from baton.models.hf import load_hf
from baton.models.hybrid import MicroStep, build_model
from baton.models.mixers.state import KVCache
from baton.models.parallelize import build_replica, leave_sequence
from baton.models.stages import build_stages
from baton.parallel.layout import Layout
from baton.parallel.mesh import build_mesh
from helpers import relative_error, tiny_config

COUNT = 12
MODELS = {
    "hybrid": ["model.pattern=M-mEM-*E", "model.mamba={state_dim: 5, dt_rank: 3}", "model.attention.scale=0.3"],
    "mamba": ["model.pattern=m-mE", "model.mamba.state_dim=6"],
    "mamba2": ["model.pattern=M-M-", "model.mamba2.dt_min=0.05", "model.mamba2.dt_max=0.7"],
}


def config_of(name, world=1, *more):
    return tiny_config([*MODELS[name], "precision=fp64", "model.initializer_range=0.3", *more], world)


def model_of(config):
    """Every number of it at random, so that no norm and no bias hides."""
    model = build_model(config.model, config.seed, torch.float64).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def prompt(length, seed=1):
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_full_forwards(model, ids, count=COUNT):
    """The tokens after ids [1, l], each by the whole sequence again, and the logits that they are of [count, vocab]."""
    logits = []
    for _ in range(count):
        logits.append(model(ids)[0, -1])
        ids = torch.cat([ids, logits[-1].argmax()[None, None]], 1)
    return ids[0, -count:].tolist(), torch.stack(logits)


def go_on(model, state, count=COUNT):
    """The tokens of each row, and the logits that they are of [count, b, vocab]."""
    tokens, logits = [], []
    for ids in generate(model, state, count, greedy):
        tokens.append(ids)
        logits.append(state.logits)
    return torch.stack(tokens, 1).tolist(), torch.stack(logits)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_full_forward(name):
    """Whatever chunks the prompt came in, of odd sizes, shorter than the convolution, and all at once."""
    model, ids = model_of(config_of(name)), prompt(29)
    tokens, logits = by_full_forwards(model, ids)
    assert len(set(tokens)) > 3
    for chunk in (1, 2, 5, 13, 29, 64):
        state = read(model, ids, new_state(model, 29 + COUNT), chunk)
        found, steps = go_on(model, state)
        assert found == [tokens], chunk
        assert relative_error(steps[:, 0], logits) <= 1e-10, chunk


def test_a_state_has_one_size():
    """Allocated by the first token: what follows changes it in place, and only keys and values grow."""
    model = model_of(config_of("hybrid"))
    state = read(model, prompt(9), new_state(model, 60), 4)
    places = {name: (t.data_ptr(), t.untyped_storage().nbytes()) for name, t in state.tensors().items() if name != "logits"}
    recurrent, cache = state.recurrent_bytes, state.cache_bytes
    go_on(model, state, 41)
    after = {name: (t.data_ptr(), t.untyped_storage().nbytes()) for name, t in state.tensors().items() if name != "logits"}
    assert after == places
    assert state.recurrent_bytes == recurrent
    assert state.cache_bytes == cache * 49 // 9
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(ValueError, match="49 and 12 more tokens in a cache with room for 60"):
        read(model, prompt(12), state, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert all(state.layers[name].tail.untyped_storage().nbytes() == state.layers[name].tail.nbytes for name in "01")


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_each_alone(name, poisoned):
    """Of different lengths, also shorter than the convolution; and of one length. Nothing is read that was not written."""
    model = model_of(config_of(name))
    for lengths in ((2, 31, 9), (7, 7)):
        prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
        expected = [go_on(model, read(model, ids, new_state(model, 60))) for ids in prompts]
        found, logits = go_on(model, join([read(model, ids, new_state(model, 60)) for ids in prompts], 60))
        assert found == [tokens for (tokens,), _ in expected]
        for row, (_, alone) in enumerate(expected):
            assert relative_error(logits[:, row], alone[:, 0]) <= 1e-10


def test_a_state_can_be_kept():
    """And more text read after it, than which nothing else was read: as if all came at once."""
    model, ids = model_of(config_of("hybrid")), prompt(40)
    tokens, _ = by_full_forwards(model, ids)
    kept = {name: tensor.clone() for name, tensor in read(model, ids[:, :23], new_state(model, 23)).tensors().items()}
    once = restore(kept, 23, 60)
    assert go_on(model, read(model, ids[:, 23:], once))[0] == [tokens]
    assert go_on(model, read(model, ids[:, 23:], restore(kept, 23, 60), 3))[0] == [tokens]
    assert go_on(model, restore(kept, 23, 60))[0] == [by_full_forwards(model, ids[:, :23])[0]]


def filled(config, mesh):
    """The replica with `model_of`'s numbers."""
    replica, whole = build_replica(config, mesh, torch.device("cpu")), dict(model_of(config).named_parameters())
    with torch.no_grad():
        for name, parameter in replica.named_parameters():
            value = whole[name].detach()
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
    return replica


LENGTHS, FEW = (131, 7, 128), 4
"""Over segments of cp 2 and 4: with a rest, too short to be cut, and without a rest."""


def over_a_mesh(rank, config):
    """Prompts read over cp, then a batch on the ranks that hold their ends -> its tokens and logits; None on others."""
    mesh = build_mesh(config.parallel, "cpu")
    layout, model = Layout("zigzag", mesh.size("cp")), filled(config, mesh)
    prompts, states = [prompt(length, length) for length in LENGTHS], []
    for ids in prompts:
        states.append(new_state(model, ids.shape[1]))
        done = read_sharded(model, ids, states[-1], layout, mesh) if layout.ranks > 1 else 0
        assert done == (0 if ids.shape[1] == 7 or layout.ranks == 1 else ids.shape[1] - ids.shape[1] % len(layout.owners))
        prompts[len(states) - 1] = ids[:, done:]
    leave_sequence(model)
    if mesh.rank("cp"):
        return None
    states = [read(model, ids, state) if ids.shape[1] else state for ids, state in zip(prompts, states, strict=True)]
    return go_on(model, join(states, max(LENGTHS) + FEW), FEW)


@pytest.mark.parametrize(
    ("name", "parallel", "more"),
    [
        ("hybrid", {"tp": 2}, []),
        ("hybrid", {"tp": 4}, []),
        ("mamba", {"tp": 2}, []),
        ("mamba2", {"tp": 2}, []),
        ("hybrid", {"cp": 2}, []),
        ("hybrid", {"cp": 4}, ["attention: ring", "strategy: ring"]),
        ("hybrid", {"tp": 2, "cp": 2}, ["attention: allgather"]),
        ("mamba", {"cp": 2}, []),
        ("mamba2", {"cp": 2}, []),
    ],
)
def test_over_tp_and_cp(pool, name, parallel, more):
    values = [*(f"{axis}: {degree}" for axis, degree in parallel.items()), "layout: zigzag", *more]
    world = parallel.get("tp", 1) * parallel.get("cp", 1)
    config = config_of(name, world, f"parallel={{{', '.join(values)}}}", "data.context=112")
    found = pool.run(world, over_a_mesh, config)
    expected = [by_full_forwards(model_of(config), prompt(length, length), FEW) for length in LENGTHS]
    tp = parallel.get("tp", 1)
    assert all(result is None for result in found[tp:])
    for tokens, logits in found[:tp]:
        assert tokens == [each for each, _ in expected]
        for row, (_, wanted) in enumerate(expected):
            assert relative_error(logits[:, row], wanted) <= 1e-10


def in_bf16(rank, config):
    """Logits of the model in training, and of the replica with its weights."""
    mesh = build_mesh(config.parallel, "cpu")
    stages, replica = build_stages(config, mesh, torch.device("cpu")), build_replica(config, mesh, torch.device("cpu"))
    whole = {name: p.full_tensor().detach() for name, p in stages.named_parameters()}
    with torch.no_grad():
        for name, parameter in replica.named_parameters():
            parameter.copy_(whole[name])
        ids = prompt(48)
        with stages.evaluation():
            trained = stages.forward(MicroStep(ids, None, torch.arange(48), None))
        state, exact = new_state(replica, 48), build_model(config.model, 0, torch.float64).eval()
        for name, parameter in exact.named_parameters():
            parameter.copy_(whole[name])
        steps = torch.cat([read(replica, part, state, 7).logits for part in ids.split([20, *[1] * 28], 1)])
        dtypes = {name: p.dtype for name, p in replica.named_parameters()}
        return trained, replica(ids), steps, exact(ids), dtypes


def test_bf16_is_that_of_training(pool):
    """Bit by bit; what is in fp32 there is here. Chunks and steps are as far from fp64 as the full forward, twice at most."""
    config = tiny_config([*MODELS["hybrid"], "precision=bf16"])
    ((trained, found, steps, exact, dtypes),) = pool.run(1, in_bf16, config)
    assert torch.equal(trained, found)
    assert relative_error(steps, exact[0, 19:]) <= 2 * relative_error(found[0, 19:], exact[0, 19:])
    exact = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {"ssm.A_log", "ssm.D", "ssm.dt_bias", "router.weight"}
    assert {*dtypes.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("kind", ["jamba", "mamba2", "bamba", "granitemoehybrid", "nemotron_h"])
def test_imported_models_step_as_theirs(kind, tmp_path):
    """Token by token as transformers' full forward; and as its own steps, where those are what its forward is.

    They are not with limits of the SSD's steps, which they ignore, nor in Bamba, unless it is told the token's position.
    """
    pytest.importorskip("transformers", reason="transformers, the peer, is not installed: pip install -e .[dev]")
    from models.hf_peers import build, save, tokens

    ids, _ = tokens(24, 1)
    unlimited = {"jamba": {}, "nemotron_h": {"time_step_min": 1e-6}}.get(kind, {"time_step_limit": (0.0, float("inf"))})
    with torch.no_grad():
        for number, changed in enumerate(({}, unlimited)):
            theirs = build(kind, **changed).eval()
            ours = load_hf(save(theirs, tmp_path / str(number))).model
            state = read(ours, ids[:, :14], new_state(ours, 24))
            steps = [state.logits[0], *(read(ours, ids[:, [t]], state).logits[0] for t in range(14, 24))]
            assert relative_error(torch.stack(steps), theirs(ids).logits[0, 13:]) <= 1e-5
        out = theirs(ids[:, :14], use_cache=True)
        cache = {"past_key_values": out.past_key_values} if "past_key_values" in out else {"cache_params": out.cache_params}
        for t, step in zip(range(14, 24), steps[1:], strict=True):
            where = {} if kind == "mamba2" else {"position_ids": torch.tensor([[t]])}
            assert relative_error(step, theirs(ids[:, [t]], use_cache=True, **cache, **where).logits[0, 0]) <= 1e-5


def test_sampler():
    """Shares of draws are the probabilities, at a temperature, of the most likely tokens that are together top_p likely."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 5.0, 5.0]])

    def shares(sampler, draws=4000):
        counts = torch.zeros_like(logits)
        for _ in range(draws):
            counts[torch.arange(2), sampler(logits)] += 1
        return counts / draws

    warm = (logits / 2).softmax(-1)
    assert (shares(Sampler(2.0, 1.0, 0)) - warm).abs().max() < 0.03
    # Of the first row two tokens have 0.88 of 1 together, one 0.64.
    narrow = shares(Sampler(1.0, 0.7, 0))
    two = logits[0].softmax(-1)[[1, 2]]
    assert (narrow[0, [1, 2]] - two / two.sum()).abs().max() < 0.03
    assert narrow[0, [0, 3]].sum() == 0
    assert shares(Sampler(1e-310, 1.0, 0), 50)[0].tolist() == [0, 1, 0, 0]
    assert shares(Sampler(1.0, 0.5, 0), 50)[0].tolist() == [0, 1, 0, 0]
    drawn = [[Sampler(1.0, 1.0, seed)(logits).tolist() for _ in range(2)] for seed in range(8)]
    assert all(one == two for one, two in drawn)
    assert len({str(one) for one, _ in drawn}) > 1


def test_cache_of_rows_of_different_lengths():
    """Each row sees its own tokens alone: not what lies between its end and that of longer ones."""
    cache = KVCache(8)
    cache.append(torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4))
    cache.lengths, cache.shortest = torch.tensor([5, 2]), 2
    k, v, q = torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4), torch.randn(2, 1, 2, 4)
    cache.keys[1, :, 2:] = 1e3
    for wrong in (lambda: cache.append(k.expand(2, 2, 1, 4), v.expand(2, 2, 1, 4)), cache.tensors):
        with pytest.raises(ValueError, match="rows of different lengths"):
            wrong()
    cache.append(k, v)
    scores = (q[1, 0] @ torch.cat([cache.keys[1, 0, :2], k[1, 0]]).T) / 2
    expected = scores.softmax(-1) @ torch.cat([cache.values[1, 0, :2], v[1, 0]])
    assert relative_error(cache.attend(q)[1, 0], expected) <= 1e-6
