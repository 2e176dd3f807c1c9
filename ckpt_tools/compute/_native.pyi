from array import array

def sum_large(
    terms: bytes,
    out: int,
    common: float,
    limit: float,
    copied: bool,
    checked: bool,
    wants_crc: bool,
    rows: array[int],
    crcs: array[int],
    bad: bytearray,
    scratch: bytearray,
    /,
) -> tuple[int, int, int, int]: ...
def sum_small(
    terms: bytes,
    out: int,
    common: float,
    limit: float,
    copied: bool,
    checked: bool,
    wants_crc: bool,
    rows: array[int],
    crcs: array[int],
    bad: bytearray,
    scratch: bytearray,
    packed: bytearray,
    /,
) -> tuple[int, int, int, int]: ...
def crc32(data: bytes | memoryview, /) -> int: ...
def start_disk(fd: int, offset: int, nbytes: int, /) -> None: ...
