"""Prefixes: they come off to a fixpoint, and only where they are wrappers; tensors line up or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.checkpoints.prefixes import prefixes, unwrap
from ckpt_tools.errors import AlignmentError, UsageError
from ckpt_tools.series.align import align
from ckpt_tools.tensors import DTYPES, Storage, TensorSpec, UnsupportedTensor, make_spec

WRAPPERS = [
    "module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.", "_module.",
]  # fmt: skip


def tensor(shape: tuple[int, ...] = (2,), dtype: str = "float32") -> TensorSpec:
    return make_spec(DTYPES[dtype], shape, Storage(Path("x"), 0, 1 << 20))


@given(st.lists(st.sampled_from(WRAPPERS), max_size=5))
def test_unwrap_takes_prefixes_off_in_any_order_and_number(wrappers: list[str]) -> None:
    lead = "".join(wrappers)
    names = ["conv.weight", "head.bias"]
    assert list(unwrap(lead + name for name in names).values()) == names


def test_unwrap_takes_private_wrappers_off_in_the_middle() -> None:
    names = ["layers.0._checkpoint_wrapped_module.w", "a._fsdp_wrapped_module._orig_mod.b", "plain.w"]
    assert list(unwrap(names).values()) == ["layers.0.w", "a.b", "plain.w"]


def test_unwrap_keeps_a_real_submodule_called_module() -> None:
    names = ["encoder.module.weight", "module.weight", "head.bias"]
    assert list(unwrap(names).values()) == names
    names = ["encoder._module.weight", "_module.weight", "head.bias"]
    assert list(unwrap(names).values()) == names


def test_unwrap_keeps_a_prefix_of_all_names_that_is_no_wrapper() -> None:
    names = ["model.module.weight", "model.head.bias"]
    assert list(unwrap(names).values()) == names


def test_unwrap_keeps_a_prefix_that_some_names_lack() -> None:
    names = ["module.a", "b"]
    assert list(unwrap(names).values()) == names


def test_unwrap_rejects_names_that_would_become_one() -> None:
    with pytest.raises(
        AlignmentError, match=r"'_orig_mod\.a' and 'a' are both 'a'|'a' and '_orig_mod\.a' are both 'a'"
    ):
        unwrap(["_orig_mod.a", "a"])


def test_prefixes_counts_prefixes_by_their_place() -> None:
    assert prefixes(["module.a", "module._orig_mod.b", "x._orig_mod.c"]) == {"module.": 2, "_orig_mod.": 2}
    assert prefixes(["encoder.module.weight", "module"]) == {}


def test_align_keeps_the_order_of_the_last_checkpoint() -> None:
    states = [{"a": tensor(), "b": tensor()}, {"b": tensor(), "a": tensor()}]
    assert list(align(states, ["1", "2"]).aligned) == ["b", "a"]


def test_align_says_which_file_lacks_a_name_and_how_many_have_it() -> None:
    states = [{"a": tensor(), "head.bias": tensor()}] * 4 + [{"a": tensor()}]
    with pytest.raises(
        AlignmentError, match=r"^e\.pth has no tensor 'head\.bias' \(4 of 5 files have it\)\. Use `keys='intersection'`"
    ):
        align(states, ["a.pth", "b.pth", "c.pth", "d.pth", "e.pth"])


def test_align_by_intersection_keeps_what_all_share_and_says_what_goes() -> None:
    plan = align([{"a": tensor(), "b": tensor()}, {"a": tensor()}], ["1", "2"], keys="intersection")
    assert list(plan.aligned) == ["a"]
    assert plan.left_out == ("b",)


def test_align_by_union_keeps_all_and_marks_what_is_missing() -> None:
    plan = align([{"a": tensor(), "b": tensor()}, {"a": tensor()}], ["1", "2"], keys="union")
    assert plan.aligned["b"][1] is None


def test_align_rejects_files_with_nothing_in_common() -> None:
    with pytest.raises(AlignmentError, match="share no tensor"):
        align([{"a": tensor()}, {"b": tensor()}], ["1", "2"], keys="intersection")


@pytest.mark.parametrize("shapes", [((1,), ()), ((3,), (1, 3)), ((2, 1), (2, 2)), ((1,), (4,))])
def test_align_rejects_shapes_that_would_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(AlignmentError, match=r"'w' has shape .* in one\.pth but .* in two\.pth"):
        align([{"w": tensor(shape)} for shape in shapes], ["one.pth", "two.pth"])


def test_align_rejects_a_changing_dtype_unless_an_output_dtype_is_chosen() -> None:
    states = [{"w": tensor()}, {"w": tensor(dtype="float16")}]
    with pytest.raises(AlignmentError, match=r"float32 in 1 but float16 in 2\. .*`dtype='float32'`"):
        align(states, ["1", "2"])
    assert list(align(states, ["1", "2"], mixed_dtypes=True).aligned) == ["w"]


def test_align_never_mixes_an_integer_with_a_float() -> None:
    states = [{"w": tensor()}, {"w": tensor(dtype="int64")}]
    with pytest.raises(AlignmentError, match="cannot be averaged"):
        align(states, ["1", "2"], mixed_dtypes=True)


def test_align_by_order_pairs_by_position_and_takes_the_last_names() -> None:
    plan = align(
        [{"a": tensor((1,)), "b": tensor((2,))}, {"x": tensor((1,)), "y": tensor((2,))}], ["1", "2"], match="order"
    )
    assert {name: [t.shape for t in row if t] for name, row in plan.aligned.items()} == {
        "x": [(1,), (1,)],
        "y": [(2,), (2,)],
    }


def test_align_by_order_rejects_lists_of_different_length() -> None:
    with pytest.raises(AlignmentError, match=r"1 holds 1 tensors, 2 2\. The counts must be equal"):
        align([{"a": tensor()}, {"x": tensor(), "y": tensor()}], ["1", "2"], match="order")


def test_align_rejects_a_sparse_tensor_by_name() -> None:
    with pytest.raises(AlignmentError, match=r"1: 'w' is sparse, which cannot be averaged"):
        align([{"w": UnsupportedTensor("sparse")}], ["1"])


def test_align_rejects_unknown_rules() -> None:
    with pytest.raises(UsageError, match="strict, intersection, union"):
        align([{"a": tensor()}], ["1"], keys="loose")
