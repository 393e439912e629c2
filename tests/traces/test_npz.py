"""The neutral .npz form: what it holds arrives unchanged, and everything malformed is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.traces.made_up import made_up_trace, npz_arrays, same, traces, write_npz
from traces.errors import TraceError, TraceFormatError
from traces.importers import npz
from traces.trace import RoutingTrace


class Touched(Exception):
    """Unpickling was tried."""


class Bait:
    def __reduce__(self) -> tuple[Any, ...]:
        return _touch, ()


def _touch() -> None:
    raise Touched


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traces())
def test_a_trace_comes_back_as_it_was_saved(tmp_path: Path, trace: RoutingTrace) -> None:
    assert same(npz.read(write_npz(tmp_path / "x.npz", trace)), trace)


def test_compressed_and_narrow_arrays_are_read(tmp_path: Path) -> None:
    trace = made_up_trace()
    assert trace.gates is not None
    np.savez_compressed(tmp_path / "x.npz", **npz_arrays(trace) | {"gates": trace.gates.astype(np.float16)})
    read = npz.read(tmp_path / "x.npz")
    assert np.array_equal(read.experts, trace.experts)
    assert read.gates is not None
    assert np.allclose(read.gates, trace.gates, atol=1e-3)


def test_arrays_in_columns_and_of_other_byte_order_are_read(tmp_path: Path) -> None:
    trace = made_up_trace()
    swapped = np.asfortranarray(trace.experts).astype(">i4", order="F")
    assert same(npz.read(write_npz(tmp_path / "x.npz", trace, experts=swapped)), trace)


def test_without_domains_they_are_unknown(tmp_path: Path) -> None:
    assert npz.read(write_npz(tmp_path / "x.npz", domains=None)).domains == ("unknown",) * 3


def test_arrays_of_other_names_are_not_read(tmp_path: Path) -> None:
    bait = np.array([Bait()], dtype=object)
    assert same(npz.read(write_npz(tmp_path / "x.npz", notes=bait)), made_up_trace())


def test_the_model_can_be_named(tmp_path: Path) -> None:
    assert npz.read(write_npz(tmp_path / "x.npz", model=None), model="mine").spec.model == "mine"


ROUTED = made_up_trace().experts


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        pytest.param({"experts": None}, "experts missing", id="experts missing"),
        pytest.param({"starts": None, "num_experts": None}, "starts, num_experts missing", id="two missing"),
        pytest.param({"model": None}, "does not name its model", id="model missing"),
        pytest.param({"model": np.array("a/b")}, "name 'a/b' is not usable", id="model name"),
        pytest.param({"model": np.array(["a", "b"])}, "model is .2., expected one value", id="two models"),
        pytest.param({"num_experts": np.array(1)}, "num_experts is 1, expected 2", id="num_experts"),
        pytest.param({"num_experts": np.array([8, 8])}, "num_experts is .2.", id="num_experts twice"),
        pytest.param(
            {"num_experts": np.array(8.0)}, "num_experts is float64, expected integers", id="number"
        ),
        pytest.param({"num_experts": np.array(7)}, "expert id is 7, expected 0 to 6", id="fewer experts"),
        pytest.param({"experts": ROUTED[0]}, r"experts is \[3, 2\]", id="shape"),
        pytest.param({"experts": ROUTED[:, :0]}, "num_layers is 0", id="no layers"),
        pytest.param({"experts": ROUTED[:7]}, r"gates is float32 \[8, 3, 2\], expected", id="fewer tokens"),
        pytest.param({"experts": ROUTED.astype(float)}, "experts is float64, expected integers", id="dtype"),
        pytest.param({"experts": ROUTED.astype(object)}, "experts is object", id="object experts"),
        pytest.param({"domains": np.array([Bait()] * 3)}, "domains is object, expected strings", id="pickle"),
        pytest.param(
            {"experts": ROUTED.astype(np.uint64) + 2**16},
            r"experts\[0, 0, 0\] is \d+, expected -32768 to 32767",
            id="ids that would wrap",
        ),
        pytest.param(
            {"token_ids": np.full(8, 2**40)}, r"token_ids\[0\] is 1099511627776", id="huge token id"
        ),
        pytest.param({"gates": np.full(ROUTED.shape, 1e300)}, "gate is inf", id="gate beyond float32"),
        pytest.param({"gates": np.full(ROUTED.shape, np.nan)}, "token 0, layer 0: gate is nan", id="nan"),
        pytest.param({"starts": np.array(3)}, r"starts \[\]", id="starts scalar"),
        pytest.param({"starts": np.array([], int)}, r"starts \[0\]", id="starts empty"),
        pytest.param({"starts": np.array([0, 5, 4, 8])}, "sequence 1 ends before", id="starts decrease"),
        pytest.param(
            {"domains": np.array(["a"])}, r"domains is \[1\], expected one for each of the 3", id="few"
        ),
    ],
)
def test_a_malformed_file_is_refused_with_its_name(
    tmp_path: Path, replaced: dict[str, Any], reason: str
) -> None:
    path = write_npz(tmp_path / "x.npz", **replaced)
    with pytest.raises(TraceError, match=reason) as refusal:
        npz.read(path)
    assert refusal.value.message.startswith(str(path))


@pytest.mark.parametrize("keep", [0, 30, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = write_npz(tmp_path / "x.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(TraceFormatError, match="cannot be read as"):
        npz.read(path)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    content = bytearray(path.read_bytes())
    content[content.index(ROUTED.astype(np.uint8).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(TraceFormatError, match="CRC"):
        npz.read(path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(pickle.dumps(Bait()))
    with pytest.raises(TraceFormatError, match="not a zip file"):
        npz.read(path)


def write_member(path: Path, name: str, content: bytes) -> None:
    write_npz(path, **{name: None})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", content)


def test_an_array_that_claims_more_than_the_file_holds_is_refused_before_memory_is_taken(
    tmp_path: Path,
) -> None:
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (1 << 50, 3, 2)}
    np.lib.format.write_array_header_1_0(header, claim)
    write_member(tmp_path / "x.npz", "experts", header.getvalue() + b"few")
    with pytest.raises(TraceFormatError, match="experts claims 6755399441055744 bytes; the file holds"):
        npz.read(tmp_path / "x.npz")


def test_an_array_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MAX_ARRAY_BYTES", 40)
    with pytest.raises(TraceFormatError, match=r"experts claims 48 bytes.*40 is the most"):
        npz.read(write_npz(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    "content",
    [b"", b"no array", np.lib.format.magic(9, 0) + b"\0" * 40, np.lib.format.magic(1, 0) + b"\4\0{!}\n"],
    ids=["empty", "text", "version", "header"],
)
def test_a_member_that_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    write_member(tmp_path / "x.npz", "experts", content)
    with pytest.raises(TraceFormatError, match="cannot be read as"):
        npz.read(tmp_path / "x.npz")
