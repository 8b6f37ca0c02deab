"""Parts of the hybrid on one device, each against its definition written out token by token in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from baton.models.hybrid import build_model
from baton.models.initialization import initialize
from baton.models.mixers.attention import Attention
from baton.models.mixers.mamba import Mamba
from baton.models.mixers.mamba2 import Mamba2
from baton.models.mixers.state import RecurrentState
from baton.models.moe import MoE, auxiliary_loss
from helpers import relative_error, tiny_config


def filled(kind, overrides=()):
    """A part with parameters at random, also those that start at 0 or 1."""
    config = tiny_config(list(overrides)).model
    part = kind(config).double()
    initialize(part, "part", 0, 0.3, 1, {})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return part, config


def inputs(length=11):
    return torch.randn(2, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conv(t, weight, bias):
    taps = weight.shape[1]
    padded = F.pad(t, (0, 0, taps - 1, 0))
    return F.silu(sum(padded[:, k : k + t.shape[1]] * weight[:, k] for k in range(taps)) + bias)


@torch.no_grad()
def in_steps(part):
    """What comes of the inputs one after another."""
    state = RecurrentState()
    return torch.cat([part(u, state=state) for u in inputs().split(1, 1)], 1)


def mamba_by_definition(part, config, u):
    """Jamba's order of things: projections, convolution and SiLU, dt, B and C with their norms, recurrence, gate, out."""
    rank, n = config.dt_rank, config.mamba.state_dim
    x = conv(part.x_proj(u), part.conv.x_weight, part.conv.x_bias)
    dt, B, C = (x @ part.select.dtbc_proj.weight.T).split([rank, n, n], -1)
    if config.mamba.norms:
        norms = part.select.dt_norm, part.select.b_norm, part.select.c_norm
        dt, B, C = (
            t * torch.rsqrt(t.square().mean(-1, keepdim=True) + config.norm_eps) * norm.weight
            for t, norm in zip((dt, B, C), norms, strict=True)
        )
    dt = torch.log1p(torch.exp(dt @ part.select.dt_proj.weight.T + part.ssm.dt_bias))
    ys, state = [], torch.zeros(u.shape[0], x.shape[2], n, dtype=u.dtype)
    for t in range(u.shape[1]):
        decay = torch.exp(-part.ssm.A_log.exp() * dt[:, t, :, None])
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1) + part.ssm.D * x[:, t])
    return part.out_proj(torch.stack(ys, 1) * F.silu(part.z_proj(u)))


@pytest.mark.parametrize("norms", [True, False])
def test_mamba(norms):
    part, config = filled(Mamba, [f"model.mamba={{state_dim: 5, dt_rank: 3, norms: {norms}}}"])
    expected = mamba_by_definition(part, config, inputs()).detach()
    assert relative_error(part(inputs()).detach(), expected) <= 1e-12
    assert relative_error(in_steps(part), expected) <= 1e-12


def mamba2_by_definition(part, config, u):
    """Hugging Face's order of things: projections, convolution and SiLU, recurrence, gate, grouped norm, out."""
    p, n, g = config.mamba2.head_dim, config.mamba2.state_dim, config.mamba2.groups
    x, z = part.x_proj(u), part.z_proj(u)
    bc = part.bc_proj(u)
    x = conv(x, part.conv.x_weight, part.conv.x_bias).unflatten(-1, (-1, p))
    bc = conv(bc, part.conv.bc_weight, part.conv.bc_bias).view(*u.shape[:2], g, 2, n)
    dt = F.softplus(part.dt_proj(u) + part.ssm.dt_bias).clamp(*config.mamba2.dt_limit)
    heads = x.shape[2]
    ys = []
    state = torch.zeros(u.shape[0], heads, p, n, dtype=u.dtype)
    for t in range(u.shape[1]):
        group = [h // (heads // g) for h in range(heads)]
        B, C = bc[:, t, group, 0], bc[:, t, group, 1]
        decay = torch.exp(-part.ssm.A_log.exp() * dt[:, t])
        state = decay[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, :, None]
        ys.append((state * C[:, :, None]).sum(-1) + part.ssm.D[:, None] * x[:, t])
    gated = torch.stack(ys, 1).flatten(2) * F.silu(z)
    blocks = gated.unflatten(-1, (g, -1))
    normed = blocks * torch.rsqrt(blocks.square().mean(-1, keepdim=True) + config.norm_eps)
    return part.out_proj(normed.flatten(2) * part.norm.weight)


@pytest.mark.parametrize("more", [{"groups": 1}, {"groups": 2, "heads": 6}, {"dt_min": 0.3, "dt_max": 0.9}])
def test_mamba2(more):
    part, config = filled(Mamba2, [f"model.mamba2.{key}={value}" for key, value in more.items()])
    dt = F.softplus(part.dt_proj(inputs()) + part.ssm.dt_bias)
    assert float(dt.detach().min()) < 0.3 < 0.9 < float(dt.detach().max())
    expected = mamba2_by_definition(part, config, inputs()).detach()
    assert relative_error(part(inputs()).detach(), expected) <= 1e-12
    assert relative_error(in_steps(part), expected) <= 1e-12


def attention_by_definition(part, config, u, positions):
    sizes = config.attention
    q, k, v = (proj(u).unflatten(-1, (-1, sizes.head_dim)) for proj in (part.q_proj, part.k_proj, part.v_proj))
    if sizes.rope is not None:
        dims = round(sizes.head_dim * sizes.rope.fraction)
        pairs = torch.arange(0, dims, 2, dtype=torch.float64)
        turn = torch.exp(1j * positions.double()[:, None] * sizes.rope.theta ** (-pairs / dims))[:, None]
        turned = [torch.complex(*t[..., :dims].chunk(2, -1)) * turn for t in (q, k)]
        q, k = (torch.cat([t.real, t.imag, whole[..., dims:]], -1) for t, whole in zip(turned, (q, k), strict=True))
    out = torch.zeros_like(q)
    for head in range(sizes.heads):
        other = head // (sizes.heads // sizes.kv_heads)
        scores = q[:, :, head] @ k[:, :, other].transpose(1, 2) * (sizes.scale or sizes.head_dim**-0.5)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        out[:, :, head] = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, :, other]
    return part.o_proj(out.flatten(2))


