"""Rules that decide nothing, and why: for other models, misspelt, or taken by earlier rules. Pure functions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from harness.policy import Rule, concerns_file_type, concerns_model


@dataclass(frozen=True)
class Idle:
    """What a policy's rules for a file type miss in one model.

    rules: names of those that could concern it and decide no tensor; other_models: names of those for tensors, heads
    or experts it does not have; misspelt: (rule, role) of roles that neither this model nor the GGUF format knows.
    """

    rules: tuple[str, ...] = ()
    other_models: tuple[str, ...] = ()
    misspelt: tuple[tuple[str, str], ...] = ()


def find_idle(
    rules: Sequence[Rule],
    used: Collection[str],
    file_type: str,
    gqa: float,
    n_experts: int,
    model_roles: Collection[str],
) -> Idle:
    """`used`: names of the rules that decided a tensor; `model_roles`: roles of all tensors of the model."""
    here = [rule for rule in rules if concerns_file_type(rule, file_type)]
    misspelt = tuple((rule.name, role) for rule in here for role in rule.roles if not _is_role(role, model_roles))
    names_with_typos = {name for name, _ in misspelt}
    idle: list[str] = []
    other: list[str] = []
    for rule in here:
        if rule.name in used:
            continue
        lacks_roles = bool(rule.roles) and not set(rule.roles) & set(model_roles)
        foreign = not concerns_model(rule, gqa, n_experts) or (lacks_roles and rule.name not in names_with_typos)
        (other if foreign else idle).append(rule.name)
    return Idle(tuple(idle), tuple(other), misspelt)


def _is_role(role: str, model_roles: Collection[str]) -> bool:
    return role in model_roles or role.removesuffix(".bias") in _roles_of_gguf()


@cache
def _roles_of_gguf() -> frozenset[str]:
    """The names that the gguf package knows, without blk.N.: those of all architectures."""
    from gguf.constants import TENSOR_NAMES

    return frozenset(name.removeprefix("blk.{bid}.") for name in TENSOR_NAMES.values())
