from array import array

NOT_READ: int
ENDS_EARLY: int
NOT_WRITTEN: int
"""Statuses of a failure."""
SCRATCH: int
"""Bytes of scratch that a thread provides."""
TILE_SCRATCH: int
"""The same for tiles."""
AXES: int
"""Axes of a tile, at most."""
LIMITS: dict[str, float]
"""The dtypes that can be summed, by name: the smallest magnitude that overflows each."""

_Failure = tuple[int, int, int, int]  # status, slice, term, errno

class Formula:
    """How the elements of some tensors are computed.

    Args:
        dtypes, coefficients: one for each term, in the order of summation.
        out: dtype of the result; None if bytes are copied and not looked at.
        itemsize: bytes of an element of the result.
        common: the sum is multiplied by this.
        anchored: sum up differences from the first term.
        copied: the one term is the result, byte for byte.
        checked: if copied: look for NaN and infinity.
    """

    def __new__(
        cls,
        *,
        dtypes: tuple[str, ...],
        coefficients: tuple[float, ...],
        out: str | None,
        itemsize: int,
        common: float,
        anchored: bool,
        copied: bool,
        checked: bool,
    ) -> Formula: ...
    def fill(self, row: array[int], scratch: bytearray, wants_crc: bool, /) -> tuple[_Failure | None, int, bool]:
        """Sum a slice from the inputs to the output.

        Args:
            row: 64-bit: number of elements; descriptor and offset in the output; descriptor and offset of each term.

        Returns:
            (failure, CRC-32, True if NaN or infinity was found).
        """
    def pack(
        self, rows: array[int], scratch: bytearray, wants_crc: bool, /
    ) -> tuple[_Failure | None, bytearray, bytearray, bytearray]:
        """Sum small slices into memory.

        Args:
            rows: 64-bit, for each slice: number of elements; descriptor and offset of each term.

        Returns:
            (failure, results one behind the other, 32-bit CRC of each, 1 for each with NaN or infinity).
        """

    def fill_tile(
        self, sizes: array[int], strides: array[int], places: array[int], scratch: bytearray, wants_crc: bool, /
    ) -> tuple[_Failure | None, int, bool]:
        """Sum a tile from the inputs to the output.

        Args:
            sizes: 64-bit: elements along each axis.
            strides: 64-bit, in elements: of each axis in the output, then in each term.
            places: 64-bit: descriptor and offset of the first element in the output, then in each term.

        Returns:
            (failure, what it contributes to the CRC-32 of all bytes up to its end, True if NaN or infinity was found).
        """
    def largest_tile(self, one_order: bool, /) -> int:
        """Return the number of elements that a tile may have; fewer if terms differ in their order."""

def gram(
    dtypes: tuple[str, ...], places: array[int], n: int, sums: bytearray, scratch: bytearray, /
) -> _Failure | None:
    """Add the inner products of rows of real numbers to sums, whose upper triangle is filled.

    Args:
        dtypes: of the real numbers of each row.
        places: 64-bit: descriptor and offset of each row, which counts as its difference from the last, but for that.
        n: numbers in a row.
        sums: float64, a square matrix with a row for each row, rounded up to a multiple of 4.
        scratch: `gram_scratch` bytes.
    """

def gram_scratch(count: int, /) -> int:
    """Return the bytes of scratch for so many rows."""

def crc32(data: bytes | memoryview, /) -> int: ...
def start_disk(fd: int, offset: int, nbytes: int, /) -> None: ...