@pytest.mark.parametrize(("rope", "scale"), [("null", "null"), ("{theta: 100.0}", 0.7), ("{theta: 100.0, fraction: 0.5}", "null")])
def test_attention(rope, scale):
    part, config = filled(Attention, [f"model.attention.rope={rope}", f"model.attention.scale={scale}"])
    positions = torch.arange(11) + 5
    found = part(inputs(), positions).detach()
    assert relative_error(found, attention_by_definition(part, config, inputs(), positions).detach()) <= 1e-12
    assert config.attention.rope is None or relative_error(found, part(inputs(), positions * 3).detach()) > 1e-3


def expert_by_definition(*matrices, token):
    *gate, up, down = matrices
    return down @ (F.silu(gate[0] @ token) * (up @ token) if gate else (up @ token).clamp(min=0) ** 2)


def shares_by_definition(logits, sizes):
    """Each token's probabilities, and what the auxiliary loss takes of them."""
    if sizes.scores == "softmax":
        return logits.softmax(-1), logits.softmax(-1)
    scores = 1 / (1 + torch.exp(-logits))
    return scores, scores / scores.sum(-1, keepdim=True)


def choice_by_definition(scores, sizes):
    """The best of those experts whose groups have the best two."""
    groups = scores.view(sizes.groups, -1)
    if sizes.groups > 1:
        best = groups.sort(-1, descending=True).values[:, :2].sum(-1).argsort(descending=True)[: sizes.top_groups]
        scores = torch.where(torch.isin(torch.arange(sizes.groups), best)[:, None], groups, -torch.inf).flatten()
    return scores.argsort(descending=True)[: sizes.top_k].tolist()


def moe_by_definition(part, sizes, x):
    """Token by token: the output, and the layer's statistics: hits, mean probabilities and mean squares of log-sum-exp."""
    experts, stacked = sizes.experts, part.experts.stacked
    gates = [stacked.gate_proj] if sizes.activation == "swiglu" else []
    matrices = list(zip(*gates, stacked.up_proj, stacked.down_proj, strict=True))
    taken, hits, outputs = [0] * experts, torch.zeros(experts, dtype=torch.float64), []
    logits = x.flatten(0, 1) @ part.router.weight.T
    limit = math.ceil((sizes.capacity or experts) * len(logits) * sizes.top_k / experts)
    probabilities, shares = shares_by_definition(logits, sizes)
    for token, row in zip(x.flatten(0, 1), probabilities, strict=True):
        total = torch.zeros(32, dtype=torch.float64)
        chosen = choice_by_definition(row if part.bias is None else row + part.bias, sizes)
        weights = sizes.scale * row / (row[chosen].sum() if sizes.renormalize else 1)
        for e in chosen:
            hits[e] += 1
            taken[e] += 1
            if taken[e] <= limit:
                total = total + weights[e] * expert_by_definition(*matrices[e], token=token)
        if part.experts.shared is not None:
            total = total + expert_by_definition(*(p.weight for p in part.experts.shared.children()), token=token)
        outputs.append(total)
    statistics = hits / len(logits), shares.mean(0), logits.exp().sum(-1).log().square().mean()
    return torch.stack(outputs), statistics, sum(max(0, count - limit) for count in taken)


