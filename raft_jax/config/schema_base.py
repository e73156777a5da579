"""The base class of all config sections, and the number types that they share."""

from __future__ import annotations

from typing import Annotated

import pydantic

Positive = Annotated[int, pydantic.Field(gt=0)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**31)]  # a 32-bit key for jax and grain
Probability = Annotated[float, pydantic.Field(ge=0.0, le=1.0)]


class Section(pydantic.BaseModel):
  """A section of the file. It is immutable, and an unknown key in it is an error."""

  model_config = pydantic.ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True
  )
