"""
The algorithms a second time: in float64, one layer at a time, every matrix formed and every system solved.

To be read next to the papers, and to share nothing with the package: the inputs and output gradients of a layer are
taken with `torch.autograd.grad`, token by token. `G` is the gradient of a layer's weight as a matrix `(d_out, d_in)`,
`X` holds its inputs as rows `(N, d_in)`, `D` the gradients at its output as rows `(N, d_out)`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The published family ------------------------------------------------------------------------------------------------


def eva(G: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """Solves `(v vᵀ + γ I) P = G` with `v = g ⊗ a`."""
    v = torch.outer(g, a).flatten()
    C = torch.outer(v, v) + damping * torch.eye(len(v), dtype=v.dtype)
    return torch.linalg.solve(C, G.flatten()).view_as(G)


def eva_f(G: Tensor, a: Tensor, damping: float) -> Tensor:
    """`P = G (a aᵀ + γ I)⁻¹`."""
    A = torch.outer(a, a) + damping * torch.eye(len(a), dtype=a.dtype)
    return torch.linalg.solve(A, G.T).T


def axis_means(G: Tensor) -> list[Tensor]:
    """For each axis, the mean over all others."""
    return [G.transpose(0, i).flatten(1).mean(1) for i in range(G.ndim)]


def eva_s(G: Tensor, vectors: Sequence[Tensor], damping: float) -> Tensor:
    """`P = G − ⟨G,V⟩ / (γ + ∏‖v_i‖²) · V`, `V = v_1 ∘ … ∘ v_k`, with the norm of `G`; for `G` of any order."""
    letters = "abcdefgh"[: G.ndim]
    V = torch.einsum(f"{','.join(letters)}->{letters}", *vectors)
    curvature = torch.stack([v.square().sum() for v in vectors]).prod()
    P = G - (G * V).sum() / (damping + curvature) * V
    return P * G.norm() / P.norm()


def average(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """`m ← (1 − ξ) m + ξ · new`; the first value stands for itself."""
    return new if old is None else (1 - decay) * old + decay * new


def weight(decay: float, step: int) -> float:
    """A plain mean of the first steps, until the newest would weigh less than ξ."""
    return max(decay, 1 / step)


def kl_factor(P: Sequence[Tensor], G: Sequence[Tensor], lr: float, kl_clip: float) -> Tensor:
    """`ν = min(1, sqrt(κ / Σ lr² ⟨P, G⟩))`."""
    size = sum(lr**2 * (p * g).sum() for p, g in zip(P, G, strict=True))
    return torch.sqrt(kl_clip / size).clamp(max=1.0)


def rescale_factor(P: Sequence[Tensor], G: Sequence[Tensor]) -> Tensor:
    """What makes `‖P‖ = ‖G‖` over all layers together."""
    return torch.sqrt(sum(g.square().sum() for g in G) / sum(p.square().sum() for p in P))


# The recipe ----------------------------------------------------------------------------------------------------------


def factor(U: Tensor, values: Tensor, trace: Tensor) -> Tensor:
    """`ρ I + U diag(ℓ − ρ) Uᵀ`: eigenvalues ℓ in the span of U, and what they leave of the trace evenly elsewhere."""
    d, r = U.shape
    rho = (trace - values.sum()).clamp(min=0) / max(d - r, 1)
    excess = (values - rho).clamp(min=0)  # a direction below the rest counts as a part of it
    return rho * torch.eye(d, dtype=U.dtype) + U @ torch.diag(excess) @ U.T


def inverse_power(matrix: Tensor, damping: float, exponent: float) -> Tensor:
    """`(F + ε I)^(−p)` by eigendecomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag((values + damping) ** -exponent) @ vectors.T


