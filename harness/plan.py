"""Plans: which type every tensor of a variant gets, why, and what the file will weigh. Pure functions."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.ggml_types import GGML_TYPES, GGUF_ALIGNMENT, fit_type, requires_imatrix, tensor_bytes
from harness.header import TensorInfo
from harness.idle_rules import Idle, find_idle
from harness.mixture import Mixture
from harness.policy import Rule, Subject, choose, names_tensor
from harness.recipes import BLOCK, exact_pattern
from harness.store import key_of

STANDARD_RULE = "standard"  # the "rule" of a tensor that no policy rule names


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a variant.

    asked: the type that the rule (or llama.cpp's mixture) wants; type: what it gets after the shape fallback;
    standard_type: what it gets in a standard file. Tensors that llama.cpp never quantizes keep the source's type.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    quantizable: bool
    standard_type: str
    asked: str
    type: str
    rule: str

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of data, without padding."""
        return tensor_bytes(self.type, self.shape)

    @property
    def fell_back(self) -> bool:
        """The row width does not fit the asked type, so another one is taken."""
        return self.asked != self.type

    @property
    def lowered(self) -> bool:
        """Fewer bits than the same tensor has in a standard file."""
        return GGML_TYPES[self.type].bpw < GGML_TYPES[self.standard_type].bpw

    @property
    def raised(self) -> bool:
        """More bits than the same tensor has in a standard file."""
        return GGML_TYPES[self.type].bpw > GGML_TYPES[self.standard_type].bpw


