"""Tiny models of transformers whose every number counts, and what they compute."""

import json

import torch
import transformers
from transformers import AutoModelForCausalLM

SSD = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
    "time_step_limit": (0.05, 2.0),
}
ENDS = {"vocab_size": 60, "hidden_size": 32, "pad_token_id": 3, "rms_norm_eps": 1e-3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}

PEERS = {
    "jamba": ENDS
    | HEADS
    | EXPERTS
    | {"intermediate_size": 40, "num_hidden_layers": 5, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4}
    | {"mamba_d_state": 6, "mamba_dt_rank": 5, "mamba_d_conv": 3},
    "mamba2": {"vocab_size": 60, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 8}
    | {"num_hidden_layers": 3, "layer_norm_epsilon": 1e-3, "time_step_limit": (0.05, 2.0), "tie_word_embeddings": True},
    "bamba": ENDS | HEADS | SSD | {"intermediate_size": 40, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": ENDS
    | HEADS
    | EXPERTS
    | SSD
    | {"intermediate_size": 24, "shared_intermediate_size": 40, "num_hidden_layers": 4, "num_local_experts": 4}
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "attention_multiplier": 0.2, "embedding_multiplier": 3.0}
    | {"residual_multiplier": 0.4, "logits_scaling": 2.5, "position_embedding_type": "rope", "tie_word_embeddings": True},
    "nemotron_h": HEADS
    | {"vocab_size": 60, "hidden_size": 32, "head_dim": 6, "intermediate_size": 40, "layer_norm_epsilon": 1e-3, "pad_token_id": 3}
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention", "moe"]}
    | {"ssm_state_size": 6, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8, "time_step_min": 0.05}
    | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    | {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20},
}
"""Each with what it alone does switched on, no two sizes alike where they could be mixed up."""
CLASSES = {
    "jamba": "JambaConfig",
    "mamba2": "Mamba2Config",
    "bamba": "BambaConfig",
    "granitemoehybrid": "GraniteMoeHybridConfig",
    "nemotron_h": "NemotronHConfig",
}


def build(kind, **changed):
    """In fp32, all parameters at random: at the start norms are 1 and biases 0, which would hide what is missing."""
    torch.manual_seed(0)
    config = getattr(transformers, CLASSES[kind])(**PEERS[kind] | changed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(0.15 * torch.randn(tensor.shape, generator=generator))
    return model


def save(model, folder, **options):
    """As users have it; the folder."""
    model.save_pretrained(folder, **options)
    return folder


def tokens(length=40, rows=2):
    """ids with padding tokens among them, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 60, (rows, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.1, -100, ids)
    return ids, labels


def disk_gradients(model, folder):
    """Gradients by the names of the library's own files: the model with them in place of its numbers, saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    save(model, folder)
    return read(folder)


def read(folder):
    """All tensors of a folder by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())