def inverse_powers(
    U: Tensor, values: Tensor, trace: Tensor, damping: float, exponents: Tensor, rest: float = 1.0
) -> Tensor:
    """
    As [`inverse_power`] of [`factor`], up to a scalar, with an exponent of its own for every direction of U, times
    `rest` for the others, but none of U above these.
    """
    d, r = U.shape
    rho = (trace - values.sum()).clamp(min=0) / max(d - r, 1)
    powers = ((torch.maximum(values, rho) + damping) / (rho + damping)) ** -exponents
    return rest * torch.eye(d, dtype=U.dtype) + U @ torch.diag(powers.clamp(max=rest) - rest) @ U.T


def noise_of_momentum(beta: float, steps: int, nesterov: bool) -> float:
    """What is left of the square of the mean of gradients that are noise, in units of the mean of their squares."""
    weights = [(1 - beta) * beta**age for age in range(steps)]
    if nesterov:
        weights = [beta * weight for weight in weights]
        weights[0] += 1 - beta
    return sum(weight**2 for weight in weights) / sum(weights) ** 2


def signal(found: Tensor, expected: Tensor, noise: float) -> Tensor:
    """The share of the squared momentum `found` that noise does not explain, where gradients have `expected`."""
    return (1 - noise * expected / found).clamp(min=0) + 0.03


def trust(size: Tensor, largest: Tensor, noise: float) -> Tensor:
    """1 where a step is at most a quarter of the largest and noise is known, 0 where it is as long as that."""
    return max(0.0, 1 - 3 * noise) * (torch.log(largest / size) / math.log(4)).clamp(0, 1)


def first_basis(guess: Tensor, matrix: Tensor) -> Tensor:
    """Two rounds of subspace iteration."""
    for _ in range(2):
        guess = torch.linalg.qr(matrix @ guess)[0]
    return guess


def ritz_step(old: Tensor, U: Tensor, others: Tensor, matrix: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    The leading eigenvectors of `(1 − w) old + w F` among all vectors in the span of U and of `others`; returns
    `U diag(ℓ) Uᵀ`, U and ℓ.
    """
    left, values, _ = torch.linalg.svd(torch.cat([U, others / others.norm()], 1), full_matrices=False)
    Q = left[:, values > 1e-9]
    values, vectors = torch.linalg.eigh(Q.T @ ((1 - decay) * old + decay * matrix) @ Q)
    r = min(U.shape[1], Q.shape[1])
    U, values = Q @ vectors[:, -r:], values[-r:].clamp(min=0)
    return U @ torch.diag(values) @ U.T, U, values


def mean_squares_of_rows(P: Tensor) -> Tensor:
    return P.square().sum(1) / P.square().sum() * len(P)


def step_of_adamw(
    P: Tensor, shares: Tensor, M: Tensor, correction: float, square: Tensor, largest: float | Tensor = 1.0
) -> Tensor:
    """`P` with its rows divided by their usual size, four times as long as a step of AdamW."""
    P = P / shares.sqrt().unsqueeze(1)
    size = min(M.norm() / correction / square.sqrt(), torch.as_tensor(largest, dtype=P.dtype), torch.ones_like(square))
    cosine = ((P * M).sum() / (P.norm() * M.norm())).clamp(0.5, 1)
    return 4 * size / cosine ** (2 * size).clamp(max=1) * P.numel() ** 0.5 * P / P.norm()


# Layers --------------------------------------------------------------------------------------------------------------


def tokens(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as rows, one per token; a convolution's tokens are its patches."""
    if isinstance(module, nn.Conv2d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        x = F.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride).mT
    return x.reshape(-1, x.shape[-1])


def output_tokens(module: nn.Module, y: Tensor) -> Tensor:
    y = y.flatten(2).mT if isinstance(module, nn.Conv2d) else y
    return y.reshape(-1, y.shape[-1])


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)


def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.T if type(module).__name__ == "Conv1D" else matrix.view_as(module.weight)


Loss = Callable[[nn.Module], Tensor]


