"""Define the colour scale of heat maps and error maps, and the colours of channels."""

MAGMA = ("000004", "180f3d", "440f76", "721f81", "9e2f7f", "cd4071", "f1605d", "fd9668", "feca8d", "fcfdbf")
"""Ten equally spaced colours of matplotlib's magma, dark for small values and visibly ordered without colour vision."""
CHANNEL_COLOURS = (
    *((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)),
    *((230, 159, 0), (86, 180, 233), (128, 128, 128), (150, 140, 20)),
)
"""Red, green and blue of lines that can be told apart without colour vision (Okabe and Ito 2008), the yellow darker."""


def magma_palette() -> list[int]:
    """Return 256 colours as the palette of an image: red, green and blue of each, one after the other."""
    anchors = [tuple(bytes.fromhex(colour)) for colour in MAGMA]
    palette = []
    for level in range(256):
        place, within = divmod(level * (len(anchors) - 1), 255)
        near, far = anchors[place], anchors[min(place + 1, len(anchors) - 1)]
        palette += [round(a + (b - a) * within / 255) for a, b in zip(near, far, strict=True)]
    return palette
