"""Merging into a diffusers pipeline: each component that an adapter changes by itself, the rest as it is, all of it or nothing.

How one component is merged, planned or proven is given as a function: that is for the rooms above. What is here divides adapters
among components and puts the outcomes together."""

from .merge import merge_pipeline as merge_pipeline
from .merge import plan_pipeline as plan_pipeline
from .verify import verify_pipeline as verify_pipeline
