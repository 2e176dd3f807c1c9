"""Optimizer states: which optimizer one is of, told by the names of what it keeps, and how large each of these is."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ..formats.tree import contents, entries, tensors_in
from ..tensors import Tensor, TensorSpec


class Kept(NamedTuple):
    """What is kept under one name for all parameters.

    Attributes:
        nbytes, elements: of all of it.
        largest: elements of the largest tensor.
        dtypes: of its tensors.
    """

    nbytes: int = 0
    elements: int = 0
    largest: int = 0
    dtypes: frozenset[str] = frozenset()


class _Known(NamedTuple):
    """An optimizer, and what tells it.

    Attributes:
        name: of the optimizer.
        needed: names of what it keeps.
        further: names of what it may keep, too.
        options: of its groups, where names alone do not tell it.
    """

    name: str
    needed: frozenset[str]
    further: frozenset[str]
    options: frozenset[str]


def _known(name: str, needed: str, further: str = "", options: str = "") -> _Known:
    return _Known(name, *(frozenset(words.split()) for words in (needed, further, options)))


_FACTORS = "shampoo.inv_factor_matrices shampoo.factor_matrices_eigenvectors shampoo.corrected_eigenvalues"

# As published by torch, timm, transformers, fastai, pytorch_optimizer, and the authors of each. The more telling first.
_KNOWN = (
    _known("Adamax", "exp_avg exp_inf"),
    _known("Prodigy", "s p0 exp_avg_sq", "exp_avg", "d_coef"),
    _known("D-Adaptation of Adan", "s exp_avg exp_avg_sq exp_avg_diff", "pre_grad previous_grad", "d growth_rate"),
    _known("D-Adaptation of Adam", "s exp_avg exp_avg_sq", "", "d growth_rate"),
    _known("D-Adaptation of Lion", "s exp_avg", "", "d numerator_weighted"),
    _known("D-Adaptation of SGD", "z s x0", "", "d g0_norm"),
    _known("D-Adaptation of Adagrad", "sk x0", "alphak alpha_k", "d growth_rate"),
    _known("schedule-free RAdam", "z exp_avg_sq", "", "weight_lr_power silent_sgd_phase"),
    _known("schedule-free AdamW", "z exp_avg_sq", "", "weight_lr_power"),
    _known("schedule-free SGD", "z", "", "weight_lr_power"),
    _known("CAME", "exp_avg exp_avg_sq_row exp_avg_sq_col exp_avg_res_row exp_avg_res_col", "exp_avg_sq"),
    _known("GaLore Adafactor", "exp_avg_sq_row exp_avg_sq_col", "exp_avg exp_avg_sq projector", "rank update_proj_gap"),
    _known("Adafactor", "exp_avg_sq_row exp_avg_sq_col", "exp_avg exp_avg_sq"),
    _known("Adafactor", "exp_avg_sq_r exp_avg_sq_c", "exp_avg exp_avg_sq"),
    _known("Adafactor", "row_var col_var", "variance"),
    _known("APOLLO", "exp_avg exp_avg_sq", "projector", "rank update_proj_gap scale_type"),
    _known("GaLore AdamW", "exp_avg exp_avg_sq", "projector", "rank update_proj_gap"),
    _known("SOAP", "exp_avg exp_avg_sq GG Q"),
    _known("Shampoo", "pre_cond inv_pre_cond", "momentum_buffer"),
    _known("Shampoo", "precond inv_precond", "momentum_buffer"),
    _known("distributed Shampoo", "shampoo.factor_matrices", f"{_FACTORS} filtered_grad momentum adagrad rmsprop adam"),
    _known("Kron (PSGD)", "momentum_buffer Q"),
    _known("SM3", "accumulator", "momentum_buffer"),
    _known("Adan", "exp_avg exp_avg_sq exp_avg_diff", "neg_pre_grad previous_grad"),
    _known("AdEMAMix", "exp_avg_slow exp_avg_sq", "exp_avg_fast exp_avg"),
    _known("MARS", "exp_avg exp_avg_sq last_grad"),
    _known("AdaBelief or alike", "exp_avg exp_avg_var", "max_exp_avg_var"),
    _known("AdaHessian", "exp_avg exp_hessian_diag_sq"),
    _known("Sophia", "exp_avg hessian"),
    _known("SGDP", "momentum", "", "wd_ratio dampening"),
    _known("Adam-mini", "m vmean", "v"),
    _known("MADGRAD", "grad_sum_sq s", "x0"),
    _known("Muon, with Adam for some parameters", "momentum_buffer exp_avg exp_avg_sq", "", "use_muon"),
    _known("Muon, with Adam for some parameters", "momentum_buffer exp_avg exp_avg_sq", "", "ns_steps"),
    _known("Muon, with Adam for some parameters", "momentum_buffer moment1 moment2", "", "ns_steps"),
    _known("Muon", "momentum_buffer", "", "use_muon"),
    _known("Muon", "momentum_buffer", "", "ns_steps"),  # of its Newton-Schulz iteration
    _known("Adam family", "exp_avg exp_avg_sq", "max_exp_avg_sq"),
    _known("Lion or alike", "exp_avg"),
    _known("Adadelta", "square_avg acc_delta"),
    _known("RMSprop", "square_avg", "momentum_buffer grad_avg"),
    _known("Adagrad", "sum"),
    _known("ASGD", "ax"),
    _known("Rprop", "prev step_size"),
    _known("LBFGS", "d prev_flat_grad", "old_dirs old_stps ro al H_diag"),
    _known("LARS", "momentum_buffer", "", "trust_coefficient"),
    _known("LARS", "momentum_buffer", "", "trust_coeff"),
    _known("SGD with momentum", "momentum_buffer", "", "dampening"),
    _known("SGD with momentum, or alike", "momentum_buffer"),
    _known("Adam family", "grad_avg sqr_avg"),  # these three of fastai
    _known("RMSprop", "sqr_avg"),
    _known("SGD with momentum", "grad_avg"),
)

# Kept beside the state of any optimizer.
_ADDITIONS = {
    "lookahead_slow_buff": "Lookahead",
    "slow_buffer": "Lookahead",
    "master_param": "master weights",
}

_QUANTIZED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes keeps what FSDP must not touch."""
_BNB = re.compile(r"state[12]|qmap[12]|absmax[12]|(new_)?max[12]|[gu]norm_vec")


