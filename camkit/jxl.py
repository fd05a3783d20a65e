"""The size of a JPEG XL picture, from its header; the plug-in of PIL tells it after decoding."""

_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
_CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"


def jxl_size(data: bytes) -> tuple[int, int]:
    """Return columns and rows, as ISO/IEC 18181-1 stores them.

    Raises:
        ValueError: the data hold no JPEG XL picture.
    """
    stream = _codestream(data) if data.startswith(_CONTAINER) else data
    if not stream.startswith(b"\xff\x0a") or len(stream) < 4:
        raise ValueError("it holds no JPEG XL picture")
    bits = _Bits(stream[2:18])
    small = bits.take(1)
    rows = _small(bits) if small else _side(bits)
    ratio = bits.take(3)
    if ratio:
        numerator, denominator = _RATIOS[ratio]
        return rows * numerator // denominator, rows
    return (_small(bits) if small else _side(bits)), rows


def _codestream(data: bytes) -> bytes:
    """Return the start of the picture in a file of boxes."""
    at = 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        header = 8
        if length == 1:
            length, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind == b"jxlc":
            return data[at + header : at + header + 32]
        if kind == b"jxlp":  # a part, after its number
            return data[at + header + 4 : at + header + 36]
        if length < header:
            break
        at += length
    return b""


class _Bits:
    """Bits from the lowest of each byte on."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        return value


def _small(bits: _Bits) -> int:
    return 8 * (1 + bits.take(5))


def _side(bits: _Bits) -> int:
    return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])
