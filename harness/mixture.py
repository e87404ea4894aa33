"""What the standard file of a quant is: a file type of llama.cpp, and what a preset asks for on top. Pure functions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import QuantConfig
from harness.errors import UserError
from harness.ggml_types import FILE_TYPES, GGML_TYPES, fit_type
from harness.header import TensorInfo

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")  # what --token-embedding-type means
OUTPUT = "output.weight"

Types = Mapping[str, str]  # tensor name -> type


@dataclass(frozen=True)
class Mixture:
    """A file type, and the options of llama-quantize beside it; without any it is llama.cpp's own mixture.

    embedding_type: --token-embedding-type; output_type: --output-tensor-type; pure: --pure. plain_file_type: the one of
    llama.cpp that a reader would take the quant for; plain: (tensor, its type there) where this file has another.
    """

    file_type: str
    embedding_type: str | None = None
    output_type: str | None = None
    pure: bool = False
    description: str = ""
    plain_file_type: str = ""
    plain: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Mixture":
        """As `to_json` wrote it; `Record.flaw` checks what comes from files."""
        names = ("file_type", "embedding_type", "output_type", "pure", "plain_file_type")
        return cls(**{name: data[name] for name in names}, plain=tuple(data["plain"].items()))

    @property
    def is_preset(self) -> bool:
        """It asks for more than a file type, or is another one than its name says."""
        return bool(self.embedding_type or self.output_type or self.pure or self.file_type != self.plain_file_type)

    def asks_for(self, tensor_name: str) -> bool:
        """The preset and not llama.cpp chose the type of this tensor."""
        if tensor_name == OUTPUT:
            return self.pure or self.output_type is not None
        return self.pure or (self.embedding_type is not None and tensor_name in EMBEDDINGS)

    @property
    def words(self) -> str:
        """'Q8_0, embeddings and output BF16'; 'Q4_0, pure'."""
        parts = [self.file_type.upper(), *(["pure"] if self.pure else [])]
        embedding, output = ((one or "").upper() for one in (self.embedding_type, self.output_type))
        if embedding and embedding == output:
            parts.append(f"embeddings and output {embedding}")
        else:
            parts += [f"embeddings {embedding}"] if embedding else []
            parts += [f"output {output}"] if output else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """For the record: what was asked for, and where that differs from the plain type."""
        names = ("file_type", "embedding_type", "output_type", "pure", "plain_file_type")
        return {**{name: getattr(self, name) for name in names}, "plain": dict(self.plain)}


def plain_file_type(quant: QuantConfig) -> str:
    """llama.cpp's file type of the quant's name where there is one, else the one that the quant is made with."""
    assert quant.file_type is not None
    return quant.name if quant.name in FILE_TYPES else quant.file_type


def standard_mixture(
    quant: QuantConfig, run: Mapping[str, Types], plain_run: Mapping[str, Types], tensors: Sequence[TensorInfo]
) -> tuple[Mixture, dict[str, str], dict[str, str]]:
    """The quant's mixture, the type of every tensor that may be quantized, and the type asked where it fell back.

    run: `final` and `asked` of llama.cpp's dry run of the file type, pure if the quant is; plain_run: the plain type's.
    Unlike llama-quantize, which fails on them, embedding and output types that do not fit a width fall back as others
    do. Raises UserError where llama.cpp has nothing to fall back to.
    """
    assert quant.file_type is not None
    final, asked = dict(run["final"]), dict(run["asked"])
    widths = {tensor.name: tensor.shape[0] for tensor in tensors}
    embedding = quant.embedding_type
    if OUTPUT not in widths and not quant.pure:  # one tensor for both: llama.cpp takes it for the output
        embedding = embedding or quant.output_type
    for name, wanted in (*((name, embedding) for name in EMBEDDINGS), (OUTPUT, quant.output_type)):
        if wanted is None or name not in final:
            continue
        try:
            final[name] = fit_type(wanted, widths[name])
        except ValueError as error:
            raise UserError(f"quant={quant.name}: {name}: {error}") from error
        asked[name] = wanted
    plain = tuple((name, kind) for name, kind in plain_run["final"].items() if final.get(name) != kind)
    asks = (quant.embedding_type, quant.output_type, quant.pure, quant.description)
    return Mixture(quant.file_type, *asks, plain_file_type(quant), plain), final, asked


def plain_overrides(mixture: Mixture) -> str:
    """What to write on the command line for llama.cpp's own type where a preset has its name."""
    name = mixture.plain_file_type
    parts = [f"quant={name}", f"quant.name={name}_plain"]
    parts += [f"quant.file_type={name}"] if mixture.file_type != name else []
    parts += ["quant.embedding_type=null"] if mixture.embedding_type else []
    parts += ["quant.output_type=null"] if mixture.output_type else []
    return " ".join([*parts, *(["quant.pure=false"] if mixture.pure else [])])


def type_changes(changes: Iterable[tuple[str, str, str]]) -> str:
    """'token_embd Q8_0 -> Q5_1; ffn_down (15) IQ2_XS -> IQ2_XXS' from (role, old type, new type), the largest loss of
    bits first."""
    groups = Counter(changes)
    order = sorted(groups, key=lambda group: GGML_TYPES[group[2]].bpw - GGML_TYPES[group[1]].bpw)
    return "; ".join(
        f"{role}{f' ({groups[role, old, new]})' if groups[role, old, new] > 1 else ''} {old.upper()} -> {new.upper()}"
        for role, old, new in order
    )
