"""The output projection of a model: what goes into it, tapped through the eval callback, and where its weights are."""

from pathlib import Path

import numpy as np

from harness.engine.collect import float_array
from harness.engine.gguf_file import source_tensors
from harness.engine.native import Tensor, ggml
from harness.ggml_types import UNQUANTIZED
from harness.kld_reference import OutputWeights

_NAMES = ("output.weight", "token_embd.weight")  # tied models multiply with the embeddings


class OutputTap:
    """Keeps the vectors that the output projection multiplies: the eval callback of a context, see `open_context`."""

    def __init__(self) -> None:
        self.on = True
        self._pieces: list[np.ndarray] = []
        self._product: int | None = None  # ggml's number of MUL_MAT
        self._failure: BaseException | None = None

    def on_tensor(self, address: int, ask: bool, _user_data: object) -> bool:
        """The callback: asks for the product with the output weights, and copies what they are multiplied with."""
        if not self.on:
            return False
        node = Tensor.from_address(address)
        if self._product is None and ggml.ggml_op_name(node.op) == b"MUL_MAT":
            self._product = node.op
        if (
            node.op != self._product
            or node.ne[1] == 0
            or node.src[0].contents.name.decode("utf-8", "replace") not in _NAMES
        ):
            return False
        if not ask and self._failure is None:
            try:
                inputs = node.src[1].contents
                if inputs.type == 0:
                    self._pieces.append(float_array(inputs)[0, 0].copy())
            except Exception as error:  # an exception cannot cross the C frames between here and llama_decode
                self._failure = error
        return True

    def take(self) -> np.ndarray:
        """What was kept since the last call: float32 [n, n_embd]; [0, 0] where the model has no such product."""
        if self._failure is not None:
            raise self._failure
        pieces, self._pieces = self._pieces, []
        return np.concatenate(pieces) if pieces else np.empty((0, 0), np.float32)


def output_weights(path: Path) -> OutputWeights | None:
    """Where the weights of the output projection are in a model's file, or in a part of it; None where there are none
    that are floats. Raises UserError as `read_header`."""
    found = {
        one.name: OutputWeights(one.path, one.offset, one.type, one.shape[1], one.shape[0])
        for one in source_tensors(path)
        if one.name in _NAMES and one.type in UNQUANTIZED and len(one.shape) == 2
    }
    return next((found[name] for name in _NAMES if name in found), None)