def observe(
    model: nn.Module, layers: dict[str, nn.Module], losses: Sequence[Loss]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of all parameters, and X and D of each layer, over the micro-batches of one step."""
    parameters = dict(model.named_parameters())
    gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    inputs, outputs = {name: [] for name in layers}, {name: [] for name in layers}
    calls = []
    hooks = [
        module.register_forward_hook(partial(lambda name, module, args, y: calls.append((name, args[0], y)), name))
        for name, module in layers.items()
    ]
    for loss in losses:
        calls.clear()
        value = loss(model)
        wanted = [*parameters.values(), *(y for _, _, y in calls)]
        found = torch.autograd.grad(value, wanted, materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=False):
            gradients[name] += gradient
        for (name, x, _), delta in zip(calls, found[len(parameters) :], strict=True):
            inputs[name].append(tokens(layers[name], x.detach()))
            outputs[name].append(output_tokens(layers[name], delta))
    for hook in hooks:
        hook.remove()
    return (
        gradients,
        {name: torch.cat(rows) for name, rows in inputs.items()},
        {name: torch.cat(rows) for name, rows in outputs.items()},
    )


# A whole step --------------------------------------------------------------------------------------------------------


class Reference:
    """
    The optimizer, for `model` with its `layers` (by name) preconditioned. `config` holds the hyperparameters under
    the names that the package gives them; `guess(d, r)` makes the first basis of a subspace. Of the last step, `nu` is
    the factor on all layers together, and `turned` holds for each layer what was preconditioned and what it became.
    """

    def __init__(self, model, layers, config, *, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, guess=None):
        self.model, self.config, self.guess = model, config, guess
        self.layers = {name: model.get_submodule(name) for name in layers}
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.averages: dict[tuple[str, str], Tensor] = {}
        self.adam: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0
        self.nu = torch.ones(())
        self.turned: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, *losses: Loss) -> None:
        """One step from the sum of the losses of its micro-batches."""
        gradients, X, D = observe(self.model, self.layers, losses)
        self.steps += 1
        with torch.no_grad():
            if self.config.base == "sgd":
                self.published_step(gradients, X, D)
            else:
                self.recipe_step(gradients, X, D)

    @property
    def refreshes(self) -> bool:
        return self.steps <= 3 or (self.steps - 1) % self.config.refresh_interval == 0

    def averaged(self, name: str, key: str, new: Tensor) -> Tensor:
        """The running average of what every step sees."""
        decay = weight(self.config.decay, self.steps)
        self.averages[name, key] = average(self.averages.get((name, key)), new, decay)
        return self.averages[name, key]

    def refreshed(self, name: str, key: str, new: Tensor) -> Tensor:
        """The running average of what some steps see only."""
        return self.averaged(name, key, new) if self.refreshes else self.averages[name, key]

    def means(self, name: str, X: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        """The running averages of a, the mean input, and of g, the sum or mean of the output gradients."""
        g = D.sum(0) if self.config.g_scale == "sum" else D.mean(0)
        return self.refreshed(name, "a", X.mean(0)), self.refreshed(name, "g", g)

    def published_step(self, gradients: dict[str, Tensor], X: dict[str, Tensor], D: dict[str, Tensor]) -> None:
        raw, directions = {}, {}
        for name, module in self.layers.items():
            raw[name] = gradients[f"{name}.weight"]
            x = X[name]
            if self.config.variant != "eva_s":
                raw[name] = as_matrix(module, raw[name])
                if module.bias is not None:  # the last column, whose input is 1
                    raw[name] = torch.cat([raw[name], gradients[f"{name}.bias"].unsqueeze(1)], dim=1)
                    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
            directions[name] = self.published_direction(name, raw[name], x, D[name])
        P, G = list(directions.values()), list(raw.values())
        if self.config.kl_mode == "clip":
            self.nu = kl_factor(P, G, self.lr, self.config.kl_clip)
        elif self.config.kl_mode == "rescale":
            self.nu = rescale_factor(P, G)
        for name, module in self.layers.items():
            direction = self.nu * directions[name]
            self.turned[name] = raw[name], direction
            if self.config.variant == "eva_s":
                gradients[f"{name}.weight"] = direction
                continue
            columns = direction.shape[1] - (module.bias is not None)
            gradients[f"{name}.weight"] = from_matrix(module, direction[:, :columns].contiguous())
            if module.bias is not None:
                gradients[f"{name}.bias"] = direction[:, -1]
        for name, parameter in self.model.named_parameters():
            self.sgd(name, parameter, gradients[name])

    def published_direction(self, name: str, G: Tensor, X: Tensor, D: Tensor) -> Tensor:
        config = self.config
        if config.variant == "eva_s":
            vectors = [self.refreshed(name, f"v{i}", v) for i, v in enumerate(axis_means(G))]
            curvature = torch.stack([v.square().sum() for v in vectors]).prod()
        else:
            a, g = self.means(name, X, D)
            curvature = a.square().sum() * (g.square().sum() if config.variant == "eva" else 1)
        damping = config.damping * (curvature if config.damping_mode == "relative" else 1)
        if config.variant == "eva_s":
            return eva_s(G, vectors, damping)
        P = eva(G, a, g, damping) if config.variant == "eva" else eva_f(G, a, damping)
        return P * damping if config.damping_mode == "relative" else P

    def sgd(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """`torch.optim.SGD`: coupled weight decay, momentum whose first value is the gradient."""
        direction = gradient + self.weight_decay_of(parameter) * parameter
        if self.config.momentum:
            old = self.averages.get((name, "momentum"))
            buffer = direction if old is None else self.config.momentum * old + direction
            self.averages[name, "momentum"] = buffer
            direction = direction + self.config.momentum * buffer if self.config.nesterov else buffer
        parameter.sub_(self.lr * direction)

    def recipe_step(self, gradients: dict[str, Tensor], X: dict[str, Tensor], D: dict[str, Tensor]) -> None:
        config, beta = self.config, self.config.momentum
        for name, parameter in self.model.named_parameters():
            layer = name.removesuffix(".weight")
            root_mean_square = parameter.square().mean().sqrt()
            parameter.mul_(1 - self.lr * self.weight_decay_of(parameter))
            if layer not in self.layers or name == layer:
                parameter.sub_(self.lr * self.adam_direction(name, gradients[name]))
                continue
            module = self.layers[layer]
            G = as_matrix(module, gradients[name])
            square = self.averaged(layer, "square", G.square().sum())
            factors = self.factors(layer, G, X[layer], D[layer])
            M = self.averages.get((layer, "momentum"), torch.zeros_like(G))
            agreement = self.agreement(layer, M, G)
            M = self.averages[layer, "momentum"] = beta * M + (1 - beta) * G
            N = beta * M + (1 - beta) * G if config.nesterov else M
            largest = 0.05 * root_mean_square / (4 * self.lr) if self.lr else torch.tensor(math.inf, dtype=G.dtype)
            P = self.precondition(N, factors, square, largest, agreement)
            shares = self.averaged(layer, "rows", mean_squares_of_rows(P))
            largest = largest.clamp(min=0.2)
            step = step_of_adamw(P, shares, N, 1 - beta ** (self.steps + config.nesterov), square, largest)
            self.turned[layer] = N, step
            parameter.sub_(self.lr * from_matrix(module, step.contiguous()))

    def agreement(self, layer: str, M: Tensor, G: Tensor) -> float:
        """How much of the momentum M of all gradients before it G confirms, on average."""
        if self.steps == 1 or not self.config.momentum:
            self.averaged(layer, "products", torch.zeros(2, dtype=G.dtype))
            return 1.0
        M = M / (1 - self.config.momentum ** (self.steps - 1))
        product, square = self.averaged(layer, "products", torch.stack([(M * G).sum(), M.square().sum()]))
        return (product / square).clamp(-1, 1).item()

    def precondition(self, N: Tensor, factors, square: Tensor, largest: Tensor, agreement: float) -> Tensor:
        """
        `B^(−p) N A^(−p)`. In `"eva_s"`, with the exponent that the agreement of gradients asks for, and with less of
        what lies outside of the bases where that is noise.
        """
        config = self.config
        corrected = N / (1 - config.momentum ** (self.steps + config.nesterov))
        noise = noise_of_momentum(config.momentum, self.steps, config.nesterov)
        powers = []
        for side, projected in zip(factors, (corrected.T, corrected), strict=True):
            if side is None:
                powers.append(None)
                continue
            U, values, trace, damping = side
            exponent, rest = config.exponent, 1.0
            if config.variant == "eva_s":
                exponent *= 1 - agreement / 2
                kept, others = (U.T @ projected).square().sum(), (projected - U @ (U.T @ projected)).square().sum()
                if trace - values.sum() > 1e-4 * trace:
                    ratio = signal(others, trace - values.sum(), noise) / signal(kept, values.sum(), noise)
                    rest = ratio.clamp(max=1).sqrt() ** trust(corrected.norm() / square.sqrt(), largest, noise)
            powers.append(inverse_powers(U, values, trace, damping, exponent, rest))
        A, B = powers
        P = N if A is None else N @ A
        return P if B is None else B @ P

    def factors(self, name: str, G: Tensor, X: Tensor, D: Tensor) -> list[tuple[Tensor, ...] | None]:
        """The input side's factor A and the output side's factor B: U, ℓ, trace and damping."""
        found = []
        a, g = self.means(name, X, D)
        decay = weight(self.config.decay, self.steps)
        scale = len(D) if self.config.g_scale == "sum" else 1 / len(D)
        sides = ("A", a, X.square().sum() / len(X), G.T @ G), ("B", g, scale * D.square().sum(), G @ G.T)
        bases = {side: self.basis(name, side, matrix) for side, _, _, matrix in sides}
        for side, mean, square, matrix in sides:
            if self.config.variant == "eva_s":
                before = self.averages.get((name, f"trace {side}"))
                trace = self.averaged(name, f"trace {side}", torch.trace(matrix))
                F = self.averages.get((name, f"F {side}"), torch.zeros_like(matrix))
                if self.refreshes:
                    others = G.T @ bases["B"] if side == "A" else G @ bases["A"]
                    F, U, values = ritz_step(F, bases[side], others, matrix, decay)
                else:  # what is kept is kept in units of the trace
                    F, U = F * (trace / before), bases[side]
                    values = torch.diag(U.T @ F @ U)
                self.averages[name, f"F {side}"], self.averages[name, f"U {side}"] = F, U
            else:
                trace = self.refreshed(name, f"trace {side}", square)
                U, values = (mean / mean.norm()).unsqueeze(1), mean.square().sum().unsqueeze(0)
            relative = trace / len(U) if self.config.damping_mode == "relative" else 1
            found.append((U, values, trace, self.config.damping * relative))
        return [found[0], None if self.config.variant == "eva_f" else found[1]]

    def basis(self, name: str, side: str, matrix: Tensor) -> Tensor:
        """U of the last step, or at the first step one that is found in its gradient."""
        if (name, f"U {side}") in self.averages or self.config.variant != "eva_s":
            return self.averages.get((name, f"U {side}"))
        return first_basis(self.guess(len(matrix), min(self.config.rank, len(matrix))), matrix)

    def adam_direction(self, name: str, gradient: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        zero = torch.zeros_like(gradient)
        first, second = self.adam.get(name, (zero, zero))
        first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
        self.adam[name] = first, second
        denominator = (second / (1 - beta2**self.steps)).sqrt() + self.eps
        return first / (1 - beta1**self.steps) / denominator

    def weight_decay_of(self, parameter: Tensor) -> float:
        """Biases and the parameters of norms get none."""
        return self.weight_decay if parameter.ndim >= 2 else 0.0
