"""How labels and states go through the operations of ATen."""

from parasparse.shrink.calls import Call
from parasparse.shrink.rules.concatenation import CONCATENATION
from parasparse.shrink.rules.convolutions import CONVOLUTIONS
from parasparse.shrink.rules.elementwise import ELEMENTWISE, elementwise
from parasparse.shrink.rules.indexing import INDEXING
from parasparse.shrink.rules.matrix_products import MATRIX_PRODUCTS
from parasparse.shrink.rules.movement import MOVEMENTS
from parasparse.shrink.rules.reduction import REDUCTIONS
from parasparse.shrink.rules.spatial import SPATIAL
from parasparse.shrink.rules.writing import WRITES
from parasparse.shrink.tracing import Rule

RULES: dict[str, Rule] = {
    **MOVEMENTS, **CONCATENATION, **INDEXING, **CONVOLUTIONS, **MATRIX_PRODUCTS, **REDUCTIONS,
    **SPATIAL, **WRITES, **ELEMENTWISE,
}  # fmt: skip


def rule_for(call: Call) -> Rule | None:
    """Return the rule of an operation, or None if there is none."""
    plain = call.name if call.name.startswith("_") else call.name.removesuffix("_")
    rule = RULES.get(call.name) or RULES.get(plain)
    return rule or (elementwise if call.pointwise else None)
