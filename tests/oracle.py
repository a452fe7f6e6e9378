"""An independent quantizer in numpy, written from the formulas; shares no code with the package."""

import numpy as np


def round_half_even(x):
    return np.rint(x)


def weight_codes(w, scale, low, high, group):
    """w (N, K), scale (N, K // group): one loop a weight, as slow and plain as it gets."""
    codes = np.zeros(w.shape, np.int64)
    for n in range(w.shape[0]):
        for k in range(w.shape[1]):
            q = round_half_even(np.float32(w[n, k]) / np.float32(scale[n, k // group]))
            codes[n, k] = min(max(int(q), low), high)
    return codes


def two_level_codes(w, scale, group, size):
    """w (N, K), scale (N,), group (N, K // size) of integers: the 4-bit codes, and the 8-bit ones they stand for."""
    four, eight = np.zeros(w.shape, np.int64), np.zeros(w.shape, np.int64)
    for n in range(w.shape[0]):
        for k in range(w.shape[1]):
            g = int(group[n, k // size])
            q = int(round_half_even(np.float32(w[n, k]) / (np.float32(scale[n]) * np.float32(g))))
            four[n, k] = min(max(q, -8), 7)
            eight[n, k] = four[n, k] * g
    return four, eight


def token_linear(x, codes, scale, bias, high=127):
    """One dynamic scale a token: x (M, K), codes (N, K), scale (N,). Returns the codes of x and y in float64."""
    s = np.float32(1) / np.float32(high)
    x_codes, y = [], []
    for row in x.astype(np.float32):
        amax = max(np.abs(row).max(), np.float32(1e-7))
        q = np.clip(round_half_even((row / amax) / s), -high - 1, high).astype(np.int64)
        total = codes.astype(np.int64) @ q
        y.append(total * float(s) * scale.astype(np.float64) * float(amax) + bias)
        x_codes.append(q)
    return np.array(x_codes), np.array(y)


def shifted_linear(x, codes, scale, bias, high, ranges):
    """Each token around its own middle, or all around that of `ranges`, (half the width, middle)."""
    f = np.float32
    s = f(1) / f(high)
    x_codes, y = [], []
    for row in x.astype(f):
        half, middle = ranges or ((row.max() - row.min()) * f(0.5), (row.max() + row.min()) * f(0.5))
        unit = (row - f(middle)) * (f(1) / f(half)) if ranges else (row - middle) / half
        q = np.clip(round_half_even(unit / s), -high - 1, high).astype(np.int64)
        total = codes.astype(np.int64) @ q
        rowsum = codes.astype(np.int64).sum(1) * scale.astype(np.float64)
        y.append(total * float(s) * scale.astype(np.float64) * float(half) + float(middle) * rowsum + bias)
        x_codes.append(q)
    return np.array(x_codes), np.array(y)


def step_convolution(x, codes, scale, bias, amax, output_amax, stride, pad):
    """One scale for all of x and one for the output before the bias: the codes of the output, and y in float64."""
    f = np.float32
    s = f(1) / f(127)
    q = np.clip(round_half_even((x * (f(1) / f(amax))) / s), -128, 127).astype(np.int64)
    q = np.pad(q, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    size = codes.shape[-1]
    height, width = ((edge - size) // stride + 1 for edge in q.shape[2:])
    total = np.zeros((x.shape[0], codes.shape[0], height, width), np.int64)
    for i in range(size):
        for j in range(size):
            window = q[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            total += np.einsum("bchw,nc->bnhw", window, codes[:, :, i, j].astype(np.int64))
    out_scale = f(f(output_amax) / f(amax)) / f(127)
    factor = (s * scale.astype(f)) / out_scale
    y_codes = np.clip(round_half_even(total.astype(f) * factor.reshape(-1, 1, 1)), -128, 127)
    return y_codes.astype(np.int64), y_codes * float(out_scale) * amax + bias.reshape(-1, 1, 1)
