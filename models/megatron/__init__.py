"""State passing inside Megatron-LM: a stack spec for megatron-core's own hybrid `MambaModel`.

    from baton.models.megatron import hybrid_stack_spec
    model = MambaModel(config, hybrid_stack_spec, vocab_size, max_sequence_length, hybrid_override_pattern="M-MEM-*E", ...)

Or on the command line of Megatron-LM: `--spec baton.models.megatron hybrid_stack_spec`. Megatron's linear layers, MLP, experts,
schedules, optimizer and checkpoints stay; the Mamba-2 mixer hands its state from rank to rank of the cp group instead of moving all
tokens twice, and attention works over cp. Transformer Engine and mamba-ssm are not needed.
"""

from ..megatron_version import check_version

check_version()

from .attention import CoreAttention  # noqa: E402
from .mixer import Mamba2Mixer, Mamba2MixerSubmodules  # noqa: E402
from .norm import Norm  # noqa: E402
from .stack import HybridStack, build_hybrid_stack_spec, hybrid_stack_spec  # noqa: E402
