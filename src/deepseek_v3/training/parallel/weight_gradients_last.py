"""Moves the FP8 weight gradients of a compiled layer to the end of its backward pass, where that saves memory.

Nothing else in a backward pass reads the gradient of a weight. Autograd computes it as soon as it can, so that the
float32 gradients of the feed-forward network lie in memory beside the tensors of the attention's backward pass,
where memory is fullest. Their 8-bit factors are smaller, and can wait in their place.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload

_PRODUCTS = {f"deepseek_v3::fp8_columns_product_{backend}" for backend in ("cuda", "triton")}


class WeightGradientsLast(CustomGraphPass):
    """A pass over a graph before the compiler schedules it, which keeps this order unless it finds a better one.

    A product whose result is larger than its factors moves behind everything else, and with it all that is computed
    for it alone.
    """

    def __call__(self, graph: fx.Graph) -> None:
        late: set[fx.Node] = set()
        calls = [node for node in graph.nodes if node.op == "call_function"]
        for node in calls:
            if _is_large_product(node) or any(source in late for source in node.all_input_nodes):
                late.add(node)
        for node in reversed(calls):
            if node.users and all(user in late for user in node.users):
                late.add(node)
        for node in calls:
            if node in late:
                graph.output_node().prepend(node)

    def uuid(self) -> bytes:
        """Identifies this version of the pass to the cache of compiled code."""
        return get_hash_for_files((__file__,))


def _is_large_product(node: fx.Node) -> bool:
    is_product = isinstance(node.target, OpOverload) and node.target.name() in _PRODUCTS
    return is_product and _bytes([node]) > _bytes(node.all_input_nodes)


def _bytes(nodes: Iterable[fx.Node]) -> int:
    values = [node.meta["val"] for node in nodes]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


WEIGHT_GRADIENTS_LAST = WeightGradientsLast()  # one object, so that equal layers share their compiled code
