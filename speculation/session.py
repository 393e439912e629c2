"""From a graph's bytes to an ONNX Runtime session that was checked against the contract.

Used by `speculation.runtime` alone. Which provider works is found out by trying: ONNX Runtime
lists CUDA wherever its GPU build is installed, with or without a GPU.

    specmoe serve
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, SessionIOBinding

from speculation.errors import GraphFailed, GraphRefused, ProviderUnavailable

Provider = Literal["cpu", "cuda"]
ProviderChoice = Literal["auto", "cpu", "cuda"]
NAME_OF_PROVIDER: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ONNX_TYPE = {
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "uint8": "tensor(uint8)",
}

# ONNX Runtime's severities. Its errors reach us as exceptions, so that it need not print them too.
WARNING, FATAL = 2, 4


@dataclass(frozen=True)
class Tensor:
    """What the contract says of a graph's input or output.

    shape: without the leading batch axis; None for an axis that is free.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def of_one(self) -> tuple[int, ...]:
        """Its shape for a batch of one; a free axis has one entry, too."""
        return (1, *(size or 1 for size in self.shape))

    def __str__(self) -> str:
        axes = ["B", *("M" if size is None else str(size) for size in self.shape)]
        return f"{self.dtype} [{', '.join(axes)}]"


def choose_provider(choice: ProviderChoice, graph: bytes, origin: str) -> Provider:
    """The provider that really runs `graph`. Raises ProviderUnavailable: `cuda` asked for, not working."""
    if choice not in ("auto", "cpu", "cuda"):
        raise ProviderUnavailable(f"There is no provider {choice!r}.", remedy="Choose auto, cpu or cuda.")
    if choice == "cpu":
        return "cpu"
    if NAME_OF_PROVIDER["cuda"] in onnxruntime.get_available_providers():
        with _quiet():
            used = open_session(graph, origin, "cuda", 1).get_providers()
        if used[0] == NAME_OF_PROVIDER["cuda"]:
            return "cuda"
    if choice == "auto":
        return "cpu"
    raise ProviderUnavailable(
        "The provider cuda does not work here: no NVIDIA GPU, or CUDA and cuDNN libraries are missing.",
        remedy="Install NVIDIA's driver, CUDA and cuDNN as onnxruntime-gpu needs them, or choose cpu.",
    )


def open_session(graph: bytes, origin: str, provider: Provider, threads: int) -> onnxruntime.InferenceSession:
    """A session for one-core microseconds. Raises GraphRefused where the bytes are no graph it can run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = FATAL
    # It would keep what the largest call ever needed: 40 MB. Without it, calls take as long.
    options.enable_cpu_mem_arena = False
    # A waiting thread that spins would take the core from the server beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # A graph may name weights in other files, which no checksum covers: no file lies in the null device.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    names = list(dict.fromkeys([NAME_OF_PROVIDER[provider], NAME_OF_PROVIDER["cpu"]]))
    try:
        return onnxruntime.InferenceSession(graph, options, providers=names)
    except Exception as error:  # ONNX Runtime's own errors share no base of their own
        raise GraphRefused(
            f"{origin} is no graph that ONNX Runtime {onnxruntime.__version__} can run: {error}",
            remedy="Export it again, for an operator set this runtime knows.",
        ) from error


@dataclass(frozen=True)
class Signature:
    """What the contract says of a graph. state: inputs it may leave out; the others it must have."""

    state: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graph:
    """A session that does what the contract says: arrays in, arrays out, in the order of `Signature`.

    reads: which of the state's tensors it takes, by their place. outputs: of its signature.
    Raises GraphRefused, naming the tensor.
    """

    def __init__(self, session: onnxruntime.InferenceSession, origin: str, signature: Signature) -> None:
        found = {argument.name for argument in session.get_inputs()}
        self.reads = tuple(place for place, tensor in enumerate(signature.state) if tensor.name in found)
        inputs = [*(signature.state[place] for place in self.reads), *signature.inputs]
        _check_arguments(origin, "input", session.get_inputs(), inputs)
        _check_arguments(origin, "output", session.get_outputs(), signature.outputs)
        self._core, self._origin = _core(session), origin
        self.outputs = signature.outputs
        self._inputs = [tensor.name for tensor in inputs]
        self._outputs = [tensor.name for tensor in signature.outputs]
        # Made once: a call with its own costs 2 µs more.
        self._options = onnxruntime.RunOptions()

    def __call__(self, *arrays: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Outputs from inputs: the state's tensors that it reads, then all others. Raises GraphFailed."""
        feed = dict(zip(self._inputs, arrays, strict=True))
        try:
            outputs: list[np.ndarray[Any, Any]] = self._core.run(self._outputs, feed, self._options)
        except InvalidArgument as error:  # on a GPU, an index beyond a table is passed over
            raise _failed(self._origin, error) from error
        return outputs

    def bind(self, inputs: Sequence[np.ndarray[Any, Any]], outputs: Sequence[np.ndarray[Any, Any]]) -> Bound:
        """The same with arrays that it will always read and write, in the order of a call's."""
        return Bound(
            self._core,
            self._origin,
            dict(zip(self._inputs, inputs, strict=True)),
            dict(zip(self._outputs, outputs, strict=True)),
        )


