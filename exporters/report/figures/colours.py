"""Define the colour scale of heat maps and error maps."""

MAGMA = ("000004", "180f3d", "440f76", "721f81", "9e2f7f", "cd4071", "f1605d", "fd9668", "feca8d", "fcfdbf")
"""Ten equally spaced colours of matplotlib's magma, dark for small values and visibly ordered without colour vision."""


def magma_palette() -> list[int]:
    """Return 256 colours as the palette of an image: red, green and blue of each, one after the other."""
    anchors = [tuple(bytes.fromhex(colour)) for colour in MAGMA]
    palette = []
    for level in range(256):
        place, within = divmod(level * (len(anchors) - 1), 255)
        near, far = anchors[place], anchors[min(place + 1, len(anchors) - 1)]
        palette += [round(a + (b - a) * within / 255) for a, b in zip(near, far, strict=True)]
    return palette