GRANITE = {"renormalize": True, "shared_hidden": 24}
NEMOTRON = GRANITE | {"activation": "relu2", "scores": "sigmoid", "scale": 2.5, "choice_bias": True}
GROUPS = {"experts": 8, "groups": 4, "top_groups": 2, "top_k": 3}


@pytest.mark.parametrize(
    "more",
    [{}, {"shared_hidden": 24}, {"capacity": 0.8}, {"bias_rate": 0.1}, {"top_k": 4}, GRANITE, NEMOTRON, NEMOTRON | GROUPS],
)
def test_moe(more):
    part, config = filled(MoE, [f"model.moe.{key}={value}" for key, value in more.items()])
    if part.bias is not None:
        part.bias.copy_(torch.tensor([0.5, -0.5, 0.2, -0.2] * (config.moe.experts // 4)))
    y, parts = part(inputs())
    expected, (hits, probabilities, _), dropped = moe_by_definition(part, config.moe, inputs())
    assert relative_error(y.flatten(0, 1).detach(), expected.detach()) <= 1e-12
    loss = config.moe.aux_loss * config.moe.experts * (hits * probabilities).sum()
    assert relative_error(auxiliary_loss(parts, config.moe, 1).detach(), loss.detach()) <= 1e-12
    assert (dropped > 0) == ("capacity" in more)
    assert torch.equal(part.load, hits * 22)


def test_only_training_drops_tokens():
    part, config = filled(MoE, ["model.moe.capacity=0.8"])
    y, _ = part.eval()(inputs())
    expected, _, _ = moe_by_definition(part, config.moe.model_copy(update={"capacity": None}), inputs())
    assert relative_error(y.flatten(0, 1).detach(), expected.detach()) <= 1e-12


class Noted:
    """In place of an exchange with other ranks: notes when rows leave and when they are waited for."""

    def __init__(self, events, way=()):
        self.events, self.way = events, way

    def start(self, *rows):
        self.events.append("rows leave")
        return Noted(self.events, rows)

    def send_back(self, rows):
        self.events.append("rows return")
        return Noted(self.events, (rows,))

    def wait(self):
        self.events.append("wait")
        return self.way if len(self.way) > 1 else self.way[0]


def test_the_shared_expert_is_computed_while_rows_travel():
    part, _ = filled(MoE, ["model.moe.shared_hidden=24"])
    expected, _ = part(inputs())
    events = []
    part.experts.exchange = Noted(events)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(part.experts.shared, name).register_forward_hook(lambda *_, name=name: events.append(name))
    assert torch.equal(part(inputs())[0], expected)
    assert events == ["rows leave", "gate_proj", "up_proj", "wait", "rows return", "down_proj", "wait"]


@pytest.mark.parametrize("ranks", [1, 3, 6, 12])
def test_the_capacity_does_not_round_by_the_ranks(ranks):
    """Of 360 tokens, 2 experts each: 1.1 * 720 / 4 is a little over 198 in fp64, whatever the ranks."""
    limits = []
    part, _ = filled(MoE, ["model.moe.capacity=1.1"])
    part.experts.token_ranks = ranks
    part.experts.within_capacity.keep = lambda chosen, _, limit, experts: limits.append(limit) or chosen < experts
    part(inputs(180 // ranks))
    assert limits == [199]


@pytest.mark.parametrize("balance", ["layer", "pooled"])
def test_auxiliary_loss_of_two_layers(balance):
    """Pooled: hits and probabilities over the tokens of both, before the product."""
    overrides = [f"model.moe.balance={balance}", "model.moe.z_loss=0.3"]
    (one, config), (other, _) = filled(MoE, overrides), filled(MoE, overrides)
    with torch.no_grad():
        other.router.weight.mul_(-2)
    of_both = [moe_by_definition(part, config.moe, inputs())[1] for part in (one, other)]
    f, p, squares = (torch.stack(each) for each in zip(*of_both, strict=True))
    balances = (f.mean(0) * p.mean(0)).sum() if balance == "pooled" else (f * p).sum()
    expected = config.moe.aux_loss * config.moe.experts * balances + 0.3 * squares.sum()
    found = auxiliary_loss(one(inputs())[1] + other(inputs())[1], config.moe, 2)
    assert relative_error(found.detach(), expected.detach()) <= 1e-12


def test_a_balanced_router_has_the_least_auxiliary_loss():
    part, config = filled(MoE)
    even = torch.full((8, 4), 0.25, dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    assert float(part._auxiliary(even.log(), even, chosen)) == pytest.approx(config.moe.aux_loss * config.moe.top_k)


def test_biases_move_towards_balance():
    """Experts with fewer tokens than their share gain, those with more lose; forwards without gradient do not count."""
    part, _ = filled(MoE, ["model.moe.bias_rate=0.25", "model.moe.top_k=1"])
    part.choose = lambda probabilities: torch.tensor([[[0], [0], [0], [1], [2], [2], [0], [0]]])
    part(inputs(4).view(1, 8, 32))
    with torch.no_grad():
        part(inputs(4).view(1, 8, 32))
    assert part.load.tolist() == [5, 1, 2, 0]
    part.rebalance()
    assert part.bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert part.load.tolist() == [0] * 4


def test_tied_embeddings_share_one_matrix():
    model = build_model(tiny_config(["model.tied_embeddings=true"]).model, 0, torch.float64)
    plain = build_model(tiny_config([]).model, 0, torch.float64)
    assert "head.projection.weight" not in dict(model.named_parameters())
    assert torch.equal(model.embedding.weight, plain.embedding.weight)
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain.head.projection.weight.copy_(plain.embedding.weight)
    for each in (model, plain):
        each(ids, ids).cross_entropy.backward()
    both = plain.embedding.weight.grad + plain.head.projection.weight.grad
    assert relative_error(model.embedding.weight.grad, both) <= 1e-12


def test_what_is_scaled():
    """Embedded tokens, what layers add, and logits; and the padding token's row has the gradient of the projection alone."""
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(2))
    scales = ["model.embedding_scale=3.0", "model.residual_scale=0.4", "model.logits_divisor=2.5"]
    plain, scaled = (
        build_model(tiny_config(["model.pattern=M-", "model.tied_embeddings=true", *more]).model, 0, torch.float64)
        for more in ([], [*scales, f"model.padding_token={ids[0, 7]}"])
    )
    x = 3.0 * plain.embedding.weight[ids]
    layer = plain.layers["0"]
    x = x + 0.4 * layer.mixer(layer.mixer_norm(x))
    x = x + 0.4 * layer.feed_forward(layer.feed_forward_norm(x))
    assert relative_error(scaled(ids).detach(), (plain.head(x) / 2.5).detach()) <= 1e-12
    F.cross_entropy((plain.head(x) / 2.5)[0], ids[0], reduction="sum").backward()
    scaled(ids, ids).cross_entropy.backward()
    found, whole = scaled.embedding.weight.grad, plain.embedding.weight.grad
    others = torch.arange(64) != ids[0, 7]
    assert relative_error(found[others], whole[others]) <= 1e-12
    assert relative_error(found[~others], whole[~others]) > 0.1


def test_tokens_do_not_see_what_comes_after():
    model = build_model(tiny_config([]).model, 0, torch.float64)
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 64
    before, after = model(ids).detach(), model(changed).detach()
    # Not bit for bit: an expert's product rounds by its number of rows.
    assert relative_error(after[:, :12], before[:, :12]) <= 1e-14
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_values_at_the_start():
    config = tiny_config(["model.d_model=256", "model.initializer_range=0.02"]).model
    model = build_model(config, 7)
    mixer = model.layers["0"].mixer
    decay, dt = mixer.ssm.A_log.detach().exp(), F.softplus(mixer.ssm.dt_bias.detach())
    assert float(decay.min()) >= 1
    assert float(decay.max()) <= 16
    assert float(decay.std()) > 2
    assert float(dt.min()) >= 0.9e-3
    assert float(dt.max()) <= 0.101
    assert float(dt.log().std()) > 0.8
    assert float(mixer.x_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(mixer.out_proj.weight.detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
    assert float(model.layers["1"].feed_forward.experts.stacked.down_proj.detach().std()) == pytest.approx(
        0.02 / math.sqrt(8), rel=0.03
    )
    assert bool((mixer.ssm.D == 1).all())
    assert not torch.equal(model.layers["0"].mixer.x_proj.weight, model.layers["1"].mixer.x_proj.weight)
    first = build_model(tiny_config(["model.pattern=m"]).model, 7).layers["0"].mixer.ssm
    assert torch.equal(first.A_log.exp().round(), torch.arange(1.0, 17).expand(64, 16))
    assert torch.equal(mixer.x_proj.weight, build_model(config, 7).layers["0"].mixer.x_proj.weight)
    assert not torch.equal(mixer.x_proj.weight, build_model(config, 8).layers["0"].mixer.x_proj.weight)
