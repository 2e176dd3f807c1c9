from array import array

NOT_READ: int
ENDS_EARLY: int
NOT_WRITTEN: int
"""Statuses of a failure."""
ROWS: int
"""Rows of coefficients, at most."""
AXES: int
"""Axes of a tile, at most."""
LIMITS: dict[str, float]
"""The dtypes that can be summed, by name: the smallest magnitude that overflows each."""

_Failure = tuple[int, int, int, int]  # status, slice, term (or target, if it is not written), errno

class Formula:
    """How the elements of some tensors are computed.

    Args:
        dtypes: one for each term, in the order of summation.
        rows: for each result: (kind of the sum; factor of each term, None if it is left out; last; lost), see
            `formula.Steps`.
        out: dtype of the results; None if bytes are copied and not looked at.
        itemsize: bytes of an element of a result.
        copied: the one term is the result, byte for byte.
        checked: if copied: look for NaN and infinity.
    """

    def __new__(
        cls,
        *,
        dtypes: tuple[str, ...],
        rows: tuple[tuple[int, tuple[float | None, ...], float, float], ...],
        out: str | None,
        itemsize: int,
        copied: bool,
        checked: bool,
    ) -> Formula: ...
    def fill(self, ends: array[int], scratch: bytearray, wants_crc: bool, /) -> tuple[_Failure | None, bytes, bool]:
        """Sum a slice from the inputs to the outputs.

        Args:
            ends: 64-bit: number of elements; descriptor and offset of each term; row, descriptor and offset of each
                target.
            scratch: as many bytes as `scratch` returns.

        Returns:
            (failure, 32-bit CRC of each row, True if NaN or infinity was found, or a sum that is not decided).
        """
    def pack(
        self, rows: array[int], scratch: bytearray, wants_crc: bool, /
    ) -> tuple[_Failure | None, bytearray, bytearray, bytearray]:
        """Sum small slices into memory.

        Args:
            rows: 64-bit, for each slice: number of elements; descriptor and offset of each term.

        Returns:
            (failure, results one behind the other, row after row; 32-bit CRC of each, row after row; 1 for each slice
            with NaN or infinity).
        """

    def fill_tile(
        self, sizes: array[int], strides: array[int], ends: array[int], scratch: bytearray, wants_crc: bool, /
    ) -> tuple[_Failure | None, bytes, bool]:
        """Sum a tile from the inputs to the outputs.

        Args:
            sizes: 64-bit: elements along each axis.
            strides: 64-bit, in elements: of each axis in the output, then in each term.
            ends: 64-bit: descriptor and offset of the first element in each term; row, descriptor and offset of each
                target.

        Returns:
            (failure, what each row contributes to the CRC-32 of all bytes up to its end, True if NaN or infinity was
            found).
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

def moments(address: int, dtype: str, shape: tuple[int, int, int], threads: int, /) -> bytearray:
    """Compute mean and M2, the sum of squared differences from the mean, of each channel.

    Args:
        address: of the first value in memory, which stays there during the call.
        dtype: float64, float32, bfloat16 or float16.
        shape: [outer, channels, inner], in C order, none of them 0.
        threads: at most; the result is the same for any number.

    Returns:
        float64 [2, channels]: means, then M2s; neither is finite if the channel has NaN or infinity.
    """

def scratch(rows: int, tiles: bool, /) -> int:
    """Return the bytes that a thread provides for so many rows, for tiles or for all else."""

def gram_scratch(count: int, /) -> int:
    """Return the bytes of scratch for so many rows."""

def crc32(data: bytes | memoryview, /) -> int: ...
def address(data: bytes | bytearray | memoryview | array[int], /) -> int:
    """Return where bytes are in memory, as long as they live and keep their size."""

def start_disk(fd: int, offset: int, nbytes: int, /) -> None: ...