@dataclass(frozen=True)
class Plan:
    """A variant before it is made. `file_type` is None for the reference itself."""

    quant: str
    mode: str
    policy: str | None
    file_type: str | None
    header_bytes: int
    tensors: tuple[TensorPlan, ...]
    idle: Idle = field(default_factory=Idle)  # rules of the policy that decide nothing
    metadata: tuple[tuple[str, str | int], ...] = ()  # what the file says of its origin, see harness.provenance
    unknown: tuple[str, ...] = ()  # tensors that llama.cpp does not know: no rule applies to them
    mixture: Mixture | None = None  # what the standard file is; None for the reference

    @cached_property
    def quantizable(self) -> tuple[TensorPlan, ...]:
        """The tensors that llama.cpp is willing to quantize."""
        return tuple(t for t in self.tensors if t.quantizable)

    @property
    def overrides(self) -> dict[str, str]:
        """Type by name for every quantizable tensor: what the quantizer is told."""
        return {t.name: t.type for t in self.quantizable}

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Data of all tensors, without header and padding."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Size of the file that will be written."""
        return self.header_bytes + sum(padded(t.n_bytes) for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.tensor_bytes / self.n_weights

    @property
    def fell_back(self) -> tuple[TensorPlan, ...]:
        """Tensors whose width does not fit the asked type."""
        return tuple(t for t in self.quantizable if t.fell_back)

    @property
    def lowered(self) -> tuple[TensorPlan, ...]:
        """Tensors with fewer bits than in the standard file."""
        return tuple(t for t in self.quantizable if t.lowered)

    @property
    def raised(self) -> tuple[TensorPlan, ...]:
        """Tensors with more bits than in the standard file."""
        return tuple(t for t in self.quantizable if t.raised)

    def share_of_weights(self, tensors: Iterable[TensorPlan]) -> float:
        """Their part of all weights, 0 to 1."""
        return sum(t.n_weights for t in tensors) / self.n_weights

    def type_of(self, tensor_name: str) -> str | None:
        """Type of one tensor; None when the model has none of that name."""
        return next((t.type for t in self.tensors if t.name == tensor_name), None)

    @property
    def needs_imatrix(self) -> tuple[str, ...]:
        """Names of the tensors that llama.cpp refuses to quantize without imatrix data."""
        if self.file_type is None:
            return ()
        return tuple(t.name for t in self.quantizable if requires_imatrix(t.name, t.type, self.file_type))

    @property
    def id(self) -> str:
        """Identity of the file's content, given the reference and the imatrix: file type and type of each tensor."""
        return key_of(self.file_type, {t.name: t.type for t in self.tensors})


def make_plan(
    *,
    quant: str,
    mode: str,
    policy: str | None,
    file_type: str,
    tensors: Sequence[TensorInfo],
    header_bytes: int,
    standard_final: Mapping[str, str],
    standard_asked: Mapping[str, str],
    rules: Sequence[Rule],
    metadata: Mapping[str, Any],
    unknown: Collection[str] = (),
    mixture: Mixture | None = None,
) -> Plan:
    """The plan of one variant.

    standard_final: the mixture's type for every tensor that llama.cpp is willing to quantize; standard_asked: what was
    wanted for those that fell back. `unknown`: tensors that keep llama.cpp's type whatever the rules say.
    Raises UserError when a rule asks for a type that the tensor's width cannot take.
    """
    gqa, n_experts = gqa_factor(metadata), expert_count(metadata)
    layers_of_role: dict[str, list[int]] = defaultdict(list)
    for tensor in tensors:
        role, layer = role_and_layer(tensor.name)
        if layer is not None:
            layers_of_role[role].append(layer)
    positions = {role: {layer: i for i, layer in enumerate(sorted(layers))} for role, layers in layers_of_role.items()}
    last_layer = max((layer for layers in layers_of_role.values() for layer in layers), default=0)
    used: set[str] = set()

    def plan_tensor(tensor: TensorInfo) -> TensorPlan:
        role, layer = role_and_layer(tensor.name)
        quantizable = tensor.name in standard_final
        standard = standard_final.get(tensor.name, tensor.type)
        asked, final, rule_name = standard_asked.get(tensor.name, standard), standard, STANDARD_RULE
        if quantizable and tensor.name not in unknown:
            position = None if layer is None else positions[role][layer]
            n_positions = None if layer is None else len(positions[role])
            choice = choose(
                rules,
                Subject(file_type, role, position, n_positions, gqa, n_experts, layer, last_layer, tensor.name),
            )
            if choice:
                asked, rule_name = choice.type, choice.text
                used.update(choice.rules)
                try:
                    final = fit_type(asked, tensor.shape[0])
                except ValueError as error:
                    raise UserError(f"policy {policy}, rule {rule_name}: {tensor.name}: {error}") from error
        return TensorPlan(tensor.name, role, layer, tensor.shape, quantizable, standard, asked, final, rule_name)

    planned = tuple(plan_tensor(t) for t in tensors)
    # A recipe may also name tensors that llama.cpp leaves alone: no mistake where they have that type.
    kept = [t for t in planned if not t.quantizable]
    used |= {r.name for r in rules for t in kept if t.type == r.type and names_tensor(r, t.name)}
    idle = find_idle(rules, used, file_type, gqa, n_experts, {t.role for t in planned})
    ignored = tuple(
        f"{r.name} for {t.name}"
        for r in rules
        if r.name in used
        for t in kept
        if t.type != r.type and exact_pattern(t.name) in r.tensors
    )
    idle = replace(idle, rules=idle.rules + ignored)
    return Plan(quant, mode, policy, file_type, header_bytes, planned, idle, unknown=tuple(unknown), mixture=mixture)


def placebo_plan(plan: Plan, seed: int | None) -> Plan:
    """The plan's types in the same number, on other tensors of the same role and shape: the same bytes in the file.

    Without a seed every role's assignments are turned by half the depth, so that what the ends had goes to the middle;
    with one they are shuffled among all tensors of one shape. A tensor that is alone of its kind (embeddings, output)
    keeps its type.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    groups: dict[Any, list[TensorPlan]] = defaultdict(list)
    for tensor in plan.quantizable:
        if tensor.layer is not None and tensor.name not in plan.unknown:
            groups[tensor.shape if rng else (tensor.role, tensor.shape)].append(tensor)
    moved: dict[str, TensorPlan] = {}
    for group in groups.values():
        group.sort(key=lambda t: (t.layer or 0, t.role))
        n = len(group)
        donors = rng.permutation(n) if rng else (np.arange(n) + n // 2) % n
        for tensor, donor in zip(group, donors, strict=True):
            given = group[int(donor)]
            moved[tensor.name] = replace(tensor, asked=given.asked, type=given.type, rule=f"placebo: {given.rule}")
    return replace(plan, tensors=tuple(moved.get(t.name, t) for t in plan.tensors))


def reference_plan(tensors: Sequence[TensorInfo], file_bytes: int) -> Plan:
    """The reference as a plan: every tensor keeps the type it has, nothing is written."""
    header_bytes = file_bytes - sum(padded(t.n_bytes) for t in tensors)
    return Plan(
        "reference",
        "reference",
        None,
        None,
        header_bytes,
        tuple(
            TensorPlan(t.name, *role_and_layer(t.name), t.shape, False, t.type, t.type, t.type, STANDARD_RULE)
            for t in tensors
        ),
    )


def padded(n_bytes: int) -> int:
    """Room that a tensor of that size takes in the file."""
    return -(-n_bytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def role_and_layer(name: str) -> tuple[str, int | None]:
    """('ffn_down', 3) for blk.3.ffn_down.weight; ('token_embd', None) for token_embd.weight."""
    match = BLOCK.fullmatch(name)
    rest, layer = (match[2], int(match[1])) if match else (name, None)
    return rest.removesuffix(".weight"), layer


def gqa_factor(metadata: Mapping[str, Any]) -> float:
    """Query heads per key-value head; the largest one where layers differ; 1.0 where the metadata does not say."""
    architecture = metadata.get("general.architecture")
    heads = metadata.get(f"{architecture}.attention.head_count")
    kv_heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    heads = heads if isinstance(heads, list) else [heads]
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads]
    n = max(len(heads), len(kv_heads))
    pairs = zip(heads * (n // len(heads)), kv_heads * (n // len(kv_heads)), strict=False)
    ratios = [q / k for q, k in pairs if isinstance(q, int) and isinstance(k, int) and k > 0]
    return max(ratios, default=1.0)


def expert_count(metadata: Mapping[str, Any]) -> int:
    """Experts of a mixture; 0 for a dense model."""
    value = metadata.get(f"{metadata.get('general.architecture')}.expert_count", 0)
    return value if isinstance(value, int) else 0
