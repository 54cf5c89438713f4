"""What torch.compile makes of layers on the fake GPU, by a backend that counts."""

from collections import Counter
from inspect import signature
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_recipes.models.compiled_layers import compile_layers
from tests.cuda import fake_gpu
from tests.cuda.fake_gpu import GPU

LAYERS, TOKENS = 3, 48


class Counting:
    """A backend that runs graphs as they are."""

    def __init__(self) -> None:
        self.made = 0  # graphs
        self.runs = 0  # of graphs
        self.operations: Counter[str] = Counter()  # in graphs

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        self.made += 1
        for part in graph.modules():  # what is checkpointed is a graph within the graph
            if isinstance(part, torch.fx.GraphModule):
                self.operations.update(str(node.target) for node in part.graph.nodes if node.op == "call_function")

        def run(*inputs: Any) -> Any:
            self.runs += 1
            return graph(*inputs)

        return run


def batch(documents: list[int]) -> dict[str, Any]:
    """Return a packed micro-batch as TRL's collator lays it out, on the GPU."""
    ids = torch.ones(1, sum(documents), dtype=torch.int64, device="cuda")
    starts = torch.tensor([0, *documents], device="cuda").cumsum(0, dtype=torch.int32)
    longest = {"max_length_q": max(documents), "max_length_k": max(documents)}
    return {"input_ids": ids, "position_ids": ids, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, **longest}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_is_one_graph_with_the_kernel_in_it(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A break leaves a checkpointed layer uncompiled. Another number of documents or tokens makes no other graph."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    backend = Counting()
    torch.compiler.reset()
    with fake_gpu.installed(GPU()) as gpu, fake_gpu.fake_tensors(gpu, watched=False):
        network = AutoModelForCausalLM.from_config(config, attn_implementation="varlen", dtype=torch.bfloat16)
        network = network.to("cuda").train()
        if checkpointed:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        told = {"warn": print} if "warn" in signature(compile_layers).parameters else {}
        compile_layers(network, backend=backend, **told)
        for documents in ([20, 28], [5, 12, 31], [7, 8, 9, 30]):
            network(**batch(documents), use_cache=False).logits.sum().backward()
    torch.compiler.reset()

    once = 3 * LAYERS
    assert backend.runs in (
        once,
        2 * once if checkpointed else once,
    )  # recomputed within the graph, or by running it again
    assert backend.made <= 4  # the first layer's, the others'; of one number of tokens, and of any
    assert any("varlen_attn" in name for name in backend.operations)
