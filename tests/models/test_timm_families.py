"""Every family of timm with attention: sites that certify, and what is read and removed there."""

from __future__ import annotations

import pytest
import timm
from family_checks import check
from packaging.version import Version
from timm_models import TIMM, made

from skillfast.models.coverage import randomise

pytestmark = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="older versions of timm lack some of these families"
)

WIDE = ("nextvit", "lowformer")  # their widths are not arguments

FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] if name in WIDE else []) for name in TIMM]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_timm(name):
    model, x = made(name)
    randomise(model)
    check(model, x, len(x))
