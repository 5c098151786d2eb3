"""Reading flatbuffers by field number: what it takes to look into a program file that may be damaged."""

import struct
from dataclasses import dataclass


class Buffer:
    """Bytes of a flatbuffer. Tables and vectors overlap only in a hostile one: at most as many items are read as its
    bytes could hold, a few times over."""

    def __init__(self, data: bytes | memoryview):
        self.data = memoryview(data)
        self._left = 4 * len(data) + 64

    def root(self, start: int = 0) -> "Table":
        return Table(self, start + self.number(start, "I"))

    def number(self, at: int, kind: str) -> int | float:
        """The number of this `struct` format at byte `at`. Raises ValueError outside of the buffer."""
        if at < 0 or at + struct.calcsize("<" + kind) > len(self.data):
            raise ValueError(f"damaged: it points to byte {at} of {len(self.data)}")
        return struct.unpack_from("<" + kind, self.data, at)[0]

    def spend(self, items: int) -> None:
        self._left -= items
        if self._left < 0:
            raise ValueError("damaged: it has more items than its bytes can hold")


@dataclass(frozen=True)
class Table:
    """A table at byte `at`, which points back to the offsets of its fields. An absent field has its default."""

    buffer: Buffer
    at: int

    def number(self, field: int, kind: str, default: int | float = 0) -> int | float:
        place = self._place(field)
        return default if place is None else self.buffer.number(place, kind)

    def text(self, field: int) -> str:
        return bytes(self.bytes(field)).decode("utf-8")

    def bytes(self, field: int) -> memoryview:
        start, length = self._vector(field, 1)
        return self.buffer.data[start : start + length]

    def numbers(self, field: int, kind: str) -> list[int]:
        size = struct.calcsize("<" + kind)
        start, length = self._vector(field, size)
        return [self.buffer.number(start + i * size, kind) for i in range(length)]

    def table(self, field: int) -> "Table | None":
        place = self._place(field)
        return None if place is None else Table(self.buffer, place + self.buffer.number(place, "I"))

    def tables(self, field: int) -> list["Table"]:
        start, length = self._vector(field, 4)
        places = range(start, start + 4 * length, 4)
        return [Table(self.buffer, place + self.buffer.number(place, "I")) for place in places]

    def length(self, field: int) -> int:
        """Of the vector of tables."""
        return self._vector(field, 4)[1]

    def _place(self, field: int) -> int | None:
        self.buffer.spend(1)
        vtable, entry = self.at - self.buffer.number(self.at, "i"), 4 + 2 * field
        if entry >= self.buffer.number(vtable, "H"):
            return None
        offset = self.buffer.number(vtable + entry, "H")
        return self.at + offset if offset else None

    def _vector(self, field: int, size: int) -> tuple[int, int]:
        """Where its first item is, and how many there are."""
        place = self._place(field)
        if place is None:
            return 0, 0
        at = place + self.buffer.number(place, "I")
        length = self.buffer.number(at, "I")
        if at + 4 + length * size > len(self.buffer.data):
            raise ValueError(f"damaged: {length} items at byte {at} of {len(self.buffer.data)}")
        self.buffer.spend(length)
        return at + 4, length
