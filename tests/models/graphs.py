"""A backend for torch.compile that counts how often compiled graphs run; nothing is made faster."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition


def counting(runs: Counter[str]) -> Callable[..., Any]:
    """Graphs are traced, differentiated and partitioned as for inductor; `runs` counts forward, backward and inference."""

    def compiler(kind: str) -> Any:
        def compiled(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                runs[kind] += 1
                return graph.forward(*args)

            return run

        return make_boxed_compiler(compiled)

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=min_cut_rematerialization_partition,
    )
    return backend
