"""Sites as the headers of files hold them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from msgspec import structs

from skillfast.models.sites import Site
from skillfast.results.records import Count, Name, Positive, Record
from skillfast.vocabulary import Kind, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence


class SavedSite(Record, frozen=True):
    """A site as files hold it; its fields are those of `Site`."""

    name: Name
    kind: Kind
    block: Count | None
    path: str
    width: Positive
    heads: Positive | None
    experts: Positive | None
    layout: Layout
    inside: str

    def __post_init__(self) -> None:
        for what, parts in (("heads", self.heads), ("experts", self.experts)):
            if parts is not None and self.width % parts:
                raise ValueError(f"expected {what} that divide the {self.width} neurons of {self.name!r}, got {parts}")


def saved_sites(sites: Sequence[Site]) -> list[SavedSite]:
    """The sites as files hold them."""
    return [SavedSite(**asdict(site)) for site in sites]


def sites_of(saved: Sequence[SavedSite]) -> tuple[Site, ...]:
    """The sites that a file holds; raises ValueError where two have one name."""
    if len({site.name for site in saved}) < len(saved):
        raise ValueError("expected sites with different names at sites, got one twice")
    return tuple(Site(**structs.asdict(site)) for site in saved)