def optimizer_name(optimizer: Mapping[Any, Any]) -> str:
    """Name an optimizer by what it keeps for each parameter and by the options of its groups; ``unknown`` if unsure."""
    found, groups = kept(optimizer), _groups(optimizer.get("param_groups"))
    options = {key for group in groups for key in group if isinstance(key, str)}
    if not found:
        return _without_state(options, groups)
    # A scalar, such as a count of steps, tells nothing by being there, unless there is nothing else.
    large = {name for name, each in found.items() if each.largest != 1} or {*found} - {"step"}
    added = dict.fromkeys(words for name, words in _ADDITIONS.items() if name in large)
    name = _name(
        {key: each for key, each in found.items() if key not in _ADDITIONS}, large - {*_ADDITIONS}, options, groups
    )
    return ", with ".join([name, *added])


def _name(
    found: Mapping[str, Kept], large: Collection[str], options: Collection[str], groups: list[Mapping[Any, Any]]
) -> str:
    if "state1" in found and all(_BNB.fullmatch(name) for name in large):
        return _of_bitsandbytes(found, options)
    known = next(
        (
            each
            for each in _KNOWN
            if each.needed <= {*found} and {*large} <= each.needed | each.further and each.options <= {*options}
        ),
        None,
    )
    if known is None:
        return "unknown"
    if known.name == "Adam family":
        return _adam(options, groups, found) + (", amsgrad" if "max_exp_avg_sq" in found else "")
    if known.name == "RMSprop":
        momentum = " with momentum" if "momentum_buffer" in found else ""
        return known.name + momentum + (", centered" if "grad_avg" in found else "")
    return known.name


