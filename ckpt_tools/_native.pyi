from array import array

def sum_parts(
    terms: bytes,
    out: int,
    common: float,
    limit: float,
    copied: bool,
    checked: bool,
    summed: bool,
    table: array[int],
    crcs: array[int],
    bad: bytearray,
    /,
) -> tuple[int, int, int, int]: ...
