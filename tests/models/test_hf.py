"""Imported models compute what Hugging Face's do, alone and on meshes; what is exported is what was imported."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is not installed: pip install -e .[dev]")

from models.hf_peers import PEERS, build, disk_gradients, save, tokens  # noqa: E402

from baton.models.hf import load_hf  # noqa: E402
from helpers import relative_error  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    return {kind: save(build(kind), tmp_path_factory.mktemp("hf") / kind) for kind in PEERS}


def of_transformers(kind, ids, labels):
    """Logits and losses, and the model after its backward."""
    model = build(kind)
    out = model(ids, labels=labels)
    out.loss.backward()
    return model, out


@pytest.mark.parametrize("kind", PEERS)
def test_logits_losses_and_every_gradient(kind, folders, tmp_path):
    ids, labels = tokens()
    model, expected = of_transformers(kind, ids, labels)
    found = load_hf(folders[kind], dtype=torch.float32)
    assert relative_error(found(ids).detach(), expected.logits.detach()) <= 1e-5
    losses = found.loss(ids, labels)
    assert relative_error(losses["loss"].detach(), expected.loss.detach()) <= 1e-5
    aux_loss = getattr(expected, "aux_loss", None)
    assert (aux_loss is None) == (kind not in ("jamba", "granitemoehybrid"))
    if aux_loss is None:
        assert float(losses["aux_loss"]) == 0
    else:
        assert relative_error(losses["aux_loss"].detach(), aux_loss.detach()) <= 1e-5
    losses["loss"].backward()
    gradients = found.hf_tensors(gradients=True)
    reference = disk_gradients(model, tmp_path / "gradients")
    reference.pop("lm_head.weight", None) if found.model.config.tied_embeddings else None
    for name in reference.keys() - gradients.keys():
        assert "e_score_correction_bias" in name
    for name, gradient in gradients.items():
        assert relative_error(gradient, reference[name]) <= 1e-5, name