def _of_bitsandbytes(found: Mapping[str, Kept], options: Collection[str]) -> str:
    """Name an optimizer of bitsandbytes: all of its kinds keep ``state1``, and those with two moments ``state2``."""
    bits = "8-bit" if "uint8" in found["state1"].dtypes else "32-bit"
    norm = "unorm_vec" in found
    if "state2" not in found:
        name = "LARS" if norm else "Lion, SGD with momentum, RMSprop or Adagrad"
    elif found["state1"].elements == 2 * found["state2"].elements:  # a fast and a slow moment in one tensor
        name = "AdEMAMix"
    else:
        name = "LAMB" if norm else "Adam or AdamW"
    galore = "GaLore " if {"rank", "update_proj_gap"} <= {*options} else ""
    return f"{galore}{name}, {bits} by bitsandbytes"


def _adam(options: Collection[str], groups: list[Mapping[Any, Any]], found: Mapping[str, Kept]) -> str:
    if "mu_product" in found:
        return "NAdam"
    if "exp_avg_sq" in found and found["exp_avg_sq"].largest == 1 != found["exp_avg"].largest:
        return "NovoGrad"  # one second moment for a tensor
    if "trust_ratio" in found or "trust_clip" in options or {"grad_averaging", "max_grad_norm"} <= {*options}:
        return "LAMB"
    decoupled = {bool(group["decoupled_weight_decay"]) for group in groups if "decoupled_weight_decay" in group}
    if "amsgrad" in options:
        # Before that option, nothing in the file told the two apart.
        return "AdamW" if decoupled == {True} else "Adam" if decoupled == {False} else "Adam or AdamW"
    return "RAdam" if decoupled else "Adam family"


def _without_state(options: Collection[str], groups: list[Mapping[Any, Any]]) -> str:
    """Tell plain SGD, which keeps nothing, from an optimizer that has not made a step."""
    if "dampening" in options:
        return "SGD with momentum, before its first step" if any(group.get("momentum") for group in groups) else "SGD"
    if "amsgrad" in options:
        return f"{_adam(options, groups, {})}, before its first step"
    return "without state"


def kept(optimizer: Mapping[Any, Any]) -> dict[str, Kept]:
    """Return what an optimizer keeps for the parameters, by name; what is no tensor is not kept."""
    found: dict[str, Kept] = {}
    for _, entry in entries(optimizer.get("state")):
        for name, value in _slots(entry):
            tensors = [value] if isinstance(value, Tensor) else [tensor for _, tensor in tensors_in(value)]
            if not tensors:
                continue
            specs = [tensor for tensor in tensors if isinstance(tensor, TensorSpec)]
            before = found.get(name, Kept())
            found[name] = Kept(
                before.nbytes + sum(spec.nbytes for spec in specs),
                before.elements + sum(spec.numel for spec in specs),
                max([before.largest, *(spec.numel for spec in specs)]),
                before.dtypes | {spec.dtype.name for spec in specs},
            )
    return found


def _slots(entry: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is kept for one parameter, with names as one parameter of any shape has them."""
    for key, value in contents(entry) if isinstance(entry, dict) else ():
        if key == _QUANTIZED:
            yield from _slots(value)
        elif isinstance(key, str):
            yield _plain(key), value


def _plain(name: str) -> str:
    """Take the numbers of axes and blocks off: ``precond_0``, ``["block_0", "shampoo", "factor_matrices", 0]``."""
    if name.startswith('["'):
        try:
            words = [
                word for word in json.loads(name) if isinstance(word, str) and not re.fullmatch(r"block_\d+", word)
            ]
        except ValueError:
            return name
        return ".".join(words).removesuffix(".quantized_values")
    return re.sub(r"_\d+$", "", name)


def _groups(groups: Any) -> list[Mapping[Any, Any]]:
    found = groups.values() if isinstance(groups, dict) else groups if isinstance(groups, list) else ()
    return [group for group in found if isinstance(group, dict)]
