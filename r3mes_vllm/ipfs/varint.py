"""Unsigned varints: 7 bits a byte, least significant first, minimal, at most 9 bytes.

https://github.com/multiformats/unsigned-varint
"""

LONGEST = 9


def encode(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def decode(data: bytes | bytearray | memoryview, at: int = 0) -> tuple[int, int] | None:
    """The number at `at` and where it ends; None if the bytes end within it.

    Raises ValueError if it is longer than 9 bytes or than it need be.
    """
    number = 0
    for index in range(LONGEST):
        if at + index >= len(data):
            return None
        byte = data[at + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if byte == 0 and index:
                raise ValueError("a varint is longer than it need be")
            return number, at + index + 1
    raise ValueError(f"a varint is longer than {LONGEST} bytes")
