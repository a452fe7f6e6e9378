"""Define the budgets of a plan: limits of its costs, and the quality that it has to keep."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_SIZE = 0.52
"""Default budget for the size relative to fp16."""


class Budget(BaseModel):
    """Limits of a plan's cost relative to all quantizable layers in float, and its quality. Without any, size is 0.52.

    `activation` limits the largest layer, the others limit the sum. With `psnr` the plan is the fastest with this
    quality, and then the smallest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: float | None = Field(None, gt=0, le=1, description="bytes, relative to fp16")
    latency: float | None = Field(
        None,
        gt=0,
        description="time relative to float: measured times of assign.profile, or else the roofline of the device",
    )
    bops: float | None = Field(
        None, gt=0, le=1, description="multiplications, each counted as weight bits x input bits; 16 x 16 in float"
    )
    psnr: float | None = Field(
        None,
        gt=0,
        description="mean PSNR in dB that the final samples must keep. If 8-bit weights with float inputs reach less"
        " than 3 dB more, assign looks for what they reach: with channel scales and 3 dB to spare, or without scales",
    )
    activation: float | None = Field(
        None,
        gt=0,
        le=1,
        description="bytes that the layer with most activations reads and writes, relative to the same figure in float",
    )

    @model_validator(mode="before")
    @classmethod
    def _never_empty(cls, written: object) -> object:
        empty = isinstance(written, dict) and all(limit is None for limit in written.values())
        return {"size": DEFAULT_SIZE} if empty else written

    @property
    def limits(self) -> dict[str, float]:
        """Limits of summed costs that are given."""
        return {n: limit for n, limit in self.model_dump(exclude={"activation", "psnr"}).items() if limit is not None}
