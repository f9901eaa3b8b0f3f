"""What every section of the configuration shares."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        strict=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose lines are all commented out reads as null; it means the defaults."""
        return {} if value is None else value


Positive = Annotated[int, Field(gt=0)]
Side = Annotated[float, Field(gt=0, allow_inf_nan=False)]
