"""Pickle checks: what a pickle would cost to read, found from its opcodes before it is read.

A few bytes of a pickle can make a value that takes for ever to hash, or that ends the process: a tuple of itself twice,
forty times over; a tuple nested half a million times; a memo of a billion entries. C code hashes and grows, without any
way to stop it, so such pickles are refused before it sees them. Nothing here is run, and no value is made: one number
is kept for each value on the stack.
"""

from __future__ import annotations

import pickle
import re
from typing import NamedTuple

_DEEPEST_KEY = 500  # levels of tuples
LARGEST_KEY = 1000
"""Values in a tuple that is a key or a member of a set, with those in its tuples, as often as they are hashed."""
LONGEST_KEY = 1 << 16
"""Bytes of a text that is a key."""
LARGEST_INTEGER = 1024
"""Bytes; Python writes no integer of more than 4300 digits out, which are 1786 bytes."""
_MOST_HASHED = 30_000_000  # values in tuples that are keys: half a second
MOST_EQUAL_HASHES = 100
"""Different values of one hash; n of them as keys take n^2 comparisons."""
_MOST_KEYS = 3000  # tuples and other compound values as keys, which may well have one hash
_OBJECTS = 100 << 20, 64  # bytes of memory for objects: at least, and for each byte of the pickle
_SET_BYTES, _CONTAINER_BYTES = 216, 64

# The cost of a value is its depth as a tuple, shifted by 64 bits, plus the values to visit when it is hashed.
_LEVEL = 64
_STEPS = (1 << _LEVEL) - 1
_LONG_TEXT = LARGEST_KEY + 1

_GET = rb"(?:h.|j....)"
_PUT = rb"(?:q.|r..[\x00-\x3f]\x00)"
_INT = rb"(?:K.|M..|J....)"
_SIZES = (
    rb"(?:" + _INT + rb"(?:\x85|" + _INT + rb"(?:\x86|" + _INT + rb"\x87))" + _PUT + rb"|\)|\("
    + _INT + rb"{4,8}t" + _PUT + rb"|" + _GET + rb")"
)  # fmt: skip
_DIGITS = b"|".join(rb"X%b\x00\x00\x00%b" % (bytes([n]), b"[0-9]" * n) for n in range(1, 8))
_TENSOR = (
    _GET + rb"\(\(" + _GET + _GET + rb"(?:(?:" + _DIGITS + rb")" + _PUT + rb"|" + _GET + rb")" + _GET + _INT + rb"t"
    + _PUT + rb"Q" + _INT + _SIZES + _SIZES + rb"[\x88\x89]" + _GET + rb"\)R" + _PUT + rb"t" + _PUT + rb"R" + _PUT
)  # fmt: skip
"""A tensor after the first, as torch.save writes it: all of its tuples are small, and no PUT is far."""

