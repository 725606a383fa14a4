"""Float64 twin of a chain: frozen layers with LoRA or DoRA, activations, heads. Forward only; gradients of
the core are compared with central differences of this."""

import math

import numpy as np

ERF = np.vectorize(math.erf)


def activate(name, z):
    if name == "relu":
        return np.maximum(z, 0.0)
    if name == "tanh":
        return np.tanh(z)
    return z * 0.5 * (1.0 + ERF(z / math.sqrt(2.0)))


class Twin:
    """Weights in PEFT's orientation: W (out, in), A (rank, in), B (out, rank)."""

    def __init__(self, layers, factors, scaling, activation="relu", head="cross_entropy", magnitudes=None):
        self.layers = [(np.asarray(w, float), None if b is None else np.asarray(b, float)) for w, b in layers]
        self.factors = [(np.asarray(a, float), np.asarray(b, float)) for a, b in factors]
        self.scaling, self.activation, self.head = scaling, activation, head
        self.magnitudes = None if magnitudes is None else [np.asarray(m, float) for m in magnitudes]
        # DoRA's norms are constants in backward, so differences are taken at fixed norms.
        self.norms = [np.linalg.norm(w + scaling * b @ a, axis=1) for (w, _), (a, b) in self.pairs()]

    def pairs(self):
        return list(zip(self.layers, self.factors, strict=True))

    def forward(self, x):
        h = np.asarray(x, float)
        for i, ((w, bias), (a, b)) in enumerate(self.pairs()):
            z = h @ (w + self.scaling * b @ a).T
            if self.magnitudes is not None:
                z = z * (self.magnitudes[i] / self.norms[i])
            if bias is not None:
                z = z + bias
            h = activate(self.activation, z) if i + 1 < len(self.layers) else z
        return h

    def losses(self, x, y):
        z = self.forward(x)
        if self.head == "mse":
            return 0.5 * ((z - np.asarray(y, float)) ** 2).sum(1)
        top = z.max(1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(z - top).sum(1))
        return total - z[np.arange(len(z)), np.asarray(y)]

    def gradient(self, x, y, tensor, h=1e-6):
        """Central differences of the mean loss with respect to one array of this twin."""
        out = np.zeros_like(tensor)
        for at in np.ndindex(*tensor.shape):
            keep = tensor[at]
            tensor[at] = keep + h
            up = self.losses(x, y).mean()
            tensor[at] = keep - h
            down = self.losses(x, y).mean()
            tensor[at] = keep
            out[at] = (up - down) / (2.0 * h)
        return out


def adamw(weights, grads, state, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """One AdamW step in place on lists of float64 arrays; state is a list of (m, v)."""
    for w, g, (m, v) in zip(weights, grads, state, strict=True):
        w *= 1.0 - lr * weight_decay
        m += (1.0 - betas[0]) * (g - m)
        v += (1.0 - betas[1]) * (g * g - v)
        w -= lr * (m / (1.0 - betas[0] ** t)) / (np.sqrt(v / (1.0 - betas[1] ** t)) + eps)
