"""
The optimizer a second time, with the formulas of `reference`: in float64, one layer at a time.

It shares nothing with the package either: the inputs and output gradients of a layer are taken with
`torch.autograd.grad`, token by token. `X` holds the inputs of a layer as rows `(N, d_in)`, `D` the gradients at its
output as rows `(N, d_out)`, and `G` is the gradient of its weight as a matrix `(d_out, d_in)`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from reference import (
    average,
    axis_means,
    eva,
    eva_f,
    eva_s,
    first_basis,
    inverse_powers,
    kl_factor,
    mean_squares_of_rows,
    noise_of_momentum,
    rescale_factor,
    ritz_step,
    signal,
    step_of_adamw,
    trust,
    weight,
)
from torch import Tensor, nn

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
            lr = self.lr * self.reach(layer)
            largest = 0.05 * root_mean_square / (4 * lr) if lr else torch.tensor(math.inf, dtype=G.dtype)
            P = self.precondition(N, factors, square, largest, agreement)
            shares = self.averaged(layer, "rows", mean_squares_of_rows(P))
            largest = largest.clamp(min=0.2)
            step = step_of_adamw(P, shares, N, 1 - beta ** (self.steps + config.nesterov), square, largest)
            self.turned[layer] = N, step * self.reach(layer)
            parameter.sub_(lr * from_matrix(module, step.contiguous()))

    def reach(self, layer: str) -> float:
        """How many times as long the steps of a head are: as if it had as many outputs as inputs."""
        d_out, d_in = as_matrix(self.layers[layer], self.layers[layer].weight).shape
        in_list = any(
            isinstance(m, nn.ModuleList) and f"{layer}.".startswith(f"{name}.")
            for name, m in self.model.named_modules()
        )
        is_head = layer == list(self.layers)[-1] and not isinstance(self.layers[layer], nn.Conv2d) and not in_list
        return math.sqrt(d_in / d_out) if is_head and d_in > d_out else 1.0

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
