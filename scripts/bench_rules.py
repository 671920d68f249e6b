"""
The optimizers of the benchmark, and what a step of each has to move and to keep, as formulas of the shapes.

A *pass* is one read or one write of a tensor of the size of a weight. The count is that of a step which computes in
one pass all that its reads allow and keeps nothing of a weight's size in a cache between two passes, so that no
implementation of the rule moves fewer bytes. `G` gradient, `M` momentum, `W` weight, `V` second moment, `P` update:

- SGD, 5: reads G, M, W; writes M, W.
- AdamW and Adam in other coordinates, 7: reads G, M, V, W; writes M, V, W.
- AdamW with a state of 8 bits, 3 and a byte for each of four passes over M and V.
- Eva and Eva-f, 6: reads G for `Ga` and `‖G‖²`, from which follow the sizes of all updates and with them the KL clip;
  then SGD, with P formed on the way.
- Eva-s, 7: reads G for the means over axes, again for `⟨G, V⟩`, then SGD.
- The recipe, 12: reads G and M and writes M, for `Gᵀ(G U_A)` by blocks of rows, `Gᵀ U_B` and `‖G‖²`; reads G for
  `G (Gᵀ U_B)`; reads G and M for the products of their Nesterov mix N with the new bases; reads both for `N (Nᵀ U_B)`,
  from which follow the norms of the rows of P; reads G, M and W and writes W. With momentum in bfloat16, five of these
  passes are half as long. Where bases are kept as they are, there is one less.
- Muon, K-FAC, SOAP and Shampoo: the passes of their momenta and weights alone, because products and decompositions
  of matrices bound them and not memory.

Everything but the planned weights has the passes of SGD or AdamW. What is smaller than a weight is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_eva import EvaConfig, plan


@dataclass(frozen=True)
class Rule:
    """
    Args:
        passes (`float`): Over the planned weights; a pass in 8 bits counts as its share of the weight's bytes.
        other_passes (`float`): Over all other parameters.
        state (`Callable`): Numbers that it keeps for a planned weight of so many rows and columns; `None` where
            `hf_eva.plan` counts them.
        other_state (`float`): Numbers that it keeps for each of the other parameters.
    """

    passes: float
    other_passes: float
    state: Callable[[int, int], float] | None = None
    other_state: float = 0


def _dense(rows: int, columns: int) -> float:
    """A factor and its inverse, or its eigenvectors, on both sides."""
    return 2 * (rows**2 + columns**2)


def _blocks(rows: int, columns: int, size: int = 1024) -> float:
    """The same for every block of at most `size` rows and columns."""
    return sum(
        _dense(min(size, rows - row), min(size, columns - column))
        for row in range(0, rows, size)
        for column in range(0, columns, size)
    )


RULES = {
    "adamw": Rule(7, 7, lambda rows, columns: 2 * rows * columns, 2),
    "adamw_8bit": Rule(4, 4, lambda rows, columns: rows * columns / 2, 0.5),
    "sgd": Rule(5, 5, lambda rows, columns: rows * columns, 1),
    "muon": Rule(5, 7, lambda rows, columns: rows * columns, 2),
    "kfac": Rule(5, 7, lambda rows, columns: rows * columns + _dense(rows, columns), 2),
    "soap": Rule(7, 7, lambda rows, columns: 2 * rows * columns + _dense(rows, columns), 2),
    "shampoo": Rule(7, 7, lambda rows, columns: 2 * rows * columns + _blocks(rows, columns), 2),
    "published_eva": Rule(6, 5, lambda rows, columns: rows * columns + rows + columns + 1, 1),
    "eva": Rule(12, 7),
    "paper_eva": Rule(6, 5),
    "paper_eva_f": Rule(6, 5),
    "paper_eva_s": Rule(7, 5),
}


@dataclass(frozen=True)
class Optimizer:
    """One of `peers.PEERS` with options."""

    peer: str
    options: dict[str, Any] = field(default_factory=dict)


FOREACH = {"fused": False, "foreach": True}
OPTIMIZERS = {
    "adamw": Optimizer("adamw"),
    "adamw_foreach": Optimizer("adamw", FOREACH),
    "adamw_8bit": Optimizer("adamw_8bit"),
    "sgd": Optimizer("sgd"),
    "sgd_foreach": Optimizer("sgd", FOREACH),
    "eva": Optimizer("eva"),
    "eva_bf16": Optimizer("eva", {"momentum_dtype": "bfloat16"}),
    "eva_every_4": Optimizer("eva", {"refresh_interval": 4}),
    "eva_rank_1": Optimizer("eva", {"rank": 1}),
    "paper_eva": Optimizer("paper_eva"),
    "paper_eva_f": Optimizer("paper_eva_f"),
    "paper_eva_s": Optimizer("paper_eva_s"),
    "published_eva": Optimizer("published_eva"),
    "muon": Optimizer("muon"),
    "soap": Optimizer("soap"),
    "shampoo": Optimizer("shampoo"),
    "kfac": Optimizer("kfac"),
}
PRODUCTS = ("muon", "soap", "shampoo", "kfac")  # whose steps are products and decompositions of matrices


def least_bytes(peer: str, model: nn.Module, options: dict[str, Any]) -> float:
    """Bytes that a step of the peer has to move, in the dtype of the parameters."""
    rule, planned = RULES[peer], {id(layer.weight) for layer in plan(model).layers}
    passes = rule.passes - 2.5 * (options.get("momentum_dtype") == "bfloat16")
    passes -= 1 - 1 / options.get("refresh_interval", 1)
    return sum(
        (passes if id(p) in planned else rule.other_passes) * p.numel() * p.element_size() for p in model.parameters()
    )


def state_bytes(peer: str, model: nn.Module, options: dict[str, Any]) -> float:
    """Bytes of the state of a peer, in the dtype of the parameters, to see what fits before anything runs."""
    rule = RULES[peer]
    if rule.state is None:
        preset = "recipe" if peer == "eva" else peer
        return plan(model, config=EvaConfig.from_options({"preset": preset, **options})).state_bytes
    planned = {id(layer.weight): layer.shape for layer in plan(model).layers}
    return sum(
        (rule.state(*planned[id(p)]) if id(p) in planned else rule.other_state * p.numel()) * p.element_size()
        for p in model.parameters()
    )
