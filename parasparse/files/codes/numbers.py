"""Numbers of any size as bytes: 7 bits a byte, the lowest first, and 128 more while some follow.

The code is also known as unsigned LEB128.
"""

_MOST_BITS = 63


def pack_number(number: int) -> bytes:
    """Return the bytes of `number`, which is not negative.

    Examples:
        >>> pack_number(5).hex(), pack_number(300).hex()
        ('05', 'ac02')
    """
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes(found + bytes([number]))


class NumberReader:
    """A place in `data`, from which numbers and bytes are taken: ValueError if too few are left."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def number(self) -> int:
        """Return the next number."""
        number = 0
        for shift in range(0, _MOST_BITS, 7):
            if self.left == 0:
                raise ValueError("a number must follow; no byte does.")
            byte = self._data[self._place]
            self._place += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError(f"a number has more than {_MOST_BITS} bits.")

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        if nbytes > self.left:
            raise ValueError(f"{nbytes} bytes must follow; {self.left} do.")
        self._place += nbytes
        return self._data[self._place - nbytes : self._place]

    @property
    def left(self) -> int:
        """Bytes that have not been taken."""
        return len(self._data) - self._place
