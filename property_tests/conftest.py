"""Setup of all property tests: the hypothesis profile."""

from __future__ import annotations

import hypothesis_profiles

hypothesis_profiles.load()
