"""Recurrences that write their last state to where the first was: the operation, its kernel under Triton's interpreter, and the
graphs in which that is done."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effcompile import runtime
from effcompile.codegen import attention, recurrence_operation, recurrence_update
from effcompile.ops.recurrence import FEW_STEPS, RecurrenceSpec, reference, update_reference
from tests.interpreter import Ask, interpreted, serve

runtime.register()

UPDATE = torch.ops.effcompile.recurrence_update.default


@dataclass(frozen=True, kw_only=True)
class Case:
    """A few steps from a state. `turned`: in memory, its columns come first. `gap`: it is a part of a larger tensor."""

    decay: str = "head"
    read: str = "after"
    rated: bool = False
    bonus: bool = False
    normaliser: bool = False
    t: int = 1
    b: int = 2
    h: int = 4
    h_k: int = 4
    d_k: int = 24
    d_v: int = 40
    turned: bool = False
    gap: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> RecurrenceSpec:
        given = {"q": True, "k": True, "gate": self.decay != "none", "rate": self.rated, "bonus": self.bonus, "initial": True}
        return RecurrenceSpec(
            operands=tuple(name for name, there in given.items() if there), decay=self.decay, read=self.read,  # type: ignore[arg-type]
            normaliser=self.normaliser, out=str(self.dtype).removeprefix("torch."),
        )  # fmt: skip

    def operands(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """v, the operands but the state, and the state."""
        generator = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        rows, columns = (self.d_k if self.decay == "key" else 1), (self.d_v if self.decay == "value" else 1)
        made = {
            "q": make(self.b, self.h_k, self.t, self.d_k).mul(self.d_k**-0.5).to(self.dtype),
            "k": make(self.b, self.h_k, self.t, self.d_k).to(self.dtype),
            "gate": -make(self.b, self.h, self.t, rows, columns).abs(),
            "rate": make(1, self.h, 1, 1, 1).abs(),
            "bonus": make(1, self.h, 1, self.d_k),
        }
        width = self.d_v + self.normaliser
        state = make(self.b, self.h, width, self.d_k).mT if self.turned else make(self.b, self.h, self.d_k, width)
        if self.gap:
            state = make(self.b, 2 * self.h, *state.shape[2:])[:, ::2].copy_(state)
        v = make(self.b, self.t, self.h, self.d_v).transpose(1, 2).to(self.dtype)
        return v, [made[name] for name in self.spec.operands if name != "initial"], state


CASES: dict[str, Case] = {
    "none": Case(decay="none"),
    "head": Case(),
    "head-turned": Case(turned=True),
    "head-part-of-a-tensor": Case(gap=True),
    "head-before": Case(read="before", bonus=True),
    "head-three-steps": Case(t=3, turned=True),
    "head-grouped": Case(h_k=1),
    "key-rated": Case(decay="key", rated=True),
    "key-before-bonus": Case(decay="key", read="before", bonus=True, t=2),
    "value": Case(decay="value", turned=True),
    "normaliser": Case(normaliser=True, d_v=70),
    "normaliser-before": Case(normaliser=True, read="before", decay="key", t=2),
    "half": Case(dtype=torch.float16),
    "eight-steps": Case(t=8, decay="key", b=1, h=2, h_k=2),
}  # fmt: skip


def errors_of(case: Case, update: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Relative errors of the results, and 1 where memory that is not the state's was written to, or the state moved."""
    v, operands, state = case.operands()
    exact = [x.double() for x in (v, *operands, state)]
    out, normaliser, final = reference(exact[0], exact[1:], case.spec, dtype=torch.float64)
    whole = torch.as_strided(state, (state.untyped_storage().nbytes() // state.element_size(),), (1,), 0)
    before = whole.clone()
    got = update(v, operands, state)
    own = torch.zeros_like(whole, dtype=torch.bool)
    torch.as_strided(own, state.shape, state.stride(), state.storage_offset()).fill_(True)
    errors = {"out": difference(got[0], out), "normaliser": difference(got[1], normaliser), "state": difference(state, final)}
    return errors | {"others": float(not torch.equal(whole[~own], before[~own]))}


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return math.inf
    return 0.0 if ours.numel() == 0 else float((ours.double() - theirs).norm() / theirs.norm())


def on_gpu(name: str) -> dict[str, float]:
    """Errors of the generated kernel; raises if it takes no such case."""

    def update(v: Tensor, operands: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        found = recurrence_update.on_gpu(v, operands, state, CASES[name].spec, "bhtd")
        assert found is not None
        return found

    return errors_of(CASES[name], update)


# -------------------------------------------------------------------- the operation and its kernel


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with interpreted(__file__, tmp_path_factory.mktemp("kernels")) as found:
        yield found


def limit(case: Case) -> float:
    return 2e-3 if case.dtype == torch.float16 else 2e-6


@pytest.mark.parametrize("name", CASES)
def test_operation_on_a_cpu(name: str) -> None:
    case = CASES[name]
    errors = errors_of(case, lambda v, x, state: UPDATE(v, x, state, case.spec.to_json(), "bthd"))
    assert max(errors.values()) <= limit(case), errors


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, ask: Ask) -> None:
    errors = ask("update", name)
    assert set(errors) == {"out", "normaliser", "state", "others"}
    assert max(errors.values()) <= limit(CASES[name]), errors


def test_a_large_state_is_updated_part_by_part() -> None:
    case = Case(b=3, h=6, h_k=6, d_k=128, d_v=640)  # 81920 elements a head: three heads at a time
    errors = errors_of(case, lambda v, x, state: UPDATE(v, x, state, case.spec.to_json(), "bhtd"))
    assert max(errors.values()) <= 2e-6, errors


@pytest.mark.parametrize("case", [Case(t=20), Case(t=0)], ids=["many-steps", "no-step"])
def test_what_no_kernel_updates_is_copied(case: Case) -> None:
    errors = errors_of(case, lambda v, x, state: UPDATE(v, x, state, case.spec.to_json(), "bhtd"))
    assert max(errors.values()) <= 2e-6, errors
    v, operands, state = case.operands()
    assert recurrence_update.on_gpu(v, operands, state, case.spec, "bhtd") is None or case.t <= FEW_STEPS


def test_operation_of_a_single_row() -> None:
    spec = RecurrenceSpec(operands=("gate", "initial"), decay="value", gate="factor")
    v, gate, state = torch.randn(2, 3, 1, 8), torch.rand(2, 3, 1, 1, 8), torch.randn(2, 3, 1, 8)
    wanted = gate[:, :, 0] * state + v
    out, normaliser = UPDATE(v, [gate], state, spec.to_json(), "bhtd")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(state, wanted)
    assert normaliser.numel() == 0


def test_reference_writes_the_state() -> None:
    case = CASES["key-rated"]
    errors = errors_of(case, lambda v, x, state: update_reference(v, x, state, case.spec))
    assert max(errors.values()) <= 2e-6, errors


def test_schema_and_fake_agree_with_what_is_done() -> None:
    case = CASES["head-turned"]
    v, operands, state = case.operands()
    torch.library.opcheck(UPDATE, (v, operands, state, case.spec.to_json(), "bhtd"), test_utils=("test_schema", "test_faketensor"))


def test_few_steps_are_the_same_number_everywhere() -> None:
    assert recurrence_operation.FEW == FEW_STEPS


if __name__ == "__main__":
    attention._directory = Path(sys.argv[1])
    serve({"update": on_gpu})
    sys.exit()
