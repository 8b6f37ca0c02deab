"""megatron-core on a CPU: for a while, what it asks of CUDA is answered by the CPU. A help for tests, never part of the package."""

import contextlib
import multiprocessing
import queue
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

CPU = torch.device("cpu")


class _OnCPU(torch.overrides.TorchFunctionMode):
    """`device="cuda"`, `.cuda()` and `.to("cuda")` mean the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # There is none to pin it for.
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        result = func(*args, **kwargs)
        # Its optimizer asserts that gradients are "torch.cuda.FloatTensor".
        return result.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(result, str) else result


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """Of work that is done when it is queued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Within it megatron-core builds and trains on tensors of the CPU; afterwards all is as it was."""
    # Its decorator compiles, and is bound when its modules are imported.
    torch._dynamo.config.disable = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
        import megatron.core.tensor_parallel.random as random
        import megatron.core.transformer.moe.moe_utils as moe_utils
        import megatron.core.transformer.moe.token_dispatcher as dispatcher
        from megatron.core import parallel_state
    answers = {
        "current_device": lambda: CPU,
        "synchronize": lambda *args: None,
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        rng = {
            "_get_cuda_rng_state": answers["get_rng_state"],
            "_set_cuda_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        }
        for name, answer in rng.items():
            stack.enter_context(mock.patch.object(random, name, lambda *a, answer=answer, **k: answer(*a[:1])))
        # Tensors that are on the host already stay tensors there, which all_to_all_single does not take as sizes.
        on_host = lambda t, as_numpy=False, record_stream=False: t.numpy() if as_numpy and torch.is_tensor(t) else t  # noqa: E731
        stack.enter_context(mock.patch.object(dispatcher, "maybe_move_tensor_to_cpu", on_host))
        # A checkpoint is written by processes, which a daemon such as a test's worker may not have; and a queue has one of its own,
        # which would outlive the worker.
        stack.enter_context(mock.patch.dict(multiprocessing.current_process()._config, daemon=False))
        stack.enter_context(mock.patch.object(filesystem_async, "_results_queue", queue.Queue()))
        stack.enter_context(_OnCPU())
        # Its globals hold groups, whose threads would go on in a test's worker.
        stack.callback(moe_utils.get_moe_layer_wise_logging_tracker().clear)
        stack.callback(parallel_state.destroy_model_parallel)
        yield