_FIXED = {  # bytes of the argument of opcodes that push a value that is cheap to hash
    **dict.fromkeys(b"N)]}\x88\x89\x8f\x97", 0), **dict.fromkeys(b"K\x82", 1), **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"J\x84", 4), b"G"[0]: 8,
}  # fmt: skip
_SIZED = {  # bytes of the length before a text, bytes or an integer
    **dict.fromkeys(b"U\x8cC\x8a", 1), **dict.fromkeys(b"XTB\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8)
}  # fmt: skip
_LINES = {**dict.fromkeys(b"ILFSVP", 1), b"c"[0]: 2}
_POPS = {b"Q"[0]: 1, 0x93: 2, b"R"[0]: 2, 0x81: 2, 0x92: 3}  # values that an opcode takes for one new one
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_MEMORY = {**dict.fromkeys(b"]}", _CONTAINER_BYTES), **dict.fromkeys(b"R\x81\x92\x8f\x91io", _SET_BYTES)}


class Checked(NamedTuple):
    """A pickle that takes neither too long nor too much memory to read.

    Attributes:
        end: the offset after it. If an opcode is invalid, at which an unpickler stops, the number of bytes.
        hashes: it has so many compound keys that their hashes have to be compared while they are read.
    """

    end: int
    hashes: bool


def check(data: bytes, *, whole: bool = True) -> Checked | None:
    """Check the opcodes of a pickle, and find its end.

    Args:
        data: begins with the pickle; other bytes may follow.
        whole: no more bytes are to be had.

    Returns:
        What was found; None if the pickle goes on after the data, and there is more.

    Raises:
        pickle.UnpicklingError: it would take too long, or too much memory.
    """
    walk = _Walk(data)
    try:
        end = walk.run()
    except EOFError:
        if not whole:
            return None
        end = len(data)
    except OverflowError as error:  # if there is no memory for a bytearray, Python prints an error that nobody catches
        if whole:
            raise pickle.UnpicklingError("a bytearray longer than the pickle") from error
        return None
    except (IndexError, ValueError):  # an empty stack, no mark, a number that is none
        end = len(data)
    return Checked(end, walk.compound > _MOST_KEYS)


class _Walk:
    """One walk over the opcodes, with the cost of each value on the stack and in the memo."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.hashed = 0
        self.compound = 0
        self.hashes: dict[int, set[int]] = {}

    def run(self) -> int:
        data, at, size_of_data = self.data, 0, len(self.data)
        stack: list[int] = []
        marks: list[int] = []
        memo: dict[int, int] = {}
        # Compiling takes longer than a small pickle.
        tensor = re.compile(_TENSOR, re.DOTALL).match if len(data) > 1 << 12 else None
        skipped = False
        memory, most = 0, _OBJECTS[0] + _OBJECTS[1] * len(data)
        push = stack.append
        while True:
            if at >= size_of_data:
                raise EOFError
            op = data[at]
            at += 1
            if op == 0x68 or op == 0x6A:  # BINGET, LONG_BINGET
                if tensor is not None and (found := tensor(data, at - 1)) is not None:
                    at = found.end()
                    push(1)
                    skipped = True
                    continue
                size = 1 if op == 0x68 else 4
                push(memo.get(int.from_bytes(data[at : at + size], "little"), 1))
                at += size
            elif op == 0x58:  # BINUNICODE
                size = int.from_bytes(data[at : at + 4], "little")
                push(1 if size <= LONGEST_KEY else _LONG_TEXT)
                at += 4 + size
            elif op == 0x71 or op == 0x72:  # BINPUT, LONG_BINPUT
                size = 1 if op == 0x71 else 4
                index = int.from_bytes(data[at : at + size], "little")
                if size == 4 and index > at:
                    raise pickle.UnpicklingError("a memo with more entries than it has opcodes")
                memo[index] = stack[-1]
                at += size
            elif op in _FIXED:
                push(1)
                at += _FIXED[op]
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op in _TUPLES or op == 0x74:
                first = marks.pop() if op == 0x74 else len(stack) - _TUPLES[op]
                if first < 0:
                    return len(data)
                cost = _tuple(stack[first:])
                del stack[first:]
                push(cost)
            elif op in _POPS:
                del stack[len(stack) - _POPS[op] :]
                push(1)
            elif op == 0x73:  # SETITEM
                self.hash(stack[-2:-1])
                del stack[-2:]
            elif op in b"ude\x90\x91lo1":  # all since the mark, which are gone
                first = marks.pop()
                if op in b"ud":  # SETITEMS, DICT
                    self.hash(stack[first::2])
                elif op in b"\x90\x91":  # ADDITEMS, FROZENSET
                    self.hash(stack[first:])
                del stack[first:]
                if op in b"d\x91lo":
                    push(2 if op == 0x91 else 1)  # FROZENSET, which may be a key
            elif op in b"ab":  # APPEND, BUILD
                stack.pop()
            elif op in _SIZED:
                size = int.from_bytes(data[at : at + _SIZED[op]], "little")
                at += _SIZED[op]
                if op == 0x96 and size > size_of_data - at:  # BYTEARRAY8
                    raise OverflowError
                if op in b"\x8a\x8b":  # LONG1, LONG4
                    push(self.integer(data[at : at + size], size))
                else:
                    push(1 if size <= LONGEST_KEY else _LONG_TEXT)
                at += size
            elif op == 0x94:  # MEMOIZE
                if skipped:
                    raise pickle.UnpicklingError("memo entries with and without a number")
                memo[len(memo)] = stack[-1]
            elif op in b"gp":  # GET, PUT
                end = self.after_line(at) - 1
                if end - at > 20:
                    raise pickle.UnpicklingError("a memo with more entries than it has opcodes")
                index = int(data[at:end])
                at = end + 1
                if op == 0x67:
                    push(memo.get(index, 1))
                elif index > at:
                    raise pickle.UnpicklingError("a memo with more entries than it has opcodes")
                else:
                    memo[index] = stack[-1]
            elif op == 0x32:  # DUP
                push(stack[-1])
            elif op in _LINES:
                start = at
                for _ in range(_LINES[op]):
                    at = self.after_line(at)
                if op in b"IL":
                    push(self.integer(data[start : at - 1].rstrip(b"L"), at - start, written=True))
                else:
                    push(1 if at - start <= LONGEST_KEY else _LONG_TEXT)
            elif op == 0x69:  # INST
                at = self.after_line(self.after_line(at))
                del stack[marks.pop() :]
                push(1)
            elif op == 0x30:  # POP, which takes a mark if that is the last
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    stack.pop()
            elif op == 0x80:  # PROTO
                at += 1
            elif op == 0x95:  # FRAME, whose content follows
                at += 8
            elif op == 0x2E:  # STOP
                return at
            elif op != 0x98:  # READONLY_BUFFER
                return len(data)
            if op in _MEMORY:
                memory += _MEMORY[op]
                if memory > most:
                    raise pickle.UnpicklingError("more objects than a file of its size has")

    def after_line(self, at: int) -> int:
        """Return the offset after the next end of a line."""
        end = self.data.find(b"\n", at)
        if end < 0:
            raise EOFError
        return end + 1

    def hash(self, keys: list[int]) -> None:
        """Refuse keys of a dict, or members of a set, that take long to hash; the argument is their costs."""
        for key in keys:
            if key > 1:
                self.hashed += key & _STEPS
                self.compound += 1
                if key & _STEPS > LARGEST_KEY or key >> _LEVEL > _DEEPEST_KEY:
                    raise pickle.UnpicklingError("a key that is too large")
        if self.hashed > _MOST_HASHED:
            raise pickle.UnpicklingError("keys that are too large")

    def integer(self, raw: bytes, size: int, *, written: bool = False) -> int:
        """Return the cost of an integer of so many bytes, or `written` as text."""
        if size > LARGEST_INTEGER:
            raise pickle.UnpicklingError("an integer of too many digits")
        if size >= 8:
            value = int(raw) if written else int.from_bytes(raw, "little", signed=True)
            if value != hash(value):  # which below 2**61 is the integer itself
                known = self.hashes.setdefault(hash(value), set())
                known.add(value)
                if len(known) > MOST_EQUAL_HASHES:
                    raise pickle.UnpicklingError("too many integers with one hash")
        return 1 if size <= 64 else size // 8


def _tuple(items: list[int]) -> int:
    """Return the cost of a tuple of values with these costs."""
    if len(items) == 1:  # by the hundred thousand in a tuple that is deep
        (cost,) = items
        level, steps = cost >> _LEVEL, 1 + (cost & _STEPS)
        return min(level + 1, _DEEPEST_KEY + 1) << _LEVEL | min(steps, _STEPS)
    level = max(items, default=1) >> _LEVEL
    steps = 1 + (sum(items) if level == 0 else sum(cost & _STEPS for cost in items))
    return min(level + 1, _DEEPEST_KEY + 1) << _LEVEL | min(steps, _STEPS)
