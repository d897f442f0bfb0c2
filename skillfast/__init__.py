"""skillfast: find, remove and measure the skills inside trained transformers, without storing activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
