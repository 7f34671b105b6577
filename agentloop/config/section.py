"""What every section of a recipe is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are checked again when assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
