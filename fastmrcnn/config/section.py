"""What every section of the configuration shares."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


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

    def values(self, *names: str) -> dict[str, Any]:
        """These fields by name, or all, to be a module's keyword arguments.

        Raises:
            KeyError: the section has no field of that name.
        """
        fields = dict(self)
        return {name: fields[name] for name in names or fields}

    def without(self, *names: str) -> dict[str, Any]:
        """All fields but these, likewise."""
        fields = dict(self)
        for name in names:
            del fields[name]
        return fields


Positive = Annotated[int, Field(gt=0)]
Side = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# A file, a folder or a URL; `~` is the home folder, whatever the shell has left of it.
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