class Bound:
    """A graph and arrays by name that keep their place. An input must be no output: it is read to the end."""

    def __init__(
        self,
        core: Any,
        origin: str,
        inputs: dict[str, np.ndarray[Any, Any]],
        outputs: dict[str, np.ndarray[Any, Any]],
    ) -> None:
        self._core, self._origin = core, origin
        self._options = onnxruntime.RunOptions()
        self._arrays = inputs, outputs  # the binding does not keep them
        self._binding = SessionIOBinding(core)
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, _in_place(array))
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, _in_place(array))

    def run(self) -> None:
        """Outputs from inputs. Raises GraphFailed."""
        try:
            self._core.run_with_iobinding(self._binding, self._options)
        except RuntimeError as error:  # it has one kind of error for whatever stops a graph
            raise _failed(self._origin, error) from error


def _core(session: onnxruntime.InferenceSession) -> Any:
    """The session without its Python shell, which checks names and devices anew at every call.

    They were checked when the graph was loaded. That saves 4 µs a call, and 31 µs where arrays are bound. The
    shell also keeps the graph's bytes, of the bundled versions 11 MB.
    """
    return session._sess


def _in_place(array: np.ndarray[Any, Any]) -> Any:
    """The array itself, not a copy."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)._ortvalue


def _failed(origin: str, error: Exception) -> GraphFailed:
    return GraphFailed(
        f"{origin} stopped at what it was given: {error}",
        remedy="Give it a state as advance returned it, or as initial_state() makes it.",
    )


def _check_arguments(
    origin: str, kind: str, found: Sequence[onnxruntime.NodeArg], expected: Sequence[Tensor]
) -> None:
    came = {argument.name: argument for argument in found}
    wanted = {tensor.name for tensor in expected}
    if came.keys() != wanted:
        raise GraphRefused(
            f"{origin} has the {kind}s {_listed(came)}, expected {_listed(wanted)}.", remedy=_REMEDY
        )
    for tensor in expected:
        _check_tensor(f"{origin}: {kind} {tensor.name}", came[tensor.name], tensor)


_REMEDY = "Export it again: its signature follows from the manifest's spec and state."


def _check_tensor(origin: str, came: onnxruntime.NodeArg, expected: Tensor) -> None:
    batch, *rest = came.shape or [0]
    # A symbolic dimension (text or None) fits whatever comes; the batch axis must be one.
    fits = len(rest) == len(expected.shape) and all(
        not isinstance(axis, int) or axis == size for axis, size in zip(rest, expected.shape, strict=True)
    )
    if came.type != ONNX_TYPE[expected.dtype] or isinstance(batch, int) or not fits:
        shape = ", ".join("?" if axis is None else str(axis) for axis in came.shape)
        raise GraphRefused(f"{origin} is {came.type} [{shape}], expected {expected}.", remedy=_REMEDY)


def _listed(names: Sequence[str] | set[str] | dict[str, object]) -> str:
    return ", ".join(sorted(names)) or "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's own report of the libraries it did not find: the caller says it better."""
    onnxruntime.set_default_logger_severity(FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(WARNING)
