"""The colours of classes: the colour map of PASCAL VOC, which the whole field draws masks in."""


def voc_palette() -> list[int]:
    """Compute the VOC colour map as PIL wants it: 256 colours, red, green, blue, one after another.

    The bits of a class id are dealt out in turn to red, green and blue, highest colour bit first.

    >>> voc_palette()[12 * 3 : 13 * 3]  # dog
    [64, 0, 128]
    """
    return [_component(class_id, channel) for class_id in range(256) for channel in range(3)]


def _component(class_id: int, channel: int) -> int:
    return sum((class_id >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
