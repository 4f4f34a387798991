"""`--as auto`: which way suits a request in a VM, and why each of the others does not.

Pure. The order is by what the host can promise, not by what is fastest: the one that gives a
guarantee first, then those that the guest can eject, those that only ending QEMU clears, and RAM
only where RAM is asked for, because the guest's kernel would hand the tag's bytes to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tagmem.base.errors import InvalidInput, Unsupported
from tagmem.presenter.contract import Choice, Presenter, Request, Verdict, VmFacts
from tagmem.presenter.cxl import Cxl
from tagmem.presenter.cxl_static import CxlStatic
from tagmem.presenter.dimm import Dimm
from tagmem.presenter.ivshmem import Ivshmem
from tagmem.presenter.nvdimm import Nvdimm
from tagmem.presenter.pmem import Pmem
from tagmem.presenter.vhost_pmem import VhostPmem
from tagmem.presenter.virtio_mem import VirtioMem

AUTO = "auto"


def all_presenters() -> dict[str, Presenter]:
    """Every way there is, the preferred one first."""
    ways: tuple[Presenter, ...] = (
        VhostPmem(),
        Pmem(),
        Ivshmem(),
        Nvdimm(),
        CxlStatic(),
        Cxl(),
        Dimm(),
        VirtioMem(),
    )
    return {way.describe().name: way for way in ways}


def judge(presenter: Presenter, request: Request, vm: VmFacts) -> Verdict:
    """One presenter on one request."""
    return Verdict(presenter.describe().name, presenter.can(request, vm))


def choose(
    presenters: Mapping[str, Presenter], request: Request, vm: VmFacts, wanted: str = AUTO
) -> Choice:
    """The presenter to take, or none; every verdict either way.

    Raises InvalidInput for a name that there is not.
    """
    if wanted != AUTO:
        if wanted not in presenters:
            raise InvalidInput("as", f"one of {', '.join((AUTO, *presenters))}", wanted)
        verdict = judge(presenters[wanted], request, vm)
        if verdict.reason is None:
            return Choice(wanted, "it was asked for", (verdict,))
        return Choice("", f"{wanted}: {verdict.reason}", (verdict,))
    verdicts = tuple(_auto_verdict(way, request, vm) for way in presenters.values())
    for verdict in verdicts:
        if verdict.reason is None:
            return Choice(verdict.presenter, _why(presenters, verdicts, verdict), verdicts)
    return Choice("", "; ".join(f"{v.presenter}: {v.reason}" for v in verdicts), verdicts)


def _auto_verdict(presenter: Presenter, request: Request, vm: VmFacts) -> Verdict:
    what = presenter.describe()
    if what.ram and not request.need.ram:
        return Verdict(what.name, "it would be RAM to the guest, and that was not asked for")
    return judge(presenter, request, vm)


def _why(presenters: Mapping[str, Presenter], verdicts: Sequence[Verdict], chosen: Verdict) -> str:
    what = presenters[chosen.presenter].describe()
    good = [
        "the host can take it back without the guest" if what.guaranteed else "",
        "a real DAX device" if what.dax else "",
        "ordinary memory" if what.ram else "",
        "migrates in place" if what.migration == "stays" else "",
    ]
    why = ", ".join(part for part in good if part) or what.summary
    before = [f"{v.presenter}: {v.reason}" for v in verdicts[: verdicts.index(chosen)]]
    return f"{why} ({'; '.join(before)})" if before else why


def pick(
    presenters: Mapping[str, Presenter], request: Request, vm: VmFacts, wanted: str = AUTO
) -> tuple[Presenter, Choice]:
    """As `choose`. Raises Unsupported with all the reasons where none can."""
    choice = choose(presenters, request, vm, wanted)
    if not choice.presenter:
        raise Unsupported(f"tag {request.tagged.tag} cannot be presented: {choice.why}")
    return presenters[choice.presenter], choice
